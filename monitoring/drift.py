"""How far the current rows are from the reference rows, column by column.

Method and threshold are chosen here, by column kind, and never left to a library's default:

* numeric columns: the Wasserstein distance divided by the reference's standard deviation
  ("the mass moved by so many standard deviations on average"), threshold 0.1;
* categorical columns: the Jensen-Shannon distance (natural log), threshold 0.1;
* free text: three descriptors in its place, each judged as a number is, threshold 0.1: its length in characters, its
  words, and the percentage of its characters that are neither letters nor spaces. They are Evidently's `TextLength`,
  `WordCount` and `NonLetterCharacterPercentage`, which need no download; words may have letters of any alphabet here;
* embeddings (lists of numbers of one length): the Euclidean distance between the two means, divided by the reference's
  total standard deviation (the root of the summed variances), threshold 0.1. It costs one pass over the numbers, where
  a domain classifier would have to be trained; a change of shape that leaves the mean in place is not seen.

All distances are positive even when nothing has changed, and the fewer the rows the larger they are. So
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

Kind = Literal["numeric", "categorical", "text", "embedding"]

METHODS: dict[Kind, str] = {
    "numeric": "wasserstein",
    "categorical": "jensenshannon",
    "text": "wasserstein",
    "embedding": "mean distance",
}
"""Evidently's names of the methods, which are also what is computed here; it has none for embeddings."""

DESCRIPTORS = ("length", "words", "non-letter %")
"""What a column of free text is judged by: as columns `NAME: length` and so on."""
TEXT_READ = 2_000
"""Words and letters are counted in so many characters of a text, from its start."""

MISSING = "(missing)"
OTHER = "(other)"


@dataclass(frozen=True, slots=True)
class DriftSettings:
    """What counts as drift."""

    numeric_threshold: float = 0.1
    categorical_threshold: float = 0.1
    text_threshold: float = 0.1
    embedding_threshold: float = 0.1
    drift_share: float = 0.5
    """Share of drifted columns from which the whole window counts as drifted."""
    max_categories: int = 30
    """The reference's most frequent values are kept apart; all others are one value, `(other)`."""
    numeric_from: int = 20
    """A column of numbers with this many different values or fewer is categorical (codes, flags, counts)."""
    min_rows: int = 50
    """With fewer current or reference rows no drift is measured."""
    text_words: int = 3
    text_length: int = 100
    """Texts of which nearly every one differs are free text if half of them have this many words, or characters; if
    not, they are identifiers, and left out."""


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
class Moments:
    """What is kept of a window's embeddings: their mean [D], the sum of their D variances, and how many there are."""

    mean: np.ndarray
    variance: float
    rows: int


@dataclass(frozen=True, slots=True)
class PreparedColumns:
    """Both windows' columns in one form: numbers as float, everything else as text without gaps.

    `embeddings` has the moments of the current and of the reference rows, by column; they are in no frame.
    """

    current: pd.DataFrame
    reference: pd.DataFrame
    kinds: dict[str, Kind]
    notes: tuple[str, ...] = field(default=())
    embeddings: dict[str, tuple[Moments, Moments]] = field(default_factory=dict)


