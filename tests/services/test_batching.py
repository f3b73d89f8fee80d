from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.workload import Tensors, load_workload
from services import batching
from services.batching import Batcher, DeadlineExceeded, Overloaded, Run
from services.errors import ArmFailed, ServingError
from tests import models

WORKLOAD = load_workload(models.WORKLOAD)
FOREVER = 3600.0
LIMIT = 20.0
"""Seconds after which a test that waits for an event has failed."""


class Stopped(Exception):
    """A run was told to end."""


class Control:
    """A stop button, and what a test uses to let a run go on."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True
        self.go.set()


class GatedRun:
    """A run that has begun, and goes on when it is released."""

    def __init__(self, inputs: Tensors, control: Control) -> None:
        self.inputs = inputs
        self.control = control
        self.thread = threading.get_ident()
        self.outcome: Any = None

    @property
    def ids(self) -> list[int]:
        """The first column of its rows, by which tests know them."""
        return [int(value) for value in self.inputs["x"][:, 0]]

    def release(self, outcome: Any = None) -> None:
        """Let it answer as the model does, or return or raise something else."""
        self.outcome = outcome
        self.control.go.set()


def model(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rows in, rows out; padding with zeros changes nothing."""
    if (x < 0).any():
        raise ArmFailed("error", "a poisoned row")
    return x.sum(axis=1), x[:, :1] * 2


def request(identity: int, rows: int = 1, width: int = 1) -> Tensors:
    return {"x": np.full((rows, width), identity, np.int64)}


class Bench:
    """A batcher whose every run waits until the test releases it."""

    def __init__(self, **changes: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Queue[GatedRun] = asyncio.Queue()
        self.controls: list[Control] = []
        self.batches: list[tuple[int, int, float]] = []
        self.tasks: list[asyncio.Task[Run]] = []
        self.something = asyncio.Event()
        self.batcher = Batcher(
            self._run,
            **{
                "control": self._control,
                "threads": 1,
                "max_rows": 8,
                "max_wait_s": 0.0,
                "collate": WORKLOAD.collate,
                "max_queue_s": FOREVER,
                "on_batch": self._on_batch,
                **changes,
            },
        )

    def _control(self) -> Control:
        self.controls.append(Control())
        return self.controls[-1]

    def _on_batch(self, rows: int, requests: int, seconds: float) -> None:
        self.batches.append((rows, requests, seconds))
        self.something.set()

    def _begin(self, run: GatedRun) -> None:
        self._started.put_nowait(run)
        self.something.set()

    def _run(self, inputs: Tensors, control: Control) -> tuple[np.ndarray, ...]:
        run = GatedRun(inputs, control)
        control.begun.set()
        self._loop.call_soon_threadsafe(self._begin, run)
        assert control.go.wait(LIMIT)
        if control.cancelled:
            raise Stopped
        outcome = run.outcome() if callable(run.outcome) else run.outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return model(inputs["x"]) if outcome is None else outcome

    @property
    def finished(self) -> int:
        return len(self.controls) - len(self.batcher._handed)

    async def submit(self, inputs: Tensors, deadline: float | None = None) -> asyncio.Task[Run]:
        """Submit in a task of its own, which has taken its first step when this returns."""
        task = asyncio.ensure_future(self.batcher.submit(inputs, len(inputs["x"]), deadline))
        self.tasks.append(task)
        task.add_done_callback(lambda _: self.something.set())
        await asyncio.sleep(0)
        return task

    async def started(self) -> GatedRun:
        """The next run that begins."""
        return await asyncio.wait_for(self._started.get(), LIMIT)

    def none_started(self) -> bool:
        """Whether all runs that have been handed to a thread were seen by the test, and have ended."""
        return self.batcher.running == 0 and self._started.empty()

    async def finish(self, run: GatedRun) -> None:
        """Release a run that is to end as its rows say, and wait until the batcher knows that it has."""
        before = self.finished
        run.release()
        while self.finished == before:
            self.something.clear()
            await asyncio.wait_for(self.something.wait(), LIMIT)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await emptied(self.batcher)


async def emptied(batcher: Batcher[Any]) -> None:
    """Wait until nothing is queued or running."""
    async with asyncio.timeout(LIMIT):
        while batcher._handed or batcher._queue:
            await asyncio.sleep(0)


Make = Callable[..., Bench]


@pytest.fixture
async def bench() -> AsyncIterator[Make]:
    made: list[Bench] = []

    def make(**changes: Any) -> Bench:
        made.append(Bench(**changes))
        return made[-1]

    yield make
    for one in made:
        await one.close()


async def result(task: asyncio.Task[Run]) -> Run:
    return await asyncio.wait_for(task, LIMIT)


async def under_load(one: Bench) -> GatedRun:
    """Bring a bench of one thread to where its latest run, which goes on, is of two requests."""
    for identity in (101, 102, 103):
        await one.submit(request(identity))
    (await one.started()).release()
    joined = await one.started()
    assert joined.ids == [102, 103]
    return joined


class Clock:
    """Stands in for the `time` that the batcher reads."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


@contextlib.contextmanager
def no_timers() -> Iterator[None]:
    """Setting a timer fails the test."""

    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("a timer was set")

    loop = asyncio.get_running_loop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "call_later", refuse)
        patch.setattr(loop, "call_at", refuse)
        yield


@contextlib.contextmanager
def timers(one: Bench) -> Iterator[list[tuple[float, asyncio.TimerHandle]]]:
    """The batcher's timers that are set meanwhile, with their delays."""
    loop = asyncio.get_running_loop()
    call_later = loop.call_later
    found: list[tuple[float, asyncio.TimerHandle]] = []

    def note(delay: float, callback: Any, *arguments: Any, **named: Any) -> asyncio.TimerHandle:
        timer = call_later(delay, callback, *arguments, **named)
        if getattr(callback, "__self__", None) is one.batcher:
            found.append((delay, timer))
        return timer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "call_later", note)
        yield found


