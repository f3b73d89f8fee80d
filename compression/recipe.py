"""Recipes: an ordered, typed list of steps, written in Python or YAML."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from compression.errors import RecipeError
from compression.workload import NAME_PATTERN, describe

RESERVED = "full"
"""The name of the full-precision variant; no recipe may take it."""


class StepSpec(BaseModel):
    """One line of a recipe: the registered name of a step and its parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: str
    params: dict[str, JsonValue] = Field(default_factory=dict)


class Recipe(BaseModel):
    """A named list of steps and the seed of everything random in them.

    The name becomes the variant's name. Which steps exist and whether their order can work is checked by
    `compression.planner.plan`.

    Attributes:
        about: what it is for, in a sentence; no part of its hash.
        on_request: the recipe is run when it is asked for by name, and left out when all are run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    about: str = Field(default="", max_length=400, exclude_if=lambda text: not text)
    seed: int = Field(default=0, ge=0, lt=2**32)
    steps: list[StepSpec] = Field(min_length=1)
    # Left out where it is false, so that the hashes of recipes stay what they were before there was such a thing.
    on_request: bool = Field(default=False, exclude_if=lambda asked: not asked)

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, name: str) -> str:
        if name == RESERVED:
            raise ValueError(f'"{RESERVED}" is the full-precision model; give the recipe another name')
        return name

    def to_yaml(self) -> str:
        """The recipe as YAML that `from_yaml` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, source: str = "recipe") -> Recipe:
        """Read a recipe.

        Args:
            source: what to call the text in an error, for example its path.

        Raises:
            RecipeError: in one line, what is wrong with it.
        """
        try:
            raw = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(raw, dict):
            raise RecipeError(f"{source} must be a mapping with name and steps")
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise RecipeError(f"{source}: {describe(error)}") from None

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe from a file."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} cannot be read: {error}") from None
        return cls.from_yaml(text, str(path))

    def hash(self) -> str:
        """sha256 of what the recipe does, whatever the order of its keys and the layout of its file."""
        canonical = json.dumps(
            self.model_dump(mode="json", exclude={"about"}), sort_keys=True, separators=(",", ":")
        )
        return hashlib.sha256(canonical.encode()).hexdigest()


def library() -> list[Recipe]:
    """The recipes that come with Trimtab, in the order of their file names."""
    return recipes_in(Path(__file__).parent / "recipes")


def recipes_in(folder: Path) -> list[Recipe]:
    """All recipes of a folder by file name; none if there is no such folder."""
    return [Recipe.load(path) for path in sorted(folder.glob("*.yaml"))]


def find_recipe(ref: str, folder: Path) -> Recipe:
    """A recipe by path, or by name from a workload's `recipes` folder or the library.

    Raises:
        RecipeError: nothing has that path or name; the message lists the names there are.
    """
    if ref.endswith((".yaml", ".yml")):
        return Recipe.load(Path(ref).expanduser())
    known = {recipe.name: recipe for recipe in (*library(), *recipes_in(folder / "recipes"))}
    if ref not in known:
        raise RecipeError(f"no recipe {ref}: give a .yaml file or one of {', '.join(sorted(known))}")
    return known[ref]
