"""Prometheus series. Import this in processes that serve or judge, not in the command line.

BentoML merges the metrics of all its processes through files, so that only plain counters, gauges and
histograms work: no custom collectors, no Info, no removal of label sets. Label sets that an error ratio
divides by are made beforehand: a series that does not exist yet makes the ratio vanish instead of being 0.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import psutil
from prometheus_client import Counter, Gauge, Histogram

from monitoring.records import ALERTED_STATES, STATES

if TYPE_CHECKING:
    from monitoring.controller import StepResult
    from monitoring.guardrails import Assessment

ARMS = ("control", "treatment")

REQUEST_EDGES = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25),
    *(0.5, 1.0, 2.5, 5.0),
)
"""Seconds; latency limits are among them, so that a share over a limit is exact."""

MODEL_EDGES = (
    *(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5),
)

REQUEST_SECONDS = Histogram(
    "trimtab_request_seconds",
    "Time from a request's arrival to its answer.",
    ["variant", "arm"],
    buckets=REQUEST_EDGES,
)
MODEL_SECONDS = Histogram(
    "trimtab_model_seconds",
    "Time in the model for one call.",
    ["variant", "arm"],
    buckets=MODEL_EDGES,
)
REQUESTS = Counter(
    "trimtab_requests_total",
    "Requests by the arm that was to answer. Outcome failed: the user got an error of the server's making; "
    "shed: it was refused because too many waited; rejected: the request was not valid.",
    ["variant", "arm", "outcome"],
)
REQUEST_OUTCOMES = ("ok", "failed", "shed", "rejected")
RECORDS = Counter("trimtab_records_total", "Records that a model has answered.", ["variant", "arm"])
REFUSED = Counter(
    "trimtab_refused_total",
    "Requests that the data plane's own port refused before reading them whole, by HTTP status.",
    ["status"],
)
REFUSED_STATUSES = ("400", "408", "413", "431", "501", "503", "505")
BATCH_ROWS = Histogram(
    "trimtab_batch_rows",
    "Records run together, for models that are run in threads.",
    ["variant"],
    buckets=(1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0),
)
BATCH_REQUESTS = Histogram(
    "trimtab_batch_requests",
    "Requests run together, for models that are run in threads.",
    ["variant"],
    buckets=(1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
)
CACHE = Counter(
    "trimtab_cache_total", "Requests by whether the cache had the answer.", ["variant", "outcome"]
)
CACHE_OUTCOMES = ("hit", "miss")
CACHE_BYTES = Gauge("trimtab_cache_bytes", "Memory of cached answers.", multiprocess_mode="livesum")
CASCADE_RECORDS = Counter(
    "trimtab_cascade_records_total",
    "Records of a cascade that the candidate answered (kept), and that full precision did (escalated).",
    ["variant", "outcome"],
)
CASCADE_OUTCOMES = ("kept", "escalated")
FALLBACKS = Counter(
    "trimtab_fallbacks_total",
    "Requests of the treatment arm that control answered. Outcome says why.",
    ["variant", "outcome"],
)
FALLBACK_OUTCOMES = (
    "hurried",
    "error",
    "refused",
    "timeout",
    "invalid",
    "breaker",
    "overloaded",
    "escalation",
)
PAIRS = Counter(
    "trimtab_pairs_total",
    "Inputs that both arms were asked about. Outcome missing: one of them could not answer.",
    ["variant", "outcome"],
)
PAIR_OUTCOMES = ("agree", "disagree", "missing")
FEEDBACK = Counter("trimtab_feedback_total", "Labels and rewards by what became of them.", ["outcome"])
FEEDBACK_OUTCOMES = ("accepted", "duplicate", "conflict", "corrected", "too_late", "rejected")
SHADOW_QUEUE = Gauge(
    "trimtab_shadow_queue_depth", "Samples waiting for the shadow.", multiprocess_mode="livesum"
)
SHADOW_SHED = Counter(
    "trimtab_shadow_shed_total",
    "Samples that were not mirrored. Outcome full: the queue was, or they had waited too long; busy: users' requests "
    "waited; failed: the shadow did not take them.",
    ["outcome"],
)
SHED_OUTCOMES = ("full", "busy", "failed")
MIRROR_RATE = Gauge(
    "trimtab_mirror_rate",
    "Share of requests that are meant to be mirrored, 0 to 1.",
    multiprocess_mode="mostrecent",
)
LEDGER_ERRORS = Counter(
    "trimtab_ledger_errors_total", "Calls of the ledger that failed, by service.", ["service"]
)

WEIGHT = Gauge(
    "trimtab_weight_ratio",
    "Share of traffic each arm is meant to get, 0 to 1.",
    ["variant", "arm"],
    multiprocess_mode="mostrecent",
)
STATE = Gauge(
    "trimtab_rollout_state", "1 for the state the rollout is in.", ["state"], multiprocess_mode="mostrecent"
)
STEP = Gauge("trimtab_rollout_step", "Step the rollout is at.", multiprocess_mode="mostrecent")
EVIDENCE = Gauge(
    "trimtab_evidence_log10",
    "Evidence for rolling back, log10 of an e-value.",
    ["guardrail", "group"],
    multiprocess_mode="mostrecent",
)
EVIDENCE_LIMIT = Gauge(
    "trimtab_evidence_limit_log10",
    "Evidence at which a guardrail acts, log10.",
    ["guardrail", "group"],
    multiprocess_mode="mostrecent",
)
PROMOTION = Gauge(
    "trimtab_promotion_evidence_log10",
    "Evidence for promoting, log10 of an e-value.",
    ["guardrail", "group"],
    multiprocess_mode="mostrecent",
)
ESTIMATE = Gauge(
    "trimtab_guardrail_estimate",
    "Point estimate of what a guardrail limits.",
    ["guardrail", "group"],
    multiprocess_mode="mostrecent",
)
DISAGREEMENT = Gauge(
    "trimtab_disagreement_ratio",
    "Share of pairs whose arms disagree; group empty: everybody.",
    ["group"],
    multiprocess_mode="mostrecent",
)
DRIFT = Gauge(
    "trimtab_drift_score",
    "Distance of a column's recent values from the reference's.",
    ["column"],
    multiprocess_mode="mostrecent",
)
FAIRNESS_GAP = Gauge(
    "trimtab_fairness_gap",
    "Largest difference between groups, by fairness metric, sensitive attribute and arm.",
    ["metric", "attribute", "arm"],
    multiprocess_mode="mostrecent",
)
LABEL_LAG = Gauge(
    "trimtab_label_lag_seconds",
    "Time from request to label over the newest labels.",
    ["quantile"],
    multiprocess_mode="mostrecent",
)
LABELS_WAITING = Gauge(
    "trimtab_labels_waiting", "Disagreements that wait for a label.", multiprocess_mode="mostrecent"
)
PAIRS_RESOLVED = Gauge(
    "trimtab_pairs_resolved", "Pairs of the rollout judged so far.", multiprocess_mode="mostrecent"
)
DECISIONS = Counter("trimtab_decisions_total", "Decisions by the state they led to.", ["state"])
EFFECT_SECONDS = Gauge(
    "trimtab_decision_effect_seconds",
    "Time from the last change of the split to its use in every live worker.",
    multiprocess_mode="mostrecent",
)
ALERTS = Counter("trimtab_alerts_total", "Alerts by state and outcome of delivery.", ["state", "outcome"])
ALERT_OUTCOMES = ("delivered", "failed")
CONTROLLER_SECONDS = Histogram(
    "trimtab_controller_step_seconds",
    "Time of one controller step.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 2.5),
)
CONTROLLER_AT = Gauge(
    "trimtab_controller_last_step_timestamp_seconds",
    "When the controller last finished a step.",
    multiprocess_mode="mostrecent",
)
RESIDENT = Gauge(
    "trimtab_resident_memory_bytes",
    "Resident memory of a process.",
    # Not called `pid`: the merging of gauges drops a label of that name, and adds processes up.
    ["service", "process"],
    multiprocess_mode="livesum",
)
CORE_PRICE = Gauge(
    "trimtab_core_price_per_hour",
    "What an hour of one core is said to cost, in whatever money.",
    multiprocess_mode="mostrecent",
)
CORE_WATTS = Gauge(
    "trimtab_core_watts", "What one busy core is said to draw.", multiprocess_mode="mostrecent"
)
CPU = Counter("trimtab_cpu_seconds_total", "CPU time a process has used.", ["service", "process"])


def prepare(variants: Iterable[tuple[str, str]] = ()) -> None:
    """Make the label sets that must exist from the start, at 0.

    Args:
        variants: (variant, arm) pairs this process serves.
    """
    for variant, arm in variants:
        for family in (REQUEST_SECONDS, MODEL_SECONDS, RECORDS):
            family.labels(variant, arm)
        for batches in (BATCH_ROWS, BATCH_REQUESTS):
            batches.labels(variant)
        _prepare(REQUESTS, REQUEST_OUTCOMES, variant, arm)
        _prepare(CACHE, CACHE_OUTCOMES, variant)
        if arm == "treatment":
            _prepare(FALLBACKS, FALLBACK_OUTCOMES, variant)
            _prepare(CASCADE_RECORDS, CASCADE_OUTCOMES, variant)
            _prepare(PAIRS, PAIR_OUTCOMES, variant)
    _prepare(FEEDBACK, FEEDBACK_OUTCOMES)
    _prepare(SHADOW_SHED, SHED_OUTCOMES)
    _prepare(REFUSED, REFUSED_STATUSES)
    LEDGER_ERRORS.labels("monitor")
    _prepare(DECISIONS, STATES)
    for state in ALERTED_STATES:
        _prepare(ALERTS, ALERT_OUTCOMES, state)


def _prepare(family: Counter, outcomes: Iterable[str], *labels: str) -> None:
    for outcome in outcomes:
        family.labels(*labels, outcome)


def observe_all(histogram: Histogram, values: np.ndarray) -> None:
    """As `observe` for each value, at the price of one write for each bucket.

    Args:
        histogram: with its labels, if it has any.
        values: float64 [N].
    """
    # The library has no such call; tests hold this to what `observe` does.
    counts = np.bincount(np.searchsorted(histogram._upper_bounds, values))
    histogram._sum.inc(float(values.sum()))
    for bucket in counts.nonzero()[0]:
        histogram._buckets[bucket].inc(int(counts[bucket]))


def variant_name(workload: str, tag: str) -> str:
    """The variant's name as series show it: ``int8`` of ``employment-int8:1a2b3c``."""
    return tag.partition(":")[0].removeprefix(f"{workload}-")


