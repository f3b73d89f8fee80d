"""From counts to an assessment: every guardrail's verdict, and whether the candidate may be promoted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from monitoring.detector import BLOCK_PAIRS
from monitoring.evidence import LOG10
from monitoring.guardrails.promotion import promotion
from monitoring.guardrails.rules import GUARDRAILS, LATE, Guardrail
from monitoring.guardrails.verdicts import Assessment, Scope, Totals, Verdict
from monitoring.policy import Policy
from monitoring.tally import merge

__all__ = ["describe", "evaluate", "limits"]

_BY_NAME = {guardrail.name: guardrail for guardrail in GUARDRAILS}


def limits(policy: Policy, scope: Scope) -> dict[tuple[str, str], float]:
    """(guardrail, group or class) -> log10 of the e-value at which it acts.

    The false-rollback rate is divided by weight among the guardrails that may roll back, and a guardrail's part evenly
    among those whom it judges: acting at 1 / (w alpha) each, with all w adding up to 1, they err at most alpha together
    (union bound). Those that hold, alert or run dry share the same rate, of false alarms, in the same way. Once
    promoted those of paired outcomes are detectors, among whom the run length is divided in the same way: acting at
    A / w each, their weighted mean stays under A until one of them acts.
    """
    on = {
        guardrail.name: (policy.guardrails.section(guardrail.name), subjects)
        for guardrail in GUARDRAILS
        if policy.guardrails.section(guardrail.name).enabled and (subjects := guardrail.subjects(scope))
    }
    promoted = scope.detectors is not None
    total = {
        acts: math.fsum(
            section.weight for section, _ in on.values() if (section.action == "rollback") == acts
        )
        for acts in (True, False)
    }
    late = math.fsum(section.weight for name, (section, _) in on.items() if name in LATE)
    blocks = policy.promoted_run_length / BLOCK_PAIRS
    return {
        (name, subject): math.log10(blocks * late / section.weight * len(subjects))
        if promoted and name in LATE
        else -math.log10(
            policy.false_rollback_rate * section.weight / total[section.action == "rollback"] / len(subjects)
        )
        for name, (section, subjects) in on.items()
        for subject in subjects
    }


def evaluate(policy: Policy, scope: Scope, totals: Totals, earlier: Totals | None = None) -> Assessment:
    """Judge a rollout by its counts.

    Once promoted, what there was against the candidate before is not forgotten: a group too small to be proven may
    have been on its way to a verdict. The evidence of paired outcomes goes on beside the detectors, at the limits it
    had, and the one that is nearer to its limit is the verdict.

    Args:
        policy: margins, rates and actions.
        scope: who is guarded and against what; with detectors once promoted.
        totals: the epoch's counts, as `monitoring.tally` makes them.
        earlier: counts of the epoch before promotion, once promoted.
    """
    act_at = limits(policy, scope)
    before = replace(scope, detectors=None)
    lasting_at = limits(policy, before)
    whole = _together(earlier or {}, totals)
    verdicts: list[Verdict] = []
    for guardrail in GUARDRAILS:
        found = _verdicts(guardrail, policy, scope, act_at, totals)
        if scope.detectors is not None and guardrail.name in LATE:
            lasting = _verdicts(guardrail, policy, before, lasting_at, whole)
            found = [max(pair, key=_nearness) for pair in zip(found, lasting, strict=True)]
        verdicts += found
    certificates, verdict = promotion(policy, scope, totals)
    return Assessment(tuple(verdicts), certificates, verdict)


def _verdicts(
    guardrail: Guardrail,
    policy: Policy,
    scope: Scope,
    act_at: Mapping[tuple[str, str], float],
    totals: Totals,
) -> list[Verdict]:
    subjects = [subject for name, subject in act_at if name == guardrail.name]
    if not subjects:
        return []
    action = policy.guardrails.section(guardrail.name).action
    return [
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
            reading.of,
        )
        for subject, reading in zip(subjects, guardrail.read(policy, scope, subjects, totals), strict=True)
    ]


def _nearness(verdict: Verdict) -> float:
    return verdict.evidence_log10 - verdict.limit_log10


def _together(a: Totals, b: Totals) -> Totals:
    """The counts of paired outcomes of both."""
    places = {place for place in (*a, *b) if place[0] in LATE}
    return {place: merge(a.get(place, {}), b.get(place, {})) for place in places}


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
