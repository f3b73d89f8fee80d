"""Pruning by measured sensitivity."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch import nn

from compression.data import Data
from compression.errors import RecipeError, StepError
from compression.recipe import StepSpec
from compression.steps import STEPS, StepContext, build
from compression.steps.ratios import REPORT, Point, _Judge, staircase
from compression.training import fit, predict_logits
from compression.workload import Workload

from .small import image_context
from .test_qat import residual, with_every_split


def accuracy(network: nn.Module, data: Data, split: str = "validation") -> float:
    rows = data.rows(split)  # type: ignore[arg-type]
    return float((predict_logits(network, rows.tensors).argmax(1) == rows.labels).mean())


def zeros(network: nn.Module, name: str) -> float:
    return float((network.get_parameter(name) == 0).float().mean())


def report(context: StepContext) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(context.extra[REPORT])
    return found


@pytest.fixture
def trained(tiny: Workload) -> tuple[nn.Module, StepContext]:
    """A residual network that tells the images apart, and their context."""
    context = with_every_split(image_context(tiny))
    rows = context.data.rows("train")
    network = residual()
    fit(network, rows.tensors, rows.labels, epochs=4, lr=1e-2, batch_size=32)
    return network, context


def test_more_goes_than_by_one_share_at_no_more_loss(
    network: nn.Module, context: StepContext, data: Data
) -> None:
    pruned = STEPS["prune_by_sensitivity"](max_drop=0.01).apply(network, context)
    told = report(context)
    share = told["removed"] / told["weights"]
    assert share > 0.3
    assert accuracy(network, data) - accuracy(pruned, data) == pytest.approx(told["drop"])
    assert told["drop"] <= 0.01
    total = sum(network.get_parameter(f"layers.{place}.weight").numel() for place in (0, 2, 4))
    uniform = STEPS["prune_magnitude"](amount=told["removed"] / total).apply(network, context)
    assert accuracy(uniform, data) < accuracy(pruned, data)


def test_a_wider_bound_lets_more_go(network: nn.Module, context: StepContext) -> None:
    removed = []
    for max_drop in (0.002, 0.05):
        STEPS["prune_by_sensitivity"](max_drop=max_drop).apply(network, context)
        removed.append(report(context)["removed"])
    assert removed[0] < removed[1]


def test_each_layer_is_measured_alone_at_each_ratio_and_the_choice_is_told(
    network: nn.Module, context: StepContext, data: Data
) -> None:
    pruned = STEPS["prune_by_sensitivity"](ratios=(0.2, 0.6), max_drop=0.02, rows=300).apply(network, context)
    told = report(context)
    assert (told["split"], told["rows"], told["rows_for_layers"]) == ("validation", 600, 300)
    (only,) = told["rounds"]
    assert [point["ratio"] for point in only["layers"]["layers.2.weight"]] == [0.2, 0.6]
    assert [point["removed"] for point in only["layers"]["layers.2.weight"]] == [205, 614]
    for name, ratio in only["chosen"].items():
        assert zeros(pruned, name) == pytest.approx(ratio, abs=0.01)
    assert only["measured"]
    assert any(one["ratios"] == only["chosen"] and one["drop"] <= 0.02 for one in only["measured"])


def test_the_test_split_has_no_say(network: nn.Module, context: StepContext) -> None:
    asked = []
    rows = context.data.rows

    class Watched(Data):
        def rows(self, name: Any) -> Any:
            asked.append(name)
            return rows(name)

    context.data = Watched(context.workload)
    STEPS["prune_by_sensitivity"](structured=True, max_drop=0.05).apply(network, context)
    assert set(asked) == {"train", "validation"}


def test_neurons_are_removed_by_a_share_of_each_layer(
    network: nn.Module, context: StepContext, data: Data
) -> None:
    pruned = STEPS["prune_by_sensitivity"](structured=True, max_drop=0.03).apply(network, context)
    told = report(context)
    first, second = (pruned.get_parameter(f"layers.{place}.weight") for place in (0, 2))
    assert told["drop"] <= 0.03
    assert accuracy(network, data) - accuracy(pruned, data) == pytest.approx(told["drop"])
    assert first.shape[0] == second.shape[1]
    assert first.shape[0] + second.shape[0] < 64
    assert set(told["rounds"][0]["layers"]) == {"layers.0.weight", "layers.2.weight"}
    assert all(parameter.requires_grad for parameter in pruned.parameters())


@pytest.mark.parametrize("structured", [False, True])
def test_residual_networks_with_batch_norms_are_pruned(
    trained: tuple[nn.Module, StepContext], structured: bool
) -> None:
    network, context = trained
    step = STEPS["prune_by_sensitivity"](structured=structured, max_drop=0.05, ratios=(0.25, 0.5, 0.75))
    pruned = step.apply(network, context)
    told = report(context)
    assert told["removed"] > 0
    assert accuracy(network, context.data) - accuracy(pruned, context.data) <= 0.05
    if structured:
        # What is added must have as many channels, so it goes together.
        stem, inner = pruned.get_submodule("stem.0"), pruned.get_submodule("inner.0")
        assert stem.out_channels == inner.out_channels == inner.in_channels < 8
        assert len(told["rounds"][0]["layers"]) == 1


def test_training_in_rounds_lets_more_go(network: nn.Module, context: StepContext, data: Data) -> None:
    params = {"max_drop": 0.005, "ratios": (0.25, 0.5, 0.75, 0.9)}
    STEPS["prune_by_sensitivity"](**params).apply(network, context)
    once = report(context)["removed"]
    pruned = STEPS["prune_by_sensitivity"](rounds=3, epochs=2, lr=3e-3, batch_size=64, **params).apply(
        network, context
    )
    told = report(context)
    assert len(told["rounds"]) > 1
    assert told["removed"] > once
    assert accuracy(network, data) - accuracy(pruned, data) <= 0.005


def test_training_that_loses_more_than_the_bound_is_left_out(
    network: nn.Module, context: StepContext, data: Data
) -> None:
    step = STEPS["prune_by_sensitivity"](max_drop=0.01, epochs=1, lr=2.0, ratios=(0.3, 0.6))
    pruned = step.apply(network, context)
    assert accuracy(network, data) - accuracy(pruned, data) <= 0.01
    assert context.warnings == [
        "prune_by_sensitivity: training after round 1 lost more than max_drop and was left out: lower lr"
    ]


def test_nothing_within_the_bound_is_an_error_that_says_what_to_do(
    network: nn.Module, context: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Judge, "drop", lambda *_: 0.3)
    step = STEPS["prune_by_sensitivity"](ratios=(0.5,), targets="layers.2*")
    with pytest.raises(
        StepError,
        match=r"max_drop 0\.01: the least that was lost is 0\.3000 .* layers\.2\.weight at 0\.5: raise max_drop",
    ):
        step.apply(network, context)


@pytest.mark.parametrize("structured", [False, True])
def test_a_pattern_that_matches_nothing_is_an_error(
    network: nn.Module, context: StepContext, structured: bool
) -> None:
    step = STEPS["prune_by_sensitivity"](targets="conv*", structured=structured)
    with pytest.raises(
        StepError, match=r"targets 'conv\*' matches nothing; the network has layers\.0\.weight"
    ):
        step.apply(network, context)


def test_progress_rises_to_the_end(network: nn.Module, context: StepContext) -> None:
    said: list[float] = []
    context.progress = lambda what, done: said.append(done)
    STEPS["prune_by_sensitivity"](max_drop=0.05, ratios=(0.3,), epochs=1).apply(network, context)
    assert said == sorted(said)
    assert said[-1] == 1.0


def test_the_cheapest_weights_go_first_and_gains_count_as_no_loss() -> None:
    curves = {
        "cheap": [Point(0.5, 100, -0.01, 0.1), Point(0.9, 180, 0.0, 0.2)],
        "dear": [Point(0.5, 100, 0.05, 0.1), Point(0.9, 180, 0.02, 0.3)],
    }
    path = staircase(curves, 0.001)
    assert path[0] == {}
    assert path[1] == {"cheap": 0.5}
    assert path[2] == {"cheap": 0.9}
    # A smaller loss at a higher ratio is chance: the step to 0.9 costs hardly more than that to 0.5, and is taken.
    assert path[-1] == {"cheap": 0.9, "dear": 0.9}


def test_what_it_makes_depends_on_what_it_removes() -> None:
    step = STEPS["prune_by_sensitivity"]
    assert step().makes == {"sparsity"}
    assert step(structured=True).makes == {"shape"}
    assert step(structured=True).destroys == {"sparsity"}
    assert step(epochs=1).destroys == {"codebook"}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"ratios": [0.5, 0.4]}, "ratios must rise"),
        ({"ratios": [0.5, 0.99]}, "allow_extreme: true"),
        ({"ratios": [0.99], "structured": True, "allow_extreme": True}, r"no more than 0\.95 of the neurons"),
        ({"rounds": 2}, "set epochs, or rounds: 1"),
        ({"max_drop": 0}, "max_drop"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build(StepSpec(step="prune_by_sensitivity", params=params))
