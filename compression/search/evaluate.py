"""What a search measures, on validation rows only, and what a recipe is held to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from compression.data import Data, Rows
from compression.errors import CompressionError
from compression.scorecard import Estimate
from compression.workload import Progress, SplitName, Workload, no_progress

if TYPE_CHECKING:
    from compression.compress import Model
    from compression.variant import Variant

Objective = Literal["quality", "latency", "size", "macs"]
OBJECTIVES: tuple[Objective, ...] = ("quality", "latency", "size", "macs")

_LATENCY_S = 0.3


class SearchError(CompressionError):
    """A search cannot start, or cannot go on where another one stopped."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figures(_Frozen):
    """What was measured about a recipe's model, on validation rows only.

    Attributes:
        quality, drop: by the workload's metric; the drop is paired with full precision on the same rows.
        worst_group: of the groups whose loss is no chance (the lower end of the interval is above 0), the one that
            loses most, and how much; None where there is none. Where the metric is a mean of recalls, each class that
            it is about counts as a group too, named `recall of class NAME`, as the gate has it.
        invalid_outputs: rows whose outputs are no finite numbers.
        size_bytes: bytes of the file that is kept; macs: multiply-accumulates for one record.
        latency_ms: median at batch 1; `full_latency_ms` of full precision, timed in turns with it.
    """

    quality: Estimate
    drop: Estimate
    worst_group: str | None
    worst_group_drop: float
    invalid_outputs: int
    size_bytes: int
    full_size_bytes: int
    macs: int
    full_macs: int
    latency_ms: float
    full_latency_ms: float

    @property
    def latency_ratio(self) -> float:
        """The model's time over full precision's; below 1 means faster."""
        return self.latency_ms / self.full_latency_ms

    def cost(self, objective: Objective) -> float:
        """The figure of an objective as something to make small: quality negated, latency relative to full's."""
        costs: dict[Objective, float] = {
            "quality": -self.quality.value,
            "latency": self.latency_ratio,
            "size": float(self.size_bytes),
            "macs": float(self.macs),
        }
        return costs[objective]


class Limits(_Frozen):
    """What a recipe must keep to; None is no limit.

    Attributes:
        max_drop: as the gate judges: for the upper end of the drop's interval, and for every group whose loss is no
            chance.
        max_latency_ratio: of full precision's time; `max_latency_ms` in milliseconds, of this machine.
        max_size_bytes: of the file that is kept.
    """

    max_drop: float | None = Field(default=None, ge=0)
    max_latency_ratio: float | None = Field(default=None, gt=0)
    max_latency_ms: float | None = Field(default=None, gt=0)
    max_size_bytes: int | None = Field(default=None, gt=0)
    max_macs: int | None = Field(default=None, gt=0)

    def over(self, figures: Figures) -> dict[str, float]:
        """By how much of itself each limit is passed: 0 or less is within it."""
        compared: dict[str, tuple[float, float | None]] = {
            "drop": (figures.drop.high, self.max_drop),
            "group": (figures.worst_group_drop, self.max_drop),
            "latency": (figures.latency_ratio, self.max_latency_ratio),
            "latency_ms": (figures.latency_ms, self.max_latency_ms),
            "size": (figures.size_bytes, self.max_size_bytes),
            "macs": (figures.macs, self.max_macs),
        }
        found = {
            name: (value - limit) / max(limit, 1e-9)
            for name, (value, limit) in compared.items()
            if limit is not None
        }
        return found | {"invalid_outputs": float(figures.invalid_outputs)}


def selection_data(workload: Workload) -> Data:
    """The splits that a selection may see: asked for any but train, calibration and validation, it raises SearchError.

    It is no subclass, because the step cache trusts no other class than `Data`.
    """
    data = Data(workload)
    rows = data.rows

    def guarded(name: SplitName) -> Rows:
        if name not in ("train", "calibration", "validation"):
            raise SearchError(f"a search must not look at the {name} split, and a step asked for it")
        return rows(name)

    data.rows = guarded  # type: ignore[method-assign]
    return data


class Evaluator:
    """Measures models on validation rows against full precision."""

    def __init__(self, workload: Workload, data: Data, full: Variant) -> None:
        import onnx

        from compression.graph import count_macs
        from compression.measure import answer, open_checked
        from compression.variant import MODEL

        self.workload = workload
        self.data = data
        self.rows = data.rows("validation")
        content = full.onnx_bytes()
        self.full_session = open_checked(content, self.rows.tensors)
        self.full_answers = answer(workload, self.full_session, self.rows.tensors)
        self.full_size = full.manifest.files[MODEL].bytes
        self.full_macs = count_macs(onnx.load_model_from_string(content), self.rows.tensors)

    def __call__(self, model: Model) -> Figures:
        """Measure one model.

        Raises:
            WorkloadError: it does not take what `encode` makes.
        """
        import onnx
        from numpy import unique

        from compression.graph import count_macs
        from compression.measure import Pairs, answer, drop, latency, open_checked, quality

        metric = self.workload.metric
        session = open_checked(model.onnx, self.rows.tensors)
        own = answer(self.workload, session, self.rows.tensors)
        pairs = Pairs.of(own, self.full_answers, self.rows.labels)
        drops = {
            f"{attribute}={value}": drop(metric, part)
            for attribute, values in self.data.groups("validation").items()
            for value in unique(values)
            if len((part := pairs.among(values == value).about(self.workload)).labels)
        }
        if metric != "accuracy":
            # An average can hide one of them.
            drops |= {
                f"recall of class {self.workload.classes[label]}": drop("accuracy", part)
                for label, part in pairs.about(self.workload).by_class().items()
            }
        sure = [(lost.value, name) for name, lost in drops.items() if lost.low > 0]
        worst = max(sure, default=(0.0, None))
        times = latency(session, self.full_session, self.rows.tensors, 1, budget_s=_LATENCY_S)
        return Figures(
            quality=quality(metric, pairs.about(self.workload)),
            drop=drop(metric, pairs.about(self.workload)),
            worst_group=worst[1],
            worst_group_drop=worst[0],
            invalid_outputs=pairs.invalid,
            size_bytes=model.size_bytes,
            full_size_bytes=self.full_size,
            macs=count_macs(onnx.load_model_from_string(model.onnx), self.rows.tensors),
            full_macs=self.full_macs,
            latency_ms=times.p50_ms,
            full_latency_ms=times.full_p50_ms,
        )


def full_precision(workload: Workload, folder: Path, progress: Progress = no_progress) -> Variant:
    """The workload's full-precision variant, made if there is none; one process makes it, others wait.

    Args:
        folder: where the lock is kept.
    """
    from compression.full import make_full, stored_full

    with locked(folder / "full.lock"):
        return stored_full(workload) or make_full(workload, Data(workload), progress)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that goes with the process, whatever becomes of it."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
