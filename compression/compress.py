"""From a workload and recipes to variants: full precision first, then every recipe from it."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

from pydantic import JsonValue

from compression.build import Built, export_checked, finish
from compression.cache import Entry, StepCache, key_of, root_key, step_key
from compression.data import Data
from compression.errors import CompressionError, PlanError, StepError, VariantCorrupted, VariantNotFound
from compression.export import Exported, bare
from compression.full import load_network, save_full, stored_full, train_full
from compression.planner import plan
from compression.recipe import Recipe, library, recipes_in
from compression.steps import Step, StepContext
from compression.variant import Variant, load_variant, tag_name, this_cpu
from compression.workload import Progress, Workload, no_progress

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn


@dataclass(frozen=True)
class Effort:
    """What was done for a variant.

    Attributes:
        steps: how many its recipe has; 1, the training, for full precision.
        cached: how many of them came from the step cache.
        kept: nothing was made, as the variant in the store is what would come out again.
    """

    steps: int = 0
    cached: int = 0
    kept: bool = False


Made = Callable[[Variant, float, Effort], None]
"""Called with each finished variant, the seconds it took (0 for one that was already there), and what was done."""
Failed = Callable[[Recipe, CompressionError], None]


def compress(
    workload: Workload,
    recipes: Sequence[Recipe] | None = None,
    *,
    force: bool = False,
    progress: Progress = no_progress,
    made: Made | None = None,
    failed: Failed | None = None,
    cache: StepCache | None = None,
) -> list[Variant]:
    """Make the full-precision variant and one variant per recipe, measured, judged and saved.

    A variant in the store that was made in the same way from the same, and measured on such a processor, is kept.

    Args:
        recipes: `default_recipes(workload)` when not given.
        force: train full precision and make every variant anew, whatever is in the store and in the cache.
        progress: called with what is being done, and the share of it that is done.
        made: called after each variant.
        failed: called when a recipe fails, and the others go on; without it the error is raised.
        cache: results of the steps of earlier runs, and where those of this one are put, each when it is finished: a
            run that was interrupted goes on from there.

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
    if cache and force:
        cache = cache.fresh()
    started = time.monotonic()
    full, effort = _full(workload, data, force, progress, cache)
    if made:
        made(full, 0.0 if effort.kept else time.monotonic() - started, effort)
    variants = [full]
    for recipe, steps in planned:
        started = time.monotonic()
        context = StepContext(workload, data, recipe.seed, _prefixed(recipe.name, progress))
        key = _build_key(full, recipe, steps, data)
        variant = None if force else _stored(recipe, full, key)
        effort = Effort(kept=True)
        if variant is None:
            try:
                variant, effort = _make(full, recipe, steps, context, key, cache)
            except CompressionError as error:
                if failed is None:
                    raise
                failed(recipe, error)
                continue
        variants.append(variant)
        if made:
            made(variant, 0.0 if effort.kept else time.monotonic() - started, effort)
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


def _full(
    workload: Workload, data: Data, force: bool, progress: Progress, cache: StepCache | None
) -> tuple[Variant, Effort]:
    stored = None if force else stored_full(workload)
    if stored is not None:
        return stored, Effort(kept=True)
    progress = _prefixed("full", progress)
    trained = train_full(workload, data, progress, cache)
    made = save_full(workload, data, trained, progress)
    return made, Effort(1, int(trained.cached))


def _stored(recipe: Recipe, full: Variant, key: str) -> Variant | None:
    """The newest variant of a recipe's name, if it is intact and what this recipe would give again."""
    try:
        stored = load_variant(tag_name(full.workload, recipe.name))
        if stored.manifest.build_key != key:
            return None
        for name in stored.manifest.files:
            stored.asset(name)
    except (VariantNotFound, VariantCorrupted):
        return None
    return stored


def _build_key(full: Variant, recipe: Recipe, steps: Sequence[Step], data: Data) -> str:
    """The key of a variant: of its model, and of what the scorecard and the verdict depend on besides."""
    last = _keys(full, _stages(steps), data, recipe.seed)[-1]
    return key_of("variant", last, recipe.hash(), this_cpu().model, data.workload.profile)


