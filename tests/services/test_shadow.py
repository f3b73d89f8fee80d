from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import bentoml
import httpx
import numpy as np
import orjson
import pytest

from compression.variant import Variant
from compression.workload import Workload
from monitoring.ledger import Ledger, PairRow, Route
from monitoring.policy import parse_policy
from services.arms import load_model
from services.duty import DutyCycle
from services.live import Live
from services.process import give_way
from services.samples import packed, unpacked
from services.settings import Settings
from services.shadow import Shadow, answer_samples
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
        "rows": len(records),
        "judged": 0,
        "answer": [classes[changes.get("judged", 0)], 0.9],
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


def test_a_sample_of_tensors_is_answered_like_one_of_records(live: Live, workload: Workload) -> None:
    records = sample("control", [LOW, HIGH], [0, 1], judged=1)
    tensors = {name: value for name, value in records.items() if name != "records"}
    tensors |= {"tensors": packed(workload.encode([LOW, HIGH])), "groups": [{"TEAM": "B"}, {"TEAM": "A"}]}
    (by_records,), (by_tensors,) = (pairs_of([s], live, workload) for s in (records, tensors))
    assert by_tensors == replace(by_records, record={})


def test_what_was_answered_in_tensors_is_read_as_the_gateway_reads_it(live: Live, workload: Workload) -> None:
    read = sample("control", [HIGH], [1])
    outputs = live.control.run(workload.encode([HIGH]), 1)
    decoded = live.control.decode(outputs)
    del read["answer"]
    read["outputs"] = packed(dict(zip(live.control._names, outputs, strict=True)))
    (row,) = pairs_of([read], live, workload)
    assert (row.control, row.treatment) == (1, 0)
    assert row.control_confidence == float(decoded.confidences[0])


def test_what_nobody_can_read_is_a_pair_without_that_side(live: Live, workload: Workload) -> None:
    unreadable = sample("control", [HIGH], [1])
    del unreadable["answer"]
    unreadable["outputs"] = packed({"logits": np.array([[np.nan, 1.0]], np.float32)})
    (row,) = pairs_of([unreadable], live, workload)
    assert (row.control, row.control_confidence, row.treatment) == (None, None, 0)


@pytest.mark.parametrize(("groups", "found"), [(None, {}), ([{"TEAM": "B"}], {"TEAM": "B"})])
def test_groups_of_tensors_are_none_or_those_of_the_whole_request(
    live: Live, workload: Workload, groups: Any, found: dict[str, str]
) -> None:
    tensors = sample("control", [LOW, HIGH], [0, 1], judged=1)
    del tensors["records"]
    tensors |= {"tensors": packed(workload.encode([LOW, HIGH])), "groups": groups}
    (row,) = pairs_of([tensors], live, workload)
    assert row.groups == found


def test_text_survives_the_way_to_the_shadow() -> None:
    tensors = {"t": np.array([["a", "ü"], ["", "日本"]], object), "n": np.array([[1], [2]], np.int8)}
    found = unpacked(orjson.loads(orjson.dumps(packed(tensors))))
    for name, value in tensors.items():
        assert found[name].tolist() == value.tolist()
        assert found[name].dtype == value.dtype


def test_where_a_cascade_would_have_asked_control_the_pair_agrees(live: Live, workload: Workload) -> None:
    unsure = {**HIGH, "a": 0.01}
    sure, not_sure = sample("control", [HIGH], [1]), sample("control", [unsure], [1])
    assert pairs_of([not_sure], live, workload)[0].treatment == 0
    cascade = replace(live, route=replace(live.route, cascade_threshold=0.7))
    (row,) = pairs_of([not_sure], cascade, workload)
    assert (row.control, row.treatment, row.treatment_confidence) == (1, 1, 0.9)
    assert pairs_of([sure], cascade, workload)[0].treatment == 0


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
    outputs = live.control.run(workload.encode(records), len(records))
    found = live.control.decode(outputs).classes.tolist()
    assert found == [truth for _, truth in models.points(200)]


# The service -----------------------------------------------------------------------------------------------


@pytest.fixture
def shadow(settings: Settings, ledger: Ledger, variants: dict[str, Variant]) -> Iterator[Any]:
    """The service's inside, with a rollout to form pairs of."""
    ledger.create_rollout(
        workload="points",
        control=variants["full"].tag,
        treatment=variants["worse"].tag,
        policy=parse_policy({}),
        actor="ada",
        now=1000.0,
    )
    made = Shadow.inner()
    made._state.start()
    yield made
    made._state.stop()


def body(number: int) -> bytes:
    samples = [sample("control", [LOW], [0], request_id=f"r~{n}") for n in range(number)]
    return orjson.dumps(samples)


def test_pairs_are_stored_once_however_often_they_are_sent(shadow: Any, ledger: Ledger) -> None:
    assert [shadow.store(body(5), 1.0) for _ in range(2)] == [5, 5]
    assert [pair.request_id for pair in ledger.recent_pairs("points-1")] == [f"r~{n}" for n in range(5)]


def test_no_sample_is_begun_once_the_allowance_is_used_up(shadow: Any, ledger: Ledger) -> None:
    assert shadow.store(body(5), 0.0) == 1
    assert len(ledger.recent_pairs("points-1")) == 1


def test_the_shadow_tells_how_long_its_samples_occupied_it(shadow: Any, ledger: Ledger) -> None:
    shadow.store(body(20), 1.0)
    shadow._state.flush()
    (counts,) = ledger.mirror_counts("points-1", 0.0)
    assert (counts.requests, counts.samples) == (0, 20)
    assert 0 < counts.seconds < 20


async def test_while_it_rests_nothing_is_taken_and_nothing_lost(
    shadow: Any, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bentoml, "get_current_service", lambda: shadow)
    allowances = iter([0.0, 1.0])

    async def allowance() -> float:
        return next(allowances)

    shadow.duty.allowance = allowance
    (app, *_), *_ = Shadow.mount_apps
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shadow") as client:
        replies = [(await client.post("/mirror", content=body(3))).json() for _ in range(2)]
    assert replies == [{"taken": 0}, {"taken": 3}]
    assert len(ledger.recent_pairs("points-1")) == 3


async def test_what_the_samples_use_is_taken_from_the_cpu_budget(shadow: Any) -> None:
    shadow.duty = DutyCycle(0.5, clock=lambda: 0.0)  # no time goes by in which it could fill again
    before = await shadow.duty.allowance()
    shadow.store(body(100), 5.0)
    assert 0 < await shadow.duty.allowance() < before


async def test_the_shadow_lets_others_go_first_before_it_starts_any_thread(
    shadow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(os, "nice", lambda increment: done.append(f"nice {increment}") or increment)
    monkeypatch.setattr(shadow._state, "start", lambda: done.append("state"))
    monkeypatch.setattr(shadow._process, "start", lambda: done.append("process"))
    await shadow.start()
    assert done == ["nice 10", "state", "process"]


def test_a_shadow_that_may_not_lower_its_priority_works_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_: int) -> int:
        raise PermissionError("not for you")

    monkeypatch.setattr(os, "nice", refused)
    give_way()
    assert "not allowed to lower" in caplog.text
