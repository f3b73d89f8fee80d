"""Data-driven pruning: each layer loses as much as measurements say that it can."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from compression.data import Rows
from compression.errors import StepError
from compression.export import OUTPUT, quiet
from compression.measure import Answers, Pairs, quality
from compression.steps.base import Property, StepContext, register
from compression.steps.patterns import select
from compression.steps.prune import EXTREME, output_layer, target_weights
from compression.steps.sparsify import part
from compression.steps.train import Training, zero_masks
from compression.training import predict_logits

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compression.workload import Progress, Workload

REPORT = "pruning.json"
"""Name of the file that is kept with the variant."""

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_HALVINGS = 3
_MEASURING = 0.7
"""Share of a round's work that goes into measuring layers one by one, as far as progress is shown."""

Cut = Callable[["nn.Module", Mapping[str, float]], "nn.Module"]
"""Makes a copy of a network in which the named layers have lost these shares."""


@dataclass(frozen=True)
class Point:
    """What happens on the validation split when one layer alone is pruned.

    Attributes:
        ratio: share of the layer's weights that are zeroed, or of its neurons that are removed.
        removed: weights of the network that go.
        drop: how much lower the quality is, as a share: 0.01 is one point.
        change: how far the outputs move: length of the difference over length of the outputs before.
    """

    ratio: float
    removed: int
    drop: float
    change: float


Curves = dict[str, list[Point]]
"""Layer -> its points, by rising ratio."""


