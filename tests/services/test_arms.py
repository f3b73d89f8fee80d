from __future__ import annotations

import asyncio
import gc
import threading
import time
from typing import Any

import numpy as np
import pytest

from compression.scorecard import Estimate, Scorecard
from compression.variant import Variant
from compression.workload import Predictions, Workload, load_workload
from services import arms
from services.arms import Breaker, Model, Pool, load_model
from services.batching import DeadlineExceeded
from services.errors import ArmFailed
from services.signature import Signature, TensorSpec
from tests import models

RECORDS = [record for record, _ in models.points(20, seed=3)]


def load(workload: Workload, name: str, content: bytes) -> Model:
    return load_model(models.save(name, content), workload)


def soon() -> float:
    return time.perf_counter() + 10


def test_a_model_answers_each_record_with_a_class_and_a_confidence(
    variants: dict[str, Variant], workload: Workload
) -> None:
    model = load_model(variants["full"], workload)
    outputs, seconds = model.run_inline(workload.encode(RECORDS), len(RECORDS))
    predictions = model.decode(outputs)
    assert predictions.classes.tolist() == [models.truth(record) for record in RECORDS]
    assert ((predictions.confidences >= 0.5) & (predictions.confidences <= 1)).all()
    assert seconds > 0


async def test_the_same_in_a_thread(variants: dict[str, Variant], workload: Workload) -> None:
    model = load_model(variants["full"], workload)
    outputs, seconds = await model.run_pooled(workload.encode(RECORDS), len(RECORDS), soon())
    assert model.decode(outputs).classes.tolist() == [models.truth(record) for record in RECORDS]
    assert seconds > 0


def test_nan_outputs_are_no_answer(variants: dict[str, Variant], workload: Workload) -> None:
    model = load_model(variants["broken"], workload)
    sane = {**RECORDS[0], "a": 0.2}
    model.run(workload.encode([sane]), 1)
    with pytest.raises(ArmFailed, match="NaN") as caught:
        model.run(workload.encode([sane, {**sane, "a": 0.9}]), 2)
    assert caught.value.kind == "invalid"


