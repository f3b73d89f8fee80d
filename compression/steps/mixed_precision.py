"""Mixed precision: the layers that suffer most from quantization stay in float."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, JsonValue, model_validator

from compression.errors import RecipeError, StepError
from compression.export import open_session, run
from compression.measure import Answers, Pairs, decode, quality
from compression.recipe import StepSpec
from compression.steps.base import Need, OnnxStep, Property, StepContext, build, register
from compression.steps.onnx_nodes import Quantize, weight_count, weighted

if TYPE_CHECKING:
    from onnx import ModelProto

REPORT = "sensitivity.json"
"""Name of the file that is kept with the variant."""


@dataclass(frozen=True)
class Sensitivity:
    """What quantization of one layer does on the validation split.

    Attributes:
        weights: how many weights the layer has.
        drop: how much lower the quality is than in float, as a share: 0.01 is one point. By `all_but_one`, how much of
            the quality comes back when this layer alone stays in float.
        change: how far the outputs move: length of the difference over length of the outputs in float. By
            `all_but_one`, how much less far.
    """

    layer: str
    weights: int
    drop: float
    change: float


@dataclass(frozen=True)
class Point:
    """A model with some layers in float.

    Attributes:
        float_layers: those of the layers measured that stay in float.
        size_bytes: size of the ONNX file.
        quality: on the validation split, by the workload's metric; `drop` is full precision's less it.
        front: no other point is as small with more quality, or smaller with as much.
    """

    float_layers: tuple[str, ...]
    size_bytes: int
    quality: float
    drop: float
    front: bool = False


@register("mixed_precision")
class MixedPrecision(OnnxStep):
    """Quantize all layers but those that suffer most by it, measured one by one on the validation split.

    The layers are put in order of their drop of quality (a gain counts as no drop, since it is chance), and of how far
    the outputs move where drops are alike. From everything quantized, one layer after the other is then given back to
    float in that order, and each model is measured. The sensitivities, these models and which of them are on the Pareto
    front of quality against bytes are kept with the variant as `sensitivity.json`. Wu et al., "Integer quantization for
    deep learning inference" (arXiv 2004.09602), section 6.2.

    Args:
        max_drop: largest drop of quality on the validation split, as a share: 0.01 is one point. The first model
            within it is taken.
        float_layers: how many layers stay in float, beside the ends; instead of max_drop.
        step: name of the quantizing step to mix with float.
        params: its parameters.
        keep_ends: the first and the last layer with weights, in the order of the graph, stay in float.
        by: quantize `one` layer at a time, or `all_but_one`.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    makes: ClassVar[frozenset[Property]] = frozenset({"grid"})

    max_drop: float | None = Field(default=None, ge=0, lt=1)
    float_layers: int | None = Field(default=None, ge=0)
    step: str = "int8_static"
    params: dict[str, JsonValue] = Field(default_factory=dict)
    keep_ends: bool = True
    by: Literal["one", "all_but_one"] = "one"

    @model_validator(mode="after")
    def _consistent(self) -> MixedPrecision:
        if (self.max_drop is None) == (self.float_layers is None):
            raise ValueError("give either max_drop or float_layers")
        if "keep_ends" in self.params:
            raise ValueError("keep_ends is a parameter of mixed_precision itself, not one of params")
        try:
            self._quantize()
        except RecipeError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def destroys(self) -> frozenset[Property]:
        """What the quantizing step destroys."""
        return self._quantize().destroys

    def apply(self, model: ModelProto, context: StepContext) -> ModelProto:
        """Return a copy with some layers quantized."""
        quantize = self._quantize()
        prepared = quantize.prepared(model)
        names = quantize.chosen(prepared, context)
        layers = {node.name: node for node in weighted(prepared, quantize.kinds)}
        ends = {next(iter(layers)), next(reversed(layers))} if self.keep_ends else set()
        names = [name for name in names if name not in ends]
        if len(names) <= (self.float_layers or 0):
            raise StepError(
                f"mixed_precision: {len(names)} layers could be quantized and {self.float_layers or 0} of them are to "
                "stay in float, so nothing is left: lower float_layers, or set keep_ends: false"
            )
        with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
            trial = _Trial(quantize, prepared, context, Path(folder) / "ranges.json", 2 * len(names) + 1)
            order = self._sensitivities(
                trial, names, {name: weight_count(prepared, [layers[name]]) for name in names}
            )
            path: list[Point] = []
            for kept in range(len(names)):
                floats = {item.layer for item in order[:kept]}
                path.append(trial.point([name for name in names if name not in floats], floats))
            chosen = self._choose(path)
            floats = set(path[chosen].float_layers)
            result = trial.quantized([name for name in names if name not in floats])
        context.extra[REPORT] = self._report(
            trial, order, _with_front(path), chosen, sorted(ends & layers.keys())
        )
        return result

    def _quantize(self) -> Quantize:
        step = build(StepSpec(step=self.step, params=self.params))
        if not isinstance(step, Quantize):
            raise RecipeError(f"step {self.step} does not quantize layers of an ONNX model one by one")
        return step

    def _sensitivities(
        self, trial: _Trial, names: Sequence[str], weights: dict[str, int]
    ) -> list[Sensitivity]:
        """The layers, the most sensitive first."""
        found = []
        whole = trial.measured(names) if self.by == "all_but_one" else None
        for name in names:
            if whole:
                others = [other for other in names if other != name]
                # With one layer there is nothing but it to quantize.
                left, moved = trial.measured(others) if others else (trial.float_quality, 0.0)
                drop, change = left - whole[0], whole[1] - moved
            else:
                left, change = trial.measured([name])
                drop = trial.float_quality - left
            found.append(Sensitivity(name, weights[name], drop, change))
        return sorted(found, key=lambda item: (-max(item.drop, 0.0), -item.change, item.layer))

    def _choose(self, path: Sequence[Point]) -> int:
        if self.float_layers is not None:
            return self.float_layers
        for number, point in enumerate(path):
            if point.drop <= (self.max_drop or 0.0):
                return number
        least = min(point.drop for point in path)
        raise StepError(
            f"mixed_precision: no choice of layers loses at most {self.max_drop:g} of quality on the validation split; "
            f"the least is {least:.4f}: raise max_drop, or use a gentler step than {self.step}"
        )

    def _report(
        self,
        trial: _Trial,
        order: Sequence[Sensitivity],
        path: Sequence[Point],
        chosen: int,
        ends: Sequence[str],
    ) -> bytes:
        content: dict[str, Any] = {
            "step": self.step,
            "by": self.by,
            "split": "validation",
            "rows": len(trial.labels),
            "metric": trial.context.workload.metric,
            "float_quality": trial.float_quality,
            "ends_in_float": list(ends),
            "layers": [asdict(item) for item in order],
            "path": [asdict(point) for point in path],
            "chosen": chosen,
        }
        return json.dumps(content, indent=1).encode()


