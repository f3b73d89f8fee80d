from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from compression.compress import compress
from compression.data import Data
from compression.errors import RecipeError, StepError
from compression.recipe import Recipe, StepSpec
from compression.steps import StepContext, build
from compression.variant import Variant
from compression.workload import Workload

LAYERS = ["node_linear", "node_linear_1", "node_linear_2"]


def step(**params: Any) -> Any:
    params.setdefault("params", {"rows": 100} if params.get("step", "int8_static") == "int8_static" else {})
    return build(StepSpec(step="mixed_precision", params=params))


def report(context: StepContext) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(context.extra["sensitivity.json"])
    return found


def float_layers(model: onnx.ModelProto) -> list[str]:
    """Names of the layers whose weights are in float."""
    weights = {
        t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) > 1
    }
    dense = [node for node in model.graph.node if node.op_type in ("Gemm", "MatMul")]
    return [node.name for node in dense if node.input[1] in weights]


@pytest.fixture(scope="module")
def fragile(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The tiny network, answering as before, with one of the last layer's inputs a thousand times too large."""
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, factor, axis in (
        ("layers.2.weight", 1e3, 0),
        ("layers.2.bias", 1e3, 0),
        ("layers.4.weight", 1e-3, 1),
    ):
        array = numpy_helper.to_array(tensors[name]).copy()
        np.moveaxis(array, axis, 0)[3] *= factor
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))
    return model


def test_the_layer_that_suffers_stays_in_float(fragile: onnx.ModelProto, context: StepContext) -> None:
    for by in ("one", "all_but_one"):
        changed = step(step="int8_dynamic", float_layers=1, keep_ends=False, by=by).apply(fragile, context)
        layers = report(context)["layers"]
        assert layers[0]["layer"] == "node_linear_2"
        assert layers[0]["drop"] > 0.02
        assert layers[0]["change"] > 5 * layers[1]["change"]
        assert float_layers(changed) == ["node_linear_2"]


def test_as_few_layers_as_a_drop_allows_stay_in_float(fragile: onnx.ModelProto, context: StepContext) -> None:
    changed = step(step="int8_dynamic", max_drop=0.01, keep_ends=False).apply(fragile, context)
    found = report(context)
    assert float_layers(changed) == ["node_linear_2"] == found["path"][found["chosen"]]["float_layers"]
    assert found["path"][0]["drop"] > 0.01 >= found["path"][1]["drop"]
    everything = step(step="int8_dynamic", max_drop=0.9, keep_ends=False).apply(fragile, context)
    assert float_layers(everything) == []


def test_a_drop_that_no_choice_keeps_to_is_an_error(fragile: onnx.ModelProto, context: StepContext) -> None:
    only = {"nodes_to_exclude": ["node_linear", "node_linear_1"]}
    with pytest.raises(
        StepError, match=r"loses at most 0.001 of quality .*the least is 0\.\d+: raise max_drop"
    ):
        step(step="int8_dynamic", max_drop=0.001, keep_ends=False, params=only).apply(fragile, context)


def test_the_ends_stay_in_float_unless_told_otherwise(graph: onnx.ModelProto, context: StepContext) -> None:
    assert float_layers(step(max_drop=0.5).apply(graph, context)) == ["node_linear", "node_linear_2"]
    assert report(context)["ends_in_float"] == ["node_linear", "node_linear_2"]


@pytest.mark.parametrize("name", ["int8_static", "int8_dynamic", "int4_weights"])
def test_every_quantizing_step_can_be_mixed(name: str, graph: onnx.ModelProto, context: StepContext) -> None:
    changed = step(step=name, float_layers=1, keep_ends=False).apply(graph, context)
    found = report(context)
    assert float_layers(changed) == [found["layers"][0]["layer"]]
    assert sorted(entry["layer"] for entry in found["layers"]) == LAYERS
    # In everything but the calibration of activations it is the step itself.
    assert (context.calibration_sha256 is not None) == (name == "int8_static")


