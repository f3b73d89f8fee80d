"""Whether a candidate may be promoted: everybody and each larger group proven good enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from monitoring.evidence import LOG10, Floats, agreement_evidence, more_needed, no_drop_evidence
from monitoring.guardrails.rules import drop_of, paired
from monitoring.guardrails.verdicts import Certificate, Promotion, Scope, Totals
from monitoring.policy import Policy
from monitoring.tally import CLASS_DISAGREEMENT, EVERYBODY, MISSING, Counts

__all__ = ["promotion"]

_LABEL_SHARE = 0.8
"""Of the promotion error rate, what proof by labels may use; proof by agreement may use the rest."""


def promotion(policy: Policy, scope: Scope, totals: Totals) -> tuple[tuple[Certificate, ...], Promotion]:
    """Everybody, and every larger group and class, have to be proven good enough.

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
    overall = _proof(totals, limit, _EVERYBODY, EVERYBODY, 1.0, guards.accuracy_drop.margin)
    by_group = [
        _proof(totals, limit, _GROUP, g.name, g.share, guards.group_harm.margin) for g in scope.groups
    ]
    by_class = [
        _proof(totals, limit, _CLASS, name, share, guards.class_harm.margin)
        for name, share in _class_shares(scope.classes, totals).items()
    ]
    needed = [overall]
    for part, proofs in ((guards.group_harm, by_group), (guards.class_harm, by_class)):
        if part.enabled:
            needed += [proof for proof in proofs if proof.share >= policy.promotion_min_group_share]
    everybody = overall.best
    lacking = [proof for proof in needed if not proof.reached]
    # All are shown, also those too small to wait for.
    certificates = tuple(
        certificate for proof in (overall, *by_group, *by_class) for certificate in proof.certificates
    )
    if lacking:
        worst = min(lacking, key=lambda proof: proof.progress)
        more = worst.more_pairs()
        return certificates, Promotion(False, everybody, worst.sentence(more), more)
    sentence = f"{everybody.guardrail} proves a drop under {100 * guards.accuracy_drop.margin:g} pt"
    for what, kind, part in (("groups", _GROUP, guards.group_harm), ("classes", _CLASS, guards.class_harm)):
        number = sum(proof.kind is kind for proof in needed)
        if number:
            sentence += f", and under {100 * part.margin:g} pt in {number} {what}"
    return certificates, Promotion(True, everybody, sentence, 0)


@dataclass(frozen=True, slots=True)
class _Kind:
    """Where the counts of such a part are: of answers compared with labels, and of answers alone."""

    paired: str
    answers: str


_EVERYBODY = _Kind("accuracy_drop", "disagreement")
_GROUP = _Kind("group_harm", "disagreement")
_CLASS = _Kind("class_harm", CLASS_DISAGREEMENT)


def _class_shares(classes: Sequence[str], totals: Totals) -> dict[str, float]:
    """How often full precision gives each class, among the pairs so far."""
    seen = {name: sum(totals.get((CLASS_DISAGREEMENT, name), {}).values()) for name in classes}
    total = sum(seen.values())
    return {name: number / total if total else 0.0 for name, number in seen.items()}


@dataclass(frozen=True, slots=True)
class _Proof:
    """What there is to prove about everybody, a group or a class, and the ways to it with the counts they rest on."""

    kind: _Kind
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
        where = f" where full precision says {self.group}" if self.kind is _CLASS else f" in {self.group}"
        what = f"a drop under {100 * self.margin:g} pt" + (where if self.group else "")
        best = self.best
        if more is not None:
            return f"needs about {more:,} more pairs to prove {what}"
        if best.n == 0:
            return f"needs pairs to prove {what}"
        seen = "unknown" if best.estimate is None else f"{100 * best.estimate:z.1f} pt"
        return f"more pairs like these would not prove {what} ({best.guardrail} stands at {seen})"


def _proof(
    totals: Totals, limit: Mapping[str, float], kind: _Kind, group: str, share: float, margin: float
) -> _Proof:
    certificates, rows = [], []
    for guardrail, limit_log10 in limit.items():
        if guardrail == "accuracy_drop":
            row = paired(totals.get((kind.paired, group), {}))
            estimate = drop_of(row)
        else:
            row = _answers(totals.get((kind.answers, group), {}))
            estimate = _share(row)
        evidence = _evidence_of(guardrail, margin)(row) / LOG10
        certificates.append(Certificate(guardrail, group, evidence, limit_log10, estimate, int(row.sum())))
        rows.append(row)
    return _Proof(kind, group, share, margin, tuple(certificates), tuple(rows))


def _evidence_of(guardrail: str, margin: float) -> Callable[[Floats], float]:
    by_label = guardrail == "accuracy_drop"
    return lambda counts: float((no_drop_evidence if by_label else agreement_evidence)(counts, margin))


def _answers(counts: Counts) -> Floats:
    return np.array([counts.get(x, 0) for x in (1, 0, MISSING)], dtype=np.float64)


def _share(row: Floats) -> float | None:
    known = float(row[:2].sum())
    return float(row[0]) / known if known else None
