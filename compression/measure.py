"""Measure a variant against full precision on the test split."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compression.cascade import choose, keeps
from compression.data import Data, Rows
from compression.errors import WorkloadError
from compression.export import open_session, run
from compression.graph import count_macs, count_parameters
from compression.intervals import mean_of, paired_drop, proportion
from compression.scorecard import CascadePoint, ClassScore, Estimate, GroupScore, Latency, Scorecard
from compression.variant import FULL, this_cpu
from compression.workload import Metric, Predictions, SplitName, Tensors, Workload

if TYPE_CHECKING:
    import onnxruntime

LATENCY_BATCHES = (1, 32)
SENSITIVITY_BATCHES = (2, 8, 64)
SENSITIVITY_ROWS = 512
_TURN = 5
"""Calls of one model before it is the other's turn: milliseconds for most, in which a machine hardly changes."""


@dataclass(frozen=True)
class Answers:
    """Answers of one model to all rows of a split, each array [N].

    Attributes:
        classes: class indices; `confidences` their probabilities, NaN where the outputs are no numbers.
        finite: whether the outputs are numbers.
    """

    classes: np.ndarray
    confidences: np.ndarray
    finite: np.ndarray

    def above(self, threshold: float, other: Answers) -> Answers:
        """These answers where they are confident enough, and those of another model elsewhere."""
        kept = keeps(self.confidences, threshold)
        return Answers(
            np.where(kept, self.classes, other.classes),
            np.where(kept, self.confidences, other.confidences),
            np.where(kept, self.finite, other.finite),
        )


@dataclass(frozen=True)
class Pairs:
    """Answers of a variant and of full precision to the same rows, each array [N].

    Attributes:
        right: whether the variant is right; `full_right` whether full precision is.
        invalid: how many of the variant's outputs are no numbers.
    """

    classes: np.ndarray
    full_classes: np.ndarray
    right: np.ndarray
    full_right: np.ndarray
    labels: np.ndarray
    invalid: int = 0

    @classmethod
    def of(cls, own: Answers, full: Answers, labels: np.ndarray) -> Pairs:
        """Compare two models' answers with the labels."""
        # An answer that is no number is a wrong one, whatever class argmax makes of it.
        right = (own.classes == labels) & own.finite
        full_right = (full.classes == labels) & full.finite
        return cls(own.classes, full.classes, right, full_right, labels, int((~own.finite).sum()))

    def among(self, rows: np.ndarray) -> Pairs:
        """The pairs of some rows, bool [N]."""
        arrays = (self.classes, self.full_classes, self.right, self.full_right, self.labels)
        return Pairs(*(array[rows] for array in arrays))

    def about(self, workload: Workload) -> Pairs:
        """The pairs that the workload's metric is about: of named classes only, where it names some."""
        return self.among(_about(workload, self.labels)) if workload.recall_of else self

    def by_class(self) -> dict[int, Pairs]:
        """The pairs of each true class that occurs."""
        return {int(label): self.among(self.labels == label) for label in np.unique(self.labels)}


def measure(
    workload: Workload, data: Data, name: str, onnx_bytes: bytes, full_onnx: bytes, size: int | None = None
) -> Scorecard:
    """Measure everything that a scorecard holds; takes a few seconds, most of it for latencies.

    What full precision answers is found out once for each `data`.

    Args:
        name: the variant's name.
        onnx_bytes: the variant; `full_onnx` the full-precision model it is held against.
        size: bytes of the variant on disk, where it is kept in a coded file.

    Raises:
        WorkloadError: a model does not fit `encode` and `decode` of the workload.
    """
    import onnx

    rows = data.rows("test")
    for split in ("test", "validation"):
        if not _about(workload, data.rows(split).labels).any():
            raise WorkloadError(f"the {split} split of {workload.name} has no row of a class in recall_of")
    own, full = (open_checked(content, rows.tensors) for content in (onnx_bytes, full_onnx))
    digest = hashlib.sha256(full_onnx).hexdigest()

    def of_full(split: SplitName) -> Answers:
        return data.once(("answers", digest, split), lambda: answer(workload, full, data.rows(split).tensors))

    own_answers, full_answers = answer(workload, own, rows.tensors), of_full("test")
    pairs = Pairs.of(own_answers, full_answers, rows.labels)
    graph = onnx.load_model_from_string(onnx_bytes)
    parameters = count_parameters(graph)
    latencies = [latency(own, full, rows.tensors, batch) for batch in LATENCY_BATCHES]
    points = []
    if name != FULL:
        time_ratio = 1 / latencies[LATENCY_BATCHES.index(1)].speedup
        thresholds = _thresholds(workload, own, of_full("validation"), data.rows("validation"))
        points = [
            _cascade_point(workload, data, (own_answers, full_answers), max_drop, threshold, time_ratio)
            for max_drop, threshold in thresholds.items()
        ]
    return Scorecard(
        workload=workload.name,
        variant=name,
        metric=workload.metric,
        recall_of=workload.settings.recall_of,
        rows=len(rows),
        quality=quality(workload.metric, pairs.about(workload)),
        drop=drop(workload.metric, pairs.about(workload)),
        agreement=float((pairs.classes == pairs.full_classes).mean()),
        classes=_class_scores(workload, pairs),
        groups=_group_scores(workload, data.groups("test"), pairs),
        invalid_outputs=pairs.invalid,
        size_bytes=len(onnx_bytes) if size is None else size,
        full_size_bytes=len(full_onnx),
        parameters=parameters.total,
        nonzero_parameters=parameters.nonzero,
        macs=count_macs(graph, rows.tensors),
        latency=latencies,
        batch_sensitivity=batch_sensitivity(workload, own, rows.tensors),
        cpu=this_cpu().model,
        cascade=points,
    )


