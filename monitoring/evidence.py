"""Evidence as e-processes: products of bets that no lucky streak can fool.

A bet on a bounded outcome x in [low, high] against the hypothesis "its mean, given the past, is at most m"
pays 1 + lambda (x - m) with 0 <= lambda < 1 / (m - low): never negative, and at most 1 on average when the
hypothesis holds. The running product is then a non-negative supermartingale that starts at 1, and by
Ville's inequality P(it ever reaches 1/alpha) <= alpha: no minimum sample, no normal approximation, and
looking at it at every moment costs nothing. (Waudby-Smith & Ramdas, "Estimating means of bounded random
variables by betting", JRSS-B 2024, arXiv:2010.09686, sections 2 and 4; Ville, "Etude critique de la notion de
collectif", 1939.) Betting against "at least m" is the same with the sign turned and lambda < 1 / (high - m).

The best lambda depends on the unknown drop, so 24 fixed ones are played, each with its share of the capital.
Fixed bets make the product depend on the counts of each outcome alone: order-free integers, added across
workers and restarts. Everything is computed in natural logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

BETS = 24
SMALLEST, LARGEST = 0.01, 0.98
"""The bets, as shares of the largest lambda that is allowed."""
BOLD, BOLD_CAPITAL = 0.1, 0.85
"""So much of the capital is on the bets of at least that share. The best bet is about the excess over the margin,
divided by the share of unequal outcomes: it is smaller only where one is tiny beside the other, and then the rest has
to do."""

LOG10 = math.log(10.0)


def bet_grid(bound: float) -> Floats:
    """The 24 bets: a geometric grid from 1% to 98% of `bound`. Shape [24]."""
    return bound * np.geomspace(SMALLEST, LARGEST, BETS)


_SHARES = bet_grid(1.0)
_LOG_LOST = np.log1p(-_SHARES)


def _log_capital() -> Floats:
    bold = _SHARES >= BOLD
    return np.asarray(np.log(np.where(bold, BOLD_CAPITAL / bold.sum(), (1 - BOLD_CAPITAL) / (~bold).sum())))


LOG_CAPITAL = _log_capital()
"""Natural logarithm of each bet's share of the capital. Shape [24]; the shares sum to 1."""


@lru_cache(maxsize=4096)
def log_factors(values: tuple[float, ...], mean: float, low: float, high: float, above: bool) -> Floats:
    """Logarithms of what each bet pays for each outcome. Shape [24, len(values)].

    Args:
        values: the outcomes, each in [low, high].
        mean: m of the hypothesis that is bet against; strictly inside (low, high).
        above: bet that the mean is above m; else that it is below.
    """
    side = 1.0 if above else -1.0
    bets = bet_grid(1.0 / (mean - low) if above else 1.0 / (high - mean))
    return np.asarray(np.log1p(side * bets[:, None] * (np.asarray(values) - mean)), dtype=np.float64)


def log_evidence(
    counts: ArrayLike, values: tuple[float, ...], mean: float, low: float, high: float, *, above: bool
) -> Floats:
    """Natural logarithm of the mixture of all bets' capital.

    Args:
        counts: how often each of `values` was seen. Shape [..., len(values)].
        values, mean, low, high, above: see `log_factors`.

    Returns:
        Shape [...]: 0 where nothing was counted.
    """
    n = np.asarray(counts, dtype=np.float64)
    capital = LOG_CAPITAL + n @ log_factors(values, mean, low, high, above).T
    best = capital.max(axis=-1, keepdims=True)
    summed = np.log(np.exp(capital - best).sum(axis=-1))
    return np.asarray(best[..., 0] + summed, dtype=np.float64)


# Paired outcomes: d = 1[control right] - 1[treatment right]. Columns of counts: d = 1, -1, 0, missing.

PAIRED = (1.0, -1.0, 0.0, -1.0)
"""What they are taken as in evidence for a rollback: what is missing as the least harmful."""


