"""What every registered step promises. A new step joins with a line in CASES."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from pydantic import ValidationError
from torch import nn

from compression import coding
from compression.data import Data
from compression.errors import RecipeError
from compression.export import export, open_session, run
from compression.graph import count_parameters
from compression.recipe import Recipe, StepSpec
from compression.steps import STEPS, Step, StepContext, build, register
from compression.steps.base import PROPERTIES
from compression.training import predict_logits
from compression.workload import Workload
from tests.compression.small import attending

CASES: dict[str, dict[str, Any]] = {
    "cluster_weights": {"clusters": 4, "epochs": 1},
    "distill": {"width": 8, "epochs": 1},
    "entropy_code": {},
    "finetune": {"epochs": 1},
    "int4_weights": {},
    "int8_dynamic": {},
    "int8_static": {"rows": 100},
    "lottery_ticket": {"amount": 0.5, "rounds": 1, "epochs": 1},
    "low_rank": {"ratio": 0.5},
    "mixed_precision": {"float_layers": 1, "keep_ends": False, "params": {"rows": 100}},
    "prune_2_4": {},
    "prune_by_sensitivity": {"max_drop": 0.02},
    "prune_heads": {"amount": 0.5},
    "prune_iterative": {"amount": 0.5, "rounds": 2, "epochs": 1},
    "prune_magnitude": {"amount": 0.5},
    "prune_structured": {"amount": 0.5},
    "prune_structured_iterative": {"amount": 0.5, "rounds": 2, "epochs": 1},
    "prune_threshold": {"quality": 1.0},
    "qat": {"epochs": 1},
}
"""Name of a step -> parameters with which it is tried on the tiny network."""


@pytest.fixture(params=sorted(CASES.keys() & STEPS.keys()))
def step(request: pytest.FixtureRequest) -> Step:
    return build(StepSpec(step=request.param, params=CASES[request.param]))


@pytest.fixture
def network(step: Step, network: nn.Module) -> nn.Module:
    """The tiny network, or one with attention for the step that needs some."""
    return attending() if step.name == "prune_heads" else network


@pytest.fixture
def model(step: Step, network: nn.Module, graph: onnx.ModelProto) -> Any:
    """The network in the form that the step takes."""
    return {"torch": network, "onnx": graph, "file": graph.SerializeToString()}[step.level]


@pytest.fixture
def sparse(network: nn.Module, context: StepContext) -> nn.Module:
    return build(StepSpec(step="prune_magnitude", params={"amount": 0.3})).apply(network, context)


@pytest.fixture
def shared(network: nn.Module, context: StepContext) -> nn.Module:
    spec = StepSpec(step="cluster_weights", params={"clusters": 8, "epochs": 0})
    return build(spec).apply(network, context)


@pytest.fixture
def sparse_graph(step: Step, sparse: nn.Module, data: Data) -> onnx.ModelProto | None:
    if step.level != "onnx":
        return None  # an export takes seconds
    return export(sparse, data.rows("test").take(slice(0, 8)).tensors).onnx


def fingerprint(model: Any) -> bytes:
    if isinstance(model, nn.Module):
        return b"".join(
            name.encode() + tensor.numpy().tobytes() for name, tensor in model.state_dict().items()
        )
    content: bytes = model if isinstance(model, bytes) else model.SerializeToString()
    return content


def shapes(model: Any) -> list[list[int]]:
    """Sizes of all matrices; their order and orientation are no property of the network."""
    if isinstance(model, nn.Module):
        found = [list(parameter.shape) for parameter in model.parameters()]
    elif isinstance(model, bytes):
        return shapes(onnx.load_model_from_string(coding.decode(model) if coded(model) else model))
    else:
        found = [list(tensor.dims) for tensor in model.graph.initializer]
        in_blocks = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        packed = {name for node in in_blocks for name in node.input[1:]}
        found = [list(tensor.dims) for tensor in model.graph.initializer if tensor.name not in packed]
        for node in in_blocks:
            options = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
            found.append([options["K"], options["N"]])
    return sorted(sorted(shape) for shape in found if len(shape) == 2)


def coded(content: bytes) -> bool:
    return content.startswith(coding.MAGIC)


def on_a_grid(model: onnx.ModelProto) -> bool:
    small = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4)
    return any(tensor.data_type in small and len(tensor.dims) > 1 for tensor in model.graph.initializer)


def test_every_step_is_tried() -> None:
    assert sorted(STEPS) == sorted(CASES), "a step needs a line in CASES"


def test_the_model_itself_is_left_alone(step: Step, model: Any, context: StepContext) -> None:
    before = fingerprint(model)
    changed = step.apply(model, context)
    assert fingerprint(model) == before
    assert fingerprint(changed) != before


def test_the_same_seed_gives_the_same_bytes(step: Step, model: Any, tiny: Workload, data: Data) -> None:
    contexts = [StepContext(tiny, data, seed=3) for _ in range(2)]
    torch.manual_seed(1)
    first = step.apply(model, contexts[0])
    torch.manual_seed(2)
    second = step.apply(model, contexts[1])
    assert fingerprint(first) == fingerprint(second)
    assert contexts[0].extra == contexts[1].extra


def test_the_callers_random_state_is_left_alone(step: Step, model: Any, context: StepContext) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    step.apply(model, context)
    assert torch.equal(torch.rand(3), expected)


def test_the_result_still_answers(step: Step, model: Any, context: StepContext, data: Data) -> None:
    rows = data.rows("test").take(slice(0, 20))
    changed = step.apply(model, context)
    if step.level == "torch":
        output = predict_logits(changed, rows.tensors)
    else:
        content = coding.decode(changed) if step.level == "file" else changed.SerializeToString()
        output = run(open_session(content), rows.tensors, 7)
    assert output.shape == (20, 2)
    assert np.isfinite(output).all()


def test_what_it_says_it_makes_and_destroys_is_true(
    step: Step, model: Any, sparse: nn.Module, sparse_graph: onnx.ModelProto | None, context: StepContext
) -> None:
    assert step.destroys <= PROPERTIES
    assert step.makes <= PROPERTIES
    assert step.preserves == PROPERTIES - step.destroys
    changed = step.apply(model, context)
    if "shape" in step.makes or "shape" in step.preserves:
        assert (shapes(changed) == shapes(model)) == ("shape" not in step.makes)
    if step.level == "onnx":
        assert on_a_grid(changed) == ("grid" in step.makes) == ("float" in step.destroys)
    if "sparsity" in step.makes and step.level == "torch":
        assert zeros(changed) > zeros(model)
    if "sparsity" in step.preserves and step.level == "torch":
        masks = {name: weight == 0 for name, weight in sparse.named_parameters() if weight.dim() > 1}
        again = step.apply(sparse, context)
        assert all((again.get_parameter(name)[mask] == 0).all() for name, mask in masks.items())
    if "sparsity" in step.preserves and sparse_graph is not None:
        counts = [count_parameters(graph) for graph in (sparse_graph, step.apply(sparse_graph, context))]
        assert counts[0].total == counts[1].total
        assert counts[1].nonzero <= counts[0].nonzero < 0.8 * counts[0].total


def test_few_different_weights_are_made_and_kept_as_said(
    step: Step, model: Any, shared: nn.Module, context: StepContext
) -> None:
    if step.level != "torch":
        return  # quantization puts weights on a grid, and files keep their bytes
    if "codebook" in step.makes:
        assert sum(different(step.apply(model, context)).values()) < sum(different(model).values()) / 2
    if "codebook" in step.preserves:
        before, after = different(shared), different(step.apply(shared, context))
        assert before.keys() == after.keys()
        assert all(after[name] <= before[name] for name in before)


def different(network: nn.Module) -> dict[str, int]:
    """How many different weights other than zero each layer has."""
    return {
        name: len(weight[weight != 0].unique())
        for name, weight in network.named_parameters()
        if weight.dim() > 1
    }


def zeros(network: nn.Module) -> int:
    return sum(int((weight == 0).sum()) for weight in network.parameters() if weight.dim() > 1)


def test_unknown_parameters_are_refused(step: Step) -> None:
    with pytest.raises(RecipeError, match="surprise: no such setting"):
        build(StepSpec(step=step.name, params={**CASES[step.name], "surprise": 1}))


def test_parameters_survive_a_recipe_in_yaml(step: Step) -> None:
    spec = StepSpec(step=step.name, params=step.model_dump(mode="json"))
    again = Recipe.from_yaml(Recipe(name="r", steps=[spec]).to_yaml())
    assert build(again.steps[0]) == step


def test_parameters_cannot_be_changed_afterwards(step: Step) -> None:
    field = next(iter(type(step).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(step, field, 1)


def test_the_step_and_each_parameter_are_explained(step: Step) -> None:
    assert type(step).__doc__
    told = "\n".join(cls.__doc__ or "" for cls in type(step).__mro__ if issubclass(cls, Step))
    assert [field for field in type(step).model_fields if not re.search(rf"\b{field}\b", told)] == []


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="already registered"):
        register("finetune")(STEPS["finetune"])