@register("prune_by_sensitivity")
class PruneBySensitivity(Training):
    """Prune each layer by a share of its own, so that all together lose no more than `max_drop` of quality.

    Each layer is pruned alone at every one of `ratios` and measured on the validation split (Li et al., "Pruning
    filters for efficient ConvNets", arXiv 1608.08710, section 3.2). Layers then lose more step by step, always where
    the most weights go for the least estimated loss; where losses are alike, for the least change of the outputs. The
    network that is pruned in all layers is measured, and backed off by bisection until it is within the bound; at last
    each layer is tried a little further. As in the search of He et al., "AMC" (arXiv 1802.03494), what is chosen has
    been measured as a whole. The measurements and the choice are kept with the variant as `pruning.json`. Weights go by
    smallest magnitude, neurons by smallest L1 norm.

    On other rows the drop is another by chance, and rather larger: the choice is the best of several on these.

    Args:
        max_drop: largest drop of quality on the validation split, as a share: 0.01 is one point.
        ratios: shares at which each layer is measured, rising.
        structured: remove neurons and channels, as `prune_structured` does; zero weights otherwise.
        targets: shell-style pattern of the weights of the layers to prune, for example `mlp.*`. Channels that must stay
            alike go together, by the name of the first layer that makes them.
        rows: on how many rows of the validation split, evenly spread, single layers are measured. What is chosen is
            measured on all.
        rounds: measure, prune and train this often; each round uses what training has won back.
        epochs: passes over the train split after each round; 0 for none.
        allow_extreme: needed for ratios over 95%; not for neurons.
    """

    max_drop: float = Field(default=0.01, gt=0, lt=1)
    ratios: tuple[float, ...] = Field(default=GRID, min_length=1, max_length=100)
    structured: bool = False
    targets: str = "*"
    rows: int = Field(default=2000, ge=100)
    rounds: int = Field(default=1, ge=1, le=20)
    epochs: int = Field(default=0, ge=0, le=1000)
    allow_extreme: bool = False

    @model_validator(mode="after")
    def _sane(self) -> PruneBySensitivity:
        rising = all(
            first < then for first, then in zip((0.0, *self.ratios), (*self.ratios, 1.0), strict=True)
        )
        if not rising:
            raise ValueError("ratios must rise, between 0 and 1")
        if self.ratios[-1] > EXTREME and self.structured:
            raise ValueError(f"no more than {EXTREME} of the neurons can be removed")
        if self.ratios[-1] > EXTREME and not self.allow_extreme:
            raise ValueError(f"ratios over {EXTREME} leave next to nothing; set allow_extreme: true if meant")
        if self.rounds > 1 and not self.epochs:
            raise ValueError("rounds without training between win nothing: set epochs, or rounds: 1")
        return self

    @property
    def makes(self) -> frozenset[Property]:  # type: ignore[override]
        """Smaller layers, or zeros."""
        return frozenset({"shape"} if self.structured else {"sparsity"})

    @property
    def destroys(self) -> frozenset[Property]:
        """Neurons go with their zeros; training moves every weight on its own."""
        lost: set[Property] = {"sparsity"} if self.structured else set()
        return frozenset(lost | {"codebook"} if self.epochs else lost)

    def apply(self, model: nn.Module, context: StepContext) -> nn.Module:
        """Return a pruned copy."""
        model = copy.deepcopy(model).eval()
        judge = _Judge(model, context, self.rows)
        layers, cut = self._structured(model, context) if self.structured else self._unstructured(model)
        before = _remaining(model)
        rounds: list[dict[str, Any]] = []
        for number in range(self.rounds):
            progress = context.progress if self.rounds == 1 else part(context.progress, number, self.rounds)
            search = _Search(model, layers, cut, judge, self.max_drop)
            curves: Curves = {}
            for done, (layer, points) in enumerate(search.curves(self.ratios), 1):
                curves[layer] = points
                progress(f"measured {layer}", _MEASURING * done / len(layers))
            chosen = search.choose(curves)
            if not chosen.ratios:
                if number == 0:
                    raise self._nothing(curves, chosen)
                break
            progress("chose ratios", _MEASURING + 0.1)
            model = chosen.network
            rounds.append(
                {
                    "layers": {
                        layer: [asdict(point) for point in points] for layer, points in curves.items()
                    },
                    "chosen": chosen.ratios,
                    "measured": chosen.tries,
                    "drop": judge.drop(model),
                }
            )
            if self.epochs:
                trained = copy.deepcopy(model)
                self.train(trained, context, zero_masks(model), _last_fifth(progress))
                rounds[-1]["drop_after_training"] = judge.drop(trained)
                if judge.drop(trained) > self.max_drop:
                    context.warnings.append(
                        f"prune_by_sensitivity: training after round {number + 1} lost more than max_drop and was left "
                        "out: lower lr"
                    )
                    break
                model = trained
        context.progress("pruned", 1.0)
        context.extra[REPORT] = self._report(judge, rounds, judge.drop(model), before, _remaining(model))
        return model

    def _unstructured(self, model: nn.Module) -> tuple[list[str], Cut]:
        return target_weights(model, self.targets, self.name), zero_smallest

    def _structured(self, model: nn.Module, context: StepContext) -> tuple[list[str], Cut]:
        import torch

        rows = context.data.rows("train").take(slice(0, 2))
        example = {name: torch.from_numpy(array) for name, array in rows.tensors.items()}
        able = [f"{name}.weight" for name in _roots(copy.deepcopy(model), example)]
        names = select(able, self.targets)
        if not names:
            there = ", ".join(able) or "no hidden linear or convolution layer"
            raise StepError(f"{self.name}: targets {self.targets!r} matches nothing; the network has {there}")
        return names, lambda network, ratios: remove_neurons(network, ratios, example)

    def _nothing(self, curves: Curves, chosen: _Choice) -> StepError:
        points = [(point.drop, layer, point.ratio) for layer, found in curves.items() for point in found]
        if not points:
            return StepError(
                f"{self.name}: no weight is left to remove at ratios up to {self.ratios[-1]:g}: raise them"
            )
        _, layer, ratio = min(points)
        least = min((drop for drop in (item["drop"] for item in chosen.tries)), default=min(points)[0])
        return StepError(
            f"{self.name}: nothing can go within max_drop {self.max_drop:g}: the least that was lost is {least:.4f} on "
            f"the validation split, the gentlest cut {layer} at {ratio:g}: raise max_drop, or give smaller ratios"
        )

    def _report(
        self, judge: _Judge, rounds: list[dict[str, Any]], drop: float, before: int, after: int
    ) -> bytes:
        content: dict[str, Any] = {
            "split": "validation",
            "rows": len(judge.rows),
            "rows_for_layers": len(judge.some),
            "metric": judge.workload.metric,
            "structured": self.structured,
            "max_drop": self.max_drop,
            "full_quality": judge.quality,
            "drop": drop,
            "weights": before,
            "removed": before - after,
            "rounds": rounds,
        }
        return json.dumps(content, indent=1).encode()


def _last_fifth(progress: Progress) -> Progress:
    return lambda what, done: progress(what, 0.8 + 0.2 * done)


