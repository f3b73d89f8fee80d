"""What compression broke: which classes and groups lost most, the rows that were lost, and who is taken for whom.

Both arms' answers to the same labelled rows are compared. A row is *lost* when full precision was right and the
candidate is wrong, *won* the other way round; the net drop of a class or group is (lost - won) / rows, which is how
much accuracy it lost.

Its 95% interval is the adjusted Wald interval for paired proportions of Bonett and Price (2012, Statistics in Medicine
31, 479-488), which adds one to each kind of disagreement; scorecards have the same. Each interval holds for itself:
among forty classes and groups about two will lie outside theirs by chance alone, likeliest those that lost most.

Rows are those of a report (see `monitoring.report`): the record's fields, `prediction`, `prediction_full`, `label` and
one `group_<ATTR>` for each sensitive attribute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "NO_ANSWER",
    "Confusion",
    "ErrorAnalysis",
    "LostRow",
    "SliceErrors",
    "analyse_errors",
    "paired_drop",
]

PREDICTION, FULL, LABEL, GROUP = "prediction", "prediction_full", "label", "group_"
NOT_INPUTS = frozenset({PREDICTION, FULL, LABEL, "confidence", "confidence_full"})
NO_ANSWER = "(no answer)"
"""What an answer that is none of the classes is counted under."""

SMALL_ROWS = 30
"""A class or group of fewer rows is marked, and ranked after all others."""
EXAMPLES = 20
MOST_SLICES = 50
"""This many classes, and this many groups, are kept: those that lost most."""
MATRIX_CLASSES = 20
"""With more classes there is no matrix, and the largest confusions instead."""
MOST_CONFUSIONS = 30
MOST_FIELDS = 40
LONGEST = 120
"""Characters of a text in an example; the rest is cut off."""

_Z = 1.959963984540054


@dataclass(frozen=True, slots=True)
class SliceErrors:
    """The rows of one true class, of one group, or all.

    Attributes:
        kind: "class", "group" or "all".
        name: the class, `ATTRIBUTE=value`, or "".
        accuracy_full, accuracy: shares of right answers, of full precision and of the candidate.
        lost, won: rows that only full precision, and that only the candidate, answered rightly.
        drop: (lost - won) / rows; low and high are its 95% interval.
        small: too few rows to be ranked before others.
    """

    kind: Literal["class", "group", "all"]
    name: str
    rows: int
    accuracy_full: float
    accuracy: float
    lost: int
    won: int
    drop: float
    low: float
    high: float
    small: bool = False

    def told(self) -> str:
        """The class or group and its drop, in one line."""
        which = {"class": f"class {self.name}", "group": self.name, "all": "all rows"}[self.kind]
        chance = "" if self.low > 0 else "; chance alone may do that"
        return (
            f"{which}, net drop {100 * self.drop:z.2f} pt (95% {100 * self.low:z.2f} to {100 * self.high:z.2f}), "
            f"{self.lost:,} lost and {self.won:,} won of {self.rows:,} rows{chance}"
        )


@dataclass(frozen=True, slots=True)
class LostRow:
    """A row that full precision answered rightly and the candidate wrongly.

    Attributes:
        row: its place among the rows that were analysed, from 0.
        because: the class or group for which it is shown: the one that lost most of those it belongs to.
        record: its fields, long texts cut; empty where a request brought tensors.
    """

    row: int
    label: str
    full: str
    candidate: str
    because: str
    groups: dict[str, str]
    record: dict[str, object]


@dataclass(frozen=True, slots=True)
class Confusion:
    """How often rows of one class were taken for another, by each arm."""

    label: str
    answer: str
    full: int
    candidate: int


@dataclass(frozen=True, slots=True)
class ErrorAnalysis:
    """Everything about the rows that both arms answered and that have a label.

    Attributes:
        left_out: rows without a label, or without an answer of either arm.
        overall: all rows together; None when there are none.
        classes, groups: those that lost most first, small ones last; at most `MOST_SLICES` of each.
        more_classes, more_groups: how many there are besides.
        lost_rows: examples of lost rows; `overall.lost` says how many there are.
        labels, answers: names of the matrices' rows and columns; empty with more than `MATRIX_CLASSES` classes.
        matrix_full, matrix: rows by [label][answer], of full precision and of the candidate.
        confusions: the largest confusions, by the candidate's own count, when there is no matrix.
    """

    rows: int
    left_out: int
    overall: SliceErrors | None = None
    classes: tuple[SliceErrors, ...] = ()
    groups: tuple[SliceErrors, ...] = ()
    more_classes: int = 0
    more_groups: int = 0
    lost_rows: tuple[LostRow, ...] = ()
    labels: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    matrix_full: tuple[tuple[int, ...], ...] = ()
    matrix: tuple[tuple[int, ...], ...] = ()
    confusions: tuple[Confusion, ...] = ()

    @property
    def worst(self) -> SliceErrors | None:
        """The class or group that lost most; None when none that is large enough lost anything."""
        ranked = _ranked((*self.classes, *self.groups))
        return next((s for s in ranked if s.drop > 0 and not s.small), None)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired_drop(lost: int, won: int, rows: int) -> tuple[float, float, float]:
    """The net drop and its 95% interval, each from -1 to 1 (Bonett and Price 2012; `rows` is at least 1)."""
    value = (lost - won) / rows
    p_lost, p_won = (lost + 1) / (rows + 2), (won + 1) / (rows + 2)
    centre = p_lost - p_won
    half = _Z * math.sqrt((p_lost + p_won - centre**2) / (rows + 2))
    return value, min(value, max(-1.0, centre - half)), max(value, min(1.0, centre + half))


def analyse_errors(
    rows: pd.DataFrame,
    classes: Sequence[str],
    *,
    sensitive: Sequence[str] = (),
    examples: int = EXAMPLES,
    small_rows: int = SMALL_ROWS,
) -> ErrorAnalysis:
    """Compare both arms' answers with the labels.

    Args:
        rows: a report's rows. Those without a label or without an arm's answer are left out and counted. An answer that
            is none of `classes` is wrong, and counted under `NO_ANSWER`.
        classes: names of the classes, in the matrices' order.
        sensitive: attributes; one whose `group_<ATTR>` is missing is passed over.
        examples: lost rows to show, at most.
    """
    known = np.ones(len(rows), dtype=bool)
    for name in (LABEL, FULL, PREDICTION):
        known &= rows[name].notna().to_numpy() if name in rows else False
    rows = rows[known]
    if rows.empty:
        return ErrorAnalysis(rows=0, left_out=len(known))
    label, full, mine = (rows[name].astype(str).to_numpy(dtype=object) for name in (LABEL, FULL, PREDICTION))
    right_full, right = full == label, mine == label
    lost, won = right_full & ~right, right & ~right_full

    def slices(kind: Literal["class", "group"], members: np.ndarray, prefix: str = "") -> list[SliceErrors]:
        """The figures of each value in `members`, which has None where a row belongs to none."""
        some = np.flatnonzero([value is not None for value in members])
        found, place = np.unique(members[some].astype(str), return_inverse=True)
        counts = [
            np.bincount(place, weights=flags[some], minlength=len(found)).astype(int)
            for flags in (np.ones(len(rows)), right_full, right, lost, won)
        ]
        return [
            _slice(kind, f"{prefix}{name}", *(int(count[i]) for count in counts), small_rows=small_rows)
            for i, name in enumerate(found)
        ]

    by_class = _ranked(slices("class", label))
    by_group: list[SliceErrors] = []
    belongs: dict[str, np.ndarray] = {}
    for attribute in sensitive:
        column = rows.get(f"{GROUP}{attribute}")
        if column is not None and column.notna().any():
            named = [None if gap else str(v) for v, gap in zip(column, column.isna(), strict=True)]
            belongs[attribute] = np.array(named, dtype=object)
            by_group += slices("group", belongs[attribute], f"{attribute}=")
    by_group = _ranked(by_group)
    totals = (len(rows), int(right_full.sum()), int(right.sum()), int(lost.sum()), int(won.sum()))
    labels, answers, matrices, confusions = _confusions(classes, label, full, mine)
    return ErrorAnalysis(
        rows=len(rows),
        left_out=int((~known).sum()),
        overall=_slice("all", "", *totals, small_rows=small_rows),
        classes=tuple(by_class[:MOST_SLICES]),
        groups=tuple(by_group[:MOST_SLICES]),
        more_classes=max(0, len(by_class) - MOST_SLICES),
        more_groups=max(0, len(by_group) - MOST_SLICES),
        lost_rows=_lost_rows(
            rows, _ranked([*by_class, *by_group]), (label, full, mine), lost, belongs, examples
        ),
        labels=labels,
        answers=answers,
        matrix_full=matrices[0],
        matrix=matrices[1],
        confusions=confusions,
    )


def _slice(
    kind: Literal["class", "group", "all"],
    name: str,
    rows: int,
    right_full: int,
    right: int,
    lost: int,
    won: int,
    *,
    small_rows: int,
) -> SliceErrors:
    drop, low, high = paired_drop(lost, won, rows)
    return SliceErrors(
        kind=kind,
        name=name,
        rows=rows,
        accuracy_full=right_full / rows,
        accuracy=right / rows,
        lost=lost,
        won=won,
        drop=drop,
        low=low,
        high=high,
        small=rows < small_rows,
    )


def _ranked(slices: Sequence[SliceErrors]) -> list[SliceErrors]:
    """By net drop, the largest first; of equal ones that with the higher lower limit; small ones last."""
    return sorted(slices, key=lambda s: (s.small, -s.drop, -s.low, s.kind, s.name))


def _lost_rows(
    rows: pd.DataFrame,
    ranked: Sequence[SliceErrors],
    answers: tuple[np.ndarray, np.ndarray, np.ndarray],
    lost: np.ndarray,
    belongs: dict[str, np.ndarray],
    most: int,
) -> tuple[LostRow, ...]:
    """Lost rows of the slice that lost most, then of the next, each in the order of the rows, each row once."""
    label, full, mine = answers
    left = lost.copy()
    chosen: list[tuple[int, str]] = []
    named = {
        f"{attribute}={value}": values == value
        for attribute, values in belongs.items()
        for value in {v for v in values[lost] if v is not None}
    }
    for s in ranked:
        if len(chosen) >= most or not left.any():
            break
        if s.kind == "class":
            inside, because = label == s.name, f"class {s.name}"
        else:
            inside, because = named.get(s.name, np.zeros_like(lost)), s.name
        chosen += [(int(at), because) for at in np.flatnonzero(inside & left)[: most - len(chosen)]]
        left &= ~inside
    fields = [c for c in rows.columns if str(c) not in NOT_INPUTS and not str(c).startswith(GROUP)]
    found = []
    for at, because in chosen:
        values = {str(c): rows[c].iloc[at] for c in fields}
        record = {name: _short(value) for name, value in values.items() if not _gap(value)}
        shown = dict(list(record.items())[:MOST_FIELDS])
        if len(record) > len(shown):
            shown["..."] = f"{len(record) - len(shown)} more fields"
        found.append(
            LostRow(
                row=at,
                label=_cut(label[at]),
                full=_cut(full[at]),
                candidate=_cut(mine[at]),
                because=_cut(because),
                groups={a: _cut(values[at]) for a, values in belongs.items() if values[at] is not None},
                record=shown,
            )
        )
    return tuple(found)


def _confusions(
    classes: Sequence[str], label: np.ndarray, full: np.ndarray, mine: np.ndarray
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Any, Any], tuple[Confusion, ...]]:
    """Matrices of both arms for few classes; for many, the largest confusions."""
    place = {name: at for at, name in enumerate(classes)}
    none = len(classes)
    truth, one, other = (
        np.array([place.get(name, none) for name in names], dtype=np.int64) for names in (label, full, mine)
    )
    width = none + 1
    before, now = (dict(zip(*_counted(truth * width + answer), strict=True)) for answer in (one, other))
    names = (*classes, NO_ANSWER)
    if none <= MATRIX_CLASSES:
        answers = names if none in one or none in other else tuple(classes)
        tables = [
            tuple(tuple(count.get(i * width + j, 0) for j in range(len(answers))) for i in range(none))
            for count in (before, now)
        ]
        return tuple(classes), answers, (tables[0], tables[1]), ()
    cells = [cell for cell in before.keys() | now.keys() if cell // width != cell % width]
    cells.sort(key=lambda c: (-now.get(c, 0), before.get(c, 0), c))
    largest = tuple(
        Confusion(_cut(names[c // width]), _cut(names[c % width]), before.get(c, 0), now.get(c, 0))
        for c in cells[:MOST_CONFUSIONS]
    )
    return (), (), ((), ()), largest


def _counted(cells: np.ndarray) -> tuple[list[int], list[int]]:
    found, counts = np.unique(cells, return_counts=True)
    return found.tolist(), counts.tolist()


def _gap(value: object) -> bool:
    return value is None or (isinstance(value, (float, np.floating)) and math.isnan(float(value)))


def _short(value: object) -> object:
    """A value small enough for a table: numbers and flags as they are, anything else as text that is cut."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, np.ndarray):
        value = value.ravel()[: LONGEST + 1].tolist()
    if isinstance(value, (list, tuple)):
        value = value[:LONGEST]
    return _cut(str(value))


def _cut(text: object) -> str:
    text = str(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
