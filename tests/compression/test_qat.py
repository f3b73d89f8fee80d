"""Quantization-aware training, held against what ONNX Runtime makes of the network afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from compression.data import Data, Rows
from compression.errors import RecipeError, StepError
from compression.export import export, open_session, run
from compression.folding import fold_batch_norms
from compression.recipe import StepSpec
from compression.steps import STEPS, StepContext, build
from compression.steps.qat import (
    in_blocks,
    in_int8,
    quantize_activations,
    quantize_weights,
    traced,
    weighted,
)
from compression.training import predict_logits
from compression.workload import Workload

from .conftest import dense
from .small import image_context, images


class Residual(nn.Module):
    """Convolutions with batch norms, an addition, ReLU as modules and as functions, a mean, dropout, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(image)
        hidden = (hidden + self.inner(hidden)).relu()
        logits: torch.Tensor = self.head(self.drop(hidden.mean((2, 3))))
        return logits


def residual() -> Residual:
    """Untrained; its batch norms have seen some rows, and its answers are of some size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Residual().train()
        for _ in range(20):
            network(torch.randn(64, 3, 8, 8) * 2 + 1)
    return network.eval()


def with_every_split(context: StepContext) -> StepContext:
    """Images for calibration and validation too; as many as calibration needs."""
    rows = context.data.rows("train")
    context.data._rows |= {"calibration": rows, "validation": rows}
    return context


def unbalanced(network: nn.Module) -> nn.Module:
    """The same function with neurons of very different scales, as batch norms leave them when they are folded."""
    network = copy.deepcopy(network)
    first, second = network.get_submodule("layers.0"), network.get_submodule("layers.2")
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    factors = torch.logspace(-1.5, 1.5, len(first.weight))
    with torch.no_grad():
        first.weight.mul_(factors[:, None])
        first.bias.mul_(factors)
        second.weight.div_(factors)
    return network


def quantized(network: nn.Module, context: StepContext, step: str, **params: object) -> onnx.ModelProto:
    graph = export(network, context.data.rows("validation").take(slice(0, 16)).tensors).onnx
    changed: onnx.ModelProto = STEPS[step](**params).apply(graph, context)
    return changed


def answers(model: onnx.ModelProto, rows: Rows) -> np.ndarray:
    return run(open_session(model.SerializeToString()), rows.tensors, 1024)


def share_right(logits: np.ndarray, rows: Rows) -> float:
    return float((logits.argmax(1) == rows.labels).mean())


def rounded_accuracy(network: nn.Module, grid: Callable[[torch.Tensor], torch.Tensor], rows: Rows) -> float:
    """With the weights of linear layers rounded."""
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = grid(layer.weight.data)
    return share_right(predict_logits(network, rows.tensors), rows)


def grids(graph: torch.fx.GraphModule, kind: str) -> int:
    return sum(node.op == "call_module" and str(node.target).startswith(kind) for node in graph.graph.nodes)


@pytest.mark.parametrize("params", [{}, {"per_channel": False, "reduce_range": True}])
def test_what_is_rounded_in_training_and_how_is_what_static_int8_rounds(
    tiny: Workload, params: dict[str, bool]
) -> None:
    context = with_every_split(image_context(tiny))
    rows = context.data.rows("calibration")
    network = residual()
    network.drop.p = 0.0
    exact = predict_logits(network, rows.tensors)
    ours = copy.deepcopy(network)
    example = {"image": torch.from_numpy(rows.tensors["image"][:2])}
    fold_batch_norms(ours, example)
    graph = traced(ours, example)
    quantize_activations(graph)
    quantize_weights(graph, dict(weighted(graph.graph)), partial(in_int8, **params))
    graph.train()
    graph(image=torch.from_numpy(rows.tensors["image"]))  # measures the ranges
    rounded = predict_logits(graph, rows.tensors)
    made = quantized(network, context, "int8_static", rows=len(rows), **params)
    by_runtime = answers(made, rows)
    assert grids(graph, "weight_grid") == 3
    assert grids(graph, "activation_grid") == sum(
        node.op_type == "QuantizeLinear" for node in made.graph.node
    )
    level = np.ptp(by_runtime) / 255
    assert np.abs(rounded - by_runtime).mean() < 0.5 * level
    assert np.abs(exact - by_runtime).mean() > 0.5 * level


@pytest.mark.parametrize("symmetric", [False, True])
def test_four_bits_are_the_same_as_those_of_int4_weights(symmetric: bool) -> None:
    draw = np.random.default_rng(0)
    weight = draw.normal(size=(40, 6)).astype(np.float32)
    weight[:32, 0] = 0.0
    model = dense([torch.from_numpy(weight)])
    step = STEPS["int4_weights"](symmetric=symmetric, accuracy_level=0)
    made = step.apply(model, None)
    identity = {"x": np.eye(40, dtype=np.float32)}
    by_runtime = run(open_session(made.SerializeToString()), identity, 40)
    ours = in_blocks(torch.from_numpy(weight.T.copy()), symmetric=symmetric).numpy().T
    assert ours == pytest.approx(by_runtime, abs=1e-5)
    assert not np.allclose(ours, weight, atol=1e-2)


def test_training_with_the_rounding_beats_rounding_afterwards(
    network: nn.Module, context: StepContext, data: Data
) -> None:
    rows = data.rows("validation")
    odd = unbalanced(network)
    trained = STEPS["qat"](epochs=6, lr=1e-2, batch_size=64, per_channel=False).apply(odd, context)
    before, after = (
        share_right(answers(quantized(model, context, "int8_static", per_channel=False), rows), rows)
        for model in (odd, trained)
    )
    assert share_right(predict_logits(odd, rows.tensors), rows) > 0.92
    assert after > 0.9
    assert after > before + 0.1


def test_training_for_four_bits_beats_rounding_to_them_with_or_without_other_training(
    network: nn.Module, context: StepContext, data: Data
) -> None:
    rows = data.rows("validation")
    odd = unbalanced(network)
    params = {"epochs": 4, "lr": 1e-3, "batch_size": 64}
    trained = STEPS["qat"](bits=4, **params).apply(odd, context)
    other = STEPS["finetune"](**params).apply(odd, context)
    score = partial(rounded_accuracy, grid=in_blocks, rows=rows)
    assert score(trained) > max(score(odd), score(other)) + 0.05


def test_gradients_pass_the_rounding() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for grid in (in_int8, in_blocks):
        (gradient,) = torch.autograd.grad(grid(weight).sum(), weight)
        assert torch.equal(gradient, torch.ones(4, 8))


def test_int8_has_a_scale_for_each_channel_and_meets_zero() -> None:
    weight = torch.tensor([[0.0, 127.0, 1.2], [0.0, -1.27, 0.012], [0.0, 0.0, 0.0]])
    assert torch.allclose(in_int8(weight)[0], torch.tensor([0.0, 127.0, 1.0]))
    assert torch.allclose(in_int8(weight)[1], torch.tensor([0.0, -1.27, 0.01]))
    assert in_int8(weight, per_channel=False)[1].tolist() == [0.0, -1.0, 0.0]
    assert in_int8(torch.tensor([[64.0, 1.4]]), reduce_range=True).tolist() == [[64.0, 1.0]]


def test_the_result_is_a_float_network_with_batch_norms_folded(tiny: Workload) -> None:
    context = with_every_split(image_context(tiny))
    network = residual()
    trained = STEPS["qat"](epochs=1, batch_size=64).apply(network, context)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in trained.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert not trained.training
    assert {name for name, _ in trained.named_parameters()} == {
        f"{layer}.{kind}" for layer in ("stem.0", "inner.0", "head") for kind in ("weight", "bias")
    }
    assert len(trained.get_parameter("stem.0.weight").unique()) > 100


def test_zeros_of_pruning_stay(network: nn.Module, context: StepContext) -> None:
    sparse = STEPS["prune_magnitude"](amount=0.5).apply(network, context)
    trained = STEPS["qat"](epochs=1).apply(sparse, context)
    for name, weight in sparse.named_parameters():
        if weight.dim() > 1:
            assert torch.equal(trained.get_parameter(name) == 0, weight == 0)


def test_only_the_chosen_layers_are_rounded(tiny: Workload) -> None:
    context = image_context(tiny)
    graph = traced(residual(), {"image": torch.from_numpy(context.data.rows("train").tensors["image"][:2])})
    STEPS["qat"](targets="inner*")._put_grids(graph, context)  # type: ignore[attr-defined]
    assert (grids(graph, "weight_grid"), grids(graph, "activation_grid")) == (1, 2)


def test_a_pattern_that_matches_nothing_is_an_error(network: nn.Module, context: StepContext) -> None:
    with pytest.raises(
        StepError, match=r"qat: targets 'conv.*' matches nothing; the network has layers\.0\.weight"
    ):
        STEPS["qat"](targets="conv*").apply(network, context)


def test_convolutions_are_not_for_four_bits_and_named(tiny: Workload) -> None:
    context = image_context(tiny)
    STEPS["qat"](bits=4, epochs=1).apply(images(), context)
    assert context.warnings == [
        "qat: 4 bits are for matrix products; trained in float: first.weight, second.weight"
    ]


def test_a_network_that_cannot_be_exported_is_an_error(context: StepContext) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, numbers: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.layer(numbers)
            return logits if logits.sum() > 0 else -logits

    with pytest.raises(StepError, match="qat: torch cannot export the network in training mode"):
        STEPS["qat"](epochs=1).apply(Branching(), context)


@pytest.mark.parametrize(
    "params",
    [{"bits": 4, "per_channel": False}, {"bits": 4, "reduce_range": True}, {"symmetric": True}, {"bits": 2}],
)
def test_options_that_do_not_go_together_are_refused(params: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="bits"):
        build(StepSpec(step="qat", params=params))


def test_a_quantizing_step_has_to_follow() -> None:
    then = STEPS["qat"].then
    assert then == {"grid"}
    assert all(then <= STEPS[name].makes for name in ("int8_static", "int8_dynamic", "int4_weights"))
