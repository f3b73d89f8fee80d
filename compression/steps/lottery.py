"""Lottery tickets: a sparse part of the untrained network that trains as well as the whole."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from compression.errors import StepError
from compression.steps.base import Property, StepContext, register
from compression.steps.prune import EXTREME, PruneMagnitude, target_weights
from compression.steps.sparsify import part
from compression.steps.train import Training, zero_masks
from compression.training import seeded

if TYPE_CHECKING:
    from torch import nn


@register("lottery_ticket")
class LotteryTicket(Training):
    """Prune the trained network, set what is left back to its initial weights, train that; in rounds.

    Frankle & Carbin, "The lottery ticket hypothesis" (1803.03635), section 2, iterative pruning over all layers
    together. The initial weights are those of `network()` under seed 0, as `Workload.train` draws them unless the
    workload overrides it with something else. For one that does, `from_scratch` makes the ticket true: the step then
    trains the initial network itself before the first round, and the model it was given has no part in it.

    Args:
        amount: share of the weights that is zero in the end.
        rounds: each zeroes the same share of what is left.
        from_scratch: train the initial network for the first round, in place of the given model.
        targets: shell-style pattern of the parameters to prune.
        allow_extreme: needed to go over 95%.
        epochs: passes over the train split in each round.
    """

    makes: ClassVar[frozenset[Property]] = frozenset({"sparsity"})

    amount: float = Field(gt=0, lt=1)
    rounds: int = Field(default=3, ge=1, le=50)
    from_scratch: bool = False
    targets: str = "*"
    allow_extreme: bool = False
    epochs: int = Field(default=5, ge=1, le=1000)

    @model_validator(mode="after")
    def _sane(self) -> LotteryTicket:
        if self.amount > EXTREME and not self.allow_extreme:
            raise ValueError(
                f"amount over {EXTREME} leaves next to nothing; set allow_extreme: true if meant"
            )
        return self

    @property
    def destroys(self) -> frozenset[Property]:
        """The network starts afresh, in its first size: nothing of an earlier step is left."""
        return frozenset({"shape", "sparsity", "codebook"})

    def apply(self, model: nn.Module, context: StepContext) -> nn.Module:
        """Return the trained ticket."""
        target_weights(model, self.targets, self.name)
        with seeded(0):
            initial = context.workload.network()
        if _shapes(initial) != _shapes(model):
            raise StepError(
                "lottery_ticket: the network has other layers than network() of the workload: put lottery_ticket first"
            )
        trainings = self.rounds + self.from_scratch
        trained = model
        if self.from_scratch:
            trained = copy.deepcopy(initial)
            self.train(trained, context, progress=part(context.progress, 0, trainings))
        for number in range(1, self.rounds + 1):
            gone = 1 - (1 - self.amount) ** (number / self.rounds)
            cut = PruneMagnitude(amount=gone, targets=self.targets, allow_extreme=True)
            masks = zero_masks(cut.apply(trained, context))
            trained = copy.deepcopy(initial)
            for name, mask in masks.items():
                trained.get_parameter(name).data.masked_fill_(mask == 0, 0.0)
            self.train(
                trained,
                context,
                masks,
                part(context.progress, trainings - self.rounds + number - 1, trainings),
            )
        return trained


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
