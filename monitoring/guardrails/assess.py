"""From counts to an assessment: every guardrail's verdict, and whether the candidate may be promoted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from monitoring.detector import BLOCK_PAIRS, Detector
from monitoring.evidence import LOG10
from monitoring.groups import GroupSpec
from monitoring.guardrails.promotion import promotion
from monitoring.guardrails.rules import GUARDRAILS, LATE
from monitoring.guardrails.verdicts import Assessment, Scope, Totals, Verdict
from monitoring.policy import Policy

__all__ = ["describe", "evaluate", "limits"]

_BY_NAME = {guardrail.name: guardrail for guardrail in GUARDRAILS}


def limits(
    policy: Policy, groups: Sequence[GroupSpec], classes: Sequence[str] = (), *, promoted: bool = False
) -> dict[tuple[str, str], float]:
    """(guardrail, group or class) -> log10 of the e-value at which it acts.

    The false-rollback rate is divided among the guardrails by weight, and a guardrail's part evenly among those
    whom it judges: acting at 1 / (w alpha) each, with all w adding up to 1, they err at most alpha together (union
    bound). Once promoted those of paired outcomes are detectors, among whom the run length is divided in the same way:
    acting at A / w each, their weighted mean stays under A until one of them acts.
    """
    scope = Scope(tuple(groups), tuple(classes))
    on = {
        guardrail.name: (policy.guardrails.section(guardrail.name).weight, subjects)
        for guardrail in GUARDRAILS
        if policy.guardrails.section(guardrail.name).enabled and (subjects := guardrail.subjects(scope))
    }
    total = math.fsum(weight for weight, _ in on.values())
    late = math.fsum(weight for name, (weight, _) in on.items() if name in LATE) if promoted else 0.0
    blocks = policy.promoted_run_length / BLOCK_PAIRS
    return {
        (name, subject): math.log10(blocks * late / weight * len(subjects))
        if promoted and name in LATE
        else -math.log10(policy.false_rollback_rate * weight / total / len(subjects))
        for name, (weight, subjects) in on.items()
        for subject in subjects
    }


def evaluate(
    policy: Policy,
    groups: Sequence[GroupSpec],
    totals: Totals,
    classes: Sequence[str] = (),
    detectors: Mapping[str, Mapping[str, Detector]] | None = None,
) -> Assessment:
    """Judge a rollout by its counts.

    Args:
        policy: margins, rates and actions.
        groups, classes: who is guarded.
        totals: the epoch's counts, as `monitoring.tally` makes them.
        detectors: guardrail -> group -> detector of late harm, once promoted; None before.
    """
    scope = Scope(tuple(groups), tuple(classes), detectors)
    act_at = limits(policy, groups, classes, promoted=detectors is not None)
    verdicts: list[Verdict] = []
    for guardrail in GUARDRAILS:
        subjects = [subject for name, subject in act_at if name == guardrail.name]
        if not subjects:
            continue
        action = policy.guardrails.section(guardrail.name).action
        readings = guardrail.read(policy, scope, subjects, totals)
        verdicts += [
            Verdict(
                guardrail.name,
                subject,
                action,
                reading.evidence / LOG10,
                act_at[guardrail.name, subject],
                reading.estimate,
                reading.tolerated,
                reading.n,
                reading.missing,
                reading.both_ways,
                reading.late,
            )
            for subject, reading in zip(subjects, readings, strict=True)
        ]
    certificates, verdict = promotion(policy, scope, totals)
    return Assessment(tuple(verdicts), certificates, verdict)


def describe(verdict: Verdict) -> str:
    """One line: what was seen, what is tolerated, and how sure that is."""
    guardrail = _BY_NAME[verdict.guardrail]
    unit = guardrail.unit
    seen = "unknown" if verdict.estimate is None else f"{100 * verdict.estimate:z.1f}{unit}"
    what = guardrail.what(verdict) + (" of late" if verdict.late else "")
    return (
        f"{what} {seen} ({100 * verdict.tolerated:g}{unit} tolerated): "
        f"evidence 10^{verdict.evidence_log10:.2f}, limit 10^{verdict.limit_log10:.2f}"
    )
