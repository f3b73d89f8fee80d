"""Zeroing weights otherwise than at one global share: by each layer's spread, in rounds, two of every four."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from compression.errors import StepError
from compression.steps.base import Property, StepContext, TorchStep, register
from compression.steps.prune import EXTREME, PruneMagnitude, PruneStructured, hidden_neurons, target_weights
from compression.steps.train import Training, zero_masks
from compression.workload import Progress

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("prune_threshold")
class PruneThreshold(TorchStep):
    """Zero, in each layer, the weights below `quality` standard deviations of that layer's weights.

    A layer keeps more of its weights the more of them stand out. Han et al., "Learning both weights and connections"
    (1506.02626), section 3.

    Args:
        quality: the threshold in standard deviations; 1 zeroes two thirds of normally distributed weights.
        targets: shell-style pattern of the parameters to prune, for example `mlp.*`.
        allow_extreme: needed to zero over 95% of these weights.
    """

    makes: ClassVar[frozenset[Property]] = frozenset({"sparsity"})

    quality: float = Field(gt=0, le=10)
    targets: str = "*"
    allow_extreme: bool = False

    def apply(self, model: nn.Module, context: StepContext) -> nn.Module:  # noqa: ARG002
        """Return a copy with zeros in it."""
        model = copy.deepcopy(model)
        chosen = [model.get_parameter(name) for name in target_weights(model, self.targets, self.name)]
        before = sum(int((weight == 0).sum()) for weight in chosen)
        for weight in chosen:
            small = weight.detach().abs() < self.quality * weight.detach().std(correction=0)
            weight.data.masked_fill_(small, 0.0)
        zeros = sum(int((weight == 0).sum()) for weight in chosen)
        total = sum(weight.numel() for weight in chosen)
        if zeros == before:
            raise StepError(
                f"prune_threshold: no weight is below {self.quality:g} standard deviations: raise quality"
            )
        if zeros > EXTREME * total and not self.allow_extreme:
            raise StepError(
                f"prune_threshold: quality {self.quality:g} zeroes {zeros / total:.1%} of the weights, over "
                f"{EXTREME:.0%} leaves next to nothing; lower it, or set allow_extreme: true if meant"
            )
        return model


class _Rounds(Training):
    """Parameters of pruning in rounds.

    Args:
        amounts: share that is gone after each round, rising.
        amount, rounds: in place of `amounts`: the last share, come near to quickly and then slowly along the cubic of
            Zhu & Gupta, "To prune, or not to prune" (1710.01878), equation 1.
        allow_extreme: needed to go over 95%.
        epochs: passes over the train split after each round.
    """

    amounts: tuple[float, ...] | None = Field(default=None, min_length=1, max_length=100)
    amount: float | None = Field(default=None, gt=0, lt=1)
    rounds: int = Field(default=4, ge=1, le=100)
    allow_extreme: bool = False

    @model_validator(mode="after")
    def _sane(self) -> _Rounds:
        if (self.amounts is None) == (self.amount is None):
            raise ValueError("give either amounts, a share for each round, or amount, the last one")
        plan = self.schedule()
        rising = all(first < then for first, then in zip((0.0, *plan), (*plan, 1.0), strict=True))
        if not rising:
            raise ValueError("amounts must rise from round to round, between 0 and 1")
        if plan[-1] > EXTREME and not self.allow_extreme:
            raise ValueError(
                f"amounts over {EXTREME} leave next to nothing; set allow_extreme: true if meant"
            )
        return self

    def schedule(self) -> tuple[float, ...]:
        """The share that is gone after each round."""
        if self.amounts is not None:
            return self.amounts
        assert self.amount is not None
        return tuple(self.amount * (1 - (1 - done / self.rounds) ** 3) for done in range(1, self.rounds + 1))


@register("prune_iterative")
class PruneIterative(_Rounds):
    """Zero the smallest weights over all layers together in rounds, with training between that keeps the zeros.

    What training has moved is weighed anew in each round. Han et al., "Learning both weights and connections"
    (1506.02626), section 3.4.

    Args:
        targets: shell-style pattern of the parameters to prune, for example `mlp.*`.
    """

    makes: ClassVar[frozenset[Property]] = frozenset({"sparsity"})

    targets: str = "*"

    @property
    def destroys(self) -> frozenset[Property]:
        """Training moves every weight on its own."""
        return frozenset({"codebook"})

    def apply(self, model: nn.Module, context: StepContext) -> nn.Module:
        """Return a pruned and trained copy."""
        target_weights(model, self.targets, self.name)
        plan = self.schedule()
        for number, amount in enumerate(plan):
            cut = PruneMagnitude(amount=amount, targets=self.targets, allow_extreme=True)
            model = cut.apply(model, context)
            self.train(model, context, zero_masks(model), part(context.progress, number, len(plan)))
        return model


@register("prune_structured_iterative")
class PruneStructuredIterative(_Rounds):
    """Remove the weakest neurons or channels in rounds, with training between.

    Shares are of the hidden neurons that the network had; each round is a `prune_structured`, which rounds to whole
    neurons. A round that has no whole neuron left to remove only trains.

    Args:
        targets: shell-style pattern of the layers whose neurons may go, as in `prune_structured`; shares are of theirs.
    """

    makes: ClassVar[frozenset[Property]] = frozenset({"shape"})

    targets: str = "*"

    @model_validator(mode="after")
    def _something_left(self) -> PruneStructuredIterative:
        if self.schedule()[-1] > EXTREME:
            raise ValueError(f"no more than {EXTREME} of the neurons can be removed")
        return self

    @property
    def destroys(self) -> frozenset[Property]:
        """Neurons go with their zeros, and training moves every weight on its own."""
        return frozenset({"sparsity", "codebook"})

    def apply(self, model: nn.Module, context: StepContext) -> nn.Module:
        """Return a smaller and trained copy."""
        plan = self.schedule()
        before = hidden_neurons(model, context, self.targets)
        model = copy.deepcopy(model)
        for number, amount in enumerate(plan):
            # The pruner counts from what is there now, and rounds what is to go up to whole neurons.
            left = hidden_neurons(model, context, self.targets)
            now = 1 - (1 - amount) * before / left - 1e-9
            if now * left >= 1:
                model = PruneStructured(amount=now, targets=self.targets).apply(model, context)
            self.train(model, context, progress=part(context.progress, number, len(plan)))
        return model


@register("prune_2_4")
class Prune24(TorchStep):
    """Zero the two smallest of every four weights along the inputs of a layer.

    Mishra et al., "Accelerating sparse deep neural networks" (2104.08378), section 3. The pattern is for the sparse
    tensor cores of GPUs: nothing here gets faster by it. In convolutions the inputs are the channels. Layers whose
    number of inputs is no multiple of four are left as they are.

    Args:
        targets: shell-style pattern of the parameters to prune, for example `mlp.*`.
    """

    makes: ClassVar[frozenset[Property]] = frozenset({"sparsity"})

    targets: str = "*"

    def apply(self, model: nn.Module, context: StepContext) -> nn.Module:
        """Return a copy with zeros in it."""
        model = copy.deepcopy(model)
        names = target_weights(model, self.targets, self.name)
        fitting = [name for name in names if model.get_parameter(name).shape[1] % 4 == 0]
        if not fitting:
            raise StepError(
                f"prune_2_4: no layer has a multiple of four inputs: {', '.join(names)} would stay as they are"
            )
        for name in fitting:
            weight = model.get_parameter(name).data
            weight.masked_fill_(_smallest_two(weight), 0.0)
        left = [name for name in names if name not in fitting]
        if left:
            context.warnings.append(
                f"prune_2_4: not a multiple of four inputs, left dense: {', '.join(left)}"
            )
        context.warnings.append(
            "prune_2_4: no CPU runs the pattern faster; it pays on GPUs with sparse tensor cores, or in bytes once the "
            "file is entropy coded"
        )
        return model


def part(progress: Progress, number: int, of: int) -> Progress:
    """Progress of one of several equal parts of the work."""
    return lambda what, done: progress(f"round {number + 1} of {of}, {what}", (number + done) / of)


def _smallest_two(weight: Tensor) -> Tensor:
    """Mask bool of the weight's shape: true for the two smallest of every four along axis 1."""
    import torch

    fours = weight.movedim(1, -1).reshape(-1, 4)
    # Sorted stably, so that equals are always told apart in the same way.
    order = fours.abs().argsort(dim=1, stable=True)
    small = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, order[:, :2], True)
    return small.reshape(weight.movedim(1, -1).shape).movedim(-1, 1)
