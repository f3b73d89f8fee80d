"""What an ONNX graph costs: parameters and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from compression.export import open_session

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_PRODUCTS = {"MatMul", "MatMulInteger", "MatMulNBits", "Gemm"}
_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}
"""Operator -> position of its weights among its inputs."""
_BLOCKWISE = {"MatMulNBits": 1, "GatherBlockQuantized": 0}
"""Operator -> position of its packed weights among its inputs; scales come next, and zero points at position 3."""
_WEIGHT_TYPES = {"float16", "float32", "float64", "bfloat16", "int8", "uint8", "int4", "uint4", "int32"}


class Parameters(NamedTuple):
    """Weights of a graph, and those of them that are not zero."""

    total: int
    nonzero: int


def count_parameters(model: ModelProto) -> Parameters:
    """Count the weights in a graph's initializers, without the scales and zero points of quantization.

    An integer weight counts as zero when it equals its zero point.
    """
    from onnx import numpy_helper

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    zero_points: dict[str, str] = {}
    helpers: set[str] = set()
    blocks: dict[str, Parameters] = {}
    for node in model.graph.node:
        if node.op_type in _BLOCKWISE:
            helpers.update(name for name in node.input[2:] if name)
            # Two nodes may share their weights.
            packed = node.input[_BLOCKWISE[node.op_type]]
            blocks[packed] = _in_blocks(node, arrays)
            helpers.add(packed)
        if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            helpers.update(node.input[1:])
            if len(node.input) > 2:
                zero_points[node.input[0]] = node.input[2]
        elif node.op_type in ("MatMulInteger", "ConvInteger"):
            helpers.update(node.input[2:])
            if len(node.input) > 3:
                zero_points[node.input[1]] = node.input[3]
    total, nonzero = (sum(part[place] for part in blocks.values()) for place in (0, 1))
    for name, array in arrays.items():
        # ONNX Runtime's quantizer ends names so; dynamic quantization's scales hang on plain Mul nodes.
        if (
            name in helpers
            or name.endswith(("_scale", "_zero_point"))
            or array.dtype.name not in _WEIGHT_TYPES
        ):
            continue
        zero = arrays.get(zero_points.get(name, ""), np.zeros(1))
        if zero.any() and zero.size == 1:
            array = array.astype(np.int64) - zero.astype(np.int64).item()  # noqa: PLW2901
        total += array.size
        nonzero += int(np.count_nonzero(array))
    return Parameters(total, nonzero)


def _in_blocks(node: NodeProto, arrays: Mapping[str, np.ndarray]) -> Parameters:
    """Weights of a node that stores them in blocks, each with a zero point of its own."""
    from onnx import helper

    options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    points = arrays.get(node.input[3]) if len(node.input) > 3 else None
    if node.op_type == "GatherBlockQuantized":
        weights = arrays[node.input[0]].astype(np.int64)
        axis = options["quantize_axis"]
        per_weight = np.zeros(1)
        if points is not None:
            repeated = np.repeat(points.astype(np.int64), options["block_size"], axis=axis)
            per_weight = np.take(repeated, np.arange(weights.shape[axis]), axis=axis)
        return Parameters(weights.size, int((weights != per_weight).sum()))
    inputs, outputs, bits = options["K"], options["N"], options["bits"]
    weights = _unpacked(arrays[node.input[1]].reshape(outputs, -1), bits)
    count = arrays[node.input[1]].shape[1]
    if points is None:
        per_block = np.full((outputs, count), 2 ** (bits - 1))
    elif points.dtype == np.uint8:
        per_block = _unpacked(points.reshape(outputs, -1), bits)[:, :count]
    else:
        per_block = points.reshape(outputs, count)
    # The last block is filled up beyond the inputs there are.
    per_weight = np.repeat(per_block, options["block_size"], axis=1)[:, :inputs]
    return Parameters(inputs * outputs, int((weights[:, :inputs] != per_weight).sum()))


def _unpacked(content: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of a few bits each, lowest first, from bytes uint8 [N, M]."""
    parts = [content >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(len(content), -1)


def count_macs(model: ModelProto, tensors: Mapping[str, np.ndarray]) -> int:
    """Multiply-accumulates of matrix products and convolutions for one record.

    The shapes come from running the graph on the first row of `tensors`, so no shape inference can miss any.
    """
    import onnx

    counted = _PRODUCTS | _CONVOLUTIONS.keys()
    nodes = [node for node in model.graph.node if node.op_type in counted]
    constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    inputs = {value.name for value in model.graph.input}
    wanted = sorted({name for node in nodes for name in _relevant(node)} - constants.keys() - inputs)
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    one = {name: array[:1] for name, array in tensors.items()}
    shapes = constants | {name: array.shape for name, array in one.items()}
    if wanted:
        values = open_session(probe.SerializeToString()).run(wanted, one)
        shapes |= {name: np.shape(value) for name, value in zip(wanted, values, strict=True)}
    return sum(_macs(node, shapes) for node in nodes)


def _relevant(node: NodeProto) -> Iterator[str]:
    yield node.output[0]
    yield node.input[_CONVOLUTIONS.get(node.op_type, 0)]


def _macs(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    output = prod(shapes[node.output[0]])
    if node.op_type in _CONVOLUTIONS:
        # One output value sums over its group's input channels and the kernel: all but the first dimension.
        return output * prod(shapes[node.input[_CONVOLUTIONS[node.op_type]]][1:])
    left = shapes[node.input[0]]
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return output * (left[0] if transposed else left[-1])
