"""How far the current rows are from the reference rows, column by column.

Method and threshold are chosen here, by column kind, and never left to a library's default:

* numeric columns: the Wasserstein distance divided by the reference's standard deviation
  ("the mass moved by so many standard deviations on average"), threshold 0.1;
* categorical columns: the Jensen-Shannon distance (natural log), threshold 0.1.

Both distances are positive even when nothing has changed, and the fewer the rows the larger they are. So
the threshold of a column is never less than its *noise floor*: what two samples of these sizes from one
distribution exceed about once in a thousand times. Without it a categorical column of 20 values "drifts"
in any window of 200 rows.

Drift says that the inputs or the predictions look different. It does not say that the model is worse: it
raises an alert, and never rolls anything back on its own.

pandas and scipy are imported inside the functions, because serving workers import this package.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["numeric", "categorical"]

METHODS: dict[Kind, str] = {"numeric": "wasserstein", "categorical": "jensenshannon"}
"""Evidently's names of the methods, which are also what is computed here."""

MISSING = "(missing)"
OTHER = "(other)"


@dataclass(frozen=True, slots=True)
class DriftSettings:
    """What counts as drift."""

    numeric_threshold: float = 0.1
    categorical_threshold: float = 0.1
    drift_share: float = 0.5
    """Share of drifted columns from which the whole window counts as drifted."""
    max_categories: int = 30
    """The reference's most frequent values are kept apart; all others are one value, `(other)`."""
    numeric_from: int = 20
    """A column of numbers with this many different values or fewer is categorical (codes, flags, counts)."""
    min_rows: int = 50
    """With fewer current or reference rows no drift is measured."""


@dataclass(frozen=True, slots=True)
class ColumnDrift:
    """One column's distance from the reference, and the threshold that it was judged by."""

    column: str
    kind: Kind
    method: str
    score: float
    threshold: float

    @property
    def drifted(self) -> bool:
        return self.score >= self.threshold