@pytest.mark.parametrize("size", [1, 64, 65, 1000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_spoils_the_outputs(size: int, dtype: Any, wrong: float) -> None:
    value = np.ones((size, 2), dtype)
    model = fake(_Session(value))
    model.run(ONE, size)
    value[size // 2, 0] = wrong
    with pytest.raises(ArmFailed, match="NaN"):
        model.run(ONE, size)


@pytest.mark.parametrize("size", [2, 1000])
def test_finite_numbers_whose_sum_is_not_are_an_answer(size: int) -> None:
    fake(_Session(np.full((size, 2), np.finfo(np.float64).max))).run(ONE, size)


def test_a_model_that_fails_its_warm_up_does_not_load(
    variants: dict[str, Variant], workload: Workload
) -> None:
    with pytest.raises(ArmFailed, match="NaN"):
        load_model(variants["hopeless"], workload)


_HEADER = '<ir_version: 10, opset_import: ["" : 21]> points (float[N, 5] x) => '


@pytest.mark.parametrize(
    ("name", "graph"),
    [
        (
            "three-classes",
            "(float[N, 3] y) <float[5, 3] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6}> { y = MatMul(x, w) }",
        ),
        ("one-row", "(float[1, 2] y) <float[1, 2] w = {1, 2}> { y = Identity(w) }"),
        ("one-number", "(float y) { y = ReduceSum <keepdims = 0> (x) }"),
        ("no-tensor", "(seq(float[N, 5]) y) { y = SequenceConstruct(x) }"),
        ("no-records", "(float[2] y) <float[2] w = {1, 2}> { y = Identity(w) }"),
    ],
)
def test_an_output_of_another_shape_is_no_answer(workload: Workload, name: str, graph: str) -> None:
    with pytest.raises(ArmFailed) as caught:
        load(workload, name, models.parsed(_HEADER + graph)).run(workload.encode(RECORDS), len(RECORDS))
    assert caught.value.kind == "invalid"


def test_a_file_that_is_no_model_does_not_load(workload: Workload) -> None:
    with pytest.raises(ArmFailed, match="does not load") as caught:
        load(workload, "garbage", b"not ONNX at all")
    assert caught.value.kind == "error"


def test_a_model_with_other_inputs_does_not_answer(workload: Workload) -> None:
    graph = (
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N, 7] z) => (float[N, 7] y) { y = Identity(z) }'
    )
    with pytest.raises(ArmFailed):
        load(workload, "other-inputs", models.parsed(graph)).run(workload.encode(RECORDS), len(RECORDS))


class _Session:
    """Stands in for an ONNX Runtime session."""

    def __init__(self, answer: Any, gate: threading.Event | None = None) -> None:
        self.answer = answer
        self.gate = gate

    def run(self, names: Any, inputs: dict[str, np.ndarray], options: Any) -> list[Any]:
        if self.gate is not None:
            self.gate.wait(10)
        if isinstance(self.answer, Exception):
            raise self.answer
        return [self.answer]


SIGNATURE = Signature(
    (TensorSpec("x", "FP32", np.dtype(np.float32), (-1, 5)),),
    (TensorSpec("logits", "FP32", np.dtype(np.float32), (-1, 2)),),
)


def fake(session: Any, workload: Any = None, threads: int = 2) -> Model:
    """A model of a session that is none."""
    workload = workload or load_workload(models.WORKLOAD)
    return Model("t:1", "t", session, workload, SIGNATURE, pool=Pool(threads, max_queue_s=60))


class _Decoding:
    """A workload whose decode returns what it is told to."""

    classes = ("low", "high")

    def __init__(self, predictions: Any) -> None:
        self.predictions = predictions

    def decode(self, outputs: Any) -> Any:
        if isinstance(self.predictions, Exception):
            raise self.predictions
        return self.predictions


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


ONE = {"x": np.zeros((1, 5), np.float32)}


@pytest.mark.parametrize(
    "predictions",
    [
        Predictions(np.array([0, 1]), np.array([0.5, 0.5])),
        Predictions(np.array([2]), np.array([0.5])),
        Predictions(np.array([-1]), np.array([0.5])),
        Predictions(np.array([0.0]), np.array([0.5])),
        Predictions(np.array([[0]]), np.array([0.5])),
        Predictions(np.array([0]), np.array([0.5, 0.5])),
        Predictions(np.array([0]), np.array([np.nan])),
        Predictions([0], [0.5]),  # type: ignore[arg-type]
        None,
        KeyError("logits"),
    ],
)
def test_what_decode_makes_of_it_is_checked_too(predictions: Any) -> None:
    model = fake(_Session(np.zeros((1, 2))), _Decoding(predictions))
    with pytest.raises(ArmFailed) as caught:
        model.decode(model.run(ONE, 1))
    assert caught.value.kind == "invalid"


def test_a_session_that_raises_is_an_error_in_one_line() -> None:
    with pytest.raises(ArmFailed, match="t: bad thing") as caught:
        fake(_Session(RuntimeError("bad\n  thing"))).run(ONE, 1)
    assert caught.value.kind == "error"


async def test_whoever_waits_for_a_run_waits_until_the_deadline_at_most() -> None:
    gate = threading.Event()
    model = fake(_Session(np.zeros((1, 2)), gate))
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await model.run_pooled(ONE, 1, time.perf_counter() + 0.05)
    assert time.monotonic() - started < 5
    gate.set()


async def test_a_model_that_is_replaced_still_answers_the_requests_that_took_it() -> None:
    gate = threading.Event()
    holder = [fake(_Session(np.zeros((1, 2)), gate))]
    asked = [asyncio.ensure_future(holder[0].run_pooled(ONE, 1, soon())) for _ in range(12)]
    await asyncio.sleep(0)
    holder.clear()
    gc.collect()
    gate.set()
    assert len(await asyncio.gather(*asked)) == 12


async def test_a_run_that_nobody_waits_for_any_more_is_told_to_end(workload: Workload) -> None:
    # Of this length the loop takes minutes; its thread is free again because the run was ended.
    model = load_model_without_warm_up(models.slow_onnx(1_000_000_000), workload)
    for _ in range(4):
        with pytest.raises(DeadlineExceeded):
            await model.run_pooled(ONE, 1, time.perf_counter() + 0.05)
    model.session = _Session(np.zeros((1, 2)))
    await model.run_pooled(ONE, 1, soon())


def load_model_without_warm_up(content: bytes, workload: Workload) -> Model:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Model("slow:1", "slow", session, workload, Signature.of(session), pool=Pool(1, max_queue_s=60))


def test_a_shadow_run_is_ended_too(workload: Workload) -> None:
    model = load_model_without_warm_up(models.slow_onnx(1_000_000_000), workload)
    with pytest.raises(ArmFailed, match="terminate"):
        model.run_within(ONE, 1, 0.05)


def test_a_model_too_slow_for_the_event_loop_is_ended_and_not_run_there_again(workload: Workload) -> None:
    model = load_model_without_warm_up(models.slow_onnx(1_000_000_000), workload)
    model.inline_rows = 5
    started = time.monotonic()
    with pytest.raises(ArmFailed, match="too slow for the event loop") as caught:
        model.run_inline(ONE, 1)
    assert caught.value.kind == "timeout"
    assert time.monotonic() - started < 5
    assert not model.inline_rows


def test_a_run_that_was_told_to_end_too_late_does_not_end_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arms, "_INLINE_LIMIT_SECONDS", 0.01)

    class Late(_Session):
        """Answers, although it was told to end; as a run within its last node does."""

        def run(self, names: Any, inputs: Any, options: Any) -> list[Any]:
            assert not options.terminate
            end = time.monotonic() + 5
            while self.gate is None and not options.terminate and time.monotonic() < end:
                time.sleep(0.001)
            return super().run(names, inputs, options)

    model = fake(Late(np.zeros((1, 2))))
    model.inline_rows = 5
    model.run_inline(ONE, 1)
    assert not model.inline_rows  # too slow all the same
    model.session.gate = threading.Event()
    model.session.gate.set()
    model.run_inline(ONE, 1)