def open_checked(onnx_bytes: bytes, tensors: Tensors) -> onnxruntime.InferenceSession:
    """A session of a model that takes what `encode` makes.

    Raises:
        WorkloadError: inputs, types or shapes differ, or the batch is fixed; ONNX Runtime's words for it are many.
    """
    session = open_session(onnx_bytes)
    wanted = {value.name: value for value in session.get_inputs()}
    if wanted.keys() != tensors.keys():
        raise WorkloadError(
            f"encode() makes the tensors {', '.join(sorted(tensors))}; "
            f"the model takes {', '.join(sorted(wanted))}"
        )
    fixed = [name for name, value in wanted.items() if value.shape and isinstance(value.shape[0], int)]
    if fixed:
        raise WorkloadError(
            f"the first axis of input {fixed[0]} is fixed: export the model with a dynamic batch"
        )
    try:
        session.run(None, {name: array[:1] for name, array in tensors.items()})
    except Exception as error:  # ONNX Runtime's errors share no base class
        first = str(error).strip().partition("\n")[0]
        raise WorkloadError(f"the model does not take what encode() makes: {first}") from error
    return session


def answer(workload: Workload, session: onnxruntime.InferenceSession, tensors: Tensors) -> Answers:
    """Classes and confidences for all rows, answered in batches."""
    output = run(session, tensors)
    predictions = decode(workload, session, output)
    finite = np.isfinite(output).reshape(len(output), -1).all(axis=1)
    return Answers(predictions.classes, np.where(finite, predictions.confidences, np.nan), finite)


def decode(workload: Workload, session: onnxruntime.InferenceSession, output: np.ndarray) -> Predictions:
    """The workload's reading of the first output; rows that are no numbers decode quietly to some class."""
    output = output.view()
    output.flags.writeable = False  # as it may be in a server: `Workload.decode` must not work in place
    with np.errstate(invalid="ignore", over="ignore"):
        return workload.decode({session.get_outputs()[0].name: output})


def quality(metric: Metric, pairs: Pairs) -> Estimate:
    """The variant's accuracy, or the mean recall of the classes that occur, with its interval."""
    if metric == "accuracy":
        return proportion(int(pairs.right.sum()), len(pairs.right))
    return mean_of([quality("accuracy", part) for part in pairs.by_class().values()])


def drop(metric: Metric, pairs: Pairs) -> Estimate:
    """How much lower the quality is than full precision's on the same rows, with a paired interval."""
    if metric == "accuracy":
        return paired_drop(pairs.right, pairs.full_right)
    return mean_of([drop("accuracy", part) for part in pairs.by_class().values()])


def latency(
    session: onnxruntime.InferenceSession,
    full: onnxruntime.InferenceSession,
    tensors: Tensors,
    batch: int,
    *,
    budget_s: float = 0.6,
    least: int = 30,
    most: int = 2000,
) -> Latency:
    """Time both models on the same rows in turns, so that a busy machine slows both alike.

    A turn is several calls, and the first of them is not counted: it brings the model's weights back into the
    processor's caches. Were the models to change places after every call, the larger one would push the smaller one out
    each time, and hide most of what being small is worth to a model that answers one request after the other.

    Args:
        batch: rows per call.
        budget_s: stop after this many seconds of measuring, but not before `least` calls of each, and after `most`.
    """
    rows = len(next(iter(tensors.values())))
    picked = np.arange(batch) % rows
    feed = {name: array[picked] for name, array in tensors.items()}
    for _ in range(5):
        session.run(None, feed)
        full.run(None, feed)
    times: tuple[list[int], list[int]] = ([], [])
    stop = time.perf_counter() + budget_s
    swapped = False
    while len(times[0]) < least or (len(times[0]) < most and time.perf_counter() < stop):
        for which in (1, 0) if swapped else (0, 1):
            model = (session, full)[which]
            model.run(None, feed)
            for _ in range(_TURN):
                start = time.perf_counter_ns()
                model.run(None, feed)
                times[which].append(time.perf_counter_ns() - start)
        swapped = not swapped
    own, reference = (np.percentile(taken, [50, 95, 99]) / 1e6 for taken in times)
    return Latency(
        batch=batch,
        p50_ms=own[0],
        p95_ms=own[1],
        p99_ms=own[2],
        full_p50_ms=reference[0],
        full_p95_ms=reference[1],
        full_p99_ms=reference[2],
    )


