"""Weight sharing: few different weights in each layer."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from compression.errors import StepError
from compression.folding import fold_batch_norms
from compression.steps.base import Property, StepContext, register
from compression.steps.patterns import select
from compression.steps.train import Training, zero_masks

if TYPE_CHECKING:
    from torch import Tensor, nn

_ROUNDS = 300
_CHECKED_ROWS = 32
"""Rows on which folding is checked; that it may be done at all is read off the network."""


@register("cluster_weights")
class ClusterWeights(Training):
    """Give each layer a codebook of weights by k-means, then train the codebooks.

    Every weight becomes the nearest of its layer's centroids; in training the gradients of the weights that share one
    are summed, and the biases learn along. Zeros are kept out of the codebooks and stay zero. Han et al., "Deep
    Compression" (1510.00149), section 3. The ONNX file keeps its size until it is entropy coded. Batch norms right
    after a layer are folded into it first: the export does that, and would give each channel a codebook of its own.

    Args:
        clusters: centroids of each layer, besides zero.
        init: where they start: `linear`, evenly over the range of the weights, without the gap that pruning leaves
            around zero, which keeps the few large ones well apart; `density`, evenly over their ranks. A centroid that
            no weight is near to is moved to where weights are spread most.
        targets: shell-style pattern of the weights of linear, convolution and embedding layers.
        epochs: passes over the train split to train the codebooks; 0 for none.
    """

    makes: ClassVar[frozenset[Property]] = frozenset({"codebook"})

    clusters: int = Field(default=32, ge=2, le=256)
    init: Literal["linear", "density"] = "linear"
    targets: str = "*"
    epochs: int = Field(default=2, ge=0, le=1000)

    def apply(self, model: nn.Module, context: StepContext) -> nn.Module:
        """Return a copy with shared weights."""
        import torch
        from torch.nn.utils import parametrize

        rows = context.data.rows("train").take(slice(0, _CHECKED_ROWS))
        model = copy.deepcopy(model)
        fold_batch_norms(model, {name: torch.from_numpy(array) for name, array in rows.tensors.items()})
        result = copy.deepcopy(model)
        layers = _layers(model)
        chosen = {name: layers[name] for name in select(layers, self.targets)}
        if not chosen:
            there = ", ".join(layers) or "no linear, convolution or embedding layer of its own"
            raise StepError(
                f"cluster_weights: targets {self.targets!r} matches nothing; the network has {there}"
            )
        # Those of other layers; here the indices know the zeros.
        masks = {name: mask for name, mask in zero_masks(model).items() if name not in chosen}
        for number, (name, layer) in enumerate(chosen.items()):
            context.progress(f"clustering {name}", 0.2 * number / len(chosen))
            shared = _shared(layer.weight.detach(), self.clusters, self.init)
            # A codebook has another shape than the weight that it stands for, which counts as unsafe.
            parametrize.register_parametrization(layer, "weight", shared, unsafe=True)
        if self.epochs:
            self.train(model, context, masks, lambda what, done: context.progress(what, 0.2 + 0.8 * done))
        state = {
            name: value
            for name, value in model.state_dict().items()
            if ".parametrizations." not in f".{name}"
        }
        weights = {name: layer.weight.detach() for name, layer in chosen.items()}
        if all(torch.equal(weight, result.get_parameter(name)) for name, weight in weights.items()):
            raise StepError(
                f"cluster_weights: no layer has more than {self.clusters} different weights; use fewer clusters"
            )
        # Into a network that never had codebooks: taking them off a layer leaves traces that no exporter takes.
        result.load_state_dict(state | weights)
        return result.eval()


def centroids(values: np.ndarray, clusters: int, init: Literal["linear", "density"]) -> np.ndarray:
    """Centroids float64 [at most `clusters`] of numbers by Lloyd's k-means, rising.

    In one dimension a cluster is a stretch of the sorted numbers, so that a round is a search for the ends of the
    stretches; it gives the same on every machine.
    """
    ordered = np.sort(values.astype(np.float64).ravel())
    different = np.unique(ordered)
    if len(different) <= clusters:
        return different
    sums = np.concatenate(([0.0], np.cumsum(ordered)))
    if init == "linear":
        centers = _evenly(ordered, clusters)
    else:
        centers = np.quantile(ordered, (np.arange(clusters) + 0.5) / clusters)
    for _ in range(_ROUNDS):
        ends = np.searchsorted(ordered, (centers[1:] + centers[:-1]) / 2)
        starts, stops = np.concatenate(([0], ends)), np.concatenate((ends, [len(ordered)]))
        sizes = stops - starts
        moved = np.where(sizes > 0, (sums[stops] - sums[starts]) / np.maximum(sizes, 1), centers)
        _use_idle(moved, ordered, starts, stops)
        if np.array_equal(moved, centers):
            break
        centers = np.sort(moved)
    return centers


def _evenly(ordered: np.ndarray, clusters: int) -> np.ndarray:
    """Points evenly over the range of rising numbers, without the gap between negative and positive ones."""
    below, above = ordered[ordered < 0], ordered[ordered >= 0]
    gap = above[0] - below[-1] if len(below) and len(above) else 0.0
    points = np.linspace(ordered[0], ordered[-1] - gap, clusters)
    # A point at the gap's very edge stays below it.
    return np.where(points > below[-1], points + gap, points) if gap else points


def _use_idle(centers: np.ndarray, ordered: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> None:
    """Move centroids of no values, in place, to where they halve the widest and fullest stretches of others."""
    sizes = stops - starts
    idle = np.flatnonzero(sizes == 0)
    if not len(idle):
        return
    last = np.maximum(stops - 1, 0)
    width = np.where(sizes > 0, ordered[last] - ordered[np.minimum(starts, len(ordered) - 1)], 0.0)
    widest = np.argsort(-sizes * width**2, kind="stable")
    for place, wide in zip(idle, widest, strict=False):
        stretch = ordered[starts[wide] : stops[wide]]
        middle = int(np.searchsorted(stretch, stretch.mean()))
        if width[wide] > 0 and 0 < middle < len(stretch):
            centers[place], centers[wide] = stretch[:middle].mean(), stretch[middle:].mean()


def _layers(model: nn.Module) -> dict[str, Any]:
    """Layers by the names of their weights; those that share theirs with another layer are left out."""
    from torch import nn

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    found = {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }
    users: dict[int, int] = {}
    # One module under two names is one that two places share.
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    return {name: layer for name, layer in found.items() if users[id(layer.weight)] == 1}


def _shared(weight: Tensor, clusters: int, init: Literal["linear", "density"]) -> nn.Module:
    """What makes a weight of its codebook: looks every element up by its index."""
    import torch
    from torch import nn

    used = weight != 0
    codebook = torch.from_numpy(centroids(weight[used].numpy(), clusters, init)).to(weight.dtype)
    if not len(codebook):
        codebook = torch.zeros(1)  # a layer of zeros
    index = torch.bucketize(weight, (codebook[1:] + codebook[:-1]) / 2)

    class Shared(nn.Module):
        def forward(self, book: Tensor) -> Tensor:
            # The gradient of a look-up is the sum over all places that looked the same centroid up.
            return torch.where(used, book[index], 0.0)

        def right_inverse(self, _weight: Tensor) -> Tensor:
            return codebook

    return Shared()
