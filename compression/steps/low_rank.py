"""Low-rank factors: two to four small layers in place of a large one."""

from __future__ import annotations

import copy
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import numpy as np
from pydantic import Field, model_validator

from compression.errors import StepError
from compression.steps.base import Property, StepContext, TorchStep, register
from compression.steps.patterns import select

if TYPE_CHECKING:
    from torch import Tensor, nn

_ALS_ROUNDS = 100
_ALS_TOLERANCE = 1e-7
"""Of the relative error, from one round to the next."""
_ALS_PENALTY = 1e-8
"""Of the factors' squares, for a kernel of norm 1. Without it, components can grow without bound while they cancel each
other, and nothing of the kernel is left in float32."""


@register("low_rank")
class LowRank(TorchStep):
    """Replace layers by products of smaller ones, where that takes fewer weights.

    Linear, Embedding and 1x1 convolution layers become two by their singular values (Denton et al., "Exploiting linear
    structure", 1404.0736, section 3.1). Other Conv2d layers that are not grouped become, by `conv`:

    - `tucker`: three, 1x1, kxk between fewer channels, 1x1, by a Tucker-2 decomposition with the leading singular
      vectors of both unfoldings (Kim et al., 1511.06530, section 3);
    - `cp`: four, 1x1, kx1 and 1xk on each channel alone, 1x1, by a canonical polyadic decomposition (Lebedev et al.,
      1412.6553, section 3), found by alternating least squares from a seeded start. It takes the fewest weights at a
      rank and the longest to find, and trains well at low learning rates only;
    - `separable`: two, kx1 and 1xk, each between all channels: the second scheme of Jaderberg et al. (1405.3866,
      section 2), by the singular values of the kernel's columns against its rows (Tai et al., 1511.06067, section 2).

    Exactly one of `energy`, `ratio` and `size` says what rank a layer gets. A layer that would take no fewer weights
    stays as it is.

    Args:
        energy: as small a rank as holds this share of the sum of squares of the weights, in each layer; for `tucker`,
            in each unfolding.
        ratio: this share of the ranks there are, up to the one that is always exact: of the channels for `tucker`, of
            the product of a kernel's sizes but the largest for `cp`, of the singular values for all others.
        size: the largest rank that fits into this share of the layer's weights.
        targets: shell-style pattern of the layers, for example `mlp.*`.
        conv: how convolutions are factored: tucker, cp or separable.
    """

    makes: ClassVar[frozenset[Property]] = frozenset({"shape"})

    energy: float | None = Field(default=None, gt=0, lt=1)
    ratio: float | None = Field(default=None, gt=0, lt=1)
    size: float | None = Field(default=None, gt=0, lt=1)
    targets: str = "*"
    conv: Literal["tucker", "cp", "separable"] = "tucker"

    @model_validator(mode="after")
    def _one(self) -> LowRank:
        if [self.energy, self.ratio, self.size].count(None) != 2:
            raise ValueError("give exactly one of energy, ratio and size")
        return self

    @property
    def destroys(self) -> frozenset[Property]:
        """The factors are new weights."""
        return frozenset({"sparsity", "codebook"})

    def apply(self, model: nn.Module, context: StepContext) -> nn.Module:
        """Return a copy with factored layers."""
        import torch

        model = copy.deepcopy(model).eval()
        able = _layers(model)
        chosen = select(able, self.targets)
        if not chosen:
            there = ", ".join(able) or "no Linear, Embedding or ungrouped Conv2d layer of its own"
            raise StepError(f"low_rank: targets {self.targets!r} matches nothing; the network has {there}")
        changed = 0
        for number, name in enumerate(chosen):
            context.progress(f"factoring {name}", number / len(chosen))
            factors = self._factors(model.get_submodule(name), context.seed)
            if factors is not None:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, factors)
                changed += 1
        if not changed:
            raise StepError(
                f"low_rank: no layer of {', '.join(chosen)} would take fewer weights: lower energy, ratio or size"
            )
        rows = context.data.rows("train").take(slice(0, 2))
        try:
            with torch.no_grad():
                model(**{name: torch.from_numpy(array) for name, array in rows.tensors.items()})
        except (AttributeError, RuntimeError) as error:
            first = str(error).strip().partition("\n")[0]
            raise StepError(
                f"low_rank: the network looks into a layer that was replaced ({first}): leave it out of targets"
            ) from None
        return model

    def _factors(self, layer: nn.Module, seed: int) -> nn.Module | None:
        """The layers that take this one's place, or None if they would have no fewer weights."""
        import torch

        weight = cast("Tensor", layer.weight).detach()
        factors: nn.Module | None
        with torch.no_grad():
            if weight.dim() == 4 and weight[0, 0].numel() > 1:
                factors = self._factors_of_kernel(cast("nn.Conv2d", layer), seed)
            else:
                factors = _split(layer, self._rank_of_matrix(weight.flatten(1)))
        return factors if factors is not None and _weights(factors) < _weights(layer) else None

    def _factors_of_kernel(self, layer: nn.Conv2d, seed: int) -> nn.Module | None:
        if self.conv == "tucker":
            return _tucker(layer, *self._ranks_of_tucker(layer.weight.detach()))
        if self.conv == "separable":
            return _separable(layer, self._rank_of_matrix(_rows_by_columns(layer.weight.detach())))
        factors = self._cp_factors(layer.weight.detach(), seed)
        return None if factors is None else _cp(layer, factors)

    def _rank_of_matrix(self, matrix: Tensor) -> int:
        import torch

        return self._rank(torch.linalg.svdvals(matrix.double()), sum(matrix.shape), matrix.numel())

    def _cp_factors(self, weight: Tensor, seed: int) -> list[np.ndarray] | None:
        """Factors of the rank asked for; None where they would take no fewer weights than the kernel."""
        kernel = weight.double().numpy()
        worth = (kernel.size - 1) // sum(kernel.shape)
        if self.energy is not None:
            return _cp_of_energy(kernel, self.energy, worth, seed)
        if self.ratio is not None:
            rank = max(1, round(self.ratio * (kernel.size // max(kernel.shape))))
        else:
            assert self.size is not None
            rank = max(1, int(self.size * kernel.size / sum(kernel.shape)))
        return cp_decompose(kernel, rank, seed)[0] if rank <= worth else None

    def _rank(self, values: Tensor, per_rank: int, total: int) -> int:
        if self.energy is not None:
            return _rank_of_energy(values, self.energy)
        if self.ratio is not None:
            return max(1, round(self.ratio * len(values)))
        assert self.size is not None
        return min(len(values), max(1, int(self.size * total / per_rank)))

    def _ranks_of_tucker(self, weight: Tensor) -> tuple[int, int]:
        """Channels out of and into the core."""
        import torch

        outputs, inputs = weight.shape[:2]
        if self.energy is not None:
            values = [torch.linalg.svdvals(_unfold(weight, axis).double()) for axis in (0, 1)]
            return _rank_of_energy(values[0], self.energy), _rank_of_energy(values[1], self.energy)
        if self.ratio is not None:
            return max(1, round(self.ratio * outputs)), max(1, round(self.ratio * inputs))
        assert self.size is not None
        kernel, best = weight[0, 0].numel(), (1, 1)
        for step in range(1, max(outputs, inputs) + 1):
            share = step / max(outputs, inputs)
            ranks = max(1, round(share * outputs)), max(1, round(share * inputs))
            cost = ranks[0] * outputs + ranks[1] * inputs + ranks[0] * ranks[1] * kernel
            if cost <= self.size * weight.numel():
                best = ranks
        return best


def cp_decompose(kernel: np.ndarray, rank: int, seed: int) -> tuple[list[np.ndarray], float]:
    """Canonical polyadic decomposition of an array by alternating least squares, in float64.

    Args:
        kernel: any number of axes.
        rank: how many outer products to write it as the sum of.
        seed: of the start; the same seed gives the same factors.

    Returns:
        One factor [length of the axis, rank] for each axis, each component's norm spread evenly over them; and the
        squared error over the sum of squares of the kernel.
    """
    import tensorly
    from tensorly.cp_tensor import CPTensor, cp_to_tensor
    from tensorly.decomposition import parafac

    norm = np.linalg.norm(kernel)
    if norm == 0:
        return [np.zeros((length, rank)) for length in kernel.shape], 0.0
    draw = np.random.default_rng(seed)
    # tensorly's own starts: singular vectors, of which short axes have too few, and uniform numbers, which all point
    # the same way.
    start = CPTensor((np.ones(rank), [draw.normal(size=(length, rank)) for length in kernel.shape]))
    with tensorly.backend_context("numpy"):
        found = parafac(
            kernel / norm,
            rank,
            n_iter_max=_ALS_ROUNDS,
            init=start,
            tol=_ALS_TOLERANCE,
            l2_reg=_ALS_PENALTY,
        )
        error = float(np.square(cp_to_tensor(found) - kernel / norm).sum())
    lengths = [np.linalg.norm(factor, axis=0) for factor in found.factors]
    # Layers whose weights differ much in size train badly.
    each = (np.asarray(found.weights) * prod(lengths) * norm) ** (1 / kernel.ndim)
    return [
        factor * (each / np.maximum(length, np.finfo(float).tiny))
        for factor, length in zip(found.factors, lengths, strict=True)
    ], error


def _cp_of_energy(kernel: np.ndarray, energy: float, worth: int, seed: int) -> list[np.ndarray] | None:
    """Factors of the smallest rank found, up to `worth`, that hold a share of the sum of squares; None if none does."""
    too_small, rank, found = 0, 1, None
    while found is None and too_small < worth:
        factors, error = cp_decompose(kernel, rank, seed)
        if 1 - error >= energy:
            found = factors
        else:
            too_small, rank = rank, min(2 * rank, worth)
    while found is not None and rank - too_small > 1:
        middle = (too_small + rank) // 2
        factors, error = cp_decompose(kernel, middle, seed)
        if 1 - error >= energy:
            rank, found = middle, factors
        else:
            too_small = middle
    return found


def _layers(model: nn.Module) -> list[str]:
    """Names of the layers that can be replaced: of these very classes, and with weights that no other layer shares."""
    from torch import nn

    users: dict[int, int] = {}
    # One module under two names is one that two places share.
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    return [
        name
        for name, module in model.named_modules()
        if name
        and (
            # Subclasses are read by their owners, as attention reads its output projection.
            type(module) is nn.Linear
            or (type(module) is nn.Embedding and module.max_norm is None)
            or (type(module) is nn.Conv2d and module.groups == 1)
        )
        and users[id(module.weight)] == 1
    ]


def _rank_of_energy(values: Tensor, energy: float) -> int:
    squares = values.square()
    total = squares.sum()
    return max(1, int((squares.cumsum(0) < energy * total).sum()) + 1) if total > 0 else 1


def _weights(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def _unfold(weight: Tensor, axis: int) -> Tensor:
    return weight.movedim(axis, 0).flatten(1)


def _split(layer: nn.Module, rank: int) -> nn.Module:
    """Two layers whose weights' product is the best of its rank; both get the root of the singular values."""
    import torch
    from torch import nn

    weight = cast("Tensor", layer.weight).detach()
    left, values, right = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    root = values[:rank].sqrt()
    left, right = (left[:, :rank] * root).float(), (root[:, None] * right[:rank]).float()
    pair: tuple[nn.Module, nn.Module]
    if isinstance(layer, nn.Embedding):
        pair = (
            nn.utils.skip_init(nn.Embedding, len(weight), rank, padding_idx=layer.padding_idx),
            nn.utils.skip_init(nn.Linear, rank, weight.shape[1], bias=False),
        )
        _set(pair[0], left)
        _set(pair[1], right.T)
        return nn.Sequential(*pair)
    bias = cast("Tensor | None", layer.bias)
    if isinstance(layer, nn.Conv2d):
        pair = (
            nn.utils.skip_init(
                nn.Conv2d,
                layer.in_channels,
                rank,
                1,
                layer.stride,
                layer.padding,
                bias=False,
                padding_mode=layer.padding_mode,
            ),
            nn.utils.skip_init(nn.Conv2d, rank, layer.out_channels, 1, bias=bias is not None),
        )
        left, right = left[:, :, None, None], right[:, :, None, None]
    else:
        pair = (
            nn.utils.skip_init(nn.Linear, weight.shape[1], rank, bias=False),
            nn.utils.skip_init(nn.Linear, rank, len(weight), bias=bias is not None),
        )
    _set(pair[0], right)
    _set(pair[1], left, bias)
    return nn.Sequential(*pair)


def _tucker(layer: nn.Conv2d, outputs: int, inputs: int) -> nn.Module:
    """1x1 into fewer channels, the kernel between these, 1x1 out of them."""
    import torch
    from torch import nn

    weight = layer.weight.detach().double()
    out = torch.linalg.svd(_unfold(weight, 0), full_matrices=False)[0][:, :outputs]
    into = torch.linalg.svd(_unfold(weight, 1), full_matrices=False)[0][:, :inputs]
    core = torch.einsum("oikl,or,is->rskl", weight, out, into)
    outputs, inputs = core.shape[:2]
    three = (
        nn.utils.skip_init(nn.Conv2d, layer.in_channels, inputs, 1, bias=False),
        nn.utils.skip_init(
            nn.Conv2d,
            inputs,
            outputs,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            bias=False,
            padding_mode=layer.padding_mode,
        ),
        nn.utils.skip_init(nn.Conv2d, outputs, layer.out_channels, 1, bias=layer.bias is not None),
    )
    _set(three[0], into.T[:, :, None, None])
    _set(three[1], core)
    _set(three[2], out[:, :, None, None], layer.bias)
    return nn.Sequential(*three)


def _one_axis(
    layer: nn.Conv2d, axis: int, inputs: int, outputs: int, *, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A convolution along one axis, with the layer's kernel size, stride, padding and dilation of that axis."""
    from torch import nn

    def along(sizes: tuple[int, ...], elsewhere: int) -> tuple[int, int]:
        return (sizes[0], elsewhere) if axis == 0 else (elsewhere, sizes[1])

    padding = layer.padding if isinstance(layer.padding, str) else along(layer.padding, 0)
    return nn.utils.skip_init(
        nn.Conv2d,
        inputs,
        outputs,
        along(layer.kernel_size, 1),
        along(layer.stride, 1),
        padding,
        along(layer.dilation, 1),
        groups,
        bias=bias,
        padding_mode=layer.padding_mode,
    )


def _rows_by_columns(weight: Tensor) -> Tensor:
    """A kernel [O, I, H, W] as a matrix [I x H, O x W]: of rank 1 if one column filter, then one row filter do."""
    return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


def _separable(layer: nn.Conv2d, rank: int) -> nn.Module:
    """Along the height into `rank` channels, then along the width out of them."""
    import torch
    from torch import nn

    outputs, inputs, height, width = layer.weight.shape
    matrix = _rows_by_columns(layer.weight.detach().double())
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    down = (left[:, :rank] * root).T.reshape(len(root), inputs, height, 1)
    across = (root[:, None] * right[:rank]).reshape(len(root), outputs, 1, width).transpose(0, 1)
    pair = (
        _one_axis(layer, 0, inputs, len(root)),
        _one_axis(layer, 1, len(root), outputs, bias=layer.bias is not None),
    )
    _set(pair[0], down)
    _set(pair[1], across, layer.bias)
    return nn.Sequential(*pair)


def _cp(layer: nn.Conv2d, factors: list[np.ndarray]) -> nn.Module:
    """1x1 into a channel for each component, along the height and the width of each alone, 1x1 out of them."""
    import torch
    from torch import nn

    out, into, down, across = (torch.from_numpy(factor) for factor in factors)
    rank = out.shape[1]
    four = (
        nn.utils.skip_init(nn.Conv2d, layer.in_channels, rank, 1, bias=False),
        _one_axis(layer, 0, rank, rank, groups=rank),
        _one_axis(layer, 1, rank, rank, groups=rank),
        nn.utils.skip_init(nn.Conv2d, rank, layer.out_channels, 1, bias=layer.bias is not None),
    )
    _set(four[0], into.T[:, :, None, None])
    _set(four[1], down.T[:, None, :, None])
    _set(four[2], across.T[:, None, None, :])
    _set(four[3], out[:, :, None, None], layer.bias)
    return nn.Sequential(*four)


def _set(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    cast("Tensor", layer.weight).data.copy_(weight)
    if bias is not None:
        cast("Tensor", layer.bias).data.copy_(bias.detach())
