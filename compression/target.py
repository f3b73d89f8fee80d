"""A size to meet: the value of one parameter of a recipe with which the file just fits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from compression.errors import CompressionError, RecipeError, StepError
from compression.planner import plan
from compression.recipe import Recipe, StepSpec
from compression.steps import STEPS, Step, StepContext, build
from compression.workload import Progress, Workload, no_progress

if TYPE_CHECKING:
    from compression.cache import StepCache
    from compression.data import Data
    from compression.variant import Variant

TOLERANCE = 0.02
"""A file that is within this share below the size asked for is near enough."""
SLACK = 0.02
"""How far a size may go the wrong way before it counts as going up and down: coded files are a little ragged."""
ADJUSTMENTS = 3
_MOST = 60
"""Sizes that are looked at, at most; halving floats comes to an end well before."""
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


class TargetError(CompressionError):
    """A size cannot be met, or not by this parameter."""


@dataclass(frozen=True)
class Found:
    """Where a bisection ended.

    Attributes:
        value: the parameter's, `size` the bytes it makes.
        sizes: all values that were looked at, with their sizes, in that order.
        met: the size is within the tolerance below the limit; else the parameter cannot come nearer.
    """

    value: float
    size: int
    sizes: dict[float, int]
    met: bool


def bisect(
    size_of: Callable[[float], int],
    low: float,
    high: float,
    limit: int,
    *,
    whole: bool = False,
    tolerance: float = TOLERANCE,
    resolution: float = 1e-4,
) -> Found:
    """The value in a range whose size is the largest that is not over a limit.

    The size may rise or fall with the value; which of the two, the ends tell. It is checked on the way that it does so
    throughout, give or take SLACK. Each value is looked at once.

    Args:
        size_of: bytes for a value.
        low, high: ends of the range, both may be taken.
        limit: bytes.
        whole: only whole numbers; `low` and `high` are.
        tolerance: stop at a size that is no more than this share below the limit.
        resolution: stop where the value is known to this share of the range.

    Raises:
        TargetError: no size in the range fits, or the size goes up and down.
    """
    sizes: dict[float, int] = {}

    def look(value: float) -> int:
        if value not in sizes:
            sizes[value] = size_of(value)
        return sizes[value]

    ends = sorted((low, high), key=look)
    fits, misses = ends
    if look(fits) > limit:
        raise TargetError(
            f"out of reach: the smallest file is {look(fits)} bytes, with {fits:g}; {limit} were asked for"
        )
    if look(misses) <= limit:
        return _found(misses, sizes, limit, tolerance)
    while len(sizes) < _MOST:
        if look(fits) >= (1 - tolerance) * limit:
            break
        if abs(misses - fits) <= (1 if whole else resolution * (high - low)):
            break
        middle = (fits + misses) / 2
        if whole:
            middle = math.floor(middle)
        size = look(middle)
        if not (1 - SLACK) * look(fits) <= size <= (1 + SLACK) * look(misses):
            raise TargetError(
                f"the size goes up and down: {look(fits)} bytes with {fits:g}, {size} with {middle:g}, "
                f"{look(misses)} with {misses:g}: choose another parameter with --vary"
            )
        if size <= limit:
            fits = middle
        else:
            misses = middle
    return _found(fits, sizes, limit, tolerance)


def _found(value: float, sizes: dict[float, int], limit: int, tolerance: float) -> Found:
    # A ragged size may have been better at a value passed over.
    best = max((other for other, size in sizes.items() if size <= limit), key=lambda other: sizes[other])
    value = best if sizes[best] > sizes[value] else value
    return Found(value, sizes[value], sizes, sizes[value] >= (1 - tolerance) * limit)


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
        built: value -> bytes of the real builds; the last one is this.
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
    limit, the quick search is done again with a limit that is lower by as much.

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
        found = bisect(look, low, high, asked, whole=chosen.whole, tolerance=tolerance)
        value = _rounded(chosen, found.value)
        if value in built:  # no other value is left below the one that missed
            break
        built[value] = size_of(with_value(recipe, chosen, value), f"building with {value:g}")
        if built[value] <= limit:
            name = target_name(recipe.name, limit)
            named = with_value(recipe, chosen, value).model_copy(update={"name": name})
            return Target(named, chosen, value, built[value], looks, built)
        asked = int(found.size * limit / built[value]) - 1
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
    recipe's own value is doubled until the file is too large.

    Raises:
        TargetError: no value works.
    """
    high = vary.high
    if high is None:
        high = max(vary.value, vary.low, 1)
        for _ in range(_DOUBLINGS):
            if size_of(high) > limit:
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


def save_recipe(recipe: Recipe, comment: Sequence[str], path: Path) -> Path:
    """Write a recipe as YAML that reads back to an equal one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"# {line}\n" for line in comment) + recipe.to_yaml(), encoding="utf-8")
    return path
