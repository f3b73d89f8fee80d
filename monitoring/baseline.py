"""What full precision and its inputs looked like on the reference rows, fixed when a rollout starts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

__all__ = ["Baseline", "ColumnSpec", "baseline_of"]


@dataclass(frozen=True, slots=True)
class ColumnSpec:
    """A record's field as it was among the reference rows, in bins.

    Attributes:
        edges: of a field of numbers, where a bin ends and the next one begins; the first bin is under the first edge.
        values: of any other field, the value of each bin; one bin more is for all others.
        shares: of the reference rows in each bin. The last bin is for what is missing or of the wrong type.
    """

    name: str
    edges: tuple[float, ...]
    values: tuple[str, ...]
    shares: tuple[float, ...]

    def bin_of(self, value: object) -> int:
        """The bin of a record's value."""
        last = len(self.shares) - 1
        if value is None or value != value:  # noqa: PLR0124  # NaN is not itself
            return last
        if self.edges:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
                return last
            return bisect_right(self.edges, value)
        text = str(value)
        return self.values.index(text) if text in self.values else len(self.values)


@dataclass(frozen=True, slots=True)
class Baseline:
    """The reference rows in numbers.

    Attributes:
        rows: how many there were; 0 when nothing is known of them.
        labels: share of each true class; answers: share of each class among full precision's answers.
        calibration: points (confidence, probability that full precision is right), rising in both; what is between two
            of them lies on the line.
        runner_up: where full precision is wrong, how often its second choice is right.
        columns: the records' fields.
    """

    rows: int = 0
    labels: tuple[float, ...] = ()
    answers: tuple[float, ...] = ()
    calibration: tuple[tuple[float, float], ...] = ()
    runner_up: float = 1.0
    columns: tuple[ColumnSpec, ...] = ()

    def p_right(self, confidence: float) -> float:
        """The probability that full precision is right, where it is so sure."""
        points = self.calibration
        place = bisect_right(points, confidence, key=lambda point: point[0])
        if place == 0:
            return points[0][1]
        if place == len(points):
            return points[-1][1]
        (x0, y0), (x1, y1) = points[place - 1], points[place]
        return y0 + (y1 - y0) * (confidence - x0) / (x1 - x0)


def baseline_of(reference: Mapping[str, Any] | None) -> Baseline:
    """The baseline in the summary that the full-precision variant carries, or in a stored rollout.

    Args:
        reference: the fields of a `Baseline`, those of a `ColumnSpec` for each of its columns; others are passed over.
            One without some of them, as earlier versions made it, says nothing of them.
    """
    given = reference or {}
    return Baseline(
        rows=int(given.get("rows", 0)),
        labels=tuple(given.get("labels", ())),
        answers=tuple(given.get("answers", ())),
        calibration=tuple((float(x), float(y)) for x, y in given.get("calibration", ())),
        runner_up=float(given.get("runner_up", 1.0)),
        columns=tuple(
            ColumnSpec(c["name"], tuple(c["edges"]), tuple(c["values"]), tuple(c["shares"]))
            for c in given.get("columns", ())
        ),
    )
