"""The data plane's engine: assign, infer, fall back, count, and offer a sample to the mirror.

Whatever door a request came through, it is answered here, in this process, without the ledger or another service. A
request that small models can answer is answered within one call; only what has to wait becomes a coroutine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import orjson

from services.arms import Model, Outputs
from services.batching import DeadlineExceeded, Overloaded
from services.cache import AnswerCache
from services.control.auth import RequestIds
from services.counters import ArmCounts, Counters
from services.errors import ArmFailed, BadRequest, NotFound, ServingError
from services.routing import CONTROL, TREATMENT, Arm, assign, is_sampled
from services.samples import packed

if TYPE_CHECKING:
    from compression.workload import Predictions, Tensors, Workload
    from services.live import Live, LiveState
    from services.settings import Settings

__all__ = ["Engine", "Served", "Statistics"]

log = logging.getLogger("trimtab.gateway")

_MAX_KEY_CHARS = 256
# What control is left of a request's time when the treatment has used up its own.
_CONTROL_SHARE = 0.5


class Queue(Protocol):
    """Where samples go; `services.mirror.Mirror` in production."""

    def offer(self, sample: bytes) -> bool:
        """Queue a sample; False when it was shed. Never waits."""
        ...


@dataclass(slots=True)
class Statistics:
    """What a loaded variant has done in this worker since it started. Seconds."""

    requests: int = 0
    request_seconds: float = 0.0
    failures: int = 0
    failure_seconds: float = 0.0
    runs: int = 0
    run_seconds: float = 0.0
    rows: int = 0
    last_at: float = 0.0
    batches: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Call:
    """One request on its way through the engine."""

    live: Live
    request_id: str
    arm: Arm
    model: Model
    inputs: Tensors
    rows: int
    counts: ArmCounts
    started: float
    deadline: float
    pinned: bool
    decode: bool
    records: Sequence[Mapping[str, Any]] | None
    groups: Sequence[Mapping[str, str]] | None
    cache_key: bytes | None = None
    treatment_failed: bool = False
    error: ArmFailed | None = None


@dataclass(slots=True)
class Served:
    """What one request got, and from whom.

    Attributes:
        arm: who answered; a treatment that failed was answered by control.
        outputs: in the order of the model's signature; the first axis counts records.
        predictions: the workload's reading of them, for requests of records.
    """

    request_id: str
    model: Model
    arm: Arm
    outputs: Outputs
    predictions: Predictions | None
    call: Any


class Engine:
    """Answers requests from the arms of `state.live`. One per worker, used from its event loop only.

    Attributes:
        arrived: `time.perf_counter` when the request that is being taken came in; its door sets it.
    """

    def __init__(
        self,
        settings: Settings,
        workload: Workload,
        state: LiveState,
        request_ids: RequestIds,
        metrics: ModuleType,
        mirror: Queue,
    ) -> None:
        self.workload = workload
        self.counters = Counters(metrics, state)
        self.arrived = 0.0
        self._settings = settings
        self._state = state
        self._request_ids = request_ids
        self._metrics = metrics
        self._mirror = mirror
        self._statistics: dict[str, Statistics] = {}
        serving = workload.serving
        self._cache = (
            AnswerCache(serving.cache_max_bytes, serving.cache_ttl_s) if serving.cache_ttl_s > 0 else None
        )

    @property
    def live(self) -> Live:
        """The arms and the split as they are now."""
        return self._state.live

    def models(self) -> list[Model]:
        """The loaded variants: control first."""
        live = self._state.live
        return [live.control] if live.treatment is None else [live.control, live.treatment]

    def statistics(self, name: str) -> Statistics:
        """What a variant has done in this worker."""
        return self._statistics.setdefault(name, Statistics())

    def count_batch(self, name: str, rows: int) -> None:
        """Count a run in a thread."""
        batches = self.statistics(name).batches
        batches[rows] = batches.get(rows, 0) + 1

    def reject(self, _error: ServingError) -> None:
        """Count a request that was not valid."""
        self.counters.rejected += 1

    # -- answering ------------------------------------------------------------------------------------------

    def answer(
        self,
        headers: Mapping[bytes, bytes],
        inputs: Tensors,
        rows: int,
        *,
        supplied_id: str | None = None,
        version: str | None = None,
        records: Sequence[Mapping[str, Any]] | None = None,
        groups: Sequence[Mapping[str, str]] | None = None,
        timeout: float | None = None,
    ) -> Served | Coroutine[Any, Any, Served]:
        """Answer a request; at once where the models are small enough.

        Args:
            headers: `x-assignment-key` and `x-request-id` are looked at.
            inputs: tensors that fit the signature; `rows` is their number of records.
            supplied_id: the client's id, instead of the header's.
            version: the loaded variant that is to answer, without assignment, fallback or evidence.
            records: what the tensors were made of; the answer then has predictions.
            groups: for requests without records, the groups of each one, or of all.
            timeout: seconds that the client will wait.

        Raises:
            BadRequest: an id or a key that cannot be used, or an input that full precision does not take either.
            NotFound: no such variant is loaded.
            ArmFailed: control failed too.
            Overloaded: too many requests wait already.
            DeadlineExceeded: there was not enough time.
        """
        call = self._call(headers, inputs, rows, supplied_id, version, records, groups, timeout)
        model = call.model
        if self._cache is not None and not call.pinned:
            cached = self._cached(call)
            if cached is not None:
                return self._served(call, model, call.arm, *cached)
        if rows > model.inline_rows or rows > call.live.control.inline_rows:
            return self._answer_in_threads(call)
        try:
            return self._answer_inline(call)
        except _TooSlow:
            return self._answer_in_threads(call)
        except ArmFailed as error:
            raise self._no_answer(call, error) from None

    def _call(
        self,
        headers: Mapping[bytes, bytes],
        inputs: Tensors,
        rows: int,
        supplied_id: str | None,
        version: str | None,
        records: Sequence[Mapping[str, Any]] | None,
        groups: Sequence[Mapping[str, str]] | None,
        timeout: float | None,
    ) -> _Call:
        counters, live = self.counters, self._state.live
        if live is not counters.live:
            self._turn(live)
        if supplied_id is None:
            header = headers.get(b"x-request-id")
            supplied_id = None if header is None else header.decode("latin-1")
        key, request_id = self._request_ids.issue(supplied_id)
        assignment = headers.get(b"x-assignment-key")
        if assignment:
            key = assignment.decode("latin-1")
            if len(key) > _MAX_KEY_CHARS:
                raise BadRequest(f"X-Assignment-Key is over {_MAX_KEY_CHARS} characters")
        arm: Arm = CONTROL
        model, counts = live.control, counters.control
        treatment = live.treatment
        if version is not None:
            if treatment is not None and version == treatment.name:
                arm, model = TREATMENT, treatment
            elif version != model.name:
                raise NotFound(f"no variant {version[:100]!r} is loaded")
            counts = counters.pinned(model.name, arm)
        elif treatment is not None and counters.treatment is not None:
            arm = assign(key, live.route.rollout_id, live.route.weight)
            if arm is TREATMENT:
                model, counts = treatment, counters.treatment
        limit = self._settings.request_deadline
        if timeout is not None and timeout < limit:
            limit = timeout
        return _Call(
            live, request_id, arm, model, inputs, rows, counts, self.arrived, self.arrived + limit,
            version is not None, records is not None, records, groups,
        )  # fmt: skip

    def _turn(self, live: Live) -> None:
        """Another view of the world: what was counted goes to the old one, and no cached answer outlives it."""
        before = self.counters.live.route
        self.counters.begin(live)
        now = live.route
        if self._cache is not None and (before.rollout_id, before.state, before.weight, before.treatment) != (
            now.rollout_id, now.state, now.weight, now.treatment,
        ):  # fmt: skip
            self._cache.clear()
            self._metrics.CACHE_BYTES.set(0)

    # -- on the event loop ----------------------------------------------------------------------------------

    def _answer_inline(self, call: _Call) -> Served:
        if call.arm is TREATMENT and self._may_try(call):
            try:
                outputs, seconds = self._run_inline(call.model, call.inputs, call.rows)
                predictions = self._after_treatment(call, outputs, seconds)
            except _TooSlow:
                call.model.breaker.released()
                raise
            except ArmFailed as error:
                self._treatment_failed(call, error)
            else:
                low = self._low(call, predictions)
                if low is not None:
                    control = call.live.control
                    subset = {name: value[low] for name, value in call.inputs.items()}
                    try:
                        more, seconds = self._run_inline(control, subset, int(low.sum()))
                    except ArmFailed as error:
                        self._escalation_failed(error)
                    else:
                        outputs, predictions = self._merged(call, outputs, low, more, seconds)
                return self._served(call, call.model, TREATMENT, outputs, predictions)
        control = call.live.control
        outputs, seconds = self._run_inline(control, call.inputs, call.rows)
        predictions = control.decode(outputs) if call.decode else None
        self._count_run(self._control_counts(call), seconds, call.rows)
        return self._served(call, control, CONTROL, outputs, predictions)

    def _run_inline(self, model: Model, inputs: Tensors, rows: int) -> tuple[Outputs, float]:
        try:
            return model.run_inline(inputs, rows)
        except ArmFailed as error:
            if error.kind == "timeout":
                raise _TooSlow from None
            raise

    # -- in threads -----------------------------------------------------------------------------------------

    async def _answer_in_threads(self, call: _Call) -> Served:
        try:
            return await self._in_threads(call)
        except Overloaded:
            call.counts.shed += 1
            raise
        except (ArmFailed, DeadlineExceeded) as error:
            raise self._no_answer(call, error) from None

    async def _in_threads(self, call: _Call) -> Served:
        control = call.live.control
        if call.arm is TREATMENT and self._may_try(call):
            now = time.perf_counter()
            limit = min(now + self._settings.treatment_deadline, now + (call.deadline - now) * _CONTROL_SHARE)
            try:
                outputs, seconds = await _timed(call.model, call.inputs, call.rows, limit)
                predictions = self._after_treatment(call, outputs, seconds)
            except ArmFailed as error:
                self._treatment_failed(call, error)
            except BaseException:  # whoever asked has gone: that says nothing about the candidate
                call.model.breaker.released()
                raise
            else:
                low = self._low(call, predictions)
                if low is not None:
                    subset = {name: value[low] for name, value in call.inputs.items()}
                    try:
                        more, seconds = await _timed(control, subset, int(low.sum()), call.deadline)
                    except (ArmFailed, Overloaded) as error:
                        self._escalation_failed(error)
                    else:
                        outputs, predictions = self._merged(call, outputs, low, more, seconds)
                return self._served(call, call.model, TREATMENT, outputs, predictions)
        outputs, seconds = await control.run_pooled(call.inputs, call.rows, call.deadline)
        predictions = control.decode(outputs) if call.decode else None
        self._count_run(self._control_counts(call), seconds, call.rows)
        return self._served(call, control, CONTROL, outputs, predictions)

    # -- the treatment --------------------------------------------------------------------------------------

    def _may_try(self, call: _Call) -> bool:
        if call.pinned or call.model.breaker.allow():
            return True
        # Not counted as an error of its own: the requests that opened the breaker were.
        call.treatment_failed = True
        self._metrics.FALLBACKS.labels(call.model.name, "breaker").inc()
        return False

    def _after_treatment(self, call: _Call, outputs: Outputs, seconds: float) -> Predictions | None:
        """Read what came out, where somebody needs that, and count it as an answer."""
        needed = call.decode or call.live.route.cascade_threshold is not None
        predictions = call.model.decode(outputs) if needed else None
        self._count_run(call.counts, seconds, call.rows)
        if not call.pinned:
            call.model.breaker.succeeded()
            call.counts.tried += 1
        return predictions

    def _treatment_failed(self, call: _Call, error: ArmFailed) -> None:
        """Note it, for control to answer; raises it again where nobody else may."""
        if call.pinned:
            raise error
        if error.kind == "overloaded":  # a busy machine is not the candidate's fault
            call.model.breaker.released()
            self._metrics.FALLBACKS.labels(call.model.name, error.kind).inc()
        else:
            call.error = error

    def _blame(self, call: _Call) -> None:
        """The treatment failed, and it was not the input's fault."""
        if call.error is None:
            return
        call.treatment_failed = True
        call.model.breaker.failed()
        call.counts.tried += 1
        call.counts.errors += 1
        self._metrics.FALLBACKS.labels(call.model.name, call.error.kind).inc()

    # -- the cascade ----------------------------------------------------------------------------------------

    def _low(self, call: _Call, predictions: Predictions | None) -> np.ndarray | None:
        """Which records are for control to answer, or None for none of them."""
        threshold = call.live.route.cascade_threshold
        if threshold is None or predictions is None or call.pinned:
            return None
        low = ~(predictions.confidences >= threshold)  # one that is not a number is not sure of anything
        number = int(low.sum())
        call.counts.escalated += number
        call.counts.kept += call.rows - number
        return low if number else None

    def _escalation_failed(self, error: ServingError) -> None:
        # What the candidate said stands: less sure than it should be, but an answer.
        log.warning("a record could not be escalated: %s", error)
        self._metrics.FALLBACKS.labels(self._state.live.control.name, "escalation").inc()

    def _merged(
        self, call: _Call, outputs: Outputs, low: np.ndarray, more: Outputs, seconds: float
    ) -> tuple[Outputs, Predictions | None]:
        self._count_run(self.counters.control, seconds, len(more[0]))
        merged = []
        for ours, theirs in zip(outputs, more, strict=True):
            both = ours.copy()
            both[low] = theirs
            merged.append(both)
        return tuple(merged), call.model.decode(tuple(merged)) if call.decode else None

    # -- the end of a request -------------------------------------------------------------------------------

    def _cached(self, call: _Call) -> tuple[Outputs, Predictions | None] | None:
        assert self._cache is not None
        call.cache_key = self._cache.key(call.inputs)
        outputs = self._cache.get(call.model.tag, call.cache_key)
        if outputs is None:
            call.counts.misses += 1
            return None
        call.counts.hits += 1
        return outputs, call.model.decode(outputs) if call.decode else None

    def _served(
        self, call: _Call, model: Model, arm: Arm, outputs: Outputs, predictions: Predictions | None
    ) -> Served:
        seconds = time.perf_counter() - call.started
        self._blame(call)
        # What a failing candidate made a user wait is the candidate's latency, whoever answered in the end.
        call.counts.latencies.append(seconds)
        statistics = self.statistics(model.name)
        statistics.requests += 1
        statistics.request_seconds += seconds
        statistics.last_at = time.time()
        if call.cache_key is not None and model is call.model and self._cache is not None:
            self._cache.put(model.tag, call.cache_key, outputs)
            self._metrics.CACHE_BYTES.set(self._cache.bytes)
        return Served(call.request_id, model, arm, outputs, predictions, call)

    def _no_answer(self, call: _Call, error: ServingError) -> ServingError:
        """Count a request that nobody could answer; returns what the client is told."""
        if isinstance(error, ArmFailed) and error.kind == "refused":
            # Full precision does not take it either, so it is the client's; nobody is to blame.
            if call.error is not None:
                call.model.breaker.released()
            return BadRequest(f"the model does not take this input: {error}")
        self._blame(call)
        log.error("no answer: %s", error)  # the message says it all
        call.counts.failed += 1
        statistics = self.statistics(call.model.name)
        statistics.failures += 1
        statistics.failure_seconds += time.perf_counter() - call.started
        return error

    def _control_counts(self, call: _Call) -> ArmCounts:
        return call.counts if call.arm is CONTROL else self.counters.control

    def _count_run(self, counts: ArmCounts, seconds: float, rows: int) -> None:
        counts.runs.append(seconds)
        counts.rows += rows
        statistics = self.statistics(counts.name)
        statistics.runs += 1
        statistics.run_seconds += seconds
        statistics.rows += rows

    # -- the mirror -----------------------------------------------------------------------------------------

    def mirror_after(self, served: Served) -> Callable[[], None] | None:
        """What is to be done once the reply is on its way, or None for a request that is not sampled."""
        call = served.call
        route = call.live.route
        if (
            route.rollout_id is None
            or route.treatment is None
            or call.pinned
            or not is_sampled(call.request_id, route.rollout_id, route.mirror_rate)
        ):
            return None
        return lambda: self._offer(served)

    def _offer(self, served: Served) -> None:
        call: _Call = served.call
        sample: dict[str, Any] = {
            "rollout_id": call.live.route.rollout_id,
            "request_id": call.request_id,
            "arm": served.arm,
            "treatment_failed": call.treatment_failed,
            "judged": self._request_ids.draw(call.request_id, call.rows),
            "at": time.time(),
        }
        if call.records is not None:
            sample["records"] = call.records
        else:
            sample["tensors"] = packed(call.inputs)
            sample["groups"] = call.groups
        try:
            predictions = served.predictions or served.model.decode(served.outputs)
            sample["classes"] = predictions.classes.tolist()
            sample["confidences"] = predictions.confidences.tolist()
            self._mirror.offer(orjson.dumps(sample))
        except (ArmFailed, TypeError) as error:
            # A field that the workload ignores may hold what JSON allows and orjson does not, such as 10**30.
            log.warning("a sample was not mirrored: %s", error)
            self._metrics.SHADOW_SHED.labels("failed").inc()


class _TooSlow(Exception):
    """A run on the event loop was ended; the request has to be answered in threads."""


async def _timed(model: Model, inputs: Tensors, rows: int, deadline: float) -> tuple[Outputs, float]:
    """Run in a thread; that time ran out, or that too many wait, becomes a failure of the arm like any other."""
    try:
        return await model.run_pooled(inputs, rows, deadline)
    except DeadlineExceeded:
        raise ArmFailed("timeout", f"{model.name}: no answer in time") from None
    except Overloaded as error:
        raise ArmFailed("overloaded", f"{model.name}: {error}") from None
