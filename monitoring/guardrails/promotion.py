"""Whether a candidate may be promoted: everybody and each larger group proven good enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from monitoring.evidence import LOG10, Floats, agreement_evidence, more_needed, no_drop_evidence
from monitoring.guardrails.rules import drop_of, paired
from monitoring.guardrails.verdicts import Certificate, Promotion, Scope, Totals
from monitoring.policy import Policy
from monitoring.tally import EVERYBODY, MISSING, Counts

__all__ = ["promotion"]

_LABEL_SHARE = 0.8
"""Of the promotion error rate, what proof by labels may use; proof by agreement may use the rest."""


def promotion(policy: Policy, scope: Scope, totals: Totals) -> tuple[tuple[Certificate, ...], Promotion]:
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
    overall = _proof(totals, limit, EVERYBODY, 1.0, guards.accuracy_drop.margin, scope.quality.scale)
    by_group = [_proof(totals, limit, g.name, g.share, guards.group_harm.margin) for g in scope.groups]
    needed = [overall]
    if guards.group_harm.enabled:
        needed += [proof for proof in by_group if proof.share >= policy.promotion_min_group_share]
    everybody = overall.best
    lacking = [proof for proof in needed if not proof.reached]
    # All are shown, also those too small to wait for.
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
    """What there is to prove about everybody or a group, and the ways to it with the counts they rest on.

    Attributes:
        margin: in the metric of quality; `scale` makes one of outcomes of it.
    """

    group: str
    share: float
    margin: float
    scale: float
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
            more_needed(_evidence_of(c.guardrail, self.margin / self.scale), row, c.limit_log10 * LOG10)
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


def _proof(
    totals: Totals, limit: Mapping[str, float], group: str, share: float, margin: float, scale: float = 1.0
) -> _Proof:
    certificates, rows = [], []
    for guardrail, limit_log10 in limit.items():
        if guardrail == "accuracy_drop":
            row = paired(totals.get(("group_harm" if group else guardrail, group), {}))
            drop = drop_of(row)
            estimate = None if drop is None else drop * scale
        else:
            row = _answers(totals.get((guardrail, group), {}))
            estimate = _share(row)
        # No weight is over the scale, so that of the metric too a drop is at most scale * P(they disagree).
        evidence = _evidence_of(guardrail, margin / scale)(row) / LOG10
        certificates.append(Certificate(guardrail, group, evidence, limit_log10, estimate, int(row.sum())))
        rows.append(row)
    return _Proof(group, share, margin, scale, tuple(certificates), tuple(rows))


def _evidence_of(guardrail: str, margin: float) -> Callable[[Floats], float]:
    by_label = guardrail == "accuracy_drop"
    return lambda counts: float((no_drop_evidence if by_label else agreement_evidence)(counts, margin))


def _answers(counts: Counts) -> Floats:
    return np.array([counts.get(x, 0) for x in (1, 0, MISSING)], dtype=np.float64)


def _share(row: Floats) -> float | None:
    known = float(row[:2].sum())
    return float(row[0]) / known if known else None
