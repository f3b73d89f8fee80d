"""95% intervals in closed form: the same numbers give the same interval every time."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

from compression.scorecard import Estimate

Z = 1.959963984540054
"""Normal quantile of a two-sided 95% interval."""


def proportion(hits: int, trials: int) -> Estimate:
    """A share and its Wilson score interval (Wilson 1927), which holds for small samples and extreme shares.

    Args:
        hits: 0 to trials.
        trials: at least 1.
    """
    share = hits / trials
    centre = (hits + Z**2 / 2) / (trials + Z**2)
    half = Z / (trials + Z**2) * sqrt(hits * (trials - hits) / trials + Z**2 / 4)
    return Estimate(
        value=share, low=min(share, max(0.0, centre - half)), high=max(share, min(1.0, centre + half))
    )


def paired_drop(right: np.ndarray, full_right: np.ndarray) -> Estimate:
    """How much less often the variant is right than full precision on the same rows.

    The interval is the adjusted Wald interval for paired proportions of Bonett and Price (2012, Statistics in
    Medicine 31, 479-488): one is added to each kind of disagreement, so that no disagreement at all still
    leaves an interval of some width.

    Args:
        right: whether the variant is right, bool [N]; `full_right` for full precision. N is at least 1.
    """
    rows = len(right)
    lost = int((full_right & ~right).sum())
    won = int((right & ~full_right).sum())
    value = (lost - won) / rows
    p_lost, p_won = (lost + 1) / (rows + 2), (won + 1) / (rows + 2)
    centre = p_lost - p_won
    half = Z * sqrt((p_lost + p_won - centre**2) / (rows + 2))
    return Estimate(
        value=value, low=min(value, max(-1.0, centre - half)), high=max(value, min(1.0, centre + half))
    )


def mean_of(parts: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates, its interval made of theirs.

    MOVER, the method of variance estimates recovery (Zou and Donner 2008, Statistics in Medicine 27,
    1693-1702): each side of the interval is the root of the summed squares of that side's distances.
    """
    count = len(parts)
    value = sum(part.value for part in parts) / count
    below = sqrt(sum((part.value - part.low) ** 2 for part in parts)) / count
    above = sqrt(sum((part.high - part.value) ** 2 for part in parts)) / count
    return Estimate(value=value, low=value - below, high=value + above)
