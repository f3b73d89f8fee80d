"""A rollout and the decisions about it, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from monitoring.baseline import Baseline
from monitoring.groups import GroupSpec
from monitoring.policy import Policy
from monitoring.quality import Quality

PENDING, WARMUP, SHADOWING, STEP = "pending", "warmup", "shadowing", "step"
PROMOTING, PROMOTED, HELD, BLIND, ROLLED_BACK = "promoting", "promoted", "held", "blind", "rolled_back"
STATES = (PENDING, WARMUP, SHADOWING, STEP, PROMOTING, PROMOTED, HELD, BLIND, ROLLED_BACK)
ALERTED_STATES = (ROLLED_BACK, HELD, BLIND, PROMOTED)
"""States that somebody wants to hear about when a rollout enters them."""


_SHARES = (
    *("latency_p95", "latency_vs_control", "treatment_errors", "sample_ratio", "disagreement"),
    *("resource_use", "prediction_drift", "input_drift"),
)
"""Guardrails whose estimate is a share of requests, and no drop of accuracy."""
MOVES = ("demographic_parity", "equalized_odds")
"""Guardrails whose estimate is a movement between groups."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One candidate's way to traffic.

    Attributes:
        control, treatment: variant tags of full precision and of the candidate.
        positive: class index of the favourable decision.
        policy, groups, classes, baseline, quality: fixed when the rollout starts; `classes` are the names of the
            model's classes, `baseline` is full precision on the reference rows, `quality` what a drop is measured in.
        state: one of STATES.
        step: index into `policy.steps`; 0 is shadowing.
        weight: percent of traffic on the candidate.
        epoch: 0, and 1 from promotion on. What is counted in one is not evidence in the other; a pair that was
            served before promotion, and whose turn to be counted comes after it, counts in epoch 1.
        version: rises with every change (compare-and-swap).
        revision: the route revision at which workers see this rollout as it is, whatever its mirror rate.
        active: whether workers route by it; False once another rollout has taken its place.
        entered_at: when the state was entered; step_at and step_pairs: when the step was, and how many pairs
            had been compared by then.
        held_from, blind_from: the state that `held` and `blind` return to.
        reason: why the state was entered.
        waived: guardrails (``name`` or ``name/group``) whose `hold` an operator has overruled by resuming.
        alerted: guardrails whose action is `alert` or `dry-run` and that have crossed their limit.
        override_reason: why it was started although the gate had refused; None when the gate accepted.
        cascade_threshold: confidence from which on the candidate's own answer stands, full precision giving the
            others in the same request; None for no cascade.
        mirror_rate: share of requests to mirror while pairs are wanted (`monitoring.sampling` sets it).
        mirror_raised_at: when that rate was last raised; requests from before promised fewer pairs.
    """

    id: str
    workload: str
    control: str
    treatment: str
    policy: Policy
    groups: tuple[GroupSpec, ...] = ()
    classes: tuple[str, ...] = ()
    baseline: Baseline = Baseline()
    quality: Quality = Quality()
    positive: int = 1
    state: str = PENDING
    step: int = 0
    weight: int = 0
    epoch: int = 0
    version: int = 0
    revision: int = 0
    active: bool = True
    created_at: float = 0.0
    entered_at: float = 0.0
    step_at: float = 0.0
    step_pairs: int = 0
    held_from: str | None = None
    blind_from: str | None = None
    reason: str = ""
    waived: tuple[str, ...] = ()
    alerted: tuple[str, ...] = ()
    override_reason: str | None = None
    cascade_threshold: float | None = None
    mirror_rate: float = 1.0
    mirror_raised_at: float = 0.0

    @property
    def rate_in_force(self) -> float:
        """Share of requests that workers mirror: none once it is rolled back or replaced."""
        return self.mirror_rate if self.active and self.state != ROLLED_BACK else 0.0

    @property
    def live(self) -> bool:
        """Whether it is still under way: neither promoted nor rolled back."""
        return self.state not in (PROMOTED, ROLLED_BACK)


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What came of the self-test before traffic.

    Attributes:
        passed: whether the rollout may go on.
        sentence: one line: what was tried and found, or why it failed.
    """

    passed: bool
    sentence: str


NOT_WANTED = SelfTest(True, "workers load the candidate")
"""Of a rollout that goes on without a self-test."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What was done to a rollout, with the evidence it was done on.

    Attributes:
        actor: "controller" or the operator's name.
        verb: "start", "advance", "promote", "promote full", "pause", "resume", "rollback", "hold", "blind",
            "return", "alert" or "dry-run" (what a guardrail would have done).
        guardrail, group: the guardrail that decided, if one did; group "" is everybody.
        evidence_log10, limit_log10: its evidence and the limit it was held against, as log10 e-values.
        drop: point estimate of what that guardrail limits.
        pairs, labels: pairs resolved, and labels the evidence needed and had, when it was made.
        weight: percent of traffic on the candidate from this decision on.
        evidence_at: arrival time of the newest input that was counted.
        override: an operator went past the gate or past missing evidence.
        seq, revision, digest, effective_at, alerted_at: filled by the ledger; `digest` is the head of the chain up to
            here (`monitoring.chain`), `effective_at` is when the last live worker had applied it.
    """

    rollout_id: str
    at: float
    actor: str
    from_state: str
    to_state: str
    verb: str
    reason: str
    guardrail: str | None = None
    group: str | None = None
    evidence_log10: float | None = None
    limit_log10: float | None = None
    drop: float | None = None
    pairs: int = 0
    labels: int = 0
    weight: int = 0
    evidence_at: float | None = None
    override: bool = False
    seq: int = 0
    revision: int = 0
    digest: str = ""
    effective_at: float | None = None
    alerted_at: float | None = None

    @property
    def seconds_to_effect(self) -> float | None:
        """From the decision to its use in every live worker; None while that is not known."""
        return None if self.effective_at is None else max(0.0, self.effective_at - self.at)

    def line(self) -> str:
        """The decision in one line: state, guardrail, group, drop, evidence, counts, time to effect."""
        parts = [f"{self.rollout_id} {self.to_state}"]
        if self.guardrail is not None:
            parts.append(f"{self.guardrail} {self.group}".rstrip())
            if self.drop is not None:
                if self.guardrail in _SHARES:
                    parts.append(f"{100 * self.drop:.1f}%")
                else:
                    what = "moved" if self.guardrail in MOVES else "drop"
                    parts.append(f"{what} {100 * self.drop:z.1f} pt")
            if self.evidence_log10 is not None and self.limit_log10 is not None:
                parts.append(f"evidence 10^{self.evidence_log10:.2f} against 10^{self.limit_log10:.2f}")
        else:
            parts.append(self.reason)
        parts.append(f"{self.pairs:,} pairs, {self.labels:,} labels")
        if self.seconds_to_effect is not None:
            parts.append(f"in effect after {self.seconds_to_effect:.2f} s")
        return "; ".join(parts)