def publish_route(control: str | None, treatment: str | None, weight: int, state: str) -> None:
    """Show the split and the rollout's state. Variants that are no longer routed to fall to 0.

    Args:
        control, treatment: variant names; None where there is none.
        weight: percent of traffic on the treatment.
        state: "none" without a rollout.
    """
    for name in STATES:
        STATE.labels(name).set(int(name == state))
    now_weighed = {
        (name, arm): share
        for name, arm, share in (
            (control, "control", 1 - weight / 100),
            (treatment, "treatment", weight / 100),
        )
        if name is not None
    }
    for place in _weighed - now_weighed.keys():
        WEIGHT.labels(*place).set(0.0)
    for place, share in now_weighed.items():
        WEIGHT.labels(*place).set(share)
    _weighed.clear()
    _weighed.update(now_weighed)


_weighed: set[tuple[str, str]] = set()
_shown: set[tuple[str, str]] = set()


def publish(step: StepResult) -> None:
    """Show one controller step. Series of guardrails and groups that no longer exist fall to 0."""
    CONTROLLER_SECONDS.observe(step.seconds)
    if step.error is not None:
        LEDGER_ERRORS.labels("monitor").inc()
        return
    if step.leader:  # One that waits for the lease judges nothing.
        CONTROLLER_AT.set(step.at)
    for decision in step.decisions:
        DECISIONS.labels(decision.to_state).inc()
    for seconds in step.effects:
        EFFECT_SECONDS.set(seconds)
    if not step.leader:
        return
    rollout, assessment = step.rollout, step.assessment
    MIRROR_RATE.set(rollout.rate_in_force if rollout is not None else 0.0)
    if rollout is None:
        publish_route(None, None, 0, "none")
        return
    control, treatment = (variant_name(rollout.workload, tag) for tag in (rollout.control, rollout.treatment))
    publish_route(control, treatment, rollout.weight, rollout.state)
    STEP.set(rollout.step)
    PAIRS_RESOLVED.set(step.resolved)
    if assessment is not None:
        _publish_evidence(assessment)
    if step.pair_stats is not None:
        LABELS_WAITING.set(step.pair_stats.waiting)
        for quantile, lag in (
            ("0.5", step.pair_stats.label_lag_median_s),
            ("0.95", step.pair_stats.label_lag_p95_s),
        ):
            LABEL_LAG.labels(quantile).set(lag or 0.0)


