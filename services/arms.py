"""The two arms: ONNX Runtime sessions in this process, output checks, and a breaker before the treatment.

Rule: a candidate never costs a user a request. The treatment runs under a deadline; whatever it does wrong
becomes `ArmFailed`, and the engine lets control answer the same request.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from services.batching import Batcher
from services.errors import ArmFailed
from services.signature import Signature
from services.watchdog import Watchdog

if TYPE_CHECKING:
    from compression.variant import Variant
    from compression.workload import Predictions, Tensors, Workload

log = logging.getLogger("trimtab.gateway")

__all__ = ["Breaker", "Model", "Outputs", "Pool", "load_model"]

Outputs = tuple[np.ndarray, ...]
"""A model's outputs in the order of its signature; the first axis of each is records."""

# Requests that should take less than this are run on the event loop: the hop to a thread and back costs more.
_INLINE_SECONDS = 0.001
# A run on the event loop that takes this long is ended, and run again in a thread: everybody waits for it.
_INLINE_LIMIT_SECONDS = 0.05
# So many more runs that took twice as long as they should than runs that did not, and a model leaves the event loop.
_SLOW_RUNS = 20
# How long it stays away; twice as long each time, as it may have been the machine and may have been the model.
_AWAY_SECONDS, _MAX_AWAY_SECONDS = 10.0, 600.0
# Up to so many numbers are added up faster by Python than by NumPy.
_FEW = 64
_WATCHDOG = Watchdog()
_OF_THE_INPUT = ("InvalidArgument", "Fail", "RuntimeException")


@dataclass(frozen=True, slots=True)
class Pool:
    """How models that are not run on the event loop are run.

    Attributes:
        threads: runs at once, for each model and worker.
        max_queue_s: requests that would wait longer for their turn are refused.
        on_batch: called with a model's name and the numbers of records and requests of each run.
    """

    threads: int = 2
    max_queue_s: float = 1.0
    on_batch: Callable[[str, int, int], None] = lambda _name, _rows, _requests: None


@dataclass
class Breaker:
    """Skips the treatment for a while after failures in a row, so that a hanging candidate costs no waiting.

    One instance per worker and variant; used from the event loop only. After `cooldown` seconds one request
    is let through as a probe; a failed probe opens it again. `failures` are those in a row, `probing` is
    whether a probe is under way.
    """

    threshold: int = 5
    cooldown: float = 5.0
    clock: Callable[[], float] = time.monotonic
    failures: int = 0
    _open_until: float | None = None
    probing: bool = False

    def allow(self) -> bool:
        """Whether the treatment may be tried now."""
        if self._open_until is None:
            return True
        if self.clock() < self._open_until or self.probing:
            return False
        self.probing = True
        return True

    def released(self) -> None:
        """What was allowed came to nothing: neither a success nor a failure."""
        self.probing = False

    def succeeded(self) -> None:
        self.failures, self._open_until, self.probing = 0, None, False

    def failed(self) -> None:
        self.failures += 1
        if self.probing or self.failures >= self.threshold:
            self._open_until = self.clock() + self.cooldown
            self.probing = False


class _Control:
    """Ends a run that is under way in another thread."""

    __slots__ = ("options",)

    def __init__(self) -> None:
        import onnxruntime

        self.options = onnxruntime.RunOptions()

    def cancel(self) -> None:
        self.options.terminate = True


