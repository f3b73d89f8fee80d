"""The engine with real sessions and a live state that a test sets; no server, no ledger."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import orjson
import pytest

from compression.variant import Variant
from compression.workload import ServingSettings, Workload, load_workload
from monitoring import metrics
from monitoring.rows import Route
from services import arms
from services.arms import load_model
from services.batching import DeadlineExceeded, Overloaded
from services.cache import AnswerCache
from services.control.auth import RequestIds
from services.counters import Counters
from services.engine import Engine, Served
from services.errors import ArmFailed, BadRequest, NotFound, Unavailable
from services.live import Live
from services.settings import Settings
from tests import models

PLAIN = {"a": 0.4, "b": 0.0, "c": 0.0, "d": 0.0, "TEAM": "A"}
UNSURE = {**PLAIN, "a": 0.01}


@dataclass
class State:
    """Stands in for LiveState: the view of the world, and the tallies."""

    live: Live
    tallies: dict[tuple[str, str, int], int] = field(default_factory=dict)
    rollouts: set[str] = field(default_factory=set)

    def count(self, rollout: str, guardrail: str, group: str, outcome: int, now: float, number: int) -> None:
        self.rollouts.add(rollout)
        key = (guardrail, group, outcome)
        self.tallies[key] = self.tallies.get(key, 0) + number


@dataclass
class Queue:
    samples: list[dict[str, Any]] = field(default_factory=list)
    full: bool = False

    def wants(self) -> bool:
        return not self.full

    def offer(self, sample: bytes) -> bool:
        self.samples.append(orjson.loads(sample))
        return True


class Bench:
    """An engine, and what it did to the world."""

    def __init__(
        self,
        settings: Settings,
        workload: Workload,
        variants: dict[str, Variant],
        treatment: str | None,
        **route: Any,
    ) -> None:
        self.workload = workload
        control = load_model(variants["full"], workload)
        candidate = load_model(variants[treatment], workload) if treatment else None
        view = {"revision": 1, "control": control.tag, "latency_slo_ms": 1000.0}
        if candidate is not None:
            view |= {"rollout_id": "r", "treatment": candidate.tag, "weight": 100, "mirror_rate": 1.0}
        self.state = State(Live(Route(**{**view, **route}), control, candidate))
        self.queue = Queue()
        self.engine = Engine(settings, workload, self.state, RequestIds("k"), metrics, self.queue)  # type: ignore[arg-type]

    def ask(self, *records: dict[str, Any], tensors: bool = False, **options: Any) -> Any:
        self.engine.arrived = time.perf_counter()
        inputs = self.workload.encode(records)
        headers = options.pop("headers", {})
        found = None if tensors else records
        return self.engine.answer(headers, inputs, len(records), records=found, **options)

    def served(self, *records: dict[str, Any], **options: Any) -> Served:
        """The answer, which must have come at once; what is done after the reply is done too."""
        served = self.ask(*records, **options)
        assert isinstance(served, Served)
        after = self.engine.mirror_after(served)
        if after is not None:
            after()
        return served

    @property
    def tallies(self) -> dict[tuple[str, str, int], int]:
        self.engine.counters.fold()
        return self.state.tallies


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine must not move a test's models off the event loop."""
    monkeypatch.setattr(arms, "_INLINE_LIMIT_SECONDS", 1.0)
    monkeypatch.setattr(arms, "_SLOW_RUNS", 10**9)


@pytest.fixture
def bench(settings: Settings, workload: Workload, variants: dict[str, Variant]) -> Any:
    def make(treatment: str | None = "same", **route: Any) -> Bench:
        return Bench(settings, workload, variants, treatment, **route)

    return make


def threaded(bench: Bench) -> Bench:
    """Both arms too large for the event loop."""
    for model in bench.engine.models():
        model.inline_rows = 0
    return bench


async def later(answer: Any) -> Served:
    assert isinstance(answer, Coroutine)
    served = await answer
    assert isinstance(served, Served)
    return served


def test_small_models_answer_within_the_call(bench: Any) -> None:
    served = bench().served(PLAIN)
    assert (served.arm, served.model.name) == ("treatment", "same")
    assert served.predictions.classes.tolist() == [1]


async def test_large_ones_answer_in_threads_and_say_the_same(bench: Any) -> None:
    served = await later(threaded(bench()).ask(PLAIN, UNSURE))
    assert (served.arm, served.model.name) == ("treatment", "same")
    assert served.predictions.classes.tolist() == [1, 1]


