from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import optuna
import psutil
import pytest
import typer
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from compression import compress as compress_module
from compression.compress import Model
from compression.errors import CompressionError, PlanError, RecipeError
from compression.planner import plan
from compression.recipe import Recipe
from compression.scorecard import Estimate
from compression.search import cli, options
from compression.search import result as result_module
from compression.search import run as run_module
from compression.search import study as study_module
from compression.search.evaluate import (
    Evaluator,
    Figures,
    Limits,
    SearchError,
    full_precision,
    selection_data,
)
from compression.search.result import Result, Trial, name_of, result_of, save_recipes
from compression.search.run import search
from compression.search.space import Range, Space, read_space
from compression.search.workload_space import workload_space
from compression.variant import Variant, load_variant
from compression.workload import Workload

app = typer.Typer()
cli.register(app)

PRUNED = """\
name: mine
steps:
  - step: prune_magnitude
    params: {amount: {low: 0.1, high: 0.9, step: 0.1}, targets: {choices: ["*", "layers.*"]}}
"""
QUANTIZED = """\
name: mine
steps:
  - step: int8_dynamic
    params: {per_channel: {choices: [true, false]}, reduce_range: {choices: [true, false]}}
"""


@pytest.fixture
def pruned(tmp_path: Path, tiny: Workload) -> Space:
    return space_of(tmp_path, tiny, PRUNED)


@pytest.fixture
def quantized(tmp_path: Path, tiny: Workload) -> Space:
    return space_of(tmp_path, tiny, QUANTIZED)


def space_of(folder: Path, workload: Workload, text: str) -> Space:
    path = folder / "space.yaml"
    path.write_text(text)
    return read_space(path, workload)


def figures(**changes: Any) -> Figures:
    values: dict[str, Any] = {
        "quality": Estimate(value=0.9, low=0.88, high=0.92),
        "drop": Estimate(value=0.01, low=0.0, high=0.02),
        "worst_group": None,
        "worst_group_drop": 0.0,
        "invalid_outputs": 0,
        "size_bytes": 500,
        "full_size_bytes": 1000,
        "macs": 10,
        "full_macs": 20,
        "latency_ms": 1.0,
        "full_latency_ms": 2.0,
    }
    return Figures(**(values | changes))


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Builds and measurements that take no time; the hashes of what was built."""
    built: list[str] = []

    def build(full: object, steps: list[Any], context: object, cache: object = None) -> Model:
        text = json.dumps([step.model_dump(mode="json") for step in steps])
        built.append(text)
        return Model(text.encode())

    def measure(self: object, model: Model) -> Figures:
        draw = random.Random(model.onnx)
        return figures(
            quality=Estimate(value=draw.random(), low=0, high=1), size_bytes=draw.randrange(1, 1000)
        )

    monkeypatch.setattr(compress_module, "build_model", build)
    monkeypatch.setattr(Evaluator, "__init__", lambda self, *_: None)
    monkeypatch.setattr(Evaluator, "__call__", measure)
    return built


# --- spaces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ("{amount: {low: 0.1}}", "1.prune_magnitude.amount: high: Field required"),
        ("{amount: {low: 0.1, high: 0.5, stop: 1}}", "amount: stop: no such setting"),
        ("{amount: {low: 0.5, high: 0.1}}", r"amount: low \(0.5\) must be below high \(0.1\)"),
        ("{amount: {low: 0, high: 0.5, log: true}}", "amount: a logarithmic range must start above 0"),
        ("{amount: {low: 0.1, high: 0.5, log: true, step: 0.1}}", "give either log or step"),
        ("{amount: {low: 0.1, high: 0.5, step: 0}}", "step must be above 0"),
        ("{amount: {low: a, high: 0.5}}", "low: must be a number"),
        ("{amount: {low: .nan, high: 0.5}}", "low: must be a finite number"),
        ("{amount: {choices: []}}", "choices: Tuple should have at least 1 item"),
        ("{amount: {choices: [0.5, 0.5]}}", "choices must differ"),
        ("{amount: {choices: [0.5], low: 1}}", "low: no such setting"),
        ("{amount: {low: 0.0, high: 0.5}}", r"step 1 \(prune_magnitude\): amount: Input should be greater"),
        ("{amount: {low: 0.1, high: 0.5}, much: 1}", r"step 1 \(prune_magnitude\): much: no such setting"),
        ("{amount: 0.5}", "leaves nothing open"),
    ],
)
def test_a_space_that_cannot_be_is_refused_in_one_line(
    tmp_path: Path, tiny: Workload, params: str, words: str
) -> None:
    text = f"name: mine\nsteps:\n  - {{step: prune_magnitude, params: {params}}}\n"
    with pytest.raises(RecipeError, match=words) as caught:
        space_of(tmp_path, tiny, text)
    assert "\n" not in str(caught.value)
    assert "space.yaml" in str(caught.value)


def test_a_space_whose_steps_cannot_work_is_refused_before_any_trial(
    tmp_path: Path, tiny: Workload, onnx_only: Workload
) -> None:
    text = "name: a\nsteps:\n  - step: int8_dynamic\n" + PRUNED.partition("steps:\n")[2]
    with pytest.raises(PlanError, match="put prune_magnitude before int8_dynamic"):
        space_of(tmp_path, tiny, text)
    with pytest.raises(PlanError, match="has only an ONNX file"):
        space_of(tmp_path, onnx_only, PRUNED)
    with pytest.raises(RecipeError, match="no step zip; there are"):
        space_of(tmp_path, tiny, "name: a\nsteps: [{step: zip}]")


def test_ranges_are_whole_where_all_their_numbers_are() -> None:
    assert Range(low=1, high=4).whole
    assert Range(low=1, high=4, step=1).whole
    assert not Range(low=1.0, high=4).whole
    assert not Range(low=1, high=4, step=0.5).whole


def test_nested_parameters_and_lists_can_be_open(tmp_path: Path, tiny: Workload) -> None:
    text = """\
