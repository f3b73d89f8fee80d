"""How far a workload can be compressed: degradation curves, their knees, and the layers that suffer most.

Everything here is measured on the validation split, and held against full precision on the same rows; the test split
has no say in it. What was measured is kept as it comes, so that a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist, median
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from compression.cache import StepCache, root_key
from compression.data import Data, Rows
from compression.errors import CompressionError, PlanError, RecipeError, StepError, VariantNotFound
from compression.export import run
from compression.intervals import Z
from compression.measure import Answers, Pairs, decode, drop, open_checked, quality
from compression.recipe import Recipe, StepSpec
from compression.scorecard import Estimate
from compression.variant import Variant, this_cpu
from compression.workload import Progress, Workload, no_progress

if TYPE_CHECKING:
    from onnx import ModelProto

    from compression.steps import Step, StepContext
    from compression.steps.onnx_nodes import Quantize

__all__ = [
    "STANDS_OUT",
    "TECHNIQUES",
    "Analysis",
    "Curve",
    "Effect",
    "LayerReport",
    "Level",
    "Measured",
    "Technique",
    "Treatment",
    "analyze",
    "critical_because",
    "findings",
    "folder",
    "knee",
    "layers_of",
    "write_atomically",
]

FORMAT: Final = 1
MEASUREMENTS = "measurements.json"
"""Name of the file in which measurements are kept between runs."""
STANDS_OUT = 3.0
"""How many times the median layer's change of outputs makes a layer critical."""
_LEAST_LAYERS = 3
_BATCH = 1024


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Effect(_Frozen):
    """What a change of the model does on the validation split; shares from 0 to 1.

    Attributes:
        quality: by the workload's metric, with its 95% interval; `drop` is full precision's less it, paired.
        change: how far the outputs move: length of the difference over length of full precision's outputs.
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


@dataclass(frozen=True)
class Technique:
    """A technique and the settings at which it is measured.

    Attributes:
        step: the registered name; `params` are the same at all levels.
        parameter: the one that is varied over `levels`, the gentlest first; empty for a technique with one setting.
        setting: what the parameter is, for people.
        label: how a level is written, by `str.format` with the level.
        coded: the technique saves bytes only where the file is entropy coded.
    """

    key: str
    title: str
    step: str
    params: Mapping[str, JsonValue] = field(default_factory=dict)
    parameter: str = ""
    setting: str = ""
    levels: tuple[float, ...] = ()
    label: str = ""
    coded: bool = False

    def specs(self) -> list[tuple[str, float | None, StepSpec]]:
        """Label, setting and step of every level."""
        if not self.parameter:
            return [(self.title, None, StepSpec(step=self.step, params=dict(self.params)))]
        found: list[tuple[str, float | None, StepSpec]] = []
        for level in self.levels:
            value = 2 ** int(level) if self.parameter == "clusters" else level
            spec = StepSpec(step=self.step, params={**self.params, self.parameter: value})
            found.append((self.label.format(level), level, spec))
        return found


_SHARES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

TECHNIQUES: tuple[Technique, ...] = (
    Technique(
        key="magnitude",
        title="magnitude pruning",
        step="prune_magnitude",
        parameter="amount",
        setting="share of the weights zeroed",
        levels=_SHARES,
        label="{:.0%}",
        coded=True,
    ),
    Technique(
        key="threshold",
        title="per-layer threshold pruning",
        step="prune_threshold",
        params={"allow_extreme": True},
        parameter="quality",
        setting="threshold in standard deviations of each layer's weights",
        levels=(0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0),
        label="{:g} sd",
        coded=True,
    ),
    Technique(
        key="structured",
        title="structured pruning",
        step="prune_structured",
        parameter="amount",
        setting="share of the hidden neurons or channels removed",
        levels=(0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9),
        label="{:.0%}",
    ),
    Technique(
        key="low_rank",
        title="low rank",
        step="low_rank",
        parameter="size",
        setting="share of each layer's weights that its factors may take",
        levels=(0.9, 0.75, 0.6, 0.45, 0.3, 0.2, 0.1),
        label="{:.0%}",
    ),
    Technique(
        key="clusters",
        title="weight clustering",
        step="cluster_weights",
        params={"epochs": 0},
        parameter="clusters",
        setting="bits of each layer's codebook",
        levels=(8, 6, 5, 4, 3, 2, 1),
        label="{:g} bit",
        coded=True,
    ),
    Technique(key="2:4", title="2:4 sparsity", step="prune_2_4", coded=True),
    Technique(key="int8_static", title="INT8 static", step="int8_static"),
    Technique(key="int8_dynamic", title="INT8 dynamic", step="int8_dynamic"),
    Technique(key="int4_weights", title="INT4 weight-only", step="int4_weights"),
)
"""What is measured, in this order."""

_PRUNED = {"prune_50": 0.5, "prune_80": 0.8}
TREATMENTS: tuple[Treatment, ...] = (
    Treatment(key="prune_50", title="pruned by 50%"),
    Treatment(key="prune_80", title="pruned by 80%"),
    Treatment(key="int8", title="in INT8"),
    Treatment(key="int4", title="in INT4"),
)


def knee(sizes: Sequence[float], qualities: Sequence[float], sensitivity: float = 1.0) -> int | None:
    """Position of the knee of quality over size, by Kneedle.

    Both axes are brought to the range 0 to 1. The knee is the point farthest above the chord from one corner to the
    other, if the curve comes back towards the chord, at larger sizes, by more than `sensitivity` times the mean
    distance of two points along the size axis. Satopaa et al., "Finding a 'kneedle' in a haystack" (ICDCS workshops
    2011), section III; without the smoothing, which points this few do not allow.

    Args:
        sizes: in any order and unit.
        qualities: at those sizes; quality rises with size, steeply at first.
        sensitivity: 1 is the paper's; larger values ask for a sharper bend.

    Returns:
        None for a straight or flat line, one that bends the other way, or fewer than three different sizes.
    """
    best: dict[float, int] = {}
    for place, size in enumerate(sizes):
        if size not in best or qualities[place] > qualities[best[size]]:
            best[size] = place
    order = [best[size] for size in sorted(best)]
    if len(order) < 3:
        return None
    x, y = (np.array([values[place] for place in order], float) for values in (sizes, qualities))
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or np.ptp(y) == 0:
        return None
    above = (y - y.min()) / np.ptp(y) - (x - x[0]) / np.ptp(x)
    top = int(above.argmax())
    if not 0 < top < len(order) - 1:
        return None
    threshold = above[top] - sensitivity / (len(order) - 1)
    return order[top] if above[top:].min() < threshold else None


def excludes_zero(loss: Estimate, tests: int = 1) -> bool:
    """Whether a drop is above zero, at 95% for all of so many tests together.

    The 95% interval of one test is widened to Bonferroni's level, its lower side by the ratio of the normal quantiles.
    """
    wider = NormalDist().inv_cdf(1 - 0.025 / max(1, tests)) / Z
    return loss.value - wider * (loss.value - loss.low) > 0


def critical_because(
    effects: Mapping[str, Effect], medians: Mapping[str, float], tests: int, titles: Mapping[str, str]
) -> tuple[str, ...]:
    """Why a layer is critical, in words; empty if it is not.

    A layer is critical if a treatment of it alone loses quality for certain (`excludes_zero` over all tests of the
    analysis), or moves the outputs at least `STANDS_OUT` times as far as it does in the median layer.

    Args:
        medians: treatment -> the change of outputs in the median layer; only of those with three layers or more.
        tests: how many effects of layers are judged.
    """
    reasons = []
    for key, effect in effects.items():
        if excludes_zero(effect.drop, tests):
            reasons.append(f"{titles[key]} it loses {points(effect.drop)}")
        middle = medians.get(key, 0.0)
        if middle > 0 and effect.change >= STANDS_OUT * middle:
            reasons.append(
                f"{titles[key]} it moves the outputs {effect.change / middle:.1f} times as far as the median layer"
            )
    return tuple(reasons)


def points(loss: Estimate) -> str:
    """A drop in points with its interval: `0.12 pt (-0.05 to 0.29)`."""
    low, high = (f"{100 * value:z.2f}" for value in (loss.low, loss.high))
    return f"{100 * loss.value:z.2f} pt ({low} to {high})"


def folder(home: Path, workload: str) -> Path:
    """Where the files of a workload's analysis are."""
    return home / workload / "analysis"


