from __future__ import annotations

from typing import Any, ClassVar

import pytest

from compression.errors import PlanError, RecipeError
from compression.planner import plan
from compression.recipe import Recipe, StepSpec, library
from compression.steps import STEPS
from compression.steps.base import Property, StepContext
from compression.steps.train import Training
from compression.workload import Workload

PARAMS: dict[str, dict[str, Any]] = {
    "prune_magnitude": {"amount": 0.5},
    "prune_structured": {"amount": 0.5},
    "distill": {"width": 8},
    "mixed_precision": {"max_drop": 0.01},
    "prune_iterative": {"amount": 0.8},
    "lottery_ticket": {"amount": 0.8},
    "low_rank": {"energy": 0.9},
    "prune_structured_iterative": {"amount": 0.5},
}


class Rehearse(Training):
    """Trains for a grid that another step has to make."""

    name: ClassVar[str] = "rehearse"
    then: ClassVar[frozenset[Property]] = frozenset({"grid"})

    def apply(self, model: Any, context: StepContext) -> Any:
        return model


@pytest.fixture(autouse=True)
def _rehearse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STEPS, "rehearse", Rehearse)


def recipe(*steps: str | tuple[str, dict[str, Any]]) -> Recipe:
    pairs = [(step, PARAMS.get(step, {})) if isinstance(step, str) else step for step in steps]
    return Recipe(name="r", steps=[StepSpec(step=name, params=params) for name, params in pairs])


