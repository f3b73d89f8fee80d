"""Attention heads are really removed, the least important ones first."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from compression.data import Data, Rows
from compression.errors import RecipeError, StepError
from compression.export import export, open_session, run
from compression.recipe import StepSpec
from compression.steps import STEPS, StepContext, build
from compression.training import predict_logits
from compression.workload import Workload

HEADS, WIDTH = 4, 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.query, self.key, self.value, self.attended = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows, length, _ = x.shape
        query, key, value = (
            part(x).reshape(rows, length, self.heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = ((query @ key.transpose(2, 3) / 2 + mask).softmax(-1) @ value).transpose(1, 2).flatten(2)
        out: torch.Tensor = self.attended(mixed)
        return out


class Reader(nn.Module):
    """Two attention layers over tokens, as texts have them."""

    dynamic_axes: ClassVar[Mapping[str, Mapping[int, str]]] = {"ids": {1: "tokens"}, "shown": {1: "tokens"}}
    padding_mask: ClassVar[str] = "shown"

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, ids: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = x + layer(x, (1.0 - shown.float())[:, None, None, :] * -1e4)
        logits: torch.Tensor = self.head((x * shown[:, :, None]).sum(1))
        return logits


@pytest.fixture
def reader() -> Reader:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Reader().eval()


@pytest.fixture
def texts(tiny: Workload) -> StepContext:
    """A context whose train split holds rows of 3 to 10 tokens."""
    draw = np.random.default_rng(0)
    shown = (np.arange(10) < draw.integers(3, 11, 64)[:, None]).astype(np.int64)
    shown[0] = 1
    ids = draw.integers(1, 20, (64, 10)) * shown
    data = Data(tiny)
    labels = (ids[:, 0] > 10).astype(np.int64)
    data._rows["train"] = Rows(pd.DataFrame({"number": range(64)}), {"ids": ids, "shown": shown}, labels)
    return StepContext(tiny, data)


def without(reader: Reader, gone: Mapping[int, list[int]], context: StepContext) -> np.ndarray:
    """Answers of the whole network when the outputs of some heads are zero."""

    def silence(heads: list[int]) -> object:
        def hook(_module: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x = given[0].clone()
            for head in heads:
                x[..., head * WIDTH // HEADS : (head + 1) * WIDTH // HEADS] = 0
            return (x,)

        return hook

    hooks = [
        reader.layers[number].attended.register_forward_pre_hook(silence(heads))  # type: ignore[union-attr, arg-type]
        for number, heads in gone.items()
    ]
    try:
        return predict_logits(reader, context.data.rows("train").tensors)
    finally:
        for hook in hooks:
            hook.remove()


def test_the_heads_of_smallest_weights_are_cut_out_and_the_others_go_on_as_before(
    reader: Reader, texts: StepContext
) -> None:
    with torch.no_grad():
        for part in ("query", "key", "value"):
            reader.layers[0].get_submodule(part).get_parameter("weight")[4:8] *= 0.01
            reader.layers[1].get_submodule(part).get_parameter("weight")[12:] *= 0.01
    pruned = STEPS["prune_heads"](amount=0.25, importance="l1").apply(reader, texts)
    assert [layer.heads for layer in pruned.layers] == [3, 3]
    assert tuple(pruned.get_parameter("layers.0.query.weight").shape) == (12, WIDTH)
    assert tuple(pruned.get_parameter("layers.0.attended.weight").shape) == (WIDTH, 12)
    expected = without(reader, {0: [1], 1: [3]}, texts)
    np.testing.assert_allclose(predict_logits(pruned, texts.data.rows("train").tensors), expected, atol=1e-5)


def test_a_head_that_the_loss_does_not_feel_goes_first(reader: Reader, texts: StepContext) -> None:
    with torch.no_grad():
        # Large weights that nothing comes of, as the output projection does not look at them.
        reader.layers[0].get_submodule("query").get_parameter("weight")[8:12] *= 10
        reader.layers[0].get_submodule("attended").get_parameter("weight")[:, 8:12] = 0
    before = predict_logits(reader, texts.data.rows("train").tensors)
    step = STEPS["prune_heads"](amount=0.25, targets="layers.0", rows=40)
    pruned = step.apply(reader, texts)
    assert [layer.heads for layer in pruned.layers] == [3, 4]
    np.testing.assert_allclose(predict_logits(pruned, texts.data.rows("train").tensors), before, atol=1e-5)


def test_over_the_whole_network_the_least_go_but_each_layer_keeps_one(
    reader: Reader, texts: StepContext
) -> None:
    pruned = STEPS["prune_heads"](amount=0.99, scope="network").apply(reader, texts)
    assert [layer.heads for layer in pruned.layers] == [1, 1]
    some = STEPS["prune_heads"](amount=0.4, scope="network").apply(reader, texts)
    assert sum(layer.heads for layer in some.layers) == 5


def test_the_smaller_network_is_exported_with_free_axes(reader: Reader, texts: StepContext) -> None:
    pruned = STEPS["prune_heads"](amount=0.5).apply(reader, texts)
    tensors = texts.data.rows("train").tensors
    exported = export(pruned, tensors)
    session = open_session(exported.onnx.SerializeToString())
    assert [value.shape for value in session.get_inputs()] == [["batch", "tokens"], ["batch", "tokens"]]
    short = {name: array[:, :7] for name, array in tensors.items()}
    np.testing.assert_allclose(run(session, short, 9), predict_logits(pruned, short), atol=1e-4)


def test_the_same_seed_gives_the_same_bytes_and_the_network_is_left_alone(
    reader: Reader, texts: StepContext
) -> None:
    before = {name: tensor.clone() for name, tensor in reader.state_dict().items()}
    first, second = (STEPS["prune_heads"](amount=0.5).apply(reader, texts).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(reader.state_dict()[name], before[name]) for name in before)
    assert reader.layers[0].heads == HEADS


def test_what_cannot_be_done_is_said(
    reader: Reader, texts: StepContext, network: nn.Module, context: StepContext
) -> None:
    with pytest.raises(StepError, match=r"'mlp' matches nothing; the network has layers.0, layers.1"):
        STEPS["prune_heads"](amount=0.5, targets="mlp").apply(reader, texts)
    with pytest.raises(StepError, match="no module with Linear layers query, key, value and attended"):
        STEPS["prune_heads"](amount=0.5).apply(network, context)
    with pytest.raises(StepError, match=r"0: torch.nn.MultiheadAttention cannot lose heads"):
        STEPS["prune_heads"](amount=0.5).apply(nn.Sequential(nn.MultiheadAttention(8, 2)), texts)
    with pytest.raises(StepError, match=r"removes no head of layers.0 with 4, layers.1 with 4: raise it"):
        STEPS["prune_heads"](amount=0.1).apply(reader, texts)
    shared = copy.deepcopy(reader)
    shared.layers[0].key = shared.layers[1].query  # type: ignore[union-attr]
    with pytest.raises(StepError, match=r"layers\.0 shares its layer key with another part or module"):
        STEPS["prune_heads"](amount=0.5).apply(shared, texts)
    reader.layers[0].heads = 3  # type: ignore[assignment]
    with pytest.raises(StepError, match=r"layers.0 has 3 heads, by which its widths"):
        STEPS["prune_heads"](amount=0.5).apply(reader, texts)
    with pytest.raises(RecipeError, match="amount: "):
        build(StepSpec(step="prune_heads", params={"amount": 1.0}))