def analyze(
    workload: Workload,
    home: Path,
    *,
    epochs: int = 0,
    techniques: Sequence[str] | None = None,
    layers: bool = True,
    fresh: bool = False,
    progress: Progress = no_progress,
    finished: Callable[[Curve | LayerReport], None] | None = None,
) -> Analysis:
    """Measure the degradation curves and the sensitivity of the layers.

    Args:
        home: where measurements are kept, in a folder of the workload's.
        epochs: passes over the train split after each level of the techniques that work on the torch network; these
            curves come beside the one-shot ones.
        techniques: keys of `TECHNIQUES`; all that can work on the workload if not given.
        layers: measure the layers too.
        fresh: measure anew what an earlier run has measured.
        progress: called before every measurement.
        finished: called after every curve and every layer.

    Raises:
        VariantNotFound: full precision was not made yet, or not from the present code, data and settings.
        RecipeError: no technique has that key.
    """
    from compression.full import stored_full

    known = [technique.key for technique in TECHNIQUES]
    for key in techniques or ():
        if key not in known:
            raise RecipeError(f"no technique {key}: use {', '.join(known)}")
    full = stored_full(workload)
    if full is None:
        raise VariantNotFound(
            f"{workload.name} has no full precision of its present code and data: "
            f"run `trimtab compress {workload.directory}`"
        )
    started = time.monotonic()
    chosen = [technique for technique in TECHNIQUES if techniques is None or technique.key in techniques]
    bench = _Bench(workload, full, home, fresh=fresh, progress=progress)
    jobs = list(_jobs(bench, chosen, epochs))
    found = bench.layers() if layers else []
    bench.total = sum(len(levels) for _, _, levels in jobs) + len(found) * len(TREATMENTS)
    reference = bench.full_precision()
    curves = []
    for technique, with_epochs, levels in jobs:
        curve = _curve(bench, technique, with_epochs, levels, reference)
        curves.append(curve)
        if finished:
            finished(curve)
    reports = _layer_reports(bench, found, finished) if found else []
    return Analysis(
        workload=workload.name,
        metric=workload.metric,
        recall_of=workload.settings.recall_of,
        profile=workload.profile,
        full_tag=full.tag,
        full=reference,
        rows=len(bench.rows),
        cpu=this_cpu().model,
        versions=_versions(),
        created_at=time.time(),
        seconds=time.monotonic() - started,
        measurements=bench.done,
        reused=bench.reused,
        epochs=epochs,
        curves=tuple(curves),
        treatments=TREATMENTS,
        layers=tuple(reports),
        notes=tuple(dict.fromkeys(bench.notes)),
    )


