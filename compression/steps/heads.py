"""Pruning of attention heads: whole heads are taken out, and the layers around them become smaller."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import Field

from compression.errors import StepError
from compression.steps.base import Need, Property, StepContext, TorchStep, register
from compression.steps.patterns import select
from compression.training import trimmed

if TYPE_CHECKING:
    from torch import Tensor, nn

_PARTS = ("query", "key", "value", "attended")
_BATCH = 32


@register("prune_heads")
class PruneHeads(TorchStep):
    """Remove the attention heads that matter least.

    A head's rows of query, key and value and its columns of the output projection are cut out, so that the network is
    smaller and faster. It works on attention modules that have Linear layers named `query`, `key`, `value` and
    `attended` (the projection of the joined heads) and a number `heads`, which is set anew and which `forward` must go
    by. In torch.nn.MultiheadAttention all heads together are as wide as its inputs, so it cannot lose any.

    Args:
        amount: share of the heads to remove.
        importance: `gradient`, the mean over rows of how much the loss changes with the head (Michel et al., "Are
            sixteen heads really better than one?", arXiv 1905.10650, section 4.1); or `l1`, the sum of its weights'
            sizes.
        scope: `layer` removes the same share of every layer; `network` the least important of all, as Michel et al.
            do, after dividing importances by their root sum of squares in each layer. A layer keeps at least one head.
        rows: rows of the train split that gradients are taken on, the first ones.
        targets: shell-style pattern of the attention modules, for example `encoder.layers.*`.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"training_data"})
    makes: ClassVar[frozenset[Property]] = frozenset({"shape"})

    amount: float = Field(gt=0, lt=1)
    importance: Literal["gradient", "l1"] = "gradient"
    scope: Literal["layer", "network"] = "layer"
    rows: int = Field(default=512, ge=1)
    targets: str = "*"

    @property
    def destroys(self) -> frozenset[Property]:
        """Removing heads changes which share of the rest is zero."""
        return frozenset({"sparsity"})

    def apply(self, model: nn.Module, context: StepContext) -> nn.Module:
        """Return a copy with fewer heads.

        Raises:
            StepError: no attention module matches, or `amount` is less than one head.
        """
        model = copy.deepcopy(model).eval()
        modules = self._modules(model)
        scores = (
            _gradients(model, modules, context, self.rows)
            if self.importance == "gradient"
            else _sizes(modules)
        )
        gone = self._least(scores)
        removed = sum(map(len, gone.values()))
        if not removed:
            heads = ", ".join(f"{name} with {len(score)}" for name, score in scores.items())
            raise StepError(
                f"prune_heads: amount {self.amount:g} removes no head of {heads}: raise it"
                + ("" if self.scope == "network" else ", or use scope: network")
            )
        for name, unwanted in gone.items():
            _cut(modules[name], unwanted)
        total = sum(map(len, scores.values()))
        context.progress(f"removed {removed} of {total} heads", 1.0)
        return model

    def _modules(self, model: nn.Module) -> dict[str, nn.Module]:
        from torch import nn

        named = dict(model.named_modules())
        able = {name: module for name, module in named.items() if _is_attention(module)}
        chosen = select(able, self.targets)
        if not chosen:
            there = (
                ", ".join(able) or "no module with Linear layers query, key, value and attended, and heads"
            )
            own = [name for name, module in named.items() if isinstance(module, nn.MultiheadAttention)]
            hint = (
                f"; {', '.join(own)}: torch.nn.MultiheadAttention cannot lose heads, write it as such a module"
                if own and not able
                else ""
            )
            raise StepError(
                f"prune_heads: targets {self.targets!r} matches nothing; the network has {there}{hint}"
            )
        users = Counter(getattr(module, part) for module in able.values() for part in _PARTS)
        for name in chosen:
            module = able[name]
            if shared := [part for part in _PARTS if users[getattr(module, part)] > 1]:
                raise StepError(
                    f"prune_heads: {name} shares its layer {shared[0]} with another part or module, which would lose "
                    "heads that it needs: leave it out of targets"
                )
            heads = cast("int", module.heads)
            if heads < 1 or any(size % heads for size in _inner(module)):
                raise StepError(
                    f"prune_heads: {name} has {heads} heads, by which its widths {_inner(module)} cannot be divided"
                )
        return {name: able[name] for name in chosen}

    def _least(self, scores: dict[str, Tensor]) -> dict[str, list[int]]:
        """Attention module -> the heads to remove."""
        if self.scope == "layer":
            numbers = {
                name: min(round(self.amount * len(score)), len(score) - 1) for name, score in scores.items()
            }
            return {
                name: sorted(score.argsort(stable=True)[: numbers[name]].tolist())
                for name, score in scores.items()
            }
        wanted = round(self.amount * sum(map(len, scores.values())))
        # The best head of a layer stays.
        order = sorted(
            (value / max(float(score.norm()), 1e-12), name, head)
            for name, score in scores.items()
            for head, value in enumerate(score.tolist())
            if head != int(score.argmax())
        )
        gone: dict[str, list[int]] = {name: [] for name in scores}
        for _, name, head in order[:wanted]:
            gone[name].append(head)
        return {name: sorted(heads) for name, heads in gone.items()}


