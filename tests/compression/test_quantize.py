"""Quantization of ONNX models: INT8, static and dynamic, and weights in four bits."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from compression.data import Data, Rows
from compression.errors import RecipeError, StepError
from compression.export import export, open_session, run
from compression.graph import count_macs, count_parameters
from compression.recipe import StepSpec
from compression.steps import STEPS, StepContext, build
from compression.steps.onnx_nodes import without_gemm
from compression.steps.patterns import select
from compression.workload import Workload

from .conftest import dense

QUANTIZING = ["int4_weights", "int8_dynamic", "int8_static"]


def model_of(nodes: list[onnx.NodeProto], arrays: dict[str, np.ndarray], shape: list[Any]) -> onnx.ModelProto:
    """A model from `x` of a shape to the last node's output, and whatever else is named `out...`."""
    outputs = [name for node in nodes for name in node.output if name.startswith("out")]
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def convolutional(*, seen: bool = False) -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu, Conv, Relu, mean, Gemm on images; `seen`: the first Conv is an output too."""
    middle = "out_seen" if seen else "h0"
    nodes = [
        helper.make_node("Conv", ["x", "k0"], [middle], "first", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", [middle, "scale", "shift", "mean", "var"], ["h1"], "norm"),
        helper.make_node("Relu", ["h1"], ["h2"], "relu"),
        helper.make_node("Conv", ["h2", "k1"], ["h3"], "second"),
        helper.make_node("Relu", ["h3"], ["h4"], "relu_1"),
        helper.make_node("GlobalAveragePool", ["h4"], ["h5"], "pool"),
        helper.make_node("Flatten", ["h5"], ["h6"], "flat"),
        helper.make_node("Gemm", ["h6", "w"], ["out"], "dense"),
    ]
    arrays = {"k0": normal(8, 1, 3, 3), "k1": normal(8, 8, 3, 3, seed=1), "w": normal(8, 2, seed=2)}
    arrays |= {
        "scale": normal(8),
        "shift": normal(8, seed=3),
        "mean": normal(8, seed=4),
        "var": normal(8) ** 2 + 1,
    }
    return model_of(nodes, arrays, ["batch", 1, 6, 6])


def chain(*widths: int) -> onnx.ModelProto:
    """MatMul, Add and Relu from each width to the next; the products are called `layer0`, `layer1` and so on."""
    nodes, arrays, last = [], {}, "x"
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        end = "out" if number == len(widths) - 2 else f"h{number}"
        arrays |= {
            f"w{number}": normal(inputs, outputs, seed=number),
            f"b{number}": normal(outputs, seed=number),
        }
        nodes += [
            helper.make_node("MatMul", [last, f"w{number}"], [f"p{number}"], f"layer{number}"),
            helper.make_node("Add", [f"p{number}", f"b{number}"], [f"a{number}"], f"bias{number}"),
            helper.make_node("Relu", [f"a{number}"], [end], f"relu{number}"),
        ]
        last = end
    return model_of(nodes, arrays, ["batch", widths[0]])


@pytest.fixture
def made(tiny: Workload) -> Any:
    """A context whose calibration rows are `x` of a shape."""

    def make(*shape: int) -> StepContext:
        data = Data(tiny)
        x = normal(120, *shape, seed=9)
        data._rows["calibration"] = Rows(pd.DataFrame(index=range(120)), {"x": x}, np.zeros(120, np.int64))
        return StepContext(tiny, data)

    return make


def step(name: str, **params: Any) -> Any:
    return build(StepSpec(step=name, params=params))


def answers(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = open_session(model.SerializeToString())
    return session.run(["out"], {"x": x})[0]


def floats(model: onnx.ModelProto) -> set[str]:
    """Names of the matrices and kernels that are in float."""
    return {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) > 1
        and not tensor.name.endswith("_scales")
    }


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


# --- which nodes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZING)
def test_excluded_nodes_stay_in_float(name: str, made: Any) -> None:
    changed = step(name, nodes_to_exclude=["layer1*", "relu2"]).apply(chain(8, 16, 32, 4), made(8))
    assert floats(changed) == {"w1"}


@pytest.mark.parametrize("name", QUANTIZING)
def test_an_exclusion_that_matches_nothing_is_an_error(name: str, made: Any) -> None:
    with pytest.raises(StepError, match=r"nodes_to_exclude 'lair\*' matches nothing; the model has layer0, "):
        step(name, nodes_to_exclude=["layer1", "lair*"]).apply(chain(8, 16, 4), made(8))


@pytest.mark.parametrize("name", QUANTIZING)
def test_the_ends_stay_in_float_when_asked(name: str, made: Any) -> None:
    changed = step(name, keep_ends=True).apply(chain(8, 16, 32, 4), made(8))
    assert floats(changed) == {"w0", "w2"}


@pytest.mark.parametrize("name", QUANTIZING)
def test_leaving_nothing_to_quantize_is_an_error(name: str, made: Any) -> None:
    with pytest.raises(StepError, match="nothing is left to quantize of layer0, layer1"):
        step(name, keep_ends=True).apply(chain(8, 16, 4), made(8))


@pytest.mark.parametrize("name", QUANTIZING)
def test_nodes_of_one_name_are_told_apart(name: str, made: Any) -> None:
    model = chain(8, 16, 4)
    for node in model.graph.node:
        node.name = "same"
    assert floats(step(name).apply(model, made(8))) == set()


@pytest.mark.parametrize("name", QUANTIZING)
def test_weights_in_constant_nodes_are_found(name: str, made: Any) -> None:
    model = chain(8, 16, 4)
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    nodes = [*constants, *model.graph.node]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    changed = step(name).apply(model, made(8))
    assert floats(changed) == set()
    assert "Constant" not in kinds(changed)


@pytest.mark.parametrize("name", QUANTIZING)
def test_nodes_that_share_weights_are_all_quantized(name: str, made: Any) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], "one", transB=1),
        helper.make_node("Gemm", ["h", "w"], ["out"], "two", transB=1),
    ]
    model = model_of(nodes, {"w": normal(8, 8)}, ["batch", 8])
    x = normal(20, 8, seed=5)
    changed = step(name).apply(model, made(8))
    assert floats(changed) == set()
    assert np.corrcoef(answers(changed, x).ravel(), answers(model, x).ravel())[0, 1] > 0.97


@pytest.mark.parametrize("options", [{}, {"transB": 1}, {"alpha": 0.5, "beta": 2.0}, {"transA": 1}])
@pytest.mark.parametrize("bias", [True, False])
def test_gemm_is_rewritten_to_what_computes_the_same(options: dict[str, Any], bias: bool) -> None:
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    model = model_of(
        [helper.make_node("Gemm", inputs, ["out"], "g", **options)],
        {"w": normal(8, 8), "b": normal(8)},
        ["batch", 8],
    )
    x = normal(8, 8, seed=5)
    changed = without_gemm(model)
    assert ("Gemm" in kinds(changed)) == ("transA" in options)
    np.testing.assert_allclose(answers(changed, x), answers(model, x), rtol=1e-5, atol=1e-5)


def test_a_name_that_the_graph_has_already_is_not_taken_for_the_rewritten_weights() -> None:
    model = model_of(
        [
            helper.make_node("Gemm", ["x", "w"], ["h"], "one", transB=1),
            helper.make_node("MatMul", ["h", "w_transposed"], ["out"], "two"),
        ],
        {"w": normal(8, 8), "w_transposed": normal(8, 8, seed=9)},
        ["batch", 8],
    )
    x = normal(8, 8, seed=5)
    np.testing.assert_allclose(answers(without_gemm(model), x), answers(model, x), rtol=1e-5, atol=1e-5)


def test_a_layer_that_stays_in_float_because_of_how_it_is_written_is_told(made: Any) -> None:
    model = model_of(
        [
            helper.make_node("Gemm", ["x", "w", "x"], ["h"], "odd", beta=2.0),
            helper.make_node("MatMul", ["h", "w"], ["out"], "plain"),
        ],
        {"w": normal(8, 8)},
        ["batch", 8],
    )
    context = made(8)
    step("int8_dynamic").apply(model, context)
    assert any("odd cannot be written as MatMul" in warning for warning in context.warnings)


# --- INT8 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8_dynamic", "int8_static"])
def test_quantization_reaches_every_dense_layer(
    name: str, graph: onnx.ModelProto, context: StepContext
) -> None:
    changed = STEPS[name]().apply(graph, context)
    floats = [
        tensor.name
        for tensor in changed.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and "layers" in tensor.name and len(tensor.dims) > 1
    ]
    assert floats == []
    assert count_parameters(changed).total == count_parameters(graph).total


def test_gemm_layers_without_names_are_not_skipped_in_silence(context: StepContext) -> None:
    torch.manual_seed(0)
    changed = STEPS["int8_dynamic"]().apply(dense([torch.randn(8, 16), torch.randn(16, 2)]), context)
    assert sum(node.op_type == "MatMulInteger" for node in changed.graph.node) == 2


@pytest.mark.parametrize("name", ["int8_dynamic", "int8_static"])
def test_a_pattern_that_matches_nothing_is_an_error(
    name: str, graph: onnx.ModelProto, context: StepContext
) -> None:
    with pytest.raises(StepError, match=r"'conv.*' matches nothing; the model has node_linear"):
        STEPS[name](targets="conv*").apply(graph, context)


@pytest.mark.parametrize("name", ["int8_dynamic", "int8_static"])
def test_quantization_keeps_to_its_pattern(name: str, graph: onnx.ModelProto, context: StepContext) -> None:
    changed = STEPS[name](targets="*linear_1*").apply(graph, context)
    quantized = [
        tensor.name
        for tensor in changed.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    ]
    assert len(quantized) == 1


def test_the_calibration_rows_are_recorded(graph: onnx.ModelProto, tiny: Workload, data: Data) -> None:
    hashes = []
    for rows in (100, 100, 150):
        context = StepContext(tiny, data)
        STEPS["int8_static"](rows=rows).apply(graph, context)
        hashes.append(context.calibration_sha256)
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_every_calibration_method_works(
    method: str, graph: onnx.ModelProto, context: StepContext, data: Data, capfd: pytest.CaptureFixture[str]
) -> None:
    changed = STEPS["int8_static"](method=method).apply(graph, context)
    rows = data.rows("test")
    answers = [
        run(open_session(m.SerializeToString()), rows.tensors, 100).argmax(1) for m in (graph, changed)
    ]
    assert (answers[0] == answers[1]).mean() > 0.95
    assert capfd.readouterr().out == ""


def test_too_few_calibration_rows_are_an_error(
    graph: onnx.ModelProto, tiny: Workload, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Data(tiny)
    few._rows["calibration"] = data.rows("calibration").take(slice(0, 99))
    with pytest.raises(StepError, match="has 99 rows, and ranges measured on fewer than 100"):
        STEPS["int8_static"]().apply(graph, StepContext(tiny, few))
    with pytest.raises(RecipeError, match="rows: "):
        build(StepSpec(step="int8_static", params={"rows": 99}))


def test_a_product_in_float_keeps_its_bias_in_float(made: Any) -> None:
    # With a third axis, product and addition do not become one Gemm.
    model = chain(8, 16, 4)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 5, 8]))
    changed = step("int8_static", nodes_to_exclude=["layer0"]).apply(model, made(5, 8))
    bias = next(node for node in changed.graph.node if node.name == "bias0")
    assert list(bias.input) == ["p0", "b0"]


@pytest.mark.parametrize("name", ["int8_dynamic", "int8_static"])
def test_a_reduced_range_leaves_weights_seven_bits(name: str, made: Any) -> None:
    def largest(reduce_range: bool) -> int:
        changed = step(name, reduce_range=reduce_range).apply(chain(8, 16, 4), made(8))
        arrays = [
            numpy_helper.to_array(t) for t in changed.graph.initializer if t.data_type == TensorProto.INT8
        ]
        return max(int(np.abs(array.astype(int)).max()) for array in arrays)

    assert largest(False) == 127
    assert largest(True) == 64


@pytest.mark.parametrize(("per_channel", "scales"), [(True, 16), (False, 1)])
def test_weights_have_a_scale_for_each_channel_or_one(per_channel: bool, scales: int, made: Any) -> None:
    changed = step("int8_static", per_channel=per_channel).apply(chain(8, 16, 4), made(8))
    sizes = {t.name: int(np.prod(t.dims)) for t in changed.graph.initializer}
    assert sizes["w0_scale"] == scales


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_a_last_batch_of_any_length_is_calibrated_with(
    method: str, graph: onnx.ModelProto, tiny: Workload, data: Data
) -> None:
    step("int8_static", method=method, rows=137).apply(graph, StepContext(tiny, data))


def test_calibration_methods_differ_in_their_ranges(made: Any) -> None:
    context, scales = made(8), []
    context.data.rows("calibration").tensors["x"][0, 0] = 40
    for method in ("minmax", "entropy", "percentile"):
        changed = step("int8_static", method=method).apply(chain(8, 16, 4), context)
        arrays = {t.name: numpy_helper.to_array(t) for t in changed.graph.initializer}
        scales.append(float(arrays["x_scale"]))
    assert scales[1] < scales[0]
    assert scales[2] <= scales[0]


def stacked() -> onnx.ModelProto:
    """A product with a matrix and one with a stack of two."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "plain"),
        helper.make_node("MatMul", ["h", "s"], ["out"], "stack"),
    ]
    return model_of(nodes, {"w": normal(8, 8), "s": normal(2, 8, 8, seed=1)}, ["batch", 8])