name: mine
steps:
  - step: mixed_precision
    params: {float_layers: {low: 0, high: 1}, params: {method: {choices: [minmax, entropy]}}, keep_ends: false}
  - step: entropy_code
    params: {min_bytes: {low: 16, high: 4096, log: true}}
"""
    space = space_of(tmp_path, tiny, text)
    assert list(space.parameters) == [
        "1.mixed_precision.float_layers",
        "1.mixed_precision.params.method",
        "2.entropy_code.min_bytes",
    ]
    recipe = space.recipe(lambda name: space.parameters[name].ends()[-1])
    assert recipe.steps[0].params == {
        "float_layers": 1,
        "params": {"method": "entropy"},
        "keep_ends": False,
    }


def test_every_recipe_of_a_workload_s_own_space_can_be_planned(tiny: Workload, full: Variant) -> None:
    space = workload_space(tiny, full)
    assert space.left_out == {}
    draw = random.Random(0)

    def value(parameter: Any) -> Any:
        ends = parameter.ends()
        if not isinstance(parameter, Range):
            return draw.choice(ends)
        steps = round((ends[1] - ends[0]) / (parameter.step or 1)) if parameter.step or parameter.whole else 0
        return ends[0] + (parameter.step or 1) * draw.randint(0, steps) if steps else draw.uniform(*ends)

    seen: set[str] = set()
    for _ in range(300):
        drawn: dict[str, Any] = {}

        def once(name: str, drawn: dict[str, Any] = drawn) -> Any:
            if name not in drawn:
                drawn[name] = value(space.parameters[name])
            return drawn[name]

        try:
            recipe = space.recipe(once)
        except PlanError:
            assert (drawn["family"], drawn["entropy_code"]) == ("none", False)
            assert drawn["quantize"] in ("none", "mixed")
            continue
        plan(recipe, tiny)
        names = [spec.step for spec in recipe.steps]
        if "qat" in names:
            trained, quantized = recipe.steps[names.index("qat") :][:2]
            assert quantized.step == "int8_static"
            assert trained.params["per_channel"] == quantized.params["per_channel"]
        seen |= {spec.step for spec in recipe.steps}
        seen |= {f"{spec.step} by layer" for spec in recipe.steps if spec.params.get("targets", "*") != "*"}
        seen |= {"float nodes" for spec in recipe.steps if spec.params.get("nodes_to_exclude")}
    assert seen >= {
        *("prune_structured", "prune_structured by layer", "low_rank", "low_rank by layer"),
        *("prune_magnitude", "prune_magnitude by layer", "cluster_weights", "distill", "finetune"),
        *(
            "int8_dynamic",
            "int8_static",
            "int4_weights",
            "mixed_precision",
            "float nodes",
            "entropy_code",
            "qat",
        ),
    }


def test_what_cannot_work_on_a_workload_is_left_out_with_its_reason(
    onnx_only: Workload, tmp_path: Path
) -> None:
    space = workload_space(onnx_only, full_precision(onnx_only, tmp_path))
    assert set(space.left_out) == {"structured", "low_rank", "sparse", "distilled"}
    assert "has only an ONNX file" in space.left_out["structured"]
    assert not [name for name in space.parameters if name.startswith(("structured", "distilled"))]
    assert {"family": "none", "quantize": "int8_static"} in space.starts()
    assert not [name for name in space.parameters if ".qat" in name]


# --- limits and figures -------------------------------------------------------------------------------------------


def test_limits_hold_the_upper_end_of_the_drop_and_every_group() -> None:
    limits = Limits(max_drop=0.02, max_latency_ratio=0.5, max_latency_ms=1.0, max_size_bytes=500, max_macs=10)
    assert all(over <= 0 for over in limits.over(figures()).values())

    def broken(**changes: Any) -> list[str]:
        return [name for name, over in limits.over(figures(**changes)).items() if over > 0]

    assert broken(drop=Estimate(value=0.0, low=0.0, high=0.03)) == ["drop"]
    assert broken(worst_group="side=left", worst_group_drop=0.03) == ["group"]
    assert broken(latency_ms=1.1) == ["latency", "latency_ms"]
    assert broken(size_bytes=501) == ["size"]
    assert broken(macs=11) == ["macs"]
    assert broken(invalid_outputs=1) == ["invalid_outputs"]
    assert not any(over > 0 for over in Limits().over(figures(size_bytes=10**9)).values())


def test_figures_are_of_validation_rows(tiny: Workload, full: Variant) -> None:
    data = selection_data(tiny)
    for split in ("test", "production"):
        with pytest.raises(SearchError, match=f"must not look at the {split} split"):
            data.rows(split)
    with pytest.raises(SearchError, match="must not look at the test split"):
        data.groups("test")
    own = Evaluator(tiny, data, full)(Model(full.onnx_bytes()))
    assert own.drop.value == 0
    assert own.size_bytes == own.full_size_bytes == full.manifest.files["model.onnx"].bytes
    assert own.macs == own.full_macs == full.manifest.macs
    assert own.worst_group is None
    assert 0.2 < own.latency_ratio < 5


def test_where_recalls_are_averaged_a_class_that_is_lost_is_a_group_that_is_lost(
    onnx_only: Workload, tmp_path: Path
) -> None:
    # The gate holds every class, so that a search that did not would offer what is then refused.
    full = full_precision(onnx_only, tmp_path)
    graph = onnx.load_model_from_string(full.onnx_bytes())
    output = graph.graph.output[0].name
    for node in graph.graph.node:
        node.output[:] = [f"{name}_before" if name == output else name for name in node.output]
    # Always "below".
    graph.graph.initializer.append(numpy_helper.from_array(np.array([9e3, 0], np.float32), "tilt"))
    graph.graph.node.append(helper.make_node("Add", [f"{output}_before", "tilt"], [output]))
    found = Evaluator(onnx_only, selection_data(onnx_only), full)(Model(graph.SerializeToString()))
    assert found.worst_group == "recall of class above"
    assert found.worst_group_drop > 0.9
    assert found.drop.value < 0.5


def test_what_another_beats_can_still_be_the_only_one_within_a_scenario_s_limits(
    tiny: Workload, full: Variant
) -> None:
    wide = figures(drop=Estimate(value=0.0, low=-0.06, high=0.06))
    narrow = figures(
        drop=Estimate(value=0.005, low=0.0, high=0.01), quality=Estimate(value=0.89, low=0, high=1)
    )
    recipes = [
        Recipe.model_validate({"name": name, "steps": [{"step": "int8_dynamic"}]})
        for name in ("wide", "narrow")
    ]
    trials = tuple(
        Trial(number, "measured", recipe, each)
        for number, (recipe, each) in enumerate(zip(recipes, (wide, narrow), strict=True))
    )
    found = result_of("mine", tiny, full, ("quality", "size"), trials, 1.0, 2, False)
    assert [trial.number for trial in found.frontier] == [0]
    assert {choice.winner for choice in found.choices} == {"narrow"}


# --- searches -----------------------------------------------------------------------------------------------------


def run(tiny: Workload, full: Variant, space: Space, folder: Path, **options: Any) -> Result:
    return search(tiny, full, space, folder=folder, **({"study": "mine"} | options))


def journal(folder: Path) -> str:
    """A study in a file without SQL, which takes a fraction of the time."""
    return f"journal:{folder / 'journal.log'}"


def test_a_search_measures_ranks_and_never_sees_the_test_split(
    monkeypatch: pytest.MonkeyPatch, tiny: Workload, full: Variant, quantized: Space, tmp_path: Path
) -> None:
    asked = set()
    split = type(tiny).split

    def noted(self: Workload, name: Any) -> Any:
        asked.add(name)
        return split(self, name)

    monkeypatch.setattr(type(tiny), "split", noted)
    told: list[int] = []
    result = run(
        tiny,
        full,
        quantized,
        tmp_path,
        trials=3,
        limits=Limits(max_drop=0.05),
        told=lambda trial: told.append(trial.number),
    )
    assert asked == {"validation"}
    assert told == [0, 1, 2]
    assert [trial.state for trial in result.trials] == ["measured"] * 3
    assert result.frontier
    assert all(trial.feasible and trial.same_as is None for trial in result.frontier)
    assert [choice.scenario for choice in result.choices] == ["mobile", "edge-server", "cloud"]


def test_running_again_goes_on_and_the_same_recipe_is_never_built_twice(
    tiny: Workload, full: Variant, quantized: Space, tmp_path: Path, instant: list[str]
) -> None:
    first = run(tiny, full, quantized, tmp_path, trials=3)
    second = run(tiny, full, quantized, tmp_path, trials=12)
    assert [trial.number for trial in second.trials] == list(range(12))
    assert second.trials[:3] == first.trials
    assert (first.done, second.done) == (3, 9)
    # Two switches make four recipes.
    assert len(instant) == len(set(instant)) == 4
    copies = [trial for trial in second.trials if trial.same_as is not None]
    assert len(copies) == 8
    for copy in copies:
        assert copy.figures == second.trials[copy.same_as or 0].figures
    assert run(tiny, full, quantized, tmp_path, trials=12).done == 0


def test_the_same_seed_searches_alike_whether_or_not_it_was_stopped_between(
    tiny: Workload, full: Variant, pruned: Space, tmp_path: Path, instant: list[str]
) -> None:
    def recipes(folder: str, *ends: int, seed: int = 5) -> list[Recipe | None]:
        for end in ends:
            found = run(
                tiny, full, pruned, tmp_path, trials=end, seed=seed, storage=journal(tmp_path / folder)
            )
        return [trial.recipe for trial in found.trials]

    whole = recipes("whole", 6)
    assert len({recipe.hash() for recipe in whole if recipe}) > 2
    assert recipes("parts", 2, 6) == whole
    assert recipes("other", 6, seed=6) != whole


@pytest.mark.parametrize(
    ("objectives", "sampler"),
    [
        (("size",), "tpe"),
        (("quality", "latency", "size", "macs"), None),
        (("size",), "gp"),
    ],
)
def test_all_objectives_and_samplers_work(
    tiny: Workload,
    full: Variant,
    pruned: Space,
    tmp_path: Path,
    instant: list[str],
    objectives: Any,
    sampler: Any,
) -> None:
    result = run(
        tiny,
        full,
        pruned,
        tmp_path,
        trials=13,
        objectives=objectives,
        sampler=sampler,
        storage=journal(tmp_path),
    )
    measured = [trial.figures for trial in result.trials if trial.figures]
    assert len(measured) == 13
    best = result.frontier[0].figures
    assert best is not None
    assert best.cost(objectives[0]) == min(each.cost(objectives[0]) for each in measured)
    if len(objectives) == 1:
        assert len(result.frontier) == 1


def test_nsga_ii_comes_to_later_generations(
    monkeypatch: pytest.MonkeyPatch,
    tiny: Workload,
    full: Variant,
    pruned: Space,
    tmp_path: Path,
    instant: list[str],
) -> None:
    monkeypatch.setattr(study_module, "POPULATION", 3)
    run(tiny, full, pruned, tmp_path, trials=10)
    storage = f"sqlite:///{tmp_path / 'mine.db'}"
    with Opened(storage) as study:
        generations = [
            value
            for trial in study.trials
            for key, value in trial.system_attrs.items()
            if key.endswith("generation")
        ]
    assert max(generations) >= 2


def test_infeasible_and_refused_trials_are_kept_and_shown_as_such(
    monkeypatch: pytest.MonkeyPatch,
    tiny: Workload,
    full: Variant,
    pruned: Space,
    tmp_path: Path,
    instant: list[str],
) -> None:
    build = compress_module.build_model

    def picky(full: Any, steps: Any, context: Any, cache: Any = None) -> Model:
        if steps[0].amount > 0.6:
            raise CompressionError("too much")
        return build(full, steps, context, cache)

    monkeypatch.setattr(compress_module, "build_model", picky)
    result = run(
        tiny,
        full,
        pruned,
        tmp_path,
        trials=12,
        limits=Limits(max_size_bytes=500),
        sampler="random",
        storage=journal(tmp_path),
    )
    refused = [trial for trial in result.trials if trial.state == "refused"]
    assert {trial.why for trial in refused} == {"too much"}
    over = [trial for trial in result.trials if trial.over]
    assert over
    assert all(trial.over == ("size",) and not trial.feasible for trial in over)
    assert not {trial.number for trial in result.frontier} & {trial.number for trial in (*over, *refused)}


def test_an_error_of_nobody_s_making_fails_the_trial_and_not_the_search(
    monkeypatch: pytest.MonkeyPatch,
    tiny: Workload,
    full: Variant,
    pruned: Space,
    tmp_path: Path,
    instant: list[str],
) -> None:
    measure = Evaluator.__call__
    calls = iter(range(100))

    def first_fails(self: Evaluator, model: Model) -> Figures:
        if next(calls) == 0:
            raise RuntimeError("the runtime\nis broken")
        return measure(self, model)

    monkeypatch.setattr(Evaluator, "__call__", first_fails)
    result = run(tiny, full, pruned, tmp_path, trials=2)
    # It counts: a search of which every trial failed would never end.
    assert [trial.state for trial in result.trials] == ["failed", "measured"]
    assert result.trials[0].why == "RuntimeError: the runtime is broken"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objectives": ("size",)}, "another objectives"),
        ({"limits": Limits(max_macs=1)}, "another limits"),
    ],
)
def test_a_study_of_something_else_is_not_mixed(
    tiny: Workload,
    full: Variant,
    pruned: Space,
    tmp_path: Path,
    instant: list[str],
    changes: Any,
    words: str,
) -> None:
    run(tiny, full, pruned, tmp_path, trials=1)
    with pytest.raises(SearchError, match=rf"{words}.*--study") as caught:
        run(tiny, full, pruned, tmp_path, trials=2, **changes)
    assert "\n" not in str(caught.value)


def test_a_study_of_other_data_or_another_space_is_not_mixed(
    tiny: Workload, full: Variant, pruned: Space, tmp_path: Path, instant: list[str]
) -> None:
    from dataclasses import replace

    run(tiny, full, pruned, tmp_path, trials=1)
    other = replace(full, tag="tiny-full:another")
    with pytest.raises(
        SearchError, match=f"another full-precision model or data .{full.tag}, now {other.tag}"
    ):
        run(tiny, other, pruned, tmp_path, trials=2)
    folder = tmp_path / "other"
    folder.mkdir()
    with pytest.raises(SearchError, match="another search space"):
        run(tiny, full, space_of(folder, tiny, PRUNED.replace("0.9", "0.8")), tmp_path, trials=2)


def test_a_search_needs_an_end_objectives_and_a_database(
    tiny: Workload, full: Variant, pruned: Space, tmp_path: Path
) -> None:
    with pytest.raises(SearchError, match="needs an end"):
        run(tiny, full, pruned, tmp_path)
    with pytest.raises(SearchError, match="each objective once"):
        run(tiny, full, pruned, tmp_path, trials=1, objectives=("size", "size"))
    for storage, shown in (
        ("nowhere", "nowhere"),
        ("sqlite:////nowhere/at/all.db", "sqlite:////nowhere/at/all.db"),
        ("nobase://me:se:c@ret@host/db", r"nobase://me:\*\*\*@host/db"),
    ):
        with pytest.raises(SearchError, match=f"study at {shown} cannot be opened") as caught:
            run(tiny, full, pruned, tmp_path, trials=1, storage=storage)
        assert "ret" not in str(caught.value)


def test_a_database_that_breaks_off_ends_the_search_with_a_word_on_it(
    tiny: Workload, full: Variant, pruned: Space, tmp_path: Path, instant: list[str]
) -> None:
    def told(trial: Trial) -> None:
        raise optuna.exceptions.StorageInternalError("the disk\nis full")

    with pytest.raises(SearchError, match=r"mine\.db is out of reach: the disk is full; run the same"):
        run(tiny, full, pruned, tmp_path, trials=2, told=told)


def test_the_time_ends_a_search(
    tiny: Workload, full: Variant, pruned: Space, tmp_path: Path, instant: list[str]
) -> None:
    assert run(tiny, full, pruned, tmp_path, budget_s=1e-9).done <= 1


def test_a_space_that_is_used_up_ends_a_search_by_time(
    monkeypatch: pytest.MonkeyPatch,
    tiny: Workload,
    full: Variant,
    quantized: Space,
    tmp_path: Path,
    instant: list[str],
) -> None:
    monkeypatch.setattr(run_module, "STALE", 5)
    result = run(tiny, full, quantized, tmp_path, budget_s=600, sampler="random", storage=journal(tmp_path))
    assert [trial.same_as is not None for trial in result.trials[-5:]] == [True] * 5
    assert result.done == len(result.trials) < 40


def test_ctrl_c_leaves_what_there_is_and_the_trial_for_the_next_run(
    tiny: Workload, full: Variant, pruned: Space, tmp_path: Path, instant: list[str]
) -> None:
    def progress(number: int, what: str) -> None:
        if number == 2:
            raise KeyboardInterrupt

    result = run(tiny, full, pruned, tmp_path, trials=5, progress=progress)
    assert result.interrupted
    assert [(trial.number, trial.state) for trial in result.trials] == [
        (0, "measured"),
        (1, "measured"),
        (2, "failed"),
    ]
    broken_off = result.trials[2]
    assert broken_off.why == "interrupted"
    again = run(tiny, full, pruned, tmp_path, trials=5)
    assert not again.interrupted
    assert again.trials[3].recipe == broken_off.recipe
    assert again.trials[3].state == "measured"


class Opened:
    """A study's database, closed again."""

    def __init__(self, url: str) -> None:
        self.storage = optuna.storages.RDBStorage(url)

    def __enter__(self) -> optuna.Study:
        return optuna.load_study(study_name="mine", storage=self.storage)

    def __exit__(self, *_: object) -> None:
        self.storage.remove_session()
        self.storage.engine.dispose()