# -- one request ------------------------------------------------------------------------------------------


async def test_on_an_idle_server_a_request_is_in_a_thread_after_its_first_step_and_no_timer_is_set(
    bench: Make,
) -> None:
    one = bench(max_wait_s=FOREVER)
    with no_timers():
        task = await one.submit(request(7, rows=2))
    assert (one.batcher.running, one.batcher.queued) == (1, 0)
    run = await one.started()
    assert run.ids == [7, 7]
    assert run.thread != threading.get_ident()
    run.release()
    assert (await result(task)).outputs[0].tolist() == [7, 7]


async def test_a_request_that_comes_when_the_load_is_over_does_not_wait_for_others(bench: Make) -> None:
    one = bench(max_wait_s=FOREVER)
    await one.finish(await under_load(one))
    with no_timers():
        await one.submit(request(7))
    assert (one.batcher.running, one.batcher.queued) == (1, 0)


async def test_as_many_requests_run_at_once_as_there_are_threads_and_the_others_queue(bench: Make) -> None:
    one = bench(threads=2)
    for identity in range(1, 5):
        await one.submit(request(identity))
    assert (one.batcher.running, one.batcher.queued) == (2, 2)
    runs = [await one.started(), await one.started()]
    assert sorted(run.ids for run in runs) == [[1], [2]]
    assert runs[0].thread != runs[1].thread


async def test_a_thread_begins_a_full_batch_without_waiting_for_the_event_loop(bench: Make) -> None:
    one = bench(max_rows=2)
    for identity in (1, 2, 3, 4):
        await one.submit(request(identity))
    one.controls[0].go.set()
    assert one.controls[1].begun.wait(LIMIT)  # the event loop stands still meanwhile
    await one.started()
    assert (await one.started()).ids == [2, 3]


async def test_a_batch_that_something_could_be_added_to_is_not_taken_ahead(bench: Make) -> None:
    one = bench(max_rows=3)
    for identity in (1, 2, 3):
        await one.submit(request(identity))
    assert len(one.controls) == 1
    await one.submit(request(4))
    assert len(one.controls) == 2


async def test_a_batch_that_nobody_waits_for_is_not_run_when_no_thread_has_taken_it(bench: Make) -> None:
    one = bench(max_rows=1)
    await one.submit(request(1))
    left = await one.submit(request(2))
    await one.submit(request(3))
    left.cancel()
    await asyncio.wait([left])
    assert one.batcher.queued == 1
    (await one.started()).release()
    assert (await one.started()).ids == [3]


async def test_what_nobody_waits_for_is_not_kept_for_a_thread_that_may_never_come(bench: Make) -> None:
    one = bench(max_rows=1)
    await one.submit(request(1))
    left = await one.submit(inputs := request(2))
    kept = weakref.ref(inputs["x"])
    left.cancel()
    await asyncio.wait([left])
    one.tasks.remove(left)
    del inputs, left
    assert kept() is None


async def test_a_run_of_one_request_gets_its_tensors_as_they_are(bench: Make) -> None:
    one = bench()
    inputs = request(3, rows=2)
    await one.submit(inputs)
    assert (await one.started()).inputs["x"] is inputs["x"]


