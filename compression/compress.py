"""From a workload and recipes to variants: full precision first, then every recipe from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compression.build import Built, export_checked, finish
from compression.data import Data
from compression.errors import CompressionError, PlanError, StepError
from compression.export import Exported
from compression.full import load_network, make_full, stored_full
from compression.planner import plan
from compression.recipe import Recipe, library, recipes_in
from compression.steps import Step, StepContext
from compression.variant import Variant
from compression.workload import Progress, Workload, no_progress

if TYPE_CHECKING:
    from onnx import ModelProto

Made = Callable[[Variant, float], None]
"""Called with each finished variant and the seconds it took; 0 for one that was already there."""
Failed = Callable[[Recipe, CompressionError], None]


def compress(
    workload: Workload,
    recipes: Sequence[Recipe] | None = None,
    *,
    force: bool = False,
    progress: Progress = no_progress,
    made: Made | None = None,
    failed: Failed | None = None,
) -> list[Variant]:
    """Make the full-precision variant and one variant per recipe, measured, judged and saved.

    Args:
        recipes: `default_recipes(workload)` when not given.
        force: train full precision anew even if code, data and settings are those it was made from.
        progress: called with what is being done, and the share of it that is done.
        made: called after each variant.
        failed: called when a recipe fails, and the others go on; without it the error is raised.

    Returns:
        Full precision, then the variants in the order of their recipes. Refused ones are among them: the
        verdict is `variant.gate()`.

    Raises:
        PlanError: a recipe cannot work; found before anything is trained.
        CompressionError: a recipe failed and there is no `failed`.
    """
    chosen = default_recipes(workload) if recipes is None else list(recipes)
    names = [recipe.name for recipe in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PlanError(f"two recipes are named {twice[0]}: a variant needs a name of its own")
    planned = [(recipe, plan(recipe, workload)) for recipe in chosen]
    data = Data(workload)
    started = time.monotonic()
    full = None if force else stored_full(workload)
    seconds = 0.0
    if full is None:
        full = make_full(workload, data, _prefixed("full", progress))
        seconds = time.monotonic() - started
    if made:
        made(full, seconds)
    variants = [full]
    for recipe, steps in planned:
        started = time.monotonic()
        context = StepContext(workload, data, recipe.seed, _prefixed(recipe.name, progress))
        try:
            variant = _make(full, recipe, steps, context)
        except CompressionError as error:
            if failed is None:
                raise
            failed(recipe, error)
            continue
        variants.append(variant)
        if made:
            made(variant, time.monotonic() - started)
    return variants


def default_recipes(workload: Workload) -> list[Recipe]:
    """The library's recipes that can work on this workload, then those of its own `recipes` folder.

    A recipe of the workload's own replaces the library's one of the same name. Those that are made on request
    only are left out.
    """
    own = recipes_in(workload.directory / "recipes")
    taken = {recipe.name for recipe in own}
    able = [recipe for recipe in library() if recipe.name not in taken and _can(recipe, workload)]
    return [recipe for recipe in (*able, *own) if not recipe.on_request]


def _can(recipe: Recipe, workload: Workload) -> bool:
    try:
        plan(recipe, workload)
    except PlanError:
        return False
    return True


@dataclass(frozen=True)
class Model:
    """What a recipe's steps made of full precision.

    Attributes:
        onnx: the ONNX model; `coded` the same as a file step has coded it.
        exported: what the torch network was exported to; None where no step worked on it.
        program: the network as a `torch.export` archive; None where an ONNX step has changed the model since.
    """

    onnx: bytes
    coded: bytes | None = None
    exported: Exported | None = None
    program: bytes | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the file that is kept."""
        return len(self.onnx if self.coded is None else self.coded)


def build_model(full: Variant, steps: Sequence[Step], context: StepContext) -> Model:
    """Apply planned steps to full precision, without measuring or saving anything.

    Raises:
        StepError: a step cannot do what it is asked for.
        ExportError: the network that the steps made cannot be exported.
    """
    import onnx

    torch_steps = [step for step in steps if step.level == "torch"]
    onnx_steps = [step for step in steps if step.level == "onnx"]
    file_steps = [step for step in steps if step.level == "file"]
    exported: Exported | None = None
    model: ModelProto
    if torch_steps:
        network = load_network(context.workload, full)
        for step in torch_steps:
            context.progress(step.name, 0.0)
            network = _applied(step, network, context)
        context.progress("export", 0.0)
        exported = export_checked(network, context.data)
        model = exported.onnx
    else:
        model = onnx.load_model_from_string(full.onnx_bytes())
    for step in onnx_steps:
        context.progress(step.name, 0.0)
        model = _applied(step, model, context)
    content: bytes = model.SerializeToString()
    coded: bytes | None = None
    for step in file_steps:
        context.progress(step.name, 0.0)
        coded = _applied(step, content, context)
    # After an ONNX-level step there is no torch form of the network any more.
    return Model(content, coded, exported, exported.program if exported and not onnx_steps else None)


def _make(full: Variant, recipe: Recipe, steps: Sequence[Step], context: StepContext) -> Variant:
    model = build_model(full, steps, context)
    context.progress("measuring", 0.0)
    built = Built(
        name=recipe.name,
        recipe=recipe.model_dump(mode="json"),
        recipe_hash=recipe.hash(),
        source_hash=full.manifest.source_hash,
        onnx=model.onnx,
        coded=model.coded,
        seed=recipe.seed,
        parent=full.tag,
        program=model.program,
        max_error=model.exported.max_error if model.exported else full.manifest.export_max_error,
        calibration_sha256=context.calibration_sha256,
        warnings=tuple(context.warnings),
        extra=context.extra,
    )
    return finish(context.workload, context.data, built, full.onnx_bytes())


def _applied(step: Step, model: Any, context: StepContext) -> Any:
    """What a step makes of a model; whatever it stumbles over is that recipe's failure, and the others go on.

    Raises:
        StepError: in one line, what went wrong.
    """
    try:
        return step.apply(model, context)
    except CompressionError:
        raise
    except Exception as error:  # networks are the users' own, and may hold what no step has thought of
        first = " ".join(str(error).split())[:200]
        raise StepError(f"{step.name} cannot work on this model: {type(error).__name__}: {first}") from error


def _prefixed(name: str, progress: Progress) -> Progress:
    return lambda what, done: progress(f"{name}: {what}", done)