def test_a_model_whose_inputs_have_other_free_axes_is_never_run_on_the_event_loop(workload: Workload) -> None:
    graph = (
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N, S] x) => (float[N, 2] y) '
        "<int64[1] zero = {0}, int64[1] one = {1}> "
        "{ s = ReduceSum <keepdims = 1> (x, one)  y = Concat <axis = 1> (s, s) }"
    )
    assert not load(workload, "free", models.parsed(graph)).inline_rows


def test_an_output_that_is_not_as_declared_is_no_answer() -> None:
    with pytest.raises(ArmFailed, match=r"has shape \[1, 7\]"):
        fake(_Session(np.zeros((1, 7)))).run(ONE, 1)


def test_a_model_that_turns_out_slow_again_and_again_leaves_the_event_loop(workload: Workload) -> None:
    gate = threading.Event()

    class Slow(_Session):
        def run(self, *arguments: Any) -> list[Any]:
            gate.wait(0.003)
            return super().run(*arguments)

    model = fake(Slow(np.zeros((1, 2))))
    model.inline_rows = 5
    runs = 0
    while model.inline_rows:
        model.run_inline(ONE, 1)
        runs += 1
        assert runs <= 100
    assert runs > 5


async def test_a_model_that_left_the_event_loop_comes_back_after_longer_and_longer(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(arms, "_INLINE_SECONDS", -1.0)  # whatever it does is slow
    model = fake(_Session(np.zeros((1, 2))))
    model.clock = clock
    model.inline_rows = 5
    for away in (10, 20, 40):
        while model.inline_rows:
            model.run_inline(ONE, 1)
        clock.now += away - 1
        await model.run_pooled(ONE, 1, soon())
        assert not model.inline_rows
        clock.now += 2
        await model.run_pooled(ONE, 1, soon())
        assert model.inline_rows == 5


def test_a_fast_model_is_run_where_it_is_asked_and_a_slow_one_is_not(
    variants: dict[str, Variant], workload: Workload
) -> None:
    assert load_model(variants["full"], workload).inline_rows
    assert not load(workload, "slow", models.slow_onnx(20_000)).inline_rows


async def test_only_in_threads_does_a_model_leave_the_event_loop() -> None:
    seen = []

    class Noting(_Session):
        def run(self, *arguments: Any) -> list[Any]:
            seen.append(threading.get_ident())
            return super().run(*arguments)

    model = fake(Noting(np.zeros((1, 2))))
    model.run_inline(ONE, 1)
    await model.run_pooled(ONE, 1, soon())
    here = threading.get_ident()
    assert seen[0] == here
    assert seen[1] != here


def test_only_a_variant_whose_answers_do_not_depend_on_it_is_batched(
    variants: dict[str, Variant], workload: Workload
) -> None:
    card = SCORECARD.model_copy(update={"batch_sensitivity": 0.0})
    alike = models.save(
        "alike", models.points_onnx(), files={"scorecard.json": card.model_dump_json().encode()}
    )
    card = SCORECARD.model_copy(update={"batch_sensitivity": 0.01})
    other = models.save(
        "other", models.points_onnx(), files={"scorecard.json": card.model_dump_json().encode()}
    )
    assert load_model(alike, workload).batch_rows == workload.serving.max_batch
    assert load_model(other, workload).batch_rows == 1
    assert load_model(variants["unmeasured"], workload).batch_rows == 1


NOTHING = Estimate(value=0, low=0, high=0)
SCORECARD = Scorecard(
    workload="points",
    variant="x",
    metric="accuracy",
    rows=1,
    quality=NOTHING,
    drop=NOTHING,
    agreement=1,
    classes={},
    groups={},
    invalid_outputs=0,
    size_bytes=1,
    full_size_bytes=1,
    parameters=1,
    nonzero_parameters=1,
    macs=1,
    latency=[],
    batch_sensitivity=0,
    cpu="none",
)


def test_warm_up_takes_sample_records_where_there_are_some(
    variants: dict[str, Variant], workload: Workload
) -> None:
    with pytest.raises(ArmFailed, match="NaN"):
        load_model(variants["broken"], workload, sample=[{**RECORDS[0], "a": 0.9}])


def test_the_breaker_opens_after_so_many_failures_in_a_row(clock: Clock) -> None:
    breaker = Breaker(threshold=3, cooldown=5, clock=clock)
    for _ in range(2):
        breaker.failed()
    assert breaker.allow()
    breaker.failed()
    assert not breaker.allow()


def test_a_success_between_keeps_the_breaker_closed(clock: Clock) -> None:
    breaker = Breaker(threshold=3, cooldown=5, clock=clock)
    for _ in range(10):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert breaker.allow()


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(threshold=1, cooldown=5, clock=clock)
    breaker.failed()
    return breaker


def test_after_the_cooldown_exactly_one_request_probes(clock: Clock) -> None:
    breaker = opened(clock)
    clock.now += 4.9
    assert not breaker.allow()
    clock.now += 0.2
    assert [breaker.allow() for _ in range(3)] == [True, False, False]


def test_a_probe_that_succeeds_closes_the_breaker(clock: Clock) -> None:
    breaker = opened(clock)
    clock.now += 6
    assert breaker.allow()
    breaker.succeeded()
    assert [breaker.allow() for _ in range(3)] == [True] * 3


def test_a_probe_that_fails_opens_it_for_another_cooldown(clock: Clock) -> None:
    breaker = opened(clock)
    clock.now += 6
    assert breaker.allow()
    breaker.failed()
    assert not breaker.allow()
    clock.now += 6
    assert breaker.allow()


def test_a_probe_that_came_to_nothing_leaves_the_next_request_to_probe(clock: Clock) -> None:
    breaker = opened(clock)
    clock.now += 6
    assert breaker.allow()
    breaker.released()
    assert [breaker.allow() for _ in range(2)] == [True, False]


def test_a_decode_that_works_in_place_is_found_when_the_model_is_loaded(
    workload: Workload, variants: dict[str, Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = workload.decode

    def in_place(outputs: Any) -> Any:
        for output in outputs.values():
            output[:] = 0
        return decode(outputs)

    monkeypatch.setattr(workload, "decode", in_place)
    with pytest.raises(ArmFailed, match="read-only"):
        load_model(variants["full"], workload)