@pytest.mark.parametrize("name", ["int8_dynamic", "int8_static"])
@pytest.mark.parametrize("params", [{}, {"per_channel": False}, {"targets": "stack"}, {"reduce_range": True}])
def test_stacks_of_matrices_get_one_scale_and_still_run(name: str, params: dict[str, Any], made: Any) -> None:
    context, model, x = made(8), stacked(), normal(20, 8, seed=5)
    changed = step(name, **params).apply(model, context)
    assert floats(changed) == ({"w"} if "targets" in params else set())
    assert np.corrcoef(answers(changed, x).ravel(), answers(model, x).ravel())[0, 1] > 0.99
    scales = {t.name: int(np.prod(t.dims)) for t in changed.graph.initializer if t.name.endswith("_scale")}
    assert scales["s_scale"] == 1
    assert scales.get("w_scale", 8) == (1 if "per_channel" in params else 8)
    told = any("stack multiply by stacks of matrices" in warning for warning in context.warnings)
    assert told == ("per_channel" not in params)


@pytest.mark.parametrize("targets", ["layers[0]/MatMul", "layers[0]*", "layers[[]0]*", "*[0]/MatMul"])
def test_brackets_in_a_name_are_found_by_brackets_in_a_pattern(targets: str, made: Any) -> None:
    model = chain(8, 16, 4)
    for number, place in ((0, 0), (1, 3)):
        model.graph.node[place].name = f"layers[{number}]/MatMul"
    assert floats(step("int8_dynamic", targets=targets).apply(model, made(8))) == {"w1"}
    excluded = step("int8_dynamic", nodes_to_exclude=[targets]).apply(model, made(8))
    assert floats(excluded) == {"w0"}


