from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from compression.variant import Variant
from compression.workload import Workload
from monitoring.ledger import PairRow, Route
from services.arms import load_model
from services.live import Live
from services.shadow import answer_samples
from tests import models

# Full precision says 1 and 0; "worse" turns an answer round where d is over 0.7.
HIGH = {"a": 0.4, "b": 0.0, "c": 0.0, "d": 0.9, "TEAM": "A"}
LOW = {"a": -0.4, "b": 0.0, "c": 0.0, "d": 0.0, "TEAM": "B"}


@pytest.fixture
def live(variants: dict[str, Variant], workload: Workload) -> Live:
    route = Route(
        revision=1, rollout_id="points-1", control=variants["full"].tag, treatment=variants["worse"].tag
    )
    return Live(route, load_model(variants["full"], workload), load_model(variants["worse"], workload))


def sample(arm: str, records: list[dict[str, Any]], classes: list[int], **changes: Any) -> dict[str, Any]:
    return {
        "rollout_id": "points-1",
        "request_id": "r~1",
        "arm": arm,
        "treatment_failed": False,
        "records": records,
        "judged": 0,
        "classes": classes,
        "confidences": [0.9] * len(classes),
        "at": 1000.0,
        **changes,
    }


def pairs_of(*arguments: Any, **options: Any) -> list[PairRow]:
    rows, taken = answer_samples(*arguments, **options)
    assert taken == len(arguments[0])
    return rows


def test_what_control_served_is_answered_by_the_treatment(live: Live, workload: Workload) -> None:
    (row,) = pairs_of([sample("control", [HIGH], [1])], live, workload)
    assert (row.control, row.treatment) == (1, 0)
    assert row.control_confidence == 0.9
    assert row.treatment_confidence != 0.9


def test_what_the_treatment_served_is_answered_by_control(live: Live, workload: Workload) -> None:
    (row,) = pairs_of([sample("treatment", [HIGH], [0])], live, workload)
    assert (row.control, row.treatment) == (1, 0)
    assert row.treatment_confidence == 0.9
    assert row.control_confidence != 0.9


@pytest.mark.parametrize(
    ("judged", "classes", "team"), [(0, (1, 0), "A"), (1, (0, 0), "B"), (2, (1, 0), "A")]
)
def test_one_record_of_a_request_is_judged_and_all_are_answered_together(
    live: Live, workload: Workload, judged: int, classes: tuple[int, int], team: str
) -> None:
    records = [HIGH, LOW, HIGH]
    (row,) = pairs_of([sample("control", records, [1, 0, 1], judged=judged)], live, workload)
    assert (row.request_id, row.index) == ("r~1", judged)
    assert (row.control, row.treatment) == classes
    assert (row.groups, row.record) == ({"TEAM": team}, records[judged])


def test_a_batch_that_takes_longer_than_its_budget_is_taken_in_part(live: Live, workload: Workload) -> None:
    samples = [sample("control", [LOW], [0], request_id=f"r~{number}") for number in range(5)]
    rows, taken = answer_samples(samples, live, workload, budget=0.0)
    assert ([row.request_id for row in rows], taken) == (["r~0"], 1)


def test_a_sample_that_cannot_be_encoded_any_more_leaves_one_side_unknown(
    live: Live, workload: Workload
) -> None:
    samples = [
        sample("control", [{**HIGH, "a": None}], [1]),
        sample("control", [LOW], [0], request_id="r~2"),
    ]
    rows = pairs_of(samples, live, workload)
    assert [(row.control, row.treatment) for row in rows] == [(1, None), (0, 0)]


def test_a_pair_says_who_served_it_and_when(live: Live, workload: Workload) -> None:
    (row,) = pairs_of([sample("treatment", [LOW], [0], at=123.5)], live, workload)
    assert (row.rollout_id, row.served_arm, row.created_at) == ("points-1", "treatment", 123.5)