Levels = list[tuple[str, float | None, tuple[StepSpec, ...]]]
E = TypeVar("E", bound=Effect)


def _jobs(bench: _Bench, chosen: Sequence[Technique], epochs: int) -> list[tuple[Technique, int, Levels]]:
    """The techniques that can work on the workload, one-shot and, if asked for, with recovery."""
    from compression.planner import plan

    jobs: list[tuple[Technique, int, Levels]] = []
    for technique in chosen:
        specs = technique.specs()
        try:
            steps = plan(Recipe(name="analysis", steps=[specs[0][2]]), bench.workload)
        except PlanError as error:
            reason = str(error).partition(") ")[2]
            bench.notes.append(f"{technique.title}: {reason}")
            continue
        jobs.append((technique, 0, [(label, setting, (spec,)) for label, setting, spec in specs]))
        if epochs and steps[0].level == "torch":
            jobs.append(
                (
                    technique,
                    epochs,
                    [(label, setting, _recovered(spec, epochs)) for label, setting, spec in specs],
                )
            )
    return jobs


def _recovered(spec: StepSpec, epochs: int) -> tuple[StepSpec, ...]:
    if spec.step == "cluster_weights":
        # Plain training would part the weights that share a value; this step trains its own codebooks.
        return (spec.model_copy(update={"params": {**spec.params, "epochs": epochs}}),)
    return (spec, StepSpec(step="finetune", params={"epochs": epochs}))


