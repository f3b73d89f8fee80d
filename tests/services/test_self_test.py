"""The Monitor's self-test: on reference rows where there are any."""

from __future__ import annotations

from pathlib import Path

import pytest

from compression.variant import REFERENCE, Variant
from monitoring.policy import parse_policy
from monitoring.records import Rollout
from monitoring.self_test import MIN_ROWS
from services.self_test import before_traffic, reference_rows


def rollout(control: str) -> Rollout:
    return Rollout("points-1", "points", control, "points-same", parse_policy(None), classes=("low", "high"))


def test_the_reference_rows_of_full_precision_are_replayed(variants: dict[str, Variant]) -> None:
    rows = reference_rows(rollout(variants["full"].tag))
    assert rows is not None
    assert len(rows) >= MIN_ROWS
    assert {row.label for row in rows} == {row.control for row in rows} == {0, 1}
    assert {value for row in rows for value in row.groups.values()} == {"A", "B"}
    result = before_traffic(rollout(variants["full"].tag))
    assert result.passed
    assert "of reference rows held" in result.sentence


@pytest.mark.parametrize("control", ["points-nobody:1", "no tag at all"])
def test_a_variant_that_is_gone_means_made_up_rows(control: str) -> None:
    assert reference_rows(rollout(control)) is None
    result = before_traffic(rollout(control))
    assert result.passed
    assert "of made-up rows held" in result.sentence


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more"], ids=["empty", "cut-off"])
def test_reference_rows_that_cannot_be_read_mean_made_up_rows(
    variants: dict[str, Variant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    broken = tmp_path / REFERENCE
    broken.write_bytes(content)
    monkeypatch.setattr(Variant, "asset", lambda *_: broken)
    assert reference_rows(rollout(variants["full"].tag)) is None


def test_reference_rows_without_answers_mean_made_up_rows(
    variants: dict[str, Variant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas as pd

    pd.DataFrame({"label": [0, 1]}).to_parquet(tmp_path / REFERENCE)
    monkeypatch.setattr(Variant, "asset", lambda *_: tmp_path / REFERENCE)
    assert reference_rows(rollout(variants["full"].tag)) is None


def test_a_variant_without_reference_rows_means_made_up_rows(variants: dict[str, Variant]) -> None:
    assert reference_rows(rollout(variants["same"].tag)) is None