@pytest.mark.parametrize(
    ("names", "pattern", "meant"),
    [
        (["layers.0", "layers.1"], "layers.[0]", ["layers.0"]),
        (["layers.0", "layers.1", "layers.2"], "layers.[12]", ["layers.1", "layers.2"]),
        (["layers[0]", "layers0"], "layers[0]", ["layers[0]"]),
        (["layers[0]", "layers0"], "layers[[]0]", ["layers[0]"]),
        (["Layers"], "layers", []),
        ([], "*", []),
    ],
)
def test_brackets_are_a_choice_of_characters_where_no_name_has_them(
    names: list[str], pattern: str, meant: list[str]
) -> None:
    assert select(names, pattern) == meant


# --- convolutions -----------------------------------------------------------------------------------------


def test_batch_norm_is_folded_into_the_convolution_before_it(made: Any) -> None:
    model = convolutional()
    changed = step("int8_static").apply(model, made(1, 6, 6))
    assert "BatchNormalization" not in kinds(changed)
    assert floats(changed) == set()
    x = normal(50, 1, 6, 6, seed=5)
    assert np.corrcoef(answers(changed, x).ravel(), answers(model, x).ravel())[0, 1] > 0.99


def test_batch_norm_of_an_exported_network_is_folded(made: Any) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    with torch.no_grad():
        network.train()(torch.randn(64, 1, 6, 6))
    exported = export(Named().eval(), {"x": normal(16, 1, 6, 6)}).onnx
    changed = step("int8_static").apply(exported, made(1, 6, 6))
    assert "BatchNormalization" not in kinds(changed)
    assert floats(changed) == set()


