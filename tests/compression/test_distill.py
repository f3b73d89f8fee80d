"""What distillation can do beyond softened answers: hints, hidden states, a start from the teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from compression.data import Data
from compression.errors import RecipeError, StepError
from compression.planner import plan
from compression.recipe import Recipe, StepSpec
from compression.steps import STEPS, StepContext, build
from compression.steps.train import Matched, copy_layers
from compression.training import _drawn, fit, predict_logits, seeded, trimmed

SAME = {"epochs": 1, "lr": 1e-9, "alpha": 1.0}
"""Training that leaves the student as good as it was."""


def values(model: nn.Module, layer: str, data: Data) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _m, _i, out: kept.append(out.detach()))
    predict_logits(model, data.rows("validation").tensors)
    hook.remove()
    return kept[0]


def test_layers_of_the_student_start_from_those_of_the_teacher(
    network: nn.Module, context: StepContext
) -> None:
    step = STEPS["distill"](width=32, init={"layers.*": "layers.*", "side": "side"}, **SAME)
    student = step.apply(network, context)
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], weight, atol=1e-4, rtol=0)


def test_every_second_layer_can_be_taken() -> None:
    teacher, student = (nn.Sequential(*(nn.Linear(3, 3) for _ in range(count))) for count in (4, 2))
    copy_layers(teacher, student, {"0": "0", "1": "2"})
    assert torch.equal(student.get_parameter("1.weight"), teacher.get_parameter("2.weight"))
    assert not torch.equal(student.get_parameter("1.weight"), teacher.get_parameter("1.weight"))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (
            {"init": {"conv*": "layers.*"}},
            r"init 'conv\*' matches no layer of the student; it has side, layers",
        ),
        ({"init": {"side": "words"}}, "init 'words' matches no layer of the teacher"),
        ({"init": {"layers.2": "layers.2"}}, r"cannot fill layers.2 of the student, with weight \[8, 8\]"),
        ({"hints": {"layers.7": "layers.1"}}, "hints 'layers.7' matches no layer of the student"),
        ({"hidden": {"layers.1": "mlp"}}, "hidden 'mlp' matches no layer of the teacher"),
        ({"hidden": {"layers.1": "layers.1"}}, r"do not go together: .* the cosine needs the same width"),
        ({"hints": {"side": "layers.1"}}, r"do not go together: their values are \[2, 1, 3\] and \[2, 32\]"),
    ],
)
def test_layers_that_are_not_there_or_do_not_fit_are_errors(
    network: nn.Module, context: StepContext, params: dict[str, dict[str, str]], said: str
) -> None:
    with pytest.raises(StepError, match=said):
        STEPS["distill"](width=8, epochs=1, **params).apply(network, context)


def test_hints_draw_a_layer_to_the_teachers_through_a_map(
    network: nn.Module, context: StepContext, data: Data
) -> None:
    def explained(student: nn.Module) -> float:
        """How much of the teacher's layer a linear map of the student's explains."""
        own, goal = values(student, "layers.1", data), values(network, "layers.1", data)
        own = torch.cat([own, torch.ones(len(own), 1)], dim=1)
        rest = goal - own @ torch.linalg.lstsq(own, goal, driver="gelsd").solution
        return 1 - float(rest.square().sum() / (goal - goal.mean(0)).square().sum())

    options = {"width": 6, "epochs": 1, "lr": 1e-2, "batch_size": 64, "alpha": 1.0}
    plain = STEPS["distill"](**options).apply(network, context)
    hinted = STEPS["distill"](**options, hints={"layers.1": "layers.1"}, hint_epochs=15).apply(
        network, context
    )
    assert explained(hinted) > explained(plain) + 0.02
    assert [name for name, _ in hinted.named_modules()] == [name for name, _ in plain.named_modules()]


def test_the_cosine_draws_hidden_values_to_the_teachers(
    network: nn.Module, context: StepContext, data: Data
) -> None:
    def alike(student: nn.Module) -> float:
        own, goal = values(student, "layers.1", data), values(network, "layers.1", data)
        return float(functional.cosine_similarity(own, goal, dim=-1).mean())

    context.seed = 3  # another start than the teacher's
    options = {"width": 32, "epochs": 3, "lr": 1e-2, "batch_size": 64}
    plain = STEPS["distill"](**options).apply(network, context)
    triple = STEPS["distill"](**options, hidden={"layers.1": "layers.1"}, cosine=5.0).apply(network, context)
    assert alike(triple) > alike(plain) + 0.1
    assert not any(module._forward_hooks for module in (*network.modules(), *triple.modules()))


def test_the_student_is_made_smaller_before_it_is_trained(network: nn.Module, context: StepContext) -> None:
    reduce = [{"step": "low_rank", "params": {"ratio": 0.25, "targets": "layers.2"}}]
    student = build(
        StepSpec(step="distill", params={"width": 16, "epochs": 1, "reduce": reduce})  # type: ignore[dict-item]
    ).apply(network, context)
    assert tuple(student.get_parameter("layers.2.0.weight").shape) == (4, 16)


def test_only_steps_on_the_network_can_come_before_training() -> None:
    half = {"amount": 0.5}
    for name, params, said in (
        ("int8_dynamic", {}, "does not work on the network"),
        ("surprise", {}, "no step surprise"),
        ("prune_magnitude", half, "would undo what prune_magnitude makes: put it after distill"),
        ("cluster_weights", {}, "would undo what cluster_weights makes"),
        ("qat", {}, "would undo what qat makes"),
    ):
        reducing = {"width": 4, "reduce": [{"step": name, "params": params}]}
        with pytest.raises(RecipeError, match=f"step distill: reduce: .*{said}"):
            build(StepSpec(step="distill", params=reducing))  # type: ignore[arg-type]


def test_a_recipe_with_all_of_it_is_planned(context: StepContext) -> None:
    params = {
        "width": 4,
        "init": {"side": "side"},
        "hidden": {"layers.1": "layers.1"},
        "hints": {"layers.1": "layers.1"},
    }
    recipe = Recipe(name="all", steps=[StepSpec(step="distill", params=params)])  # type: ignore[arg-type]
    assert len(plan(recipe, context.workload)) == 1


class Padded(nn.Module):
    dynamic_axes = {"ids": {1: "tokens"}, "shown": {1: "tokens"}}  # noqa: RUF012
    padding_mask = "shown"

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.seen: list[int] = []

    def forward(self, ids: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        self.seen.append(ids.shape[1])
        return (self.words(ids) * shown[:, :, None]).sum(1)[:, :2]


def padded_rows() -> dict[str, np.ndarray]:
    shown = (np.arange(12) < np.array([2, 3, 9, 4, 2, 8, 3, 12])[:, None]).astype(np.int64)
    return {"ids": np.arange(96).reshape(8, 12) % 9, "shown": shown}


def test_padding_is_left_out_of_the_cosine() -> None:
    teacher, student = Padded(), Padded()
    rows = padded_rows()
    batch = {name: torch.from_numpy(array[:2]) for name, array in rows.items()}

    def loss() -> float:
        with Matched(teacher, student, {"words": "words"}, "cosine", rows, 0) as matched:
            student(**batch)
            return float(matched.loss(batch).detach())

    with torch.no_grad():
        student.words.weight.copy_(teacher.words.weight)
        only_padded = set(batch["ids"][batch["shown"] == 0].tolist()) - set(
            batch["ids"][batch["shown"] == 1].tolist()
        )
        student.words.weight[sorted(only_padded)] *= -1
    assert only_padded
    assert loss() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        student.words.weight.mul_(-1)
    assert loss() == pytest.approx(2, abs=1e-6)


def test_the_longest_rows_are_not_always_those_of_the_smaller_batch() -> None:
    alone = 0
    for seed in range(30):
        with seeded(seed):
            batches = _drawn(18, 8, torch.arange(18))
        assert sorted(len(rows) for rows in batches) == [2, 8, 8]
        assert sorted(torch.cat(list(batches)).tolist()) == list(range(18))
        alone += any(len(rows) == 2 and 17 in rows for rows in batches)
    assert 0 < alone < 15


def test_padding_is_trained_on_and_asked_for_as_little_as_can_be() -> None:
    rows, network = padded_rows(), Padded()
    inputs = {name: torch.from_numpy(array) for name, array in rows.items()}
    assert {tensor.shape[1] for tensor in trimmed(network, inputs).values()} == {12}
    assert {
        tensor.shape[1] for tensor in trimmed(network, {k: v[:2] for k, v in inputs.items()}).values()
    } == {3}
    with torch.no_grad():
        expected = network(**inputs).numpy()
    np.testing.assert_allclose(predict_logits(network, rows, 2), expected, atol=1e-6)
    network.seen.clear()
    fit(network, rows, np.zeros(8, np.int64), epochs=1, batch_size=2)
    assert sorted(network.seen) == [2, 3, 8, 12]