def _is_attention(module: nn.Module) -> bool:
    from torch import nn

    parts = [getattr(module, part, None) for part in _PARTS]
    # Of this very class: subclasses may keep their weights elsewhere.
    return all(type(part) is nn.Linear for part in parts) and type(getattr(module, "heads", None)) is int


def _inner(module: nn.Module) -> tuple[int, ...]:
    """Widths of what the heads share out."""
    query, key, value, attended = (cast("nn.Linear", getattr(module, part)) for part in _PARTS)
    return query.out_features, key.out_features, value.out_features, attended.in_features


def _sizes(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Sum of the absolute weights of each head, float [heads]."""
    import torch

    scores = {}
    for name, module in modules.items():
        heads = cast("int", module.heads)
        query, key, value, attended = (
            cast("nn.Linear", getattr(module, part)).weight.detach() for part in _PARTS
        )
        parts = [weight.abs().reshape(heads, -1).sum(1) for weight in (query, key, value, attended.T)]
        scores[name] = torch.stack(parts).sum(0)
    return scores


def _gradients(
    model: nn.Module, modules: dict[str, nn.Module], context: StepContext, count: int
) -> dict[str, Tensor]:
    """Mean over rows of |derivative of the loss by a factor on the head's output|, float [heads]."""
    import torch
    from torch.nn import functional

    rows = context.data.rows("train").take(slice(0, count))
    labels = torch.tensor(rows.labels)
    inputs = {name: torch.from_numpy(array) for name, array in rows.tensors.items()}
    mixed: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            mixed[name] = given[0]

        return cast("nn.Module", modules[name].attended).register_forward_pre_hook(hook)

    hooks = [keep(name) for name in modules]
    scores = {name: torch.zeros(cast("int", module.heads)) for name, module in modules.items()}
    try:
        for start in range(0, len(labels), _BATCH):
            batch = trimmed(model, {name: tensor[start : start + _BATCH] for name, tensor in inputs.items()})
            with torch.enable_grad():
                # Rows do not touch each other, so the sum's derivative has each row's own.
                loss = functional.cross_entropy(
                    model(**batch), labels[start : start + _BATCH], reduction="sum"
                )
                there = [name for name in modules if name in mixed and mixed[name].requires_grad]
                found = torch.autograd.grad(loss, [mixed[name] for name in there], allow_unused=True)
            for name, gradient in zip(there, found, strict=True):
                if gradient is None:
                    continue
                product = (mixed[name] * gradient).detach()
                by_head = product.reshape(
                    len(product), -1, len(scores[name]), product.shape[-1] // len(scores[name])
                )
                scores[name] += by_head.sum((1, 3)).abs().sum(0) / len(labels)
            mixed.clear()
    finally:
        for handle in hooks:
            handle.remove()  # type: ignore[attr-defined]
    return scores


def _cut(module: nn.Module, heads: list[int]) -> None:
    """Take heads out of an attention module, in place."""
    import torch
    from torch import nn

    before = cast("int", module.heads)
    left = [head for head in range(before) if head not in set(heads)]
    for part in _PARTS:
        layer = cast("nn.Linear", getattr(module, part))
        axis = 1 if part == "attended" else 0
        width = layer.weight.shape[axis] // before
        kept = torch.cat([torch.arange(head * width, (head + 1) * width) for head in left])
        layer.weight = nn.Parameter(layer.weight.detach().index_select(axis, kept))
        if axis == 0:
            layer.out_features = len(kept)
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.detach().index_select(0, kept))
        else:
            layer.in_features = len(kept)
    setattr(module, "heads", len(left))  # noqa: B010  # a plain number, which torch's types do not know of