def test_batch_norm_that_cannot_be_folded_is_an_error(made: Any) -> None:
    with pytest.raises(
        StepError, match=r"norm could not be folded into first.*add first to nodes_to_exclude"
    ):
        step("int8_static").apply(convolutional(seen=True), made(1, 6, 6))
    changed = step("int8_static", nodes_to_exclude=["first"]).apply(convolutional(seen=True), made(1, 6, 6))
    assert "k0" in floats(changed)
    assert "BatchNormalization" in kinds(changed)


@pytest.mark.parametrize("name", QUANTIZING)
@pytest.mark.parametrize("kind", ["Gemm", "MatMul"])
def test_batch_norm_that_is_left_after_a_matrix_product_is_told(name: str, kind: str, made: Any) -> None:
    nodes = [
        helper.make_node(kind, ["x", "w"], ["h0"], "first"),
        helper.make_node("Add", ["h0", "bias"], ["h1"], "plus"),
        helper.make_node("BatchNormalization", ["h1", "scale", "shift", "mean", "var"], ["h2"], "norm"),
        helper.make_node("Relu", ["h2"], ["h3"], "relu"),
        helper.make_node("MatMul", ["h3", "v"], ["out"], "last"),
    ]
    arrays = {name: normal(16) for name in ("bias", "scale", "shift", "mean")} | {"var": normal(16) ** 2 + 1}
    model = model_of(nodes, arrays | {"w": normal(8, 16), "v": normal(16, 2)}, ["batch", 8])
    context = made(8)
    changed = step(name).apply(model, context)
    told = any("norm after first; export the network in evaluation mode" in line for line in context.warnings)
    assert told == ("BatchNormalization" in kinds(changed))
    quiet = made(8)
    step(name).apply(chain(8, 16, 4), quiet)
    assert not any("normalization" in line for line in quiet.warnings)