@dataclass(frozen=True, slots=True)
class DriftResult:
    """Per-column scores, ready for Prometheus and for a report."""

    columns: tuple[ColumnDrift, ...] = ()
    prediction: ColumnDrift | None = None
    drift_share: float = 0.5
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The share of the input columns that drifted; 0 when no column could be measured."""
        return sum(c.drifted for c in self.columns) / len(self.columns) if self.columns else 0.0

    @property
    def drifted(self) -> bool:
        return bool(self.columns) and self.share >= self.drift_share

    def scores(self) -> dict[str, float]:
        """Column -> score, the prediction's under the name `prediction`."""
        every = (*self.columns, self.prediction) if self.prediction else self.columns
        return {c.column: c.score for c in every if c is not None}

    def as_dict(self) -> dict[str, Any]:
        def plain(c: ColumnDrift) -> dict[str, Any]:
            return {**asdict(c), "drifted": c.drifted}

        return {
            "share": self.share,
            "drifted": self.drifted,
            "drift_share": self.drift_share,
            "columns": [plain(c) for c in self.columns],
            "prediction": plain(self.prediction) if self.prediction else None,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class PreparedColumns:
    """Both windows' columns in one form: numbers as float, everything else as text without gaps."""

    current: pd.DataFrame
    reference: pd.DataFrame
    kinds: dict[str, Kind]
    notes: tuple[str, ...] = field(default=())


def measure_drift(
    current: pd.DataFrame,
    reference: pd.DataFrame,
    *,
    columns: Sequence[str] | None = None,
    prediction: str | None = "prediction",
    categorical: Sequence[str] = (),
    settings: DriftSettings | None = None,
) -> DriftResult:
    """Compare two windows of raw records.

    `columns` are the input columns (default: every column of the reference but the prediction's);
    `prediction` is judged apart from them and does not count in the share. Fields that cannot be compared
    (lists, objects, times, identifiers, absent columns) are left out and named in the notes.
    """
    settings = settings or DriftSettings()
    if columns is None:
        columns = [str(c) for c in reference.columns if c != prediction]
    if min(len(current), len(reference)) < settings.min_rows:
        note = (
            f"drift needs {settings.min_rows} rows on both sides: "
            f"{len(current)} current, {len(reference)} reference"
        )
        return DriftResult(drift_share=settings.drift_share, notes=(note,))
    prepared = prepare_columns(current, reference, columns, categorical=categorical, settings=settings)
    notes = list(prepared.notes)
    scored = tuple(measure_column(prepared, name, settings) for name in prepared.kinds)
    predicted = None
    if prediction is not None and prediction in current and prediction in reference:
        outputs = prepare_columns(
            current, reference, [prediction], categorical=[prediction], settings=settings
        )
        notes += outputs.notes
        if prediction in outputs.kinds:
            predicted = measure_column(outputs, prediction, settings)
    return DriftResult(
        columns=scored, prediction=predicted, drift_share=settings.drift_share, notes=tuple(notes)
    )


def prepare_columns(
    current: pd.DataFrame,
    reference: pd.DataFrame,
    columns: Sequence[str],
    *,
    categorical: Sequence[str] = (),
    settings: DriftSettings | None = None,
) -> PreparedColumns:
    """Bring both windows to one form; the reference alone decides a column's kind, so that it cannot flip.

    A numeric column with gaps gets a companion `X is missing`, so that a field that stops coming is seen.
    """
    import pandas as pd

    settings = settings or DriftSettings()
    ours: dict[str, pd.Series[Any]] = {}
    theirs: dict[str, pd.Series[Any]] = {}
    kinds: dict[str, Kind] = {}
    notes: list[str] = []

    def add(name: str, kind: Kind, now: pd.Series[Any], then: pd.Series[Any]) -> None:
        ours[name], theirs[name], kinds[name] = now, then, kind

    for name in columns:
        if name not in current or name not in reference:
            where = "current" if name not in current else "reference"
            notes.append(f"{name}: left out, not in the {where} rows")
            continue
        now, then = current[name], reference[name]
        kind = "categorical" if name in categorical else _kind(then, settings)
        trouble = _not_comparable(now, then, declared=name in categorical)
        if trouble:
            notes.append(f"{name}: left out, {trouble}")
        elif kind == "categorical":
            kept = _top_values(then, settings.max_categories)
            add(name, kind, _as_category(now, kept), _as_category(then, kept))
        else:
            x, y = _as_number(now), _as_number(then)
            if x.notna().sum() >= settings.min_rows // 2:
                add(name, kind, x, y)
            else:
                notes.append(f"{name}: hardly any number in the current rows, only its gaps are compared")
            if x.isna().any() or y.isna().any():
                add(f"{name} is missing", "categorical", _yes_no(x.isna()), _yes_no(y.isna()))
    return PreparedColumns(
        pd.DataFrame(ours).reset_index(drop=True),
        pd.DataFrame(theirs).reset_index(drop=True),
        kinds,
        tuple(notes),
    )


def measure_column(prepared: PreparedColumns, name: str, settings: DriftSettings) -> ColumnDrift:
    """The distance of one prepared column, by the method of its kind."""
    kind = prepared.kinds[name]
    now, then = prepared.current[name], prepared.reference[name]
    if kind == "numeric":
        x = now.dropna().to_numpy(dtype=float)
        y = then.dropna().to_numpy(dtype=float)
        score = wasserstein(x, y)
        threshold = max(settings.numeric_threshold, wasserstein_noise(y, len(x)))
    else:
        a, b = _counts(now, then)
        score = jensen_shannon(a, b)
        cells = int(np.count_nonzero(a + b))
        threshold = max(settings.categorical_threshold, jensen_shannon_noise(cells, len(now), len(then)))
    return ColumnDrift(name, kind, METHODS[kind], score, round(threshold, 6))


def jensen_shannon(a: np.ndarray, b: np.ndarray) -> float:
    """Jensen-Shannon distance (natural log) between two vectors of counts; 0 = the same, 0.83 = disjoint."""
    p, q = a / a.sum(), b / b.sum()
    m = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.where(p > 0, p * np.log(p / m), 0.0).sum()
        right = np.where(q > 0, q * np.log(q / m), 0.0).sum()
    return math.sqrt(max(0.0, float(left + right) / 2))


def jensen_shannon_noise(cells: int, n: int, m: int) -> float:
    """What the distance of two samples of one distribution exceeds about once in a thousand times.

    8 times the divergence over (1/n + 1/m) is chi-square with cells - 1 degrees of freedom, near enough.
    """
    if cells < 2:
        return 0.0
    from scipy.stats import chi2

    return math.sqrt(float(chi2.ppf(0.999, cells - 1)) / 8 * (1 / n + 1 / m))


def wasserstein(x: np.ndarray, y: np.ndarray) -> float:
    """Wasserstein distance of x from the reference y, in standard deviations of y."""
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(y, x)) / max(float(np.std(y)), 0.001)


