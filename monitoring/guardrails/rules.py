"""The guardrails: for each what it counts, whom it judges, and what the counts say.

`tests/monitoring/test_guardrail_contract.py` says what every one of them must hold to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from monitoring.detector import Detector
from monitoring.evidence import (
    Floats,
    drop_evidence,
    excess_evidence,
    gap_evidence,
    log_evidence,
    mismatch_evidence,
    moved_evidence,
)
from monitoring.groups import GroupSpec
from monitoring.guardrails.verdicts import Scope, Totals, Verdict
from monitoring.policy import Policy
from monitoring.tally import CONTROL_BLOCKS, EVERYBODY, LATENCY_BLOCKS, MISSING, SAMPLE_RATIO, Counts

__all__ = ["GUARDRAILS", "LATE", "Guardrail", "Reading", "drop_of", "paired"]

LATENCY_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Reading:
    """What the counts say about one group or class; the fields of `Verdict` that depend on them.

    Attributes:
        evidence: natural logarithm of the e-value.
    """

    evidence: float
    estimate: float | None
    tolerated: float
    n: int
    missing: int = 0
    both_ways: bool = False
    late: bool = False


class Guardrail(Protocol):
    """One thing that must not get worse."""

    @property
    def name(self) -> str:
        """In the policy, whose section of that name has its settings, the metrics, the status and the ledger."""
        ...

    @property
    def unit(self) -> str:
        """Of its estimate and of what it tolerates, both shares."""
        ...

    def subjects(self, scope: Scope) -> Sequence[str]:
        """Whom it judges one by one: groups or classes, or everybody."""
        ...

    def read(self, policy: Policy, scope: Scope, subjects: Sequence[str], totals: Totals) -> list[Reading]:
        """What the counts say about each subject. Its evidence must be at most 1 on average, whatever the look,
        as long as what the section tolerates is not exceeded."""
        ...

    def what(self, verdict: Verdict) -> str:
        """What its estimate is, in a few words."""
        ...


# -- answers compared with labels -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AccuracyDrop:
    """Full precision right where the candidate is wrong, more often than the other way round."""

    name: str = "accuracy_drop"
    unit: str = " pt"

    def subjects(self, scope: Scope) -> Sequence[str]:
        return (EVERYBODY,)

    def read(self, policy: Policy, scope: Scope, subjects: Sequence[str], totals: Totals) -> list[Reading]:
        return _drops(self.name, policy, scope, subjects, totals)

    def what(self, verdict: Verdict) -> str:
        return "accuracy drop"


@dataclass(frozen=True, slots=True)
class GroupHarm:
    """The same within each group of people."""

    name: str = "group_harm"
    unit: str = " pt"

    def subjects(self, scope: Scope) -> Sequence[str]:
        return _names(scope.groups)

    def read(self, policy: Policy, scope: Scope, subjects: Sequence[str], totals: Totals) -> list[Reading]:
        return _drops(self.name, policy, scope, subjects, totals)

    def what(self, verdict: Verdict) -> str:
        return f"accuracy drop of {verdict.group}"


@dataclass(frozen=True, slots=True)
class ClassHarm:
    """The same within each class that either arm gives.

    By their answers and not by the label, because those are known of every pair: where both agree nobody has to label.
    """

    name: str = "class_harm"
    unit: str = " pt"

    def subjects(self, scope: Scope) -> Sequence[str]:
        return scope.classes

    def read(self, policy: Policy, scope: Scope, subjects: Sequence[str], totals: Totals) -> list[Reading]:
        return _drops(self.name, policy, scope, subjects, totals)

    def what(self, verdict: Verdict) -> str:
        return f"accuracy drop where either arm says {verdict.group}"


def _drops(name: str, policy: Policy, scope: Scope, subjects: Sequence[str], totals: Totals) -> list[Reading]:
    margin = policy.guardrails.margin(name)
    table = np.array([paired(totals.get((name, subject), {})) for subject in subjects])
    if scope.detectors is None:
        evidence = drop_evidence(table, margin)
        return [
            Reading(float(value), drop_of(row), margin, int(row.sum()), int(row[3]))
            for row, value in zip(table, evidence, strict=True)
        ]
    detectors = scope.detectors.get(name, {})
    found = []
    for subject, row in zip(subjects, table, strict=True):
        detector = detectors.get(subject, Detector())
        drop = drop_of(row) if detector.drop is None else detector.drop
        found.append(Reading(detector.evidence, drop, margin, int(row.sum()), int(row[3]), late=True))
    return found


def paired(counts: Counts) -> Floats:
    """Counts of d = 1, -1, 0 and missing. Shape [4]."""
    return np.array([counts.get(d, 0) for d in (1, -1, 0, MISSING)], dtype=np.float64)


def drop_of(row: Floats) -> float | None:
    """The drop among the known outcomes of such counts."""
    known = float(row[:3].sum())
    return float(row[0] - row[1]) / known if known else None


# -- answers alone --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DemographicParity:
    """The gap between a group's favourable rate and everybody else's, against full precision's."""

    name: str = "demographic_parity"
    unit: str = " pt"

    def subjects(self, scope: Scope) -> Sequence[str]:
        return _names(scope.groups)

    def read(self, policy: Policy, scope: Scope, subjects: Sequence[str], totals: Totals) -> list[Reading]:
        margin = policy.guardrails.demographic_parity.margin
        groups = {group.name: group for group in scope.groups}
        return [
            _parity(groups[subject], margin, totals.get((self.name, subject), {})) for subject in subjects
        ]

    def what(self, verdict: Verdict) -> str:
        return f"favourable-rate gap of {verdict.group} {'moved by' if verdict.both_ways else 'wider by'}"


