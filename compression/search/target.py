"""A size to meet: the value of one parameter of a recipe with which the file just fits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

from compression.errors import RecipeError, StepError
from compression.planner import plan
from compression.recipe import Recipe, StepSpec
from compression.search.bisection import TOLERANCE, TargetError, bisect
from compression.steps import STEPS, Step, StepContext, build
from compression.workload import Progress, Workload, no_progress

if TYPE_CHECKING:
    from compression.cache import StepCache
    from compression.data import Data
    from compression.variant import Variant

ADJUSTMENTS = 3
_DOUBLINGS = 20

_SIZE_FIELDS: dict[str, tuple[str, ...]] = {
    "prune_structured": ("amount",),
    "prune_structured_iterative": ("amount",),
    "low_rank": ("size", "ratio", "energy"),
    "distill": ("width",),
}
"""Parameters that change how many weights there are."""
_CODED_FIELDS: dict[str, tuple[str, ...]] = {
    "prune_magnitude": ("amount",),
    "prune_iterative": ("amount",),
    "lottery_ticket": ("amount",),
    "prune_threshold": ("quality",),
    "cluster_weights": ("clusters",),
}
"""Parameters that change what entropy coding makes of them, and no size without it."""


@dataclass(frozen=True)
class Vary:
    """A numeric parameter of one step of a recipe.

    Attributes:
        index: place of the step, from 0.
        low, high: ends of what it may be; `high` is None where it has no end.
    """

    index: int
    step: str
    field: str
    value: float
    low: float
    high: float | None
    whole: bool

    @property
    def name(self) -> str:
        """As `--vary` takes it."""
        return f"{self.step}.{self.field}"


def parameter_to_vary(recipe: Recipe, asked: str | None = None) -> Vary:
    """The parameter that was asked for, or the first one that changes the size of the file.

    Args:
        asked: `STEP.PARAM`; the first step of that name is taken.

    Raises:
        TargetError: there is none, or it is no number.
    """
    coded = any(spec.step == "entropy_code" for spec in recipe.steps)
    usual = _SIZE_FIELDS | (_CODED_FIELDS if coded else {})
    steps = [build(spec) for spec in recipe.steps]
    if asked is None:
        for index, (spec, step) in enumerate(zip(recipe.steps, steps, strict=True)):
            for name in usual.get(spec.step, ()):
                if getattr(step, name) is not None:
                    return _vary(index, spec.step, name, step)
        raise TargetError(
            f"no parameter of recipe {recipe.name} changes the size of its file: use a step such as "
            f"{', '.join(_SIZE_FIELDS)} (with entropy_code also {', '.join(_CODED_FIELDS)}), or name one with --vary"
        )
    wanted, _, name = asked.partition(".")
    for index, (spec, step) in enumerate(zip(recipe.steps, steps, strict=True)):
        if spec.step == wanted:
            numbers = [field for field in type(step).model_fields if _is_number(getattr(step, field))]
            if name not in numbers:
                raise TargetError(
                    f"--vary {asked}: {wanted} has no number {name}; there are {', '.join(numbers) or 'none'}"
                )
            return _vary(index, wanted, name, step)
    names = ", ".join(dict.fromkeys(spec.step for spec in recipe.steps))
    raise TargetError(
        f"--vary {asked}: recipe {recipe.name} has no step {wanted}; write STEP.PARAM, of {names}"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _vary(index: int, name: str, field: str, step: Step) -> Vary:
    info = type(step).model_fields[field]
    value = getattr(step, field)
    kinds = get_args(info.annotation) or (info.annotation,)
    if not set(kinds) <= {int, float, type(None)}:
        raise TargetError(f"--vary {name}.{field}: it is one of few values, not a range of numbers")
    whole = float not in kinds
    low, high = 0.0, math.inf
    for rule in info.metadata:
        # pydantic's constraints: annotated-types' Gt, Ge, Lt, Le, one attribute each.
        open_end = 1 if whole else 0
        low = max(low, getattr(rule, "ge", low), getattr(rule, "gt", low - open_end) + open_end)
        high = min(high, getattr(rule, "le", high), getattr(rule, "lt", high + open_end) - open_end)
    return Vary(index, name, field, value, low, None if math.isinf(high) else high, whole)


def with_value(recipe: Recipe, vary: Vary, value: float) -> Recipe:
    """The recipe with another value of one parameter."""
    specs = list(recipe.steps)
    spec = specs[vary.index]
    number = round(value) if vary.whole else float(f"{value:.6g}")
    specs[vary.index] = StepSpec(step=spec.step, params=spec.params | {vary.field: number})
    return recipe.model_copy(update={"steps": specs})


def quick_recipe(recipe: Recipe) -> Recipe:
    """A recipe of nearly the same size that takes little or no training.

    Shapes do not depend on training, so that recovery is left out where the file is not entropy coded; where it is,
    weights count, and every training is cut to one epoch. A student has to be trained in any case, for one.
    """
    from compression.steps.train import Training

    coded = any(spec.step == "entropy_code" for spec in recipe.steps)
    specs = []
    for spec in recipe.steps:
        cls = STEPS[spec.step]
        if spec.step == "finetune" and not coded:
            continue
        if not issubclass(cls, Training):
            specs.append(spec)
            continue
        least = 1 if coded or spec.step != "cluster_weights" else 0
        specs.append(StepSpec(step=spec.step, params=spec.params | {"epochs": least}))
    return recipe.model_copy(update={"steps": specs or list(recipe.steps)})


@dataclass(frozen=True)
class Target:
    """A recipe that meets a size.

    Attributes:
        recipe: under a name of its own, with the value found; `vary` the parameter that has it.
        size_bytes: of the file that the recipe really makes.
        looks: value -> bytes of the quick builds.
        built: value -> bytes of the real builds, in their order; the recipe is one of them.
    """

    recipe: Recipe
    vary: Vary
    value: float
    size_bytes: int
    looks: dict[float, int]
    built: dict[float, int]


def meet_size(
    workload: Workload,
    data: Data,
    full: Variant,
    recipe: Recipe,
    limit: int,
    *,
    vary: str | None = None,
    tolerance: float = TOLERANCE,
    cache: StepCache | None = None,
    progress: Progress = no_progress,
) -> Target:
    """Find the value of one parameter with which the file is as large as it may be.

    Values are tried without training, or with little; the recipe is then built once for real. If that file is over the
    limit, or below it by more than the tolerance, the quick search is done again with a limit that is lower or higher
    by as much, at most ADJUSTMENTS times. Of the real files within the limit the largest is taken.

    Args:
        limit: bytes of the file that is kept.
        vary: `STEP.PARAM`; by default the first parameter that changes the size.

    Raises:
        TargetError: the size is out of reach, or does not depend on the parameter in one direction.
        PlanError: the recipe cannot work on this workload.
    """
    from compression.compress import build_model

    plan(recipe, workload)
    chosen = parameter_to_vary(recipe, vary)
    quick = quick_recipe(recipe)
    names = [spec.step for spec in quick.steps]
    if chosen.step not in names:
        raise TargetError(f"--vary {chosen.name}: no size depends on it; name another parameter")
    # Its place may have moved, as steps before it may be left out.
    quick_vary = replace(chosen, index=names.index(chosen.step))

    def size_of(of: Recipe, what: str) -> int:
        context = StepContext(workload, data, of.seed, lambda step, done: progress(f"{what}: {step}", done))
        return build_model(full, plan(of, workload), context, cache).size_bytes

    looks: dict[float, int] = {}

    def look(value: float) -> int:
        value = _rounded(chosen, value)
        if value not in looks:
            looks[value] = size_of(with_value(quick, quick_vary, value), f"{chosen.name} {value:g}")
        return looks[value]

    low, high = workable_range(look, chosen, limit)
    built: dict[float, int] = {}
    asked = limit
    for _ in range(1 + ADJUSTMENTS):
        try:
            found = bisect(look, low, high, asked, whole=chosen.whole, tolerance=tolerance)
        except TargetError:
            if not built:
                raise
            break  # the limit asked for now is not the one that the message would name
        value = _rounded(chosen, found.value)
        if value in built:  # no other value is left between those that missed
            break
        size = built[value] = size_of(with_value(recipe, chosen, value), f"building with {value:g}")
        if (1 - tolerance) * limit <= size <= limit:
            break
        asked = int(found.size * limit / size) - (size > limit)
    fitting = [value for value, size in built.items() if size <= limit]
    if fitting:
        value = max(fitting, key=lambda fits: built[fits])
        name = target_name(recipe.name, limit)
        named = with_value(recipe, chosen, value).model_copy(update={"name": name})
        return Target(named, chosen, value, built[value], looks, built)
    smallest = min(built.values())
    raise TargetError(
        f"{chosen.name} does not come below {limit} bytes once trained: the smallest of {len(built)} builds has "
        f"{smallest}; ask for that, or vary another parameter with --vary"
    )


def _rounded(vary: Vary, value: float) -> float:
    return round(value) if vary.whole else float(f"{value:.6g}")


def workable_range(size_of: Callable[[float], int], vary: Vary, limit: int) -> tuple[float, float]:
    """The widest range of a parameter whose ends the recipe can be built with.

    An end that a step refuses is moved inwards by halves of the way, from a 256th of it on. Without an upper end the
    recipe's own value is doubled until the file is too large, or the step refuses.

    Raises:
        TargetError: no value works.
    """
    high = vary.high
    if high is None:
        high = max(vary.value, vary.low, 1)
        for _ in range(_DOUBLINGS):
            try:
                if size_of(high) > limit:
                    break
            except (StepError, RecipeError):  # the ends are moved inwards below
                break
            high *= 2
    spread = high - vary.low
    shares = [0.0, *(2.0**-power for power in range(8, 0, -1))]
    ends = []
    for end, inwards in ((vary.low, spread), (high, -spread)):
        refusal = ""
        for share in shares:
            value = end + share * inwards
            if vary.whole:
                value = round(value)
            try:
                size_of(value)
            except (StepError, RecipeError) as error:
                refusal = str(error)
                continue
            ends.append(value)
            break
        else:
            raise TargetError(f"{vary.name} works with no value that was tried: {refusal}")
    return min(ends), max(ends)


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as `200kB`, `1.5 MB`, `64KiB` or `300000`.

    Raises:
        TargetError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise TargetError(f"{text!r} is no size: write for example 200kB, 1.5MB, 64KiB or 300000")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size < 1:
        raise TargetError(f"{text!r} is no size: it must be at least one byte")
    return size


def target_name(recipe: str, limit: int) -> str:
    """The recipe's name with the size: `structured-50-200kb`; at most 41 characters."""
    number, unit = next(
        (
            (limit / factor, unit)
            for unit, factor in (("gb", 1e9), ("mb", 1e6), ("kb", 1e3))
            if limit >= factor
        ),
        (float(limit), "b"),
    )
    end = f"-{number:.6g}{unit}".replace(".", "-")
    return f"{recipe[: 41 - len(end)].rstrip('-')}{end}"