def _curve(bench: _Bench, technique: Technique, epochs: int, levels: Levels, reference: Measured) -> Curve:
    curve = Curve(
        key=technique.key,
        title=technique.title,
        setting=technique.setting,
        coded=technique.coded,
        epochs=epochs,
        levels=tuple(bench.level(technique.title, *level) for level in levels),
    )
    return with_marks(curve, reference)


def with_marks(curve: Curve, reference: Measured) -> Curve:
    """The curve with its knee and its last free level.

    Full precision is the curve's end without compression. A curve none of whose drops excludes 0 has no knee: what
    bends in it is noise.
    """
    measured = [(place, level.measured) for place, level in enumerate(curve.levels) if level.measured]
    free = None
    for place, found in measured:
        if excludes_zero(found.drop):
            break
        free = place
    at = None
    if any(excludes_zero(found.drop) for _, found in measured):
        all_of_them = [reference, *(found for _, found in measured)]
        at = knee(
            [float(curve.size(found)) for found in all_of_them],
            [found.quality.value for found in all_of_them],
        )
    # Position 0 is full precision; a knee there would be one at no compression.
    return curve.model_copy(update={"free": free, "knee": measured[at - 1][0] if at else None})


@dataclass(frozen=True)
class Layer:
    """A layer with weights of an ONNX graph.

    Attributes:
        name: for people, and different from all others.
        kind: the operator.
        nodes: those that use the weights, by name.
        tensor: name of the weights.
    """

    name: str
    kind: str
    weights: int
    nodes: tuple[str, ...]
    tensor: str


def layers_of(model: ModelProto) -> list[Layer]:
    """The layers of a graph whose nodes have names, in its order; nodes that share weights are one layer."""
    from compression.steps.onnx_nodes import weight_count, weighted

    nodes: dict[str, list[Any]] = {}
    for node in weighted(model, ("MatMul", "Gemm", "Conv", "Gather")):
        tensor = node.input[0 if node.op_type == "Gather" else 1]
        nodes.setdefault(tensor, []).append(node)
    found: list[Layer] = []
    taken: set[str] = set()
    for tensor, users in nodes.items():
        name = tensor.removesuffix(".weight") if tensor.endswith(".weight") else users[0].name
        name = name if name not in taken else f"{name} ({users[0].name})"
        taken.add(name)
        count = weight_count(model, users[:1])
        found.append(Layer(name, users[0].op_type, count, tuple(node.name for node in users), tensor))
    return found


def pruned_layer(model: ModelProto, tensor: str, amount: float) -> ModelProto:
    """A copy of a graph in which the smallest weights of one tensor are zero; `amount` is their share."""
    from onnx import ModelProto, numpy_helper

    changed = ModelProto()
    changed.CopyFrom(model)
    weights = next(entry for entry in changed.graph.initializer if entry.name == tensor)
    array = numpy_helper.to_array(weights).copy()
    # Sorted stably, so that equals are always told apart in the same way.
    smallest = np.abs(array).ravel().argsort(kind="stable")[: round(amount * array.size)]
    array.reshape(-1)[smallest] = 0
    weights.CopyFrom(numpy_helper.from_array(array, tensor))
    return changed


def _layer_reports(
    bench: _Bench, found: Sequence[Layer], finished: Callable[[Curve | LayerReport], None] | None
) -> list[LayerReport]:
    reports = []
    with tempfile.TemporaryDirectory(prefix="trimtab-") as ranges:
        quantizers = {
            "int8": _Quantizer(bench, _INT8, Path(ranges) / "int8.json"),
            "int4": _Quantizer(bench, _INT4, Path(ranges) / "int4.json"),
        }
        for layer in found:
            effects = {
                treatment.key: effect
                for treatment in TREATMENTS
                if (effect := bench.layer(layer, treatment, quantizers.get(treatment.key)))
            }
            reports.append(
                LayerReport(layer=layer.name, kind=layer.kind, weights=layer.weights, effects=effects)
            )
            if finished:
                finished(reports[-1])
    changes = {
        treatment.key: [
            report.effects[treatment.key].change for report in reports if treatment.key in report.effects
        ]
        for treatment in TREATMENTS
    }
    medians = {key: median(values) for key, values in changes.items() if len(values) >= _LEAST_LAYERS}
    tests = sum(map(len, changes.values()))
    titles = {treatment.key: treatment.title for treatment in TREATMENTS}
    return [
        report.model_copy(update={"critical": critical_because(report.effects, medians, tests, titles)})
        for report in reports
    ]