def _parity(group: GroupSpec, margin: float, counts: Counts) -> Reading:
    row = np.array([counts.get(z, 0) for z in (-2, -1, 0, 1, 2, MISSING)], dtype=np.float64)
    known = float(row[:5].sum())
    moved = float(row[:5] @ np.array([-2.0, -1.0, 0.0, 1.0, 2.0])) / known if known else 0.0
    if group.established:
        evidence = gap_evidence(row, margin, group.gap, group.uncertainty)
        estimate = abs(group.gap + moved) - abs(group.gap)
    else:
        evidence = moved_evidence(row, margin, margin)
        estimate = abs(moved)
    return Reading(
        evidence,
        estimate if known else None,
        margin,
        int(row.sum()),
        int(row[5]),
        both_ways=not group.established,
    )


# -- how the candidate serves ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LatencyP95:
    """The share of the candidate's requests over the limit, averaged over blocks of 10 s: see the policy's section."""

    name: str = "latency_p95"
    unit: str = "%"

    def subjects(self, scope: Scope) -> Sequence[str]:
        return (EVERYBODY,)

    def read(self, policy: Policy, scope: Scope, subjects: Sequence[str], totals: Totals) -> list[Reading]:
        blocks = totals.get((LATENCY_BLOCKS, EVERYBODY), {})
        shares = {share / 1000: times for share, times in blocks.items()}
        return [Reading(excess_evidence(shares, LATENCY_SHARE), _mean(blocks), LATENCY_SHARE, _size(blocks))]

    def what(self, verdict: Verdict) -> str:
        return "share over the latency limit, averaged over 10 s blocks:"


@dataclass(frozen=True, slots=True)
class LatencyVersusControl:
    """The same share, minus that of control's requests in the same blocks."""

    name: str = "latency_vs_control"
    unit: str = " pt"

    def subjects(self, scope: Scope) -> Sequence[str]:
        return (EVERYBODY,)

    def read(self, policy: Policy, scope: Scope, subjects: Sequence[str], totals: Totals) -> list[Reading]:
        margin = policy.guardrails.latency_vs_control.margin
        blocks = totals.get((CONTROL_BLOCKS, EVERYBODY), {})
        values = tuple(sorted(blocks))
        evidence = 0.0
        if values:
            outcomes = tuple(value / 1000 for value in values)
            counts = [blocks[value] for value in values]
            evidence = float(log_evidence(counts, outcomes, margin, -1.0, 1.0, above=True))
        return [Reading(evidence, _mean(blocks), margin, _size(blocks))]

    def what(self, verdict: Verdict) -> str:
        return "share over the latency limit above control's, averaged over 10 s blocks:"


def _size(blocks: Counts) -> int:
    return sum(blocks.values())


def _mean(blocks: Counts) -> float | None:
    n = _size(blocks)
    return sum(share * times for share, times in blocks.items()) / 1000 / n if n else None


@dataclass(frozen=True, slots=True)
class TreatmentErrors:
    """Requests of the candidate's that full precision had to answer."""

    name: str = "treatment_errors"
    unit: str = "%"

    def subjects(self, scope: Scope) -> Sequence[str]:
        return (EVERYBODY,)

    def read(self, policy: Policy, scope: Scope, subjects: Sequence[str], totals: Totals) -> list[Reading]:
        ratio = policy.guardrails.treatment_errors.ratio
        seen = totals.get((self.name, EVERYBODY), {})
        failed, n = seen.get(1, 0), seen.get(0, 0) + seen.get(1, 0)
        evidence = excess_evidence({0.0: n - failed, 1.0: failed}, ratio)
        return [Reading(evidence, failed / n if n else None, ratio, n)]

    def what(self, verdict: Verdict) -> str:
        return "failing requests"


@dataclass(frozen=True, slots=True)
class SampleRatio:
    """Requests on either arm against the split that was asked for."""

    name: str = SAMPLE_RATIO
    unit: str = " pt"

    def subjects(self, scope: Scope) -> Sequence[str]:
        return (EVERYBODY,)

    def read(self, policy: Policy, scope: Scope, subjects: Sequence[str], totals: Totals) -> list[Reading]:
        evidence = excess = 0.0
        n = 0
        for (tallied, weight), counts in totals.items():
            share = int(weight) / 100 if tallied == SAMPLE_RATIO else 0.0
            if 0 < share < 1:
                treated, others = counts.get(1, 0), counts.get(0, 0)
                # The product of one e-process for each split: which one comes next depends on the past alone.
                evidence += mismatch_evidence(treated, others, share)
                excess += abs(treated - share * (treated + others))
                n += treated + others
        return [Reading(evidence, excess / n if n else None, 0.0, n)]

    def what(self, verdict: Verdict) -> str:
        return "share of requests on the wrong arm"


GUARDRAILS: tuple[Guardrail, ...] = (
    AccuracyDrop(),
    GroupHarm(),
    ClassHarm(),
    DemographicParity(),
    LatencyP95(),
    LatencyVersusControl(),
    TreatmentErrors(),
    SampleRatio(),
)
"""All that there are, in the order in which they are shown."""


LATE = ("accuracy_drop", "group_harm", "class_harm")
"""Those that become detectors of late harm once the candidate is promoted."""


def _names(groups: Sequence[GroupSpec]) -> tuple[str, ...]:
    return tuple(group.name for group in groups)
