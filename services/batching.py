"""Runs a model in threads: at once while a thread is free, several requests together while none is.

Nothing waits for company on an idle server. What comes while every thread is busy queues, and the run that ends takes
the front of the queue with it as one batch, so batches grow with load and with nothing else. A batch that nothing could
be added to is handed to the threads ahead of its turn, so that none of them stands idle until the event loop has
looked at what it did.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np

from services.errors import ArmFailed, ServingError

if TYPE_CHECKING:
    from compression.workload import Tensors

__all__ = ["Batcher", "DeadlineExceeded", "Overloaded", "Run", "RunControl"]

log = logging.getLogger("trimtab.batching")

Outputs = tuple[np.ndarray, ...]

_MAX_QUEUED = 4096
# What a run adds to the means of seconds and rows fades by this with every later run: about the last ten count.
_MEMORY = 0.9


class Overloaded(ServingError):
    """Too much waits already; the client may try again when that is done."""

    status = 503

    def __init__(self, seconds: float) -> None:
        retry_after = max(1, math.ceil(seconds))
        super().__init__(f"too many requests wait for this model; try again in {retry_after} s")
        # The base says what a class of errors carries; here it depends on the queue.
        self.headers = {"Retry-After": str(retry_after)}  # type: ignore[misc]


class DeadlineExceeded(ServingError):
    """The request's deadline passed before its answer was there."""

    status = 504

    def __init__(self) -> None:
        super().__init__("no answer before the request's deadline; allow more time or send fewer records")


class RunControl(Protocol):
    """One run's stop button."""

    def cancel(self) -> None:
        """End the run soon, from another thread; also called just before a run begins or after it has ended."""


_Control = TypeVar("_Control", bound=RunControl)


@dataclass(frozen=True, slots=True)
class Run:
    """What one request got.

    Attributes:
        outputs: the request's own rows of every output.
        seconds: its share, by rows, of the time that the run took.
    """

    outputs: Outputs
    seconds: float


@dataclass(slots=True, eq=False)
class _Request:
    inputs: Tensors
    rows: int
    arrived: float
    deadline: float
    answer: asyncio.Future[Run]
    # What requests of one batch have in common; collating pads axes that differ in size.
    kind: dict[str, tuple[np.dtype, int]]
    batch: _Batch | None = None
    alone: bool = False


@dataclass(slots=True, eq=False)
class _Batch:
    requests: list[_Request]
    rows: int
    waiting: int
    control: RunControl
    handed: Future[None] | None = None


