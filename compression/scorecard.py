"""Everything measured about a variant, as plain data; compression/measure.py does the measuring.

Rates, qualities and drops are shares from 0 to 1 (a drop of 0.02 is two points); a positive drop means that
the variant is worse than full precision. Every interval is a 95% interval.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimate(_Frozen):
    """A measured value and the ends of its 95% interval."""

    value: float
    low: float
    high: float


class ClassScore(_Frozen):
    """Recall among the rows of one true class, and how much of it the variant loses."""

    rows: int
    recall: Estimate
    drop: Estimate


class GroupScore(_Frozen):
    """One group of one sensitive attribute, for example `DIS=1`."""

    rows: int
    quality: Estimate
    drop: Estimate
    agreement: float
    selection_rate: float
    full_selection_rate: float


class Latency(_Frozen):
    """Milliseconds per call of a whole batch, one thread, in turns of several calls with full precision.

    They are of calls one after the other, with the model's weights in the processor's caches.
    """

    batch: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    full_p50_ms: float
    full_p95_ms: float
    full_p99_ms: float

    @property
    def speedup(self) -> float:
        """Median of full precision over median of the variant; above 1 means faster."""
        return self.full_p50_ms / self.p50_ms


class CascadePoint(_Frozen):
    """The variant answers where it is sure enough, full precision answers the other rows of the request.

    Attributes:
        max_drop: the loss of quality that is proven not to be exceeded, at 95% and on the validation split.
        threshold: smallest confidence at which the variant's own answer is kept; 0 keeps every answer.
        escalated: share of test rows that go to full precision; `quality` and `drop` are of all rows.
        worst_group, worst_group_drop: the group that loses most for certain; None without groups.
        cost_ratio: model time of one record over full precision's; above 1 the cascade costs more than it saves.
    """

    max_drop: float
    threshold: float
    escalated: Estimate
    quality: Estimate
    drop: Estimate
    worst_group: str | None
    worst_group_drop: Estimate | None
    cost_ratio: float


class Scorecard(_Frozen):
    """What is known about a variant before it sees traffic.

    Attributes:
        metric: `accuracy`, `balanced_accuracy` or `recall` (of named classes); `quality`, `drop` and the groups'
            figures are in it.
        recall_of: the classes that recall is of; empty for another metric.
        rows: rows of the test split, which no training, calibration or selection has used.
        agreement: share of test rows that get the same class from variant and full precision.
        invalid_outputs: test rows whose outputs are not finite numbers.
        size_bytes: bytes of the ONNX file on disk, coded if it is; `full_size_bytes` of full precision's.
        parameters: weights in the file, quantization scales not counted; `nonzero_parameters` of them.
        macs: multiply-accumulates for one record.
        batch_sensitivity: largest share of answers that change when a row is answered in a batch, not alone.
        cpu: the processor that latencies and INT8 results hold for.
        cascade: one point for every loss that a threshold is proven for, smallest first; empty for full
            precision and for what was measured before there were cascades.
    """

    workload: str
    variant: str
    metric: str
    recall_of: tuple[str, ...] = ()
    rows: int
    quality: Estimate
    drop: Estimate
    agreement: float
    classes: dict[str, ClassScore]
    groups: dict[str, GroupScore]
    invalid_outputs: int
    size_bytes: int
    full_size_bytes: int
    parameters: int
    nonzero_parameters: int
    macs: int
    latency: list[Latency]
    batch_sensitivity: float
    cpu: str
    cascade: list[CascadePoint] = []

    @property
    def size_ratio(self) -> float:
        """Full precision's bytes over the variant's; above 1 means smaller."""
        return self.full_size_bytes / self.size_bytes

    def latency_at(self, batch: int) -> Latency:
        """The latency at one of the measured batch sizes (1 and 32)."""
        return next(latency for latency in self.latency if latency.batch == batch)
