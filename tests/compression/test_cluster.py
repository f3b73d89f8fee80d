from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

from compression.errors import StepError
from compression.export import export
from compression.steps import STEPS, StepContext
from compression.steps.cluster import _evenly, _shared, centroids
from compression.training import predict_logits
from compression.workload import Workload

from .small import image_context, images


def matrices(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in network.named_parameters() if weight.dim() > 1}


def spread(values: np.ndarray, centers: np.ndarray) -> float:
    return float((np.abs(values[:, None] - centers).min(axis=1) ** 2).sum())


def test_each_layer_has_its_own_few_weights(network: nn.Module, context: StepContext) -> None:
    shared = matrices(STEPS["cluster_weights"](clusters=4, epochs=1).apply(network, context))
    assert all(len(weight.unique()) <= 4 for weight in shared.values())
    assert len(torch.cat([weight.flatten() for weight in shared.values()]).unique()) > 8


def test_zeros_are_kept_out_of_the_codebook_and_stay_zero(network: nn.Module, context: StepContext) -> None:
    pruned = STEPS["prune_magnitude"](amount=0.6).apply(network, context)
    shared = matrices(STEPS["cluster_weights"](clusters=4, epochs=2).apply(pruned, context))
    for name, weight in matrices(pruned).items():
        assert torch.equal(shared[name] == 0, weight == 0)
        assert len(shared[name][weight != 0].unique()) <= 4


def test_without_training_every_weight_is_the_nearest_centroid(
    network: nn.Module, context: StepContext
) -> None:
    shared = matrices(STEPS["cluster_weights"](clusters=6, epochs=0).apply(network, context))
    for name, weight in matrices(network).items():
        distances = (weight.flatten()[:, None] - shared[name].unique()).abs()
        assert torch.allclose((weight - shared[name]).abs().flatten(), distances.amin(1), atol=1e-6)


def test_training_moves_the_centroids_and_no_weight_to_another(
    network: nn.Module, context: StepContext
) -> None:
    before = matrices(STEPS["cluster_weights"](clusters=4, epochs=0).apply(network, context))
    after = matrices(STEPS["cluster_weights"](clusters=4, epochs=2, lr=1e-2).apply(network, context))
    for name, weight in before.items():
        pairs = torch.stack([weight.flatten(), after[name].flatten()], 1).unique(dim=0)
        assert len(pairs) == len(weight.unique())
    assert not torch.equal(before["layers.2.weight"], after["layers.2.weight"])


def test_the_zeros_of_layers_outside_of_targets_stay_zero(network: nn.Module, context: StepContext) -> None:
    pruned = STEPS["prune_magnitude"](amount=0.6).apply(network, context)
    step = STEPS["cluster_weights"](clusters=4, epochs=2, lr=1e-2, targets="layers.2.*")
    shared = matrices(step.apply(pruned, context))
    for name, weight in matrices(pruned).items():
        assert torch.equal(shared[name] == 0, weight == 0)
    assert not torch.equal(shared["layers.0.weight"], matrices(pruned)["layers.0.weight"])
    assert len(shared["layers.0.weight"].unique()) > 5 >= len(shared["layers.2.weight"].unique())


@pytest.mark.parametrize("init", ["linear", "density"])
def test_every_centroid_of_a_pruned_layer_is_used(
    network: nn.Module, context: StepContext, init: str
) -> None:
    pruned = STEPS["prune_magnitude"](amount=0.8).apply(network, context)
    shared = matrices(STEPS["cluster_weights"](clusters=16, epochs=0, init=init).apply(pruned, context))
    for name, weight in matrices(pruned).items():
        different = len(weight[weight != 0].unique())
        assert len(shared[name][weight != 0].unique()) == min(16, different)


def test_a_centroids_gradient_is_the_sum_of_its_weights_gradients() -> None:
    weight = torch.tensor([[1.0, 1.1, 0.0], [5.0, 0.9, 5.2]])
    shared = _shared(weight, 2, "linear")
    book = shared.right_inverse(weight).requires_grad_()  # type: ignore[operator]
    gradients = torch.tensor([[1.0, 2.0, 50.0], [10.0, 4.0, 20.0]])
    (shared(book) * gradients).sum().backward()
    assert book.grad.tolist() == [7.0, 30.0]


