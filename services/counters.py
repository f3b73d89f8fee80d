"""What happened to requests, kept as plain numbers on the request's path and folded into metrics and tallies beside it.

A Prometheus counter of a server with several processes writes to a mapped file under a lock, and a tally has a key to
make; beside a model of a few microseconds, a dozen of them for each request would be most of its cost.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from monitoring.tally import MODEL_TIME, SAMPLE_RATIO
from services.routing import CONTROL, TREATMENT, Arm

if TYPE_CHECKING:
    from monitoring.rows import Route
    from services.live import Live, LiveState

__all__ = ["ArmCounts", "Counters", "Statistics"]

_FOLD_SECONDS = 0.25
# Longer than any request may take.
_UNDER_WAY_SECONDS = 10.0


@dataclass(slots=True)
class Statistics:
    """What a variant has done in this worker since it started. Seconds; `batches` are runs in threads by their rows."""

    requests: int = 0
    request_seconds: float = 0.0
    failures: int = 0
    failure_seconds: float = 0.0
    runs: int = 0
    run_seconds: float = 0.0
    rows: int = 0
    last_at: float = 0.0
    hits: int = 0
    misses: int = 0
    batches: dict[int, int] = field(default_factory=dict)


class ArmCounts:
    """What was asked of one arm, under one view of the world, since the last fold, and what its model did.

    Attributes:
        rollout_id: whose evidence these counts are; None for nobody's.
        slo: its latency limit in seconds.
        control: the counts of control under the same view, for what it does in a treatment's place.
        latencies: seconds of each request that was to be answered by this arm and was answered, by whichever arm.
        failed: of its requests, those that got an error of the server's making; `shed`: those that were refused
            because too many waited. `failed_seconds` is what the failed ones took.
        tried, errors: times that the treatment was asked, and that it gave no answer.
        runs: model seconds of each answer, a share of the run's where requests were run together.
        rows: records in those answers.
        hits, misses: answers that the cache had, and had not.
        kept, escalated: records that a cascade let this arm answer, and those it gave to control.
        by_themselves: requests that were assigned by nothing that they share with others, such as a user's key.
        weight: percent of traffic meant for the treatment.
    """

    __slots__ = (
        "arm",
        "by_themselves",
        "control",
        "errors",
        "escalated",
        "failed",
        "failed_seconds",
        "hits",
        "kept",
        "latencies",
        "misses",
        "name",
        "rollout_id",
        "rows",
        "runs",
        "shed",
        "slo",
        "tried",
        "weight",
    )

    def __init__(
        self, name: str, arm: Arm, route: Route | None = None, control: ArmCounts | None = None
    ) -> None:
        self.name = name
        self.arm = arm
        self.rollout_id = None if route is None else route.rollout_id
        self.weight = 0 if route is None else route.weight
        self.slo = 0.0 if route is None else route.latency_slo_ms / 1000.0
        self.control = self if control is None else control
        self.clear()

    def clear(self) -> None:
        """Back to nothing."""
        self.failed = self.shed = self.tried = self.errors = self.rows = 0
        self.hits = self.misses = self.kept = self.escalated = self.by_themselves = 0
        self.failed_seconds = 0.0
        self.latencies: list[float] = []
        self.runs: list[float] = []


class Counters:
    """The counts of one view of the world; used from the event loop only.

    Args:
        metrics: `monitoring.metrics`, imported where its files are known.
    """

    def __init__(self, metrics: ModuleType, state: LiveState) -> None:
        self._metrics = metrics
        self._state = state
        self._timer: asyncio.TimerHandle | None = None
        self.statistics: defaultdict[str, Statistics] = defaultdict(Statistics)
        self.rejected = 0
        self._past: list[tuple[float, list[ArmCounts]]] = []
        self._set_up(state.live)

    def begin(self, live: Live) -> None:
        """Count for another view of the world from now on. Requests that are under way still count for theirs."""
        self._past.append((time.monotonic() + _UNDER_WAY_SECONDS, self._present))
        self._set_up(live)

    def _set_up(self, live: Live) -> None:
        self.live = live
        self.control = ArmCounts(live.control.name, CONTROL, live.route)
        self.treatment = None
        self._present = [self.control]
        if live.treatment is not None:
            self.treatment = ArmCounts(live.treatment.name, TREATMENT, live.route, self.control)
            self._present.append(self.treatment)
        self._pinned: dict[Arm, ArmCounts] = {}

    def pinned(self, name: str, arm: Arm) -> ArmCounts:
        """The counts of requests that asked for one variant: shown like all others, and no evidence."""
        found = self._pinned.get(arm)
        if found is None:
            found = self._pinned[arm] = ArmCounts(name, arm)
            self._present.append(found)
        return found

    def batch(self, name: str, rows: int) -> None:
        """Count a run in a thread."""
        batches = self.statistics[name].batches
        batches[rows] = batches.get(rows, 0) + 1

    def start(self) -> None:
        """Fold every quarter of a second."""
        self._tick()

    def stop(self) -> None:
        """Fold what is left, for the last time."""
        if self._timer is not None:
            self._timer.cancel()
        self.fold()

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_FOLD_SECONDS, self._tick)
        self.fold()

    def fold(self) -> None:
        """Move the counts into metrics and tallies."""
        if self.rejected:
            self._metrics.REQUESTS.labels(self.control.name, CONTROL, "rejected").inc(self.rejected)
            self.rejected = 0
        now = time.monotonic()
        for _, past in self._past:
            self._fold_all(past)
        self._past = [(until, past) for until, past in self._past if now < until]
        self._fold_all(self._present)

    def _fold_all(self, present: list[ArmCounts]) -> None:
        for counts in present:
            self._tally(counts)
            self._show(counts)
            counts.clear()

    def _show(self, counts: ArmCounts) -> None:
        metrics, name, arm = self._metrics, counts.name, counts.arm
        statistics = self.statistics[name]
        if counts.latencies:
            latencies = np.array(counts.latencies)
            metrics.REQUESTS.labels(name, arm, "ok").inc(len(latencies))
            metrics.observe_all(metrics.REQUEST_SECONDS.labels(name, arm), latencies)
            statistics.requests += len(latencies)
            statistics.request_seconds += float(latencies.sum())
            statistics.last_at = time.time()
        if counts.failed:
            metrics.REQUESTS.labels(name, arm, "failed").inc(counts.failed)
            statistics.failures += counts.failed
            statistics.failure_seconds += counts.failed_seconds
        if counts.shed:
            metrics.REQUESTS.labels(name, arm, "shed").inc(counts.shed)
        if counts.runs:
            runs = np.array(counts.runs)
            metrics.observe_all(metrics.MODEL_SECONDS.labels(name, arm), runs)
            statistics.runs += len(runs)
            statistics.run_seconds += float(runs.sum())
            statistics.rows += counts.rows
            metrics.RECORDS.labels(name, arm).inc(counts.rows)
        statistics.hits += counts.hits
        statistics.misses += counts.misses
        for outcome, number in (("hit", counts.hits), ("miss", counts.misses)):
            if number:
                metrics.CACHE.labels(name, outcome).inc(number)
        for outcome, number in (("kept", counts.kept), ("escalated", counts.escalated)):
            if number:
                metrics.CASCADE_RECORDS.labels(name, outcome).inc(number)

    def _tally(self, counts: ArmCounts) -> None:
        if counts.rollout_id is None:
            return
        arm = counts.arm
        slow = int((np.array(counts.latencies) > counts.slo).sum())
        # A request that failed took as long as it took; for the latency limit it is neither fast nor slow.
        tallies = {
            ("requests", arm): (len(counts.latencies), counts.failed),
            ("latency_p95", arm): (len(counts.latencies) - slow, slow),
            ("treatment_errors", ""): (counts.tried - counts.errors, counts.errors),
        }
        if counts.runs:
            tallies[MODEL_TIME, arm] = (round(1e6 * sum(counts.runs)), counts.rows)
        if 0 < counts.weight < 100:
            mine = counts.by_themselves
            tallies[SAMPLE_RATIO, str(counts.weight)] = (0, mine) if arm == TREATMENT else (mine, 0)
        now = time.time()
        for (guardrail, group), numbers in tallies.items():
            for outcome, number in enumerate(numbers):
                if number:
                    self._state.count(counts.rollout_id, guardrail, group, outcome, now, number)