async def test_a_request_of_many_records_leaves_the_event_loop_even_for_a_small_model(bench: Any) -> None:
    one = bench()
    for model in one.engine.models():
        model.inline_rows = 2
    assert isinstance(one.ask(PLAIN, PLAIN), Served)
    await later(one.ask(PLAIN, PLAIN, PLAIN))


def test_without_a_rollout_control_answers_and_nothing_is_mirrored(bench: Any) -> None:
    one = bench(None)
    assert one.served(PLAIN).arm == "control"
    assert (one.queue.samples, one.tallies) == ([], {})


def test_a_key_stays_on_its_arm(bench: Any) -> None:
    one = bench(weight=50)
    arms = {
        key: {one.served(PLAIN, headers={b"x-assignment-key": key}).arm for _ in range(5)}
        for key in (b"ann", b"bob", b"cy", b"dee", b"eve", b"fay", b"gus", b"hal")
    }
    assert all(len(seen) == 1 for seen in arms.values())
    assert len(set.union(*arms.values())) == 2


def test_a_treatment_without_an_answer_is_answered_by_control(bench: Any) -> None:
    one = bench("broken")
    served = one.served({**PLAIN, "a": 0.9})
    assert (served.arm, served.model.name, served.predictions.classes.tolist()) == ("control", "full", [1])
    assert one.tallies["treatment_errors", "", 1] == 1
    assert one.queue.samples[0]["treatment_failed"] is True


async def test_the_same_in_threads(bench: Any) -> None:
    one = threaded(bench("broken"))
    assert (await later(one.ask({**PLAIN, "a": 0.9}))).arm == "control"
    assert one.tallies["treatment_errors", "", 1] == 1


async def test_a_treatment_that_hangs_on_the_event_loop_costs_it_once(bench: Any) -> None:
    one = bench("stuck")
    hangs = {**PLAIN, "a": 0.9}
    treatment = one.state.live.treatment
    assert treatment.inline_rows
    started = time.perf_counter()
    served = await later(one.ask(hangs))
    assert (served.arm, served.predictions.classes.tolist()) == ("control", [1])
    assert time.perf_counter() - started < 4
    assert not treatment.inline_rows
    assert one.tallies["treatment_errors", "", 1] == 1


async def test_requests_beside_a_hanging_treatment_are_answered(bench: Any) -> None:
    one = threaded(bench("stuck"))
    answers = await asyncio.gather(*(later(one.ask({**PLAIN, "a": a})) for a in (0.9, 0.1, 0.2, 0.95, 0.3)))
    assert all(answer.predictions.classes.tolist() == [1] for answer in answers)


async def test_after_some_failures_in_a_row_the_treatment_is_left_alone(bench: Any) -> None:
    one = bench("broken")
    for _ in range(8):
        assert one.served({**PLAIN, "a": 0.9}).arm == "control"
    assert one.served(PLAIN).arm == "control"  # the breaker rests, whatever the record
    assert one.tallies["treatment_errors", "", 1] == 5


async def test_whoever_gives_up_waiting_does_not_keep_the_breaker_from_probing(bench: Any) -> None:
    one = threaded(bench("stuck"))
    breaker = one.state.live.treatment.breaker
    breaker.threshold, breaker.cooldown = 1, 0.0
    breaker.failed()
    task = asyncio.ensure_future(one.ask({**PLAIN, "a": 0.9}))
    await asyncio.sleep(0)
    assert not breaker.allow()  # this request is the probe
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert breaker.allow()


async def test_a_clients_own_hurry_is_not_the_treatments_fault(bench: Any) -> None:
    one = threaded(bench("stuck"))
    breaker = one.state.live.treatment.breaker
    for _ in range(6):
        with pytest.raises(DeadlineExceeded):
            await one.ask({**PLAIN, "a": 0.9}, timeout=1e-6)
    assert breaker.allow()
    assert ("treatment_errors", "", 1) not in one.tallies


