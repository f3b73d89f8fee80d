from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from compression.compress import build_model, compress
from compression.data import Data
from compression.errors import CompressionError, PlanError, StepError, WorkloadError
from compression.full import load_network, source_hash, stored_full
from compression.planner import plan
from compression.recipe import Recipe, StepSpec
from compression.reference import reads_probabilities_as_logits
from compression.steps import STEPS, StepContext
from compression.variant import PROGRAM, Variant
from compression.workload import Workload, load_workload

from .conftest import MODEL, dense, write_workload

INT8 = Recipe(name="int8", steps=[StepSpec(step="int8_dynamic")])
SMALL = Recipe(
    name="small",
    seed=7,
    steps=[
        StepSpec(step="prune_structured", params={"amount": 0.5}),
        StepSpec(step="finetune", params={"epochs": 6, "lr": 0.01, "batch_size": 64}),
        StepSpec(step="int8_static", params={"rows": 100}),
    ],
)
WRECK = Recipe(name="wreck", steps=[StepSpec(step="prune_magnitude", params={"amount": 0.95})])


@pytest.fixture(scope="module")
def variants(tiny: Workload, full: Variant) -> dict[str, Variant]:
    return {variant.name: variant for variant in compress(tiny, [INT8, SMALL, WRECK])}


def test_full_precision_is_reused_and_comes_first(variants: dict[str, Variant], full: Variant) -> None:
    assert list(variants) == ["full", "int8", "small", "wreck"]
    assert variants["full"] == full


def test_a_chain_of_steps_gives_a_smaller_model_of_the_same_quality(variants: dict[str, Variant]) -> None:
    card, gate = variants["small"].scorecard(), variants["small"].gate()
    assert card is not None
    assert gate is not None
    assert gate.accepted, gate.reasons
    assert card.parameters < 0.5 * 1373
    assert card.agreement > 0.9


def test_a_wrecked_model_is_kept_and_refused_with_the_group(variants: dict[str, Variant]) -> None:
    gate = variants["wreck"].gate()
    assert gate is not None
    assert not gate.accepted
    assert gate.reasons[0].startswith("side=")


def test_the_manifest_says_where_a_variant_comes_from(variants: dict[str, Variant]) -> None:
    manifest = variants["small"].manifest
    assert manifest.parent == variants["full"].tag
    assert manifest.recipe == SMALL.model_dump(mode="json")
    assert (manifest.recipe_hash, manifest.seed) == (SMALL.hash(), 7)
    assert manifest.calibration_sha256
    assert manifest.export_max_error is not None
    assert variants["int8"].manifest.calibration_sha256 is None
    assert manifest.cpu.model
    assert {"python", "torch", "onnxruntime"} <= manifest.versions.keys()
    assert set(manifest.files) == {"model.onnx", "scorecard.json", "gate.json"}


def test_a_torch_variant_keeps_a_program_that_trains_on(variants: dict[str, Variant]) -> None:
    assert not variants["small"].has(PROGRAM)
    module = torch.export.load(str(variants["wreck"].asset(PROGRAM))).module()
    output = module(numbers=torch.ones(3, 2), side=torch.zeros(3, 1, dtype=torch.int64))
    output.sum().backward()
    assert any(parameter.grad is not None for parameter in module.parameters())


def test_the_same_recipe_gives_the_same_model_twice(
    tiny: Workload, data: Data, variants: dict[str, Variant]
) -> None:
    again = build_model(variants["full"], plan(SMALL, tiny), StepContext(tiny, data, SMALL.seed))
    assert again.onnx == variants["small"].onnx_bytes()
    assert again.cached == 0


def test_an_onnx_file_alone_goes_the_whole_way(onnx_only: Workload) -> None:
    found = {variant.name: variant for variant in compress(onnx_only)}
    assert set(found) == {"full", "int8-dynamic", "int8-static"}
    card = found["int8-static"].scorecard()
    assert card is not None
    assert (card.metric, card.groups) == ("balanced_accuracy", {})
    assert card.quality.value > 0.85
    assert not found["full"].has(PROGRAM)


def test_a_bad_plan_is_found_before_anything_is_made(onnx_only: Workload) -> None:
    made: list[str] = []
    with pytest.raises(PlanError, match="has only an ONNX file"):
        compress(onnx_only, [INT8, WRECK], made=lambda variant, *_: made.append(variant.name))
    assert made == []


def test_two_recipes_of_one_name_are_refused(tiny: Workload) -> None:
    with pytest.raises(PlanError, match="two recipes are named int8"):
        compress(tiny, [INT8, INT8])


def test_a_failing_recipe_stops_the_run_or_is_reported(tiny: Workload) -> None:
    broken = Recipe(name="broken", steps=[StepSpec(step="int8_dynamic", params={"targets": "nothing"})])
    with pytest.raises(StepError, match="matches nothing"):
        compress(tiny, [broken, INT8])
    failures: list[tuple[str, CompressionError]] = []
    made = compress(tiny, [broken, INT8], failed=lambda recipe, error: failures.append((recipe.name, error)))
    assert [variant.name for variant in made] == ["full", "int8"]
    assert [name for name, _ in failures] == ["broken"]


