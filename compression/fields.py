"""Checks for `Workload.encode`: look up a code, read a number, or refuse the record in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from reprlib import repr as short
from typing import Any, TypeVar

import numpy as np

from compression.errors import InvalidRecord
from compression.workload import Record

T = TypeVar("T")
_MISSING = object()


def category(record: Record, field: str, index: int, table: Mapping[Any, T]) -> T:
    """What a table has for the field's value: `category(record, "SEX", 0, {1: 0, 2: 1})`.

    Numbers may come as int or as float without a fraction; True is not 1, and "1" is not 1.

    Args:
        index: position of the record in its request, for the message.
        table: allowed values (int or str) -> anything.

    Raises:
        InvalidRecord: the field is missing or holds no key of the table.
    """
    value = record.get(field, _MISSING)
    # bool is an int to Python, and True would pass for code 1. Other types may not even be hashable.
    if isinstance(value, (int, float, str, np.integer, np.floating)) and not isinstance(value, bool):
        try:
            return table[value]
        except KeyError:
            pass
    raise _refusal(index, field, value, "is not a code of this field", _listed(list(table)))


def number(record: Record, field: str, index: int, low: float, high: float) -> float:
    """The field's value as a float within [low, high].

    Raises:
        InvalidRecord: the field is missing, is no number (True, "3", NaN), or is out of range.
    """
    value = record.get(field, _MISSING)
    if (
        isinstance(value, (int, float, np.integer, np.floating))
        and not isinstance(value, bool)
        and low <= value <= high  # false for NaN
    ):
        return float(value)
    raise _refusal(index, field, value, "is not a number in range", f"{low:.15g} to {high:.15g}")


def _refusal(index: int, field: str, value: object, problem: str, allowed: str) -> InvalidRecord:
    return InvalidRecord(
        index, field, "is missing" if value is _MISSING else f"{short(value)} {problem}", allowed
    )


def _listed(keys: list[Any]) -> str:
    run = (
        len(keys) > 3
        and all(isinstance(key, int) for key in keys)
        and all(b - a == 1 for a, b in pairwise(keys))
    )
    return f"{keys[0]} to {keys[-1]}" if run else ", ".join(str(key) for key in keys)