def batch_sensitivity(workload: Workload, session: onnxruntime.InferenceSession, tensors: Tensors) -> float:
    """Largest share of answers that differ between a row on its own and the same row in a batch.

    Dynamic quantization scales activations over the whole batch, so its answers can depend on the company.
    """
    some = {name: array[:SENSITIVITY_ROWS] for name, array in tensors.items()}
    alone = decode(workload, session, run(session, some, 1)).classes
    return max(
        float((decode(workload, session, run(session, some, batch)).classes != alone).mean())
        for batch in SENSITIVITY_BATCHES
    )


def _about(workload: Workload, labels: np.ndarray) -> np.ndarray:
    """Which rows the workload's metric is about, bool [N]."""
    return np.isin(labels, sorted(workload.recall_of or range(len(workload.classes))))


def _thresholds(
    workload: Workload,
    own: onnxruntime.InferenceSession,
    full_answers: Answers,
    rows: Rows,
) -> dict[float, float]:
    """The proven thresholds; rows of the test split have no say in them."""
    own_answers = answer(workload, own, rows.tensors)
    judged = _about(workload, rows.labels)
    pairs = Pairs.of(own_answers, full_answers, rows.labels).among(judged)
    confidences = own_answers.confidences[judged]
    chosen = choose(workload.metric, pairs.right, pairs.full_right, confidences, pairs.labels)
    return {max_drop: threshold for max_drop, threshold in chosen.items() if threshold is not None}


def _cascade_point(
    workload: Workload,
    data: Data,
    answers: tuple[Answers, Answers],
    max_drop: float,
    threshold: float,
    time_ratio: float,
) -> CascadePoint:
    """What a threshold costs and loses on the test split; `time_ratio` is the variant's time over full's."""
    own, full = answers
    pairs = Pairs.of(own.above(threshold, full), full, data.rows("test").labels)
    kept = int(keeps(own.confidences, threshold).sum())
    escalated = proportion(len(own.classes) - kept, len(own.classes))
    drops = {
        f"{attribute}={value}": drop(workload.metric, part)
        for attribute, values in data.groups("test").items()
        for value in np.unique(values)
        if len((part := pairs.among(values == value).about(workload)).labels)
    }
    # By the loss that the interval vouches for: in a group of a few rows any loss can be chance.
    worst = max(drops, key=lambda name: drops[name].low, default=None)
    return CascadePoint(
        max_drop=max_drop,
        threshold=threshold,
        escalated=escalated,
        quality=quality(workload.metric, pairs.about(workload)),
        drop=drop(workload.metric, pairs.about(workload)),
        worst_group=worst,
        worst_group_drop=drops[worst] if worst is not None else None,
        cost_ratio=time_ratio + escalated.value,
    )


def _class_scores(workload: Workload, pairs: Pairs) -> dict[str, ClassScore]:
    return {
        workload.classes[label]: ClassScore(
            rows=len(part.labels), recall=quality("accuracy", part), drop=drop("accuracy", part)
        )
        for label, part in pairs.by_class().items()
    }


def _group_scores(
    workload: Workload, groups: Mapping[str, np.ndarray], pairs: Pairs
) -> dict[str, GroupScore]:
    scores = {}
    for attribute, values in groups.items():
        for value in np.unique(values):
            part = pairs.among(values == value)
            judged = part.about(workload)
            if not len(judged.labels):
                continue  # a recall of classes that do not occur in the group
            scores[f"{attribute}={value}"] = GroupScore(
                rows=len(part.labels),
                quality=quality(workload.metric, judged),
                drop=drop(workload.metric, judged),
                agreement=float((part.classes == part.full_classes).mean()),
                selection_rate=float((part.classes == workload.positive).mean()),
                full_selection_rate=float((part.full_classes == workload.positive).mean()),
            )
    return scores