class Batcher(Generic[_Control]):
    """Runs one model for one worker. Used from one event loop; `run` and `collate` are called in threads.

    Args:
        run: runs the model on the tensors of one or several requests and returns its outputs, first axis = rows.
        control: makes the stop button of a run, which `run` gets as its second argument.
        threads: runs at once.
        max_rows: rows of several requests that are run together at most; a larger request runs alone. With 1 none
            are joined.
        max_wait_s: how long a request may wait for others, since it came, where the last run was of several requests
            and less than `max_rows` rows are there. A request that finds a thread free and nothing queued never waits.
        collate: joins the tensors of several requests along the first axis, in the order given.
        max_queue_s: a request is refused when clearing the queue and running it should take longer than this.
        on_batch: called on the event loop with rows, requests and seconds of every run that gave an answer.
    """

    def __init__(
        self,
        run: Callable[[Tensors, _Control], Outputs],
        *,
        control: Callable[[], _Control],
        threads: int,
        max_rows: int,
        max_wait_s: float,
        collate: Callable[[Sequence[Tensors]], Tensors],
        max_queue_s: float,
        on_batch: Callable[[int, int, float], None],
    ) -> None:
        self._run = run
        self._control = control
        self._threads = threads
        self._max_rows = max_rows
        self._max_wait_s = max_wait_s
        self._collate = collate
        self._max_queue_s = max_queue_s
        self._on_batch = on_batch
        # Never shut down: requests that took this model before another replaced it still run here. The threads end
        # when the last of them has let go of the batcher.
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="model")
        # Ordered for its quick removal from the middle, where deadlines pass.
        self._queue: OrderedDict[_Request, None] = OrderedDict()
        self._queued_rows = 0
        # In the order in which the threads take them.
        self._handed: list[_Batch] = []
        self._last_was_joined = False
        self._wait: asyncio.TimerHandle | None = None
        self._recent_seconds = 0.0
        self._recent_rows = 0.0

    @property
    def queued(self) -> int:
        """Requests that wait for a thread."""
        return len(self._queue) + sum(len(batch.requests) for batch in self._ahead)

    @property
    def running(self) -> int:
        """Runs in flight, those included that nobody waits for any more."""
        return min(len(self._handed), self._threads)

    @property
    def _ahead(self) -> list[_Batch]:
        """Batches that the threads will take next."""
        return self._handed[self._threads :]

    async def submit(self, inputs: Tensors, rows: int, deadline: float | None = None) -> Run:
        """Run the model on one request, alone or with others.

        Args:
            inputs: its tensors, first axis = rows.
            rows: at least 1.
            deadline: on the clock of `time.perf_counter`.

        Raises:
            Overloaded: too much waits already, or the request's turn would come too late for its deadline; it was not
                queued.
            DeadlineExceeded: the deadline passed, in the queue or during the run; a run that nobody waits for any
                more is cancelled.
            ServingError: what `run` raised, or ArmFailed: it raised another error, or an output has not one row for
                each row of the inputs. A request is told of the failure of a run that it had to itself, never of one
                that it shared.
        """
        now = time.perf_counter()
        if deadline is not None and deadline <= now:
            raise DeadlineExceeded
        at_once = len(self._handed) < self._threads and not self._queue
        if not at_once:
            self._admit(rows, math.inf if deadline is None else deadline - now)
        loop = asyncio.get_running_loop()
        request = _Request(
            inputs,
            rows,
            now,
            math.inf if deadline is None else deadline,
            loop.create_future(),
            {name: (value.dtype, value.ndim) for name, value in inputs.items()},
        )
        if at_once:
            self._start([request])
        else:
            self._queue[request] = None
            self._queued_rows += rows
            self._dispatch()
        timer = None
        if request.deadline < math.inf:
            timer = loop.call_later(request.deadline - now, self._expire, request)
        try:
            return await request.answer
        finally:
            if timer is not None:
                timer.cancel()
            self._leave(request)
            del request  # an error, its traceback and this frame would hold each other, tensors and all

    # -- the queue ----------------------------------------------------------------------------------------

    def _admit(self, rows: int, left: float) -> None:
        """Raise Overloaded if another request of so many rows would wait too long.

        Args:
            left: seconds to its deadline. A request that cannot make it is not the model's failure, so it must not be
                taken and then be late; what is running counts as if it had just begun.
        """
        row_seconds = self._recent_seconds / self._recent_rows if self._recent_rows else 0.0
        waiting = self._queued_rows + sum(batch.rows for batch in self._ahead)
        estimate = (waiting / self._threads + rows) * row_seconds
        handed = self._queued_rows + sum(batch.rows for batch in self._handed)
        at_most = (handed / self._threads + rows) * row_seconds
        if estimate > self._max_queue_s or at_most > left or len(self._queue) >= _MAX_QUEUED:
            raise Overloaded(estimate)

    def _dispatch(self, *, wait: bool = True) -> None:
        """Start what the free threads can take, and have as many full batches at hand for them. Without `wait`, batches
        that are not full are not held back."""
        while len(self._handed) < 2 * self._threads:
            if len(self._handed) >= self._threads and self._queued_rows < self._max_rows:
                break  # not a full batch, and looking through the queue costs something
            now = time.perf_counter()
            requests, full = self._front(now)
            if not requests or (len(self._handed) >= self._threads and not full):
                break
            left = requests[0].arrived + self._max_wait_s - now
            if wait and not full and self._last_was_joined and left > 0:
                if self._wait is None:
                    self._wait = asyncio.get_running_loop().call_later(left, self._waited)
                break
            if self._wait is not None:
                self._wait.cancel()
                self._wait = None
            for request in requests:
                self._unqueue(request)
            self._start(requests)

    def _front(self, now: float) -> tuple[list[_Request], bool]:
        """What would be run next, and whether nothing that may still come could be added to it."""
        requests: list[_Request] = []
        late: list[_Request] = []
        rows, full = 0, False
        for request in self._queue:
            if request.answer.done():  # its caller was cancelled, and takes it from the queue in a moment
                continue
            if request.deadline <= now:
                late.append(request)
                continue
            if requests and (rows + request.rows > self._max_rows or request.kind != requests[0].kind):
                full = True
                break
            requests.append(request)
            rows += request.rows
            if rows >= self._max_rows or request.alone:
                full = True
                break
        for request in late:
            self._expire(request)
        return requests, full

    def _waited(self) -> None:
        self._wait = None
        self._dispatch(wait=False)

    def _unqueue(self, request: _Request) -> None:
        del self._queue[request]
        self._queued_rows -= request.rows

    def _expire(self, request: _Request) -> None:
        if not request.answer.done():
            request.answer.set_exception(DeadlineExceeded())
            self._leave(request)

    def _leave(self, request: _Request) -> None:
        """Its caller waits no longer; does nothing for a request that has its answer."""
        if request in self._queue:
            self._unqueue(request)
        elif request.batch is not None:
            batch, request.batch = request.batch, None
            batch.waiting -= 1
            if not batch.waiting:
                batch.control.cancel()
                if batch.handed is not None and batch.handed.cancel():  # no thread had taken it
                    self._handed.remove(batch)
                    batch.requests = []  # the pool keeps the batch until a thread comes by
                    self._dispatch()

    # -- a run --------------------------------------------------------------------------------------------

    def _start(self, requests: list[_Request]) -> None:
        control = self._control()
        batch = _Batch(requests, sum(request.rows for request in requests), len(requests), control)
        for request in requests:
            request.batch = batch
        batch.handed = self._pool.submit(self._work, batch, control, asyncio.get_running_loop())
        self._handed.append(batch)
        self._last_was_joined = len(requests) > 1

    def _work(self, batch: _Batch, control: _Control, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: run the batch and hand the outcome to the event loop."""
        outcome: Outputs | ServingError
        seconds = 0.0
        try:
            first, *others = (request.inputs for request in batch.requests)
            inputs = self._collate([first, *others]) if others else first
            started = time.perf_counter()
            outcome = self._run(inputs, control)
            seconds = time.perf_counter() - started
            _check(outcome, batch.rows)
        except ServingError as error:
            outcome = error
        except BaseException as error:  # noqa: BLE001 - whatever it is, somebody waits for an answer
            outcome = ArmFailed("error", " ".join(str(error).split())[:300] or type(error).__name__)
            outcome.__cause__ = error
        loop.call_soon_threadsafe(self._finish, batch, outcome, seconds)
        del outcome  # as in `submit`

    def _finish(self, batch: _Batch, outcome: Outputs | ServingError, seconds: float) -> None:
        self._handed.remove(batch)
        # An error's frames may know the batch: from here on they lead to no request, and to no error again.
        requests, batch.requests = batch.requests, []
        for request in requests:
            request.batch = None
        if isinstance(outcome, ServingError):
            self._fail(requests, outcome)
            self._dispatch()
            return
        self._recent_seconds = _MEMORY * self._recent_seconds + seconds
        self._recent_rows = _MEMORY * self._recent_rows + batch.rows
        end = 0
        for request in requests:
            start, end = end, end + request.rows
            if not request.answer.done():
                own = tuple(output[start:end] for output in outcome)
                request.answer.set_result(Run(own, seconds * request.rows / batch.rows))
        self._dispatch()
        self._on_batch(batch.rows, len(requests), seconds)

    def _fail(self, requests: list[_Request], error: ServingError) -> None:
        """Tell the one request of the failure, or put each of several back to be run alone."""
        left = [request for request in requests if not request.answer.done()]
        if len(requests) == 1:
            for request in left:
                request.answer.set_exception(error)
            return
        log.info("a batch failed, each of its %d requests is run alone: %s", len(left), error)
        for request in reversed(left):
            request.alone = True
            self._queue[request] = None
            self._queue.move_to_end(request, last=False)
            self._queued_rows += request.rows


def _check(outputs: Outputs, rows: int) -> None:
    for number, output in enumerate(outputs):
        if not isinstance(output, np.ndarray) or not output.ndim or len(output) != rows:
            shape = list(getattr(output, "shape", ()))
            raise ArmFailed("invalid", f"output {number} of the model has shape {shape} for {rows} rows")