def measure_drift(
    current: pd.DataFrame,
    reference: pd.DataFrame,
    *,
    columns: Sequence[str] | None = None,
    prediction: str | None = "prediction",
    categorical: Sequence[str] = (),
    settings: DriftSettings | None = None,
    prepared: PreparedColumns | None = None,
) -> DriftResult:
    """Compare two windows of raw records.

    `columns` are the input columns (default: every column of the reference but the prediction's), and `prepared` is
    what `prepare_columns` made of them, if it has been asked; `prediction` is judged apart from them and does not count
    in the share. Fields that cannot be compared (objects, lists of other things than numbers, times, identifiers,
    absent columns) are left out and named in the notes.
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
    if prepared is None:
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

    A column of numbers, texts or embeddings with gaps gets a companion `X is missing`, so that a field that stops
    coming is seen. Free text is replaced by its descriptors.
    """
    settings = settings or DriftSettings()
    draft = _Draft(settings)
    for name in columns:
        if name not in current or name not in reference:
            where = "current" if name not in current else "reference"
            draft.notes.append(f"{name}: left out, not in the {where} rows")
            continue
        now, then = current[name].reset_index(drop=True), reference[name].reset_index(drop=True)
        try:
            kind = _kind(now, then, settings, declared=name in categorical)
        except _NotComparableError as error:
            draft.notes.append(f"{name}: left out, {error}")
            continue
        if kind == "categorical":
            draft.add_category(name, now, then)
        else:
            draft.add_other(name, kind, now, then)
    return draft.finished()


class _NotComparableError(Exception):
    """A column is left out; the message says why."""


class _Draft:
    """`PreparedColumns` in the making."""

    def __init__(self, settings: DriftSettings) -> None:
        self.settings = settings
        self.ours: dict[str, pd.Series[Any]] = {}
        self.theirs: dict[str, pd.Series[Any]] = {}
        self.kinds: dict[str, Kind] = {}
        self.notes: list[str] = []
        self.embeddings: dict[str, tuple[Moments, Moments]] = {}

    def add(self, name: str, kind: Kind, now: pd.Series[Any], then: pd.Series[Any]) -> None:
        self.ours[name], self.theirs[name], self.kinds[name] = now, then, kind

    def add_category(self, name: str, now: pd.Series[Any], then: pd.Series[Any]) -> None:
        ours, theirs = _texts(now), _texts(then)
        kept = _top_values(theirs, self.settings.max_categories)
        self.add(name, "categorical", _as_category(ours, kept), _as_category(theirs, kept))

    def add_other(self, name: str, kind: Kind, now: pd.Series[Any], then: pd.Series[Any]) -> None:
        """Numbers, texts or embeddings, and beside them their gaps if they have any."""
        if kind == "numeric":
            now, then = _as_number(now), _as_number(then)
        width = _width(then) if kind == "embedding" else 0
        has, has_then = (_present(values, kind, width) for values in (now, then))
        if has.sum() < self.settings.min_rows // 2:
            noun = _NOUNS[kind]
            self.notes.append(f"{name}: hardly any {noun} in the current rows, only its gaps are compared")
        elif kind == "numeric":
            self.add(name, kind, now, then)
        elif kind == "text":
            described, described_then = _describe(now[has]), _describe(then[has_then])
            for which in DESCRIPTORS:
                mine, other = described[which].reindex(now.index), described_then[which].reindex(then.index)
                self.add(f"{name}: {which}", kind, mine, other)
        else:
            self.embeddings[name] = _moments(now[has]), _moments(then[has_then])
            self.kinds[name] = kind
        if not (has.all() and has_then.all()):
            self.add(f"{name} is missing", "categorical", _yes_no(~has), _yes_no(~has_then))

    def finished(self) -> PreparedColumns:
        import pandas as pd

        frames = pd.DataFrame(self.ours), pd.DataFrame(self.theirs)
        return PreparedColumns(*frames, self.kinds, tuple(self.notes), self.embeddings)


def measure_column(prepared: PreparedColumns, name: str, settings: DriftSettings) -> ColumnDrift:
    """The distance of one prepared column, by the method of its kind."""
    kind = prepared.kinds[name]
    if kind == "embedding":
        ours, theirs = prepared.embeddings[name]
        score = mean_distance(ours, theirs)
        threshold = max(settings.embedding_threshold, mean_distance_noise(ours.rows, theirs.rows))
        return ColumnDrift(name, kind, METHODS[kind], score, round(threshold, 6))
    now, then = prepared.current[name], prepared.reference[name]
    if kind in ("numeric", "text"):
        x = now.dropna().to_numpy(dtype=float)
        y = then.dropna().to_numpy(dtype=float)
        score = wasserstein(x, y)
        limit = settings.numeric_threshold if kind == "numeric" else settings.text_threshold
        threshold = max(limit, wasserstein_noise(y, len(x)))
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


