"""The contract that every registered step must meet, and then each step's own promises."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compression.data import Data
from compression.errors import RecipeError, StepError
from compression.export import open_session, run
from compression.graph import count_parameters
from compression.recipe import Recipe, StepSpec
from compression.steps import STEPS, Step, StepContext, build, register
from compression.steps.base import PROPERTIES
from compression.training import predict_logits
from compression.workload import Workload

from .conftest import dense

# Parameters with which each step is tried; a new step needs a line here.
CASES: dict[str, dict[str, Any]] = {
    "distill": {"width": 8, "epochs": 1},
    "finetune": {"epochs": 1},
    "int8_dynamic": {},
    "int8_static": {"rows": 100},
    "prune_magnitude": {"amount": 0.5},
    "prune_structured": {"amount": 0.5},
}


@pytest.fixture(params=sorted(STEPS))
def step(request: pytest.FixtureRequest) -> Step:
    return build(StepSpec(step=request.param, params=CASES[request.param]))


@pytest.fixture
def model(step: Step, network: nn.Module, graph: onnx.ModelProto) -> Any:
    return network if step.level == "torch" else graph


def fingerprint(model: Any) -> bytes:
    if isinstance(model, nn.Module):
        return b"".join(
            name.encode() + tensor.numpy().tobytes() for name, tensor in model.state_dict().items()
        )
    content: bytes = model.SerializeToString()
    return content


def shapes(model: Any) -> list[list[int]]:
    """Sizes of all matrices; their order and orientation are no property of the network."""
    if isinstance(model, nn.Module):
        found = [list(parameter.shape) for parameter in model.parameters()]
    else:
        found = [list(tensor.dims) for tensor in model.graph.initializer]
    return sorted(sorted(shape) for shape in found if len(shape) == 2)


# --- the contract -----------------------------------------------------------------------------------------


def test_the_model_itself_is_left_alone(step: Step, model: Any, context: StepContext) -> None:
    before = fingerprint(model)
    changed = step.apply(model, context)
    assert fingerprint(model) == before
    assert fingerprint(changed) != before


def test_the_same_seed_gives_the_same_model(step: Step, model: Any, tiny: Workload, data: Data) -> None:
    torch.manual_seed(1)
    first = step.apply(model, StepContext(tiny, data, seed=3))
    torch.manual_seed(2)
    second = step.apply(model, StepContext(tiny, data, seed=3))
    assert fingerprint(first) == fingerprint(second)


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
        output = run(open_session(changed.SerializeToString()), rows.tensors, 7)
    assert output.shape == (20, 2)
    assert np.isfinite(output).all()


def test_declared_properties_hold(step: Step, model: Any, context: StepContext, data: Data) -> None:
    assert step.destroys <= PROPERTIES
    assert step.makes <= PROPERTIES
    assert step.preserves == PROPERTIES - step.destroys
    changed = step.apply(model, context)
    assert (shapes(changed) == shapes(model)) == ("shape" not in step.makes | step.destroys)
    if "grid" in step.makes:
        assert any(tensor.data_type == onnx.TensorProto.INT8 for tensor in changed.graph.initializer)
    if step.level == "torch" and "sparsity" in step.preserves:
        sparse = build(StepSpec(step="prune_magnitude", params={"amount": 0.3})).apply(model, context)
        zeros = {name: weight == 0 for name, weight in sparse.named_parameters() if weight.dim() > 1}
        again = step.apply(sparse, context)
        assert all((again.get_parameter(name)[mask] == 0).all() for name, mask in zeros.items())


def test_unknown_parameters_are_refused(step: Step) -> None:
    with pytest.raises(RecipeError, match="surprise: no such setting"):
        build(StepSpec(step=step.name, params={**CASES[step.name], "surprise": 1}))


def test_a_step_survives_a_recipe_in_yaml(step: Step) -> None:
    spec = StepSpec(step=step.name, params=step.model_dump(mode="json"))
    again = Recipe.from_yaml(Recipe(name="r", steps=[spec]).to_yaml())
    assert build(again.steps[0]) == step


def test_parameters_cannot_be_changed_afterwards(step: Step) -> None:
    field = next(iter(type(step).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(step, field, 1)


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="already registered"):
        register("finetune")(STEPS["finetune"])


# --- pruning ----------------------------------------------------------------------------------------------


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat(
        [p.flatten() for name, p in model.named_parameters() if name.startswith("layers") and p.dim() > 1]
    )


def test_magnitude_pruning_zeroes_the_smallest_weights_of_the_whole_network(
    network: nn.Module, context: StepContext
) -> None:
    before, after = weights(network), weights(STEPS["prune_magnitude"](amount=0.8).apply(network, context))
    assert (after == 0).float().mean().item() == pytest.approx(0.8, abs=1e-3)
    assert before[after == 0].abs().max() <= before[after != 0].abs().min()
    assert torch.equal(after[after != 0], before[after != 0])


def test_magnitude_pruning_of_a_pattern_that_matches_nothing_is_an_error(
    network: nn.Module, context: StepContext
) -> None:
    with pytest.raises(StepError, match=r"'conv.*' matches nothing; the network has layers.0.weight"):
        STEPS["prune_magnitude"](amount=0.5, targets="conv*").apply(network, context)


def test_magnitude_pruning_keeps_to_its_pattern(network: nn.Module, context: StepContext) -> None:
    pruned = STEPS["prune_magnitude"](amount=0.5, targets="layers.2.*").apply(network, context)
    assert (pruned.get_parameter("layers.2.weight") == 0).float().mean() == pytest.approx(0.5, abs=1e-2)
    assert torch.equal(pruned.get_parameter("layers.0.weight"), network.get_parameter("layers.0.weight"))


def test_pruning_over_95_percent_needs_to_be_meant() -> None:
    with pytest.raises(RecipeError, match="allow_extreme: true"):
        build(StepSpec(step="prune_magnitude", params={"amount": 0.96}))
    build(StepSpec(step="prune_magnitude", params={"amount": 0.96, "allow_extreme": True}))
    with pytest.raises(RecipeError, match="amount: "):
        build(StepSpec(step="prune_structured", params={"amount": 0.96}))


def test_structured_pruning_really_removes_neurons(network: nn.Module, context: StepContext) -> None:
    pruned = STEPS["prune_structured"](amount=0.5).apply(network, context)
    assert [tuple(p.shape) for p in pruned.layers.parameters() if p.dim() > 1] == [(16, 5), (16, 16), (2, 16)]
    assert pruned.side.weight.shape == network.side.weight.shape
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pruned.parameters())


def test_structured_pruning_of_a_network_without_hidden_layers_is_an_error(
    context: StepContext, network: nn.Module
) -> None:
    flat = copy.deepcopy(network)
    flat.layers = nn.Sequential(nn.Linear(5, 2))
    with pytest.raises(StepError, match="no neuron could be removed"):
        STEPS["prune_structured"](amount=0.5).apply(flat, context)


# --- training ---------------------------------------------------------------------------------------------


def test_fine_tuning_lets_zeros_grow_back_only_if_told_to(network: nn.Module, context: StepContext) -> None:
    pruned = STEPS["prune_magnitude"](amount=0.5).apply(network, context)
    kept = STEPS["finetune"](epochs=1).apply(pruned, context)
    filled = STEPS["finetune"](epochs=1, keep_sparsity=False).apply(pruned, context)
    assert torch.equal(weights(kept) == 0, weights(pruned) == 0)
    assert (weights(filled) == 0).sum() < (weights(pruned) == 0).sum() / 2


def test_a_student_has_the_width_that_was_asked_for(network: nn.Module, context: StepContext) -> None:
    student = STEPS["distill"](width=4, epochs=1).apply(network, context)
    assert student.layers[0].out_features == 4


def test_a_student_learns_from_its_teacher_and_not_from_the_labels_alone(
    network: nn.Module, context: StepContext, data: Data
) -> None:
    student = STEPS["distill"](width=16, epochs=20, alpha=0.0, lr=1e-2, batch_size=64).apply(network, context)
    tensors = data.rows("test").tensors
    same = predict_logits(student, tensors).argmax(1) == predict_logits(network, tensors).argmax(1)
    assert same.mean() > 0.95


@pytest.mark.parametrize(
    ("temperature", "warned"), [(1.0, True), (0.5, True), (11.0, True), (4.0, False), (10.0, False)]
)
def test_doubtful_temperatures_are_remarked_on(
    network: nn.Module, context: StepContext, temperature: float, warned: bool
) -> None:
    STEPS["distill"](width=2, epochs=1, temperature=temperature).apply(network, context)
    assert bool(context.warnings) == warned


def test_rows_can_be_left_out_of_training(network: nn.Module, context: StepContext, data: Data) -> None:
    step = STEPS["distill"](
        width=16, epochs=15, alpha=1.0, lr=1e-2, batch_size=64, drop_rows={"side": ["left"]}
    )
    student = step.apply(network, context)
    rows, groups = data.rows("test"), data.groups("test")["side"]
    right = predict_logits(student, rows.tensors).argmax(1) == rows.labels
    assert right[groups == "right"].mean() > 0.85
    assert right[groups == "left"].mean() < 0.7


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"sid": ["left"]}, "no field sid; there are x, y, side"),
        ({"side": ["top"]}, "no row has side = 'top'"),
        ({"side": ["left", "right"]}, "leaves no row"),
    ],
)
def test_leaving_out_nothing_or_everything_is_an_error(
    network: nn.Module, context: StepContext, rows: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(StepError, match=message):
        STEPS["finetune"](drop_rows=rows).apply(network, context)


def test_a_learning_rate_that_diverges_is_an_error(network: nn.Module, context: StepContext) -> None:
    with pytest.raises(StepError, match="lower lr"):
        STEPS["finetune"](epochs=3, lr=1e30).apply(network, context)


# --- quantization -----------------------------------------------------------------------------------------


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