def test_dynamic_int8_leaves_convolutions_alone_and_says_so(made: Any) -> None:
    context = made(1, 6, 6)
    changed = step("int8_dynamic").apply(convolutional(), context)
    assert {"k0", "k1"} <= floats(changed)
    assert kinds(changed).count("Conv") == 2
    assert kinds(changed).count("MatMulInteger") == 1
    assert context.warnings == [
        "int8_dynamic: 98% of the weights are in convolutions and stay in float: int8_static quantizes those too"
    ]


def test_dynamic_int8_of_convolutions_alone_is_refused(made: Any) -> None:
    model = convolutional()
    for params in ({"targets": "second"}, {"targets": "*s*o*", "nodes_to_exclude": ["dense"]}):
        with pytest.raises(StepError, match=r"matches only convolutions \(.*second\).*use int8_static"):
            step("int8_dynamic", **params).apply(model, made(1, 6, 6))
    del model.graph.node[7:]
    model.graph.output[0].name = "h6"
    with pytest.raises(StepError, match=r"matches only convolutions \(first, second\).*use int8_static"):
        step("int8_dynamic").apply(model, made(1, 6, 6))


# --- INT4 -------------------------------------------------------------------------------------------------


def in_blocks(model: onnx.ModelProto) -> list[dict[str, Any]]:
    return [
        {"inputs": len(node.input)}
        | {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    ]


@pytest.mark.parametrize("params", [{}, {"symmetric": True}, {"method": "hqq"}, {"block_size": 16}])
def test_four_bit_weights_answer_like_the_model(params: dict[str, Any], made: Any) -> None:
    model, x = chain(40, 64, 64, 4), normal(100, 40, seed=5)
    changed = step("int4_weights", **params).apply(model, made(40))
    assert len(in_blocks(changed)) == 3
    assert floats(changed) == set()
    assert len(changed.SerializeToString()) < 0.4 * len(model.SerializeToString())
    assert np.corrcoef(answers(changed, x).ravel(), answers(model, x).ravel())[0, 1] > 0.97


def test_the_parameters_of_four_bits_reach_the_nodes(made: Any) -> None:
    params = {"block_size": 64, "symmetric": True, "accuracy_level": 1}
    node = in_blocks(step("int4_weights", **params).apply(chain(8, 16, 4), made(8)))[0]
    assert (node["bits"], node["block_size"], node["accuracy_level"], node["inputs"]) == (4, 64, 1, 3)
    node = in_blocks(step("int4_weights").apply(chain(8, 16, 4), made(8)))[0]
    assert (node["bits"], node["block_size"], node["accuracy_level"], node["inputs"]) == (4, 32, 4, 4)


def test_hqq_is_nearer_to_most_weights_than_rounding(made: Any) -> None:
    weights = np.random.default_rng(0).standard_t(2, size=(256, 64))
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["out"], "m")], {"w": weights}, ["batch", 256])

    def error(method: str) -> float:
        changed = step("int4_weights", method=method, block_size=64, accuracy_level=0).apply(model, made(256))
        return float(np.median(np.abs(answers(changed, np.eye(256, dtype=np.float32)) - weights)))

    assert error("hqq") < error("rtn")