def wasserstein_noise(y: np.ndarray, n: int) -> float:
    """What the distance of two samples of one distribution exceeds about once in a thousand times.

    Under no change the distance is the area under a Brownian bridge, |B(F(x))| dx: its mean is
    sqrt(2/pi) * integral of sqrt(F(1-F)), and three times its mean lies beyond its 99.9th percentile.
    """
    values = np.sort(y)
    rank = np.arange(1, len(values)) / len(values)
    area = float(np.sum(np.sqrt(rank * (1 - rank)) * np.diff(values)))
    spread = max(float(np.std(y)), 0.001)
    return 3 * math.sqrt(2 / math.pi) * area / spread * math.sqrt(1 / n + 1 / len(values))


def _kind(reference: pd.Series[Any], settings: DriftSettings) -> Kind:
    import pandas as pd

    if pd.api.types.is_bool_dtype(reference):
        return "categorical"
    present = reference[reference.notna()]
    numbers = pd.to_numeric(present.astype(object), errors="coerce")
    if present.empty or isinstance(present.iloc[0], str) or numbers.notna().mean() < 0.95:
        return "categorical"
    return "numeric" if numbers.nunique() > settings.numeric_from else "categorical"


def _not_comparable(now: pd.Series[Any], then: pd.Series[Any], *, declared: bool) -> str | None:
    import pandas as pd

    for values in (then, now):
        if pd.api.types.is_datetime64_any_dtype(values):
            return "it holds times"
        if any(isinstance(v, (list, tuple, dict, set, np.ndarray, bytes)) for v in values):
            return "it holds lists or objects"
    if then.notna().sum() == 0:
        return "it is empty in the reference rows"
    texts = [v for v in then if isinstance(v, str)]
    if not declared and len(texts) > 100 and len(set(texts)) > len(then) / 2:
        return "nearly every row has a value of its own (an identifier or free text)"
    return None


def _as_number(values: pd.Series[Any]) -> pd.Series[Any]:
    import pandas as pd

    numbers = pd.to_numeric(values.astype(object), errors="coerce").astype(float)
    return numbers.replace([np.inf, -np.inf], np.nan).reset_index(drop=True)


def _texts(values: pd.Series[Any]) -> list[str]:
    return [MISSING if gap else _text(v) for v, gap in zip(values, values.isna(), strict=True)]


def _text(value: object) -> str:
    """One spelling per value: a column of integers becomes one of floats when a gap is in it."""
    if isinstance(value, (float, np.floating)) and math.isfinite(float(value)) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _top_values(reference: pd.Series[Any], most: int) -> set[str]:
    return {value for value, _ in Counter(_texts(reference)).most_common(most)}


def _as_category(values: pd.Series[Any], kept: set[str]) -> pd.Series[Any]:
    import pandas as pd

    return pd.Series([t if t in kept or t == MISSING else OTHER for t in _texts(values)], dtype=object)


def _yes_no(flags: pd.Series[Any]) -> pd.Series[Any]:
    return flags.map({True: "yes", False: "no"}).astype(object)


def _counts(now: pd.Series[Any], then: pd.Series[Any]) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = now.value_counts(), then.value_counts()
    keys = sorted(set(ours.index) | set(theirs.index))
    return (
        np.array([ours.get(k, 0) for k in keys], dtype=float),
        np.array([theirs.get(k, 0) for k in keys], dtype=float),
    )
