"""Steps that train: recovery after pruning, and distillation into a smaller network."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, JsonValue, field_validator

from compression.data import Rows, drop_rows
from compression.errors import RecipeError, StepError
from compression.recipe import StepSpec
from compression.steps.base import Need, Property, StepContext, TorchStep, build, register
from compression.training import Objective, fit, predict_logits, seeded
from compression.workload import Progress

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


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

    Hinton, Vinyals, Dean: "Distilling the knowledge in a neural network" (arXiv 1503.02531). With `hidden` the loss is
    the triple one of Sanh et al., "DistilBERT" (arXiv 1910.01108), section 3, and with `init` the student's layers
    start from the teacher's, as there. With `hints` a first stage of training comes before, in which the student's
    layers up to a hint learn to say what the teacher's say (Romero et al., "FitNets", arXiv 1412.6550, section 2).

    Layers are named as `named_modules` names them, for example `encoder.layers.1`; the values of a layer are its
    output, [N, F], [N, L, F] or [N, C, H, W]. Values of padding, of which a network's `padding_mask` tells, are left
    out.

    Args:
        width: handed to the workload's `student(width)`.
        temperature: how much the teacher's answers are softened; 3 to 5 is usual.
        alpha: weight of the true labels; the teacher has 1 - alpha.
        init: layer of the student -> layer of the teacher whose weights, all of the same shapes, it starts from. A name
            may be a pattern with one `*` on either side: `encoder.layers.*: encoder.layers.*` copies the layers of the
            same number.
        reduce: steps on the network that are applied to the student before it is trained, such as `low_rank`.
        hints: layer of the student -> layer of the teacher. Where their widths differ, a linear map (for images a
            1x1 convolution) that is trained along and then thrown away goes between.
        hint_epochs: epochs of the first stage; the loss is the mean squared difference of the hints.
        hidden: layer of the student -> layer of the teacher, of the same width, for the cosine of their values.
        cosine: weight of one less that cosine, beside the other two terms of the loss.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"training_data", "student"})
    makes: ClassVar[frozenset[Property]] = frozenset({"shape"})

    width: int = Field(ge=1)
    temperature: float = Field(default=4.0, gt=0)
    alpha: float = Field(default=0.3, ge=0, le=1)
    epochs: int = Field(default=8, ge=1, le=1000)
    lr: float = Field(default=3e-3, gt=0)
    init: dict[str, str] = Field(default_factory=dict)
    reduce: tuple[StepSpec, ...] = ()
    hints: dict[str, str] = Field(default_factory=dict)
    hint_epochs: int = Field(default=1, ge=1, le=1000)
    hidden: dict[str, str] = Field(default_factory=dict)
    cosine: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    @field_validator("reduce")
    @classmethod
    def _on_the_network(cls, specs: tuple[StepSpec, ...]) -> tuple[StepSpec, ...]:
        for spec in specs:
            try:
                step = build(spec)
            except RecipeError as error:
                raise ValueError(str(error)) from None
            if step.level != "torch":
                raise ValueError(
                    f"{spec.step} does not work on the network, and a student is trained after it"
                )
            if step.then or step.makes & {"sparsity", "codebook"}:
                raise ValueError(
                    f"training the student would undo what {spec.step} makes: put it after distill"
                )
        return specs

    @property
    def destroys(self) -> frozenset[Property]:
        """The student starts afresh: nothing of an earlier step's shape or weights is left."""
        return frozenset({"shape", "sparsity", "codebook"})

    def apply(self, model: nn.Module, context: StepContext) -> nn.Module:
        """Return a trained student of `model`.

        Raises:
            StepError: also if a layer is named that is not there, or if two layers do not go together.
        """
        if not 1 < self.temperature <= 10:
            context.warnings.append(
                f"distill: temperature {self.temperature:g} is outside 1 to 10: "
                "at 1 the teacher adds little to the labels, over 10 its answers all look alike"
            )
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        rows = self._rows(context)
        with seeded(context.seed):
            student = context.workload.student(self.width)
        copy_layers(teacher, student, self.init)
        for spec in self.reduce:
            student = build(spec).apply(student, context)
        if self.hints:
            with Matched(teacher, student, self.hints, "mean_square", rows.tensors, context.seed) as hints:
                self._fit(student, rows, context, self.hint_epochs, objective=hints, answers=False)
        soft = predict_logits(teacher, rows.tensors) if self.alpha < 1 else None
        if not self.hidden:
            self._fit(student, rows, context, self.epochs, teacher_logits=soft)
            return student
        with Matched(
            teacher, student, self.hidden, "cosine", rows.tensors, context.seed, self.cosine
        ) as hidden:
            self._fit(student, rows, context, self.epochs, teacher_logits=soft, objective=hidden)
        return student

    def _fit(
        self,
        student: nn.Module,
        rows: Rows,
        context: StepContext,
        epochs: int,
        *,
        teacher_logits: np.ndarray | None = None,
        objective: Objective | None = None,
        answers: bool = True,
    ) -> None:
        fit(
            student,
            rows.tensors,
            rows.labels,
            epochs=epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            balanced=context.workload.metric != "accuracy",
            bfloat16=context.workload.bfloat16,
            teacher_logits=teacher_logits,
            temperature=self.temperature,
            alpha=self.alpha,
            objective=objective,
            answers=answers,
            seed=context.seed,
            progress=context.progress,
        )


