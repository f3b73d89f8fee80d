"""The guardrails: for each what it counts, whom it judges, and what the counts say.

`tests/monitoring/test_guardrail_contract.py` says what every one of them must hold to.
"""

from __future__ import annotations

import math
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
    share_bounds,
    shares_evidence,
)
from monitoring.groups import GroupSpec
from monitoring.guardrails.verdicts import Scope, Totals, Verdict
from monitoring.policy import Policy
from monitoring.quality import Quality
from monitoring.tally import (
    CONTROL_BLOCKS,
    EVERYBODY,
    LATENCY_BLOCKS,
    MISSING,
    NO_CLASS,
    ODDS,
    RESOURCE_BLOCKS,
    REWARD,
    SAMPLE_RATIO,
    Counts,
)

__all__ = ["GUARDRAILS", "LATE", "Guardrail", "Reading", "drop_of", "paired", "quality_of"]

LATENCY_SHARE = 0.05
COSTLY_SHARE = 0.5
REFERENCE_RISK = 0.001
"""Chance that the reference rows show any of a guardrail's bins further off than is allowed for."""


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
    of: str = "accuracy"


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
        return f"{verdict.of} drop"


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
        return f"{verdict.of} drop of {verdict.group}"


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
    quality = quality_of(name, scope)
    table = np.array([paired(totals.get((name, subject), {})) for subject in subjects])
    late = scope.detectors is not None
    detectors = (scope.detectors or {}).get(name, {})
    found = []
    for subject, row, before in zip(
        subjects, table, drop_evidence(table, margin / quality.scale), strict=True
    ):
        evidence, drop = float(before), drop_of(row)
        if late:
            detector = detectors.get(subject, Detector())
            evidence, drop = detector.evidence, drop if detector.drop is None else detector.drop
        scaled = None if drop is None else drop * quality.scale
        found.append(
            Reading(evidence, scaled, margin, int(row.sum()), int(row[3]), late=late, of=quality.words)
        )
    return found


def quality_of(name: str, scope: Scope) -> Quality:
    """What the drop that a guardrail limits is measured in: the workload's metric for everybody, else accuracy.

    Within a group the classes have other shares, so that everybody's weights would make another metric of it.
    """
    return scope.quality if name == "accuracy_drop" else Quality()


def paired(counts: Counts) -> Floats:
    """Counts of d = 1, -1, 0 and missing. Shape [4]."""
    return np.array([counts.get(d, 0) for d in (1, -1, 0, MISSING)], dtype=np.float64)


def drop_of(row: Floats) -> float | None:
    """The drop among the known outcomes of such counts."""
    known = float(row[:3].sum())
    return float(row[0] - row[1]) / known if known else None


@dataclass(frozen=True, slots=True)
class EqualizedOdds:
    """How far a group's true and false positive rates have moved against everybody else's."""

    name: str = "equalized_odds"
    unit: str = " pt"

    def subjects(self, scope: Scope) -> Sequence[str]:
        return _names(scope.groups)

    def read(self, policy: Policy, scope: Scope, subjects: Sequence[str], totals: Totals) -> list[Reading]:
        margin = policy.guardrails.equalized_odds.margin
        found = []
        for subject in subjects:
            rows = [matched(totals.get((tally, subject), {})) for tally in ODDS]
            # The mean of two e-values is one: it speaks where either rate has moved.
            evidence = np.logaddexp.reduce([moved_evidence(row, margin, margin) for row in rows]) - math.log(
                2
            )
            moves = [
                (abs(move), f"{'rise' if move > 0 else 'fall'} of the {tally.replace('_', ' ')}")
                for tally, row in zip(ODDS, rows, strict=True)
                if (move := moved_by(row)) is not None
            ]
            largest, which = max(moves, default=(None, "movement of a rate"))
            n, missing = sum(int(row.sum()) for row in rows), sum(int(row[5]) for row in rows)
            found.append(Reading(float(evidence), largest, margin, n, missing, both_ways=True, of=which))
        return found

    def what(self, verdict: Verdict) -> str:
        return f"{verdict.of} of {verdict.group} against the others'"


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
    row = matched(counts)
    seen = moved_by(row)
    moved = seen or 0.0
    if group.established:
        evidence = gap_evidence(row, margin, group.gap, group.uncertainty)
        estimate = abs(group.gap + moved) - abs(group.gap)
    else:
        evidence = moved_evidence(row, margin, margin)
        estimate = abs(moved)
    return Reading(
        evidence,
        None if seen is None else estimate,
        margin,
        int(row.sum()),
        int(row[5]),
        both_ways=not group.established,
    )


def matched(counts: Counts) -> Floats:
    """Counts of z = -2, -1, 0, 1, 2 and missing. Shape [6]."""
    return np.array([counts.get(z, 0) for z in (-2, -1, 0, 1, 2, MISSING)], dtype=np.float64)


def moved_by(row: Floats) -> float | None:
    """The mean of the known z among such counts."""
    known = float(row[:5].sum())
    return float(row[:5] @ np.array([-2.0, -1.0, 0.0, 1.0, 2.0])) / known if known else None


@dataclass(frozen=True, slots=True)
class EstimatedDrop:
    """The drop that full precision's calibrated confidence lets expect where the arms disagree."""

    name: str = "estimated_drop"
    unit: str = " pt"

    def subjects(self, scope: Scope) -> Sequence[str]:
        return (EVERYBODY,) if scope.baseline.calibration else ()

    def read(self, policy: Policy, scope: Scope, subjects: Sequence[str], totals: Totals) -> list[Reading]:
        margin = policy.guardrails.estimated_drop.margin
        row = paired(totals.get((self.name, EVERYBODY), {}))
        evidence = float(drop_evidence(row, margin))
        return [Reading(evidence, drop_of(row), margin, int(row.sum()), int(row[3])) for _ in subjects]

    def what(self, verdict: Verdict) -> str:
        return "accuracy drop, estimated without labels,"