def mean_distance(now: Moments, then: Moments) -> float:
    """Distance of the mean from the reference's, in total standard deviations of the reference."""
    return float(np.linalg.norm(now.mean - then.mean)) / max(math.sqrt(then.variance), 0.001)


def mean_distance_noise(n: int, m: int) -> float:
    """What the distance of two samples of one distribution exceeds at most about once in a thousand times.

    The squared distance over (1/n + 1/m) is a weighted mean of chi-squares with one degree of freedom each, the weights
    being the shares of the principal components in the variance. Far out, its tail is heaviest when one component has
    all of it (Szekely and Bakirov 2003, Probability Theory and Related Fields 126, 184-202), so that this holds for any
    correlation between the numbers.
    """
    from scipy.stats import chi2

    return math.sqrt(float(chi2.ppf(0.999, 1)) * (1 / n + 1 / m))


_NOUNS: dict[Kind, str] = {"numeric": "number", "text": "text", "embedding": "list of that length"}


def _kind(now: pd.Series[Any], then: pd.Series[Any], settings: DriftSettings, *, declared: bool) -> Kind:
    """What kind a column is, by its reference rows. Raises _NotComparableError with the reason."""
    import pandas as pd

    present = then[then.notna()]
    if any(pd.api.types.is_datetime64_any_dtype(values) for values in (then, now)):
        raise _NotComparableError("it holds times")
    if present.empty:
        raise _NotComparableError("it is empty in the reference rows")
    if not declared and _width(then):
        return "embedding"
    if any(_is_nested(values) for values in (then, now)):
        raise _NotComparableError("it holds lists or objects")
    if declared or pd.api.types.is_bool_dtype(then):
        return "categorical"
    if pd.api.types.is_numeric_dtype(then):
        return "numeric" if present.nunique() > settings.numeric_from else "categorical"
    return _kind_of_objects(present, len(then), settings)


def _kind_of_objects(present: pd.Series[Any], rows: int, settings: DriftSettings) -> Kind:
    """The kind of a column whose values are not of one numeric type; `rows` counts the gaps too."""
    import pandas as pd

    texts = [v for v in present if isinstance(v, str)]
    if len(texts) > 100 and len(set(texts)) > rows / 2:
        words = np.median([len(text[:TEXT_READ].split()) for text in texts])
        if words >= settings.text_words or np.median([len(text) for text in texts]) >= settings.text_length:
            return "text"
        raise _NotComparableError("nearly every row has a value of its own (an identifier)")
    numbers = pd.to_numeric(present, errors="coerce")
    if isinstance(present.iloc[0], str) or numbers.notna().mean() < 0.95:
        return "categorical"
    return "numeric" if numbers.nunique() > settings.numeric_from else "categorical"


def _present(values: pd.Series[Any], kind: Kind, width: int) -> pd.Series[Any]:
    """Which values are of the kind: numbers, texts, or lists of `width` numbers."""
    import pandas as pd

    if kind == "numeric":
        return values.notna()
    flags = [isinstance(v, str) if kind == "text" else _is_vector(v, width) for v in values]
    return pd.Series(flags, index=values.index, dtype=bool)


def _is_nested(values: pd.Series[Any]) -> bool:
    kinds = (list, tuple, dict, set, np.ndarray, bytes)
    return values.dtype == object and any(isinstance(v, kinds) for v in values)


def _width(reference: pd.Series[Any]) -> int:
    """The common length of a column's lists of numbers; 0 where it has none, or they differ in length."""
    if reference.dtype != object:
        return 0
    present = [v for v in reference if isinstance(v, (list, tuple, np.ndarray))]
    if not present or len(present) < 0.95 * int(reference.notna().sum()):
        return 0
    width, often = Counter(map(len, present)).most_common(1)[0]
    fits = width > 1 and often >= 0.95 * len(present) and all(_is_vector(v, width) for v in present[:20])
    return width if fits else 0


