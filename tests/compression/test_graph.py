from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from compression.data import Data
from compression.graph import count_macs, count_parameters
from compression.steps import STEPS, StepContext

from .conftest import dense


def test_parameters_are_those_of_the_torch_network(network: nn.Module, graph: onnx.ModelProto) -> None:
    expected = sum(parameter.numel() for parameter in network.parameters())
    assert count_parameters(graph) == (expected, expected)


def test_zeroed_weights_are_counted_apart() -> None:
    weight = torch.arange(12.0).reshape(4, 3)
    assert count_parameters(dense([weight])) == (12, 11)


def test_multiply_accumulates_of_dense_layers(graph: onnx.ModelProto, data: Data) -> None:
    assert count_macs(graph, data.rows("test").tensors) == 5 * 32 + 32 * 32 + 32 * 2


def test_quantization_changes_neither_parameters_nor_multiply_accumulates(
    graph: onnx.ModelProto, data: Data, context: StepContext
) -> None:
    for name in ("int8_dynamic", "int8_static"):
        changed = STEPS[name]().apply(graph, context)
        assert count_parameters(changed).total == count_parameters(graph).total
        assert count_macs(changed, data.rows("test").tensors) == count_macs(graph, data.rows("test").tensors)


def test_multiply_accumulates_of_a_grouped_convolution() -> None:
    weight = np.ones((8, 2, 3, 3), dtype=np.float32)  # 4 channels in, 8 out, 2 groups
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], group=2)],
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 10, 10])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8, 8, 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert count_macs(model, {"x": np.ones((5, 4, 10, 10), dtype=np.float32)}) == 8 * 8 * 8 * 2 * 3 * 3