@pytest.mark.parametrize(
    "steps",
    [
        ["prune_structured", "finetune", "prune_magnitude", "finetune", "int8_static"],
        ["distill", "prune_magnitude", "finetune", "int8_dynamic"],
        ["prune_magnitude", "finetune", ("prune_magnitude", {"amount": 0.8}), "finetune"],
        ["prune_structured", ("finetune", {"keep_sparsity": False})],
        ["prune_magnitude", "finetune", "int4_weights"],
        ["prune_structured", "finetune", "mixed_precision"],
        ["prune_structured", "low_rank", "finetune", "prune_iterative", "cluster_weights", "entropy_code"],
        ["prune_2_4", "finetune", "cluster_weights", "entropy_code"],
        ["lottery_ticket", "finetune", "int8_static", "entropy_code"],
        ["cluster_weights", "prune_magnitude", "entropy_code"],
        ["entropy_code"],
        ["rehearse", "int8_static"],
        ["rehearse", "rehearse", "mixed_precision"],
        [
            "prune_structured",
            "low_rank",
            "finetune",
            "prune_magnitude",
            "rehearse",
            "int8_static",
            "entropy_code",
        ],
        ["rehearse", "prune_magnitude", "int4_weights"],
    ],
)
def test_good_orders_pass(tiny: Workload, steps: list[Any]) -> None:
    assert [step.name for step in plan(recipe(*steps), tiny)] == [
        step if isinstance(step, str) else step[0] for step in steps
    ]


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (
            ["int8_dynamic", "prune_magnitude"],
            "int8_dynamic already made an ONNX model of it: put prune_magnitude before",
        ),
        (["int8_static", "finetune"], r"step 2 \(finetune\) works on the torch network"),
        (
            ["int8_dynamic", "int8_static"],
            "needs the floating-point weights, which int8_dynamic has taken away",
        ),
        (
            ["prune_magnitude", ("finetune", {"keep_sparsity": False})],
            "would undo the zeroed weights that prune_magnitude made",
        ),
        (["prune_magnitude", "prune_structured"], "put prune_structured first"),
        (
            ["cluster_weights", "finetune"],
            "undo the shared weights that cluster_weights made: put finetune first",
        ),
        (["cluster_weights", "int8_static"], "weights that cluster_weights made: leave one of the two out"),
        (["cluster_weights", "low_rank"], "would undo the shared weights"),
        (["prune_2_4", "low_rank"], "would undo the zeroed weights that prune_2_4 made: put low_rank first"),
        (
            ["low_rank", "lottery_ticket"],
            "would undo the layer sizes that low_rank made: put lottery_ticket first",
        ),
        (["prune_magnitude", "lottery_ticket"], "would undo the zeroed weights that prune_magnitude made"),
        (
            ["entropy_code", "int8_static"],
            "the file that entropy_code has coded: put entropy_code at the end",
        ),
        (["entropy_code", "finetune"], "put entropy_code at the end"),
        (["entropy_code", "entropy_code"], "put entropy_code at the end"),
        (["int4_weights", "finetune"], "put finetune before int4_weights"),
        (
            ["int8_static", "int4_weights"],
            "needs the floating-point weights, which int8_static has taken away",
        ),
        (["mixed_precision", "int8_dynamic"], "weights, which mixed_precision has taken away"),
        (
            ["prune_magnitude", ("int4_weights", {"method": "hqq"})],
            "int4_weights.* would undo the zeroed weights that prune_magnitude made",
        ),
        (["prune_structured", "distill"], "would undo the layer sizes that prune_structured made"),
        (["distill", "finetune", "distill"], "would undo the layer sizes that distill made"),
        (["prune_magnitude", "prune_structured_iterative"], "put prune_structured_iterative first"),
        (["prune_2_4", "distill"], "would undo the zeroed weights that prune_2_4 made: put distill first"),
        (
            ["cluster_weights", "prune_iterative"],
            "shared weights that cluster_weights made: put prune_iterative",
        ),
        (
            ["cluster_weights", "int8_dynamic"],
            "shared weights that cluster_weights made: leave one of the two",
        ),
        (["low_rank", "distill"], "would undo the layer sizes that low_rank made: put distill first"),
        (["int8_dynamic", "low_rank"], "int8_dynamic already made an ONNX model of it: put low_rank before"),
        (["mixed_precision", "cluster_weights"], "put cluster_weights before mixed_precision"),
        (["entropy_code", "prune_magnitude"], "put entropy_code at the end"),
        # Training for a grid.
        (
            ["int8_static", "rehearse"],
            r"step 2 \(rehearse\) works on the torch network, but int8_static already",
        ),
        (
            ["rehearse"],
            r"step 1 \(rehearse\) trains for the quantization grid, which no later step makes: put one",
        ),
        (
            ["rehearse", "finetune", "entropy_code"],
            "one of int4_weights, int8_dynamic, int8_static, mixed_prec",
        ),
        (
            ["rehearse", "low_rank", "int8_static"],
            "would replace layers that rehearse has trained .*put low_rank bef",
        ),
        (["rehearse", "prune_structured", "int8_static"], "put prune_structured before rehearse"),
    ],
)
def test_bad_orders_are_refused_with_the_reason(tiny: Workload, steps: list[Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        plan(recipe(*steps), tiny)


@pytest.mark.parametrize("step", ["prune_magnitude", "prune_structured", "finetune", "distill"])
def test_torch_steps_are_refused_for_an_onnx_file(onnx_only: Workload, step: str) -> None:
    with pytest.raises(PlanError, match="tiny-onnx has only an ONNX file: use ONNX-level steps"):
        plan(recipe(step), onnx_only)


def test_distillation_without_a_student_is_refused(tiny: Workload) -> None:
    class Childless(Workload):
        encode = split = None  # type: ignore[assignment]

        def network(self) -> Any: ...

    childless = Childless(tiny.settings, tiny.directory)  # type: ignore[abstract]
    with pytest.raises(PlanError, match=r"define student\(width\)"):
        plan(recipe("distill"), childless)


def test_unknown_steps_and_parameters_are_refused(tiny: Workload) -> None:
    with pytest.raises(RecipeError, match=r"no step magic; there are .*distill, .*finetune, .*int8_dynamic"):
        plan(recipe("magic"), tiny)
    with pytest.raises(RecipeError, match="step finetune: epoch: no such setting"):
        plan(recipe(("finetune", {"epoch": 3})), tiny)


def test_the_whole_library_is_plannable_with_torch_and_the_quantizations_without(
    tiny: Workload, onnx_only: Workload
) -> None:
    from compression.compress import default_recipes

    assert [r.name for r in default_recipes(tiny)] == [r.name for r in library() if not r.on_request]
    assert all(plan(r, tiny) for r in library())
    assert [r.name for r in default_recipes(onnx_only)] == ["int8-dynamic", "int8-static"]
