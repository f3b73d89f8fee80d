"""What a search may choose from: recipes whose parameters are ranges and choices."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PlainValidator, ValidationError, model_validator

from compression.errors import PlanError, RecipeError
from compression.planner import plan
from compression.recipe import Recipe, StepSpec
from compression.steps import STEPS
from compression.workload import Workload, describe

TRIAL = "trial"
"""The name of every recipe while it is tried: two of the same steps then have the same hash."""

_RANGE_KEYS = {"low", "high", "log", "step"}


def _number(value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    if value != value or value in (float("inf"), float("-inf")):  # noqa: PLR0124 - NaN
        raise ValueError("must be a finite number")
    return value


Number = Annotated[int | float, PlainValidator(_number)]


class Range(BaseModel):
    """Numbers from `low` to `high`, both included; whole ones where both, and the step, are whole.

    Args:
        log: drawn evenly over the logarithm.
        step: only low, low + step, low + 2 step and so on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: Number
    high: Number
    log: bool = False
    step: Number | None = None

    @model_validator(mode="after")
    def _sane(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError("a logarithmic range must start above 0")
        if self.log and self.step is not None:
            raise ValueError("give either log or step")
        if self.step is not None and not 0 < self.step <= self.high - self.low:
            raise ValueError("step must be above 0, and no larger than the range")
        return self

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    def ends(self) -> list[JsonValue]:
        """The least and the largest value."""
        return [self.low, self.high]


class Choices(BaseModel):
    """One of several values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    choices: tuple[JsonValue, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _different(self) -> Choices:
        if len(set(self.labels())) != len(self.choices):
            raise ValueError("choices must differ from each other")
        return self

    def labels(self) -> list[str]:
        """The choices as texts."""
        return [json.dumps(choice, sort_keys=True) for choice in self.choices]

    def ends(self) -> list[JsonValue]:
        """All values."""
        return list(self.choices)


Parameter = Range | Choices
Draw = Callable[[str], Any]
"""Gives the value of a parameter by its name; the same one each time within a trial."""


@dataclass(frozen=True)
class Space(ABC):
    """Recipes with open parameters.

    Attributes:
        parameters: by name, what each may be.
        seed: of the recipes.
        left_out: what cannot work on this workload, and why.
    """

    parameters: Mapping[str, Parameter]
    seed: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)

    @abstractmethod
    def specs(self, draw: Draw) -> list[StepSpec]:
        """The steps for some values; asks for the values that matter only."""

    def starts(self) -> list[dict[str, JsonValue]]:
        """Values, not of all parameters, that a search tries first."""
        return []

    def recipe(self, draw: Draw) -> Recipe:
        """The recipe for some values.

        Raises:
            PlanError: there is nothing in it.
        """
        specs = self.specs(draw)
        if not specs:
            raise PlanError("no step at all: that is full precision itself")
        return Recipe(name=TRIAL, seed=self.seed, steps=specs)

    def digest(self) -> str:
        """A short hash that differs between spaces."""
        text = {name: parameter.model_dump(mode="json") for name, parameter in self.parameters.items()}
        fixed = json.dumps([type(self).__name__, self.seed, text, self._fixed()], sort_keys=True)
        return hashlib.sha256(fixed.encode()).hexdigest()[:12]

    def _fixed(self) -> JsonValue:
        """What else makes the recipes what they are."""
        return None


@dataclass(frozen=True)
class FileSpace(Space):
    """A recipe some of whose parameters are open.

    Attributes:
        template: its steps, with the name of an open parameter in an `_Open` wherever there is one.
    """

    template: Sequence[tuple[str, Mapping[str, Any]]] = ()

    def specs(self, draw: Draw) -> list[StepSpec]:
        """The steps with all values filled in."""
        return [StepSpec(step=name, params=_filled(params, draw)) for name, params in self.template]

    def _fixed(self) -> JsonValue:
        return json.loads(json.dumps(self.template, default=lambda opened: {"open": opened.name}))


@dataclass(frozen=True)
class _Open:
    name: str


def read_space(path: Path, workload: Workload) -> FileSpace:
    """Read a recipe whose parameters may be `{low, high, log?, step?}` or `{choices: [...]}`.

    Raises:
        RecipeError: in one line, what is wrong with it, also where an end of a range or a choice is nothing that the
            step takes.
        PlanError: the steps cannot work in this order, or not on this workload.
    """
    recipe = Recipe.load(path)
    parameters: dict[str, Parameter] = {}
    template = []
    for number, spec in enumerate(recipe.steps, 1):
        if spec.step not in STEPS:
            raise RecipeError(f"{path}: no step {spec.step}; there are {', '.join(sorted(STEPS))}")
        opened = _opened(spec.params, f"{number}.{spec.step}", str(path), parameters)
        template.append((spec.step, opened))
    if not parameters:
        raise RecipeError(
            f"{path} leaves nothing open: give at least one parameter as {{low, high}} or {{choices: [...]}}"
        )
    space = FileSpace(parameters, recipe.seed, {}, template)
    _check_ends(space, str(path))
    errors = []
    for end in (0, -1):
        try:
            plan(space.recipe(_at(parameters, end)), workload)
        except PlanError as error:
            errors.append(str(error).replace(f"recipe {TRIAL}", str(path), 1))
        except RecipeError as error:
            errors.append(f"{path}: {error}")
    if len(errors) == 2:
        raise PlanError(errors[0])
    return space


def _at(parameters: Mapping[str, Parameter], end: int) -> Draw:
    return lambda name: parameters[name].ends()[end]


def _opened(value: Any, where: str, source: str, found: dict[str, Parameter]) -> Any:
    if isinstance(value, dict):
        kind: type[Range] | type[Choices] | None = None
        if "choices" in value:
            kind = Choices
        elif value.keys() & _RANGE_KEYS and not any(isinstance(part, dict | list) for part in value.values()):
            kind = Range
        if kind is not None:
            try:
                found[where] = kind.model_validate(value)
            except ValidationError as error:
                raise RecipeError(f"{source}: {where}: {describe(error)}") from None
            return _Open(where)
        return {key: _opened(part, f"{where}.{key}", source, found) for key, part in value.items()}
    if isinstance(value, list):
        return [_opened(part, f"{where}.{place}", source, found) for place, part in enumerate(value)]
    return value


def _filled(value: Any, draw: Draw) -> Any:
    if isinstance(value, _Open):
        return draw(value.name)
    if isinstance(value, Mapping):
        return {key: _filled(part, draw) for key, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, draw) for part in value]
    return value


def _check_ends(space: FileSpace, source: str) -> None:
    """Values that a field refuses whatever the others are; what only does not go together is found in the search."""
    for changed, parameter in space.parameters.items():
        number = int(changed.partition(".")[0])
        name, params = space.template[number - 1]
        for value in parameter.ends():

            def draw(asked: str, changed: str = changed, value: JsonValue = value) -> JsonValue:
                return value if asked == changed else space.parameters[asked].ends()[0]

            try:
                STEPS[name].model_validate(_filled(params, draw))
            except ValidationError as error:
                if any(item["loc"] for item in error.errors(include_url=False)):
                    raise RecipeError(f"{source}: step {number} ({name}): {describe(error)}") from None
