"""The data plane's engine: assign, infer, fall back, count, and offer a sample to the mirror.

Whatever door a request came through, it is answered here, in this process, without the ledger or another service. A
request that small models can answer is answered within one call; only what has to wait becomes a coroutine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import orjson

from compression.cascade import keeps
from services.arms import Model, Outputs
from services.batching import DeadlineExceeded, Overloaded
from services.cache import AnswerCache
from services.control.auth import RequestIds
from services.counters import ArmCounts, Counters, Statistics
from services.errors import ArmFailed, BadRequest, NotFound, ServingError, Unavailable
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
# So many times the requests that wait for a treatment may be in flight: a quarter of all may wait for it.
_TREATMENT_SHARE = 4
_NOT_ITS_FAULT = ("overloaded", "hurried")

_Run = tuple[Model, "Tensors", int, bool]
"""A model to run on so many records, and whether that is the treatment's try."""
_Plan = Generator[_Run, tuple[Outputs, float], None]


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
        failure: kind of what the treatment did instead of answering. (An error would hold the frames it came through,
            and this object with all its tensors in a circle.)
    """

    outputs: Outputs = ()
    predictions: Predictions | None = None
    records: Sequence[Mapping[str, Any]] | None = None
    groups: Sequence[Mapping[str, str]] | None = None
    timeout: float | None = None
    pinned = False
    cache_key: bytes | None = None
    treatment_failed = False
    probing = False
    failure: str | None = None

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
        self._in_flight = self._on_treatment = 0
        serving = workload.serving
        self._cache = (
            AnswerCache(serving.cache_max_bytes, serving.cache_ttl_s) if serving.cache_ttl_s > 0 else None
        )

    @property
    def in_flight(self) -> int:
        """Requests that wait for a model in threads, from either door."""
        return self._in_flight

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

    def reject(self) -> None:
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
            Unavailable: too many requests wait already.
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
        return self._drive(call)

    def _drive(self, call: Served) -> Served | Coroutine[Any, Any, Served]:
        """Go through a plan on the event loop, as far as its models are small enough for that."""
        plan = self._plan(call)
        try:
            run = next(plan)
            while True:
                model, inputs, rows, _ = run
                if rows <= model.inline_rows:
                    try:
                        ran = model.run_inline(inputs, rows)
                    except ArmFailed as error:
                        if error.kind != "timeout":
                            run = plan.throw(error)
                            continue
                    else:
                        run = plan.send(ran)
                        continue
                if self._in_flight < self._settings.max_in_flight:
                    self._in_flight += 1
                    return self._in_threads(call, plan, run)
                run = plan.throw(
                    ArmFailed("overloaded", "too many requests in flight in this worker; try again")
                )
        except StopIteration:
            return self._served(call)
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
        by_itself = supplied_id is None
        if b"x-assignment-key" in headers:
            by_itself = False
            key = headers[b"x-assignment-key"].decode("latin-1") or key
            if len(key) > _MAX_KEY_CHARS:
                raise BadRequest(f"X-Assignment-Key is over {_MAX_KEY_CHARS} characters")
        if version is not None:
            return self._pinned(live, version, request_id, inputs, rows)
        arm, model, counts = CONTROL, live.control, counters.control
        if (
            live.treatment is not None
            and counters.treatment is not None
            and assign(key, live.route.rollout_id, live.route.weight) is TREATMENT
        ):
            arm, model, counts = TREATMENT, live.treatment, counters.treatment
        if by_itself:
            counts.by_themselves += 1
        return Served(live, request_id, arm, model, counts, inputs, rows, self.arrived)

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

    # -- what is to be run ----------------------------------------------------------------------------------

    def _plan(self, call: Served) -> _Plan:
        """The runs that a request needs, one after another. It is sent what came out of each, or thrown why nothing
        did, and ends when there is an answer; it does not know where they are run."""
        control = call.live.control
        if call.arm is TREATMENT and self._may_try(call):
            threshold = None if call.pinned else call.live.route.cascade_threshold
            predictions = None
            try:
                outputs, seconds = yield call.model, call.inputs, call.rows, True
                if call.records is not None or threshold is not None:
                    predictions = call.model.decode(outputs)
            except ArmFailed as error:
                if call.pinned:
                    raise
                call.failure = error.kind
            else:
                call.outputs = outputs
                if call.records is not None:
                    call.predictions = predictions
                self._treatment_answered(call, seconds)
                low = None
                if threshold is not None and predictions is not None:
                    low = self._low(call, predictions, threshold)
                if low is not None:
                    subset = {name: value[low] for name, value in call.inputs.items()}
                    try:
                        more, seconds = yield control, subset, int(low.sum()), False
                        self._merge(call, low, more, seconds)
                    except ArmFailed as error:
                        self._escalation_failed(call, error)
                return
        outputs, seconds = yield control, call.inputs, call.rows, False
        if call.records is not None:
            call.predictions = control.decode(outputs)
        counts = call.counts.control
        counts.runs.append(seconds)
        counts.rows += call.rows
        call.outputs, call.model, call.arm = outputs, control, CONTROL

    async def _in_threads(self, call: Served, plan: _Plan, run: _Run) -> Served:
        """Go on with a plan where its runs may wait."""
        try:
            while True:
                try:
                    ran = await self._pooled(call, *run)
                except ArmFailed as error:
                    run = plan.throw(error)
                else:
                    run = plan.send(ran)
        except StopIteration:
            return self._served(call)
        except ArmFailed as error:
            raise self._no_answer(call, error) from None
        finally:
            self._in_flight -= 1
            if call.probing:  # whoever asked has gone: that says nothing about the candidate
                self._end_probe(call)

    async def _pooled(
        self, call: Served, model: Model, inputs: Tensors, rows: int, of_treatment: bool
    ) -> tuple[Outputs, float]:
        settings = self._settings
        limit = settings.request_deadline
        deadline = call.started + (limit if call.timeout is None else min(limit, call.timeout))
        if not of_treatment or call.pinned:
            return await _timed(model, inputs, rows, deadline, "deadline")
        if self._on_treatment * _TREATMENT_SHARE >= settings.max_in_flight:
            # Or a candidate that hangs would fill the worker, and control's users would be refused.
            raise ArmFailed("overloaded", f"{model.name}: too many requests wait for it; try again")
        now = time.perf_counter()
        own = min(settings.treatment_deadline, limit * _CONTROL_SHARE)
        left = (deadline - now) * _CONTROL_SHARE
        hurried = call.timeout is not None and left < own
        self._on_treatment += 1
        try:
            return await _timed(
                model, inputs, rows, now + (left if hurried else own), "hurried" if hurried else "timeout"
            )
        finally:
            self._on_treatment -= 1

    # -- the treatment --------------------------------------------------------------------------------------

    def _may_try(self, call: Served) -> bool:
        if call.pinned:
            return True
        breaker = call.model.breaker
        if breaker.allow():
            call.probing = breaker.probing
            return True
        # Not counted as an error of its own: the requests that opened the breaker were.
        call.treatment_failed = True
        self._metrics.FALLBACKS.labels(call.model.name, "breaker").inc()
        return False

    def _treatment_answered(self, call: Served, seconds: float) -> None:
        counts = call.counts
        counts.runs.append(seconds)
        counts.rows += call.rows
        if call.pinned:
            return
        counts.tried += 1
        breaker = call.model.breaker
        if breaker.failures:
            breaker.succeeded()
            call.probing = False

    def _blame(self, call: Served, kind: str) -> None:
        """Control answered what the treatment did not."""
        treatment = call.live.treatment
        assert treatment is not None  # it was asked
        self._metrics.FALLBACKS.labels(treatment.name, kind).inc()
        if kind in _NOT_ITS_FAULT:
            self._end_probe(call)
            return
        call.treatment_failed = True
        call.probing = False
        treatment.breaker.failed()
        call.counts.tried += 1
        call.counts.errors += 1

    def _end_probe(self, call: Served) -> None:
        if call.probing and call.live.treatment is not None:
            call.probing = False
            call.live.treatment.breaker.released()

    # -- the cascade ----------------------------------------------------------------------------------------

    def _low(self, call: Served, predictions: Predictions, threshold: float) -> np.ndarray | None:
        """Which records are for control to answer, or None for none of them."""
        low = ~keeps(predictions.confidences, threshold)
        number = int(low.sum())
        call.counts.escalated += number
        call.counts.kept += call.rows - number
        return low if number else None

    def _escalation_failed(self, call: Served, error: ServingError) -> None:
        # What the candidate said stands: less sure than it should be, but an answer.
        log.warning("a record could not be escalated: %s", error)
        call.cache_key = None
        self._metrics.FALLBACKS.labels(call.model.name, "escalation").inc()

    def _merge(self, call: Served, low: np.ndarray, more: Outputs, seconds: float) -> None:
        """Put control's answers in their places. Raises ArmFailed, and changes nothing, where they do not fit."""
        counts = call.counts.control
        counts.runs.append(seconds)
        counts.rows += len(more[0])
        merged = []
        for ours, theirs in zip(call.outputs, more, strict=True):
            if ours.shape[1:] != theirs.shape[1:]:
                raise ArmFailed(
                    "invalid", f"{call.model.name}: its outputs are of other sizes than control's"
                )
            both = ours.copy()
            both[low] = theirs
            merged.append(both)
        outputs = tuple(merged)
        if call.records is not None:
            call.predictions = call.model.decode(outputs)
        call.outputs = outputs

    # -- the end of a request -------------------------------------------------------------------------------

    def _cached(self, call: Served) -> bool:
        """Whether the cache had the answer."""
        assert self._cache is not None
        key = self._cache.key(call.inputs)
        outputs = self._cache.get(call.model.tag, key)
        try:
            if outputs is not None and call.records is not None:
                call.predictions = call.model.decode(outputs)
        except ArmFailed:
            outputs = None  # good enough for who asked with tensors, and nothing that can be read
        if outputs is None:
            call.counts.misses += 1
            call.cache_key = key
            return False
        call.counts.hits += 1
        call.outputs = outputs
        return True

    def _served(self, call: Served) -> Served:
        if call.failure is not None:
            self._blame(call, call.failure)
        # What a failing candidate made a user wait is the candidate's latency, whoever answered in the end.
        call.counts.latencies.append(time.perf_counter() - call.started)
        if call.cache_key is not None and self._cache is not None and call.live is self.counters.live:
            # Under the tag of whoever answered: control's answer is control's, whoever was asked first.
            self._cache.put(call.model.tag, call.cache_key, call.outputs)
            self._metrics.CACHE_BYTES.set(self._cache.bytes)
        return call

    def _no_answer(self, call: Served, error: ArmFailed) -> ServingError:
        """Count a request that nobody could answer; returns what the client is told.

        The treatment is not blamed: what full precision cannot answer either says nothing about it.
        """
        self._end_probe(call)
        counts = call.counts
        if error.kind == "overloaded":
            counts.shed += 1
            return Unavailable(str(error), error.headers)
        if error.kind == "refused" or (error.kind == "invalid" and call.records is None):
            return BadRequest(f"the model has no answer to this input: {error}")
        log.error("no answer: %s", error)  # the message says it all
        counts.failed += 1
        counts.failed_seconds += time.perf_counter() - call.started
        return DeadlineExceeded() if error.kind == "deadline" else error

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
        judged = self._request_ids.draw(served.request_id, served.rows)
        sample: dict[str, Any] = {
            "rollout_id": served.live.route.rollout_id,
            "request_id": served.request_id,
            "arm": served.arm,
            "treatment_failed": served.treatment_failed,
            "rows": served.rows,
            "judged": judged,
            "at": time.time(),
        }
        if served.records is not None:
            sample["records"] = served.records
        else:
            sample["tensors"] = packed(served.inputs)
            sample["groups"] = served.groups
        predictions = served.predictions
        if predictions is not None:
            sample["answer"] = int(predictions.classes[judged]), float(predictions.confidences[judged])
        else:  # reading them costs more than all the rest, and the shadow has the time
            outputs = zip(served.model.signature.outputs, served.outputs, strict=True)
            sample["outputs"] = packed({spec.name: value[judged : judged + 1] for spec, value in outputs})
        self._mirror.offer(orjson.dumps(sample))


async def _timed(
    model: Model, inputs: Tensors, rows: int, deadline: float, kind: str
) -> tuple[Outputs, float]:
    """Run in a thread; that time ran out (`kind`), or that too many wait, becomes a failure like any other."""
    try:
        return await model.run_pooled(inputs, rows, deadline)
    except DeadlineExceeded:
        raise ArmFailed(kind, f"{model.name}: no answer in time") from None
    except Overloaded as error:
        raise ArmFailed("overloaded", f"{model.name}: {error}", error.headers) from None