def _is_vector(value: object, width: int) -> bool:
    """Whether a value is a list of so many finite numbers."""
    if not isinstance(value, (list, tuple, np.ndarray)) or len(value) != width:
        return False
    try:
        numbers = np.asarray(value)
    except ValueError:  # lists of lists, of different lengths
        return False
    return numbers.ndim == 1 and numbers.dtype.kind in "iuf" and bool(np.isfinite(numbers).all())


def _moments(vectors: pd.Series[Any]) -> Moments:
    """Mean and total variance, summed over pieces so that memory stays small, about the first vector."""
    first = np.asarray(vectors.iloc[0], dtype=float)
    total, squares = np.zeros(len(first)), 0.0
    for start in range(0, len(vectors), 256):
        part = np.array([np.asarray(v, dtype=float) for v in vectors.iloc[start : start + 256]]) - first
        total += part.sum(axis=0)
        squares += float((part**2).sum())
    mean = total / len(vectors)
    variance = max(0.0, squares / len(vectors) - float((mean**2).sum()))
    return Moments(first + mean, variance, len(vectors))


def _describe(texts: pd.Series[Any]) -> dict[str, pd.Series[Any]]:
    """Each text's descriptors, as float, by their names."""
    import pandas as pd

    starts = [text[:TEXT_READ] for text in texts]
    figures = (
        [float(len(text)) for text in texts],
        [float(sum(any(map(str.isalpha, word)) for word in text.split())) for text in starts],
        [
            100 * (1 - (sum(map(str.isalpha, text)) + text.count(" ")) / len(text)) if text else 0.0
            for text in starts
        ],
    )
    return {
        name: pd.Series(values, index=texts.index, dtype=float)
        for name, values in zip(DESCRIPTORS, figures, strict=True)
    }


def _as_number(values: pd.Series[Any]) -> pd.Series[Any]:
    import pandas as pd

    numbers = pd.to_numeric(values.astype(object), errors="coerce").astype(float)
    return numbers.replace([np.inf, -np.inf], np.nan).reset_index(drop=True)


def _texts(values: pd.Series[Any]) -> pd.Series[Any]:
    """Each value's spelling. Every different value is spelled once."""
    spelled: dict[tuple[type, Any], str] = {}

    def spell(value: Any) -> str:
        key = (type(value), value)  # True is 1, but spelled otherwise
        try:
            text = spelled.get(key)
        except TypeError:  # it cannot be looked up by
            return _text(value)
        if text is None:
            text = spelled[key] = _text(value)
        return text

    return values.astype(object).map(spell, na_action="ignore").where(values.notna(), MISSING)


def _text(value: object) -> str:
    """One spelling per value: a column of integers becomes one of floats when a gap is in it."""
    if isinstance(value, (float, np.floating)) and math.isfinite(float(value)) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _top_values(reference: pd.Series[Any], most: int) -> set[str]:
    return {value for value, _ in Counter(reference).most_common(most)}


def _as_category(texts: pd.Series[Any], kept: set[str]) -> pd.Series[Any]:
    return texts.where(texts.isin(kept | {MISSING}), OTHER).astype(object).reset_index(drop=True)


def _yes_no(flags: pd.Series[Any]) -> pd.Series[Any]:
    return flags.map({True: "yes", False: "no"}).astype(object)


def _counts(now: pd.Series[Any], then: pd.Series[Any]) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = now.value_counts(), then.value_counts()
    keys = sorted(set(ours.index) | set(theirs.index))
    return (
        np.array([ours.get(k, 0) for k in keys], dtype=float),
        np.array([theirs.get(k, 0) for k in keys], dtype=float),
    )