_INT8: tuple[StepSpec, ...] = (
    # Any pattern but "*" leaves all other nodes alone, also those without weights between the layers.
    StepSpec(step="int8_static", params={"targets": "**"}),
    StepSpec(step="int8_dynamic"),
)
_INT4: tuple[StepSpec, ...] = (
    StepSpec(step="int4_weights", params={"embeddings": True}),
    StepSpec(step="int4_weights"),
)
"""Steps that quantize single layers, the first that can work on the model is taken."""


class _Quantizer:
    """Quantizes single layers of full precision; made ready when it is first asked to."""

    def __init__(self, bench: _Bench, specs: Sequence[StepSpec], ranges: Path) -> None:
        self.bench = bench
        self.specs = specs
        self.ranges = ranges
        self._ready: tuple[Quantize, ModelProto, frozenset[str]] | None = None

    def quantized(self, layer: Layer) -> ModelProto | None:
        """The model with this layer quantized, or None if no step can do that.

        Raises:
            StepError: the quantizer failed on this layer.
        """
        step, model, able = self._prepared()
        names = [name for name in layer.nodes if name in able]
        return step.quantized(model, names, self.bench.context(), self.ranges) if names else None

    def _prepared(self) -> tuple[Quantize, ModelProto, frozenset[str]]:
        from compression.steps import build
        from compression.steps.onnx_nodes import Quantize

        if self._ready is None:
            problem: CompressionError | None = None
            for spec in self.specs:
                step = build(spec)
                assert isinstance(step, Quantize)
                try:
                    prepared = step.prepared(self.bench.graph)
                    able = step.chosen(prepared, self.bench.context())
                    # Whether the calibration split has rows enough shows when one is quantized.
                    step.quantized(prepared, able[:1], self.bench.context(), self.ranges)
                except CompressionError as error:
                    problem = problem or error
                    continue
                self._ready = step, prepared, frozenset(able)
                break
            else:
                raise StepError(str(problem))
        return self._ready


