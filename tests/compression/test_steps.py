"""What each of the first steps promises of its own; what all promise is in test_step_contract.py."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from compression import training
from compression.data import Data
from compression.errors import RecipeError, StepError
from compression.recipe import StepSpec
from compression.steps import STEPS, StepContext, build
from compression.training import predict_logits
from compression.workload import Workload

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
    with pytest.raises(StepError, match="the network has no hidden linear or convolution layer"):
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


@pytest.mark.parametrize("updates", [1, 2, 3, 4])
def test_a_few_updates_move_the_weights_too(tiny: Workload, data: Data, updates: int) -> None:
    rows = data.rows("train").take(slice(0, 32 * updates))
    model = tiny.network()
    before = weights(model)
    training.fit(model, rows.tensors, rows.labels, epochs=1, lr=1e-2, batch_size=32)
    # AdamW moves a weight by about the learning rate.
    assert (weights(model) - before).abs().max() > 5e-3


def test_a_row_that_is_left_over_is_no_batch_of_its_own(data: Data) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
            self.seen: list[int] = []

        def forward(self, numbers: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
            self.seen.append(len(side))
            logits: torch.Tensor = self.layers(numbers)
            return logits

    model, rows = Normed(), data.rows("train").take(slice(0, 65))
    training.fit(model, rows.tensors, rows.labels, epochs=1, batch_size=32)
    assert model.seen == [32, 33]


@pytest.mark.parametrize("bfloat16", [False, True])
def test_large_networks_are_trained_alike_each_time_and_keep_their_zeros(
    tiny: Workload,
    data: Data,
    network: nn.Module,
    context: StepContext,
    monkeypatch: pytest.MonkeyPatch,
    bfloat16: bool,
) -> None:
    monkeypatch.setattr(training, "_LARGE", 0)
    monkeypatch.setattr(training, "has_bfloat16", lambda: True)
    monkeypatch.setattr(tiny, "bfloat16", bfloat16)
    pruned = STEPS["prune_magnitude"](amount=0.5).apply(network, context)
    first, second = (STEPS["finetune"](epochs=1, batch_size=64).apply(pruned, context) for _ in range(2))
    assert torch.equal(weights(first), weights(second))
    assert torch.equal(weights(first) == 0, weights(pruned) == 0)
    assert not torch.equal(weights(first), weights(pruned))


@pytest.mark.parametrize("able", [True, False])
def test_training_in_bfloat16_is_for_processors_that_have_it_and_leaves_float32(
    tiny: Workload, data: Data, monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    monkeypatch.setattr(training, "has_bfloat16", lambda: able)
    rows = data.rows("train")

    def trained(*, bfloat16: bool) -> nn.Module:
        with training.seeded(0):
            model = tiny.network()
        training.fit(model, rows.tensors, rows.labels, epochs=2, lr=1e-2, batch_size=64, bfloat16=bfloat16)
        return model

    low, exact = trained(bfloat16=True), trained(bfloat16=False)
    assert {parameter.dtype for parameter in low.parameters()} == {torch.float32}
    answers = [training.predict_logits(model, rows.tensors) for model in (low, exact)]
    assert np.array_equal(*answers) != able
    assert ((answers[0].argmax(1) == rows.labels).mean()) > 0.85