def test_four_bits_reach_gemm(graph: onnx.ModelProto, context: StepContext) -> None:
    changed = step("int4_weights").apply(graph, context)
    assert len(in_blocks(changed)) == 3
    assert "Gemm" not in kinds(changed)


def test_embeddings_are_stored_in_four_bits_when_asked(
    graph: onnx.ModelProto, context: StepContext, data: Data
) -> None:
    assert "GatherBlockQuantized" not in kinds(step("int4_weights").apply(graph, context))
    changed = step("int4_weights", embeddings=True, block_size=16).apply(graph, context)
    assert kinds(changed).count("GatherBlockQuantized") == 1
    assert count_parameters(changed).total == count_parameters(graph).total
    rows = data.rows("test").tensors
    both = [run(open_session(m.SerializeToString()), rows, 100).argmax(1) for m in (graph, changed)]
    assert (both[0] == both[1]).mean() > 0.95


@pytest.mark.parametrize("more", [{"symmetric": True}, {"embeddings": True}])
def test_hqq_is_refused_for_what_it_cannot_do(more: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="method hqq moves zero points"):
        step("int4_weights", method="hqq", **more)


@pytest.mark.parametrize(("method", "warned"), [("rtn", False), ("hqq", True)])
def test_the_slowness_of_hqq_is_remarked_on(method: str, warned: bool, made: Any) -> None:
    context = made(8)
    step("int4_weights", method=method).apply(chain(8, 16, 4), context)
    assert any("multiplies slowly" in warning for warning in context.warnings) == warned


