"""Check a recipe before any work is done: its steps, their order, and what they need of the workload."""

from __future__ import annotations

from compression.errors import PlanError
from compression.recipe import Recipe
from compression.steps import STEPS, Step, build
from compression.steps.base import Property
from compression.workload import Workload

_LOSS: dict[Property, str] = {
    "float": "the floating-point weights",
    "shape": "the layer sizes",
    "sparsity": "the zeroed weights",
    "codebook": "the shared weights",
    "grid": "the quantization grid",
}


def plan(recipe: Recipe, workload: Workload) -> list[Step]:
    """Build the steps of a recipe, or say why they cannot be done in this order on this workload.

    Raises:
        RecipeError: a step does not exist or does not take its parameters.
        PlanError: the order cannot work, or the workload lacks what a step needs.
    """
    steps = [build(spec) for spec in recipe.steps]
    has: set[Property] = {"float"}
    made_by: dict[Property, str] = {}
    open_since: dict[Property, tuple[int, str]] = {}
    onnx_since: str | None = None
    file_since: str | None = None
    for number, step in enumerate(steps, 1):
        here = f"recipe {recipe.name}, step {number} ({step.name})"
        _check_needs(here, step, workload)
        if file_since:
            raise PlanError(
                f"{here} cannot work on the file that {file_since} has coded: put {file_since} at the end"
            )
        if step.level == "file":
            file_since = step.name
        elif step.level == "onnx":
            onnx_since = onnx_since or step.name
        elif onnx_since:
            raise PlanError(
                f"{here} works on the torch network, but {onnx_since} already made an ONNX model of it: "
                f"put {step.name} before {onnx_since}"
            )
        for missing in step.requires - has:
            raise PlanError(
                f"{here} needs {_LOSS[missing]}, which {made_by[missing]} has taken away: "
                "leave one of the two out"
            )
        for lost in step.destroys & has & made_by.keys():
            # A step on the ONNX model cannot come before one on the network.
            instead = f"put {step.name} first, or leave" if step.level == "torch" else "leave"
            raise PlanError(
                f"{here} would undo {_LOSS[lost]} that {made_by[lost]} made: {instead} one of the two out"
            )
        for promised, (_, before) in open_since.items():
            # Whatever makes layers of another size makes new weights, which were not trained for what follows.
            if "shape" in step.makes and promised not in step.makes:
                raise PlanError(
                    f"{here} would replace layers that {before} has trained for {_LOSS[promised]}: "
                    f"put {step.name} before {before}"
                )
        open_since = {
            promised: since for promised, since in open_since.items() if promised not in step.makes
        } | dict.fromkeys(step.then, (number, step.name))
        has = (has - step.destroys) | step.makes
        made_by |= dict.fromkeys(step.makes | step.destroys, step.name)
    for promised, (number, name) in open_since.items():
        # What some steps make depends on their parameters: those are no sure way out.
        able = ", ".join(
            sorted(
                other
                for other, cls in STEPS.items()
                if isinstance(cls.makes, frozenset) and promised in cls.makes
            )
        )
        raise PlanError(
            f"recipe {recipe.name}, step {number} ({name}) trains for {_LOSS[promised]}, which no later step makes: "
            f"put one of {able} after it, or leave it out"
        )
    return steps


def _check_needs(here: str, step: Step, workload: Workload) -> None:
    if step.level == "torch" and not workload.has_torch:
        raise PlanError(
            f"{here} works on the torch network, and {workload.name} has only an ONNX file: "
            "use ONNX-level steps (int8_dynamic, int8_static, int4_weights, mixed_precision), "
            "or define network() in workload.py"
        )
    if "student" in step.needs and type(workload).student is Workload.student:
        raise PlanError(f"{here} needs a smaller network: define student(width) in workload.py")
