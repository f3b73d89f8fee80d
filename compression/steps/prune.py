"""Pruning: zero the smallest weights, or take whole neurons and channels out."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from compression.errors import StepError
from compression.export import quiet
from compression.steps.base import Property, StepContext, TorchStep, register
from compression.steps.patterns import select

if TYPE_CHECKING:
    from torch import Tensor, nn

EXTREME = 0.95


@register("prune_magnitude")
class PruneMagnitude(TorchStep):
    """Zero the weights of smallest magnitude over all linear and convolution layers together.

    The file keeps its size, as ONNX stores zeros like other numbers; fewer non-zero weights are what other
    steps and archive compression build on. Han et al., "Learning both weights and connections" (1506.02626).

    Args:
        amount: share of these weights to zero.
        targets: shell-style pattern of the parameters to prune, for example `mlp.*`.
        allow_extreme: needed to go over 95%.
    """

    makes: ClassVar[frozenset[Property]] = frozenset({"sparsity"})

    amount: float = Field(gt=0, lt=1)
    targets: str = "*"
    allow_extreme: bool = False

    @model_validator(mode="after")
    def _sane(self) -> PruneMagnitude:
        if self.amount > EXTREME and not self.allow_extreme:
            raise ValueError(
                f"amount over {EXTREME} leaves next to nothing; set allow_extreme: true if meant"
            )
        return self

    def apply(self, model: nn.Module, context: StepContext) -> nn.Module:  # noqa: ARG002
        """Return a copy with zeros in it."""
        from torch.nn.utils import prune

        model = copy.deepcopy(model)
        names = target_weights(model, self.targets, self.name)
        chosen = [(model.get_submodule(name.rpartition(".")[0]), "weight") for name in names]
        prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=self.amount)
        for module, parameter in chosen:
            prune.remove(module, parameter)
            # Makes 0 of -0, which a file would have to tell apart.
            module.get_parameter(parameter).data.add_(0.0)
        return model


@register("prune_structured")
class PruneStructured(TorchStep):
    """Remove the neurons or channels whose weights have the smallest L1 norm, and all that hangs on them.

    Embeddings and the output layer keep their sizes. Built on torch-pruning's dependency graph (Fang et al.,
    "DepGraph", arXiv 2301.12900). Layers whose outputs are added to each other lose the same neurons, or none if one of
    them is not to lose any.

    Args:
        amount: share of the neurons of every hidden layer to remove.
        targets: shell-style pattern of the linear and convolution layers whose neurons may go, for example `*.inner`
            for the feed-forward layers of a transformer; the others lose only the inputs that came from these.
    """

    makes: ClassVar[frozenset[Property]] = frozenset({"shape"})

    amount: float = Field(gt=0, le=EXTREME)
    targets: str = "*"

    @property
    def destroys(self) -> frozenset[Property]:
        """Removing neurons changes which share of the rest is zero."""
        return frozenset({"sparsity"})

    def apply(self, model: nn.Module, context: StepContext) -> nn.Module:
        """Return a copy with smaller layers."""
        import torch
        import torch_pruning

        model = copy.deepcopy(model).eval()
        rows = context.data.rows("train").take(slice(0, 2))
        example = {name: torch.from_numpy(array) for name, array in rows.tensors.items()}
        before = sum(parameter.numel() for parameter in model.parameters())
        shape = tuple(model(**example).shape)
        chosen = _targets(model, example, self.targets)
        keep = [output_layer(model, example)]
        keep += [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        keep += [model.get_submodule(name) for name in _dense(model) if name not in chosen]
        with quiet():
            pruner = torch_pruning.pruner.BasePruner(
                model,
                example,
                importance=torch_pruning.importance.MagnitudeImportance(p=1),
                pruning_ratio=self.amount,
                max_pruning_ratio=EXTREME,
                ignored_layers=keep,
            )
            pruner.step()
        if tuple(model(**example).shape) != shape:
            raise StepError(
                "prune_structured: the network's output shape changed; its layers cannot be pruned this way"
            )
        if sum(parameter.numel() for parameter in model.parameters()) >= before:
            raise StepError(
                f"prune_structured: no neuron could be removed of {', '.join(chosen)}: each is too small for the "
                "amount, or is added to one that keeps its size, such as an output, an embedding or a layer outside of "
                "targets"
            )
        # The pruner leaves gradients of its tracing behind.
        return model.requires_grad_(True)


def hidden_neurons(model: nn.Module, context: StepContext, targets: str = "*") -> int:
    """Neurons and channels of all layers that `prune_structured` may take some from.

    Raises:
        StepError: no layer matches `targets`.
    """
    import torch

    rows = context.data.rows("train").take(slice(0, 2))
    example = {name: torch.from_numpy(array) for name, array in rows.tensors.items()}
    still = copy.deepcopy(model).eval()
    with torch.no_grad():
        names = _targets(still, example, targets)
    return sum(int(still.get_parameter(f"{name}.weight").shape[0]) for name in names)


def target_weights(model: nn.Module, pattern: str, step: str) -> list[str]:
    """Names of the weights of linear and convolution layers that match.

    Raises:
        StepError: none does.
    """
    names = select(weight_names(model), pattern)
    if not names:
        there = ", ".join(weight_names(model)) or "no linear or convolution layer"
        raise StepError(f"{step}: targets {pattern!r} matches nothing; the network has {there}")
    return names


def weight_names(model: nn.Module) -> list[str]:
    """Names of the weights of linear and convolution layers, for example `mlp.0.weight`."""
    return [f"{name}.weight" if name else "weight" for name in _dense(model)]


def _dense(model: nn.Module) -> list[str]:
    """Names of the linear and convolution layers."""
    from torch import nn

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _targets(model: nn.Module, example: dict[str, Tensor], pattern: str) -> list[str]:
    """Names of the hidden linear and convolution layers that match.

    Raises:
        StepError: none does.
    """
    ran = _ran(model, example)
    dense = {model.get_submodule(name): name for name in _dense(model)}
    # The output's size is the number of classes, and a norm on it hangs on the layer before.
    last = next((layer for layer in reversed(ran) if layer in dense), None)
    hidden = [name for layer, name in dense.items() if layer is not last]
    names = select(hidden, pattern)
    if not names:
        there = ", ".join(hidden) or "no hidden linear or convolution layer"
        raise StepError(f"prune_structured: targets {pattern!r} matches nothing; the network has {there}")
    return names


def output_layer(model: nn.Module, example: dict[str, Tensor]) -> nn.Module:
    """The layer with weights that runs last: its size is the number of classes."""
    return _ran(model, example)[-1]


def _ran(model: nn.Module, example: dict[str, Tensor]) -> list[nn.Module]:
    """The layers with weights, in the order they run."""
    ran: list[nn.Module] = []
    layers = [
        module for module in model.modules() if next(module.parameters(recurse=False), None) is not None
    ]
    hooks = [layer.register_forward_hook(lambda module, _in, _out: ran.append(module)) for layer in layers]
    try:
        model(**example)
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        raise StepError("the network has no layers with weights, so there are no neurons to remove")
    return ran