async def test_a_treatment_that_is_late_by_the_servers_own_measure_is_blamed(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = threaded(bench("stuck"))
    one.engine._settings = replace(one.engine._settings, treatment_deadline=0.05)
    assert (await later(one.ask({**PLAIN, "a": 0.9}, timeout=3.0))).arm == "control"
    assert one.tallies["treatment_errors", "", 1] == 1


def test_an_input_that_overflows_both_arms_is_the_clients(bench: Any) -> None:
    one = bench()
    huge = {"x": np.full((1, 5), 3e38, np.float32)}
    for _ in range(6):
        one.engine.arrived = time.perf_counter()
        with pytest.raises(BadRequest, match="no answer to this input"):
            one.engine.answer({}, huge, 1)
    assert one.state.live.treatment.breaker.allow()
    assert one.tallies == {}


async def test_a_probe_ends_also_when_control_is_overloaded(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = threaded(bench("broken"))
    breaker = one.state.live.treatment.breaker
    breaker.threshold, breaker.cooldown = 1, 0.0
    breaker.failed()

    async def overloaded(*_: Any) -> Any:
        raise Overloaded(1.0)

    monkeypatch.setattr(one.state.live.control, "run_pooled", overloaded)
    with pytest.raises(Unavailable):
        await one.ask({**PLAIN, "a": 0.9})
    assert (await later(one.ask(PLAIN))).arm == "treatment"


async def test_a_request_for_one_variant_does_not_end_anothers_probe(bench: Any) -> None:
    one = threaded(bench())
    breaker = one.state.live.treatment.breaker
    breaker.threshold, breaker.cooldown = 1, 0.0
    breaker.failed()
    assert breaker.allow()  # somebody's probe is under way
    await one.ask(PLAIN, version="same")
    assert breaker.probing


async def test_a_candidate_that_hangs_does_not_fill_the_worker(bench: Any) -> None:
    one = threaded(bench("stuck"))
    one.engine._settings = replace(one.engine._settings, max_in_flight=8)
    hanging = [asyncio.ensure_future(one.ask({**PLAIN, "a": 0.9})) for _ in range(4)]
    await asyncio.sleep(0)
    started = time.perf_counter()
    assert (await later(one.ask(PLAIN))).arm == "control"  # two wait for the treatment: no more may
    assert time.perf_counter() - started < 0.9  # of the second that the hanging ones wait
    assert {(await task).arm for task in hanging} == {"control"}
    assert one.tallies["treatment_errors", "", 1] == 2


async def test_more_than_may_be_in_flight_are_refused_at_once_and_leave_nothing_behind(bench: Any) -> None:
    one = threaded(bench(None))
    one.engine._settings = replace(one.engine._settings, max_in_flight=2)
    taken = [asyncio.ensure_future(one.ask(PLAIN)) for _ in range(2)]
    with pytest.raises(Unavailable, match="too many requests in flight"):
        one.ask(PLAIN)
    await asyncio.gather(*taken)
    assert one.engine.in_flight == 0
    await one.ask(PLAIN)


async def test_a_run_that_moves_to_threads_midway_is_counted_once(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = cascade(bench, "worse")
    control = one.state.live.control
    control.inline_rows = 0  # the treatment answers on the event loop, control's part waits
    served = await later(one.ask({**UNSURE, "d": 0.9}))
    assert served.predictions.classes.tolist() == [1]
    counts = one.engine.counters.treatment
    assert (counts.tried, counts.escalated, counts.errors) == (1, 1, 0)


def test_control_that_fails_is_an_error_that_may_be_tried_again(
    settings: Settings, workload: Workload, variants: dict[str, Variant]
) -> None:
    one = Bench(settings, workload, {**variants, "full": variants["broken"]}, None)
    with pytest.raises(ArmFailed, match="NaN") as caught:
        one.ask({**PLAIN, "a": 0.9})
    assert caught.value.status == 503
    assert one.engine.statistics("broken").failures == 1


async def test_nothing_of_a_request_is_left_behind_in_a_circle(bench: Any) -> None:
    one = threaded(bench("broken"))
    gc.collect()
    gc.disable()
    try:
        fallback = await later(one.ask({**PLAIN, "d": 0.9}))
        one.state.live.treatment.breaker.failures = 0
        one.state.live.control.run_pooled = _refusing_pool
        one.state.live.treatment.run_pooled = _refusing_pool
        with pytest.raises(Unavailable) as shed:
            await one.ask(PLAIN)
        assert shed.value.headers == {"Retry-After": "7"}
        alive = [weakref.ref(fallback)]
        del fallback, shed
        assert [one() for one in alive] == [None]
        assert not [item for item in gc.get_objects() if type(item) is Served]
    finally:
        gc.enable()


async def _refusing_pool(*_: Any) -> Any:
    raise Overloaded(7.0)


class _Refusing:
    """A session that does not take its input."""

    def run(self, *_: Any) -> Any:
        class InvalidArgument(Exception):
            """As ONNX Runtime's own, which nobody can import."""

        raise InvalidArgument("indices element out of data bounds, idx=7")


def test_an_input_that_no_arm_takes_is_the_clients_and_nobodys_fault(bench: Any) -> None:
    one = bench()
    breaker = one.state.live.treatment.breaker
    one.state.live.treatment.session = one.state.live.control.session = _Refusing()
    for _ in range(10):
        with pytest.raises(BadRequest, match="no answer to this input"):
            one.ask(PLAIN)
    assert breaker.allow()
    assert one.tallies == {}


async def test_the_same_in_threads_for_nobodys_fault(bench: Any) -> None:
    one = threaded(bench())
    one.state.live.treatment.session = one.state.live.control.session = _Refusing()
    with pytest.raises(BadRequest, match="no answer to this input"):
        await one.ask(PLAIN)
    assert one.tallies == {}


def test_an_input_that_only_the_treatment_refuses_is_the_treatments_fault(bench: Any) -> None:
    one = bench()
    one.state.live.treatment.session = _Refusing()
    assert one.served(PLAIN).arm == "control"
    assert one.tallies["treatment_errors", "", 1] == 1


def test_requests_and_their_times_are_tallied_for_the_arm_they_were_assigned_to(bench: Any) -> None:
    one = bench("broken", weight=100)
    one.served(PLAIN)
    one.served({**PLAIN, "a": 0.9})  # answered by control
    tallies = one.tallies
    # What each model did is its own, whoever was asked first; here one answer each, of one record.
    seconds = [tallies.pop(("model_time", arm, 0)) for arm in ("control", "treatment")]
    assert all(0 < microseconds < 1e6 for microseconds in seconds)
    assert [tallies.pop(("model_time", arm, 1)) for arm in ("control", "treatment")] == [1, 1]
    assert tallies == {
        ("requests", "treatment", 0): 2,
        ("latency_p95", "treatment", 0): 2,
        ("treatment_errors", "", 0): 1,
        ("treatment_errors", "", 1): 1,
    }


def test_requests_that_are_assigned_by_themselves_are_tallied_under_the_split(bench: Any) -> None:
    one = bench(weight=50)
    for _ in range(200):
        one.served(PLAIN)
    for options in ({"headers": {b"x-assignment-key": b"u"}}, {"headers": {b"x-request-id": b"r"}}):
        one.served(PLAIN, **options)
    one.served(PLAIN, supplied_id="mine")
    one.served(PLAIN, version="full")
    tallies = one.tallies
    treated, others = (tallies["sample_ratio", "50", outcome] for outcome in (1, 0))
    assert treated + others == 200
    assert 60 < treated < 140  # more than five standard deviations


def test_what_is_over_the_latency_limit_is_counted_as_slow(bench: Any) -> None:
    one = bench(latency_slo_ms=1e-6)
    one.served(PLAIN)
    assert one.tallies["latency_p95", "treatment", 1] == 1
    assert ("latency_p95", "treatment", 0) not in one.tallies


def test_counts_go_to_the_rollout_that_they_were_made_under(bench: Any) -> None:
    one = bench()
    one.served(PLAIN)
    live = one.state.live
    one.state.live = replace(live, route=replace(live.route, revision=2, rollout_id=None, treatment=None))
    one.served(PLAIN)
    assert one.tallies["requests", "treatment", 0] == 1
    assert one.engine.counters.live.route.rollout_id is None


async def test_a_request_that_is_under_way_still_counts_for_the_rollout_it_began_under(bench: Any) -> None:
    one = threaded(bench())
    task = asyncio.ensure_future(one.ask(PLAIN))
    await asyncio.sleep(0)
    live = one.state.live
    one.state.live = replace(live, route=replace(live.route, revision=2, rollout_id="other", weight=0))
    await one.ask(PLAIN)
    await task
    assert one.tallies["requests", "treatment", 0] == 1
    assert one.tallies["requests", "control", 0] == 1
    assert one.state.rollouts == {"r", "other"}


def test_a_request_may_ask_for_one_variant_and_is_no_evidence_then(bench: Any) -> None:
    one = bench(weight=0)
    served = one.served(PLAIN, version="same", tensors=True)
    assert (served.arm, served.model.name) == ("treatment", "same")
    assert one.served(PLAIN, version="full", tensors=True).model.name == "full"
    assert (one.tallies, one.queue.samples) == ({}, [])
    with pytest.raises(NotFound, match="no variant 'int4'"):
        one.ask(PLAIN, version="int4")


def test_nobody_answers_for_a_variant_that_was_asked_for_and_failed(bench: Any) -> None:
    one = bench("broken", weight=0)
    with pytest.raises(ArmFailed):
        one.ask({**PLAIN, "a": 0.9}, version="broken")
    assert one.tallies == {}
    assert one.engine.statistics("broken").failures == 1


@pytest.mark.parametrize(
    "headers", [{b"x-request-id": b"a b"}, {b"x-request-id": b"\xff"}, {b"x-assignment-key": b"k" * 257}]
)
def test_ids_and_keys_that_cannot_be_used_are_refused(bench: Any, headers: dict[bytes, bytes]) -> None:
    with pytest.raises(BadRequest):
        bench().ask(PLAIN, headers=headers)


def test_the_id_of_a_reply_begins_with_the_clients(bench: Any) -> None:
    one = bench()
    assert one.served(PLAIN, headers={b"x-request-id": b"mine"}).request_id.startswith("mine.")
    assert one.served(PLAIN, supplied_id="other", headers={b"x-request-id": b"mine"}).request_id.startswith(
        "other."
    )


def test_a_sample_of_records_says_what_was_asked_and_answered(bench: Any) -> None:
    one = bench()
    served = one.served(PLAIN, UNSURE)
    (sample,) = one.queue.samples
    assert sample["records"] == [PLAIN, UNSURE]
    assert (sample["arm"], sample["request_id"]) == ("treatment", served.request_id)
    assert sample["judged"] in (0, 1)
    assert sample["answer"] == [1, served.predictions.confidences[sample["judged"]]]


def test_a_sample_of_tensors_carries_them_and_the_groups_that_were_named(bench: Any) -> None:
    from services.samples import unpacked

    one = bench()
    one.served(PLAIN, tensors=True, groups=[{"TEAM": "B"}])
    (sample,) = one.queue.samples
    assert sample["groups"] == [{"TEAM": "B"}]
    assert unpacked(sample["tensors"])["x"].tolist() == one.workload.encode([PLAIN])["x"].tolist()
    assert "records" not in sample


def test_of_tensors_the_shadow_is_told_the_outputs_of_the_record_that_is_judged(bench: Any) -> None:
    from services.samples import unpacked

    one = bench()
    served = one.served(PLAIN, UNSURE, {**PLAIN, "a": -0.4}, tensors=True)
    (sample,) = one.queue.samples
    (logits,) = unpacked(sample["outputs"]).values()
    assert logits.tolist() == [served.outputs[0][sample["judged"]].tolist()]
    assert sample["rows"] == 3
    assert "answer" not in sample


def test_no_sample_is_made_for_a_mirror_that_wants_none(bench: Any) -> None:
    one = bench()
    one.queue.full = True
    one.served(PLAIN, tensors=True)
    assert one.queue.samples == []


def test_the_share_that_is_mirrored_is_the_routes(bench: Any) -> None:
    one = bench(mirror_rate=0.25)
    for _ in range(2000):
        one.served(PLAIN)
    assert 400 < len(one.queue.samples) < 600  # five standard deviations


# -- cascade -------------------------------------------------------------------------------------------------


def cascade(bench: Any, treatment: str) -> Bench:
    """Between the confidences of the two records: PLAIN is kept, UNSURE goes to control."""
    return bench(treatment, cascade_threshold=0.7)  # type: ignore[no-any-return]


def test_a_record_that_the_treatment_is_not_sure_of_is_answered_by_control(bench: Any) -> None:
    one = cascade(bench, "worse")
    turned = {"d": 0.9}  # where this variant is wrong
    served = one.served({**PLAIN, **turned}, {**UNSURE, **turned}, {**UNSURE, **turned})
    assert served.predictions.classes.tolist() == [0, 1, 1]
    assert served.arm == "treatment"
    (sample,) = one.queue.samples
    assert sample["answer"][0] == [0, 1, 1][sample["judged"]]
    counts = one.engine.counters.treatment
    assert (counts.kept, counts.escalated, one.engine.statistics("full").rows) == (1, 2, 2)


async def test_the_cascade_says_the_same_in_threads(bench: Any) -> None:
    one = threaded(cascade(bench, "worse"))
    served = await later(one.ask({**PLAIN, "d": 0.9}, {**UNSURE, "d": 0.9}))
    assert served.predictions.classes.tolist() == [0, 1]


def test_tensors_cascade_too(bench: Any) -> None:
    one = cascade(bench, "worse")
    served = one.served({**PLAIN, "d": 0.9}, {**UNSURE, "d": 0.9}, tensors=True)
    assert served.outputs[0].argmax(axis=1).tolist() == [0, 1]


def test_the_shadow_is_told_what_the_user_of_a_cascade_was_told(bench: Any) -> None:
    from services.samples import unpacked

    one = cascade(bench, "worse")
    served = one.served({**UNSURE, "d": 0.9}, tensors=True)
    (sample,) = one.queue.samples
    (logits,) = unpacked(sample["outputs"]).values()
    assert logits.tolist() == served.outputs[0].tolist()
    assert "answer" not in sample


def test_when_the_answers_of_both_arms_cannot_be_put_together_the_candidates_stands(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = cascade(bench, "worse")
    treatment = one.state.live.treatment
    first = treatment.decode
    answers = iter([first])

    def decode(outputs: Any) -> Any:
        reading = next(answers, None)
        if reading is None:
            raise ArmFailed("invalid", "both together make no sense")
        return reading(outputs)

    monkeypatch.setattr(treatment, "decode", decode)
    served = one.served({**UNSURE, "d": 0.9})
    assert (served.arm, served.predictions.classes.tolist()) == ("treatment", [0])
    assert one.engine.counters.treatment.failed == 0


def test_who_asks_for_a_variant_gets_its_tensors_whether_or_not_anybody_can_read_them(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = cascade(bench, "worse")
    monkeypatch.setattr(one.workload, "decode", lambda _: None)
    assert one.served(PLAIN, tensors=True, version="worse").outputs[0].shape == (1, 2)


def test_when_control_cannot_take_a_record_the_candidates_answer_stands(bench: Any) -> None:
    one = cascade(bench, "worse")
    full = one.state.live.control
    full.session = _Failing()
    served = one.served({**UNSURE, "d": 0.9})
    assert (served.arm, served.predictions.classes.tolist()) == ("treatment", [0])
    assert one.tallies["treatment_errors", "", 0] == 1


class _Failing:
    def run(self, *_: Any) -> Any:
        raise RuntimeError("control is gone")


# -- cache ---------------------------------------------------------------------------------------------------


@pytest.fixture
def caching() -> Workload:
    workload = load_workload(models.WORKLOAD)
    workload.serving = ServingSettings(cache_ttl_s=60)
    return workload


def runs(bench: Bench, name: str) -> int:
    return bench.engine.statistics(name).runs


def test_the_same_input_is_answered_from_the_cache(
    settings: Settings, caching: Workload, variants: dict[str, Variant]
) -> None:
    one = Bench(settings, caching, variants, "same")
    first, again, other = one.served(PLAIN), one.served(PLAIN), one.served(UNSURE)
    counts = one.engine.counters.treatment
    assert (counts.hits, counts.misses, len(counts.latencies)) == (1, 2, 3)
    assert runs(one, "same") == 2
    assert again.predictions.confidences.tolist() == first.predictions.confidences.tolist()
    assert again.request_id != first.request_id
    assert other.predictions.confidences.tolist() != first.predictions.confidences.tolist()


def test_an_answer_is_as_old_as_its_run_however_often_it_is_asked_for(
    settings: Settings, caching: Workload, variants: dict[str, Variant]
) -> None:
    now = 0.0
    one = Bench(settings, caching, variants, "same")
    one.engine._cache = AnswerCache(1 << 20, 60, clock=lambda: now)
    for _ in range(10):
        one.served(PLAIN)
        now += 25.0
    assert runs(one, "same") == 4  # at 0, 75, 150 and 225 s


async def test_an_answer_made_under_an_older_view_is_not_kept(
    settings: Settings, caching: Workload, variants: dict[str, Variant]
) -> None:
    one = threaded(Bench(settings, caching, variants, "worse", cascade_threshold=0.7))
    task = asyncio.ensure_future(one.ask({**UNSURE, "d": 0.9}))
    await asyncio.sleep(0)
    live = one.state.live
    one.state.live = replace(
        live, route=replace(live.route, revision=2, rollout_id="s", cascade_threshold=None)
    )
    await one.ask(PLAIN)
    assert (await task).predictions.classes.tolist() == [1]
    assert (await later(one.ask({**UNSURE, "d": 0.9}))).predictions.classes.tolist() == [0]


def test_each_variant_has_answers_of_its_own(
    settings: Settings, caching: Workload, variants: dict[str, Variant]
) -> None:
    one = Bench(settings, caching, variants, "worse", weight=50)
    seen = {one.served({**PLAIN, "d": 0.9}).arm: None for _ in range(50)}
    answers = {
        one.served({**PLAIN, "d": 0.9}, headers={b"x-assignment-key": b"%d" % key}).arm: 0
        for key in range(50)
    }
    assert set(seen) == set(answers) == {"control", "treatment"}
    for key in range(20):
        served = one.served({**PLAIN, "d": 0.9}, headers={b"x-assignment-key": b"%d" % key})
        assert served.predictions.classes.tolist() == [0 if served.arm == "treatment" else 1]
    assert (runs(one, "full"), runs(one, "worse")) == (1, 1)


def test_a_decision_empties_it(settings: Settings, caching: Workload, variants: dict[str, Variant]) -> None:
    one = Bench(settings, caching, variants, "same")
    one.served(PLAIN)
    live = one.state.live
    one.state.live = replace(live, route=replace(live.route, revision=2, weight=99))
    one.served(PLAIN, headers={b"x-assignment-key": b"a"})
    assert runs(one, "same") + runs(one, "full") == 2


def test_what_control_answered_for_a_failing_treatment_is_not_kept_as_the_treatments(
    settings: Settings, caching: Workload, variants: dict[str, Variant]
) -> None:
    one = Bench(settings, caching, variants, "broken")
    for _ in range(2):
        assert one.served({**PLAIN, "a": 0.9}).arm == "control"
    assert one.tallies["treatment_errors", "", 1] == 2


def test_a_cascades_answer_is_not_given_to_who_asks_for_the_variant_alone(
    settings: Settings, caching: Workload, variants: dict[str, Variant]
) -> None:
    one = Bench(settings, caching, variants, "worse", cascade_threshold=0.7)
    assert one.served({**UNSURE, "d": 0.9}).predictions.classes.tolist() == [1]
    alone = one.served({**UNSURE, "d": 0.9}, version="worse")
    assert alone.predictions.classes.tolist() == [0]


def test_an_answer_that_should_have_been_escalated_is_not_kept(
    settings: Settings, caching: Workload, variants: dict[str, Variant]
) -> None:
    one = Bench(settings, caching, variants, "worse", cascade_threshold=0.7)
    control = one.state.live.control
    session, control.session = control.session, _Failing()
    assert one.served({**UNSURE, "d": 0.9}).predictions.classes.tolist() == [0]
    control.session = session
    assert one.served({**UNSURE, "d": 0.9}).predictions.classes.tolist() == [1]


# -- counters ------------------------------------------------------------------------------------------------


def test_folding_shows_in_the_metrics_what_single_observations_would(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prometheus_client import CollectorRegistry, Histogram

    values = np.array([0.0005, 0.00049, 0.3, 7.0, 0.02, 0.02, 0.0])
    registries = [CollectorRegistry(), CollectorRegistry()]
    one, other = (
        Histogram("t", "t", ["arm"], registry=registry, buckets=metrics.REQUEST_EDGES)
        for registry in registries
    )
    metrics.observe_all(one.labels("control"), values)
    for value in values:
        other.labels("control").observe(value)

    def samples(registry: CollectorRegistry) -> list[tuple[str, Any, float]]:
        found = next(iter(registry.collect())).samples
        return [(s.name, s.labels, round(s.value, 9)) for s in found if not s.name.endswith("_created")]

    assert samples(registries[0]) == samples(registries[1])


async def test_counts_are_folded_by_themselves(bench: Any) -> None:
    one = bench()
    counters: Counters = one.engine.counters
    counters.start()
    one.served(PLAIN)
    end = time.monotonic() + 10
    while not one.state.tallies and time.monotonic() < end:
        await asyncio.sleep(0.01)
    counters.stop()
    assert one.state.tallies["requests", "treatment", 0] == 1