# -- batches ----------------------------------------------------------------------------------------------


async def test_what_queued_during_a_run_is_run_together_in_order_and_each_gets_its_own_rows(
    bench: Make,
) -> None:
    one = bench()
    await one.submit(request(1))
    two, three, four = [await one.submit(request(identity, rows=identity)) for identity in (2, 3, 1)]
    (await one.started()).release()
    run = await one.started()
    assert run.ids == [2, 2, 3, 3, 3, 1]
    assert one.batcher.queued == 0
    run.release()
    for task, expected in ((two, [2, 2]), (three, [3, 3, 3]), (four, [1])):
        outputs = (await result(task)).outputs
        assert outputs[0].tolist() == expected
        assert outputs[1].tolist() == [[2 * value] for value in expected]


@pytest.mark.parametrize(
    ("max_rows", "sizes", "batches"),
    [
        (4, [2, 2, 2], [4, 2]),
        (4, [2, 3, 1], [2, 4]),
        (4, [1, 5, 1, 1], [1, 5, 2]),
        (4, [4, 4], [4, 4]),
        (1, [1, 1, 2], [1, 1, 2]),
    ],
)
async def test_a_batch_is_the_front_of_the_queue_up_to_the_limit_and_a_larger_request_runs_alone(
    bench: Make, max_rows: int, sizes: list[int], batches: list[int]
) -> None:
    one = bench(max_rows=max_rows)
    await one.submit(request(99))
    for size in sizes:
        await one.submit(request(1, rows=size))
    await one.finish(await one.started())
    for rows in batches:
        run = await one.started()
        assert len(run.ids) == rows
        await one.finish(run)
    assert [rows for rows, _, _ in one.batches] == [1, *batches]


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.full((1, 1), 3, np.int32)},
        {"x": np.full((1, 1, 1), 3, np.int64)},
        {"x": np.full((1, 1), 3, np.int64), "y": np.zeros((1, 1))},
    ],
    ids=["dtype", "axes", "names"],
)
async def test_requests_that_cannot_be_collated_are_not_run_together(bench: Make, other: Tensors) -> None:
    collated = []

    def collate(batch: Sequence[Tensors]) -> Tensors:
        collated.append(batch)
        return WORKLOAD.collate(batch)

    one = bench(collate=collate)
    await one.submit(request(1))
    await one.submit(request(2))
    await one.submit(other)
    (await one.started()).release()
    second = await one.started()
    assert second.ids == [2]
    second.release()
    assert (await one.started()).inputs is other
    assert collated == []


async def test_requests_of_several_widths_are_padded_to_one(bench: Make) -> None:
    one = bench()
    await one.submit(request(1))
    narrow, wide = await one.submit(request(2, width=1)), await one.submit(request(3, width=4))
    (await one.started()).release()
    run = await one.started()
    assert run.inputs["x"].tolist() == [[2, 0, 0, 0], [3, 3, 3, 3]]
    run.release()
    assert (await result(narrow)).outputs[0].tolist() == [2]
    assert (await result(wide)).outputs[0].tolist() == [12]


async def test_the_seconds_of_a_run_are_shared_by_rows(bench: Make, clock: Clock) -> None:
    one = bench()
    await one.submit(request(1))
    small, large = await one.submit(request(2)), await one.submit(request(3, rows=3))
    (await one.started()).release()
    run = await one.started()
    clock.now += 2.0
    run.release()
    first, second = await result(small), await result(large)
    assert (first.seconds, second.seconds) == (0.5, 1.5)
    assert one.batches[-1] == (4, 2, 2.0)


# -- waiting for others -----------------------------------------------------------------------------------


async def test_under_load_a_batch_that_is_not_full_waits_for_more_and_runs_when_it_is_full(
    bench: Make,
) -> None:
    one = bench(max_rows=2, max_wait_s=FOREVER)
    joined = await under_load(one)
    await one.submit(request(1))
    with timers(one) as found:
        await one.finish(joined)
    assert one.none_started()
    assert one.batcher.queued == 1
    await one.submit(request(2))
    assert (await one.started()).ids == [1, 2]
    assert [timer.cancelled() for _, timer in found] == [True]


async def test_a_batch_that_is_not_full_runs_when_its_timer_ends_even_if_that_is_early(
    bench: Make, clock: Clock
) -> None:
    one = bench(max_wait_s=0.01)
    joined = await under_load(one)
    await one.submit(request(1))
    await one.finish(joined)
    assert (await one.started()).ids == [1]


