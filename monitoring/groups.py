"""Which groups of people a rollout guards, fixed when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MIN_REFERENCE_ROWS = 30


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A guarded group.

    Attributes:
        name: such as ``DIS=1``.
        share: its share of the reference rows, 0 to 1.
        gap: full precision's favourable rate in the group minus that of everybody else, -1 to 1.
    """

    name: str
    share: float
    gap: float


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
        specs.append(GroupSpec(str(name), n / rows, rate - rest_rate))
    return tuple(specs)
