from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from compression.errors import RecipeError, StepError
from compression.recipe import StepSpec
from compression.steps import STEPS, StepContext, build, train
from compression.training import seeded
from compression.workload import Workload


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The weights that every training starts from."""
    seen: list[dict[str, torch.Tensor]] = []
    fit = train.fit

    def spy(model: nn.Module, tensors: Mapping[str, Any], labels: Any, **options: Any) -> None:
        seen.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
        fit(model, tensors, labels, **options)

    monkeypatch.setattr(train, "fit", spy)
    return seen


def test_what_is_left_starts_from_the_initial_weights_in_every_round(
    network: nn.Module, context: StepContext, tiny: Workload, starts: list[dict[str, torch.Tensor]]
) -> None:
    STEPS["lottery_ticket"](amount=0.75, rounds=2, epochs=1).apply(network, context)
    with seeded(0):
        initial = dict(tiny.network().named_parameters())
    shares = []
    for start in starts:
        weights = torch.cat(
            [start[name].flatten() for name in start if name.endswith("weight") and "layers" in name]
        )
        shares.append((weights == 0).float().mean().item())
        for name, weight in start.items():
            assert torch.equal(weight, torch.where(weight == 0, 0.0, initial[name]))
    assert shares == pytest.approx([0.5, 0.75], abs=1e-3)


def test_the_initial_weights_are_those_that_the_workload_trained(network: nn.Module, tiny: Workload) -> None:
    first = tiny.train()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), network.parameters(), strict=True))
    with seeded(0):
        assert all(
            torch.equal(a, b)
            for a, b in zip(_fresh(tiny).parameters(), tiny.network().parameters(), strict=True)
        )


def _fresh(tiny: Workload) -> nn.Module:
    with seeded(0):
        return tiny.network()


def test_the_first_round_can_train_the_initial_network_itself(
    network: nn.Module, context: StepContext, starts: list[dict[str, torch.Tensor]]
) -> None:
    step = STEPS["lottery_ticket"](amount=0.5, rounds=1, epochs=1, from_scratch=True)
    ticket = step.apply(network, context)
    assert [any((weight == 0).any() for weight in start.values()) for start in starts] == [False, True]
    other = step.apply(_fresh(context.workload), context)
    assert all(torch.equal(a, b) for a, b in zip(ticket.parameters(), other.parameters(), strict=True))


def test_a_network_of_another_shape_has_no_initial_weights(network: nn.Module, context: StepContext) -> None:
    smaller = STEPS["prune_structured"](amount=0.5).apply(network, context)
    with pytest.raises(StepError, match="other layers than network"):
        STEPS["lottery_ticket"](amount=0.5).apply(smaller, context)


def test_over_95_percent_needs_to_be_meant() -> None:
    with pytest.raises(RecipeError, match="allow_extreme: true"):
        build(StepSpec(step="lottery_ticket", params={"amount": 0.97}))
