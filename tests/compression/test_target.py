from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from compression import compress as compress_module
from compression.data import Data
from compression.errors import CompressionError, StepError
from compression.recipe import Recipe, StepSpec
from compression.search import cli
from compression.search.bisection import bisect
from compression.search.target import (
    TargetError,
    meet_size,
    parameter_to_vary,
    parse_size,
    quick_recipe,
    target_name,
    with_value,
    workable_range,
)
from compression.variant import Variant, load_variant
from compression.workload import Workload

app = typer.Typer()
cli.register(app)


def recipe(*steps: tuple[str, dict[str, object]], name: str = "mine") -> Recipe:
    return Recipe.model_validate(
        {"name": name, "steps": [{"step": step, "params": params} for step, params in steps]}
    )


@given(
    sizes=st.lists(st.integers(1, 10_000), min_size=2, max_size=200, unique=True),
    limit=st.integers(1, 12_000),
    falling=st.booleans(),
)
def test_the_largest_whole_number_that_fits_is_found_and_no_size_asked_for_twice(
    sizes: list[int], limit: int, falling: bool
) -> None:
    ordered = sorted(sizes, reverse=falling)
    asked = []

    def size_of(value: float) -> int:
        asked.append(value)
        return ordered[int(value)]

    fitting = [size for size in sizes if size <= limit]
    if not fitting:
        with pytest.raises(TargetError, match=f"the smallest file is {min(sizes)} bytes"):
            bisect(size_of, 0, len(sizes) - 1, limit, whole=True, tolerance=0)
        return
    found = bisect(size_of, 0, len(sizes) - 1, limit, whole=True, tolerance=0)
    assert found.size == max(fitting) == ordered[int(found.value)]
    assert len(asked) == len(set(asked)) <= 2 + len(sizes).bit_length()


@given(
    slope=st.floats(1e3, 1e6),
    base=st.integers(0, 1000),
    share=st.floats(0.0, 1.0),
    tolerance=st.floats(0.001, 0.2),
    falling=st.booleans(),
)
def test_a_float_comes_as_near_as_the_tolerance_or_the_resolution(
    slope: float, base: int, share: float, tolerance: float, falling: bool
) -> None:
    limit = base + int(slope * share) + 1

    def size_of(value: float) -> int:
        return base + int(slope * (1 - value if falling else value))

    found = bisect(size_of, 0.0, 1.0, limit, tolerance=tolerance)
    assert found.size <= limit
    near = found.size >= (1 - tolerance) * limit
    assert found.met == near
    assert near or limit - found.size <= 2e-4 * slope + 2
    # One that ends at once has used no more than it needs.
    assert len(found.sizes) <= 2 + 14


def test_all_of_a_range_that_fits_gives_its_largest() -> None:
    found = bisect(lambda value: int(100 * value), 0.0, 1.0, 500)
    assert (found.value, found.size, found.met) == (1.0, 100, False)


def test_a_file_of_just_the_size_asked_for_fits() -> None:
    assert bisect(lambda value: int(10 * value), 0, 8, 40, whole=True, tolerance=0).size == 40


def test_a_size_that_goes_up_and_down_is_refused() -> None:
    humped = {0: 100, 1: 150, 2: 600, 3: 140, 4: 200}
    with pytest.raises(TargetError, match=r"goes up and down: .* --vary"):
        bisect(lambda value: humped[int(value)], 0, 4, 160, whole=True)
    # A little of it is the way of coded files.
    ragged = {0: 100, 1: 140, 2: 139, 3: 141, 4: 200}
    assert bisect(lambda value: ragged[int(value)], 0, 4, 145, whole=True, tolerance=0).size == 141


