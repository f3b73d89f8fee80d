from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compression.errors import RecipeError, StepError
from compression.export import export
from compression.recipe import StepSpec
from compression.steps import STEPS, StepContext, build
from compression.steps.low_rank import LowRank, _cp, _separable, _split, _tucker, cp_decompose
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


def test_a_padding_row_stays_zero_and_stays_out_of_training(tiny: Workload) -> None:
    layer = nn.Embedding(50, 20, padding_idx=7)
    pair = _split(layer, 5)
    assert pair(torch.tensor([7])).abs().max() < 1e-6
    pair(torch.tensor([7, 8])).sum().backward()
    gradient = pair.get_parameter("0.weight").grad
    assert gradient is not None
    assert gradient[7].abs().max() == 0 < gradient[8].abs().max()


def test_a_table_that_two_layers_share_is_left_alone(context: StepContext) -> None:
    with pytest.raises(StepError, match="the network has no Linear, Embedding or ungrouped Conv2d layer"):
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


CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"dilation": 2, "padding": "same"},
    {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": (1, 2), "padding_mode": "reflect"},
]


def kernel(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def of_cp_rank(rank: int, *shape: int) -> np.ndarray:
    factors = [kernel(length, rank, seed=place) for place, length in enumerate(shape)]
    return np.einsum("or,ir,kr,lr->oikl", *factors)


def middle(form: str, layer: nn.Conv2d, rank: int) -> nn.Module:
    """A layer's factors at one rank; for Tucker, of both unfoldings."""
    if form == "tucker":
        return _tucker(layer, rank, rank)
    if form == "separable":
        return _separable(layer, rank)
    return _cp(layer, cp_decompose(layer.weight.detach().double().numpy(), rank, 0)[0])


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_a_separable_convolution_at_full_rank_answers_as_before(options: dict[str, Any]) -> None:
    layer = nn.Conv2d(6, 8, (3, 2), **options)
    rows = torch.randn(2, 6, 9, 9)
    assert torch.allclose(_separable(layer, 16)(rows), layer(rows), atol=1e-4)


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_a_convolution_at_full_cp_rank_answers_as_before(options: dict[str, Any]) -> None:
    layer = nn.Conv2d(4, 5, (3, 2), **options)
    rows = torch.randn(2, 4, 9, 9)
    four = middle("cp", layer, 4 * 3 * 2)
    assert [type(part) for part in four.children()] == [nn.Conv2d] * 4
    torch.testing.assert_close(four(rows), layer(rows), rtol=0, atol=2e-3)


def test_separable_filters_are_found_exactly() -> None:
    layer = nn.Conv2d(6, 8, 5)
    columns, rows = kernel(2, 6, 5), kernel(2, 8, 5, seed=1)
    layer.weight.data.copy_(torch.from_numpy(np.einsum("rik,rol->oikl", columns, rows)))
    images = torch.randn(2, 6, 9, 9)
    assert torch.allclose(_separable(layer, 2)(images), layer(images), atol=1e-3)


def test_a_kernel_of_low_cp_rank_is_found() -> None:
    factors = [np.linalg.qr(kernel(length, 3, seed=length))[0] for length in (12, 10, 3, 4)]
    exact = np.einsum("or,ir,kr,lr->oikl", *factors)
    assert cp_decompose(exact, 3, 0)[1] < 1e-6
    assert cp_decompose(exact, 2, 0)[1] == pytest.approx(1 / 3, abs=0.01)


def test_a_kernel_of_zeros_has_factors_of_zeros() -> None:
    factors, error = cp_decompose(np.zeros((4, 3, 3, 3)), 2, 0)
    assert error == 0
    assert all(not factor.any() for factor in factors)


def test_the_factors_of_a_component_are_of_one_length() -> None:
    lengths = [np.linalg.norm(factor, axis=0) for factor in cp_decompose(kernel(8, 6, 3, 3), 5, 0)[0]]
    for other in lengths[1:]:
        np.testing.assert_allclose(other, lengths[0], rtol=1e-9)


@pytest.mark.parametrize("form", ["tucker", "cp", "separable"])
@settings(deadline=None, max_examples=15)  # the rounds of alternating least squares vary in number
@given(seed=st.integers(0, 1000), channels=st.tuples(st.integers(4, 8), st.integers(4, 8)))
def test_the_error_falls_as_the_rank_rises(form: str, seed: int, channels: tuple[int, int]) -> None:
    outputs, inputs = channels
    layer = nn.Conv2d(inputs, outputs, 3, padding=2)
    layer.weight.data.copy_(torch.from_numpy(kernel(outputs, inputs, 3, 3, seed=seed)))
    # Answers to single pixels are the kernel itself.
    pixels = torch.zeros(inputs, inputs, 1, 1)
    pixels[range(inputs), range(inputs)] = 1
    with torch.no_grad():
        exact = layer(pixels)
        errors = [(middle(form, layer, rank)(pixels) - exact).square().sum() for rank in (1, 2, 4)]
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize(("conv", "count"), [("cp", 4), ("separable", 2)])
def test_every_form_of_a_convolution_gets_as_small_as_asked_and_is_exported(
    tiny: Workload, conv: str, count: int
) -> None:
    context, before = image_context(tiny), images()
    after = LowRank(size=0.5, targets="second", conv=conv).apply(before, context)
    factors = after.get_submodule("second")
    assert len(list(factors.children())) == count
    assert 0.35 < sum(w.numel() for w in factors.parameters()) / before.second.weight.numel() < 0.52
    exported = export(after, context.data.rows("train").tensors)
    assert sum(node.op_type == "Conv" for node in exported.onnx.graph.node) == 1 + count


@pytest.mark.parametrize("conv", ["cp", "separable"])
def test_more_energy_gives_nearer_answers_in_every_form(tiny: Workload, conv: str) -> None:
    context, before = image_context(tiny), images()
    before.second.weight.data.copy_(torch.from_numpy(of_cp_rank(6, 16, 8, 3, 3) / 20))
    errors = [
        (logits(LowRank(energy=e, targets="second", conv=conv).apply(before, context), context))
        .sub(logits(before, context))
        .square()
        .mean()
        for e in (0.3, 0.9)
    ]
    assert errors[0] > 2 * errors[1]


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9])
def test_the_energy_asked_for_is_held_by_the_smallest_cp_rank(tiny: Workload, energy: float) -> None:
    before = images()
    weight = of_cp_rank(6, 16, 8, 3, 3)
    before.second.weight.data.copy_(torch.from_numpy(weight))
    after = LowRank(energy=energy, targets="second", conv="cp").apply(before, image_context(tiny))
    rank = after.get_parameter("second.0.weight").shape[0]
    assert 1 - cp_decompose(weight, rank, 0)[1] >= energy
    assert rank == 1 or 1 - cp_decompose(weight, rank - 1, 0)[1] < energy