def test_a_trial_whose_process_died_is_tried_once_more_and_no_third_time(
    tiny: Workload, full: Variant, pruned: Space, tmp_path: Path, instant: list[str]
) -> None:
    run(tiny, full, pruned, tmp_path, trials=1)
    url = f"sqlite:///{tmp_path / 'mine.db'}"

    def die() -> dict[str, Any]:
        with Opened(url) as study:
            trial = study.ask()
            # This process has that number, and began at another time.
            trial.set_user_attr("worker", study_module.this_worker() | {"started": 1.0})
            trial.suggest_float("1.prune_magnitude.amount", 0.1, 0.9, step=0.1)
            return dict(trial.params)

    drawn = die()
    again = run(tiny, full, pruned, tmp_path, trials=2)
    assert [(trial.state, trial.why) for trial in again.trials[:2]] == [
        ("measured", ""),
        ("failed", "its process died"),
    ]
    retried = again.trials[2].recipe
    assert retried is not None
    assert retried.steps[0].params["amount"] == pytest.approx(drawn["1.prune_magnitude.amount"])
    # It dies, and so does what takes its place.
    die()
    with Opened(url) as study:
        study_module.bury_the_dead(study)
        assert [trial.state.name for trial in study.trials] == [
            *("COMPLETE", "FAIL", "COMPLETE", "FAIL", "WAITING")
        ]
    die()
    with Opened(url) as study:
        study_module.bury_the_dead(study)
        study_module.bury_the_dead(study)
        assert [trial.state.name for trial in study.trials][3:] == ["FAIL", "FAIL"]