class _Trial:
    """Quantizes some layers and measures the outcome, always on the validation split."""

    def __init__(
        self, step: Quantize, prepared: ModelProto, context: StepContext, ranges: Path, runs: int
    ) -> None:
        self.step = step
        self.prepared = prepared
        self.context = context
        self.ranges = ranges
        self.runs = runs
        self.done = 0
        rows = context.data.rows("validation")
        self.tensors, self.labels = rows.tensors, rows.labels
        self.float_output, self.float_answers = self._answers(prepared)
        self.float_quality = self._quality(self.float_answers)

    def quantized(self, names: Sequence[str]) -> ModelProto:
        return self.step.quantized(self.prepared, names, self.context, self.ranges)

    def measured(self, names: Sequence[str]) -> tuple[float, float]:
        """Quality, and how far the outputs move, with these layers quantized."""
        self._tick()
        output, answers = self._answers(self.quantized(names))
        moved = np.linalg.norm(np.nan_to_num(output) - self.float_output)
        return self._quality(answers), float(moved / max(float(np.linalg.norm(self.float_output)), 1e-12))

    def point(self, names: Sequence[str], floats: set[str]) -> Point:
        """The model with these layers quantized, and the others in float."""
        self._tick()
        model = self.quantized(names)
        value = self._quality(self._answers(model)[1])
        return Point(tuple(sorted(floats)), model.ByteSize(), value, self.float_quality - value)

    def _tick(self) -> None:
        self.context.progress(MixedPrecision.name, min(1.0, self.done / self.runs))
        self.done += 1

    def _answers(self, model: ModelProto) -> tuple[np.ndarray, Answers]:
        session = open_session(model.SerializeToString())
        output = run(session, self.tensors)
        predictions = decode(self.context.workload, session, output)
        finite = np.isfinite(output).reshape(len(output), -1).all(axis=1)
        return output.astype(np.float64), Answers(predictions.classes, predictions.confidences, finite)

    def _quality(self, answers: Answers) -> float:
        full = getattr(self, "float_answers", answers)
        workload = self.context.workload
        return quality(workload.metric, Pairs.of(answers, full, self.labels).about(workload)).value


def _with_front(path: Sequence[Point]) -> list[Point]:
    """Mark the points that no other one beats in both size and quality."""

    def beaten(point: Point, other: Point) -> bool:
        no_worse = other.size_bytes <= point.size_bytes and other.quality >= point.quality
        return no_worse and (other.size_bytes, other.quality) != (point.size_bytes, point.quality)

    return [replace(point, front=not any(beaten(point, other) for other in path)) for point in path]
