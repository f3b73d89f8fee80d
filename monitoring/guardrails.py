"""From counts to verdicts: what each guardrail has to say about a rollout."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from monitoring.evidence import (
    LOG10,
    Floats,
    agreement_evidence,
    drop_evidence,
    excess_evidence,
    gap_evidence,
    more_needed,
    moved_evidence,
    no_drop_evidence,
)
from monitoring.groups import GroupSpec, group_specs
from monitoring.policy import Action, Policy, parse_policy
from monitoring.tally import EVERYBODY, LATENCY_BLOCKS, MISSING, Counts

__all__ = [
    "Assessment",
    "Certificate",
    "GroupSpec",
    "Policy",
    "Promotion",
    "Totals",
    "Verdict",
    "describe",
    "evaluate",
    "group_specs",
    "limits",
    "parse_policy",
]

Totals = Mapping[tuple[str, str], Counts]
"""(guardrail, group) -> counts of an epoch."""

GUARDRAILS = ("accuracy_drop", "group_harm", "demographic_parity", "latency_p95", "treatment_errors")
BY_GROUP = ("group_harm", "demographic_parity")
LATENCY_SHARE = 0.05
MIN_BLOCK_REQUESTS = 20
_LABEL_SHARE = 0.8
"""Of the promotion error rate, what proof by labels may use; proof by agreement may use the rest."""
SUSPICION_LOG10 = 1.0
"""Evidence for rolling back at which a rollout stops climbing."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One guardrail's evidence for rolling back, for one group ("" is everybody).

    Attributes:
        evidence_log10, limit_log10: log10 of the e-value, and where the guardrail acts.
        estimate: point estimate of what it limits; None before anything was counted.
        tolerated: the margin, ratio or share it tolerates.
        n, missing: outcomes counted, and how many of them were never known. For latency they are blocks.
        both_ways: of demographic parity: it limits a movement in either direction, because the reference rows
            cannot say on which side of zero the group's gap was.
    """

    guardrail: str
    group: str
    action: Action
    evidence_log10: float
    limit_log10: float
    estimate: float | None
    tolerated: float
    n: int
    missing: int
    both_ways: bool = False

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

    def crossed(self, action: Action) -> list[Verdict]:
        """The guardrails with this action that act, the one furthest past its limit first."""
        found = [v for v in self.verdicts if v.crossed and v.action == action]
        return sorted(found, key=lambda v: v.limit_log10 - v.evidence_log10)

    @property
    def suspicion(self) -> Verdict | None:
        """The guardrail most suspicious of the candidate, if any is enough so to stop its climb."""
        found = [v for v in self.verdicts if v.evidence_log10 >= SUSPICION_LOG10 and v.action != "alert"]
        return max(found, key=lambda v: v.evidence_log10, default=None)


def limits(policy: Policy, groups: Sequence[GroupSpec]) -> dict[tuple[str, str], float]:
    """(guardrail, group) -> log10 of the e-value at which it acts.

    The false-rollback rate is divided among the guardrails by weight, and a guardrail's part evenly among its
    groups: acting at 1 / (w alpha) each, with all w adding up to 1, they err at most alpha together (union
    bound).
    """
    parts = {name: getattr(policy.guardrails, name) for name in GUARDRAILS}
    on = {
        name: part.weight for name, part in parts.items() if part.enabled and (groups or name not in BY_GROUP)
    }
    total = math.fsum(on.values())
    found = {}
    for name, weight in on.items():
        names = [group.name for group in groups] if name in BY_GROUP else [EVERYBODY]
        for group in names:
            found[name, group] = -math.log10(policy.false_rollback_rate * weight / total / len(names))
    return found


def evaluate(policy: Policy, groups: Sequence[GroupSpec], totals: Totals) -> Assessment:
    """Judge a rollout by its counts.

    Args:
        policy: margins, rates and actions.
        groups: the guarded groups.
        totals: the epoch's counts, as `monitoring.tally` makes them.
    """
    act_at = limits(policy, groups)
    guards = policy.guardrails
    verdicts: list[Verdict] = []
    for guardrail in ("accuracy_drop", "group_harm"):
        names = [group for name, group in act_at if name == guardrail]
        if names:
            part = guards.accuracy_drop if guardrail == "accuracy_drop" else guards.group_harm
            table = np.array([_paired(totals.get((guardrail, name), {})) for name in names])
            evidence = drop_evidence(table, part.margin) / LOG10
            for name, row, value in zip(names, table, evidence, strict=True):
                limit = act_at[guardrail, name]
                verdicts.append(
                    Verdict(
                        guardrail,
                        name,
                        part.action,
                        float(value),
                        limit,
                        _drop(row),
                        part.margin,
                        int(row.sum()),
                        int(row[3]),
                    )
                )
    verdicts += [
        _parity(policy, group, totals, act_at["demographic_parity", group.name])
        for group in groups
        if ("demographic_parity", group.name) in act_at
    ]
    if ("latency_p95", EVERYBODY) in act_at:
        verdicts.append(_latency(policy, totals, act_at["latency_p95", EVERYBODY]))
    if ("treatment_errors", EVERYBODY) in act_at:
        verdicts.append(_errors(policy, totals, act_at["treatment_errors", EVERYBODY]))
    certificates, promotion = _promotion(policy, groups, totals)
    return Assessment(tuple(verdicts), certificates, promotion)


def describe(verdict: Verdict) -> str:
    """One line: what was seen, what is tolerated, and how sure that is."""
    what = {
        "accuracy_drop": "accuracy drop",
        "group_harm": f"accuracy drop of {verdict.group}",
        "demographic_parity": f"favourable-rate gap of {verdict.group} "
        + ("moved by" if verdict.both_ways else "wider by"),
        "latency_p95": "share over the latency limit, averaged over 10 s blocks:",
        "treatment_errors": "failing requests",
    }[verdict.guardrail]
    unit = "%" if verdict.guardrail in {"latency_p95", "treatment_errors"} else " pt"
    seen = "unknown" if verdict.estimate is None else f"{100 * verdict.estimate:z.1f}{unit}"
    return (
        f"{what} {seen} ({100 * verdict.tolerated:g}{unit} tolerated): "
        f"evidence 10^{verdict.evidence_log10:.2f}, limit 10^{verdict.limit_log10:.2f}"
    )


def _parity(policy: Policy, group: GroupSpec, totals: Totals, limit: float) -> Verdict:
    part = policy.guardrails.demographic_parity
    counts = totals.get(("demographic_parity", group.name), {})
    row = np.array([counts.get(z, 0) for z in (-2, -1, 0, 1, 2, MISSING)], dtype=np.float64)
    known = float(row[:5].sum())
    moved = float(row[:5] @ np.array([-2.0, -1.0, 0.0, 1.0, 2.0])) / known if known else 0.0
    if group.established:
        evidence = gap_evidence(row, part.margin, group.gap, group.uncertainty)
        estimate = abs(group.gap + moved) - abs(group.gap)
    else:
        evidence = moved_evidence(row, part.margin, part.margin)
        estimate = abs(moved)
    return Verdict(
        "demographic_parity",
        group.name,
        part.action,
        evidence / LOG10,
        limit,
        estimate if known else None,
        part.margin,
        int(row.sum()),
        int(row[5]),
        both_ways=not group.established,
    )


def _latency(policy: Policy, totals: Totals, limit: float) -> Verdict:
    """On blocks, each counting alike however many requests it had: see `LatencyP95`."""
    blocks = totals.get((LATENCY_BLOCKS, EVERYBODY), {})
    n = sum(blocks.values())
    return Verdict(
        "latency_p95",
        EVERYBODY,
        policy.guardrails.latency_p95.action,
        excess_evidence({share / 1000: times for share, times in blocks.items()}, LATENCY_SHARE) / LOG10,
        limit,
        sum(share * times for share, times in blocks.items()) / 1000 / n if n else None,
        LATENCY_SHARE,
        n,
        0,
    )


def _errors(policy: Policy, totals: Totals, limit: float) -> Verdict:
    part = policy.guardrails.treatment_errors
    seen = totals.get(("treatment_errors", EVERYBODY), {})
    failed, n = seen.get(1, 0), seen.get(0, 0) + seen.get(1, 0)
    evidence = excess_evidence({0.0: n - failed, 1.0: failed}, part.ratio) / LOG10
    return Verdict(
        "treatment_errors",
        EVERYBODY,
        part.action,
        evidence,
        limit,
        failed / n if n else None,
        part.ratio,
        n,
        0,
    )


def _promotion(
    policy: Policy, groups: Sequence[GroupSpec], totals: Totals
) -> tuple[tuple[Certificate, ...], Promotion]:
    """Everybody and every larger group have to be proven good enough.

    All proofs are needed, so each may err at the full rate: the candidate that is promoted wrongly has to pass the
    test of the very part in which it is too bad (an intersection-union test; Berger 1982). The two ways to prove one
    part share that part's rate, because either will do.
    """
    guards = policy.guardrails
    ways = {
        "accuracy_drop": _LABEL_SHARE * guards.accuracy_drop.enabled,
        "disagreement": (1 - _LABEL_SHARE) * guards.disagreement.enabled,
    }
    limit = {
        name: -math.log10(policy.promotion_error_rate * share / sum(ways.values()))
        for name, share in ways.items()
        if share
    }
    overall = _proof(totals, limit, EVERYBODY, 1.0, guards.accuracy_drop.margin)
    by_group = [_proof(totals, limit, g.name, g.share, guards.group_harm.margin) for g in groups]
    needed = [overall]
    if guards.group_harm.enabled:
        needed += [proof for proof in by_group if proof.share >= policy.promotion_min_group_share]
    everybody = overall.best
    lacking = [proof for proof in needed if not proof.reached]
    # All groups are shown, also those too small to wait for.
    certificates = tuple(certificate for proof in (overall, *by_group) for certificate in proof.certificates)
    if lacking:
        worst = min(lacking, key=lambda proof: proof.progress)
        more = worst.more_pairs()
        return certificates, Promotion(False, everybody, worst.sentence(more), more)
    sentence = f"{everybody.guardrail} proves a drop under {100 * guards.accuracy_drop.margin:g} pt"
    if len(needed) > 1:
        sentence += f", and under {100 * guards.group_harm.margin:g} pt in {len(needed) - 1} groups"
    return certificates, Promotion(True, everybody, sentence, 0)


@dataclass(frozen=True, slots=True)
class _Proof:
    """What there is to prove about everybody or one group, and the ways to it with the counts they rest on."""

    group: str
    share: float
    margin: float
    certificates: tuple[Certificate, ...]
    rows: tuple[Floats, ...]

    @property
    def reached(self) -> bool:
        return any(certificate.reached for certificate in self.certificates)

    @property
    def progress(self) -> float:
        return max(c.evidence_log10 / c.limit_log10 for c in self.certificates)

    @property
    def best(self) -> Certificate:
        """The certificate that is nearest, of those that rest on anything."""
        return max(self.certificates, key=lambda c: (c.n > 0, c.evidence_log10 - c.limit_log10))

    def more_pairs(self) -> int | None:
        """About how many more pairs, of everybody's, bring one of the certificates; None when none ever will."""
        found = [
            more_needed(_evidence_of(c.guardrail, self.margin), row, c.limit_log10 * LOG10)
            for c, row in zip(self.certificates, self.rows, strict=True)
        ]
        needed = [more for more in found if more is not None]
        return math.ceil(min(needed) / self.share) if needed else None

    def sentence(self, more: int | None) -> str:
        """What is lacking."""
        what = f"a drop under {100 * self.margin:g} pt" + (f" in {self.group}" if self.group else "")
        best = self.best
        if more is not None:
            return f"needs about {more:,} more pairs to prove {what}"
        if best.n == 0:
            return f"needs pairs to prove {what}"
        seen = "unknown" if best.estimate is None else f"{100 * best.estimate:z.1f} pt"
        return f"more pairs like these would not prove {what} ({best.guardrail} stands at {seen})"