def test_what_a_trial_was_given_is_not_lost_with_it(
    tiny: Workload, full: Variant, pruned: Space, tmp_path: Path, instant: list[str]
) -> None:
    run(tiny, full, pruned, tmp_path, trials=1)
    given = {"1.prune_magnitude.amount": 0.7, "1.prune_magnitude.targets": '"layers.*"'}
    with Opened(f"sqlite:///{tmp_path / 'mine.db'}") as study:
        study.enqueue_trial(given)
        trial = study.ask()  # and dies before it has drawn anything
        trial.set_user_attr("worker", study_module.this_worker() | {"started": 1.0})
        study_module.bury_the_dead(study)
        assert study.trials[-1].system_attrs["fixed_params"] == given


def test_a_process_that_was_killed_and_not_asked_after_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        worker = study_module.this_worker()
        worker |= {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
        trial = optuna.trial.create_trial(
            state=optuna.trial.TrialState.WAITING, user_attrs={"worker": worker}
        )
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from now on
        assert study_module.is_dead(trial)


def test_a_trial_of_a_living_process_or_another_machine_is_left_alone(
    tiny: Workload, full: Variant, pruned: Space, tmp_path: Path, instant: list[str]
) -> None:
    run(tiny, full, pruned, tmp_path, trials=1)
    with Opened(f"sqlite:///{tmp_path / 'mine.db'}") as study:
        for worker in (study_module.this_worker(), {"host": "elsewhere", "pid": 1, "started": 0.0}):
            study.ask().set_user_attr("worker", worker)
        study.ask()  # has not said yet whose it is
        study_module.bury_the_dead(study)
        assert [trial.state.name for trial in study.trials][1:] == ["RUNNING"] * 3


def test_what_another_process_is_at_is_not_built_at_the_same_time(
    tiny: Workload, full: Variant, quantized: Space, tmp_path: Path, instant: list[str]
) -> None:
    first = run(tiny, full, quantized, tmp_path, trials=1)
    assert first.trials[0].recipe is not None
    url = f"sqlite:///{tmp_path / 'mine.db'}"
    with Opened(url) as study:
        others = study.ask()
        others.set_user_attr("worker", study_module.this_worker())
        hashes = {
            quantized.recipe(lambda name, values=values: values[name]).hash()
            for values in (
                {"1.int8_dynamic.per_channel": channel, "1.int8_dynamic.reduce_range": reduced}
                for channel in (True, False)
                for reduced in (True, False)
            )
        }
        done = study.trials[0].user_attrs["claim"][0]
        taken = sorted(hashes - {done})[0]
        others.set_user_attr("claim", [taken, 1.0, others.number])
    result = run(tiny, full, quantized, tmp_path, trials=14, sampler="random")
    skipped = [trial for trial in result.trials if trial.why == "trial 1 is at the same recipe"]
    assert skipped
    assert len(instant) == 3


WORKER = """
import os, sys
from pathlib import Path
from compression.search.evaluate import full_precision
from compression.search.run import search
from compression.search.space import read_space
from compression.workload import load_workload

folder, space, workload, storage, trials, stop_at = sys.argv[1:]
tiny = load_workload(workload)

def progress(number, what):
    if what.endswith("int8_dynamic") and number == int(stop_at):
        print("in the middle", flush=True)
        sys.stdin.read()  # for as long as it lives

if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    result = search(
        tiny, full_precision(tiny, Path(folder)), read_space(Path(space), tiny), folder=Path(folder),
        study="mine", trials=int(trials), storage=storage or None, progress=progress, sampler="random",
    )
    print(result.done, flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path, tiny: Workload, quantized: Space) -> Iterator[Any]:
    """Starts real processes that search; they wait for a line on standard input before they do."""
    processes = []

    def start(trials: int, storage: str = "", stop_at: int = -1) -> subprocess.Popen[str]:
        arguments = [tmp_path, tmp_path / "space.yaml", tiny.directory, storage, trials, stop_at]
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_two_processes_share_one_study(
    tiny: Workload, full: Variant, quantized: Space, tmp_path: Path, worker: Any
) -> None:
    both = [worker(12) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    outcomes = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], outcomes
    # Neither Optuna nor anybody else has said a word.
    assert [stderr for _, stderr in outcomes] == ["", ""]
    done = [int(stdout.split()[-1]) for stdout, _ in outcomes]
    result = run(tiny, full, quantized, tmp_path, trials=12)
    assert sum(done) == len(result.trials)
    assert 12 <= len(result.trials) <= 13
    built = [trial for trial in result.trials if trial.figures and trial.same_as is None]
    recipes = [trial.recipe for trial in built]
    assert len(recipes) == len({recipe.hash() for recipe in recipes if recipe}) <= 4


def test_a_search_that_was_killed_goes_on(
    tiny: Workload, full: Variant, quantized: Space, tmp_path: Path, worker: Any
) -> None:
    process = worker(6, stop_at=1)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "ready\n"
    process.kill() if process.stdout.readline() == "in the middle\n" else pytest.fail("it never got there")
    process.wait()
    result = run(tiny, full, quantized, tmp_path, trials=6, sampler="random")
    states = [trial.state for trial in result.trials]
    assert states[:2] == ["measured", "failed"]
    assert states.count("failed") == 1
    assert result.trials[1].why == "its process died"
    assert result.trials[2].recipe == result.trials[1].recipe
    assert len(states) == 7


# --- what comes out -----------------------------------------------------------------------------------------------


def test_recipes_are_saved_so_that_they_read_back(
    tiny: Workload, full: Variant, pruned: Space, tmp_path: Path, instant: list[str]
) -> None:
    result = run(tiny, full, pruned, tmp_path, trials=5, storage=journal(tmp_path))
    written = save_recipes(result, tmp_path / "out")
    assert set(written) >= {trial.recipe.name for trial in result.frontier if trial.recipe}
    for name, path in written.items():
        recipe = Recipe.load(path)
        assert recipe == result.named(name).recipe
        assert recipe.name == name == name_of(recipe) == path.stem
    assert not list((tmp_path / "out").glob("*.part"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "soon"], "write for example 90s"),
        (["--budget", "0s"], "write for example 90s"),
        ([], "needs an end"),
        (["--trials", "1", "--objective", "speed"], "give some of quality, latency, size, macs"),
        (["--trials", "1", "--objective", "size,size"], "each once"),
        (["--trials", "1", "--sampler", "luck"], "give one of tpe, nsga2, gp, random"),
        (["--trials", "1", "--max-latency", "fast"], "write 0.5 or 50%"),
        (["--trials", "1", "--max-size", "big"], "is no size"),
        (["--trials", "1", "--max-drop", "-1"], "0 or more"),
        (["--trials", "1", "--max-drop", "nan"], "0 or more"),
        (["--trials", "1", "--study", "A b"], "lower case"),
        (["--trials", "1", "--space", "/nowhere.yaml"], "cannot be read"),
    ],
)
def test_bad_options_are_refused_with_the_fix(
    tiny: Workload, full: Variant, arguments: list[str], words: str
) -> None:
    result = CliRunner().invoke(app, ["search", str(tiny.directory), *arguments])
    assert isinstance(result.exception, CompressionError)
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize(
    ("text", "limits"),
    [("0.5", (0.5, None)), ("50%", (0.5, None)), ("1.5x", (1.5, None)), ("2ms", (None, 2.0))],
)
def test_latency_limits_are_read(text: str, limits: tuple[float | None, float | None]) -> None:
    assert options.parse_latency(text) == limits


def test_durations_are_read() -> None:
    assert [options.parse_duration(text) for text in ("90s", "30m", "1.5h", "7")] == [90, 1800, 5400, 7]


def test_the_command_searches_saves_and_makes_the_winners(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Workload, full: Variant, quantized: Space
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    # The tiny network's file grows by quantization, and the clock of a busy machine is no judge of it.
    monkeypatch.setattr(
        result_module,
        "candidate_of",
        lambda trial, real=result_module.candidate_of: _replaced(real(trial)),
    )
    asked = ["search", str(tiny.directory), "--space", str(tmp_path / "space.yaml"), "--trials", "2"]
    asked += ["--max-drop", "20", "--sampler", "random"]
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"], catch_exceptions=False).stdout)
    assert found["objectives"] == ["quality", "latency", "size"]
    assert found["limits"]["max_drop"] == 0.2
    assert [trial["state"] for trial in found["trials"]] == ["measured"] * 2
    measured = found["trials"][0]["figures"]
    assert measured["time_ratio"] == measured["latency_ms"] / measured["full_latency_ms"]
    winners = {choice["winner"] for choice in found["scenarios"]}
    assert {variant["name"] for variant in found["variants"]} == winners
    for name in winners:
        variant = load_variant(f"tiny-{name}")
        card = variant.scorecard()
        assert card is not None
        assert card.rows == 600
        folder = tmp_path / "home" / "tiny" / "search" / "quality-latency-size"
        assert Recipe.load(folder / f"{name}.yaml").model_dump(mode="json") == variant.manifest.recipe
    text = CliRunner().invoke(app, asked, catch_exceptions=False).stdout
    assert "0 trials in" in text
    assert "the study has 2: 2 measured" in text
    for words in ("nothing beats these", "mobile: ", "edge-server: ", "cloud: ", "on the test split"):
        assert words in text


def _replaced(candidate: Any) -> Any:
    from dataclasses import replace

    return replace(candidate, size_ratio=0.4, latency_ratio=0.9, drop_high=0.01)
