"""What the quantizing steps share: finding nodes by name, rewriting them, and ONNX Runtime's tools on files."""

from __future__ import annotations

import copy
import re
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from compression.errors import StepError
from compression.export import quiet
from compression.steps.base import OnnxStep, Property, StepContext
from compression.steps.patterns import select

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_WEIGHT_INPUT = {"Gather": 0}
"""Operator -> position of its weights among its inputs; 1 for all others."""


class Quantize(OnnxStep):
    """What every quantization of an ONNX model has in common.

    Args:
        targets: shell-style pattern of the names of the nodes to quantize, as in the ONNX graph; brackets stand for
            themselves where a name has them so.
        nodes_to_exclude: shell-style patterns of nodes that stay in float.
        keep_ends: the first and the last layer with weights, in the order of the graph, stay in float.
    """

    makes: ClassVar[frozenset[Property]] = frozenset({"grid"})

    targets: str = "*"
    nodes_to_exclude: tuple[str, ...] = ()
    keep_ends: bool = False

    @property
    def destroys(self) -> frozenset[Property]:
        """The weights are integers afterwards, on another grid than a codebook's."""
        return frozenset({"float", "codebook"})

    @property
    @abstractmethod
    def kinds(self) -> tuple[str, ...]:
        """Operators whose constant weights can be quantized."""

    @abstractmethod
    def prepared(self, model: ModelProto) -> ModelProto:
        """A copy in which every node has a name of its own and all that can be quantized is one of `kinds`."""

    @abstractmethod
    def quantized(
        self, model: ModelProto, names: Sequence[str], context: StepContext, ranges: Path | None = None
    ) -> ModelProto:
        """Quantize the named nodes of a prepared model, which stays as it is.

        Args:
            ranges: file in which measured ranges are kept for the next call on the same model.

        Raises:
            StepError: not all of them could be.
        """

    def chosen(self, model: ModelProto, context: StepContext) -> list[str]:
        """Names of the nodes of a prepared model to quantize, in the order of the graph.

        Raises:
            StepError: a pattern matches nothing, or nothing is left.
        """
        able = [node.name for node in weighted(model, self.kinds)]
        if "Gemm" not in self.kinds and (passed_over := [node.name for node in weighted(model, ("Gemm",))]):
            context.warnings.append(
                f"{self.name}: {', '.join(passed_over)} cannot be written as MatMul (a bias that is computed and "
                "scaled, or transA), and stays in float"
            )
        names = select(able, self.targets)
        if not names:
            there = ", ".join(able) or f"no {'/'.join(self.kinds)} with constant weights"
            raise StepError(f"{self.name}: targets {self.targets!r} matches nothing; the model has {there}")
        float_ones = set(matching(model, self.nodes_to_exclude, self.name))
        if self.keep_ends:
            float_ones |= {able[0], able[-1]}
        left = [name for name in names if name not in float_ones]
        if not left:
            raise StepError(
                f"{self.name}: nothing is left to quantize of {', '.join(names)}: "
                "exclude less, or set keep_ends: false"
            )
        if loose := [
            (norm, layer) for norm, layer in unfolded(model) if layer.name in left and layer.op_type != "Conv"
        ]:
            pairs = ", ".join(f"{norm.name} after {layer.name}" for norm, layer in loose)
            context.warnings.append(
                f"{self.name}: normalization not folded into the layer before it, which is then quantized for another "
                f"range: {pairs}; export the network in evaluation mode"
            )
        return left

    def apply(self, model: ModelProto, context: StepContext) -> ModelProto:
        """Return a quantized copy."""
        model = self.prepared(model)
        return self.quantized(model, self.chosen(model, context), context)


def matching(model: ModelProto, patterns: Iterable[str], step: str) -> list[str]:
    """Names of the nodes that match any of the patterns.

    Raises:
        StepError: a pattern matches no node.
    """
    names = [node.name for node in model.graph.node]
    found = []
    for pattern in patterns:
        matches = select(names, pattern)
        if not matches:
            raise StepError(
                f"{step}: nodes_to_exclude {pattern!r} matches nothing; the model has {', '.join(names)}"
            )
        found += matches
    return found


def weighted(model: ModelProto, kinds: Sequence[str]) -> list[NodeProto]:
    """The nodes of some operators whose weights are constant matrices (or kernels), in the order of the graph."""
    from onnx import TensorProto

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    weights = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type in floats and len(tensor.dims) > 1
    }
    return [
        node
        for node in model.graph.node
        if node.op_type in kinds and node.input[_WEIGHT_INPUT.get(node.op_type, 1)] in weights
    ]


def unfolded(model: ModelProto) -> list[tuple[NodeProto, NodeProto]]:
    """Every BatchNormalization right after a layer, with that layer; between the two a bias may be added."""
    makers = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        before = makers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if before is not None and before.op_type == "Add" and constants & set(before.input):
            before = next((makers[name] for name in before.input if name in makers), None)
        if before is not None and before.op_type in ("Conv", "Gemm", "MatMul"):
            found.append((node, before))
    return found


def weight_count(model: ModelProto, nodes: Iterable[NodeProto]) -> int:
    """How many weights some nodes have."""
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    return sum(sizes.get(node.input[_WEIGHT_INPUT.get(node.op_type, 1)], 0) for node in nodes)


