from __future__ import annotations

import pytest
import torch
from torch import nn

from compression.errors import RecipeError, StepError
from compression.export import export
from compression.recipe import StepSpec
from compression.steps import STEPS, StepContext, build
from compression.steps.low_rank import LowRank, _split, _tucker
from compression.workload import Workload

from .small import Images, image_context, images, logits


def count(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def of_rank(rows: int, columns: int, rank: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(rows, rank, generator=draw) @ torch.randn(rank, columns, generator=draw)


class Words(nn.Module):
    """A table of words that is used for the output too, if asked for."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 20, padding_idx=0)
        self.last = nn.Linear(20, 50, bias=False)
        if tied:
            self.last.weight = self.table.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.last(self.table(words).mean(1))
        return answer


def test_a_matrix_of_low_rank_is_found_exactly() -> None:
    layer = nn.Linear(30, 40)
    layer.weight.data.copy_(of_rank(40, 30, 3))
    rows = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(_split(layer, 3)(rows), layer(rows), atol=1e-4)


def test_a_table_of_low_rank_is_found_exactly() -> None:
    layer = nn.Embedding(50, 20, padding_idx=0)
    layer.weight.data.copy_(of_rank(50, 20, 4))
    words = torch.arange(50)
    assert torch.allclose(_split(layer, 4)(words), layer(words), atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1, "bias": False}, {"dilation": 2, "padding": "same"}]
)
def test_a_convolution_at_full_rank_answers_as_before(options: dict[str, object]) -> None:
    layer = nn.Conv2d(6, 8, 3, **options)  # type: ignore[arg-type]
    rows = torch.randn(2, 6, 9, 9)
    assert torch.allclose(_tucker(layer, 8, 6)(rows), layer(rows), atol=1e-4)


def test_a_convolution_of_one_pixel_becomes_two(tiny: Workload) -> None:
    layer = nn.Conv2d(16, 16, 1, stride=2)
    rows = torch.randn(2, 16, 5, 5)
    pair = _split(layer, 16)
    assert len(pair) == 2  # type: ignore[arg-type]
    assert torch.allclose(pair(rows), layer(rows), atol=1e-4)


def test_energy_keeps_as_few_values_as_hold_it(network: nn.Module, context: StepContext) -> None:
    smaller = LowRank(energy=0.8, targets="layers.2").apply(network, context)
    squares = torch.linalg.svdvals(network.get_parameter("layers.2.weight").detach()).square()
    rank = smaller.get_parameter("layers.2.0.weight").shape[0]
    assert squares[:rank].sum() >= 0.8 * squares.sum() > squares[: rank - 1].sum()


def test_a_ratio_is_of_all_singular_values(network: nn.Module, context: StepContext) -> None:
    smaller = LowRank(ratio=0.25, targets="layers.2").apply(network, context)
    assert smaller.get_parameter("layers.2.0.weight").shape == (8, 32)


@pytest.mark.parametrize("size", [0.3, 0.5, 0.8])
def test_a_size_is_kept_to_and_nearly_used_up(tiny: Workload, size: float) -> None:
    before = images()
    after = LowRank(size=size, targets="second").apply(before, image_context(tiny))
    share = count(after.get_submodule("second")) / count(before.second)
    assert 0.6 * size < share <= size + 0.02


def test_layers_that_would_not_save_are_left_as_they_are(network: nn.Module, context: StepContext) -> None:
    smaller = LowRank(ratio=0.9, targets="layers.[24]").apply
    with pytest.raises(StepError, match=r"no layer of layers\.2, layers\.4 would take fewer weights"):
        smaller(network, context)
    part = LowRank(ratio=0.6).apply(network, context)
    assert isinstance(part.get_submodule("layers.2"), nn.Linear)
    assert isinstance(part.get_submodule("layers.0"), nn.Sequential)
    assert count(part) < count(network)


def test_more_energy_gives_nearer_answers(tiny: Workload) -> None:
    context, before = image_context(tiny), images()
    errors = [
        (logits(LowRank(energy=energy).apply(before, context), context) - logits(before, context))
        .square()
        .mean()
        for energy in (0.3, 0.9)
    ]
    assert errors[0] > 2 * errors[1]


def test_the_factors_are_exported_as_layers_of_their_own(tiny: Workload) -> None:
    context = image_context(tiny)
    smaller = LowRank(size=0.5).apply(images(), context)
    exported = export(smaller, context.data.rows("train").tensors)
    assert sum(node.op_type == "Conv" for node in exported.onnx.graph.node) == 6


def test_a_padding_row_stays_zero(tiny: Workload) -> None:
    layer = nn.Embedding(50, 20, padding_idx=0)
    assert _split(layer, 5)(torch.tensor([0])).abs().max() < 1e-6


def test_a_table_that_two_layers_share_is_left_alone(context: StepContext) -> None:
    with pytest.raises(StepError, match="the network has no Linear, Embedding or Conv2d layer of its own"):
        LowRank(size=0.5).apply(Words(tied=True), context)


def test_a_network_that_looks_into_a_layer_is_an_error(tiny: Workload) -> None:
    class Nosy(Images):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = super().forward(image) * self.last.weight.sum()
            return answer

    with pytest.raises(StepError, match=r"looks into a layer that was replaced .* leave it out of targets"):
        LowRank(size=0.5).apply(Nosy(), image_context(tiny))


def test_a_pattern_that_matches_nothing_is_an_error(network: nn.Module, context: StepContext) -> None:
    with pytest.raises(StepError, match=r"targets 'conv\*' matches nothing; the network has side, layers\.0"):
        STEPS["low_rank"](size=0.5, targets="conv*").apply(network, context)


@pytest.mark.parametrize("params", [{}, {"energy": 0.5, "ratio": 0.5}])
def test_one_way_to_choose_ranks_must_be_given(params: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="exactly one of energy, ratio and size"):
        build(StepSpec(step="low_rank", params=params))