async def test_a_batch_waits_from_when_its_first_request_came(bench: Make, clock: Clock) -> None:
    one = bench(max_wait_s=1000.0)
    joined = await under_load(one)
    await one.submit(request(1))
    clock.now += 400
    await one.submit(request(2))
    with timers(one) as found:
        await one.finish(joined)
        await one.submit(request(3))
    assert [delay for delay, _ in found] == [600.0]


async def test_a_request_that_queued_for_as_long_as_it_may_wait_does_not_wait_again(
    bench: Make, clock: Clock
) -> None:
    one = bench(max_wait_s=1000.0)
    joined = await under_load(one)
    await one.submit(request(1))
    clock.now += 1000
    with timers(one) as found:
        await one.finish(joined)
        assert (await one.started()).ids == [1]
    assert found == []


async def test_a_caller_that_was_cancelled_a_moment_ago_fills_no_batch(bench: Make) -> None:
    one = bench(max_rows=2, max_wait_s=FOREVER)
    joined = await under_load(one)
    waiting = await one.submit(request(1))
    await one.finish(joined)
    # The new request is looked at before the cancelled caller has had its turn to leave the queue.
    asked = asyncio.ensure_future(one.submit(request(2)))
    await asyncio.sleep(0)
    waiting.cancel()
    await asked
    await asyncio.wait([waiting])
    assert one.none_started()
    assert one.batcher.queued == 1


async def test_after_a_run_of_one_request_nothing_waits(bench: Make) -> None:
    one = bench(max_wait_s=FOREVER)
    await one.submit(request(1))
    await one.submit(request(2))
    (await one.started()).release()
    assert (await one.started()).ids == [2]


async def test_a_request_that_nothing_can_join_does_not_wait(bench: Make) -> None:
    one = bench(max_rows=2, max_wait_s=FOREVER)
    joined = await under_load(one)
    await one.submit(request(1))
    await one.submit({"x": np.ones((1, 1), np.int32)})
    await one.finish(joined)
    assert (await one.started()).ids == [1]


async def test_a_waiting_batch_whose_callers_have_gone_holds_nobody_up(bench: Make) -> None:
    one = bench(max_wait_s=FOREVER)
    joined = await under_load(one)
    waiting = await one.submit(request(1))
    await one.finish(joined)
    waiting.cancel()
    await asyncio.wait([waiting])
    await emptied(one.batcher)
    await one.submit(request(2))
    assert (await one.started()).ids == [2]


# -- errors -----------------------------------------------------------------------------------------------


async def test_when_a_batch_fails_each_request_is_run_alone_and_only_the_bad_one_fails(bench: Make) -> None:
    one = bench()
    await one.submit(request(9))
    good, bad, fine = [await one.submit(request(identity)) for identity in (1, -2, 3)]
    later = await one.submit(request(4, rows=8))
    for ids in ([9], [1, -2, 3], [4] * 8, [1], [-2], [3]):
        run = await one.started()
        assert run.ids == ids
        run.release()
    assert (await result(good)).outputs[0].tolist() == [1]
    assert (await result(fine)).outputs[0].tolist() == [3]
    assert (await result(later)).outputs[0].tolist() == [4] * 8
    with pytest.raises(ArmFailed, match="a poisoned row"):
        await result(bad)
    assert [requests for _, requests, _ in one.batches] == [1, 1, 1, 1]


async def test_who_left_a_batch_that_fails_is_not_run_alone(bench: Make) -> None:
    one = bench()
    await one.submit(request(9))
    left, bad = await one.submit(request(1)), await one.submit(request(-2))
    (await one.started()).release()
    run = await one.started()
    left.cancel()
    await asyncio.wait([left])
    run.release()
    assert (await one.started()).ids == [-2]
    assert one.batcher.queued == 0
    assert not bad.done()


async def test_what_cannot_be_collated_after_all_is_run_alone(bench: Make) -> None:
    def collate(batch: Sequence[Tensors]) -> Tensors:
        raise ValueError("these do not fit")

    one = bench(collate=collate)
    await one.submit(request(9))
    tasks = [await one.submit(request(identity)) for identity in (1, 2)]
    for ids in ([9], [1], [2]):
        run = await one.started()
        assert run.ids == ids
        run.release()
    await asyncio.gather(*map(result, tasks))
    assert [rows for rows, _, _ in one.batches] == [1, 1, 1]


async def test_an_error_with_a_status_reaches_the_caller_as_it_is(bench: Make) -> None:
    one = bench()
    task = await one.submit(request(1))
    error = ArmFailed("invalid", "NaN")
    (await one.started()).release(error)
    with pytest.raises(ArmFailed) as caught:
        await result(task)
    assert caught.value is error


