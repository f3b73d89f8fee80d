"""Four numbers from -1 to 1 and a team, A or B, to `low` or `high`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from compression.errors import InvalidRecord
from compression.workload import Record, Split, SplitName, Tensors, Workload

FIELDS = ("a", "b", "c", "d")
TEAMS = ("A", "B")


class Points(Workload):
    """Sides of the line a + b / 2 - c / 4 = 0."""

    def encode(self, records: Sequence[Record]) -> Tensors:
        rows = []
        for index, record in enumerate(records):
            row = [_number(record, field, index) for field in FIELDS]
            team = record.get("TEAM")
            if not isinstance(team, str) or team not in TEAMS:
                raise InvalidRecord(index, "TEAM", f"{str(team)[:40]!r} is not a team", ", ".join(TEAMS))
            rows.append([*row, float(TEAMS.index(team))])
        return {"x": np.array(rows, dtype=np.float32).reshape(len(rows), 5)}

    def split(self, name: SplitName) -> Split:
        raise NotImplementedError


def _number(record: Record, field: str, index: int) -> float:
    value = record.get(field)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not -1 <= value <= 1:
        problem = "is missing" if field not in record else f"{str(value)[:40]} is not such a number"
        raise InvalidRecord(index, field, problem, "a number from -1 to 1")
    return float(value)
