from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from compression.errors import RecipeError, StepError
from compression.recipe import StepSpec
from compression.steps import STEPS, StepContext, build
from compression.workload import Workload

from .small import image_context, images


def zeros(weight: torch.Tensor) -> float:
    return (weight == 0).float().mean().item()


def dense(network: nn.Module) -> list[torch.Tensor]:
    return [network.get_parameter(f"layers.{place}.weight").detach() for place in (0, 2, 4)]


def all_zeros(network: nn.Module) -> float:
    return zeros(torch.cat([weight.flatten() for weight in dense(network)]))


def test_each_layer_has_a_threshold_of_its_own(network: nn.Module, context: StepContext) -> None:
    pruned = STEPS["prune_threshold"](quality=0.7).apply(network, context)
    for before, after in zip(dense(network), dense(pruned), strict=True):
        small = before.abs() < 0.7 * before.std(correction=0)
        assert torch.equal(after == 0, small)
        assert torch.equal(after[~small], before[~small])


def test_a_threshold_that_leaves_nothing_must_be_meant(network: nn.Module, context: StepContext) -> None:
    with pytest.raises(StepError, match=r"quality 9 zeroes .* set allow_extreme: true"):
        STEPS["prune_threshold"](quality=9).apply(network, context)
    pruned = STEPS["prune_threshold"](quality=9, allow_extreme=True).apply(network, context)
    assert all_zeros(pruned) > 0.95


def test_a_threshold_below_every_weight_is_an_error(network: nn.Module, context: StepContext) -> None:
    with pytest.raises(StepError, match="no weight is below 1e-09 standard deviations: raise quality"):
        STEPS["prune_threshold"](quality=1e-9).apply(network, context)