def _publish_evidence(assessment: Assessment) -> None:
    now_shown = set()
    for verdict in assessment.verdicts:
        place = (verdict.guardrail, verdict.group)
        now_shown.add(place)
        EVIDENCE.labels(*place).set(verdict.evidence_log10)
        EVIDENCE_LIMIT.labels(*place).set(verdict.limit_log10)
        ESTIMATE.labels(*place).set(verdict.estimate or 0.0)
    for certificate in assessment.certificates:
        PROMOTION.labels(certificate.guardrail, certificate.group).set(certificate.evidence_log10)
        if certificate.guardrail == "disagreement":
            DISAGREEMENT.labels(certificate.group).set(certificate.estimate or 0.0)
    for place in _shown - now_shown:
        for gauge in (EVIDENCE, ESTIMATE):
            gauge.labels(*place).set(0.0)
    _shown.clear()
    _shown.update(now_shown)


class ProcessMeter:
    """Memory and CPU time of this process, as `service`. Call `update` now and then."""

    def __init__(self, service: str) -> None:
        self._process = psutil.Process()
        self._labels = (service, str(os.getpid()))
        self._counted = 0.0
        self._lock = threading.Lock()

    def update(self) -> None:
        """Set resident memory and add the CPU time used since the last call."""
        times = self._process.cpu_times()
        used = times.user + times.system
        RESIDENT.labels(*self._labels).set(self._process.memory_info().rss)
        with self._lock:
            CPU.labels(*self._labels).inc(max(0.0, used - self._counted))
            self._counted = max(self._counted, used)
