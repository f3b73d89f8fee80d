"""The layers of an ONNX graph, one at a time: pruned, or quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compression.errors import CompressionError, StepError
from compression.recipe import StepSpec

if TYPE_CHECKING:
    from onnx import ModelProto

    from compression.steps import StepContext
    from compression.steps.onnx_nodes import Quantize


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


INT8: tuple[StepSpec, ...] = (
    # Any pattern but "*" leaves all other nodes alone, also those without weights between the layers.
    StepSpec(step="int8_static", params={"targets": "**"}),
    StepSpec(step="int8_dynamic"),
)
INT8_TABLES: tuple[StepSpec, ...] = (StepSpec(step="int8_dynamic", params={"embeddings": True}),)
"""Static quantization leaves tables that rows are looked up in alone."""
INT4: tuple[StepSpec, ...] = (
    StepSpec(step="int4_weights", params={"embeddings": True}),
    StepSpec(step="int4_weights"),
)
"""Steps that quantize single layers; the first one that can work on the model is taken."""


class Quantizer:
    """Quantizes single layers of a graph; made ready when it is first asked to.

    Args:
        graph: one whose nodes have names.
        context: makes what a step works with.
        specs: quantizing steps; the first one that can work on the graph is taken.
        ranges: file for the measured ranges of activations, so that they are measured once.
    """

    def __init__(
        self, graph: ModelProto, context: Callable[[], StepContext], specs: Sequence[StepSpec], ranges: Path
    ) -> None:
        self._graph = graph
        self._context = context
        self._specs = specs
        self._ranges = ranges
        self._ready: tuple[Quantize, ModelProto, frozenset[str]] | None = None

    def quantized(self, layer: Layer) -> ModelProto | None:
        """The model with this layer quantized, or None if the step leaves its operator alone.

        Raises:
            StepError: no step can work on this model, or it failed on this layer.
        """
        if self._ready is None:
            self._ready = self._prepared()
        step, model, able = self._ready
        names = [name for name in layer.nodes if name in able]
        return step.quantized(model, names, self._context(), self._ranges) if names else None

    def _prepared(self) -> tuple[Quantize, ModelProto, frozenset[str]]:
        from compression.steps import build
        from compression.steps.onnx_nodes import Quantize

        problem: CompressionError | None = None
        for spec in self._specs:
            step = build(spec)
            assert isinstance(step, Quantize)
            try:
                prepared = step.prepared(self._graph)
                able = step.chosen(prepared, self._context())
                # Whether the calibration split has rows enough shows when one is quantized.
                step.quantized(prepared, able[:1], self._context(), self._ranges)
            except CompressionError as error:
                problem = problem or error
                continue
            return step, prepared, frozenset(able)
        raise StepError(str(problem))