@pytest.mark.parametrize(
    "error", [ValueError("of two\n lines"), StopIteration("of two lines"), SystemExit("of two lines")]
)
async def test_any_other_error_becomes_a_failure_in_one_line_and_frees_the_thread(
    bench: Make, error: BaseException
) -> None:
    one = bench()
    task = await one.submit(request(1))
    (await one.started()).release(error)
    with pytest.raises(ArmFailed, match=r"^of two lines$") as caught:
        await result(task)
    assert caught.value.kind == "error"
    assert caught.value.__cause__ is error
    assert one.batcher.running == 0


@pytest.mark.parametrize(
    "outputs",
    [
        (np.zeros((2, 3)), np.zeros((3, 3))),
        (np.zeros(4),),
        (np.array(1.0),),
        ([0.0, 0.0],),
        (None,),
    ],
    ids=["one-of-two", "too-many", "no-axis", "list", "none"],
)
async def test_an_output_that_has_not_one_row_for_each_row_of_the_input_is_no_answer(
    bench: Make, outputs: Any
) -> None:
    one = bench()
    task = await one.submit(request(1, rows=2))
    (await one.started()).release(outputs)
    with pytest.raises(ArmFailed, match=r"output \d of the model has shape \[.*\] for 2 rows") as caught:
        await result(task)
    assert caught.value.kind == "invalid"


@pytest.mark.parametrize("failure", [lambda: ArmFailed("error", "bad"), ValueError], ids=["ours", "other"])
async def test_the_tensors_of_a_failed_request_are_freed_without_the_garbage_collector(
    failure: Callable[[], Exception],
) -> None:
    inputs = request(1)
    tensor = weakref.ref(inputs["x"])

    def fail(inputs: Tensors, control: Control) -> tuple[np.ndarray, ...]:
        raise failure()

    batcher = free_running(fail, threads=1)
    gc.disable()
    try:
        with contextlib.suppress(ArmFailed):
            await batcher.submit(inputs, 1)
        # When the thread takes up something else, it has let go of the run.
        await asyncio.get_running_loop().run_in_executor(batcher._pool, lambda: None)
        del inputs
        assert tensor() is None
    finally:
        gc.enable()


async def test_a_failing_callback_does_not_hold_up_the_queue(bench: Make) -> None:
    def fail(rows: int, requests: int, seconds: float) -> None:
        raise RuntimeError("no metrics today")

    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
    one = bench(on_batch=fail)
    tasks = [await one.submit(request(identity)) for identity in (1, 2)]
    for task in tasks:
        (await one.started()).release()
        await result(task)
    await emptied(one.batcher)
    assert [str(error) for error in told] == ["no metrics today"] * 2


# -- deadlines --------------------------------------------------------------------------------------------


def soon() -> float:
    return time.perf_counter() + 0.1


async def test_a_deadline_that_passes_during_the_run_is_told_at_once_and_ends_the_run(bench: Make) -> None:
    one = bench()
    task = await one.submit(request(1), deadline=soon())
    run = await one.started()
    with pytest.raises(DeadlineExceeded, match="deadline") as caught:
        await result(task)
    assert caught.value.status == 504
    assert run.control.cancelled
    await emptied(one.batcher)


async def test_a_deadline_that_passes_in_the_queue_drops_the_request_unrun(bench: Make) -> None:
    one = bench()
    await one.submit(request(1))
    late = await one.submit(request(2), deadline=soon())
    await one.submit(request(3))
    with pytest.raises(DeadlineExceeded):
        await result(late)
    assert one.batcher.queued == 1
    run = await one.started()
    assert not run.control.cancelled
    run.release()
    assert (await one.started()).ids == [3]


async def test_a_deadline_that_passed_while_the_event_loop_was_busy_drops_the_request_too(
    bench: Make, clock: Clock
) -> None:
    one = bench()
    await one.submit(request(1))
    late = await one.submit(request(2), deadline=clock.now + 1000)
    in_time = await one.submit(request(3), deadline=clock.now + 3000)
    clock.now += 2000
    (await one.started()).release()
    assert (await one.started()).ids == [3]
    with pytest.raises(DeadlineExceeded):
        await result(late)
    assert not in_time.done()


async def test_a_request_that_comes_after_its_deadline_is_not_run(bench: Make) -> None:
    one = bench()
    with pytest.raises(DeadlineExceeded):
        await result(await one.submit(request(1), deadline=time.perf_counter()))
    assert one.controls == []


async def test_an_infinite_deadline_is_none(bench: Make) -> None:
    one = bench()
    with no_timers():
        await one.submit(request(7), deadline=float("inf"))
    assert (await one.started()).ids == [7]


