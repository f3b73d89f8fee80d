"""The compression benchmark's verdicts, and that its goals are about recipes that there are."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.compression.goals import BASELINES, GOALS, WORKLOADS, Goal, judge
from benchmarks.compression.measure import _faster
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
    # The machine was slow in the second round, for both.
    ratios = {("ours", 1): [4.0, 2.0, 4.0], ("peer", 1): [4.4, 2.2, 3.6]}
    assert _faster(ratios, "peer", "ours") == pytest.approx(1.1)


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