def drop_evidence(counts: ArrayLike, margin: float) -> Floats:
    """That the candidate is worse than `margin`: against E[d | past] <= margin.

    A missing outcome is taken as d = -1, the one least harmful to the candidate. The evidence is then never
    larger than with the outcome known, so it stays valid whatever made the outcome go missing.

    Args:
        counts: shape [..., 4], columns d = 1, -1, 0, missing.
        margin: the drop that is tolerated, in (0, 1).
    """
    return log_evidence(counts, PAIRED, margin, -1.0, 1.0, above=True)


def no_drop_evidence(counts: ArrayLike, margin: float) -> Floats:
    """That the candidate is better than `margin` allows: against E[d | past] >= margin; missing is d = 1."""
    return log_evidence(counts, (1.0, -1.0, 0.0, 1.0), margin, -1.0, 1.0, above=False)


def agreement_evidence(counts: ArrayLike, margin: float) -> Floats:
    """That the arms disagree on less than `margin` of the inputs, which bounds the drop without any label.

    accuracy(control) - accuracy(treatment) <= P(they disagree). Missing is taken as a disagreement.

    Args:
        counts: shape [..., 3], columns disagree, agree, missing.
    """
    return log_evidence(counts, (1.0, 0.0, 1.0), margin, 0.0, 1.0, above=False)


def excess_evidence(counts: Mapping[float, int], limit: float) -> float:
    """That a share is above `limit`: against E[x | past] <= limit, for x in [0, 1].

    Args:
        counts: value of x -> how often; x is 0 or 1 for single events, or a share for a block of them.
    """
    values = tuple(sorted(counts))
    if not values:
        return 0.0
    return float(log_evidence([counts[v] for v in values], values, limit, 0.0, 1.0, above=True))


def moved_evidence(counts: ArrayLike, down: float, up: float) -> float:
    """That z has moved too far: against "-down <= E[z | past] <= up", both at once.

    The mean of a bet against each side; a side that z cannot pass is not bet on. In either bet a missing z is
    taken as the one that speaks least for that bet, -2 for "up" and 2 for "down". Each bet is then never larger
    than with z known, and so neither is their mean, whatever made z go missing.

    Args:
        counts: shape [6], columns z = -2, -1, 0, 1, 2, missing.
        down, up: how far z may move on average, each above 0.
    """
    n = np.asarray(counts, dtype=np.float64)
    values = (-2.0, -1.0, 0.0, 1.0, 2.0, -2.0)
    upwards = n
    downwards = np.concatenate([n[4::-1], n[5:]])
    bets = [
        # Rounded up, so that the table of payments is not made anew for every group and digit.
        float(log_evidence(side, values, math.ceil(1000 * limit - 1e-6) / 1000, -2.0, 2.0, above=True))
        for side, limit in ((upwards, up), (downwards, down))
        if limit < 1.999
    ]
    return float(np.logaddexp.reduce(bets)) - math.log(len(bets)) if bets else 0.0


