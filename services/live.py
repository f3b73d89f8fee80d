"""What a serving process knows of the rollout: the route and its loaded arms, kept fresh from the ledger.

Two threads do all ledger I/O, so that no request ever waits for it. The poller only reads; the reporter only
writes (counts and heartbeats), and a locked ledger that holds up the reporter does not hold up a rollback.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

from compression.errors import CompressionError
from compression.variant import load_variant
from compression.workload import Workload
from monitoring.errors import LedgerUnavailable
from monitoring.ledger import Ledger, Route, WorkerBeat
from monitoring.tally import TallyKey, bucket_of
from services.arms import Model, Pool, load_model
from services.errors import ArmFailed
from services.settings import Settings

__all__ = ["Live", "LiveState"]

log = logging.getLogger("trimtab.live")

NO_ROUTE = Route(revision=-1)
BEAT_SECONDS = 1.0
_RETRY_LOAD_SECONDS = 5.0
# Counts wait in memory while the ledger is away; one key per guardrail, arm and 10 s bucket, so this is hours.
_MAX_PENDING_KEYS = 50_000


@dataclass(frozen=True, slots=True)
class Live:
    """One consistent view of the world; replaced whole, never changed.

    `control` is always there. `treatment` is None unless a rollout wants it and it loaded.
    """

    route: Route
    control: Model
    treatment: Model | None = None
    error: str | None = None


class LiveState:
    """Keeps `live` fresh, and carries this process's counts and heartbeats to the ledger.

    Args:
        settings: intervals and paths.
        workload: decodes the models' outputs.
        service: `gateway` or `shadow`, for the heartbeat.
        control_tag: the full-precision variant to serve while the ledger names none.
        on_change: called in the poller's thread after `live` was replaced.
        pool: how models that are not run on the event loop are run.
    """

    def __init__(
        self,
        settings: Settings,
        workload: Workload,
        service: str,
        control_tag: str,
        on_change: Callable[[Live], None] | None = None,
        pool: Pool | None = None,
    ) -> None:
        self._settings = settings
        self._workload = workload
        self._service = service
        self._on_change = on_change
        self._pool = pool
        self.worker_id = f"{service}-{os.getpid()}-{secrets.token_hex(3)}"
        self.live = Live(NO_ROUTE, load_model(load_variant(control_tag), workload, pool=pool))
        self.ledger_up = False
        self._ledger: Ledger | None = None
        self._applied_at = time.time()
        self._retry_at = float("inf")
        self._stop = threading.Event()
        self._wake_reporter = threading.Event()
        self._counts: defaultdict[tuple[str, TallyKey], Counter[int]] = defaultdict(Counter)
        self._counts_lock = threading.Lock()
        self._sequence = 0
        self._unsent: dict[tuple[str, TallyKey], Counter[int]] | None = None
        self._threads = [
            threading.Thread(target=self._poll_forever, name="route-poller", daemon=True),
            threading.Thread(target=self._report_forever, name="ledger-reporter", daemon=True),
        ]

    # -- life cycle ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Read the route once, so that a restarted worker serves the standing split from its first request."""
        self._poll()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Flush what is counted and end the threads; waits for them at most a few seconds."""
        self._stop.set()
        self._wake_reporter.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=5.0)

    @property
    def ledger(self) -> Ledger:
        """The ledger, opened on first use. Raises LedgerUnavailable."""
        if self._ledger is None:
            self._ledger = Ledger(self._settings.ledger_path(self._workload.name))
        return self._ledger

    # -- counts -------------------------------------------------------------------------------------------

    def count(
        self, rollout_id: str, guardrail: str, group: str, outcome: int, now: float, number: int = 1
    ) -> None:
        """Add a number to a tally."""
        key = (rollout_id, TallyKey(guardrail, group, bucket_of(now)))
        with self._counts_lock:
            if key in self._counts or len(self._counts) < _MAX_PENDING_KEYS:
                self._counts[key][outcome] += number

    def flush(self) -> None:
        """Write the counts. A batch that may or may not have been committed is sent again under its own
        sequence number, and the ledger counts it once. Raises LedgerUnavailable."""
        if self._unsent is None:
            with self._counts_lock:
                if not self._counts:
                    return
                self._unsent, self._counts = dict(self._counts), defaultdict(Counter)
            self._sequence += 1
        self.ledger.add_counts(self.worker_id, self._sequence, self._unsent, at=time.time())
        self._unsent = None

    # -- threads ------------------------------------------------------------------------------------------

    def _poll_forever(self) -> None:
        while not self._stop.wait(self._settings.poll_interval):
            try:
                self._poll()
            except Exception:  # the poller must outlive every surprise
                log.exception("route poll failed")

    def _poll(self) -> None:
        try:
            known = self.ledger_up and self.ledger.revision() == self.live.route.revision
            if known and time.monotonic() < self._retry_at:
                return
            route = self.ledger.route()
        except LedgerUnavailable as error:
            if self.ledger_up:
                log.warning("ledger unavailable, serving on with the last known split: %s", error)
            self.ledger_up = False
            return
        self.ledger_up = True
        if route != self.live.route or time.monotonic() >= self._retry_at:
            self._apply(route)

    def _apply(self, route: Route) -> None:
        before = self.live
        if before.treatment is not None and before.treatment.tag != route.treatment:
            # Until the new candidate is loaded nobody may be sent to the old one under the new route.
            self.live = replace(before, treatment=None)
        control, control_error = self._loaded(route.control or before.control.tag)
        control = control or before.control
        treatment, treatment_error = self._loaded(route.treatment)
        if treatment is not None and not treatment.signature.matches(control.signature):
            treatment_error = f"{treatment.tag}: its inputs or outputs are not those of {control.tag}"
            treatment = None
        error = control_error or treatment_error
        self.live = Live(route, control, treatment, error)
        self._retry_at = time.monotonic() + _RETRY_LOAD_SECONDS if error else float("inf")
        self._applied_at = time.time()
        self._wake_reporter.set()
        log.info(
            "route revision %d: rollout %s, state %s, treatment %s at %d%%",
            route.revision, route.rollout_id, route.state, route.treatment, route.weight,
        )  # fmt: skip
        if self._on_change is not None:
            self._on_change(self.live)

    def _loaded(self, tag: str | None) -> tuple[Model | None, str | None]:
        """The model of that tag, from memory if it is there, and what went wrong."""
        if tag is None:
            return None, None
        for model in (self.live.control, self.live.treatment):
            if model is not None and model.tag == tag:
                return model, None
        try:
            return load_model(load_variant(tag), self._workload, pool=self._pool), None
        except (CompressionError, ArmFailed, OSError) as failure:
            log.error("%s: %s", tag, failure)  # the message says it all
            return None, f"{tag}: {failure}"
        except Exception as failure:  # a file nobody thought of must not keep this worker from the new route
            log.exception("%s does not load", tag)
            return None, f"{tag}: {type(failure).__name__}: {failure}"

    def _report_forever(self) -> None:
        next_beat = 0.0
        while not self._stop.is_set():
            woken = self._wake_reporter.wait(self._settings.flush_interval)
            self._wake_reporter.clear()
            try:
                if woken or time.monotonic() >= next_beat:
                    self._beat()
                    next_beat = time.monotonic() + BEAT_SECONDS
                self.flush()
            except LedgerUnavailable as error:
                log.warning("ledger unavailable, counts wait in memory: %s", error)
            except Exception:
                log.exception("ledger report failed")
        try:
            while self._unsent is not None or self._counts:  # one that failed before comes first
                self.flush()
        except LedgerUnavailable as error:
            log.warning("ledger unavailable at shutdown, counts of the last moments are lost: %s", error)

    def _beat(self) -> None:
        live = self.live
        loaded = tuple(model.tag for model in (live.control, live.treatment) if model is not None)
        self.ledger.heartbeat(
            WorkerBeat(
                worker_id=self.worker_id,
                service=self._service,
                pid=os.getpid(),
                revision=live.route.revision,
                applied_at=self._applied_at,
                loaded=loaded,
                error=live.error,
                at=time.time(),
            )
        )