def _make(
    full: Variant,
    recipe: Recipe,
    steps: Sequence[Step],
    context: StepContext,
    key: str,
    cache: StepCache | None,
) -> tuple[Variant, Effort]:
    model = build_model(full, steps, context, cache)
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
        build_key=key,
    )
    variant = finish(context.workload, context.data, built, full.onnx_bytes())
    return variant, Effort(len(steps), model.cached)


@dataclass(frozen=True)
class Model:
    """What a recipe's steps made of full precision.

    Attributes:
        onnx: the ONNX model; `coded` the same as a file step has coded it.
        exported: what the torch network was exported to; None where no step worked on it.
        program: the network as a `torch.export` archive; None where an ONNX step has changed the model since.
        cached: how many of the steps were not done, as the step cache had what comes of them.
    """

    onnx: bytes
    coded: bytes | None = None
    exported: Exported | None = None
    program: bytes | None = None
    cached: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of the file that is kept."""
        return len(self.onnx if self.coded is None else self.coded)


def build_model(
    full: Variant, steps: Sequence[Step], context: StepContext, cache: StepCache | None = None
) -> Model:
    """Apply planned steps to full precision, without measuring or saving anything.

    Args:
        cache: what it knows of the steps' results is taken from there, and what it does not know is put there. So is
            what the steps leave in the context, which ends up the same. It is not used where `context.data` is of a
            subclass of `Data`, which may hold other rows than the workload's.

    Raises:
        StepError: a step cannot do what it is asked for.
        ExportError: the network that the steps made cannot be exported.
    """
    stages = _stages(steps)
    if cache is None or cache.problem or type(context.data) is not Data:
        work, begun = _Work.start(full, stages, context), 0
        for stage in stages:
            work.advance(stage, context)
    else:
        work, begun = _build_cached(full, stages, context, cache)
    # After an ONNX-level step there is no torch form of the network any more.
    as_torch = work.exported if all(step.level != "onnx" for step in steps) else None
    return Model(
        work.content(),
        work.coded,
        work.exported,
        as_torch.program if as_torch else None,
        sum(stage is not None for stage in stages[:begun]),
    )


Stage = Step | None
"""A step, or None for the export to ONNX, which follows the last step on the network."""


def _stages(steps: Sequence[Step]) -> list[Stage]:
    levels: dict[str, list[Stage]] = {"torch": [], "onnx": [], "file": []}
    for step in steps:
        levels[step.level].append(step)
    export: list[Stage] = [None] if levels["torch"] else []
    return [*levels["torch"], *export, *levels["onnx"], *levels["file"]]


def _keys(full: Variant, stages: Sequence[Stage], data: Data, seed: int) -> list[str]:
    """The key of what comes out of each stage."""
    root = root_key(full, data)
    return list(accumulate(stages, lambda before, stage: step_key(before, stage, seed), initial=root))[1:]


@dataclass
class _Work:
    """A model on its way through the stages: a network, then an ONNX model, then also a coded file."""

    network: nn.Module | None = None
    exported: Exported | None = None
    graph: ModelProto | None = None
    coded: bytes | None = None

    @classmethod
    def start(cls, full: Variant, stages: Sequence[Stage], context: StepContext) -> _Work:
        """Full precision, in the form that the first stage takes."""
        import onnx

        if None in stages:
            return cls(network=load_network(context.workload, full))
        return cls(graph=onnx.load_model_from_string(full.onnx_bytes()))

    def advance(self, stage: Stage, context: StepContext) -> None:
        """Go through one stage."""
        context.progress(_name(stage), 0.0)
        if stage is None:
            assert self.network is not None
            self.exported = export_checked(self.network, context.data)
            self.network, self.graph = None, self.exported.onnx
        elif stage.level == "torch":
            self.network = _applied(stage, self.network, context)
        elif stage.level == "onnx":
            # Quantizers note every inner shape, and keep the notes of what they work on.
            self.graph = bare(_applied(stage, self.graph, context))
        else:
            self.coded = _applied(stage, self.content(), context)

    def content(self) -> bytes:
        """The ONNX file."""
        assert self.graph is not None
        content: bytes = self.graph.SerializeToString()
        return content

    def pack(self, stage: Stage) -> Entry:
        """What a stage has made, for the cache."""
        if stage is not None and stage.level == "torch":
            import torch

            pickled = io.BytesIO()
            torch.save(self.network, pickled)
            return Entry({"network": pickled.getvalue()})
        if stage is None:
            assert self.exported is not None
            parts = {"onnx": self.content(), "program": self.exported.program}
            return Entry(parts, {"max_error": self.exported.max_error})
        return Entry({"onnx": self.content()} | ({"coded": self.coded} if self.coded is not None else {}))

    @classmethod
    def unpack(cls, stage: Stage, entry: Entry, export: Entry | None) -> _Work:
        """The work as it was after a stage.

        Args:
            export: the entry of the export, for a stage that comes after it.
        """
        import onnx

        if stage is not None and stage.level == "torch":
            import torch

            # Not weights alone: compression/cache.py says why this pickle may be read.
            return cls(network=torch.load(io.BytesIO(entry.parts["network"]), weights_only=False))
        exported = None
        if export is not None:
            graph = onnx.load_model_from_string(export.parts["onnx"])
            exported = Exported(graph, export.parts["program"], cast("float", export.facts["max_error"]))
        graph = onnx.load_model_from_string(entry.parts["onnx"])
        return cls(exported=exported, graph=graph, coded=entry.parts.get("coded"))


def _build_cached(
    full: Variant, stages: Sequence[Stage], context: StepContext, cache: StepCache
) -> tuple[_Work, int]:
    """Go through the stages that come after the last one whose result is known; and how many come before."""
    keys = _keys(full, stages, context.data, context.seed)
    warned, files = len(context.warnings), dict(context.extra)
    resumed = _resumed(stages, keys, context, cache)
    work, begun = resumed or (_Work.start(full, stages, context), 0)
    for stage, key in list(zip(stages, keys, strict=True))[begun:]:
        work.advance(stage, context)
        extra = {name: content for name, content in context.extra.items() if files.get(name) != content}
        problem = _keep(work, stage, key, cache, context.warnings[warned:], context.calibration_sha256, extra)
        if problem:
            context.progress(f"{_name(stage)}: not cached, {problem}", 1.0)
    return work, begun


def _keep(
    work: _Work,
    stage: Stage,
    key: str,
    cache: StepCache,
    warnings: Sequence[str],
    calibration_sha256: str | None,
    extra: Mapping[str, bytes],
) -> str | None:
    """Put into the cache what a stage has made, and what it and those before it left in the context.

    Returns:
        Why that could not be done; it costs the cache alone.
    """
    facts: dict[str, JsonValue] = {"warnings": list(warnings), "calibration_sha256": calibration_sha256}
    try:
        entry = work.pack(stage)
        parts = dict(entry.parts) | {_EXTRA + name: content for name, content in extra.items()}
        return cache.put(key, Entry(parts, facts | dict(entry.facts)))
    except Exception as error:  # noqa: BLE001 - networks are the users' own, and not all of them can be pickled
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


_EXTRA = "extra/"
"""Before the name of a file that a step wants kept with the variant."""


def _resumed(
    stages: Sequence[Stage], keys: Sequence[str], context: StepContext, cache: StepCache
) -> tuple[_Work, int] | None:
    """The work after the last stage that the cache knows, and how many stages that are."""
    exported_at = stages.index(None) if None in stages else len(stages)
    for number in reversed(range(len(stages))):
        entry = cache.get(keys[number])
        if entry is None:
            continue
        export = None
        if number >= exported_at:
            export = entry if number == exported_at else cache.get(keys[exported_at])
            if export is None:
                continue
        work = _unpacked(stages[number], entry, export)
        if work is None:
            continue
        context.warnings.extend(cast("list[str]", entry.facts["warnings"]))
        digest = cast("str | None", entry.facts["calibration_sha256"])
        context.calibration_sha256 = digest or context.calibration_sha256
        for name, content in entry.parts.items():
            if name.startswith(_EXTRA):
                context.extra[name.removeprefix(_EXTRA)] = content
        for stage in stages[: number + 1]:
            context.progress(f"{_name(stage)} (from the cache)", 1.0)
        return work, number + 1
    return None


def _unpacked(stage: Stage, entry: Entry, export: Entry | None) -> _Work | None:
    try:
        return _Work.unpack(stage, entry, export)
    except Exception:  # noqa: BLE001 - a pickle fails in every way there is; then the step is done anew
        return None


def _name(stage: Stage) -> str:
    return "export" if stage is None else stage.name


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
