"""The data plane's engine: assign, infer, fall back, count, and offer a sample to the mirror.

Whatever door a request came through, it is answered here, in this process, without the ledger or another service. A
request that small models can answer is answered within one call; only what has to wait becomes a coroutine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import orjson

from services.arms import Model, Outputs
from services.batching import DeadlineExceeded, Overloaded
from services.cache import AnswerCache
from services.control.auth import RequestIds
from services.counters import ArmCounts, Counters, Statistics
from services.errors import ArmFailed, BadRequest, NotFound, ServingError
from services.routing import CONTROL, TREATMENT, Arm, assign, is_sampled
from services.samples import packed

if TYPE_CHECKING:
    from compression.workload import Predictions, Tensors, Workload
    from services.live import Live, LiveState
    from services.settings import Settings

__all__ = ["Engine", "Served"]

log = logging.getLogger("trimtab.gateway")

_MAX_KEY_CHARS = 256
# What control is left of a request's time when the treatment has used up its own.
_CONTROL_SHARE = 0.5


class Queue(Protocol):
    """Where samples go; `services.mirror.Mirror` in production."""

    def wants(self) -> bool:
        """Whether to make a sample at all."""
        ...

    def offer(self, sample: bytes) -> bool:
        """Queue a sample; False when it was shed. Never waits."""
        ...


class Served:
    """One request on its way through the engine and, at the end, what it got and from whom.

    A plain class with defaults, not a dataclass: one is made for each request, and most of it stays as it is.

    Attributes:
        arm: who it was assigned to, and then who answered; a treatment that failed was answered by control.
        model: the same.
        outputs: in the order of the model's signature; the first axis counts records.
        predictions: the workload's reading of them, for requests of records.
    """

    outputs: Outputs = ()
    predictions: Predictions | None = None
    records: Sequence[Mapping[str, Any]] | None = None
    groups: Sequence[Mapping[str, str]] | None = None
    timeout: float | None = None
    pinned = False
    cache_key: bytes | None = None
    treatment_failed = False
    error: ArmFailed | None = None

    def __init__(
        self,
        live: Live,
        request_id: str,
        arm: Arm,
        model: Model,
        counts: ArmCounts,
        inputs: Tensors,
        rows: int,
        started: float,
    ) -> None:
        self.live = live
        self.request_id = request_id
        self.arm = arm
        self.model = model
        self.counts = counts
        self.inputs = inputs
        self.rows = rows
        self.started = started


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
        """What a variant has done in this worker since it started."""
        self.counters.fold()
        return self.counters.statistics[name]

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
        call = self._call(headers, inputs, rows, supplied_id, version)
        if records is not None:
            call.records = records
        if groups is not None:
            call.groups = groups
        if timeout is not None:
            call.timeout = timeout
        if self._cache is not None and not call.pinned and self._cached(call):
            return self._served(call)
        if rows > call.model.inline_rows or rows > call.live.control.inline_rows:
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
    ) -> Served:
        counters, live = self.counters, self._state.live
        if live is not counters.live:
            self._turn(live)
        if supplied_id is None and b"x-request-id" in headers:
            supplied_id = headers[b"x-request-id"].decode("latin-1")
        key, request_id = self._request_ids.issue(supplied_id)
        if b"x-assignment-key" in headers:
            key = headers[b"x-assignment-key"].decode("latin-1") or key
            if len(key) > _MAX_KEY_CHARS:
                raise BadRequest(f"X-Assignment-Key is over {_MAX_KEY_CHARS} characters")
        control, treatment = live.control, live.treatment
        if version is not None:
            return self._pinned(live, version, request_id, inputs, rows)
        if treatment is not None and assign(key, live.route.rollout_id, live.route.weight) is TREATMENT:
            counts = counters.treatment
            assert counts is not None
            return Served(live, request_id, TREATMENT, treatment, counts, inputs, rows, self.arrived)
        return Served(live, request_id, CONTROL, control, counters.control, inputs, rows, self.arrived)

    def _pinned(self, live: Live, version: str, request_id: str, inputs: Tensors, rows: int) -> Served:
        arm: Arm = CONTROL
        model = live.control
        if live.treatment is not None and version == live.treatment.name:
            arm, model = TREATMENT, live.treatment
        elif version != model.name:
            raise NotFound(f"no variant {version[:100]!r} is loaded")
        counts = self.counters.pinned(model.name, arm)
        call = Served(live, request_id, arm, model, counts, inputs, rows, self.arrived)
        call.pinned = True
        return call

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

    def _answer_inline(self, call: Served) -> Served:
        if call.arm is TREATMENT and self._may_try(call):
            try:
                call.outputs, seconds = self._run_inline(call.model, call.inputs, call.rows)
                self._after_treatment(call, seconds)
            except _TooSlow:
                call.model.breaker.released()
                raise
            except ArmFailed as error:
                self._treatment_failed(call, error)
            else:
                low = self._low(call)
                if low is not None:
                    subset = {name: value[low] for name, value in call.inputs.items()}
                    try:
                        more, seconds = self._run_inline(call.live.control, subset, int(low.sum()))
                    except ArmFailed as error:
                        self._escalation_failed(call, error)
                    else:
                        self._merge(call, low, more, seconds)
                return self._served(call)
        outputs, seconds = self._run_inline(call.live.control, call.inputs, call.rows)
        self._after_control(call, outputs, seconds)
        return self._served(call)

    def _run_inline(self, model: Model, inputs: Tensors, rows: int) -> tuple[Outputs, float]:
        try:
            return model.run_inline(inputs, rows)
        except ArmFailed as error:
            if error.kind == "timeout":
                raise _TooSlow from None
            raise

    # -- in threads -----------------------------------------------------------------------------------------

    async def _answer_in_threads(self, call: Served) -> Served:
        try:
            await self._in_threads(call)
        except Overloaded:
            call.counts.shed += 1
            raise
        except (ArmFailed, DeadlineExceeded) as error:
            raise self._no_answer(call, error) from None
        return self._served(call)

    async def _in_threads(self, call: Served) -> None:
        control = call.live.control
        limit = self._settings.request_deadline
        deadline = call.started + (limit if call.timeout is None else min(limit, call.timeout))
        if call.arm is TREATMENT and self._may_try(call):
            now = time.perf_counter()
            limit = min(now + self._settings.treatment_deadline, now + (deadline - now) * _CONTROL_SHARE)
            try:
                call.outputs, seconds = await _timed(call.model, call.inputs, call.rows, limit)
                self._after_treatment(call, seconds)
            except ArmFailed as error:
                self._treatment_failed(call, error)
            except BaseException:  # whoever asked has gone: that says nothing about the candidate
                call.model.breaker.released()
                raise
            else:
                low = self._low(call)
                if low is not None:
                    subset = {name: value[low] for name, value in call.inputs.items()}
                    try:
                        more, seconds = await _timed(control, subset, int(low.sum()), deadline)
                    except ArmFailed as error:
                        self._escalation_failed(call, error)
                    else:
                        self._merge(call, low, more, seconds)
                return
        outputs, seconds = await control.run_pooled(call.inputs, call.rows, deadline)
        self._after_control(call, outputs, seconds)

    def _after_control(self, call: Served, outputs: Outputs, seconds: float) -> None:
        """Take control's answer, whoever was asked first."""
        control = call.live.control
        if call.records is not None:
            call.predictions = control.decode(outputs)
        counts = call.counts.control
        counts.runs.append(seconds)
        counts.rows += call.rows
        call.outputs, call.model, call.arm = outputs, control, CONTROL

    # -- the treatment --------------------------------------------------------------------------------------

    def _may_try(self, call: Served) -> bool:
        if call.pinned or call.model.breaker.allow():
            return True
        # Not counted as an error of its own: the requests that opened the breaker were.
        call.treatment_failed = True
        self._metrics.FALLBACKS.labels(call.model.name, "breaker").inc()
        return False

    def _after_treatment(self, call: Served, seconds: float) -> None:
        """Read what came out, where somebody needs that, and count it as an answer."""
        if call.records is not None or call.live.route.cascade_threshold is not None:
            call.predictions = call.model.decode(call.outputs)
        counts = call.counts
        counts.runs.append(seconds)
        counts.rows += call.rows
        if not call.pinned:
            breaker = call.model.breaker
            if breaker.failures:
                breaker.succeeded()
            counts.tried += 1

    def _treatment_failed(self, call: Served, error: ArmFailed) -> None:
        """Note it, for control to answer; raises it again where nobody else may."""
        if call.pinned:
            raise error
        if error.kind == "overloaded":  # a busy machine is not the candidate's fault
            call.model.breaker.released()
            self._metrics.FALLBACKS.labels(call.model.name, error.kind).inc()
        else:
            call.error = error

    def _blame(self, call: Served) -> None:
        """The treatment failed, and it was not the input's fault."""
        if call.error is None:
            return
        treatment = call.live.treatment
        assert treatment is not None  # it failed
        call.treatment_failed = True
        treatment.breaker.failed()
        call.counts.tried += 1
        call.counts.errors += 1
        self._metrics.FALLBACKS.labels(treatment.name, call.error.kind).inc()

    # -- the cascade ----------------------------------------------------------------------------------------

    def _low(self, call: Served) -> np.ndarray | None:
        """Which records are for control to answer, or None for none of them."""
        threshold, predictions = call.live.route.cascade_threshold, call.predictions
        if threshold is None or predictions is None or call.pinned:
            return None
        low = ~(predictions.confidences >= threshold)  # one that is not a number is not sure of anything
        number = int(low.sum())
        call.counts.escalated += number
        call.counts.kept += call.rows - number
        return low if number else None

    def _escalation_failed(self, call: Served, error: ServingError) -> None:
        # What the candidate said stands: less sure than it should be, but an answer.
        log.warning("a record could not be escalated: %s", error)
        call.cache_key = None
        self._metrics.FALLBACKS.labels(self._state.live.control.name, "escalation").inc()

    def _merge(self, call: Served, low: np.ndarray, more: Outputs, seconds: float) -> None:
        counts = call.counts.control
        counts.runs.append(seconds)
        counts.rows += len(more[0])
        merged = []
        for ours, theirs in zip(call.outputs, more, strict=True):
            both = ours.copy()
            both[low] = theirs
            merged.append(both)
        call.outputs = tuple(merged)
        if call.records is not None:
            call.predictions = call.model.decode(call.outputs)

    # -- the end of a request -------------------------------------------------------------------------------

    def _cached(self, call: Served) -> bool:
        """Whether the cache had the answer."""
        assert self._cache is not None
        call.cache_key = self._cache.key(call.inputs)
        outputs = self._cache.get(call.model.tag, call.cache_key)
        if outputs is None:
            call.counts.misses += 1
            return False
        call.counts.hits += 1
        call.outputs = outputs
        if call.records is not None:
            call.predictions = call.model.decode(outputs)
        return True

    def _served(self, call: Served) -> Served:
        if call.error is not None:
            self._blame(call)
        # What a failing candidate made a user wait is the candidate's latency, whoever answered in the end.
        call.counts.latencies.append(time.perf_counter() - call.started)
        if call.cache_key is not None and self._cache is not None:
            # Under the tag of whoever answered: control's answer is control's, whoever was asked first.
            self._cache.put(call.model.tag, call.cache_key, call.outputs)
            self._metrics.CACHE_BYTES.set(self._cache.bytes)
        return call

    def _no_answer(self, call: Served, error: ServingError) -> ServingError:
        """Count a request that nobody could answer; returns what the client is told."""
        if isinstance(error, ArmFailed) and error.kind == "refused":
            # Full precision does not take it either, so it is the client's; nobody is to blame.
            if call.error is not None:
                call.model.breaker.released()
            return BadRequest(f"the model does not take this input: {error}")
        self._blame(call)
        log.error("no answer: %s", error)  # the message says it all
        call.counts.failed += 1
        call.counts.failed_seconds += time.perf_counter() - call.started
        return error

    # -- the mirror -----------------------------------------------------------------------------------------

    def mirror_after(self, served: Served) -> Callable[[], None] | None:
        """What is to be done once the reply is on its way, or None for a request that is not sampled."""
        route = served.live.route
        if (
            route.rollout_id is None
            or route.treatment is None
            or not is_sampled(served.request_id, route.mirror_rate)
            or served.pinned
        ):
            return None
        return partial(self._offer, served)

    def _offer(self, served: Served) -> None:
        if not self._mirror.wants():
            return
        sample: dict[str, Any] = {
            "rollout_id": served.live.route.rollout_id,
            "request_id": served.request_id,
            "arm": served.arm,
            "treatment_failed": served.treatment_failed,
            "judged": self._request_ids.draw(served.request_id, served.rows),
            "at": time.time(),
        }
        if served.records is not None:
            sample["records"] = served.records
        else:
            sample["tensors"] = packed(served.inputs)
            sample["groups"] = served.groups
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