def copy_layers(teacher: nn.Module, student: nn.Module, names: Mapping[str, str]) -> None:
    """Start layers of a student, in place, from layers of its teacher.

    Args:
        names: layer of the student -> layer of the teacher; both may have one `*` for the same text.

    Raises:
        StepError: a name matches no layer, or the weights of two layers differ in name or shape.
    """
    for own, other in names.items():
        pairs = {name: other.replace("*", star) for name, star in _matches(student, own, "init", "student")}
        for name, source in pairs.items():
            weights = _layer(teacher, source, "init", "teacher").state_dict()
            layer = student.get_submodule(name)
            shapes = {key: tuple(value.shape) for key, value in weights.items()}
            wanted = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
            if shapes != wanted or not (shapes or "*" in own):
                raise StepError(
                    f"distill: init cannot fill {name} of the student, with {_shapes(wanted)}, from {source} of the "
                    f"teacher, with {_shapes(shapes)}"
                )
            layer.load_state_dict(weights)


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name or 'weight'} {list(shape)}" for name, shape in shapes.items()) or "no weights"


def _matches(model: nn.Module, pattern: str, field: str, whose: str) -> list[tuple[str, str]]:
    """Layers whose names match, each with what the `*` stands for, which has no dot in it."""
    expression = re.compile(re.escape(pattern).replace(r"\*", "([^.]*)", 1))
    found = [
        (name, match) for name, _ in model.named_modules() if name and (match := expression.fullmatch(name))
    ]
    if not found:
        raise StepError(
            f"distill: {field} {pattern!r} matches no layer of the {whose}; it has {_there(model)}"
        )
    return [(name, match[1] if match.groups() else "") for name, match in found]


def _layer(model: nn.Module, name: str, field: str, whose: str) -> nn.Module:
    found = dict(model.named_modules()).get(name) if name else None
    if found is None:
        raise StepError(f"distill: {field} {name!r} matches no layer of the {whose}; it has {_there(model)}")
    return found


def _there(model: nn.Module) -> str:
    return ", ".join(name for name, _ in model.named_modules() if name)


