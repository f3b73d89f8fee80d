"""The reference: validation rows with full precision's answers, which served traffic is compared with."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

from compression.data import Data
from compression.errors import WorkloadError
from compression.export import run
from compression.measure import decode, open_checked
from compression.variant import Reference, ReferenceColumn, ReferenceGroup
from compression.workload import Predictions, Workload

__all__ = ["make_reference", "reads_probabilities_as_logits"]

REFERENCE_ROWS = 5000
COLUMNS = 50
"""So many fields of a record are binned at most, in the order of their names."""
_RANGES, _VALUES = 5, 9
"""Bins of a field of numbers, of about the same number of rows each; and most values that have a bin of their own."""
_TEXT_CHARS = 40
"""Fields whose values are longer than this on average are texts, which have no bins."""

_PROBABILITIES = (
    "the first output looks like probabilities (each row adds up to 1), and decode() reads it as logits: the classes "
    "are right, the confidences are not; override decode() in workload.py"
)


def make_reference(
    workload: Workload, data: Data, onnx_bytes: bytes
) -> tuple[bytes, Reference, tuple[str, ...]]:
    """The rows as a parquet file, their summary, and what to warn of."""
    rows = data.rows("validation")
    picked = np.arange(len(rows))
    if len(rows) > REFERENCE_ROWS:
        picked = np.sort(np.random.default_rng(0).permutation(len(rows))[:REFERENCE_ROWS])
    chosen = rows.take(picked)
    session = open_checked(onnx_bytes, chosen.tensors)
    output = run(session, chosen.tensors, 1024)
    predictions = decode(workload, session, output)
    warnings = (_PROBABILITIES,) if reads_probabilities_as_logits(workload, output) else ()
    groups = {name: values[picked] for name, values in data.groups("validation").items()}
    added = {"label": chosen.labels, "prediction": predictions.classes, "confidence": predictions.confidences}
    added |= {f"group_{name}": values for name, values in groups.items()}
    clash = added.keys() & set(chosen.records.columns)
    if clash:
        raise WorkloadError(
            f"no record field may be called {min(clash)}: the reference has a column of that name"
        )
    buffer = io.BytesIO()
    chosen.records.reset_index(drop=True).assign(**added).to_parquet(buffer, index=False)
    positive = predictions.classes == workload.positive
    summary = {
        f"{attribute}={value}": ReferenceGroup(
            rows=int((values == value).sum()), positive_rate=float(positive[values == value].mean())
        )
        for attribute, values in groups.items()
        for value in np.unique(values)
    }
    classes = len(workload.classes)
    reference = Reference(
        rows=len(chosen),
        groups=summary,
        labels=tuple((np.bincount(chosen.labels, minlength=classes) / len(chosen)).tolist()),
        answers=tuple((np.bincount(predictions.classes, minlength=classes) / len(chosen)).tolist()),
        calibration=calibrate(predictions.confidences, predictions.classes == chosen.labels),
        runner_up=_runner_up(workload, output, predictions, chosen.labels),
        columns=tuple(
            column
            for name in sorted(map(str, chosen.records.columns))[:COLUMNS]
            if (column := bin_column(name, chosen.records[name])) is not None
        ),
    )
    return buffer.getvalue(), reference, warnings


def calibrate(confidences: np.ndarray, right: np.ndarray) -> tuple[tuple[float, float], ...]:
    """How often an answer is right, by its confidence: the rising curve that fits best.

    Isotonic regression (Zadrozny & Elkan, "Transforming classifier scores into accurate multiclass probability
    estimates", KDD 2002). Between the points the curve is linear.

    Args:
        confidences: float [N]; rows that are no numbers are left out.
        right: bool [N].

    Returns:
        Points (confidence, probability), rising in both; empty without rows.
    """
    finite = np.isfinite(confidences)
    x, place = np.unique(confidences[finite], return_inverse=True)
    if not len(x):
        return ()
    rows = np.bincount(place)
    share = np.bincount(place, weights=right[finite]) / rows
    fitted = isotonic_regression(share, weights=rows)
    points = []
    for first, end in zip(fitted.blocks[:-1], fitted.blocks[1:], strict=True):
        level = float(fitted.x[first])
        points += [(float(x[at]), level) for at in sorted({int(first), int(end) - 1})]
    return tuple(points)


def bin_column(name: str, values: pd.Series) -> ReferenceColumn | None:
    """A field's values in bins, with the share of the rows in each; None for texts, lists and the like.

    The last bin is for what is missing, or no finite number in a field of numbers.
    """
    if pd.api.types.is_numeric_dtype(values.dtype) and not pd.api.types.is_bool_dtype(values.dtype):
        return _ranges(name, values.to_numpy(np.float64, na_value=np.nan))
    known = values.dropna()
    if known.empty or not known.map(lambda value: isinstance(value, (str, bool, np.bool_))).all():
        return None
    texts = known.map(str)
    if texts.map(len).mean() > _TEXT_CHARS:
        return None
    seen = Counter(texts)
    common = [value for value, _ in sorted(seen.items(), key=lambda item: (-item[1], item[0]))[:_VALUES]]
    counted = [seen[value] for value in common]
    others = len(known) - sum(counted)
    return _column(name, (), tuple(common), [*counted, others, len(values) - len(known)])


def _ranges(name: str, values: np.ndarray) -> ReferenceColumn | None:
    """A field of numbers in bins; None where all are alike, which no drift could be told from."""
    numbers = values[np.isfinite(values)]
    distinct = np.unique(numbers)
    if len(distinct) < 2:
        return None
    if len(distinct) <= _VALUES:
        edges = (distinct[:-1] + distinct[1:]) / 2
    else:
        edges = np.unique(np.quantile(numbers, np.arange(1, _RANGES) / _RANGES))
        edges = edges[edges > distinct[0]]  # or the first bin would have nothing in it
    counts = np.bincount(np.searchsorted(edges, numbers, side="right"), minlength=len(edges) + 1)
    return _column(name, tuple(edges.tolist()), (), [*counts.tolist(), len(values) - len(numbers)])


def reads_probabilities_as_logits(workload: Workload, output: np.ndarray) -> bool:
    """Whether the default decode() would take a softmax of outputs [N, K] that are a softmax already."""
    if type(workload).decode is not Workload.decode or output.ndim != 2:
        return False
    return bool((output >= 0).all() and np.allclose(output.sum(axis=1), 1.0, atol=1e-3))


def _column(
    name: str, edges: tuple[float, ...], values: tuple[str, ...], counts: list[int]
) -> ReferenceColumn:
    total = sum(counts)
    return ReferenceColumn(
        name=name, edges=edges, values=values, shares=tuple(count / total for count in counts)
    )


def _runner_up(workload: Workload, output: np.ndarray, predictions: Predictions, labels: np.ndarray) -> float:
    """Where the answer is wrong, how often the second choice is right; 1 where the outputs do not say which that is."""
    if len(workload.classes) == 2 or type(workload).decode is not Workload.decode:
        return 1.0
    wrong = predictions.classes != labels
    second = np.argsort(np.nan_to_num(output[wrong]), axis=1)[:, -2]
    # One row more of each kind, so that a handful of rows promises neither all nor nothing.
    return float((second == labels[wrong]).sum() + 1) / float(wrong.sum() + 2)
