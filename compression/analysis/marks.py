"""What stands out of the figures: the knee of a curve, how far it is free, and critical layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

from compression.analysis.types import Curve, Effect, LayerReport, Measured
from compression.intervals import Z
from compression.scorecard import Estimate

STANDS_OUT = 3.0
"""How many times the median layer's change of outputs makes a layer critical."""


def knee(sizes: Sequence[float], qualities: Sequence[float], sensitivity: float = 1.0) -> int | None:
    """Position of the knee of quality over size, by Kneedle.

    Both axes are brought to the range 0 to 1. The knee is the point farthest above the chord from one corner to the
    other, if the curve comes back towards the chord, at larger sizes, by more than `sensitivity` times the mean
    distance of two points along the size axis. Satopaa et al., "Finding a 'kneedle' in a haystack" (ICDCS workshops
    2011), section III; without the smoothing, which points this few do not allow.

    Args:
        sizes: in any order and unit.
        qualities: at those sizes; quality rises with size, steeply at first.
        sensitivity: 1 is the paper's; larger values ask for a sharper bend.

    Returns:
        None for a straight or flat line, one that bends the other way, or fewer than three different sizes.
    """
    best: dict[float, int] = {}
    for place, size in enumerate(sizes):
        if size not in best or qualities[place] > qualities[best[size]]:
            best[size] = place
    order = [best[size] for size in sorted(best)]
    if len(order) < 3:
        return None
    x, y = (np.array([values[place] for place in order], float) for values in (sizes, qualities))
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or np.ptp(y) == 0:
        return None
    above = (y - y.min()) / np.ptp(y) - (x - x[0]) / np.ptp(x)
    top = int(above.argmax())
    if not 0 < top < len(order) - 1:
        return None
    threshold = above[top] - sensitivity / (len(order) - 1)
    return order[top] if above[top:].min() < threshold else None


def excludes_zero(loss: Estimate, tests: int = 1) -> bool:
    """Whether a drop is above zero, at 95% for all of so many tests together.

    The 95% interval of one test is widened to Bonferroni's level, its lower side by the ratio of the normal quantiles.
    """
    wider = NormalDist().inv_cdf(1 - 0.025 / max(1, tests)) / Z
    return loss.value - wider * (loss.value - loss.low) > 0


def critical_because(
    effects: Mapping[str, Effect], medians: Mapping[str, float], tests: int, titles: Mapping[str, str]
) -> tuple[str, ...]:
    """Why a layer is critical, in words; empty if it is not.

    A layer is critical if a treatment of it alone loses quality for certain (`excludes_zero` over all tests of the
    analysis), or moves the outputs at least `STANDS_OUT` times as far as it does in the median layer.

    Args:
        effects: treatment -> what it does to the layer; `titles` has the treatments' names for people.
        medians: treatment -> the change of outputs in the median layer; only of those with three layers or more.
        tests: how many effects of layers are judged.

    Returns:
        Losses first, the largest certain one at the start; then the changes of outputs, the farthest first.
    """
    lost = sorted(
        ((effect.drop.low, key) for key, effect in effects.items() if excludes_zero(effect.drop, tests)),
        key=lambda entry: -entry[0],
    )
    far = sorted(
        (
            (effect.change / middle, key)
            for key, effect in effects.items()
            if (middle := medians.get(key, 0.0)) > 0 and effect.change >= STANDS_OUT * middle
        ),
        key=lambda entry: -entry[0],
    )
    return (
        *(f"{titles[key]} it loses {points(effects[key].drop, '95% interval ')}" for _, key in lost),
        *(
            f"{titles[key]} it moves the outputs {ratio:.1f} times as far as the median layer"
            for ratio, key in far
        ),
    )


def points(loss: Estimate, interval: str = "") -> str:
    """A drop in points with its interval: `0.12 pt (-0.05 to 0.29)`; `interval` is said before the ends."""
    low, high = (f"{100 * value:z.2f}" for value in (loss.low, loss.high))
    return f"{100 * loss.value:z.2f} pt ({interval}{low} to {high})"


def with_marks(curve: Curve, reference: Measured) -> Curve:
    """The curve with its knee and its last free level.

    Full precision is the curve's end without compression. A curve none of whose drops excludes 0 has no knee: what
    bends in it is noise.
    """
    measured = [(place, level.measured) for place, level in enumerate(curve.levels) if level.measured]
    free = None
    for place, found in measured:
        if excludes_zero(found.drop):
            break
        free = place
    at = None
    if any(excludes_zero(found.drop) for _, found in measured):
        all_of_them = [reference, *(found for _, found in measured)]
        at = knee(
            [float(curve.size(found)) for found in all_of_them],
            [found.quality.value for found in all_of_them],
        )
    # Position 0 is full precision; a knee there would be one at no compression.
    return curve.model_copy(update={"free": free, "knee": measured[at - 1][0] if at else None})


def severity(report: LayerReport) -> tuple[float, float]:
    """How much a layer suffers: the loss that an interval vouches for, and the change of outputs, at their largest."""
    effects = report.effects.values()
    return (
        max((max(0.0, effect.drop.low) for effect in effects), default=0.0),
        max((effect.change for effect in effects), default=0.0),
    )