def test_the_report_has_the_front_of_quality_against_bytes(
    fragile: onnx.ModelProto, context: StepContext
) -> None:
    changed = step(step="int8_dynamic", float_layers=2, keep_ends=False).apply(fragile, context)
    found = report(context)
    about = (found["split"], found["rows"], found["metric"], found["step"])
    assert about == ("validation", 600, "accuracy", "int8_dynamic")
    path = found["path"]
    assert [len(point["float_layers"]) for point in path] == [0, 1, 2]
    assert path[2]["size_bytes"] == len(changed.SerializeToString())
    for point in path:
        assert point["drop"] == pytest.approx(found["float_quality"] - point["quality"])
        better = [
            other
            for other in path
            if other["size_bytes"] <= point["size_bytes"] and other["quality"] > point["quality"]
        ]
        assert not (point["front"] and better)
    assert any(point["front"] for point in path)
    assert sum(entry["weights"] for entry in found["layers"]) == 5 * 32 + 32 * 32 + 32 * 2


def test_a_gain_counts_as_no_drop_so_that_chance_orders_nothing() -> None:
    class Trial:
        """Quality and movement of the outputs with one layer quantized."""

        float_quality = 0.9

        def measured(self, names: list[str]) -> tuple[float, float]:
            return {"a": (0.93, 0.4), "b": (0.9, 0.2), "c": (0.88, 0.1), "d": (0.91, 0.3)}[names[0]]

    names = ["a", "b", "c", "d"]
    order = step(max_drop=0.1)._sensitivities(Trial(), names, dict.fromkeys(names, 1))
    # `c` alone loses anything; the others go by how far the outputs move.
    assert [item.layer for item in order] == ["c", "a", "d", "b"]
    assert order[1].drop == pytest.approx(-0.03)


def test_the_test_split_has_no_say(graph: onnx.ModelProto, tiny: Workload, data: Data) -> None:
    class Guarded(Data):
        def rows(self, name: Any) -> Any:
            assert name in ("validation", "calibration")
            return data.rows(name)

    step(max_drop=0.1, keep_ends=False).apply(graph, StepContext(tiny, Guarded(tiny)))


def test_progress_rises_to_its_end(graph: onnx.ModelProto, tiny: Workload, data: Data) -> None:
    said: list[tuple[str, float]] = []
    context = StepContext(tiny, data, progress=lambda what, done: said.append((what, done)))
    step(float_layers=0, keep_ends=False).apply(graph, context)
    shares = [done for what, done in said if what == "mixed_precision"]
    assert len(shares) == 6
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert 0.7 < shares[-1] < 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "give either max_drop or float_layers"),
        ({"max_drop": 0.1, "float_layers": 1}, "give either max_drop or float_layers"),
        ({"max_drop": 0.1, "step": "finetune"}, "step finetune does not quantize layers"),
        ({"max_drop": 0.1, "step": "int9"}, "no step int9"),
        ({"max_drop": 0.1, "params": {"row": 1}}, "step int8_static: row: no such setting"),
        (
            {"max_drop": 0.1, "params": {"keep_ends": True}},
            "keep_ends is a parameter of mixed_precision itself",
        ),
    ],
)
def test_parameters_that_cannot_work_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"step mixed_precision: {message}"):
        build(StepSpec(step="mixed_precision", params=params))


@pytest.mark.parametrize("params", [{"float_layers": 3, "keep_ends": False}, {"float_layers": 1}])
def test_leaving_nothing_to_quantize_is_an_error(
    params: dict[str, Any], graph: onnx.ModelProto, context: StepContext
) -> None:
    with pytest.raises(StepError, match="nothing is left: lower float_layers"):
        step(**params).apply(graph, context)


def test_the_report_is_kept_with_the_variant(tiny: Workload, full: Variant) -> None:
    spec = StepSpec(step="mixed_precision", params={"float_layers": 1, "keep_ends": False})
    variant = compress(tiny, [Recipe(name="mixed", steps=[spec])])[1]
    assert len(json.loads(variant.asset("sensitivity.json").read_text())["layers"]) == 3