@dataclass
class Model:
    """One variant, loaded and warm.

    Attributes:
        inline_rows: requests of at most so many records are run on the event loop; 0 for none.
        batch_rows: at most so many records of several requests are run together; 1 for a model whose answers depend
            on what they are batched with.
    """

    tag: str
    name: str
    session: Any
    workload: Workload
    signature: Signature
    inline_rows: int = 0
    batch_rows: int = 1
    pool: Pool = field(default_factory=Pool)
    breaker: Breaker = field(default_factory=Breaker)
    clock: Callable[[], float] = time.monotonic
    _slow: int = 0
    # Of all runs on the event loop, one at a time; another one is made when a run was ended by it.
    _inline_options: Any = None
    _away_for: float = _AWAY_SECONDS
    _back_at: float = float("inf")
    _inline_rows: int = 0
    _batcher: Batcher | None = None

    def __post_init__(self) -> None:
        self._names = [spec.name for spec in self.signature.outputs]
        self._shapes = [spec.shape for spec in self.signature.outputs]

    def run(self, inputs: Mapping[str, np.ndarray], rows: int, options: Any = None) -> Outputs:
        """Run the model in this thread and check what comes out.

        Args:
            inputs: tensors that fit the signature.
            rows: their number of records.
            options: an `onnxruntime.RunOptions`, by which another thread may end the run.

        Raises:
            ArmFailed: the run failed, or its outputs are not finite, one row for each record.
        """
        outputs = self._run(inputs, options)
        self.check(outputs, rows)
        return outputs

    def _run(self, inputs: Mapping[str, np.ndarray], options: Any) -> Outputs:
        try:
            return tuple(self.session.run(self._names, inputs, options))
        except Exception as error:  # onnxruntime raises many types, none of them public
            # By name, as nobody can import them. These come of inputs that do not fit the graph, or each other.
            kind = "refused" if type(error).__name__ in _OF_THE_INPUT else "error"
            raise ArmFailed(kind, f"{self.name}: {_one_line(error)}") from error

    def check(self, outputs: Outputs, rows: int) -> None:
        """Raise ArmFailed (`invalid`) unless each output has the declared shape, a row for each record, and no NaN or
        infinity."""
        for name, declared, value in zip(self._names, self._shapes, outputs, strict=True):
            shape = getattr(value, "shape", ())
            if not shape or shape[0] != rows or not _fits(shape, declared):
                raise ArmFailed(
                    "invalid", f"{self.name}: output {name!r} has shape {list(shape)} for {rows} records"
                )
            if value.dtype.kind == "f" and not _finite(value):
                raise ArmFailed("invalid", f"{self.name}: output {name!r} has NaN or infinite values")

    def decode(self, outputs: Outputs) -> Predictions:
        """The workload's reading of the outputs.

        Raises:
            ArmFailed: it is not one finite prediction per record.
        """
        try:
            predictions = self.workload.decode(dict(zip(self._names, outputs, strict=True)))
            problem = _problem(predictions, len(outputs[0]), len(self.workload.classes))
        except Exception as error:  # decode is the user's code
            raise ArmFailed("invalid", f"{self.name}: decode failed: {_one_line(error)}") from error
        if problem is not None:
            raise ArmFailed("invalid", f"{self.name}: {problem}")
        return predictions

    def run_inline(self, inputs: Mapping[str, np.ndarray], rows: int) -> tuple[Outputs, float]:
        """Run on the event loop; returns the outputs and the seconds it took.

        Raises:
            ArmFailed: as `run`; of kind `timeout` when it took too long for the event loop and was ended. The model
                is then run in threads for a while, and this request may be run again there.
        """
        options = self._inline_options
        if options is None:
            options = self._inline_options = _Control().options
        _WATCHDOG.watch(options, _INLINE_LIMIT_SECONDS)
        started = time.perf_counter()
        try:
            outputs = self._run(inputs, options)
        except ArmFailed:
            if options.terminate:
                self._inline_options = None
                self._leave_event_loop()
                raise ArmFailed("timeout", f"{self.name}: too slow for the event loop") from None
            raise
        finally:
            seconds = time.perf_counter() - started
            _WATCHDOG.forget(options)
        if options.terminate:  # it was told to end too late; the next run must not be
            self._inline_options = None
            self._leave_event_loop()
        elif seconds > 2 * _INLINE_SECONDS:
            self._slow += 1
            if self._slow >= _SLOW_RUNS:
                self._leave_event_loop()
        elif self._slow:
            self._slow -= 1
        self.check(outputs, rows)
        return outputs, seconds

    def _leave_event_loop(self) -> None:
        self._inline_rows, self.inline_rows, self._slow = self.inline_rows, 0, 0
        self._back_at = self.clock() + self._away_for
        self._away_for = min(2 * self._away_for, _MAX_AWAY_SECONDS)
        log.warning("%s: too slow for the event loop, run in threads for a while", self.name)

    def _perhaps_come_back(self) -> None:
        if self.clock() >= self._back_at:
            self.inline_rows, self._back_at = self._inline_rows, float("inf")

    async def run_pooled(self, inputs: Tensors, rows: int, deadline: float) -> tuple[Outputs, float]:
        """Run in a thread, perhaps together with other requests; returns this request's outputs and its share of the
        seconds.

        Args:
            deadline: on the clock of `time.perf_counter`.

        Raises:
            ArmFailed: as `run`.
            Overloaded: too many requests wait already.
            DeadlineExceeded: the deadline passed first; a run that nobody waits for any more is told to end.
        """
        self._perhaps_come_back()
        if self._batcher is None:
            name, on_batch = self.name, self.pool.on_batch
            self._batcher = Batcher(
                lambda tensors, control: self._run(tensors, control.options),
                control=_Control,
                threads=self.pool.threads,
                max_rows=self.batch_rows,
                max_wait_s=self.workload.serving.max_wait_ms / 1000.0,
                collate=self.workload.collate,
                max_queue_s=self.pool.max_queue_s,
                on_batch=lambda rows, requests, _seconds: on_batch(name, rows, requests),
            )
        run = await self._batcher.submit(inputs, rows, deadline)
        self.check(run.outputs, rows)
        return run.outputs, run.seconds

    def run_within(self, inputs: Mapping[str, np.ndarray], rows: int, seconds: float) -> Predictions:
        """Run and decode in a thread that may wait; a run that takes longer than `seconds` is told to end.

        Raises:
            ArmFailed: as `run` and `decode`.
        """
        options = _Control().options
        _WATCHDOG.watch(options, seconds)
        try:
            outputs = self.run(inputs, rows, options)
        finally:
            _WATCHDOG.forget(options)
        return self.decode(outputs)