async def test_a_batch_runs_on_until_its_last_caller_has_gone(bench: Make) -> None:
    one = bench()
    await one.submit(request(9))
    tasks = [await one.submit(request(identity)) for identity in (1, 2)]
    (await one.started()).release()
    run = await one.started()
    assert run.ids == [1, 2]
    for task, ended in zip(tasks, (False, True), strict=True):
        task.cancel()
        await asyncio.wait([task])
        assert run.control.cancelled == ended


async def test_who_stays_in_a_batch_that_another_left_gets_the_own_rows(bench: Make) -> None:
    one = bench()
    await one.submit(request(9))
    left, stays = await one.submit(request(1, rows=2)), await one.submit(request(2))
    (await one.started()).release()
    run = await one.started()
    left.cancel()
    await asyncio.wait([left])
    run.release()
    assert (await result(stays)).outputs[0].tolist() == [2]


async def test_a_request_whose_caller_was_cancelled_in_the_queue_is_not_run(bench: Make) -> None:
    one = bench()
    await one.submit(request(1))
    gone = await one.submit(request(2))
    await one.submit(request(3))
    gone.cancel()
    await asyncio.wait([gone])
    assert one.batcher.queued == 1
    (await one.started()).release()
    assert (await one.started()).ids == [3]


async def test_when_the_answer_is_there_neither_the_run_nor_the_deadline_is_left_to_end_it(
    bench: Make,
) -> None:
    one = bench()
    with timers(one) as found:
        task = await one.submit(request(1), deadline=time.perf_counter() + FOREVER)
    run = await one.started()
    run.release()
    await result(task)
    assert not run.control.cancelled
    assert [timer.cancelled() for _, timer in found] == [True]


# -- back-pressure ----------------------------------------------------------------------------------------


async def warmed(one: Bench, clock: Clock, rows: int, seconds: float) -> None:
    """Let the batcher see a run of so many rows that takes so long."""
    task = await one.submit(request(1, rows=rows))
    run = await one.started()
    clock.now += seconds
    run.release()
    await result(task)


@pytest.mark.parametrize(("threads", "admitted"), [(1, 2), (2, 4)])
async def test_a_request_that_would_wait_too_long_is_refused_before_it_queues(
    bench: Make, clock: Clock, threads: int, admitted: int
) -> None:
    one = bench(threads=threads, max_rows=4, max_queue_s=11.0)
    await warmed(one, clock, rows=2, seconds=2.0)
    for _ in range(threads + admitted):
        await one.submit(request(1, rows=4))
    assert one.batcher.queued == admitted
    with pytest.raises(Overloaded, match="try again in 12 s") as caught:
        await result(await one.submit(request(1, rows=4)))
    assert caught.value.status == 503
    assert caught.value.headers == {"Retry-After": "12"}
    assert one.batcher.queued == admitted
    await one.submit(request(1, rows=3))
    assert one.batcher.queued == admitted + 1


async def test_a_refused_client_is_told_to_wait_a_second_at_least(bench: Make, clock: Clock) -> None:
    one = bench(max_queue_s=0.001)
    await warmed(one, clock, rows=1, seconds=0.01)
    await one.submit(request(1))
    with pytest.raises(Overloaded) as caught:
        await result(await one.submit(request(1)))
    assert caught.value.headers == {"Retry-After": "1"}
    assert ServingError.headers == {}


async def test_a_request_that_finds_a_thread_free_is_never_refused(bench: Make, clock: Clock) -> None:
    one = bench(max_queue_s=1.0)
    await warmed(one, clock, rows=1, seconds=100.0)
    await one.submit(request(1, rows=8))
    assert one.batcher.running == 1


async def test_a_request_whose_turn_would_come_after_its_deadline_is_refused_and_not_late(
    bench: Make, clock: Clock
) -> None:
    one = bench(max_rows=1, max_queue_s=10.0)
    await warmed(one, clock, rows=1, seconds=1.0)
    await one.submit(request(1))
    for seconds, taken in ((1.5, False), (2.5, True), (2.5, False), (3.5, True)):
        task = await one.submit(request(2), deadline=clock.now + seconds)
        assert task.done() is not taken
        if not taken:
            with pytest.raises(Overloaded):
                await task


async def test_rows_weigh_in_the_estimate_and_not_runs(bench: Make, clock: Clock) -> None:
    one = bench(max_queue_s=10.0)
    await warmed(one, clock, rows=1, seconds=1.0)
    await warmed(one, clock, rows=99, seconds=1.0)
    await one.submit(request(1))
    await one.submit(request(1, rows=100))
    assert one.batcher.queued == 1


