from __future__ import annotations

import ast
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import bentoml
import onnx
import pytest
import torch
from torch import nn

from compression import cache as cache_module
from compression.cache import Entry, StepCache, root_key, source_key, step_key
from compression.cli import INTERRUPTED
from compression.compress import Effort, Model, build_model, compress
from compression.data import Data
from compression.errors import CompressionError
from compression.export import Exported
from compression.full import train_full
from compression.planner import plan
from compression.recipe import Recipe, StepSpec
from compression.steps import STEPS, StepContext
from compression.variant import PROGRAM, Manifest, Variant, list_variants, save_variant
from compression.workload import Workload

from .conftest import write_workload

PRUNE = StepSpec(step="prune_structured", params={"amount": 0.5})
TUNE = StepSpec(step="finetune", params={"epochs": 1, "batch_size": 64})
STATIC = StepSpec(step="int8_static", params={"rows": 100})
MIXED = StepSpec(
    step="mixed_precision", params={"float_layers": 1, "keep_ends": False, "params": {"rows": 100}}
)
ENTROPY = StepSpec(step="entropy_code")
MAGNITUDE = StepSpec(step="prune_magnitude", params={"amount": 0.5})


def recipe(*steps: StepSpec, seed: int = 0, name: str = "cached") -> Recipe:
    return Recipe(name=name, seed=seed, steps=list(steps))


def key(number: int) -> str:
    return f"{number:064x}"


@pytest.fixture
def cache(tmp_path: Path) -> StepCache:
    return StepCache.open(tmp_path)


