from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from compression import cli
from compression.errors import CompressionError, RecipeError, VariantNotFound, WorkloadError
from compression.variant import Variant, load_variant, save_variant
from compression.workload import Workload, load_workload

app = typer.Typer()
cli.register(app)


def run(*arguments: str | Path) -> str:
    """Standard output of a command; an error of ours is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, CompressionError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(("flags", "has_torch"), [([], True), (["--onnx"], False)])
def test_init_scaffolds_a_workload_that_works_unchanged(
    tmp_path: Path, flags: list[str], has_torch: bool
) -> None:
    folder = tmp_path / "my-model"
    assert "trimtab compress" in run("init", folder, *flags)
    workload = load_workload(folder)
    assert (workload.name, workload.has_torch) == ("my-model", has_torch)
    split = workload.split("validation")
    assert len(workload.encode(split.to_records()[:5]).popitem()[1]) == 5
    assert "__NAME__" not in (folder / "README.md").read_text()


def test_the_onnx_template_compresses_unchanged(tmp_path: Path) -> None:
    run("init", tmp_path / "pay", "--onnx")
    found = json.loads(run("compress", tmp_path / "pay", "-r", "int8-static", "--json"))
    assert found["failed"] == {}
    assert [(variant["name"], variant["accepted"]) for variant in found["variants"]] == [
        ("full", True),
        ("int8-static", True),
    ]
    assert found["variants"][0]["quality"] > 0.9


def test_init_refuses_bad_names_and_full_folders(tmp_path: Path) -> None:
    for name in ("Model", "1st", "a_b"):
        with pytest.raises(WorkloadError, match="cannot name a workload"):
            run("init", tmp_path / name)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(WorkloadError, match="is not empty"):
        run("init", tmp_path / "taken")
    assert (tmp_path / "taken" / "file").read_text() == "mine"


def test_compress_variants_show_and_pareto_tell_one_story(
    tiny: Workload, full: Variant, tmp_path: Path
) -> None:
    text = run("compress", tiny.directory, "-r", "int8-static")
    assert "full (unchanged, kept)" in text
    assert "int8-static" in text
    listed = json.loads(run("variants", tiny.directory, "--json"))
    int8 = next(variant for variant in listed if variant["name"] == "int8-static")
    shown = json.loads(run("show", tiny.directory, "int8-static", "--json"))
    assert shown.pop("manifest")["parent"] == full.tag
    assert shown == int8
    assert int8.keys() >= {
        "size_bytes",
        "size_ratio",
        "quality",
        "quality_drop",
        "latency_p50_ms",
        "latency_ratio",
    }
    out = tmp_path / "picture.png"
    report = json.loads(run("pareto", tiny.directory, "--out", out, "--json"))
    assert set(report["frontier"]) <= {point["name"] for point in report["points"]}
    assert out.is_file()


def test_tables_are_printed_for_people(tiny: Workload, full: Variant, tmp_path: Path) -> None:
    assert "quality" in run("variants", tiny.directory)
    shown = run("show", tiny.directory)
    assert "side=left" in shown
    assert "recall of above" in shown
    assert "are on the frontier" in run("pareto", tiny.directory, "--out", tmp_path / "p.png")


def test_what_a_variant_costs_is_listed_with_its_cascades(tiny: Workload, full: Variant) -> None:
    run("compress", tiny.directory, "-r", "int8-dynamic")
    asked = ["cost", tiny.directory, "--requests-per-day", "1e9", "--price-per-hour", "0.5"]
    found = json.loads(run(*asked, "--cores", "4", "--mirror-rate", "0.1", "--json"))
    assert found["prices"] == {
        "requests_per_day": 1e9,
        "price_per_hour": 0.5,
        "cores": 4,
        "watts_per_core": 10,
        "mirror_rate": 0.1,
        "utilization": 0.6,
    }
    rows = {row["name"]: row for row in found["costs"]}
    assert next(iter(rows)) == "full"
    card = json.loads(run("show", tiny.directory, "int8-dynamic", "--json"))["scorecard"]
    cascades = [f"int8-dynamic + cascade {100 * point['max_drop']:g} pt" for point in card["cascade"]]
    assert cascades
    assert {"int8-dynamic", *cascades} <= set(rows)
    text = run(*asked)
    for words in ("int8-dynamic", "accepted", "Model time only", "an estimate, 10 W", "even at"):
        assert words in text


def test_what_is_not_made_from_the_present_full_precision_has_no_cost(tiny: Workload, full: Variant) -> None:
    run("compress", tiny.directory, "-r", "int8-static")
    old = load_variant("tiny-int8-static")
    manifest = old.manifest.model_copy(
        update={"name": "of-another", "parent": "tiny-full:000000000000", "created_at": time.time()}
    )
    save_variant(manifest, {name: old.asset(name).read_bytes() for name in old.manifest.files})
    asked = ["cost", tiny.directory, "--requests-per-day", "1", "--price-per-hour", "1"]
    found = json.loads(run(*asked, "--json"))
    assert "of-another" in found["left_out"]
    assert "of-another" not in {row["variant"] for row in found["costs"]}
    said = run(*asked).partition("left out, not made from the present full precision or not measured: ")[2]
    assert "of-another" in said


def test_a_cost_that_cannot_be_told_says_what_to_do(tmp_path: Path, tiny: Workload, full: Variant) -> None:
    asked = ["--requests-per-day", "1000", "--price-per-hour", "0.5"]
    run("init", tmp_path / "costless")
    with pytest.raises(VariantNotFound, match=r"no variants yet: run `trimtab compress .*costless`"):
        run("cost", tmp_path / "costless", *asked)
    with pytest.raises(CompressionError, match=r"--requests-per-day must be a number above 0 \(not -1\)"):
        run("cost", tiny.directory, "--requests-per-day=-1", "--price-per-hour", "0.5")
    with pytest.raises(CompressionError, match=r"--price-per-hour must be a number above 0 \(not 0\)"):
        run("cost", tiny.directory, "--requests-per-day", "1", "--price-per-hour", "0")


def test_a_scorecard_is_shown_with_its_cascade(tiny: Workload, full: Variant) -> None:
    run("compress", tiny.directory, "-r", "int8-static")
    shown = run("show", tiny.directory, "int8-static")
    assert "cascade: full precision answers where it is not sure" in shown
    assert "none" in shown.partition("cascade:")[2]  # no loss at all is never proven
    assert "cascade" not in run("show", tiny.directory)


def test_a_failing_recipe_is_reported_and_fails_the_command(
    tiny: Workload, full: Variant, tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: bad\nsteps:\n- {step: int8_dynamic, params: {targets: nothing}}\n")
    result = CliRunner().invoke(
        app, ["compress", str(tiny.directory), "-r", str(path), "-r", "int8-dynamic", "--json"]
    )
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert "matches nothing" in found["failed"]["bad"]
    assert [variant["name"] for variant in found["variants"]] == ["full", "int8-dynamic"]


def test_a_second_run_takes_the_steps_from_the_cache_and_keeps_what_is_there(
    tiny: Workload, full: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    for name in ("first", "second"):
        steps = "[{step: int8_dynamic}, {step: entropy_code}]"
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}-of-two\nsteps: {steps}\n")
    assert "from the cache" not in run("compress", tiny.directory, "-r", tmp_path / "first.yaml")
    found = json.loads(run("compress", tiny.directory, "-r", tmp_path / "second.yaml", "--json"))
    kept, effort = (variant["effort"] for variant in found["variants"])
    assert kept == {"seconds": 0, "steps": 0, "cached": 0, "kept": True}
    assert effort.pop("seconds") > 0
    assert effort == {"steps": 2, "cached": 2, "kept": False}
    (tmp_path / "third.yaml").write_text(f"name: third-of-two\nsteps: {steps}\n")
    assert "s, 2 of 2 steps from the cache): " in run(
        "compress", tiny.directory, "-r", tmp_path / "third.yaml"
    )
    text = run("compress", tiny.directory, *(f"-r{tmp_path / name}.yaml" for name in ("first", "second")))
    assert "first-of-two (unchanged, kept)" in text
    assert "second-of-two (unchanged, kept)" in text


def test_without_the_cache_nothing_is_kept_between_runs(
    tiny: Workload, full: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    path = tmp_path / "cacheless.yaml"
    path.write_text("name: cacheless\nsteps: [{step: int8_dynamic}]\n")
    assert "cacheless (" in run("compress", tiny.directory, "-r", path, "--no-cache")
    assert not (tmp_path / "home").exists()


def test_a_cache_that_cannot_be_trusted_is_left_alone_and_said_so(
    tiny: Workload, full: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    folder = tmp_path / "cache" / "steps"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    text = run("compress", tiny.directory, "-r", "int8-dynamic")
    assert f"warning: no step cache: {folder} is another user's, or others may write to it" in text
    assert "int8-dynamic" in text.partition("\n")[2]
    assert not list(folder.iterdir())


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_an_interrupt_ends_in_one_line(
    tiny: Workload, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compression.compress.compress", interrupted)
    result = CliRunner().invoke(app, ["compress", str(tiny.directory), *flags])
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr == (
        "trimtab: interrupted; run the same command again to go on from the last finished step\n"
    )


def test_errors_say_what_to_do(tmp_path: Path, tiny: Workload) -> None:
    run("init", tmp_path / "fresh")
    with pytest.raises(VariantNotFound, match="run `trimtab compress"):
        run("variants", tmp_path / "fresh")
    with pytest.raises(RecipeError, match="no recipe nope"):
        run("compress", tiny.directory, "-r", "nope")
    with pytest.raises(WorkloadError, match="no workload folder"):
        run("compress", tmp_path / "nowhere")
