"""Low-rank factors: two or three small layers in place of a large one."""

from __future__ import annotations

import copy
from fnmatch import fnmatch
from typing import TYPE_CHECKING, ClassVar, cast

from pydantic import Field, model_validator

from compression.errors import StepError
from compression.steps.base import Property, StepContext, TorchStep, register

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("low_rank")
class LowRank(TorchStep):
    """Replace layers by products of smaller ones, where that takes fewer weights.

    Linear, Embedding and 1x1 convolution layers become two by their singular values (Denton et al., "Exploiting linear
    structure", 1404.0736, section 3.1); other Conv2d layers become three, 1x1, kxk between fewer channels, 1x1, by a
    Tucker-2 decomposition with the leading singular vectors of both unfoldings (Kim et al., 1511.06530, section 3).
    Exactly one of `energy`, `ratio` and `size` says how many singular values stay.

    Args:
        energy: as few as hold this share of the sum of squares, in each layer.
        ratio: this share of all of them.
        size: as many as fit into this share of the layer's weights.
        targets: shell-style pattern of the layers, for example `mlp.*`.
    """

    makes: ClassVar[frozenset[Property]] = frozenset({"shape"})

    energy: float | None = Field(default=None, gt=0, lt=1)
    ratio: float | None = Field(default=None, gt=0, lt=1)
    size: float | None = Field(default=None, gt=0, lt=1)
    targets: str = "*"

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
        chosen = [name for name in able if fnmatch(name, self.targets)]
        if not chosen:
            there = ", ".join(able) or "no Linear, Embedding or Conv2d layer of its own"
            raise StepError(f"low_rank: targets {self.targets!r} matches nothing; the network has {there}")
        changed = 0
        for number, name in enumerate(chosen):
            context.progress(f"factoring {name}", number / len(chosen))
            factors = self._factors(model.get_submodule(name))
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

    def _factors(self, layer: nn.Module) -> nn.Module | None:
        """The layers that take this one's place, or None if they would have no fewer weights."""
        import torch

        weight = cast("Tensor", layer.weight).detach()
        with torch.no_grad():
            if weight.dim() == 4 and weight[0, 0].numel() > 1:
                ranks = self._ranks_of_tucker(weight)
                factors = _tucker(cast("nn.Conv2d", layer), *ranks)
            else:
                rank = self._rank(
                    torch.linalg.svdvals(weight.flatten(1).double()), sum(weight.shape), weight.numel()
                )
                factors = _split(layer, rank)
        return factors if _weights(factors) < _weights(layer) else None

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


def _set(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    cast("Tensor", layer.weight).data.copy_(weight)
    if bias is not None:
        cast("Tensor", layer.bias).data.copy_(bias.detach())