def zero_smallest(model: nn.Module, ratios: Mapping[str, float]) -> nn.Module:
    """A copy whose named weights have these shares of zeros, the smallest of each."""
    from torch.nn.utils import prune

    model = copy.deepcopy(model)
    for name, ratio in ratios.items():
        layer, _, parameter = name.rpartition(".")
        module = model.get_submodule(layer)
        prune.l1_unstructured(module, parameter, amount=ratio)
        prune.remove(module, parameter)
        # Makes 0 of -0, which a file would have to tell apart.
        module.get_parameter(parameter).data.add_(0.0)
    return model


def remove_neurons(model: nn.Module, ratios: Mapping[str, float], example: dict[str, Tensor]) -> nn.Module:
    """A copy in which layers, by the names of their weights, have lost these shares of their neurons or channels.

    Raises:
        StepError: the network's output would have another shape.
    """
    model = copy.deepcopy(model).eval()
    shape = tuple(model(**example).shape)
    per_layer = {model.get_submodule(name.rpartition(".")[0]): ratio for name, ratio in ratios.items()}
    with quiet():
        _pruner(model, example, per_layer).step()
    if tuple(model(**example).shape) != shape:
        raise StepError(
            "prune_by_sensitivity: the network's output shape changed; its layers cannot be pruned this way"
        )
    # The pruner leaves gradients of its tracing behind.
    return model.requires_grad_(True)


def staircase(curves: Curves, resolution: float) -> list[dict[str, float]]:
    """Ratios of all layers, from none to the highest, by the most weights for the least estimated loss.

    Args:
        resolution: what the outputs' change weighs against the drop; less than one row's worth of quality.

    Returns:
        What to cut, each a little more than the one before; the first is nothing.
    """
    places = dict.fromkeys(curves, -1)
    costs = {layer: _costs(points, resolution) for layer, points in curves.items()}

    def worth(layer: str, to: int) -> tuple[float, str, int]:
        at = places[layer]
        removed = curves[layer][to].removed - (curves[layer][at].removed if at >= 0 else 0)
        cost = costs[layer][to] - (costs[layer][at] if at >= 0 else 0.0)
        return removed / (cost + 1e-12), layer, to

    path: list[dict[str, float]] = [{}]
    while moves := [
        worth(layer, to) for layer in curves for to in range(places[layer] + 1, len(curves[layer]))
    ]:
        # Of equals the first by name, and the smaller step.
        _, layer, to = min(moves, key=lambda move: (-move[0], *move[1:]))
        places[layer] = to
        path.append({name: curves[name][place].ratio for name, place in places.items() if place >= 0})
    return path


def _costs(points: list[Point], resolution: float) -> list[float]:
    """Estimated loss at each point; never less than at a smaller ratio, as gains are chance."""
    costs = [max(point.drop, 0.0) + resolution * point.change for point in points]
    return [max(costs[: place + 1]) for place in range(len(costs))]


@dataclass(frozen=True)
class _Choice:
    ratios: dict[str, float]
    network: nn.Module
    tries: list[dict[str, Any]]


class _Judge:
    """Quality of networks on the validation split, against that of the network the step was given."""

    def __init__(self, model: nn.Module, context: StepContext, some: int) -> None:
        self.workload: Workload = context.workload
        rows = context.data.rows("validation")
        if self.workload.recall_of:
            rows = rows.take(np.isin(rows.labels, sorted(self.workload.recall_of)))
            if not len(rows):
                raise StepError(
                    "prune_by_sensitivity: the validation split has no row of a class in recall_of"
                )
        self.rows = rows
        self.some = rows
        if len(rows) > some:
            self.some = rows.take(np.linspace(0, len(rows) - 1, some).round().astype(np.int64))
        self.quality = self.of(model, rows)[0]

    def of(self, model: nn.Module, rows: Rows) -> tuple[float, np.ndarray]:
        """Quality on some rows, and the outputs float64 [N, K]."""
        output = predict_logits(model, rows.tensors)
        with np.errstate(invalid="ignore", over="ignore"):
            predictions = self.workload.decode({OUTPUT: output})
        finite = np.isfinite(output).reshape(len(output), -1).all(axis=1)
        answers = Answers(predictions.classes, predictions.confidences, finite)
        value = quality(self.workload.metric, Pairs.of(answers, answers, rows.labels)).value
        return value, output.astype(np.float64)

    def drop(self, model: nn.Module) -> float:
        """How much lower the quality is on all rows."""
        return self.quality - self.of(model, self.rows)[0]


