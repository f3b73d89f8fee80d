from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from compression.compress import default_recipes
from compression.errors import RecipeError
from compression.recipe import Recipe, StepSpec, find_recipe, library, recipes_in
from compression.recipe_schema import recipe_schema
from compression.steps import build
from compression.workload import load_workload

from .conftest import write_workload

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
recipes = st.builds(
    Recipe,
    name=st.from_regex(r"[a-z][a-z0-9-]{0,40}", fullmatch=True).filter(lambda name: name != "full"),
    seed=st.integers(0, 2**32 - 1),
    steps=st.lists(
        st.builds(StepSpec, step=st.text(), params=st.dictionaries(st.text(), values, max_size=3)),
        min_size=1,
        max_size=3,
    ),
)


@given(recipes)
def test_a_recipe_survives_yaml_exactly(recipe: Recipe) -> None:
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert again.hash() == recipe.hash()


def test_the_hash_ignores_layout_and_sees_content() -> None:
    one = Recipe.from_yaml("name: a\nsteps: [{step: s, params: {x: 1, y: 2}}]")
    two = Recipe.from_yaml("steps:\n  - params: {y: 2, x: 1}\n    step: s\n# a comment\nname: a\nseed: 0")
    other = Recipe.from_yaml("name: a\nsteps: [{step: s, params: {x: 1, y: 3}}]")
    assert one.hash() == two.hash() != other.hash()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- a", "must be a mapping"),
        ("name: a", "steps: Field required"),
        ("name: a\nsteps: []", "steps: "),
        ("name: A!\nsteps: [{step: s}]", "name: "),
        ("name: full\nsteps: [{step: s}]", "is the full-precision model"),
        ("name: a\nsteps: [{step: s, amount: 1}]", "steps.0.amount: no such setting"),
        ("name: a\nsteps: [{step: s}]\nmore: 1", "more: no such setting"),
    ],
)
def test_a_bad_recipe_gives_one_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.from_yaml(text, "here.yaml")
    assert str(caught.value).startswith("here.yaml")
    assert "\n" not in str(caught.value)


def test_every_recipe_of_the_library_builds() -> None:
    names = [recipe.name for recipe in library()]
    assert len(names) >= 6
    assert len(set(names)) == len(names)
    for recipe in library():
        for spec in recipe.steps:
            build(spec)


def test_library_files_are_called_like_their_recipes() -> None:
    for path in (Path(__file__).parents[2] / "compression" / "recipes").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["name"] == path.stem


def test_recipes_are_found_by_file_by_name_and_in_the_workload(tmp_path: Path) -> None:
    folder = write_workload(tmp_path / "w")
    (folder / "recipes").mkdir()
    own = Recipe(name="own", steps=[StepSpec(step="int8_dynamic")])
    (folder / "recipes" / "own.yaml").write_text(own.to_yaml())
    assert find_recipe("own", folder) == own == find_recipe(str(folder / "recipes" / "own.yaml"), folder)
    assert find_recipe("int8-static", folder) in library()
    assert recipes_in(folder / "nothing") == []


def test_recipes_on_request_are_found_by_name_and_not_run_by_default(tmp_path: Path) -> None:
    folder = write_workload(tmp_path / "w")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "rare.yaml").write_text(
        "name: rare\non_request: true\nsteps: [{step: int8_dynamic}]"
    )
    assert find_recipe("rare", folder).on_request
    names = {recipe.name for recipe in default_recipes(load_workload(folder))}
    assert names.isdisjoint({"rare", "int4-weights", "mixed-precision"})
    assert "int8-static" in names
    assert find_recipe("int4-weights", folder).on_request


def test_a_recipe_that_is_run_by_default_has_the_hash_it_always_had() -> None:
    recipe = Recipe.from_yaml("name: a\nsteps: [{step: s}]")
    assert recipe.model_dump(mode="json") == {"name": "a", "seed": 0, "steps": [{"step": "s", "params": {}}]}


def test_an_unknown_recipe_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe int9: .*int8-dynamic, int8-static"):
        find_recipe("int9", tmp_path)
    with pytest.raises(RecipeError, match=r"gone.yaml cannot be read"):
        find_recipe("gone.yaml", tmp_path)


def test_what_a_recipe_is_for_is_no_part_of_its_hash() -> None:
    plain = Recipe.from_yaml("name: thin\nsteps: [{step: int8_dynamic}]")
    told = Recipe.from_yaml("name: thin\nabout: quick\nsteps: [{step: int8_dynamic}]")
    assert told.hash() == plain.hash()
    assert told != plain
    assert Recipe.from_yaml(told.to_yaml()) == told
    assert "about" not in plain.to_yaml()


def test_every_recipe_of_the_library_says_what_it_is_for() -> None:
    assert [recipe.name for recipe in library() if not recipe.about] == []


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    schema = recipe_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("recipe", library(), ids=lambda recipe: recipe.name)
def test_the_schema_accepts_the_library(recipe: Recipe, schema: Draft202012Validator) -> None:
    assert schema.is_valid(yaml.safe_load(recipe.to_yaml()))


@pytest.mark.parametrize(
    "steps",
    [
        "[]",
        "[{step: melt}]",
        "[{step: prune_magnitude}]",
        "[{step: prune_magnitude, params: {amount: 2}}]",
        "[{step: finetune, params: {epoch: 2}}]",
        "[{step: int8_static, params: {method: guess}}]",
        "[{step: int8_dynamic, seed: 1}]",
    ],
)
def test_the_schema_refuses_what_a_recipe_may_not_say(steps: str, schema: Draft202012Validator) -> None:
    assert not schema.is_valid(yaml.safe_load(f"name: thin\nsteps: {steps}"))