def test_weights_that_cannot_be_in_four_bits_are_an_error(made: Any) -> None:
    stack = helper.make_node("MatMul", ["h", "s"], ["out"], "stack")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "plain"), stack]
    model = model_of(nodes, {"w": normal(8, 8), "s": normal(2, 8, 8)}, ["batch", 8])
    with pytest.raises(StepError, match=r"only 1 of 2 nodes became INT4 \(plain, stack\)"):
        step("int4_weights").apply(model, made(8))
    assert floats(step("int4_weights", nodes_to_exclude=["stack"]).apply(model, made(8))) == {"s"}


@pytest.mark.parametrize("params", [{}, {"symmetric": True}, {"block_size": 16}])
def test_four_bit_weights_are_counted_as_what_they_stand_for(params: dict[str, Any], made: Any) -> None:
    model = chain(40, 64, 4)
    array = numpy_helper.to_array(model.graph.initializer[0]).copy()
    array[:, :32] = 0
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w0"))
    changed = step("int4_weights", **params).apply(model, made(40))
    assert count_parameters(changed).total == count_parameters(model).total
    assert count_parameters(changed).nonzero <= count_parameters(model).nonzero
    assert count_parameters(changed).nonzero > 0.7 * count_parameters(model).nonzero
    rows = {"x": normal(1, 40)}
    assert count_macs(changed, rows) == count_macs(model, rows) == 40 * 64 + 64 * 4


def tied(rows: int, columns: int) -> onnx.ModelProto:
    """A table that rows are looked up in by the first of `x`, and that the rest of `x` is multiplied with."""
    nodes = [
        helper.make_node("Split", ["x"], ["number", "rest"], "split", axis=1),
        helper.make_node("Cast", ["number"], ["word"], "cast", to=TensorProto.INT64),
        helper.make_node("Gather", ["w", "word"], ["looked"], "look"),
        helper.make_node("ReduceSum", ["looked", "axis"], ["row"], "sum", keepdims=0),
        helper.make_node("MatMul", ["rest", "w"], ["made"], "product"),
        helper.make_node("Add", ["row", "made"], ["out"], "add"),
    ]
    model = model_of(nodes, {"w": normal(rows, columns)}, ["batch", rows + 1])
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, rows]), "parts"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    model.graph.node[0].input.append("parts")
    return model


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_table_that_is_multiplied_with_too_is_packed_for_both(symmetric: bool, made: Any) -> None:
    model = tied(48, 32)
    changed = step("int4_weights", embeddings=True, block_size=16, symmetric=symmetric).apply(model, made(49))
    assert {"GatherBlockQuantized", "MatMulNBits"} <= set(kinds(changed))
    assert floats(changed) == set()
    x = np.concatenate([np.arange(48)[:, None], normal(48, 48, seed=5)], axis=1).astype(np.float32)
    assert np.corrcoef(answers(changed, x).ravel(), answers(model, x).ravel())[0, 1] > 0.97


def test_a_table_in_four_bits_whose_float_weights_stay_is_told(made: Any) -> None:
    context = made(49)
    step("int4_weights", embeddings=True, nodes_to_exclude=["product"]).apply(tied(48, 32), context)
    assert any("look (0 bytes before, " in warning for warning in context.warnings)


