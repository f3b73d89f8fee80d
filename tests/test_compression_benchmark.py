"""The compression benchmark's verdicts, and that its goals are about recipes that there are."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from benchmarks.compression import measure as benchmark
from benchmarks.compression.goals import BASELINES, GOALS, WORKLOADS, Goal, judge
from benchmarks.compression.results import merge, table
from compression.planner import plan
from compression.recipe import find_recipe
from compression.workload import load_workload
from tests.test_docs import ROOT

GOAL = Goal(
    "fashion",
    "int8-static",
    "INT8",
    smaller=3.9,
    faster=3,
    faster_than_torch=5,
    drop=0.3,
    kept=0.97,
    fewer_weights=2,
    no_loss=True,
    no_group_worse=True,
)
MET: dict[str, Any] = {
    "size_ratio": 3.9,
    "weights_ratio": 2.0,
    "latency_ratio": 3.0,
    "torch_ratio": 5.0,
    "quality": 0.9,
    "quality_drop": 0.003,
    "ci": [0.0, 0.006],
    "groups_worse": [],
    "beaten_by": [],
}


def test_a_row_that_is_just_good_enough_meets_its_goal() -> None:
    assert judge(GOAL, MET) == []


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"size_ratio": 3.89}, "smaller"),
        ({"weights_ratio": 1.9}, "fewer weights"),
        ({"latency_ratio": 2.9}, "faster"),
        ({"torch_ratio": 4.9}, "faster than torch"),
        ({"quality_drop": 0.0031}, "drop"),
        ({"quality": 0.09}, "accuracy kept"),
        ({"ci": [0.0001, 0.006]}, "no loss"),
        ({"groups_worse": ["INK=light"]}, "groups"),
        ({"beaten_by": ["nncf"]}, "a peer is better"),
    ],
)
def test_each_part_of_a_goal_can_be_missed(change: dict[str, Any], missed: str) -> None:
    assert judge(GOAL, MET | change) == [missed]


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: f"{goal.workload}-{goal.variant}")
def test_every_goal_is_of_a_recipe_that_can_work_and_is_run(goal: Goal) -> None:
    bench = WORKLOADS[goal.workload]
    workload = load_workload(ROOT / bench.folder)
    plan(find_recipe(goal.variant, workload.directory), workload)
    assert bench.recipes is None or goal.variant in bench.recipes
    assert goal.text().startswith(f"{goal.title}: ")


def test_how_much_faster_is_the_median_of_rounds_in_which_both_were_timed() -> None:
    # Full precision, which both are held against, was fast in the second round.
    ratios = {("ours", 1): [4.0, 2.0, 4.0], ("peer", 1): [4.4, 2.2, 3.6]}
    assert benchmark._faster(ratios, "peer", "ours") == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("rounds", "surely"), [([1.06] * 4 + [0.9], True), ([1.3] * 3 + [1.04] * 2, False), ([1.05] * 5, False)]
)
def test_a_peer_is_faster_when_it_is_in_four_of_five_rounds(rounds: list[float], surely: bool) -> None:
    ratios = {("ours", 1): [1.0] * 5, ("peer", 1): rounds}
    assert benchmark._surely_faster(ratios, "peer", "ours") is surely


def test_every_round_loads_every_model_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bytes] = []
    monkeypatch.setattr(benchmark, "open_session", lambda content: opened.append(content) or content)
    speedups = itertools.count(1.0)
    monkeypatch.setattr(benchmark, "latency", lambda *_, **__: SimpleNamespace(speedup=next(speedups)))
    models = [SimpleNamespace(name=name, content=name.encode()) for name in ("full", "int8")]
    eager = Mock()
    options = benchmark.Options(rounds=2, seconds=0.1, cache=ROOT)
    found = benchmark._ratios(models, eager, {}, options)  # type: ignore[arg-type]
    assert Counter(opened) == {b"full": 4, b"int8": 2}  # full precision is also what each is timed beside
    assert eager.call_count == 2
    assert {name: len(ratios) for name, ratios in found.items()} == {
        (name, batch): 2 for name in ("full", "int8", benchmark.TORCH) for batch in (1, 32)
    }


def test_baselines_are_of_workloads_that_there_are() -> None:
    assert BASELINES.keys() <= WORKLOADS.keys()


def test_new_rows_take_the_place_of_the_workloads_old_ones_on_the_same_machine_only() -> None:
    here = {"cpu": "a", "cores": 2, "date": "2026-01-01"}
    before = {
        "rows": [{"workload": "x", "variant": "old"}, {"workload": "y", "variant": "kept"}],
        "machine": here,
        "minutes": {"x": 1.0, "y": 2.0},
    }
    now = merge(before, "x", [{"workload": "x", "variant": "new"}], here, {"x": 3.0})
    assert [row["variant"] for row in now["rows"]] == ["kept", "new"]
    assert now["minutes"] == {"x": 3.0, "y": 2.0}
    elsewhere = merge(before, "x", [{"workload": "x", "variant": "new"}], here | {"cpu": "b"}, {"x": 3.0})
    assert [row["variant"] for row in elsewhere["rows"]] == ["new"]


def test_a_failure_is_a_row_that_says_why() -> None:
    row = {"workload": "x", "variant": "nncf", "kind": "problem", "problem": "no such thing", "met": None}
    assert "failed: no such thing" in table([row])