class _Bench:
    """Makes and measures models of one workload, and keeps what it has measured."""

    def __init__(
        self, workload: Workload, full: Variant, home: Path, *, fresh: bool, progress: Progress
    ) -> None:
        from onnx import load_model_from_string

        from compression.steps.onnx_nodes import named_copy

        self.workload = workload
        self.full = full
        self.full_bytes = full.onnx_bytes()
        self.graph = named_copy(load_model_from_string(self.full_bytes))
        self.data = Data(workload)
        self.rows: Rows = self.data.rows("validation")
        self.notes: list[str] = []
        self.total = self.done = self.reused = 0
        self._progress = progress
        cache = StepCache.open(home)
        self._cache = cache.fresh() if fresh else cache
        self._kept = _Kept(
            folder(home, workload.name) / MEASUREMENTS,
            _key({"format": FORMAT, "root": root_key(full, self.data)}),
            fresh=fresh,
        )
        session = open_checked(self.full_bytes, self.rows.tensors)
        self._output, self._answers = self._run(session)
        self._length = max(float(np.linalg.norm(np.nan_to_num(self._output))), 1e-12)

    def context(self, what: str = "") -> StepContext:
        """What steps work with; their own progress is shown behind that of the whole."""
        from compression.steps import StepContext

        def shown(detail: str, _done: float) -> None:
            self._progress(f"{what}: {detail}" if what else detail, min(1.0, self.done / max(1, self.total)))

        return StepContext(self.workload, self.data, progress=shown)

    def full_precision(self) -> Measured:
        """Full precision's own sizes and quality."""
        return self._measured(self.full_bytes, 0.0)

    def level(self, title: str, label: str, setting: float | None, steps: tuple[StepSpec, ...]) -> Level:
        """Measure one level of a technique."""
        what = title if setting is None else f"{title} {label}"
        self._announce(what)
        identity = {"steps": [spec.model_dump(mode="json") for spec in steps]}
        found = self._kept.get(identity, Measured)
        failed = None
        if found is None:
            started = time.monotonic()
            try:
                found = self._measured(self._built(steps, what), started)
            except CompressionError as error:
                failed = str(error)
            else:
                self._kept.put(identity, found)
        else:
            self.reused += 1
        self.done += 1
        return Level(label=label, setting=setting, steps=steps, measured=found, failed=failed)

    def layers(self) -> list[Layer]:
        """The layers of full precision."""
        found = layers_of(self.graph)
        if not found:
            self.notes.append(
                "layers: the model has none with constant weights in MatMul, Gemm, Conv or Gather"
            )
        return found

    def layer(self, layer: Layer, treatment: Treatment, quantizer: _Quantizer | None) -> Effect | None:
        """Measure one treatment of one layer; None if it cannot be applied."""
        self._announce(f"layer {layer.name}, {treatment.title}")
        identity = {"layer": layer.tensor, "nodes": list(layer.nodes), "treatment": treatment.key}
        found = self._kept.get(identity, Effect)
        if found is None:
            started = time.monotonic()
            try:
                if quantizer is None:
                    changed: ModelProto | None = pruned_layer(
                        self.graph, layer.tensor, _PRUNED[treatment.key]
                    )
                else:
                    changed = quantizer.quantized(layer)
                if changed is not None:
                    found = self._effect(changed.SerializeToString(), started)
                    self._kept.put(identity, found)
            except CompressionError as error:
                self.notes.append(f"layers {treatment.title}: {error}")
        else:
            self.reused += 1
        self.done += 1
        return found

    def _announce(self, what: str) -> None:
        self._progress(f"{what} ({self.done + 1} of {self.total})", min(1.0, self.done / max(1, self.total)))

    def _built(self, specs: Sequence[StepSpec], what: str) -> bytes:
        from compression.compress import build_model
        from compression.planner import plan

        steps: list[Step] = plan(Recipe(name="analysis", steps=list(specs)), self.workload)
        return build_model(self.full, steps, self.context(what), self._cache).onnx

    def _run(self, session: Any) -> tuple[np.ndarray, Answers]:
        output = run(session, self.rows.tensors, _BATCH)
        predictions = decode(self.workload, session, output)
        finite = np.isfinite(output).reshape(len(output), -1).all(axis=1)
        return output.astype(np.float64), Answers(predictions.classes, predictions.confidences, finite)

    def _effect(self, content: bytes, started: float) -> Effect:
        output, answers = self._run(open_checked(content, self.rows.tensors))
        pairs = Pairs.of(answers, self._answers, self.rows.labels)
        judged = pairs.about(self.workload)
        moved = np.linalg.norm(np.nan_to_num(output) - np.nan_to_num(self._output))
        return Effect(
            quality=quality(self.workload.metric, judged),
            drop=drop(self.workload.metric, judged),
            change=float(moved) / self._length,
            invalid=pairs.invalid,
            seconds=time.monotonic() - started if started else 0.0,
            measured_at=time.time(),
        )

    def _measured(self, content: bytes, started: float) -> Measured:
        from onnx import load_model_from_string

        from compression.graph import count_parameters
        from compression.steps.entropy import EntropyCode

        effect = self._effect(content, started)
        try:
            coded = len(EntropyCode().apply(content, self.context()))
        except StepError:
            coded = len(content)  # it would not become smaller, so it is kept as it is
        total, nonzero = count_parameters(load_model_from_string(content))
        return Measured(
            **dict(effect),
            file_bytes=len(content),
            coded_bytes=coded,
            parameters=total,
            nonzero_parameters=nonzero,
        )


