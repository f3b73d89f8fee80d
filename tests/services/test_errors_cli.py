"""`trimtab errors`: what compression broke, on a split and on a rollout's pairs."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from compression.errors import CompressionError, VariantNotFound
from compression.variant import Variant
from compression.workload import Split, Workload
from monitoring.errors import RolloutNotFound, TrimtabError
from monitoring.ledger import LabelRow, Ledger, PairRow
from monitoring.policy import Policy
from services import cli
from services.errors import BadRequest, ServingError
from tests import models

app = typer.Typer()
cli.register(app)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["errors", str(models.WORKLOAD), *arguments])


def run(*arguments: str) -> str:
    """Standard output of the command; an error of ours is raised."""
    result = invoke(*arguments)
    if isinstance(result.exception, (CompressionError, TrimtabError, ServingError)):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(autouse=True)
def splits(workload: Workload, variants: dict[str, Variant], monkeypatch: pytest.MonkeyPatch) -> None:
    """Points with their true classes as the test split (2,000) and the validation split (500)."""

    def split(self: Workload, name: str) -> Split:
        rows = list(models.points(2000 if name == "test" else 500, seed=len(name)))
        return Split(pd.DataFrame([record for record, _ in rows]), np.array([label for _, label in rows]))

    monkeypatch.setattr(type(workload), "split", split)


def test_the_harmed_group_comes_first_with_its_rows() -> None:
    found = json.loads(run("harms-b", "--json"))
    assert found["split"] == "test"
    assert found["candidate"].startswith("points-harms-b:")
    assert found["full"].startswith("points-full:")
    assert found["rows"] == 2000
    assert found["worst"] == found["groups"][0]["name"] == "TEAM=B"
    worst, other = found["groups"]
    assert worst["lost"] == worst["rows"] == found["overall"]["lost"]
    assert (other["lost"], other["won"]) == (0, 0)
    assert len(found["lost_rows"]) == 20
    assert all(row["record"]["TEAM"] == "B" and row["full"] == row["label"] for row in found["lost_rows"])


def test_the_tables_show_groups_classes_both_matrices_and_examples() -> None:
    text = run("harms-b", "--examples", "2")
    for words in ("lost most: TEAM=B, net drop 100.00 pt", "by true class", "by group", "2 of ", "TEAM=B)"):
        assert words in text
    assert "answers by true class: full precision / candidate" in text
    assert text.count("taken for") == 2


def test_the_validation_split_can_be_asked_for() -> None:
    found = json.loads(run("harms-b", "--split", "validation", "--json"))
    assert (found["split"], found["rows"]) == ("validation", 500)


def test_outputs_that_are_no_numbers_are_lost_and_counted_apart() -> None:
    found = json.loads(run("broken", "--json"))
    assert found["answers"] == ["low", "high", "(no answer)"]
    assert sum(line[2] for line in found["matrix"]) == found["overall"]["lost"] > 400
    assert sum(line[2] for line in found["matrix_full"]) == 0


def test_a_candidate_that_loses_nothing_is_said_to() -> None:
    assert "nothing of 30 rows or more lost accuracy" in run("heavy")


def test_a_variant_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(VariantNotFound, match=r"no variant points-int3 .*; there are .*harms-b"):
        run("int3")


def test_full_precision_is_refused_with_those_to_name_instead() -> None:
    with pytest.raises(BadRequest, match=r"is full precision itself.*: name one of .*harms-b"):
        run("full")


def test_without_a_variant_one_is_asked_for_where_there_are_several() -> None:
    with pytest.raises(BadRequest, match=r"which variant of points\? name one of .*harms-b"):
        run()


@pytest.mark.parametrize(
    "arguments", [("same", "--rollout", "current"), ("--rollout", "current", "--split", "test")]
)
def test_a_rollout_has_its_own_candidate_and_rows(arguments: tuple[str, ...]) -> None:
    with pytest.raises(BadRequest, match="leave VARIANT and --split out"):
        run(*arguments)


# On a rollout's pairs ------------------------------------------------------------------------------------


@pytest.fixture
def rollout_id(ledger: Ledger) -> str:
    """A rollout of 60 pairs that lost each one of team B, without labels."""
    rollout = ledger.create_rollout(
        workload="points",
        control="points-full:1",
        treatment="points-harms-b:1",
        policy=Policy(),
        actor="ada",
        now=time.time(),
        classes=("low", "high"),
    )
    ledger.record_pairs([_pair(rollout.id, i) for i in range(60)])
    return rollout.id


def _pair(rollout_id: str, i: int) -> PairRow:
    fields: dict[str, Any] = {
        "control_confidence": 0.9,
        "treatment_confidence": 0.9,
        "created_at": time.time(),
    }
    team = "B" if i % 2 else "A"
    answers = {"control": 1, "treatment": 0 if team == "B" else 1}
    where = {"rollout_id": rollout_id, "request_id": f"q{i}", "index": 0, "served_arm": "control"}
    return PairRow(**where, **answers, **fields, groups={"TEAM": team}, record={"a": i})


def label(ledger: Ledger, count: int) -> None:
    ledger.record_labels([LabelRow(f"q{i}", 0, 1, time.time()) for i in range(count)])


@pytest.mark.parametrize("which", ["current", "id"])
def test_labelled_pairs_of_a_rollout_are_analysed(which: str, ledger: Ledger, rollout_id: str) -> None:
    label(ledger, 40)
    found = json.loads(run("--rollout", rollout_id if which == "id" else which, "--json"))
    assert found["rollout"] == rollout_id
    assert (found["rows"], found["left_out"]) == (40, 20)
    assert {s["name"]: s["lost"] for s in found["groups"]} == {"TEAM=A": 0, "TEAM=B": 20}
    assert found["lost_rows"][0]["record"] == {"a": 1}


def test_only_the_newest_pairs_are_read(ledger: Ledger, rollout_id: str) -> None:
    label(ledger, 60)
    assert json.loads(run("--rollout", "current", "--pairs", "10", "--json"))["rows"] == 10


def test_users_text_does_not_steer_the_terminal(ledger: Ledger, rollout_id: str) -> None:
    row = _pair(rollout_id, 99)
    evil = "\x1b[2J[bold]gone"
    ledger.record_pairs([PairRow(**{f: getattr(row, f) for f in row.__slots__} | {"record": {"note": evil}})])
    ledger.record_labels([LabelRow("q99", 0, 1, time.time())])
    text = run("--rollout", "current")
    assert "\x1b" not in text
    assert "note= [2J[bold]gone" in text


def test_without_labels_it_exits_4_and_says_where_to_send_them(ledger: Ledger, rollout_id: str) -> None:
    result = invoke("--rollout", "current")
    assert result.exit_code == 4
    assert result.stdout == ""
    assert "has a label and both answers yet, of 60: send labels to /feedback" in result.stderr


def test_an_unknown_rollout_is_a_one_line_error(ledger: Ledger, rollout_id: str) -> None:
    with pytest.raises(RolloutNotFound, match="no rollout is called"):
        run("--rollout", "unknown")