@dataclass(frozen=True, slots=True)
class PredictionDrift:
    """Full precision's answers against those it gave on the reference rows: the world, and not the candidate."""

    name: str = "prediction_drift"
    unit: str = " pt"

    def subjects(self, scope: Scope) -> Sequence[str]:
        return (EVERYBODY,) if scope.baseline.answers else ()

    def read(self, policy: Policy, scope: Scope, subjects: Sequence[str], totals: Totals) -> list[Reading]:
        margin, baseline = policy.guardrails.prediction_drift.margin, scope.baseline
        counts = totals.get((self.name, EVERYBODY), {})
        bins = len(baseline.answers)
        return [_drift(counts, baseline.answers, baseline.rows, margin, bins) for _ in subjects]

    def what(self, verdict: Verdict) -> str:
        return "share of a class among full precision's answers, off the reference rows' by"


@dataclass(frozen=True, slots=True)
class InputDrift:
    """The records' fields against those of the reference rows."""

    name: str = "input_drift"
    unit: str = " pt"

    def subjects(self, scope: Scope) -> Sequence[str]:
        return tuple(column.name for column in scope.baseline.columns)

    def read(self, policy: Policy, scope: Scope, subjects: Sequence[str], totals: Totals) -> list[Reading]:
        margin, baseline = policy.guardrails.input_drift.margin, scope.baseline
        shares = {column.name: column.shares for column in baseline.columns}
        bins = sum(map(len, shares.values()))
        return [
            _drift(totals.get((self.name, name), {}), shares[name], baseline.rows, margin, bins)
            for name in subjects
        ]

    def what(self, verdict: Verdict) -> str:
        return f"share of a range of {verdict.group}, off the reference rows' by"


def _drift(counts: Counts, shares: tuple[float, ...], rows: int, margin: float, bins: int) -> Reading:
    """Counts by bin, with -1 for what is missing, against the bins' shares of so many reference rows.

    Args:
        bins: how many there are in all that the guardrail looks at, for chance has as many goes.
    """
    seen = np.array([counts.get(place, 0) for place in range(len(shares))], dtype=np.float64)
    missing, known = counts.get(NO_CLASS, 0), float(seen.sum())
    low, high = share_bounds(shares, rows, REFERENCE_RISK / (2 * bins))
    evidence = shares_evidence(seen, missing, low - margin, high + margin)
    furthest = float(np.abs(seen / known - np.array(shares)).max()) if known else None
    return Reading(evidence, furthest, margin, int(known) + missing, missing)


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
class ResourceUse:
    """The share of blocks in which a record took the candidate's model too long, against full precision's."""

    name: str = "resource_use"
    unit: str = "%"

    def subjects(self, scope: Scope) -> Sequence[str]:
        return (EVERYBODY,)

    def read(self, policy: Policy, scope: Scope, subjects: Sequence[str], totals: Totals) -> list[Reading]:
        blocks = totals.get((RESOURCE_BLOCKS, EVERYBODY), {})
        over, n = blocks.get(1, 0), blocks.get(0, 0) + blocks.get(1, 0)
        evidence = excess_evidence({0.0: n - over, 1.0: over}, COSTLY_SHARE)
        return [Reading(evidence, over / n if n else None, COSTLY_SHARE, n)]

    def what(self, verdict: Verdict) -> str:
        return "share of 10 s blocks in which the candidate's model took too long for a record:"


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


# -- what users make of the answers ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reward:
    """The mean reward of control's requests, minus that of the candidate's."""

    name: str = REWARD
    unit: str = " pt"

    def subjects(self, scope: Scope) -> Sequence[str]:
        return (EVERYBODY,)

    def read(self, policy: Policy, scope: Scope, subjects: Sequence[str], totals: Totals) -> list[Reading]:
        margin = policy.guardrails.reward.margin
        matches = totals.get((REWARD, EVERYBODY), {})
        hundredths = tuple(sorted(matches))
        if not hundredths:
            return [Reading(0.0, None, margin, 0)]
        values = tuple(z / 100 for z in hundredths)
        counts = [matches[z] for z in hundredths]
        evidence = float(log_evidence(counts, values, margin, -1.0, 1.0, above=True))
        lower = sum(z * n for z, n in matches.items()) / 100 / sum(counts)
        return [Reading(evidence, lower, margin, sum(counts))]

    def what(self, verdict: Verdict) -> str:
        return "mean reward lower by"


GUARDRAILS: tuple[Guardrail, ...] = (
    AccuracyDrop(),
    GroupHarm(),
    ClassHarm(),
    DemographicParity(),
    LatencyP95(),
    LatencyVersusControl(),
    TreatmentErrors(),
    SampleRatio(),
    EqualizedOdds(),
    EstimatedDrop(),
    ResourceUse(),
    PredictionDrift(),
    InputDrift(),
    Reward(),
)
"""All that there are, in the order in which they are shown."""


LATE = ("accuracy_drop", "group_harm", "class_harm")
"""Those that become detectors of late harm once the candidate is promoted."""


def _names(groups: Sequence[GroupSpec]) -> tuple[str, ...]:
    return tuple(group.name for group in groups)