async def test_the_estimate_follows_a_model_that_became_faster(bench: Make, clock: Clock) -> None:
    one = bench(max_queue_s=0.2)
    await warmed(one, clock, rows=1, seconds=10.0)
    for _ in range(50):
        await warmed(one, clock, rows=1, seconds=0.1)
    await one.submit(request(1))
    await one.submit(request(1))
    assert one.batcher.queued == 1


async def test_what_left_the_queue_no_longer_counts(bench: Make, clock: Clock) -> None:
    one = bench(max_rows=4, max_queue_s=10.0)
    await warmed(one, clock, rows=1, seconds=1.0)
    await one.submit(request(1))
    for _ in range(5):
        waiting = await one.submit(request(1, rows=8))
        assert one.batcher.queued == 1
        waiting.cancel()
        await asyncio.wait([waiting])
    run = await one.started()
    for _ in range(5):
        await one.submit(request(1, rows=8))
        await one.finish(run)
        run = await one.started()


async def test_the_queue_has_an_end_even_where_no_estimate_is(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "_MAX_QUEUED", 3)
    one = bench()
    for _ in range(4):
        await one.submit(request(1))
    with pytest.raises(Overloaded):
        await result(await one.submit(request(1)))
    assert one.batcher.queued == 3


# -- being replaced ---------------------------------------------------------------------------------------


async def test_a_batcher_that_is_let_go_of_still_answers_what_it_took() -> None:
    go = threading.Event()

    def run(inputs: Tensors, control: Control) -> tuple[np.ndarray, ...]:
        go.wait(LIMIT)
        return model(inputs["x"])

    holder = [free_running(run)]
    asked = [asyncio.ensure_future(holder[0].submit(request(number), 1)) for number in range(20)]
    await asyncio.sleep(0)
    holder.clear()
    gc.collect()
    go.set()
    answers = await asyncio.wait_for(asyncio.gather(*asked), LIMIT)
    assert [answer.outputs[0].tolist() for answer in answers] == [[number] for number in range(20)]


def free_running(
    run: Callable[[Tensors, Control], tuple[np.ndarray, ...]], **changes: Any
) -> Batcher[Control]:
    return Batcher(
        run,
        **{
            "control": Control,
            "threads": 2,
            "max_rows": 8,
            "max_wait_s": 0.0005,
            "collate": WORKLOAD.collate,
            "max_queue_s": FOREVER,
            "on_batch": lambda rows, requests, seconds: None,
            **changes,
        },
    )


# -- whatever comes ---------------------------------------------------------------------------------------

_ROWS, _WIDTH = st.integers(1, 6), st.integers(1, 3)
_SUBMIT = st.tuples(st.just("submit"), _ROWS, _WIDTH, st.integers(0, 7).map(lambda luck: luck == 0))
_RELEASE = st.tuples(st.just("release"), st.integers(0, 5), st.none(), st.none())


async def seen(one: Bench, runs: list[GatedRun]) -> None:
    """Add the runs that the batcher has started."""
    while len(runs) < one.batcher.running:
        runs.append(await one.started())


async def finish_all(one: Bench, runs: list[GatedRun]) -> None:
    while one.batcher.running or one.batcher.queued:
        one.something.clear()
        await seen(one, runs)
        if runs:
            await one.finish(runs.pop())
        elif not one.batcher.running:  # a batch waits for others, and then begins
            await asyncio.wait_for(one.something.wait(), LIMIT)


@settings(deadline=None)
@given(
    threads=st.integers(1, 3),
    max_rows=st.integers(1, 8),
    max_wait_s=st.sampled_from([0.0, 0.0005]),
    steps=st.lists(st.one_of(_SUBMIT, _SUBMIT, _RELEASE), max_size=30),
)
def test_in_any_interleaving_each_request_gets_the_answer_it_would_get_alone(
    threads: int, max_rows: int, max_wait_s: float, steps: list[tuple[str, int, Any, Any]]
) -> None:
    async def play() -> None:
        one = Bench(threads=threads, max_rows=max_rows, max_wait_s=max_wait_s)
        asked: list[tuple[Tensors, asyncio.Task[Run]]] = []
        runs: list[GatedRun] = []
        for what, number, width, poisoned in steps:
            await seen(one, runs)
            assert one.batcher.running <= threads
            if what == "submit":
                inputs = request(len(asked) + 1, rows=number, width=width)
                if poisoned:
                    inputs["x"][-1, 0] = -1
                asked.append((inputs, await one.submit(inputs)))
            elif runs:
                await one.finish(runs.pop(number % len(runs)))
        await finish_all(one, runs)
        sizes = []
        for inputs, task in asked:
            if (inputs["x"] < 0).any():
                with pytest.raises(ArmFailed, match="a poisoned row"):
                    await task
                continue
            sizes.append(len(inputs["x"]))
            for got, alone in zip((await task).outputs, model(inputs["x"]), strict=True):
                np.testing.assert_array_equal(got, alone, strict=True)
        assert sum(rows for rows, _, _ in one.batches) == sum(sizes)
        assert sum(requests for _, requests, _ in one.batches) == len(sizes)
        assert all(rows <= max([max_rows, *sizes]) for rows, _, _ in one.batches)
        assert all(rows <= max_rows for rows, requests, _ in one.batches if requests > 1)

    asyncio.run(play())