def test_where_the_treatment_had_failed_its_side_is_unknown_and_it_is_not_asked_again(
    live: Live, workload: Workload
) -> None:
    (row,) = pairs_of([sample("control", [HIGH], [1], treatment_failed=True)], live, workload)
    assert (row.control, row.treatment, row.treatment_confidence) == (1, None, None)


def test_an_arm_that_fails_here_leaves_its_side_unknown(
    live: Live, workload: Workload, variants: dict[str, Variant]
) -> None:
    broken = replace(live, treatment=load_model(variants["broken"], workload))
    (row,) = pairs_of([sample("control", [{**HIGH, "a": 0.9}, LOW], [1, 0], judged=1)], broken, workload)
    assert (row.control, row.treatment) == (0, None)


def test_an_arm_that_is_not_loaded_here_leaves_its_side_unknown(live: Live, workload: Workload) -> None:
    (row,) = pairs_of([sample("control", [HIGH], [1])], replace(live, treatment=None), workload)
    assert (row.control, row.treatment) == (1, None)


def test_samples_of_another_rollout_are_dropped(live: Live, workload: Workload) -> None:
    samples = [sample("control", [HIGH], [1], rollout_id="points-0"), sample("control", [LOW], [0])]
    rows = pairs_of(samples, live, workload)
    assert [row.record for row in rows] == [LOW]


def test_an_arm_that_hangs_on_a_request_leaves_its_side_unknown_and_the_others_known(
    live: Live, workload: Workload, variants: dict[str, Variant]
) -> None:
    stuck = replace(live, treatment=load_model(variants["stuck"], workload))
    samples = [
        sample("control", [{**HIGH, "a": 0.9}], [1]),
        sample("control", [LOW], [0], request_id="r~2"),
    ]
    rows = pairs_of(samples, stuck, workload, deadline=0.2)
    assert [(row.control, row.treatment) for row in rows] == [(1, None), (0, 0)]


def test_what_is_no_longer_wanted_is_not_asked(live: Live, workload: Workload) -> None:
    answers = iter([True, True, False])
    samples = [sample("control", [LOW], [0], request_id=f"r~{number}") for number in range(5)]
    rows = pairs_of(samples, live, workload, wanted=lambda: next(answers))
    assert [row.request_id for row in rows] == ["r~0", "r~1"]


def test_requests_are_never_batched_together(live: Live, workload: Workload) -> None:
    sizes = []
    run = live.control.run

    def noting(inputs: Any, *rest: Any) -> Any:
        sizes.append(len(inputs["x"]))
        return run(inputs, *rest)

    live.control.run = noting  # type: ignore[method-assign]
    answer_samples(
        [sample("treatment", [HIGH, LOW], [0, 0]), sample("treatment", [LOW], [0])], live, workload
    )
    assert sizes == [2, 1]


def test_a_record_without_a_group_costs_no_other_pair(live: Live, workload: Workload) -> None:
    class Forgiving(type(workload)):  # type: ignore[misc]
        def encode(self, records: Any) -> Any:
            return super().encode([{"TEAM": "A", **record} for record in records])

    forgiving = Forgiving(workload.settings, workload.directory)
    bare = {name: value for name, value in HIGH.items() if name != "TEAM"}
    rows: list[PairRow] = pairs_of(
        [sample("control", [bare], [1]), sample("control", [LOW], [0], request_id="r~2")], live, forgiving
    )
    assert [row.groups for row in rows] == [{}, {"TEAM": "B"}]


def test_models_are_never_asked_about_nothing(live: Live, workload: Workload) -> None:
    assert answer_samples([], live, workload) == ([], 0)


def test_points_know_their_truth(workload: Workload, live: Live) -> None:
    records = [record for record, _ in models.points(200)]
    found = live.control.run(workload.encode(records)).predictions.classes.tolist()
    assert found == [truth for _, truth in models.points(200)]