class Matched:
    """A term of the loss that draws the values of some layers of a student to those of its teacher.

    While it is entered, what the student's layers put out is kept from one call of the student to the next. The teacher
    is asked batch by batch, as its values of all rows would not fit into memory.

    Args:
        layers: layer of the student -> layer of the teacher.
        how: `mean_square` of the difference, through a trained map where the widths differ; or one less the `cosine`.
        tensors: some rows, by which the shapes of values are found out.
        weight: of the term; it is a mean over values and layers.

    Raises:
        StepError: there is no such layer, or the values of two layers do not go together.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        layers: Mapping[str, str],
        how: Literal["mean_square", "cosine"],
        tensors: Mapping[str, np.ndarray],
        seed: int,
        weight: float = 1.0,
    ) -> None:
        self._teacher, self._student, self._how, self._weight = teacher, student, how, weight
        field = "hints" if how == "mean_square" else "hidden"
        self._pairs = list(layers.items())
        self._modules = [
            (_layer(student, own, field, "student"), _layer(teacher, other, field, "teacher"))
            for own, other in self._pairs
        ]
        self._own: dict[int, Tensor] = {}
        self._goal: dict[int, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._maps: list[nn.Module | None] = []
        self._find_maps(tensors, field, seed)

    def __enter__(self) -> Matched:
        for place, (own, other) in enumerate(self._modules):
            self._hooks.append(own.register_forward_hook(_keeper(self._own, place)))
            self._hooks.append(other.register_forward_hook(_keeper(self._goal, place)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._own.clear()
        self._goal.clear()

    def parameters(self) -> list[nn.Parameter]:
        """Weights of the maps."""
        return [parameter for part in self._maps if part is not None for parameter in part.parameters()]

    def loss(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The term for the batch that the student was last given."""
        import torch

        with torch.no_grad():
            self._teacher(**inputs)
        name = getattr(self._student, "padding_mask", None)
        shown = None if name is None else inputs[name] != 0
        terms = [
            self._distance(self._own[place], self._goal[place].float(), self._maps[place], shown)
            for place in range(len(self._pairs))
        ]
        return self._weight * torch.stack(terms).mean()

    def _distance(self, own: Tensor, goal: Tensor, through: nn.Module | None, shown: Tensor | None) -> Tensor:
        from torch.nn import functional

        if through is not None:
            own = through(own)
        own = own.float()
        if shown is not None and own.dim() == 3 and own.shape[:2] == shown.shape:
            own, goal = own[shown], goal[shown]
        if self._how == "mean_square":
            return functional.mse_loss(own, goal)
        distance: Tensor = 1 - functional.cosine_similarity(own, goal, dim=1 if own.dim() == 4 else -1)
        return distance.mean()

    def _find_maps(self, tensors: Mapping[str, np.ndarray], field: str, seed: int) -> None:
        """See what the layers put out, and make the maps."""
        rows = {name: array[:2] for name, array in tensors.items()}
        with self:
            predict_logits(self._student, rows)
            predict_logits(self._teacher, rows)
            for place, (own_name, other_name) in enumerate(self._pairs):
                own, goal = self._own.get(place), self._goal.get(place)
                if own is None or goal is None:
                    raise StepError(
                        f"distill: {field}: {own_name if own is None else other_name} puts out no tensor of numbers"
                    )
                self._maps.append(self._map(own, goal, f"{field}: {own_name} and {other_name}", seed))

    def _map(self, own: Tensor, goal: Tensor, where: str, seed: int) -> nn.Module | None:
        from torch import nn

        axis = 1 if own.dim() == 4 else own.dim() - 1
        sizes, wanted = list(own.shape), list(goal.shape)
        width, goal_width = (sizes.pop(axis), wanted.pop(axis)) if own.dim() == goal.dim() else (0, 0)
        if own.dim() != goal.dim() or sizes != wanted or (self._how == "cosine" and width != goal_width):
            raise StepError(
                f"distill: {where} do not go together: their values are {list(own.shape)} and {list(goal.shape)}"
                + ("; the cosine needs the same width" if self._how == "cosine" else "")
            )
        if width == goal_width:
            return None
        with seeded(seed):
            return (
                nn.Conv2d(width, goal_width, 1)
                if axis == 1 and own.dim() == 4
                else nn.Linear(width, goal_width)
            )


def _keeper(kept: dict[int, Tensor], place: int) -> Callable[[nn.Module, object, object], None]:
    import torch

    def keep(_module: nn.Module, _inputs: object, output: object) -> None:
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(first, torch.Tensor) and first.is_floating_point() and first.dim() >= 2:
            kept[place] = first

    return keep