class _Kept:
    """Measurements of earlier runs on the same model, data, sources, libraries and processor, in a file."""

    def __init__(self, path: Path, base: str, *, fresh: bool) -> None:
        self.path = path
        self.base = base
        self.entries: dict[str, Any] = {}
        if fresh:
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["base"] == base:
                self.entries = dict(content["entries"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # there is none, or it is damaged: all is measured anew

    def get(self, identity: Mapping[str, object], kind: type[E]) -> E | None:
        """What was measured under this identity, if it was."""
        entry = self.entries.get(_key(identity))
        try:
            return None if entry is None else kind.model_validate(entry)
        except ValidationError:
            return None

    def put(self, identity: Mapping[str, object], found: Effect) -> None:
        """Keep a measurement; it is in the file when this returns."""
        self.entries[_key(identity)] = found.model_dump(mode="json")
        write_atomically(self.path, json.dumps({"base": self.base, "entries": self.entries}).encode())


def _key(identity: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("onnxruntime", "torch", "trimtab")}


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def findings(analysis: Analysis) -> tuple[str, str, str]:
    """The three sentences that a user needs: about quantization, about the curves, and about the layers."""
    return _about_quantization(analysis), _about_curves(analysis), _about_layers(analysis)


def share(analysis: Analysis, curve: Curve, found: Measured) -> float:
    """Size as a share of full precision's plain ONNX file."""
    return curve.size(found) / analysis.full.file_bytes


_QUANTIZED: tuple[Literal["int8_static", "int8_dynamic", "int4_weights"], ...] = (
    "int8_static",
    "int8_dynamic",
    "int4_weights",
)


def _about_quantization(analysis: Analysis) -> str:
    measured = [
        (curve, level.measured)
        for curve in analysis.curves
        for level in curve.levels
        if curve.key in _QUANTIZED and level.measured
    ]
    if not measured:
        return "No quantization was measured."

    def words(curve: Curve, found: Measured) -> str:
        return f"{points(found.drop)} at {share(analysis, curve, found):.0%} of the size"

    free = [entry for entry in measured if not excludes_zero(entry[1].drop)]
    if free:
        best = min(free, key=lambda entry: entry[1].file_bytes)
        others = [curve.title for curve, _ in free if curve.key != best[0].key]
        also = f"; nor does {' or '.join(others)}" if others else ""
        return f"{best[0].title} costs nothing measurable: {words(*best)}{also}."
    best = min(measured, key=lambda entry: entry[1].drop.value)
    return f"Every quantization costs something; {best[0].title} costs least: {words(*best)}."


def _about_curves(analysis: Analysis) -> str:
    curves = [curve for curve in analysis.curves if not curve.is_point]
    if not curves:
        return "No technique with a curve was measured."
    parts = []
    free = [
        (curve, level, level.measured)
        for curve in curves
        if curve.free is not None and (level := curve.levels[curve.free]).measured
    ]
    if free:
        curve, level, found = min(free, key=lambda entry: share(analysis, entry[0], entry[2]))
        parts.append(
            f"{_named(curve)} goes furthest at no measurable cost, with {level.label} to "
            f"{share(analysis, curve, found):.0%} of the size{_as_coded(curve)}: {points(found.drop)}"
        )
    else:
        parts.append("every curve costs something measurable from its first level on")
    knees = [curve for curve in curves if curve.knee is not None]
    # The one that also saves time is what most people ask about.
    for curve in sorted(knees, key=lambda entry: (entry.key != "structured", entry.epochs))[:1]:
        assert curve.knee is not None
        level = curve.levels[curve.knee]
        if level.measured:
            parts.append(
                f"{_named(curve)} has its knee at {level.label}: {points(level.measured.drop)} at "
                f"{share(analysis, curve, level.measured):.0%} of the size{_as_coded(curve)}"
            )
    if not knees:
        parts.append("no curve has a knee within the levels measured")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _named(curve: Curve) -> str:
    return curve.title if not curve.epochs else f"{curve.title} with {curve.epochs} epochs of recovery"


def _as_coded(curve: Curve) -> str:
    return " once the file is entropy coded" if curve.coded else ""


def _about_layers(analysis: Analysis) -> str:
    if not analysis.layers:
        return "No layer was measured."
    critical = [report for report in analysis.layers if report.critical]
    if not critical:
        return (
            f"No layer is critical: none of the {len(analysis.layers)}, pruned or quantized alone, loses anything "
            "measurable or moves the outputs much further than the others."
        )
    worst = max(critical, key=severity)
    others = [report.layer for report in sorted(critical, key=severity, reverse=True) if report is not worst]
    also = ""
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        also = f"; critical too: {', '.join(others[:3])}{more}"
    return f"The most critical layer is {worst.layer}: {worst.critical[0]}{also}."


def severity(report: LayerReport) -> tuple[float, float]:
    """How much a layer suffers: the loss that an interval vouches for, and the change of outputs, at their largest."""
    effects = report.effects.values()
    return (
        max((max(0.0, effect.drop.low) for effect in effects), default=0.0),
        max((effect.change for effect in effects), default=0.0),
    )