@pytest.mark.parametrize(("params", "conv"), [({"energy": 0.999}, "cp"), ({"ratio": 0.9}, "cp")])
def test_a_convolution_that_would_grow_is_left_as_it_is(
    tiny: Workload, params: dict[str, float], conv: str
) -> None:
    with pytest.raises(StepError, match="no layer of second would take fewer weights: lower energy"):
        LowRank(**params, targets="second", conv=conv).apply(images(), image_context(tiny))


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("conv", ["tucker", "cp", "separable"])
def test_no_layer_becomes_larger(tiny: Workload, conv: str, ratio: float) -> None:
    before = images()
    try:
        after = LowRank(ratio=ratio, conv=conv).apply(before, image_context(tiny))
    except StepError as error:
        assert "would take fewer weights" in str(error)  # noqa: PT017 - that is allowed too
        return
    for name in ("first", "second", "last"):
        old, new = before.get_submodule(name), after.get_submodule(name)
        assert type(new) is type(old) or count(new) < count(old)


def test_cp_factors_depend_on_the_seed_alone(tiny: Workload) -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        context = image_context(tiny)
        context.seed = seed
        torch.manual_seed(seed + 7)
        np.random.seed(seed + 7)  # noqa: NPY002 - what a library might draw from
        after = LowRank(size=0.5, targets="second", conv="cp").apply(images(), context)
        return list(after.get_submodule("second").parameters())

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("conv", ["tucker", "cp", "separable"])
def test_grouped_convolutions_are_left_alone(tiny: Workload, conv: str) -> None:
    class Grouped(Images):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Conv2d(8, 16, 3, stride=2, groups=2)

    context = image_context(tiny)
    with pytest.raises(StepError, match=r"targets 'second' matches nothing; the network has first, last"):
        LowRank(size=0.5, targets="second", conv=conv).apply(Grouped(), context)
    after = LowRank(size=0.5, conv=conv).apply(Grouped(), context)
    assert type(after.get_submodule("second")) is nn.Conv2d