@lru_cache(maxsize=1024)
def share_bounds(shares: tuple[float, ...], rows: int, risk: float) -> tuple[Floats, Floats]:
    """Where the true shares may be, given those among so many rows.

    Chernoff's bound: a true share outside has a chance of at most `risk` to show like this, on each side of each bin,
    whatever the number of rows. (Hoeffding, "Probability inequalities for sums of bounded random variables", JASA 1963,
    theorem 1, in the form with the Kullback-Leibler divergence.)

    Returns:
        Lower and upper ends, each of shape [bins].
    """
    p = np.asarray(shares)
    allowed = -math.log(risk) / max(rows, 1)

    def divergence(q: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            ours = np.where(p > 0, p * np.log(p / q), 0.0)
            others = np.where(p < 1, (1 - p) * np.log((1 - p) / (1 - q)), 0.0)
        return np.asarray(ours + others)

    ends = []
    for end in (0.0, 1.0):
        near, far = p.copy(), np.full_like(p, end)
        for _ in range(50):
            middle = (near + far) / 2
            inside = divergence(middle) <= allowed
            near, far = np.where(inside, middle, near), np.where(inside, far, middle)
        ends.append(far)
    return ends[0], ends[1]


def shares_evidence(counts: ArrayLike, missing: int, low: ArrayLike, high: ArrayLike) -> float:
    """That the share of one bin or another is not what it may be: against "each within `low` and `high`".

    The mean of a bet on each bin's share in either direction. What is missing is taken as the one that speaks least for
    each of the bets.

    Args:
        counts: how often each bin was seen. Shape [bins].
        missing: inputs of which nobody knows the bin.
        low, high: shape [bins]; an end that a share cannot pass is not bet on.

    Returns:
        Natural logarithm of the e-value; 0 where nothing was counted.
    """
    seen = np.asarray(counts, dtype=np.float64)
    others = seen.sum() - seen
    ends = np.asarray(high, dtype=np.float64), 1 - np.asarray(low, dtype=np.float64)
    bets = []
    # For the lower end the bins change places with all others: fewer of one are more of the rest.
    for mean, ours, theirs in zip(ends, (seen, others), (others, seen), strict=True):
        possible = mean < 1 - 1e-9
        m = np.maximum(mean[possible], 1e-9)[:, None]
        capital = (
            LOG_CAPITAL
            + ours[possible][:, None] * np.log1p(_SHARES * (1 / m - 1))
            + (theirs[possible] + missing)[:, None] * _LOG_LOST
        )
        bets.append(np.logaddexp.reduce(capital, axis=1))
    found = np.concatenate(bets)
    return float(np.logaddexp.reduce(found)) - math.log(len(found)) if len(found) else 0.0


def gap_evidence(counts: ArrayLike, margin: float, gap: float, uncertainty: float = 0.0) -> float:
    """That a gap between a group and everybody else has widened by more than `margin`.

    The gap becomes gap + E[z]. It has widened by at most `margin`, in size, when E[z] is at most `margin` in
    the direction of the gap, and at most `margin` + 2 |gap| in the other one: past zero and out on the other
    side, where the gap is taken at the largest it may have been.

    Args:
        counts, margin: see `moved_evidence`; the widening that is tolerated.
        gap: what it was for full precision, -1 to 1; its sign is relied on.
        uncertainty: by how much it may have been larger.
    """
    far = margin + 2 * (abs(gap) + uncertainty)
    return moved_evidence(counts, far, margin) if gap >= 0 else moved_evidence(counts, margin, far)


_PRIOR = 100.0
"""How firmly the alternative is expected near the split that was asked for, as a number of earlier requests."""


def mismatch_evidence(treated: int, others: int, share: float) -> float:
    """That requests do not go to the candidate with probability `share`, each by itself.

    The likelihood of the counts under a Beta prior around `share`, over that under `share` itself: a non-negative
    martingale that starts at 1 if the split is right, however often it is looked at. (Lindon & Malek, "Anytime-valid
    inference for multinomial count data", NeurIPS 2022, arXiv:2011.03567, section 3, for two arms.)

    Args:
        treated, others: requests on the candidate and on control, each assigned anew.
        share: probability of the candidate, inside (0, 1).

    Returns:
        Natural logarithm of the e-value.
    """
    a, b = _PRIOR * share, _PRIOR * (1 - share)
    n = treated + others
    marginal = (
        math.lgamma(a + treated) + math.lgamma(b + others) - math.lgamma(a + b + n)
        + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    )  # fmt: skip
    return marginal - treated * math.log(share) - others * math.log(1 - share)


def more_needed(evidence: Callable[[Floats], float], counts: ArrayLike, limit: float) -> int | None:
    """About how many more observations like these bring `evidence` to `limit`; None when they never will.

    Args:
        evidence: log evidence of counts.
        counts: what was seen so far.
        limit: natural logarithm of the e-value to reach.
    """
    n = np.asarray(counts, dtype=np.float64)
    seen = float(n.sum())
    if evidence(n) >= limit:
        return 0
    if seen == 0:
        return None
    high = 2.0
    while evidence(n * high) < limit:
        high *= 2.0
        if high * seen > 1e8:
            return None
    low = high / 2.0
    for _ in range(20):
        middle = (low + high) / 2.0
        low, high = (low, middle) if evidence(n * middle) >= limit else (middle, high)
    return max(1, math.ceil((high - 1.0) * seen))
