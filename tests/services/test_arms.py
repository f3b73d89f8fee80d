from __future__ import annotations

import asyncio
import gc
import threading
import time
from typing import Any

import numpy as np
import pytest

from compression.variant import Variant
from compression.workload import Predictions, Workload
from services import arms
from services.arms import Breaker, Model, load_model
from services.errors import ArmFailed
from tests import models

RECORDS = [record for record, _ in models.points(20, seed=3)]


def load(workload: Workload, name: str, content: bytes) -> Model:
    return load_model(models.save(name, content), workload)


async def test_a_model_answers_each_record_with_a_class_and_a_confidence(
    variants: dict[str, Variant], workload: Workload
) -> None:
    model = load_model(variants["full"], workload)
    answer = await model.infer(workload.encode(RECORDS))
    assert answer.predictions.classes.tolist() == [models.truth(record) for record in RECORDS]
    assert ((answer.predictions.confidences >= 0.5) & (answer.predictions.confidences <= 1)).all()
    assert answer.model_seconds > 0


async def test_the_same_under_a_deadline(variants: dict[str, Variant], workload: Workload) -> None:
    model = load_model(variants["full"], workload)
    answer = await model.infer(workload.encode(RECORDS), deadline=10)
    assert answer.predictions.classes.tolist() == [models.truth(record) for record in RECORDS]


def test_nan_outputs_are_no_answer(variants: dict[str, Variant], workload: Workload) -> None:
    model = load_model(variants["broken"], workload)
    sane = {**RECORDS[0], "a": 0.2}
    model.run(workload.encode([sane]))
    with pytest.raises(ArmFailed, match="NaN") as caught:
        model.run(workload.encode([sane, {**sane, "a": 0.9}]))
    assert caught.value.kind == "invalid"


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
    ],
)
def test_an_output_of_another_shape_is_no_answer(workload: Workload, name: str, graph: str) -> None:
    with pytest.raises(ArmFailed) as caught:
        load(workload, name, models.parsed(_HEADER + graph)).run(workload.encode(RECORDS))
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
        load(workload, "other-inputs", models.parsed(graph)).run(workload.encode(RECORDS))


class _Session:
    """Stands in for an ONNX Runtime session."""

    class _Node:
        name = "logits"

    def __init__(self, answer: Any, gate: threading.Event | None = None) -> None:
        self.answer = answer
        self.gate = gate

    def get_outputs(self) -> list[Any]:
        return [self._Node]

    def run(self, names: Any, inputs: dict[str, np.ndarray], options: Any) -> list[Any]:
        if self.gate is not None:
            self.gate.wait(10)
        if isinstance(self.answer, Exception):
            raise self.answer
        return [self.answer]


class _Decoding:
    """A workload whose decode returns what it is told to."""

    classes = ("low", "high")

    def __init__(self, predictions: Any) -> None:
        self.predictions = predictions

    def decode(self, outputs: Any) -> Any:
        if isinstance(self.predictions, Exception):
            raise self.predictions
        return self.predictions


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
    model = Model("t:1", "t", _Session(np.zeros((1, 2))), _Decoding(predictions), inline=True)  # type: ignore[arg-type]
    with pytest.raises(ArmFailed) as caught:
        model.run(ONE)
    assert caught.value.kind == "invalid"


async def test_a_session_that_raises_is_an_error_in_one_line(workload: Workload) -> None:
    model = Model("t:1", "t", _Session(RuntimeError("bad\n  thing")), workload, inline=True)
    with pytest.raises(ArmFailed, match="t: bad thing") as caught:
        await model.infer(ONE)
    assert caught.value.kind == "error"


async def test_a_run_over_its_deadline_is_a_timeout(workload: Workload) -> None:
    gate = threading.Event()
    model = Model("t:1", "t", _Session(np.zeros((1, 2)), gate), workload, inline=True)
    started = time.monotonic()
    with pytest.raises(ArmFailed, match=r"no answer in 0\.05 s") as caught:
        await model.infer(ONE, deadline=0.05)
    assert caught.value.kind == "timeout"
    assert time.monotonic() - started < 5
    gate.set()


async def test_a_model_that_is_replaced_still_answers_the_requests_that_took_it(workload: Workload) -> None:
    gate = threading.Event()
    holder = [Model("t:1", "t", _Session(np.zeros((1, 2)), gate), workload, inline=False)]
    asked = [asyncio.ensure_future(holder[0].infer(ONE, deadline=10)) for _ in range(3 * arms._POOL_THREADS)]
    await asyncio.sleep(0)
    holder.clear()
    gc.collect()
    gate.set()
    assert len(await asyncio.gather(*asked)) == 3 * arms._POOL_THREADS


async def test_a_run_over_its_deadline_is_told_to_end(workload: Workload) -> None:
    # Of this length the loop takes minutes; its thread is free again because the run was ended.
    model = load_model_without_warm_up(models.slow_onnx(1_000_000_000), workload)
    for _ in range(2 * arms._POOL_THREADS):
        with pytest.raises(ArmFailed) as caught:
            await model.infer(ONE, deadline=0.05)
        assert caught.value.kind == "timeout"
    assert model._pool is not None
    await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(model._pool, lambda: None), 10)


def load_model_without_warm_up(content: bytes, workload: Workload) -> Model:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Model("slow:1", "slow", session, workload, inline=False)


def test_a_fast_model_is_run_where_it_is_asked_and_a_slow_one_is_not(
    variants: dict[str, Variant], workload: Workload
) -> None:
    assert load_model(variants["full"], workload).inline
    assert not load(workload, "slow", models.slow_onnx(20_000)).inline


async def test_an_inline_model_does_not_leave_the_event_loop(workload: Workload) -> None:
    seen = []

    class Noting(_Session):
        def run(self, *arguments: Any) -> list[Any]:
            seen.append(threading.get_ident())
            return super().run(*arguments)

    session = Noting(np.zeros((1, 2)))
    await Model("t:1", "t", session, workload, inline=True).infer(ONE)
    slow = Model("t:1", "t", session, workload, inline=False)
    await slow.infer(ONE)
    here = threading.get_ident()
    assert seen[0] == here
    assert seen[1] != here


def test_warm_up_takes_sample_records_where_there_are_some(
    variants: dict[str, Variant], workload: Workload
) -> None:
    with pytest.raises(ArmFailed, match="NaN"):
        load_model(variants["broken"], workload, sample=[{**RECORDS[0], "a": 0.9}])


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_breaker_opens_after_so_many_failures_in_a_row(clock: Clock) -> None:
    breaker = Breaker(threshold=3, cooldown=5, clock=clock)
    for _ in range(2):
        breaker.failed()
    assert breaker.allow()
    breaker.failed()
    assert not breaker.allow()
    assert breaker.trips == 1


def test_a_success_between_keeps_the_breaker_closed(clock: Clock) -> None:
    breaker = Breaker(threshold=3, cooldown=5, clock=clock)
    for _ in range(10):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert breaker.allow()
    assert breaker.trips == 0


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
    assert breaker.trips == 2
    clock.now += 6
    assert breaker.allow()