def load_model(
    variant: Variant,
    workload: Workload,
    sample: Sequence[Mapping[str, object]] = (),
    pool: Pool | None = None,
) -> Model:
    """Make a session from the variant's verified bytes and warm it up.

    One intra-op thread: a worker is the unit of parallelism, and sessions that spin on each other's cores are
    what makes p99 bad. `sample` records, if any, are run once; without them zeros of the model's own
    input shapes are used.

    Raises:
        compression.errors.CompressionError: the file does not match its manifest.
        ArmFailed: the session cannot be made, or its warm-up run fails.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    content = variant.onnx_bytes()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ArmFailed("error", f"{variant.name} does not load: {_one_line(error)}") from error
    try:
        signature = Signature.of(session)
    except KeyError as error:
        raise ArmFailed("invalid", f"{variant.name}: no request can carry its type {error}") from None
    model = Model(variant.tag, variant.name, session, workload, signature, pool=pool or Pool())
    inputs = workload.encode(sample) if sample else _zeros(signature)
    rows = len(next(iter(inputs.values())))
    seconds = math.inf
    for _ in range(3):
        started = time.perf_counter()
        outputs = model.run(inputs, rows)
        seconds = min(seconds, time.perf_counter() - started)
    for output in outputs:
        output.flags.writeable = (
            False  # decode must not work in place: what is cached or mirrored is read again
        )
    model.decode(outputs)
    # Where axes are free the time depends on more than the number of records, and was taken with the smallest.
    if all(size > 0 for spec in signature.inputs for size in spec.shape[1:]):
        model.inline_rows = int(_INLINE_SECONDS * rows / seconds)
    card = variant.scorecard()
    if card is not None and card.batch_sensitivity == 0:
        model.batch_rows = workload.serving.max_batch
    return model


def _fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    """Whether all axes but the first are as declared; ONNX Runtime does not hold a model to what it declares."""
    if shape[1:] == declared[1:]:
        return True
    return len(shape) == len(declared) and all(
        size == want or want < 0 for size, want in zip(shape[1:], declared[1:], strict=True)
    )


def _finite(value: np.ndarray) -> bool:
    """Whether all numbers are finite. A sum is not where one of them is not, and is much cheaper to look at; that it
    may overflow is why all of them are looked at then."""
    if value.size <= _FEW and math.isfinite(sum(value.ravel().tolist())):
        return True
    return bool(np.isfinite(value).all())


def _zeros(signature: Signature) -> dict[str, np.ndarray]:
    """One record of zeros in the shape the model declares; a free axis becomes 1."""
    return {
        spec.name: np.full([size if size > 0 else 1 for size in spec.shape], "", spec.dtype)
        if spec.datatype == "BYTES"
        else np.zeros([size if size > 0 else 1 for size in spec.shape], spec.dtype)
        for spec in signature.inputs
    }


def _problem(predictions: Predictions, rows: int, number_of_classes: int) -> str | None:
    """Why these are not one finite prediction per record, or None."""
    classes, confidences = predictions.classes, predictions.confidences
    if classes.shape != (rows,) or confidences.shape != (rows,):
        return f"{classes.shape} classes and {confidences.shape} confidences for {rows} records"
    if classes.dtype.kind not in "iu":
        return f"classes are {classes.dtype}, not integers"
    if rows and (int(classes.min()) < 0 or int(classes.max()) >= number_of_classes):
        return "a predicted class is out of range"
    if not np.isfinite(confidences).all():
        return "a confidence is NaN or infinite"
    return None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
