"""The two arms: ONNX Runtime sessions in this process, output checks, and a breaker before the treatment.

Rule: a candidate never costs a user a request. The treatment runs under a deadline; whatever it does wrong
becomes `ArmFailed`, and the caller lets control answer the same request.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from services.errors import ArmFailed

if TYPE_CHECKING:
    from compression.variant import Variant
    from compression.workload import Predictions, Workload

__all__ = ["Answer", "Breaker", "Model", "load_model"]

# A control model whose warm-up run takes less than this is run on the event loop: the hop to a thread and
# back costs more than the run.
_INLINE_SECONDS = 0.001
_POOL_THREADS = 4


@dataclass(frozen=True, slots=True)
class Answer:
    """One arm's predictions for a request's records, and the seconds its model took."""

    predictions: Predictions
    model_seconds: float


@dataclass
class Breaker:
    """Skips the treatment for a while after failures in a row, so that a hanging candidate costs no waiting.

    One instance per worker and variant; used from the event loop only. After `cooldown` seconds one request
    is let through as a probe; a failed probe opens it again.
    """

    threshold: int = 5
    cooldown: float = 5.0
    clock: Callable[[], float] = time.monotonic
    trips: int = 0
    _failures: int = 0
    _open_until: float | None = None
    _probing: bool = False

    def allow(self) -> bool:
        """Whether the treatment may be tried now."""
        if self._open_until is None:
            return True
        if self.clock() < self._open_until or self._probing:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        self._failures, self._open_until, self._probing = 0, None, False

    def failed(self) -> None:
        self._failures += 1
        if self._probing or self._failures >= self.threshold:
            self._open_until = self.clock() + self.cooldown
            self._probing = False
            self.trips += 1


@dataclass
class Model:
    """One variant, loaded and warm."""

    tag: str
    name: str
    session: Any
    workload: Workload
    inline: bool
    breaker: Breaker = field(default_factory=Breaker)
    # Never shut down: requests that took this model before another replaced it still run here. The threads end
    # when the last of them has let go of the model.
    _pool: ThreadPoolExecutor | None = None

    def run(self, inputs: Mapping[str, np.ndarray], run_options: Any = None) -> Answer:
        """Run the model in this thread and decode its outputs.

        Args:
            inputs: the workload's tensors, first axis = records.
            run_options: an `onnxruntime.RunOptions`, by which another thread may end the run.

        Raises:
            ArmFailed: the run failed, or its output is not one finite prediction per record.
        """
        rows = len(next(iter(inputs.values())))
        started = time.perf_counter()
        try:
            outputs = self.session.run(None, dict(inputs), run_options)
        except Exception as error:  # onnxruntime raises many types, none of them public
            raise ArmFailed("error", f"{self.name}: {_one_line(error)}") from error
        seconds = time.perf_counter() - started
        named = {node.name: value for node, value in zip(self.session.get_outputs(), outputs, strict=True)}
        for name, value in named.items():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
                raise ArmFailed("invalid", f"{self.name}: output {name!r} has NaN or infinite values")
        try:
            predictions = self.workload.decode(named)
            problem = _problem(predictions, rows, len(self.workload.classes))
        except Exception as error:  # decode is the user's code
            raise ArmFailed("invalid", f"{self.name}: decode failed: {_one_line(error)}") from error
        if problem is not None:
            raise ArmFailed("invalid", f"{self.name}: {problem}")
        return Answer(predictions, seconds)

    def run_within(self, inputs: Mapping[str, np.ndarray], seconds: float) -> Answer:
        """As `run`, and a run that takes longer than `seconds` is told to end; for a thread that may wait."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        timer = threading.Timer(seconds, setattr, (options, "terminate", True))
        timer.daemon = True
        timer.start()
        try:
            return self.run(inputs, options)
        finally:
            timer.cancel()

    async def infer(self, inputs: Mapping[str, np.ndarray], deadline: float | None = None) -> Answer:
        """Run off or on the event loop, within `deadline` seconds if one is given.

        Raises:
            ArmFailed: as `run`, or kind `timeout` when the deadline passed; the run is then told to end.
        """
        if deadline is None and self.inline:
            return self.run(inputs)
        import onnxruntime

        options = onnxruntime.RunOptions()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_POOL_THREADS, thread_name_prefix=f"arm-{self.name}")
        future = asyncio.get_running_loop().run_in_executor(self._pool, self.run, inputs, options)
        try:
            return await asyncio.wait_for(future, deadline)
        except TimeoutError:
            options.terminate = True
            raise ArmFailed("timeout", f"{self.name}: no answer in {deadline:g} s") from None


def load_model(variant: Variant, workload: Workload, sample: Sequence[Mapping[str, object]] = ()) -> Model:
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
        raise ArmFailed("error", f"{variant.tag} does not load: {_one_line(error)}") from error
    model = Model(variant.tag, variant.name, session, workload, inline=False)
    inputs = workload.encode(sample) if sample else _zeros(session)
    seconds = min(model.run(inputs).model_seconds for _ in range(3))
    model.inline = seconds < _INLINE_SECONDS
    return model


_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.str_,
}


def _zeros(session: Any) -> dict[str, np.ndarray]:
    """One record of zeros in the shape the model declares; a free axis becomes 1."""
    return {
        node.name: np.zeros(
            [size if isinstance(size, int) and size > 0 else 1 for size in node.shape], _DTYPES[node.type]
        )
        for node in session.get_inputs()
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