class _Search:
    """Measures cuts of one network, and finds the largest within the bound."""

    def __init__(self, model: nn.Module, layers: list[str], cut: Cut, judge: _Judge, max_drop: float) -> None:
        self.model = model
        self.layers = layers
        self.cut = cut
        self.judge = judge
        self.max_drop = max_drop
        self.tries: list[dict[str, Any]] = []

    def curves(self, ratios: tuple[float, ...]) -> Iterator[tuple[str, list[Point]]]:
        """Layer by layer, what it loses at each ratio; ratios that take nothing away are left out."""
        rows = self.judge.some
        value, outputs = self.judge.of(self.model, rows)
        length = max(float(np.linalg.norm(outputs)), 1e-12)
        before = _remaining(self.model)
        for layer in self.layers:
            points: list[Point] = []
            for ratio in ratios:
                network = self.cut(self.model, {layer: ratio})
                removed = before - _remaining(network)
                if removed > (points[-1].removed if points else 0):
                    own, moved = self.judge.of(network, rows)
                    change = float(np.linalg.norm(np.nan_to_num(moved) - outputs)) / length
                    points.append(Point(ratio, removed, value - own, change))
            yield layer, points

    def choose(self, curves: Curves) -> _Choice:
        """The largest cut on the way from nothing to everything, then a little more of each layer."""
        path = staircase(curves, 1 / len(self.judge.some))
        low, high, network = 0, len(path), self.model
        while high - low > 1:
            middle = (low + high) // 2
            tried = self._tried(path[middle])
            if tried is None:
                high = middle
            else:
                low, network = middle, tried
        ratios = path[low]
        # The order of the staircase is that of worth.
        later = [
            layer for now, then in pairwise(path[low:]) for layer in then if then[layer] != now.get(layer)
        ]
        for layer in dict.fromkeys(later):
            ratios, network = self._further(layer, curves[layer], ratios, network)
        return _Choice(ratios, network, self.tries)

    def _further(
        self, layer: str, points: list[Point], ratios: dict[str, float], network: nn.Module
    ) -> tuple[dict[str, float], nn.Module]:
        """One layer's ratio raised as far as the bound allows: along the grid, then between two of its points."""
        high = 0.0
        for point in points:
            if point.ratio <= ratios.get(layer, 0.0):
                continue
            tried = self._tried(ratios | {layer: point.ratio})
            if tried is None:
                high = point.ratio
                break
            ratios, network = ratios | {layer: point.ratio}, tried
        for _ in range(_HALVINGS if high else 0):
            middle = (ratios.get(layer, 0.0) + high) / 2
            tried = self._tried(ratios | {layer: middle})
            if tried is None:
                high = middle
            else:
                ratios, network = ratios | {layer: middle}, tried
        return ratios, network

    def _tried(self, ratios: dict[str, float]) -> nn.Module | None:
        """The network with this cut, if it is within the bound."""
        network = self.cut(self.model, ratios)
        drop = self.judge.drop(network)
        self.tries.append({"ratios": ratios, "weights": _remaining(network), "drop": drop})
        return network if drop <= self.max_drop else None


def _remaining(model: nn.Module) -> int:
    """Weights that are not zero, of matrices and kernels."""
    return sum(int((weight != 0).sum()) for weight in model.parameters() if weight.dim() > 1)


def _pruner(model: nn.Module, example: dict[str, Tensor], ratios: dict[nn.Module, float]) -> Any:
    import torch_pruning
    from torch import nn

    keep = [output_layer(model, example)]
    keep += [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios,
        max_pruning_ratio=EXTREME,
        ignored_layers=keep,
    )


def _roots(model: nn.Module, example: dict[str, Tensor]) -> list[str]:
    """Names of layers with neurons to remove, one for each set of layers whose neurons must stay alike."""
    names = {module: name for name, module in model.named_modules()}
    with quiet():
        pruner = _pruner(model, example, {})
        groups = pruner.DG.get_all_groups(
            ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
        )
        found = {names[group[0].dep.target.module] for group in groups}
    return [name for name in names.values() if name in found]