@pytest.mark.parametrize(
    ("step", "params"),
    [
        ("prune_threshold", {"quality": 1.0}),
        ("prune_iterative", {"amount": 0.5}),
        ("prune_2_4", {}),
        ("lottery_ticket", {"amount": 0.5}),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(
    network: nn.Module, context: StepContext, step: str, params: dict[str, float]
) -> None:
    with pytest.raises(
        StepError, match=rf"{step}: targets 'conv.*' matches nothing; the network has layers.0.weight"
    ):
        STEPS[step](targets="conv*", **params).apply(network, context)


def test_the_cubic_schedule_prunes_fast_and_then_slowly() -> None:
    step = STEPS["prune_iterative"](amount=0.8, rounds=4)
    assert step.schedule() == pytest.approx([0.4625, 0.7, 0.7875, 0.8])


def test_shares_of_each_round_can_be_given() -> None:
    assert STEPS["prune_iterative"](amounts=[0.2, 0.4]).schedule() == (0.2, 0.4)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "give either amounts"),
        ({"amount": 0.5, "amounts": [0.5]}, "give either amounts"),
        ({"amounts": [0.4, 0.2]}, "must rise"),
        ({"amounts": [0.0, 0.2]}, "must rise"),
        ({"amounts": [0.5, 1.0]}, "must rise"),
        ({"amount": 0.96}, "allow_extreme: true"),
        ({"amounts": []}, "amounts: "),
    ],
)
@pytest.mark.parametrize("step", ["prune_iterative", "prune_structured_iterative"])
def test_a_schedule_that_makes_no_sense_is_refused(
    step: str, params: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        build(StepSpec(step=step, params=params))


def test_rounds_end_at_the_last_share_and_train_what_is_left(
    network: nn.Module, context: StepContext
) -> None:
    step = STEPS["prune_iterative"](amounts=[0.3, 0.6], epochs=1, batch_size=64)
    pruned = step.apply(network, context)
    assert all_zeros(pruned) == pytest.approx(0.6, abs=1e-3)
    for before, after in zip(dense(network), dense(pruned), strict=True):
        assert not torch.equal(after[after != 0], before[after != 0])


def test_no_zero_of_pruning_is_negative(network: nn.Module, context: StepContext) -> None:
    pruned = STEPS["prune_iterative"](amount=0.5, rounds=2, epochs=1).apply(network, context)
    for weight in dense(pruned):
        assert not torch.signbit(weight[weight == 0]).any()


def test_rounds_report_their_progress_as_one_piece_of_work(
    network: nn.Module, tiny: Workload, context: StepContext
) -> None:
    said: list[tuple[str, float]] = []
    context.progress = lambda what, done: said.append((what, done))
    STEPS["prune_iterative"](amounts=[0.3, 0.6], epochs=1).apply(network, context)
    assert said[0][0] == "round 1 of 2, epoch 1 of 1"
    assert [done for _, done in said] == sorted(done for _, done in said)
    assert said[-1] == ("round 2 of 2, trained", 1.0)


def test_neurons_can_be_removed_in_rounds(network: nn.Module, context: StepContext) -> None:
    step = STEPS["prune_structured_iterative"](amounts=[0.25, 0.5], epochs=1)
    assert [tuple(weight.shape) for weight in dense(step.apply(network, context))] == [
        (16, 5),
        (16, 16),
        (2, 16),
    ]


def test_two_of_every_four_inputs_are_zero_and_the_larger_two_stay(
    network: nn.Module, context: StepContext
) -> None:
    pruned = STEPS["prune_2_4"](targets="layers.[24].*").apply(network, context)
    for before, after in list(zip(dense(network), dense(pruned), strict=True))[1:]:
        fours, old = after.reshape(-1, 4), before.reshape(-1, 4).abs()
        assert ((fours == 0).sum(1) == 2).all()
        assert (old.masked_fill(fours == 0, math.inf).amin(1) >= old.masked_fill(fours != 0, 0).amax(1)).all()


def test_the_2_4_pattern_survives_fine_tuning(network: nn.Module, context: StepContext) -> None:
    pruned = STEPS["finetune"](epochs=1).apply(STEPS["prune_2_4"]().apply(network, context), context)
    assert ((dense(pruned)[1].reshape(-1, 4) == 0).sum(1) == 2).all()


def test_the_2_4_pattern_never_claims_to_be_faster(network: nn.Module, context: StepContext) -> None:
    STEPS["prune_2_4"]().apply(network, context)
    assert "no CPU runs the pattern faster" in context.warnings[-1]


def test_layers_that_do_not_fit_2_4_are_named(network: nn.Module, context: StepContext) -> None:
    pruned = STEPS["prune_2_4"]().apply(network, context)
    assert context.warnings[0].endswith("left dense: layers.0.weight")
    assert zeros(dense(pruned)[0]) == 0
    with pytest.raises(StepError, match=r"no layer has a multiple of four inputs: layers\.0\.weight"):
        STEPS["prune_2_4"](targets="layers.0.*").apply(network, context)


def test_the_2_4_pattern_of_a_convolution_runs_over_its_channels(tiny: Workload) -> None:
    pruned = STEPS["prune_2_4"](targets="second*").apply(images(), image_context(tiny))
    weight = pruned.get_parameter("second.weight").detach()
    assert ((weight.movedim(1, -1).reshape(-1, 4) == 0).sum(1) == 2).all()


@pytest.mark.parametrize(("amount", "rounds"), [(0.5, 4), (0.5, 20), (0.3, 10)])
def test_pruning_neurons_in_many_rounds_removes_no_more_than_once_would(
    network: nn.Module, context: StepContext, amount: float, rounds: int
) -> None:
    once = STEPS["prune_structured"](amount=amount).apply(network, context)
    often = STEPS["prune_structured_iterative"](amount=amount, rounds=rounds, epochs=1).apply(
        network, context
    )
    assert [tuple(weight.shape) for weight in dense(often)] == [tuple(weight.shape) for weight in dense(once)]


def test_neurons_may_not_be_pruned_past_what_the_pruner_takes() -> None:
    with pytest.raises(RecipeError, match=r"no more than 0\.95"):
        build(StepSpec(step="prune_structured_iterative", params={"amount": 0.99, "allow_extreme": True}))


class Blocks(nn.Module):
    """Two feed-forward blocks around which the input is added, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Conv2d(3, 8, 1)
        self.inner = nn.ModuleList(nn.Conv2d(8, 32, 1) for _ in range(2))
        self.outer = nn.ModuleList(nn.Conv2d(32, 8, 1) for _ in range(2))
        self.last = nn.Linear(8, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = self.into(image)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            hidden = hidden + outer(inner(hidden).relu())
        answer: torch.Tensor = self.last(hidden.mean((2, 3)))
        return answer


def sizes(network: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name.removesuffix(".weight"): (weight.shape[0], weight.shape[1])
        for name, weight in network.named_parameters()
        if weight.dim() > 1
    }


@pytest.mark.parametrize(
    ("step", "params"),
    [
        ("prune_structured", {"amount": 0.5}),
        ("prune_structured_iterative", {"amounts": [0.25, 0.5], "epochs": 1}),
    ],
)
def test_neurons_go_from_the_layers_asked_for_alone(
    tiny: Workload, step: str, params: dict[str, object]
) -> None:
    context, blocks = image_context(tiny), Blocks()
    before = sizes(blocks)
    after = sizes(STEPS[step](targets="inner.*", **params).apply(blocks, context))
    assert after == before | {f"inner.{n}": (16, 8) for n in range(2)} | {
        f"outer.{n}": (8, 16) for n in range(2)
    }
    one = sizes(STEPS[step](targets="inner.1", **params).apply(blocks, context))
    assert one == before | {"inner.1": (16, 8), "outer.1": (8, 16)}
    assert sizes(blocks) == before


@pytest.mark.parametrize(
    ("step", "params"),
    [("prune_structured", {"amount": 0.5}), ("prune_structured_iterative", {"amount": 0.5})],
)
@pytest.mark.parametrize("targets", ["*.middle", "last"])
def test_a_pattern_of_no_hidden_layer_is_an_error(
    tiny: Workload, step: str, params: dict[str, float], targets: str
) -> None:
    with pytest.raises(
        StepError,
        match=rf"prune_structured: targets '{targets.replace('*', '.')}' matches nothing; .* has into, inner",
    ):
        STEPS[step](targets=targets, **params).apply(Blocks(), image_context(tiny))


def test_layers_that_are_added_to_one_that_stays_lose_nothing(tiny: Workload) -> None:
    with pytest.raises(
        StepError, match=r"no neuron could be removed of outer\.0: .*added to one that keeps its size"
    ):
        STEPS["prune_structured"](amount=0.5, targets="outer.0").apply(Blocks(), image_context(tiny))