@pytest.mark.parametrize(
    ("text", "size"),
    [("200kB", 200_000), ("1.5 MB", 1_500_000), ("64KiB", 65_536), ("300000", 300_000), ("10b", 10)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-3kB", "two", "3 kg", "1e6"])
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(TargetError, match="is no size"):
        parse_size(text)


def test_names_say_the_size() -> None:
    assert target_name("structured-50", 200_000) == "structured-50-200kb"
    assert target_name("structured-50", 1_500_000) == "structured-50-1-5mb"
    assert target_name("a" * 41, 999) == "a" * 36 + "-999b"


def test_the_first_parameter_that_changes_the_size_is_varied() -> None:
    pruned = recipe(("prune_magnitude", {"amount": 0.5}), ("prune_structured", {"amount": 0.3}))
    found = parameter_to_vary(pruned)
    assert (found.name, found.value, found.low, found.high, found.whole) == (
        "prune_structured.amount",
        0.3,
        0,
        0.95,
        False,
    )
    coded = recipe(("prune_magnitude", {"amount": 0.5}), ("cluster_weights", {}), ("entropy_code", {}))
    assert parameter_to_vary(coded).name == "prune_magnitude.amount"
    clusters = parameter_to_vary(coded, "cluster_weights.clusters")
    assert (clusters.value, clusters.low, clusters.high, clusters.whole) == (32, 2, 256, True)
    student = parameter_to_vary(recipe(("distill", {"width": 8})))
    assert (student.low, student.high, student.whole) == (1, None, True)
    assert parameter_to_vary(recipe(("low_rank", {"energy": 0.9}))).field == "energy"


@pytest.mark.parametrize(
    ("steps", "vary", "words"),
    [
        ([("int8_dynamic", {})], None, "no parameter of recipe mine changes the size"),
        ([("prune_magnitude", {"amount": 0.5})], None, "no parameter of recipe mine"),
        ([("int8_dynamic", {})], "distill.width", "has no step distill"),
        ([("int8_dynamic", {})], "int8_dynamic.targets", "has no number targets; there are none"),
        ([("low_rank", {"size": 0.5})], "low_rank.ratio", "has no number ratio; there are size"),
        ([("int4_weights", {})], "int4_weights.block_size", "one of few values"),
    ],
)
def test_a_parameter_that_cannot_be_varied_is_refused(
    steps: list[tuple[str, dict[str, object]]], vary: str | None, words: str
) -> None:
    with pytest.raises(TargetError, match=words):
        parameter_to_vary(recipe(*steps), vary)


def test_quick_builds_leave_training_out_where_the_size_does_not_hang_on_it() -> None:
    plain = recipe(("prune_structured", {"amount": 0.5}), ("finetune", {"epochs": 9}), ("int8_dynamic", {}))
    assert [spec.step for spec in quick_recipe(plain).steps] == ["prune_structured", "int8_dynamic"]
    coded = recipe(
        ("prune_magnitude", {"amount": 0.5}),
        ("finetune", {"epochs": 9}),
        ("cluster_weights", {"clusters": 8, "epochs": 5}),
        ("entropy_code", {}),
    )
    assert [spec.params.get("epochs") for spec in quick_recipe(coded).steps] == [None, 1, 1, None]
    student = recipe(("distill", {"width": 8, "epochs": 20}))
    assert quick_recipe(student).steps == [StepSpec(step="distill", params={"width": 8, "epochs": 1})]


def test_ends_that_a_step_refuses_are_moved_inwards() -> None:
    vary = parameter_to_vary(recipe(("prune_structured", {"amount": 0.5})))

    def size_of(value: float) -> int:
        if not 0.05 < value < 0.8:
            raise StepError("no")
        return int(1000 * (1 - value))

    low, high = workable_range(size_of, vary, 500)
    assert 0.05 < low < 0.15
    assert 0.4 < high < 0.8

    def never(value: float) -> int:
        raise StepError("never")

    with pytest.raises(TargetError, match="works with no value that was tried: never"):
        workable_range(never, vary, 500)


def test_a_parameter_without_an_end_is_doubled_until_the_file_is_too_large() -> None:
    vary = replace(parameter_to_vary(recipe(("distill", {"width": 3}))), low=1)
    assert workable_range(lambda value: int(10 * value), vary, 100) == (1, 12)

    def narrow(value: float) -> int:
        if value > 7:
            raise StepError("too wide for this network")
        return int(10 * value)

    # Doubled to 12, which is refused, and halved towards 1 from there.
    low, high = workable_range(narrow, vary, 100)
    assert low == 1
    assert 6 <= high <= 7


@pytest.fixture
def structured() -> Recipe:
    return recipe(("prune_structured", {"amount": 0.5}), ("finetune", {"epochs": 1}), name="cut")


class Made:
    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[int]]:
    """Builds that take no time; sizes of real ones, told by their seven epochs, are other ones by a factor."""

    def faked(growth: float = 1.0) -> list[int]:
        sizes: list[int] = []

        def build(full: object, steps: list[Any], context: object, cache: object = None) -> Made:
            shape = 1 - steps[0].amount if hasattr(steps[0], "amount") else steps[0].width / 40
            trained = any(getattr(step, "epochs", 0) == 7 for step in steps)
            sizes.append(int(10_000 * shape * (growth if trained else 1)))
            return Made(sizes[-1])

        monkeypatch.setattr(compress_module, "build_model", build)
        return sizes

    return faked


@pytest.fixture
def coded() -> Recipe:
    return recipe(("prune_magnitude", {"amount": 0.5}), ("finetune", {"epochs": 7}), ("entropy_code", {}))


def test_a_student_of_whole_width_is_found(
    tiny: Workload, data: Data, full: Variant, builds: Callable[..., list[int]]
) -> None:
    builds()
    found = meet_size(tiny, data, full, recipe(("distill", {"width": 4, "epochs": 7})), 5100)
    # Width 20 has 5000 bytes, width 21 has 5250.
    assert repr(found.recipe.steps[0].params["width"]) == "20"
    assert found.size_bytes == 5000
    assert list(found.built) == [20]


def test_a_size_out_of_reach_names_the_smallest(
    tiny: Workload, data: Data, full: Variant, structured: Recipe, builds: Callable[..., list[int]]
) -> None:
    sizes = builds()
    with pytest.raises(TargetError, match=r"smallest file is (\d+) bytes.*100 were asked for") as caught:
        meet_size(tiny, data, full, structured, 100)
    assert str(min(sizes)) in str(caught.value)


def test_a_parameter_of_a_step_that_only_trains_is_refused(
    tiny: Workload, data: Data, full: Variant, structured: Recipe
) -> None:
    with pytest.raises(TargetError, match=r"finetune\.epochs: no size depends on it"):
        meet_size(tiny, data, full, structured, 13_000, vary="finetune.epochs")


@pytest.mark.parametrize(("growth", "real"), [(1.0, 1), (1.1, 2), (0.8, 2)])
def test_a_real_build_that_misses_is_adjusted_upwards_and_downwards(
    tiny: Workload,
    data: Data,
    full: Variant,
    coded: Recipe,
    builds: Callable[..., list[int]],
    growth: float,
    real: int,
) -> None:
    builds(growth)
    found = meet_size(tiny, data, full, coded, 5000)
    assert len(found.built) == real
    assert 4900 <= found.size_bytes == found.built[found.value] <= 5000
    assert found.recipe.steps[0].params == {"amount": found.value}


def test_what_only_grows_over_the_limit_once_trained_is_refused_with_the_limit_that_was_asked_for(
    tiny: Workload, data: Data, full: Variant, coded: Recipe, builds: Callable[..., list[int]]
) -> None:
    builds(30.0)
    with pytest.raises(TargetError, match=r"does not come below 5000 bytes once trained: the smallest of \d"):
        meet_size(tiny, data, full, coded, 5000)


def test_a_better_fit_is_kept_where_the_next_try_misses(
    monkeypatch: pytest.MonkeyPatch, tiny: Workload, data: Data, full: Variant, coded: Recipe
) -> None:
    real = iter([4000, 5600, 5500, 5400])

    def build(full: object, steps: list[Any], context: object, cache: object = None) -> Made:
        return Made(next(real) if steps[1].epochs == 7 else int(10_000 * (1 - steps[0].amount)))

    monkeypatch.setattr(compress_module, "build_model", build)
    assert meet_size(tiny, data, full, coded, 5000).size_bytes == 4000


def test_values_are_written_as_the_step_takes_them() -> None:
    pruned = recipe(("prune_structured", {"amount": 0.5}))
    assert with_value(pruned, parameter_to_vary(pruned), 0.1 + 0.2).steps[0].params == {"amount": 0.3}
    student = recipe(("distill", {"width": 8}))
    assert repr(with_value(student, parameter_to_vary(student), 12.0).steps[0].params["width"]) == "12"


def test_the_command_saves_the_recipe_and_makes_the_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Workload, full: Variant, structured: Recipe
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    path = tmp_path / "cut.yaml"
    path.write_text(structured.to_yaml())
    asked = ["target", str(tiny.directory), "-r", str(path), "--size", "12.5kB"]
    result = CliRunner().invoke(app, [*asked, "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["size_bytes"] <= found["limit_bytes"] == 12_500
    saved = Recipe.load(Path(found["path"]))
    assert saved.model_dump(mode="json") == found["recipe"]
    variant = load_variant("tiny-cut-12-5kb")
    card = variant.scorecard()
    assert card is not None
    assert card.size_bytes == found["size_bytes"] == found["variant"]["size_bytes"]
    again = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert "prune_structured.amount" in again.stdout
    assert "of the 12,500 asked for" in again.stdout
    refused = CliRunner().invoke(app, [*asked[:-1], "1B"])
    assert isinstance(refused.exception, CompressionError)


settings.register_profile("bisection", deadline=None)
settings.load_profile("bisection")
