"""Batch norms folded into the layers before them, as the export would do it anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def fold_batch_norms(model: nn.Module, example: dict[str, Tensor]) -> list[str]:
    """Fold batch norms into the convolution or linear layer that they directly follow, in place.

    A pair is found by running the network: what one returns, the other takes, and no other operation does. A fold that
    changes the answers all the same is taken back.

    Args:
        model: left in eval mode.
        example: inputs by the name that `forward` has for them; a few tens of rows will do.

    Returns:
        Names of the layers that have taken a batch norm in.
    """
    import torch
    from torch import nn
    from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

    model.eval()
    folded = []
    before = _answer(model, example)
    for layer_name, norm_name in _pairs(model, example):
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        if isinstance(layer, nn.Linear) and (norm.weight is None or norm.num_features != layer.out_features):
            continue  # torch's own folding knows neither
        fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        _put(model, layer_name, fuse(layer, norm))
        _put(model, norm_name, nn.Identity())
        if torch.allclose(_answer(model, example), before, rtol=1e-3, atol=1e-4):
            folded.append(layer_name)
        else:
            _put(model, layer_name, layer)
            _put(model, norm_name, norm)
    return folded


def _pairs(model: nn.Module, example: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Names of layers and of the norms that alone read their outputs."""
    import torch
    from torch import nn
    from torch.overrides import TorchFunctionMode
    from torch.utils._pytree import tree_leaves

    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    made: dict[int, str] = {}
    kept: list[Tensor] = []  # an id is only one's own while the tensor lives
    taking: list[str] = []  # the norm that runs now
    read_elsewhere: set[str] = set()
    found: list[tuple[str, str]] = []
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, layers):

            def note(_module: nn.Module, _inputs: object, output: Tensor, name: str = name) -> None:
                kept.append(output)
                made[id(output)] = name

            hooks.append(module.register_forward_hook(note))
        elif isinstance(module, norms) and module.track_running_stats:

            def look(_module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                taking.append(name)
                if id(inputs[0]) in made:
                    found.append((made[id(inputs[0])], name))

            def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
                taking.pop()

            hooks += [module.register_forward_pre_hook(look), module.register_forward_hook(leave)]

    class Reads(TorchFunctionMode):
        """Notes whose outputs are read by anything but a norm; what gives no tensor, as a shape, reads none."""

        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if not taking and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
                read_elsewhere.update(
                    made[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in made
                )
            return result

    try:
        with Reads():
            _answer(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    # One that is used twice belongs to no pair.
    ends = [name for pair in found for name in pair]
    return [
        pair
        for pair in found
        if ends.count(pair[0]) == ends.count(pair[1]) == 1 and pair[0] not in read_elsewhere
    ]


def _answer(model: nn.Module, example: dict[str, Tensor]) -> Tensor:
    import torch

    with torch.no_grad():
        answer: Tensor = model(**example)
    return answer


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
