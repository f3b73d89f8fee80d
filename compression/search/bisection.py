"""The value of a parameter whose file just fits, by halving."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from compression.errors import CompressionError

TOLERANCE = 0.02
"""A file that is within this share below the size asked for is near enough."""
SLACK = 0.02
"""How far a size may go the wrong way before it counts as going up and down: coded files are a little ragged."""
_MOST = 60
"""Sizes that are looked at, at most; halving floats comes to an end well before."""


class TargetError(CompressionError):
    """A size cannot be met, or not by this parameter."""


@dataclass(frozen=True)
class Found:
    """Where a bisection ended.

    Attributes:
        value: the parameter's, `size` the bytes it makes.
        sizes: all values that were looked at, with their sizes, in that order.
        met: the size is within the tolerance below the limit; else the parameter cannot come nearer.
    """

    value: float
    size: int
    sizes: dict[float, int]
    met: bool


def bisect(
    size_of: Callable[[float], int],
    low: float,
    high: float,
    limit: int,
    *,
    whole: bool = False,
    tolerance: float = TOLERANCE,
    resolution: float = 1e-4,
) -> Found:
    """The value in a range whose size is the largest that is not over a limit.

    The size may rise or fall with the value; which of the two, the ends tell. It is checked on the way that it does so
    throughout, give or take SLACK. Each value is looked at once.

    Args:
        size_of: bytes for a value.
        low, high: ends of the range, both may be taken.
        limit: bytes.
        whole: only whole numbers; `low` and `high` are.
        tolerance: stop at a size that is no more than this share below the limit.
        resolution: stop where the value is known to this share of the range.

    Raises:
        TargetError: no size in the range fits, or the size goes up and down.
    """
    sizes: dict[float, int] = {}

    def look(value: float) -> int:
        if value not in sizes:
            sizes[value] = size_of(value)
        return sizes[value]

    ends = sorted((low, high), key=look)
    fits, misses = ends
    if look(fits) > limit:
        raise TargetError(
            f"out of reach: the smallest file is {look(fits)} bytes, with {fits:g}; {limit} were asked for"
        )
    if look(misses) <= limit:
        return _found(misses, sizes, limit, tolerance)
    while len(sizes) < _MOST:
        if look(fits) >= (1 - tolerance) * limit:
            break
        if abs(misses - fits) <= (1 if whole else resolution * (high - low)):
            break
        middle = (fits + misses) / 2
        if whole:
            middle = math.floor(middle)
        size = look(middle)
        if not (1 - SLACK) * look(fits) <= size <= (1 + SLACK) * look(misses):
            raise TargetError(
                f"the size goes up and down: {look(fits)} bytes with {fits:g}, {size} with {middle:g}, "
                f"{look(misses)} with {misses:g}: choose another parameter with --vary"
            )
        if size <= limit:
            fits = middle
        else:
            misses = middle
    return _found(fits, sizes, limit, tolerance)


def _found(value: float, sizes: dict[float, int], limit: int, tolerance: float) -> Found:
    # A ragged size may have been better at a value passed over.
    best = max((other for other, size in sizes.items() if size <= limit), key=lambda other: sizes[other])
    value = best if sizes[best] > sizes[value] else value
    return Found(value, sizes[value], sizes, sizes[value] >= (1 - tolerance) * limit)
