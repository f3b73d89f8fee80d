"""What the guardrails have to say about a rollout, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from monitoring.baseline import Baseline
from monitoring.detector import Detector
from monitoring.groups import GroupSpec
from monitoring.policy import Action
from monitoring.quality import Quality
from monitoring.records import Rollout
from monitoring.tally import Counts

__all__ = [
    "SUSPICION_LOG10",
    "Assessment",
    "Certificate",
    "Promotion",
    "Scope",
    "Totals",
    "Verdict",
    "scope_of",
]

Totals = Mapping[tuple[str, str], Counts]
"""(what is tallied, group) -> counts of an epoch."""

SUSPICION_LOG10 = 1.0
"""Evidence for rolling back at which a rollout stops climbing."""

_ONLY_SHOWN = ("alert", "dry-run")


@dataclass(frozen=True, slots=True)
class Scope:
    """Who is guarded and against what, fixed when a rollout starts.

    Attributes:
        groups: of people.
        classes: names of the model's classes; none for rollouts that were started before they were kept.
        baseline: full precision and its inputs on the reference rows.
        quality: what a drop is measured in.
        detectors: guardrail -> group -> detector, once promoted, when late harm is watched for; None before.
    """

    groups: tuple[GroupSpec, ...] = ()
    classes: tuple[str, ...] = ()
    baseline: Baseline = Baseline()
    quality: Quality = Quality()
    detectors: Mapping[str, Mapping[str, Detector]] | None = None


def scope_of(rollout: Rollout, detectors: Mapping[str, Mapping[str, Detector]] | None = None) -> Scope:
    """Who is guarded in a rollout and against what; with its detectors once it is promoted."""
    return Scope(rollout.groups, rollout.classes, rollout.baseline, rollout.quality, detectors)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One guardrail's evidence against the candidate, for one group or class ("" is everybody).

    Attributes:
        evidence_log10, limit_log10: log10 of the e-value, and where the guardrail acts.
        estimate: point estimate of what it limits; None before anything was counted.
        tolerated: the margin, ratio or share it tolerates.
        n, missing: outcomes counted, and how many of them were never known. For latency they are blocks.
        late: it watches for harm that begins late: the estimate is of the newest pairs, the evidence a detector's.
        both_ways: of demographic parity: it limits a movement in either direction, because the reference rows
            cannot say on which side of zero the group's gap was.
        of: the metric of quality that a drop is of; of equalized odds, which rate has moved and where to.
    """

    guardrail: str
    group: str
    action: Action
    evidence_log10: float
    limit_log10: float
    estimate: float | None
    tolerated: float
    n: int
    missing: int = 0
    both_ways: bool = False
    late: bool = False
    of: str = "accuracy"

    @property
    def crossed(self) -> bool:
        """Whether the guardrail acts."""
        return self.evidence_log10 >= self.limit_log10

    @property
    def name(self) -> str:
        """``accuracy_drop``, or ``group_harm/DIS=1``."""
        return f"{self.guardrail}/{self.group}" if self.group else self.guardrail


@dataclass(frozen=True, slots=True)
class Certificate:
    """Evidence that a candidate is good enough: overall, or for one group."""

    guardrail: str
    group: str
    evidence_log10: float
    limit_log10: float
    estimate: float | None
    n: int

    @property
    def reached(self) -> bool:
        """Whether it proves what it is about."""
        return self.evidence_log10 >= self.limit_log10


@dataclass(frozen=True, slots=True)
class Promotion:
    """Whether the evidence allows to promote, by which certificate, and else what is lacking."""

    ready: bool
    best: Certificate
    sentence: str
    more_pairs: int | None


@dataclass(frozen=True, slots=True)
class Assessment:
    """Everything the guardrails have to say at one moment."""

    verdicts: tuple[Verdict, ...]
    certificates: tuple[Certificate, ...]
    promotion: Promotion

    def crossed(self, *actions: Action) -> list[Verdict]:
        """The guardrails with one of these actions that act, the one furthest past its limit first."""
        found = [v for v in self.verdicts if v.crossed and v.action in actions]
        return sorted(found, key=lambda v: v.limit_log10 - v.evidence_log10)

    @property
    def suspicion(self) -> Verdict | None:
        """The guardrail most suspicious of the candidate, if any is enough so to stop its climb."""
        found = [
            v for v in self.verdicts if v.evidence_log10 >= SUSPICION_LOG10 and v.action not in _ONLY_SHOWN
        ]
        return max(found, key=lambda v: v.evidence_log10, default=None)