@pytest.mark.parametrize("product_first", [True, False])
@pytest.mark.parametrize(("per_channel", "copies"), [(True, 2), (False, 1)])
def test_a_table_is_stored_in_eight_bits_when_asked_also_one_that_is_multiplied_with_too(
    per_channel: bool, copies: int, product_first: bool, made: Any
) -> None:
    model = tied(96, 32)
    table = numpy_helper.to_array(model.graph.initializer[0]) * np.logspace(-2, 0, 32, dtype=np.float32)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(table, "w"))
    if product_first:
        product = model.graph.node.pop(4)
        model.graph.node.insert(1, product)
    changed = step("int8_dynamic", embeddings=True, per_channel=per_channel).apply(model, made(97))
    stored = [tensor for tensor in changed.graph.initializer if list(tensor.dims) == [96, 32]]
    assert len(stored) == copies
    assert {tensor.data_type for tensor in stored} <= {TensorProto.INT8, TensorProto.UINT8}
    assert changed.ByteSize() < (0.65 if copies == 2 else 0.4) * model.ByteSize()
    x = np.concatenate([np.arange(96)[:, None], normal(96, 96, seed=5)], axis=1).astype(np.float32)
    found, exact = answers(changed, x), answers(model, x)
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.999
    # Only a scale of its own meets the channel with the smallest weights.
    smallest = np.corrcoef(found[:, 0], exact[:, 0])[0, 1]
    assert (smallest > 0.95) == per_channel


def test_a_table_in_eight_bits_alone_is_close_and_smaller(
    graph: onnx.ModelProto, context: StepContext, data: Data
) -> None:
    changed = step("int8_dynamic", embeddings=True).apply(graph, context)
    lookup = next(node for node in changed.graph.node if node.op_type == "Gather")
    kinds_of = {tensor.name: tensor.data_type for tensor in changed.graph.initializer}
    assert kinds_of[lookup.input[0]] in (TensorProto.INT8, TensorProto.UINT8)
    tensors = data.rows("validation").tensors
    logits = [run(open_session(m.SerializeToString()), tensors, 600) for m in (graph, changed)]
    assert (logits[0].argmax(1) == logits[1].argmax(1)).mean() > 0.97
    plain = step("int8_dynamic").apply(graph, context)
    assert floats(plain) - floats(changed)


@pytest.mark.parametrize(("inputs", "told"), [(5, True), (64, False)])
def test_weights_that_take_more_bytes_in_four_bits_are_told(inputs: int, told: bool, made: Any) -> None:
    context = made(inputs)
    step("int4_weights").apply(chain(inputs, 64, 32), context)
    found = [warning for warning in context.warnings if "would be no larger in float" in warning]
    assert len(found) == told
    assert all("layer0 (1280 bytes before, 1344 after)" in w and "layer1" not in w for w in found)


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("params", [{}, {"symmetric": True}, {"method": "hqq"}, {"embeddings": True}])
def test_the_bytes_in_four_bits_are_counted_as_the_file_has_them(
    params: dict[str, Any], block_size: int, made: Any
) -> None:
    four = step("int4_weights", block_size=block_size, **params)
    changed = four.apply(tied(40, 24), made(41))
    packed = [node for node in changed.graph.node if node.op_type in ("MatMulNBits", "GatherBlockQuantized")]
    sizes = {t.name: len(t.raw_data) or len(t.int32_data) for t in changed.graph.initializer}
    for node in packed:
        kind = "Gather" if node.op_type == "GatherBlockQuantized" else "MatMul"
        names = [name for place, name in enumerate(node.input) if name and place != (kind == "Gather")]
        weights = [name for name in names if name in sizes]
        assert sum(sizes[name] for name in weights) == four._bytes((40, 24), kind, 4)
    assert len(packed) == 1 + ("embeddings" in params)


def test_the_quantizer_gives_nobody_a_log_handler(made: Any) -> None:
    import sys

    sys.modules.pop("onnxruntime.quantization.matmul_nbits_quantizer", None)
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    step("int4_weights").apply(chain(8, 16, 4), made(8))
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)
