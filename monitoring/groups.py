"""Which groups of people a rollout guards, fixed when it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MIN_REFERENCE_ROWS = 30
STANDARD_ERRORS = 3.0
"""A gap is established when it is more than so many standard errors away from zero."""


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A guarded group.

    Attributes:
        name: such as ``DIS=1``.
        share: its share of the reference rows, 0 to 1.
        gap: full precision's favourable rate in the group minus that of everybody else, -1 to 1.
        error: standard error of `gap`; 0 takes the gap as exact, as rollouts stored without one were started.
    """

    name: str
    share: float
    gap: float
    error: float = 0.0

    @property
    def uncertainty(self) -> float:
        """How far from the measured gap the true one may reasonably be."""
        return STANDARD_ERRORS * self.error

    @property
    def established(self) -> bool:
        """Whether the reference rows are enough to say on which side of zero the gap is."""
        return self.error == 0 or abs(self.gap) > self.uncertainty


def group_specs(
    reference: Mapping[str, object] | None, min_rows: int = MIN_REFERENCE_ROWS
) -> tuple[GroupSpec, ...]:
    """The groups to guard, from the reference that the full-precision variant carries.

    Args:
        reference: ``{"rows": n, "groups": {"DIS=1": {"rows": n, "positive_rate": r}, ...}}`` or None.
        min_rows: groups with fewer rows are left out, as are groups that hold everybody.

    Returns:
        Sorted by name, so that the same reference always gives the same list.
    """
    groups = (reference or {}).get("groups")
    if not isinstance(groups, Mapping):
        return ()
    totals: dict[str, tuple[float, float]] = {}
    for name, entry in groups.items():
        attribute = str(name).partition("=")[0]
        rows, favourable = totals.get(attribute, (0.0, 0.0))
        n = float(entry["rows"])
        totals[attribute] = (rows + n, favourable + n * float(entry["positive_rate"]))
    specs = []
    for name, entry in sorted(groups.items()):
        rows, favourable = totals[str(name).partition("=")[0]]
        n, rate = float(entry["rows"]), float(entry["positive_rate"])
        others = rows - n
        if n < min_rows or others < min_rows:
            continue
        rest_rate = (favourable - n * rate) / others
        error = math.sqrt(_variance(rate, n) + _variance(rest_rate, others))
        specs.append(GroupSpec(str(name), n / rows, rate - rest_rate, error))
    return tuple(specs)


def _variance(rate: float, n: float) -> float:
    """Variance of a rate seen in `n` rows; one row more of each kind keeps it from being 0 at 0% and 100%."""
    smoothed = (rate * n + 1) / (n + 2)
    return smoothed * (1 - smoothed) / n