def _proof(totals: Totals, limit: Mapping[str, float], group: str, share: float, margin: float) -> _Proof:
    certificates, rows = [], []
    for guardrail, limit_log10 in limit.items():
        if guardrail == "accuracy_drop":
            row = _paired(totals.get(("group_harm" if group else guardrail, group), {}))
            estimate = _drop(row)
        else:
            row = _answers(totals.get((guardrail, group), {}))
            estimate = _share(row)
        evidence = _evidence_of(guardrail, margin)(row) / LOG10
        certificates.append(Certificate(guardrail, group, evidence, limit_log10, estimate, int(row.sum())))
        rows.append(row)
    return _Proof(group, share, margin, tuple(certificates), tuple(rows))


def _evidence_of(guardrail: str, margin: float) -> Callable[[Floats], float]:
    by_label = guardrail == "accuracy_drop"
    return lambda counts: float((no_drop_evidence if by_label else agreement_evidence)(counts, margin))


def _paired(counts: Counts) -> Floats:
    return np.array([counts.get(d, 0) for d in (1, -1, 0, MISSING)], dtype=np.float64)


def _answers(counts: Counts) -> Floats:
    return np.array([counts.get(x, 0) for x in (1, 0, MISSING)], dtype=np.float64)


def _drop(row: Floats) -> float | None:
    known = float(row[:3].sum())
    return float(row[0] - row[1]) / known if known else None


def _share(row: Floats) -> float | None:
    known = float(row[:2].sum())
    return float(row[0]) / known if known else None
