"""What an analysis finds out, as plain data. Rates, qualities and drops are shares from 0 to 1."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict

from compression.recipe import StepSpec
from compression.scorecard import Estimate

FORMAT: Final = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Effect(_Frozen):
    """What a change of the model does on the validation split; shares from 0 to 1.

    Attributes:
        quality: by the workload's metric, with its 95% interval; `drop` is full precision's less it, paired.
        change: how far the outputs move: length of the difference over length of full precision's outputs; what is no
            number counts as 0.
        invalid: rows whose outputs are no numbers.
        seconds: what it took to make and to measure; `measured_at` is when, in seconds since the epoch.
    """

    quality: Estimate
    drop: Estimate
    change: float
    invalid: int = 0
    seconds: float = 0.0
    measured_at: float = 0.0


class Measured(Effect):
    """An effect, and what the model takes.

    Attributes:
        file_bytes: of the plain ONNX file; `coded_bytes` of the same, entropy coded.
        parameters: weights in the file; `nonzero_parameters` of them.
    """

    file_bytes: int
    coded_bytes: int
    parameters: int
    nonzero_parameters: int


class Level(_Frozen):
    """One setting of a technique. Either `measured` or `failed`, the reason why not, is set."""

    label: str
    setting: float | None
    steps: tuple[StepSpec, ...]
    measured: Measured | None = None
    failed: str | None = None


class Curve(_Frozen):
    """A technique at its levels, the gentlest first; a technique that has one setting is a curve of one level.

    Attributes:
        key: names the technique; `title` for people.
        setting: what the levels are levels of.
        coded: the size that counts is that of the entropy-coded file, else that of the plain one.
        epochs: of recovery after the technique; 0 for one-shot.
        knee: position of the level at the knee; None without one.
        free: position of the harshest level up to which no drop's interval excludes 0; None if the first one's does.
    """

    key: str
    title: str
    setting: str
    coded: bool
    epochs: int
    levels: tuple[Level, ...]
    knee: int | None = None
    free: int | None = None

    def size(self, of: Measured) -> int:
        """The bytes that count for this technique."""
        return of.coded_bytes if self.coded else of.file_bytes

    @property
    def is_point(self) -> bool:
        """Whether the technique has one setting only."""
        return self.setting == ""


class Treatment(_Frozen):
    """What is done to one layer alone."""

    key: str
    title: str


class LayerReport(_Frozen):
    """A layer with weights, and what treatments of it alone do.

    Attributes:
        layer: name of its weights without `.weight`, or of its node where the weights have no such name.
        kind: the ONNX operator.
        effects: by the treatment's key; those that cannot be applied to the layer are missing.
        critical: why it is, in words; empty if it is not.
    """

    layer: str
    kind: str
    weights: int
    effects: dict[str, Effect]
    critical: tuple[str, ...] = ()


class Analysis(_Frozen):
    """Everything that `analyze` has found out.

    Attributes:
        full: full precision itself; its drop is zero by definition.
        rows: of the validation split.
        cpu: the processor that all of this holds for.
        created_at: when it was finished, in seconds since the epoch; `seconds` is what this run took.
        reused: measurements that an earlier run had made; `measurements` is the number of all.
        treatments: of single layers.
        notes: what was left out, and why.
    """

    format: int = FORMAT
    workload: str
    metric: str
    recall_of: tuple[str, ...]
    profile: str
    full_tag: str
    full: Measured
    rows: int
    cpu: str
    versions: dict[str, str]
    created_at: float
    seconds: float
    measurements: int
    reused: int
    epochs: int
    curves: tuple[Curve, ...]
    treatments: tuple[Treatment, ...]
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()

    def share(self, curve: Curve, found: Measured) -> float:
        """The size that counts for a technique as a share of full precision's plain ONNX file."""
        return curve.size(found) / self.full.file_bytes