def test_progress_names_the_recipe_and_the_step(tiny: Workload, full: Variant) -> None:
    said: list[str] = []
    told = SMALL.model_copy(update={"name": "told"})
    compress(tiny, [told], progress=lambda what, done: said.append(what))
    assert "told: prune_structured" in said
    assert said[-1] == "told: measuring"


def test_the_source_hash_follows_code_and_data_and_not_policy(tmp_path: Path) -> None:
    folder = write_workload(tmp_path / "w")
    before = source_hash(load_workload(folder))
    with (folder / "workload.yaml").open("a") as file:
        file.write("profile: medical\npolicy: {accuracy_drop: 0.01}\n")
    (folder / "README.md").write_text("words")
    assert source_hash(load_workload(folder)) == before
    (folder / "data.csv").write_text("1,2")
    with_data = source_hash(load_workload(folder))
    (folder / "model.py").write_text(MODEL.replace("nn.Embedding(2, 3)", "nn.Embedding(2, 4)"))
    assert len({before, with_data, source_hash(load_workload(folder))}) == 3
    assert stored_full(load_workload(folder)) is None


def test_a_damaged_full_precision_model_is_not_reused(tmp_path: Path, graph: onnx.ModelProto) -> None:
    folder = write_workload(tmp_path / "w", name="damaged", torch_source=False)
    onnx.save_model(graph, folder / "model.onnx")
    first = compress(load_workload(folder), [])[0]
    (first.path / "model.onnx").write_bytes(b"damaged")
    assert stored_full(load_workload(folder)) is None
    again = compress(load_workload(folder), [])[0]
    assert again.onnx_bytes() == graph.SerializeToString()


def test_a_network_that_differs_from_the_trained_one_is_refused(
    tiny: Workload, full: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tiny), "network", lambda self: self.student(16))
    with pytest.raises(WorkloadError, match="disagree on the weights"):
        load_network(tiny, full)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing"), (b"no model", "is no valid ONNX model"), ("other", "the model takes x")],
)
def test_a_bad_onnx_file_is_refused(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    folder = write_workload(tmp_path / "w", name="bad-onnx", torch_source=False)
    if isinstance(content, bytes):
        (folder / "model.onnx").write_bytes(content)
    elif content:
        onnx.save_model(dense([torch.ones(2, 2)]), folder / "model.onnx")
    with pytest.raises((WorkloadError, CompressionError), match=message):
        compress(load_workload(folder), [INT8])


def test_bad_labels_are_refused(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    split = tiny.split("test")
    for labels, message in ((split.labels + 1, "0 to 1"), (split.labels[:0], "is empty")):
        records = split.records.iloc[: len(labels)]
        changed = type(split)(records, labels)
        monkeypatch.setattr(type(tiny), "split", lambda self, name, changed=changed: changed)
        with pytest.raises(WorkloadError, match=message):
            Data(tiny).rows("test")


@pytest.mark.parametrize(
    ("output", "warns"), [([[0.2, 0.8], [1.0, 0.0]], True), ([[-1.0, 2.0], [3.0, 0.5]], False)]
)
def test_probabilities_that_would_be_read_as_logits_are_noticed(
    tiny: Workload, output: list[list[float]], warns: bool
) -> None:
    assert reads_probabilities_as_logits(tiny, np.array(output)) is warns


def test_a_decode_of_the_workloads_own_is_trusted(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny), "decode", lambda self, outputs: None)
    assert not reads_probabilities_as_logits(tiny, np.array([[0.2, 0.8]]))


def test_what_a_step_stumbles_over_fails_its_recipe_alone_and_in_one_line(
    tiny: Workload, full: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("of\nthe network's own making")

    monkeypatch.setattr(STEPS["prune_magnitude"], "apply", broken)
    recipes = [
        Recipe(name="bad", steps=[StepSpec(step="prune_magnitude", params={"amount": 0.5})]),
        Recipe(name="good", steps=[StepSpec(step="int8_dynamic")]),
    ]
    told: list[str] = []
    made = compress(tiny, recipes, failed=lambda recipe, error: told.append(f"{recipe.name}: {error}"))
    assert [variant.name for variant in made] == ["full", "good"]
    assert len(told) == 1
    assert told[0].startswith("bad: prune_magnitude cannot work on this model: KeyError")
    assert "\n" not in told[0]


def test_a_quantized_model_has_nothing_in_it_that_nothing_runs_on(variants: dict[str, Variant]) -> None:
    for name in ("int8", "small"):
        graph = onnx.load_model_from_string(variants[name].onnx_bytes()).graph
        assert not graph.value_info
        assert not any(node.metadata_props or node.doc_string for node in graph.node)