def named_copy(model: ModelProto) -> ModelProto:
    """A copy whose constants are initializers and whose nodes have names of their own.

    Quantizers pick nodes by name, and hand-made models need not have any; the standard does not ask that names
    differ either.
    """
    from onnx import TensorProto

    model = copy.deepcopy(model)
    # From this version on initializers need not be inputs as well.
    model.ir_version = max(model.ir_version, 4)
    constants = [
        node
        for node in model.graph.node
        if node.op_type == "Constant" and [attribute.name for attribute in node.attribute] == ["value"]
    ]
    for node in constants:
        tensor = TensorProto()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        model.graph.initializer.append(tensor)
        model.graph.node.remove(node)
    taken: set[str] = set()
    names = {node.name for node in model.graph.node}
    for number, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            name = f"{node.name or node.op_type}_{number}"
            while name in names | taken:
                name += "_"
            node.name = name
        taken.add(node.name)
    return model


def without_gemm(model: ModelProto) -> ModelProto:
    """A named copy with every Gemm on constant weights as MatMul, under the same name, + Add.

    Dynamic quantization and MatMulNBits pass over Gemm without a word. ONNX Runtime's own rewriting leaves Gemm with
    factors alone, and transposes weights that two nodes share twice.
    """
    from onnx import helper, numpy_helper

    model = named_copy(model)
    # Exporters note the shapes of weights here; those of transposed ones would be wrong afterwards.
    del model.graph.value_info[:]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    made: dict[tuple[str, str], str] = {}

    def changed(name: str, how: str, change: Callable[[np.ndarray], np.ndarray]) -> str:
        """Name of a changed copy of an initializer, made once for all nodes that share it."""
        if (name, how) in made:
            return made[name, how]
        new = f"{name}_{how}"
        while new in tensors:
            new += "_"
        made[name, how] = new
        array = np.ascontiguousarray(change(numpy_helper.to_array(tensors[name])))
        tensors[new] = numpy_helper.from_array(array, new)
        model.graph.initializer.append(tensors[new])
        return new

    nodes: list[NodeProto] = []
    wanted = {node.name for node in weighted(model, ("Gemm",))}
    for node in model.graph.node:
        options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        alpha, beta = options.get("alpha", 1.0), options.get("beta", 1.0)
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        scaled = bool(bias) and beta != 1
        if node.name not in wanted or options.get("transA") or (scaled and bias not in tensors):
            nodes.append(node)
            continue
        weight = node.input[1]
        if options.get("transB"):
            weight = changed(weight, "transposed", np.transpose)
        if alpha != 1:
            weight = changed(weight, f"times_{alpha!r}", partial(_times, alpha))
        if scaled:
            bias = changed(bias, f"times_{beta!r}", partial(_times, beta))
        output = node.output[0]
        product = f"{output}_MatMul" if bias else output
        nodes.append(helper.make_node("MatMul", [node.input[0], weight], [product], node.name))
        if bias:
            nodes.append(helper.make_node("Add", [product, bias], [output], f"{node.name}_Add"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    drop_unused(model)
    return model


def _times(factor: float, array: np.ndarray) -> np.ndarray:
    return array * array.dtype.type(factor)


def drop_unused(model: ModelProto) -> None:
    """Take out, in place, initializers that no node uses, and all but the first of those of one name."""
    used = {name for node in model.graph.node for name in node.input} | {
        value.name for value in model.graph.output
    }
    if any(
        attribute.HasField("g") or attribute.graphs
        for node in model.graph.node
        for attribute in node.attribute
    ):
        return  # graphs inside graphs may use any of them
    kept = []
    for tensor in model.graph.initializer:
        if tensor.name in used:
            used.discard(tensor.name)
            kept.append(tensor)
    gone = {tensor.name for tensor in model.graph.initializer} - {tensor.name for tensor in kept}
    inputs = [value for value in model.graph.input if value.name not in gone]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    del model.graph.input[:]
    model.graph.input.extend(inputs)


def weight_of(node: NodeProto) -> str:
    """Name of a node's weights."""
    name: str = node.input[_WEIGHT_INPUT.get(node.op_type, 1)]
    return name


def apart(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """A copy in which no weights are both a table and a matrix to quantize.

    Quantizers call what they make of both by one name, and make it in different ways.
    """
    model = copy.deepcopy(model)
    chosen = [node for node in model.graph.node if node.name in set(names)]
    products = {weight_of(node) for node in chosen if node.op_type != "Gather"}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    # In order, as the same model has to come out every time.
    for weight in sorted({weight_of(node) for node in chosen if node.op_type == "Gather"} & products):
        table = copy.deepcopy(tensors[weight])
        while table.name in tensors:
            table.name += "_table"
        tensors[table.name] = table
        model.graph.initializer.append(table)
        for node in chosen:
            if node.op_type == "Gather" and node.input[0] == weight:
                node.input[0] = table.name
    return model


def check_done(done: int, names: Sequence[str], step: str, what: str) -> None:
    """Raise a StepError unless as many nodes were quantized as were named."""
    if done < len(names):
        raise StepError(f"{step}: only {done} of {len(names)} nodes became {what} ({', '.join(names)})")


def through_files(model: ModelProto, change: Callable[[str, str], None]) -> ModelProto:
    """Run one of ONNX Runtime's tools, which work on files."""
    import onnx

    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder, quiet():
        source, target = str(Path(folder) / "in.onnx"), str(Path(folder) / "out.onnx")
        onnx.save_model(model, source)
        try:
            change(source, target)
        except Exception as error:
            raise cannot(error) from error
        return onnx.load_model(target)


def cannot(error: Exception) -> StepError:
    """One line for what went wrong in ONNX Runtime."""
    first = re.sub(r"\s+", " ", str(error))[:200] or type(error).__name__
    return StepError(f"ONNX Runtime cannot quantize this model: {first}")