class Bench:
    """Builds recipes on the tiny workload, and remembers what was said and which steps were done."""

    def __init__(self, full: Variant, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full, self.data = full, data
        self.done: list[str] = []
        self.said: list[str] = []
        for name in {spec.step for spec in (PRUNE, TUNE, STATIC, MIXED, ENTROPY, MAGNITUDE)}:
            monkeypatch.setattr(STEPS[name], "apply", self._noted(name, STEPS[name].apply))

    def _noted(self, name: str, apply: Any) -> Any:
        def noted(step: Any, model: Any, context: StepContext) -> Any:
            self.done.append(name)
            return apply(step, model, context)

        return noted

    def build(
        self, asked: Recipe, cache: StepCache | None, data: Data | None = None
    ) -> tuple[Model, StepContext]:
        self.done.clear()
        self.said.clear()
        context = StepContext(
            self.data.workload, data or self.data, asked.seed, lambda what, done: self.said.append(what)
        )
        return build_model(self.full, plan(asked, self.data.workload), context, cache), context


@pytest.fixture
def bench(full: Variant, data: Data, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(full, data, monkeypatch)


@pytest.fixture
def quick_export(full: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at what was done alone: every network becomes the full-precision graph."""
    graph = onnx.load_model_from_string(full.onnx_bytes())
    exported = Exported(graph, full.asset(PROGRAM).read_bytes(), 0.0)
    monkeypatch.setattr("compression.compress.export_checked", lambda *_: exported)


def parts(model: Model) -> tuple[object, ...]:
    exported = model.exported
    program = exported and (exported.onnx.SerializeToString(), exported.program, exported.max_error)
    return model.onnx, model.coded, model.program, program


def left(context: StepContext) -> tuple[object, ...]:
    return context.warnings, context.calibration_sha256, context.extra


# -- the folder ------------------------------------------------------------------------------------------------


def test_what_was_put_in_comes_out(cache: StepCache) -> None:
    entry = Entry({"network": b"weights", "extra/notes": b""}, {"max_error": 1e-7, "warnings": ["ä"]})
    assert cache.get(key(1)) is None
    assert cache.put(key(1), entry) is None
    assert cache.get(key(1)) == entry
    assert StepCache(cache.folder).get(key(1)) == entry


def test_the_folder_is_under_home_and_the_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "elsewhere"))
    cache = StepCache.open()
    assert cache.folder == tmp_path / "elsewhere" / "cache" / "steps"
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    cache.put(key(1), Entry({"a": b"1"}))
    assert (cache.folder / key(1)).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("harm", ["cut", "flipped", "emptied", "lengthened", "another file"])
def test_a_damaged_entry_is_a_miss_and_can_be_made_again(cache: StepCache, harm: str) -> None:
    entry = Entry({"network": b"0123456789" * 50})
    cache.put(key(1), entry)
    path = cache.folder / key(1)
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[:-1],
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "emptied": b"",
            "lengthened": content + b"x",
            "another file": b"x" * 500,
        }[harm]
    )
    assert cache.get(key(1)) is None
    cache.put(key(1), entry)
    assert cache.get(key(1)) == entry


def test_an_entry_of_another_version_is_a_miss(cache: StepCache, monkeypatch: pytest.MonkeyPatch) -> None:
    content = Entry({"a": b"1"}).to_bytes()
    monkeypatch.setattr(cache_module, "_FORMAT", 2)
    assert Entry.from_bytes(content) is None


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path, mode: int) -> None:
    planted = StepCache.open(tmp_path)
    planted.put(key(1), Entry({"network": b"planted"}))
    planted.folder.chmod(mode)
    cache = StepCache.open(tmp_path)
    assert cache.problem is not None
    assert "others may write to it" in cache.problem
    assert cache.get(key(1)) is None
    assert cache.put(key(2), Entry({"a": b"1"})) is None
    assert [path.name for path in cache.folder.iterdir()] == [key(1)]


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StepCache.open(tmp_path).put(key(1), Entry({"a": b"1"}))
    trusting = StepCache(tmp_path / "cache" / "steps")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "another user's" in (StepCache.open(tmp_path).problem or "")
    assert trusting.get(key(1)) is None  # nor is a file in it


def test_a_file_that_others_may_write_to_or_that_lies_elsewhere_is_not_read(
    cache: StepCache, tmp_path: Path
) -> None:
    for number in (1, 2):
        cache.put(key(number), Entry({"a": b"1"}))
    (cache.folder / key(1)).chmod(0o602)
    (cache.folder / key(2)).rename(tmp_path / "elsewhere")
    (cache.folder / key(2)).symlink_to(tmp_path / "elsewhere")
    assert [cache.get(key(1)), cache.get(key(2))] == [None, None]


@pytest.mark.parametrize("in_the_way", ["file", "symlink"])
def test_what_is_in_the_folders_place_only_costs_the_cache(tmp_path: Path, in_the_way: str) -> None:
    place = tmp_path / "cache" / "steps"
    place.parent.mkdir()
    if in_the_way == "file":
        place.write_text("mine")
    else:
        (tmp_path / "other").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "other")
    cache = StepCache.open(tmp_path)
    assert cache.problem
    assert cache.put(key(1), Entry({"a": b"1"})) is None
    assert cache.get(key(1)) is None


def test_those_not_used_for_longest_go_first(tmp_path: Path) -> None:
    size = len(Entry({"a": b"x" * 1000}).to_bytes())
    cache = StepCache(StepCache.open(tmp_path).folder, limit=3 * size)
    for number in range(3):
        cache.put(key(number), Entry({"a": b"x" * 1000}))
        os.utime(cache.folder / key(number), (number, number))
    assert cache.get(key(0)) is not None  # used now
    cache.put(key(3), Entry({"a": b"x" * 1000}))
    assert [number for number in range(4) if cache.get(key(number))] == [0, 2, 3]


def test_an_entry_larger_than_the_limit_is_not_kept_and_pushes_nothing_out(tmp_path: Path) -> None:
    cache = StepCache(StepCache.open(tmp_path).folder, limit=500)
    cache.put(key(1), Entry({"a": b"1"}))
    assert "larger than TRIMTAB_CACHE_BYTES" in (cache.put(key(2), Entry({"a": b"x" * 500})) or "")
    assert [path.name for path in cache.folder.iterdir()] == [key(1)]


def test_the_limit_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert StepCache.open(tmp_path).limit == 4 * 2**30
    monkeypatch.setenv("TRIMTAB_CACHE_BYTES", "0")
    cache = StepCache.open(tmp_path)
    assert cache.put(key(1), Entry({"a": b"1"})) is None
    assert not list(cache.folder.iterdir())
    for bad in ("-1", "4GB", "²"):
        monkeypatch.setenv("TRIMTAB_CACHE_BYTES", bad)
        with pytest.raises(CompressionError, match="TRIMTAB_CACHE_BYTES must be a whole number of bytes"):
            StepCache.open(tmp_path)


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_stops_leaves_nothing_behind(
    cache: StepCache, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    def stopped(_: int) -> None:
        raise stop

    cache.put(key(1), Entry({"a": b"old"}))
    monkeypatch.setattr(os, "fsync", stopped)
    if isinstance(stop, OSError):
        assert cache.put(key(1), Entry({"a": b"new"})) == "No space left on device"
    else:
        with pytest.raises(KeyboardInterrupt):
            cache.put(key(1), Entry({"a": b"new"}))
    assert [path.name for path in cache.folder.iterdir()] == [key(1)]
    assert cache.get(key(1)) == Entry({"a": b"old"})


def test_what_a_killed_process_left_half_written_is_removed_in_time(cache: StepCache) -> None:
    (cache.folder / ".tmp-old").write_bytes(b"half")
    (cache.folder / ".tmp-young").write_bytes(b"another process is at it")
    long_ago = time.time() - 7200
    os.utime(cache.folder / ".tmp-old", (long_ago, long_ago))
    cache.put(key(1), Entry({"a": b"1"}))
    assert {path.name for path in cache.folder.iterdir()} == {".tmp-young", key(1)}


SHARER = """
import sys
from pathlib import Path
from compression.cache import Entry, StepCache
cache = StepCache(StepCache.open(Path(sys.argv[1])).folder, limit=20_000)
for turn in range(300):
    number = turn % 8
    entry = Entry({"a": bytes([number]) * 4000})
    found = cache.get(f"{number:064x}")
    assert found in (None, entry), number
    assert cache.put(f"{number:064x}", entry) is None
"""


def test_two_processes_share_it(tmp_path: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", SHARER, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(300) for process in running] == [0, 0]
    names = [path.name for path in (tmp_path / "cache" / "steps").iterdir()]
    assert 0 < len(names) <= 4
    assert not [name for name in names if name.startswith(".tmp")]


# -- steps -----------------------------------------------------------------------------------------------------

CHAINS = {
    "torch": recipe(MAGNITUDE, TUNE),
    "torch and onnx": recipe(PRUNE, TUNE, STATIC),
    "torch and file": recipe(MAGNITUDE, ENTROPY),
    "onnx": recipe(MIXED),
    "onnx and file": recipe(STATIC, ENTROPY),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_cached_build_gives_the_very_same_and_does_nothing(
    bench: Bench, cache: StepCache, name: str
) -> None:
    asked = CHAINS[name]
    plain, plain_context = bench.build(asked, None)
    first, first_context = bench.build(asked, cache)
    assert (first.cached, len(bench.done) >= len(asked.steps)) == (0, True)
    again, again_context = bench.build(asked, cache)
    assert (again.cached, bench.done) == (len(asked.steps), [])
    assert [said for said in bench.said if not said.endswith("(from the cache)")] == []
    assert f"{asked.steps[-1].step} (from the cache)" in bench.said
    assert parts(first) == parts(again)
    assert left(plain_context) == left(first_context) == left(again_context)
    assert (plain.onnx, plain.coded) == (again.onnx, again.coded)


def test_recipes_share_their_beginnings(bench: Bench, cache: StepCache) -> None:
    bench.build(recipe(PRUNE, TUNE), cache)
    expected, expected_context = bench.build(recipe(PRUNE, TUNE, STATIC), None)
    model, context = bench.build(recipe(PRUNE, TUNE, STATIC), cache)
    assert (model.cached, bench.done) == (2, ["int8_static"])
    assert (model.onnx, left(context)) == (expected.onnx, left(expected_context))
    model, _ = bench.build(recipe(PRUNE, ENTROPY), cache)
    assert (model.cached, bench.done) == (1, ["entropy_code"])


def test_going_on_from_a_cached_network_gives_what_going_through_gives(
    bench: Bench, cache: StepCache
) -> None:
    bench.build(recipe(PRUNE), cache)
    plain, _ = bench.build(recipe(PRUNE, TUNE, STATIC, seed=0), None)
    resumed, _ = bench.build(recipe(PRUNE, TUNE, STATIC, seed=0), cache)
    assert resumed.cached == 1
    assert resumed.onnx == plain.onnx


@pytest.mark.usefixtures("quick_export")
def test_another_seed_parameter_or_predecessor_is_another_result(bench: Bench, cache: StepCache) -> None:
    bench.build(recipe(PRUNE, TUNE), cache)
    longer = StepSpec(step="finetune", params={"epochs": 2, "batch_size": 64})
    for other, hits in (
        (recipe(PRUNE, TUNE, seed=1), 0),
        (recipe(PRUNE, longer), 1),
        (recipe(TUNE), 0),
        (recipe(StepSpec(step="prune_structured", params={"amount": 0.25}), TUNE), 0),
    ):
        assert bench.build(other, cache)[0].cached == hits


@pytest.mark.usefixtures("quick_export")
def test_a_parameter_that_is_spelled_out_as_its_default_is_the_same(bench: Bench, cache: StepCache) -> None:
    bench.build(recipe(TUNE), cache)
    spelled = StepSpec(step="finetune", params={**TUNE.params, "keep_sparsity": True})
    assert bench.build(recipe(spelled), cache)[0].cached == 1


def test_other_code_libraries_processor_or_threads_have_other_keys(
    tiny: Workload, full: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def now() -> str:
        cache_module._environment.cache_clear()
        return root_key(full, Data(tiny))

    before = now()
    assert now() == before
    changes: list[tuple[Any, str, Any]] = [
        (cache_module, "version", lambda name: "0.0.1" if name == "onnxruntime" else "1"),
        (cache_module, "_all_flags", lambda: ["avx"]),
        (Path, "read_bytes", lambda path: b"changed"),
        (os.environ, "OMP_NUM_THREADS", "7"),
    ]
    for where, name, value in changes:
        with monkeypatch.context() as patch:
            if where is os.environ:
                patch.setenv(name, value)
            else:
                patch.setattr(where, name, value)
            assert now() != before, name
    assert now() == before


def test_another_full_precision_or_source_has_another_key(
    tmp_path: Path, tiny: Workload, full: Variant
) -> None:
    from compression.workload import load_workload

    data = Data(tiny)
    other = Variant(full.tag[:-1] + "x", full.path, full.manifest)
    assert root_key(other, data) != root_key(full, data)
    folder = write_workload(tmp_path / "w")
    before = source_key(Data(load_workload(folder)))
    assert before == source_key(Data(load_workload(folder)))
    seen = {before}
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    for path in (folder / "data.csv", folder / "linked" / "data.csv", folder / "linked" / "labels.yaml"):
        for content in ("1,2", "1,3"):
            path.write_text(content)
            seen.add(source_key(Data(load_workload(folder))))
    assert len(seen) == 7


def test_a_step_from_elsewhere_is_known_by_its_own_code(
    tmp_path: Path,
) -> None:
    from compression.steps.train import FineTune

    class Own(FineTune):
        """A step that is written in this file."""

    Own.name = "finetune"
    assert step_key("", Own(), 0) != step_key("", FineTune(), 0)


def test_every_library_that_computes_has_its_version_in_the_keys() -> None:
    """Those that are left out check, show, store or plan, and change no model."""
    harmless = {
        "bentoml",
        "compression",
        "matplotlib",
        "optuna",
        "psutil",
        "pydantic",
        "rich",
        "sqlalchemy",
        "typer",
    }
    imported = set()
    for path in Path(cache_module.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    owners = packages_distributions()
    computing = {owner for name in imported - harmless - {"yaml", "trimtab"} for owner in owners[name]}
    assert "tensorly" in computing
    assert computing <= set(cache_module._LIBRARIES)


def test_a_step_that_is_made_of_others_code_is_known_by_that(monkeypatch: pytest.MonkeyPatch) -> None:
    from compression.steps.prune import PruneStructured
    from compression.steps.train import Distill

    class Own(PruneStructured):
        """A step that is written in this file."""

    here = type("Here", (Own,), {"__module__": "compression.here"})
    here.name = Own.name = "own"
    monkeypatch.setitem(STEPS, "own", Own)
    inside = Distill(width=4, reduce=(StepSpec(step="own", params={"amount": 0.5}),))
    before = [step_key("", step, 0) for step in (here(amount=0.5), inside)]
    monkeypatch.setattr(cache_module, "_file_hash", lambda cls: "edited")
    assert not set(before) & {step_key("", step, 0) for step in (here(amount=0.5), inside)}


def test_a_damaged_or_unreadable_result_is_made_again_from_the_one_before(
    bench: Bench, cache: StepCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(PRUNE, TUNE)
    expected = bench.build(asked, cache)[0]
    newest = sorted(cache.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(newest) == 3  # two steps and the export
    newest[2].write_bytes(b"damaged")
    again = bench.build(asked, cache)[0]
    assert (again.cached, bench.done) == (2, [])
    assert again.onnx == expected.onnx
    for path in newest[1:]:
        path.write_bytes(Entry({"network": b"no pickle"}).to_bytes())
    again = bench.build(asked, cache)[0]
    assert (again.cached, bench.done) == (1, ["finetune"])
    assert again.onnx == expected.onnx


def test_a_network_that_cannot_be_pickled_only_costs_the_cache(
    bench: Bench, cache: StepCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = STEPS["finetune"].apply

    def unpicklable(step: Any, model: nn.Module, context: StepContext) -> nn.Module:
        trained: nn.Module = apply(step, model, context)
        trained.note = lambda: None  # type: ignore[assignment]
        return trained

    monkeypatch.setattr(STEPS["finetune"], "apply", unpicklable)
    model, _ = bench.build(recipe(MAGNITUDE, TUNE), cache)
    assert any("finetune: not cached" in said and "pickle" in said for said in bench.said)
    assert model.onnx == bench.build(recipe(MAGNITUDE, TUNE), cache)[0].onnx


def test_a_full_disk_only_costs_the_cache(
    bench: Bench, cache: StepCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    assert bench.build(recipe(STATIC), cache)[0].onnx
    assert "int8_static: not cached, No space left on device" in bench.said


def test_rows_that_are_not_the_workloads_are_never_cached(
    bench: Bench, cache: StepCache, tiny: Workload
) -> None:
    class Fewer(Data):
        pass

    bench.build(recipe(STATIC), cache)
    assert bench.build(recipe(STATIC), cache, Fewer(tiny))[0].cached == 0
    assert bench.build(recipe(STATIC), cache)[0].cached == 1


def test_what_the_context_held_before_is_no_part_of_a_result(
    bench: Bench, cache: StepCache, full: Variant, tiny: Workload, data: Data
) -> None:
    steps = plan(recipe(MIXED), tiny)
    for _ in range(2):
        context = StepContext(tiny, data, warnings=["mine"], extra={"mine": b"1"})
        build_model(full, steps, context, cache)
        assert context.warnings.count("mine") == 1
        assert context.extra["mine"] == b"1"
    fresh = bench.build(recipe(MIXED), cache)[1]
    assert "mine" not in fresh.extra
    assert "mine" not in fresh.warnings


# -- whole runs ------------------------------------------------------------------------------------------------


def runs(tiny: Workload, asked: Recipe, cache: StepCache | None, **options: Any) -> tuple[Variant, Effort]:
    efforts: dict[str, Effort] = {}
    made = compress(
        tiny,
        [asked],
        cache=cache,
        made=lambda v, seconds, effort: efforts.update({v.name: effort}),
        **options,
    )
    return made[1], efforts[asked.name]


@pytest.fixture
def discarded(full: Variant) -> Iterator[None]:
    """What a test makes of full precision itself does not reach the next one."""
    before = {model.tag for model in bentoml.models.list()}
    yield
    for model in bentoml.models.list():
        if model.tag not in before:
            bentoml.models.delete(model.tag)


def test_a_cached_run_gives_the_same_manifest(
    tiny: Workload, full: Variant, cache: StepCache, discarded: None
) -> None:
    asked = recipe(PRUNE, TUNE, MIXED, name="twice")
    first, effort = runs(tiny, asked, cache)
    assert (effort.steps, effort.cached, effort.kept) == (3, 0, False)
    bentoml.models.delete(first.tag)
    second, effort = runs(tiny, asked, cache)
    assert (effort.steps, effort.cached, effort.kept) == (3, 3, False)
    measured = {"created_at": True, "files": {"scorecard.json", "gate.json"}}
    assert first.manifest.model_dump(exclude=measured) == second.manifest.model_dump(exclude=measured)
    assert "sensitivity.json" in second.manifest.files


def test_a_variant_that_would_come_out_again_is_kept(
    tiny: Workload, full: Variant, monkeypatch: pytest.MonkeyPatch, discarded: None
) -> None:
    asked = recipe(STATIC, name="keeper")
    first, effort = runs(tiny, asked, None)
    assert not effort.kept
    again, effort = runs(tiny, asked, None)
    assert (again, effort) == (first, Effort(kept=True))
    (first.path / "gate.json").write_text("{}")
    _, effort = runs(tiny, asked, None)
    assert not effort.kept
    other = asked.model_copy(update={"seed": 5})
    assert runs(tiny, other, None)[1].kept is False
    assert runs(tiny, asked, None)[1].kept is False  # the newest of the name is of the other seed
    monkeypatch.setattr(tiny, "profile", "medical")
    assert runs(tiny, asked, None)[1].kept is False  # it has to be judged anew


def test_force_makes_everything_anew(
    tiny: Workload, full: Variant, cache: StepCache, discarded: None
) -> None:
    asked = recipe(STATIC, name="forced")
    first, _ = runs(tiny, asked, cache)
    second, effort = runs(tiny, asked, cache, force=True)
    assert (effort.cached, effort.kept) == (0, False)
    assert second.manifest.parent != first.manifest.parent


def test_a_variant_of_an_earlier_version_is_made_again(
    tiny: Workload, full: Variant, discarded: None
) -> None:
    asked = recipe(STATIC, name="elder")
    made, _ = runs(tiny, asked, None)
    text = made.manifest.model_dump_json(exclude={"build_key"})
    manifest = Manifest.model_validate_json(text).model_copy(update={"created_at": time.time()})
    save_variant(manifest, {name: made.asset(name).read_bytes() for name in made.manifest.files})
    assert runs(tiny, asked, None)[1].kept is False


def test_training_survives_an_interrupt_before_full_precision_is_saved(
    tiny: Workload, data: Data, cache: StepCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_full(tiny, data, cache=cache)
    monkeypatch.setattr(type(tiny), "train", lambda self, progress: pytest.fail("trained twice"))
    again = train_full(tiny, data, cache=cache)
    assert (first.cached, again.cached) == (False, True)
    assert (again.onnx, again.program, again.max_error) == (first.onnx, first.program, first.max_error)


def test_an_interrupt_while_a_variant_is_saved_leaves_the_store_whole(
    full: Variant, monkeypatch: pytest.MonkeyPatch, discarded: None
) -> None:
    copytree = shutil.copytree

    def stopped(source: Any, target: Any, *arguments: Any, **options: Any) -> Any:
        copytree(source, target, *arguments, **options)
        (Path(target) / "model.yaml").unlink()
        raise KeyboardInterrupt

    manifest = full.manifest.model_copy(update={"name": "halfway", "created_at": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", stopped)
        with pytest.raises(KeyboardInterrupt):
            save_variant(manifest, {"model.onnx": b"1"})
    assert "halfway" not in [variant.name for variant in list_variants("tiny")]
    store = full.path.parent.parent.parent
    assert not list(store.glob(".trimtab-*"))
    killed = store / ".trimtab-killed"
    killed.mkdir()
    os.utime(killed, (1, 1))
    assert save_variant(manifest, {"model.onnx": b"1"}).onnx_bytes() == b"1"
    assert not killed.exists()


# -- real processes --------------------------------------------------------------------------------------------

# A process started in the background of a shell ignores SIGINT, and so would its children.
START = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); import trimtab; trimtab.main()"
WAITING = """
    def student(self, width):
        import os, sys
        from .model import Net
        if os.environ.get("WAIT_IN_STUDENT") and width == 8:
            print("waiting", file=sys.stderr, flush=True)
            sys.stdin.read()
        return Net(width)
"""


def start(home: Path, *arguments: str | Path, wait: bool = False) -> subprocess.Popen[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("BENTOML_HOME", "TRIMTAB_HOME")
    }
    environment |= {"TRIMTAB_HOME": str(home), "OMP_NUM_THREADS": "1"}
    if wait:
        environment["WAIT_IN_STUDENT"] = "1"
    return subprocess.Popen(
        [sys.executable, "-c", START, "compress", *map(str, arguments), "--json"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    said = []
    for line in process.stderr:  # ends when the process does
        said.append(line)
        if line.strip() == text:
            return
    pytest.fail("".join(said))


def written(folder: Path, asked: Recipe) -> Path:
    path = folder / f"{asked.name}.yaml"
    path.write_text(asked.to_yaml())
    return path


def test_an_interrupted_or_killed_run_goes_on_after_its_last_finished_step(tmp_path: Path) -> None:
    folder = write_workload(tmp_path / "w")
    with (folder / "workload.py").open("a") as file:
        file.write(WAITING)
    asked = recipe(
        TUNE,
        StepSpec(step="distill", params={"width": 8, "epochs": 1}),
        StepSpec(step="int8_dynamic"),
        name="slow",
    )
    home, path = tmp_path / "home", written(tmp_path, asked)
    steps = home / "cache" / "steps"

    with start(home, folder, "-r", path, wait=True) as process:
        wait_for(process, "waiting")  # in the second step, so the first one is finished
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=300)
    assert (process.returncode, output, errors) == (130, "", f"trimtab: {INTERRUPTED}\n")
    assert len(list(steps.iterdir())) == 2  # the training, and the first step

    with start(home, folder, "-r", path, wait=True) as process:
        wait_for(process, "waiting")
        process.kill()
        process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL

    with start(home, folder, "-r", path) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found = {variant["name"]: variant for variant in json.loads(output)["variants"]}
    assert found["full"]["effort"]["kept"]
    effort = found["slow"]["effort"]
    assert (effort["steps"], effort["cached"], effort["kept"]) == (3, 1, False)
    assert "1 of 3 steps from the cache" in errors
    assert not [name for name in steps.iterdir() if name.name.startswith(".")]


MAKER = """
import hashlib, json, sys
import torch
from compression.compress import build_model
from compression.data import Data
from compression.full import train_full
from compression.planner import plan
from compression.recipe import Recipe
from compression.steps import StepContext
from compression.variant import load_variant
from compression.workload import load_workload

folder, tag, threads, *recipes = sys.argv[1:]
torch.set_num_threads(int(threads))
workload, full, made = load_workload(folder), load_variant(tag), []
data = Data(workload)
for asked in map(Recipe.model_validate_json, recipes):
    model = build_model(full, plan(asked, workload), StepContext(workload, data, asked.seed))
    made.append(hashlib.sha256(model.coded or model.onnx).hexdigest())
made.append(hashlib.sha256(train_full(workload, data).onnx).hexdigest())
print(json.dumps(made))
"""


def test_the_same_recipes_give_the_same_models_in_another_process(bench: Bench) -> None:
    asked = [
        recipe(PRUNE, TUNE, STATIC, seed=3),
        recipe(StepSpec(step="distill", params={"width": 8, "epochs": 2}), StepSpec(step="int8_dynamic")),
        recipe(
            StepSpec(step="prune_iterative", params={"amount": 0.8, "rounds": 2, "epochs": 1}),
            StepSpec(step="cluster_weights", params={"clusters": 16, "epochs": 1}),
            ENTROPY,
        ),
    ]
    workload = bench.data.workload
    options = [str(workload.directory), bench.full.tag, str(torch.get_num_threads())]
    with subprocess.Popen(
        [sys.executable, "-c", MAKER, *options, *(one.model_dump_json() for one in asked)],
        # What goes by the order of a set would differ.
        env={**os.environ, "PYTHONHASHSEED": "7"},
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        models = [bench.build(one, None)[0] for one in asked]
        here = [model.coded or model.onnx for model in models] + [bench.full.onnx_bytes()]
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert json.loads(output) == [hashlib.sha256(content).hexdigest() for content in here]
    assert len(set(here)) == 4


@pytest.mark.usefixtures("quick_export")
def test_a_cached_network_leaves_the_random_state_alone(bench: Bench, cache: StepCache) -> None:
    bench.build(recipe(PRUNE), cache)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    bench.build(recipe(PRUNE), cache)
    assert torch.equal(torch.rand(3), expected)