def test_codebooks_learn_what_clustering_lost(network: nn.Module, context: StepContext) -> None:
    tensors, labels = context.data.rows("test").tensors, torch.tensor(context.data.rows("test").labels)
    losses = []
    for epochs in (0, 6):
        step = STEPS["cluster_weights"](clusters=2, epochs=epochs, lr=1e-2, batch_size=64)
        logits = torch.from_numpy(predict_logits(step.apply(network, context), tensors))
        losses.append(nn.functional.cross_entropy(logits, labels).item())
    assert losses[1] < losses[0]


def test_the_codebook_of_a_convolution_survives_the_export(tiny: Workload) -> None:
    context = image_context(tiny)
    shared = STEPS["cluster_weights"](clusters=8, epochs=1).apply(images(norm=True), context)
    graph = export(shared, context.data.rows("train").tensors).onnx.graph
    weights = [numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) > 1]
    assert len(weights) == 3
    assert all(len(np.unique(weight)) <= 8 for weight in weights)
    assert all(node.op_type != "BatchNormalization" for node in graph.node)


def test_a_network_of_few_weights_already_is_an_error(network: nn.Module, context: StepContext) -> None:
    shared = STEPS["cluster_weights"](clusters=4, epochs=0).apply(network, context)
    with pytest.raises(StepError, match="no layer has more than 8 different weights"):
        STEPS["cluster_weights"](clusters=8, epochs=0).apply(shared, context)


def test_a_pattern_that_matches_nothing_is_an_error(network: nn.Module, context: StepContext) -> None:
    with pytest.raises(
        StepError, match=r"targets 'conv\*' matches nothing; the network has side.weight, layers"
    ):
        STEPS["cluster_weights"](targets="conv*").apply(network, context)


@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=60),
    st.integers(2, 8),
    st.sampled_from(["linear", "density"]),
)
def test_no_centroid_could_be_left_out_or_moved_for_the_better(
    numbers: list[float], clusters: int, init: str
) -> None:
    values = np.array(numbers)
    centers = centroids(values, clusters, init)  # type: ignore[arg-type]
    assert len(centers) <= clusters
    assert (np.diff(centers) >= 0).all()
    # A value half-way between two centroids may be either's; it is the upper one's.
    nearest = np.searchsorted((centers[1:] + centers[:-1]) / 2, values, side="right")
    means = np.array(
        [values[nearest == k].mean() if (nearest == k).any() else centers[k] for k in range(len(centers))]
    )
    assert spread(values, centers) <= spread(values, means) + 1e-6 * (1 + spread(values, means))


@given(
    st.lists(st.floats(-100, 100, width=16, allow_subnormal=False), min_size=1, max_size=60),
    st.integers(2, 16),
    st.sampled_from(["linear", "density"]),
)
def test_no_centroid_is_wasted(numbers: list[float], clusters: int, init: str) -> None:
    values = np.array(numbers)
    centers = centroids(values, clusters, init)  # type: ignore[arg-type]
    used = np.unique(np.abs(values[:, None] - centers).argmin(axis=1))
    assert len(used) == len(centers) == min(clusters, len(np.unique(values)))


def test_the_gap_that_pruning_leaves_gets_no_centroids() -> None:
    draw = np.random.default_rng(0).normal(size=4000)
    pruned = draw[np.abs(draw) > 1.2]
    start = _evenly(np.sort(pruned), 16)
    assert (np.abs(start) >= 1.2).all()
    assert (start[0], start[-1]) == (pruned.min(), pytest.approx(pruned.max()))
    # As near as if there were no gap: a wasted centroid costs.
    closed = np.sort(
        np.where(pruned > 0, pruned - pruned[pruned > 0].min(), pruned - pruned[pruned < 0].max())
    )
    without = spread(closed, centroids(closed, 16, "linear"))
    assert spread(pruned, centroids(pruned, 16, "linear")) < 1.05 * without


def test_k_means_is_as_good_as_that_of_scikit_learn() -> None:
    from sklearn.cluster import KMeans

    values = np.random.default_rng(0).normal(size=4000)
    start = np.linspace(values.min(), values.max(), 16)[:, None]
    other = KMeans(16, init=start, n_init=1, max_iter=1000, tol=0).fit(values[:, None])
    assert spread(values, centroids(values, 16, "linear")) == pytest.approx(other.inertia_, rel=0.01)
