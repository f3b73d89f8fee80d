"""From which confidence on may the variant's own answer stand? Chosen on the validation split, with a proof.

In a cascade the variant answers the rows that it is sure of, and full precision answers the others in the same
request. The lower the threshold, the fewer rows cost full precision's time, and the more quality may be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from compression.workload import Metric

__all__ = ["MAX_DROPS", "THRESHOLDS", "choose", "keeps", "log_evidence"]

MAX_DROPS = (0.0, 0.001, 0.0025, 0.005, 0.01, 0.02)
"""Losses of quality, as shares, that a threshold is looked for."""

THRESHOLDS = np.append(1 / (1 + np.exp(-np.linspace(36, -7, 2151))), 0.0)
"""The order of the walk: from 1 less the least that a float64 can tell, down in steps of 0.02 in log-odds to what
the surest of 1,000 classes may have, and then 0. It is the same for every model: a grid that followed the rows
(their quantiles, say) would not be fixed before they are looked at."""

_ENOUGH = log(20)
"""Evidence of 20 comes by chance at most once in 20 times (Markov's inequality), so it proves at 95%."""
_BETS = (1, 2, 4)


def choose(
    metric: Metric,
    right: np.ndarray,
    full_right: np.ndarray,
    confidences: np.ndarray,
    labels: np.ndarray,
    max_drops: Sequence[float] = MAX_DROPS,
) -> dict[float, float | None]:
    """The smallest threshold that is proven to lose at most `max_drop` of quality, for each of them.

    Fixed-sequence testing (Angelopoulos, Bates, Candes, Jordan and Lei 2021, "Learn then Test"): the thresholds
    are walked in an order fixed beforehand, from "everything goes to full precision", which loses nothing,
    downwards, up to the first one that is not proven. A false one can be chosen only if the first false one of
    the walk passes its test, so looking at many needs no correction. Each `max_drop` is at 95% by itself.

    Args:
        right: whether the variant is right, bool [N]; `full_right` for full precision.
        confidences: the variant's, float [N]; a row whose confidence is NaN always goes to full precision.
        labels: class indices [N].

    Returns:
        `max_drop` -> threshold; None where none that keeps a row is proven. For 0 that is always so, because no
        number of rows without a loss proves that there is none.
    """
    strata = np.zeros_like(labels) if metric == "accuracy" else np.unique(labels, return_inverse=True)[1]
    rows = np.bincount(strata)
    lost, won = (
        np.stack([_kept(confidences[which & (strata == stratum)]) for stratum in range(len(rows))])
        for which in (full_right & ~right, right & ~full_right)
    )
    kept = _kept(confidences)
    chosen: dict[float, float | None] = {}
    steps = len(THRESHOLDS)
    for max_drop in sorted(max_drops, reverse=True):
        proven = log_evidence(lost, won, rows, max_drop) >= _ENOUGH
        # Every step of a walk is proven, so a walk may be cut: a smaller loss never gets a lower threshold.
        steps = min(steps, len(proven) if proven.all() else int(np.argmin(proven)))
        chosen[max_drop] = float(THRESHOLDS[steps - 1]) if steps and kept[steps - 1] else None
    return {max_drop: chosen[max_drop] for max_drop in max_drops}


def log_evidence(lost: np.ndarray, won: np.ndarray, rows: np.ndarray, max_drop: float) -> np.ndarray:
    """Natural logarithm of the evidence that the drop is below `max_drop`, for each threshold.

    The evidence is a mean of products of 1 + bet * (max_drop - loss) over the rows, a row's loss being 1, 0 or
    -1 (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting"). If the mean
    drop is `max_drop` or more, its expectation is at most 1: rows are independent, and by the inequality of
    means the product of their expectations is at most (1 + bet * (max_drop - drop)) ** rows. That holds for
    any number of rows and does not ask them to be alike, so the classes of balanced accuracy fit in as strata
    whose rows weigh what makes each stratum count the same.

    Args:
        lost: rows that full precision gets right and the variant does not, [strata, thresholds]; `won` the
            other way round.
        rows: rows in each stratum, [strata]; at least 1.
    """
    from scipy.special import logsumexp, xlog1py

    total = rows.sum()
    weight = (total / (len(rows) * rows))[:, np.newaxis]
    even = rows[:, np.newaxis] - lost - won
    largest = 0.95 / (weight.max() - max_drop)  # with 1, a single loss would be the end of all evidence
    # The best bet when wins and losses are about to balance, and larger ones for when they do not.
    best = 2 * _ENOUGH / (max_drop * total) if max_drop else largest
    evidence = []
    for bet in (min(times * best, largest) for times in _BETS):
        logs = xlog1py(lost, bet * (max_drop - weight))
        logs += xlog1py(won, bet * (max_drop + weight)) + xlog1py(even, bet * max_drop)
        evidence.append(logs.sum(axis=0))
    return np.asarray(logsumexp(evidence, axis=0) - log(len(_BETS)))


def keeps(confidences: np.ndarray, threshold: float) -> np.ndarray:
    """Which rows the compressed model answers itself; bool of the same shape. NaN is sure of nothing.

    In float64 wherever it is asked: in float32 the largest thresholds would fall together.
    """
    return np.asarray(confidences, np.float64) >= threshold


def _kept(confidences: np.ndarray) -> np.ndarray:
    """How many of these rows each threshold keeps."""
    number = confidences[~np.isnan(confidences)].astype(np.float64)
    first = np.searchsorted(-THRESHOLDS, -number, side="left")
    return np.bincount(first, minlength=len(THRESHOLDS) + 1)[: len(THRESHOLDS)].cumsum()
