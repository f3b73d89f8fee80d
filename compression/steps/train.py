"""Steps that train: recovery after pruning, and distillation into a smaller network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, JsonValue

from compression.data import Rows, drop_rows
from compression.steps.base import Need, Property, StepContext, TorchStep, register
from compression.training import fit, predict_logits, seeded
from compression.workload import Progress

if TYPE_CHECKING:
    from torch import Tensor, nn


class Training(TorchStep):
    """Parameters of every step that trains.

    Args:
        epochs: passes over the train split.
        lr: peak learning rate.
        batch_size: rows per update.
        drop_rows: raw field -> values whose rows are left out of training.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"training_data"})

    epochs: int = Field(default=2, ge=1, le=1000)
    lr: float = Field(default=1e-3, gt=0)
    batch_size: int = Field(default=512, ge=2)
    drop_rows: dict[str, list[JsonValue]] = Field(default_factory=dict)

    def _rows(self, context: StepContext) -> Rows:
        return drop_rows(context.data.rows("train"), self.drop_rows)

    def train(
        self,
        model: nn.Module,
        context: StepContext,
        masks: Mapping[str, Tensor] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Train the network in place on the labels; weights stay zero where their mask is."""
        rows = self._rows(context)
        fit(
            model,
            rows.tensors,
            rows.labels,
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            balanced=context.workload.metric != "accuracy",
            bfloat16=context.workload.bfloat16,
            masks=masks,
            seed=context.seed,
            progress=progress or context.progress,
        )


def zero_masks(model: nn.Module) -> dict[str, Tensor]:
    """Masks for `fit` that keep zeroed weights zero, for the parameters that have any."""
    # The zeros are the mask: a float that training left at exactly 0 is a pruned one.
    masks = {name: (weight != 0).float() for name, weight in model.named_parameters() if weight.dim() > 1}
    return {name: mask for name, mask in masks.items() if not mask.all()}


@register("finetune")
class FineTune(Training):
    """Train on after a step that hurt the network.

    Args:
        keep_sparsity: weights of pruned layers that are exactly zero stay zero.
    """

    keep_sparsity: bool = True

    @property
    def destroys(self) -> frozenset[Property]:
        """Dense training fills zeroed weights again, and every weight goes its own way."""
        return frozenset({"codebook"} if self.keep_sparsity else {"codebook", "sparsity"})

    def apply(self, model: nn.Module, context: StepContext) -> nn.Module:
        """Return a trained copy."""
        model = copy.deepcopy(model)
        self.train(model, context, zero_masks(model) if self.keep_sparsity else None)
        return model


@register("distill")
class Distill(Training):
    """Train a smaller network on the labels and on the softened answers of the model it replaces.

    Hinton, Vinyals, Dean: "Distilling the knowledge in a neural network" (arXiv 1503.02531).

    Args:
        width: handed to the workload's `student(width)`.
        temperature: how much the teacher's answers are softened; 3 to 5 is usual.
        alpha: weight of the true labels; the teacher has 1 - alpha.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"training_data", "student"})
    makes: ClassVar[frozenset[Property]] = frozenset({"shape"})

    width: int = Field(ge=1)
    temperature: float = Field(default=4.0, gt=0)
    alpha: float = Field(default=0.3, ge=0, le=1)
    epochs: int = Field(default=8, ge=1, le=1000)
    lr: float = Field(default=3e-3, gt=0)

    @property
    def destroys(self) -> frozenset[Property]:
        """The student starts afresh: nothing of an earlier step's shape or weights is left."""
        return frozenset({"shape", "sparsity", "codebook"})

    def apply(self, model: nn.Module, context: StepContext) -> nn.Module:
        """Return a trained student of `model`."""
        if not 1 < self.temperature <= 10:
            context.warnings.append(
                f"distill: temperature {self.temperature:g} is outside 1 to 10: "
                "at 1 the teacher adds little to the labels, over 10 its answers all look alike"
            )
        rows = self._rows(context)
        with seeded(context.seed):
            student = context.workload.student(self.width)
        fit(
            student,
            rows.tensors,
            rows.labels,
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            balanced=context.workload.metric != "accuracy",
            bfloat16=context.workload.bfloat16,
            teacher_logits=predict_logits(model, rows.tensors) if self.alpha < 1 else None,
            temperature=self.temperature,
            alpha=self.alpha,
            seed=context.seed,
            progress=context.progress,
        )
        return student