@settings(deadline=None, max_examples=30)
@given(
    threads=st.integers(1, 3),
    sizes=st.lists(
        st.tuples(_ROWS, st.sampled_from(["stay", "stay", "leave", "late", "poison"])), max_size=60
    ),
)
def test_whoever_leaves_the_others_get_their_answers_and_nothing_is_left_over(
    threads: int, sizes: list[tuple[int, str]]
) -> None:
    def run(inputs: Tensors, control: Control) -> tuple[np.ndarray, ...]:
        return model(inputs["x"])

    async def play() -> None:
        batcher = free_running(run, threads=threads)
        tasks = []
        for number, (rows, way) in enumerate(sizes):
            inputs = request(-1 if way == "poison" else number, rows=rows)
            deadline = time.perf_counter() + 0.0002 if way == "late" else None
            tasks.append(asyncio.ensure_future(batcher.submit(inputs, rows, deadline)))
            if number % 3 == 0:
                await asyncio.sleep(0)
            if way == "leave":
                tasks[number // 2].cancel()
        answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), LIMIT)
        await emptied(batcher)
        assert (batcher.queued, batcher.running, batcher._queued_rows) == (0, 0, 0)
        for number, ((rows, way), answer) in enumerate(zip(sizes, answers, strict=True)):
            if isinstance(answer, asyncio.CancelledError):
                continue
            if isinstance(answer, DeadlineExceeded | Overloaded):
                assert way == "late"
            elif isinstance(answer, ArmFailed):
                assert way == "poison"
            else:
                assert isinstance(answer, Run)
                assert answer.outputs[0].tolist() == [number] * rows

    asyncio.run(play())


# -- ONNX Runtime -----------------------------------------------------------------------------------------


class OnnxControl:
    def __init__(self) -> None:
        self.options = onnxruntime.RunOptions()

    def cancel(self) -> None:
        self.options.terminate = True


def onnx_batcher(content: bytes, batches: list[tuple[int, int]]) -> Batcher[OnnxControl]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Batcher(
        lambda inputs, control: tuple(session.run(None, inputs, control.options)),
        control=OnnxControl,
        threads=2,
        max_rows=32,
        max_wait_s=0.001,
        collate=WORKLOAD.collate,
        max_queue_s=FOREVER,
        on_batch=lambda rows, requests, seconds: batches.append((rows, requests)),
    )


async def test_a_real_model_run_in_batches_answers_as_it_does_alone() -> None:
    batches: list[tuple[int, int]] = []
    batcher = onnx_batcher(models.points_onnx(), batches)
    records = [record for record, _ in models.points(300, seed=5)]
    cuts = [0, *sorted(np.random.default_rng(5).choice(np.arange(1, 300), 99, replace=False).tolist()), 300]
    requests = [WORKLOAD.encode(records[start:end]) for start, end in itertools.pairwise(cuts)]
    answers = await asyncio.wait_for(
        asyncio.gather(*(batcher.submit(inputs, len(inputs["x"])) for inputs in requests)), LIMIT
    )
    for inputs, answer in zip(requests, answers, strict=True):
        alone = await batcher.submit(inputs, len(inputs["x"]))
        np.testing.assert_array_equal(answer.outputs[0], alone.outputs[0], strict=True)
    assert max(joined for _, joined in batches) > 1


async def test_a_deadline_ends_a_real_run_and_frees_its_thread() -> None:
    batcher = onnx_batcher(models.slow_onnx(1_000_000_000), [])  # of this length the loop takes minutes
    for _ in range(3):
        with pytest.raises(DeadlineExceeded):
            await batcher.submit({"x": np.ones((1, 5), np.float32)}, 1, time.perf_counter() + 0.05)
    await emptied(batcher)
