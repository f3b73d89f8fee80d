from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from compression.errors import InvalidOutput, WorkloadError
from compression.workload import ServingSettings, Split, Workload, WorkloadSettings, load_workload

from .conftest import MODEL, write_workload

ROOT = Path(__file__).parents[2]


def test_a_folder_loads_with_its_settings_as_attributes(tiny: Workload) -> None:
    assert (tiny.name, tiny.classes, tiny.positive) == ("tiny", ("below", "above"), 1)
    assert tiny.sensitive == ("side",)
    assert (tiny.profile, tiny.max_records, tiny.has_torch) == ("standard", 256, True)


def test_serving_imports_load_nothing_heavy() -> None:
    code = (
        "import sys, compression, compression.workload, compression.variant, compression.gate\n"
        "from compression.workload import load_workload\n"
        "load_workload('examples/employment').encode([])\n"
        "heavy = {'torch', 'pandas', 'onnxruntime', 'matplotlib', 'bentoml', 'onnx'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_two_workloads_with_a_model_file_each_do_not_meet(tmp_path: Path) -> None:
    before = list(sys.path)
    one, two = write_workload(tmp_path / "one"), write_workload(tmp_path / "two")
    (two / "model.py").write_text(MODEL.replace("nn.Embedding(2, 3)", "nn.Embedding(2, 3, max_norm=1)"))
    first, second = load_workload(one).network(), load_workload(two).network()
    assert (first.side.max_norm, second.side.max_norm) == (None, 1)
    assert sys.path == before


def test_an_edited_workload_is_imported_anew_and_an_unchanged_one_once(tmp_path: Path) -> None:
    folder = write_workload(tmp_path / "w")
    first = load_workload(folder)
    assert first.network().layers[-1].bias is not None
    assert type(load_workload(folder)) is type(first)
    (folder / "model.py").write_text(MODEL.replace("nn.Linear(width, 2)", "nn.Linear(width, 2, bias=False)"))
    assert load_workload(folder).network().layers[-1].bias is None
    assert first.network().layers[-1].bias is not None


def test_module_and_attribute_load_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_workload(tmp_path / "pack_of_tests", torch_source=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_workload("pack_of_tests.workload:Tiny").name == "tiny"
    with pytest.raises(WorkloadError, match="is not a Workload"):
        load_workload("pack_of_tests.workload:np")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("no/such/folder", "no workload folder at no/such/folder"),
        ("no_such_module:Thing", "no_such_module does not import"),
    ],
)
def test_a_reference_to_nothing_says_so(ref: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        load_workload(ref)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "is missing"),
        ("a: [", "cannot be read"),
        ("- a", "must be a mapping"),
        ("classes: [a, b]", "name: Field required"),
        ("name: Big\nclasses: [a, b]", "name: String should match"),
        ("name: ok\nclasses: [a]", "classes: "),
        ("name: ok\nclasses: [a, a]", "classes must differ"),
        ("name: ok\nclasses: [a, b]\npositive: 2", "positive must be a class index, 0 to 1"),
        ("name: ok\nclasses: [a, b]\nmetric: recall", "recall_of names the classes"),
        ("name: ok\nclasses: [a, b]\nrecall_of: [a]", "recall_of names the classes"),
        ("name: ok\nclasses: [a, b]\nmetric: recall\nrecall_of: [c]", "recall_of must name different"),
        ("name: ok\nclasses: [a, b]\nsurprise: 1", "surprise: no such setting"),
        ("name: ok\nclasses: [a, b]\nprofile: lenient", "profile: "),
        ("name: ok\nclasses: [a, b]\nserving: {max_batch: 0}", "serving.max_batch: Input should be greater"),
        ("name: ok\nclasses: [a, b]\nserving: {max_wait_ms: -1}", "serving.max_wait_ms: "),
        ("name: ok\nclasses: [a, b]\nserving: {max_wait_ms: .inf}", "serving.max_wait_ms: "),
        ("name: ok\nclasses: [a, b]\nserving: {cache_ttl_s: -1}", "serving.cache_ttl_s: "),
        ("name: ok\nclasses: [a, b]\nserving: {cache_max_bytes: 0}", "serving.cache_max_bytes: "),
        ("name: ok\nclasses: [a, b]\nserving: {batch: 8}", "serving.batch: no such setting"),
    ],
)
def test_bad_settings_give_one_line(tmp_path: Path, settings: str | None, message: str) -> None:
    folder = write_workload(tmp_path / "w")
    if settings is None:
        (folder / "workload.yaml").unlink()
    else:
        (folder / "workload.yaml").write_text(settings)
    with pytest.raises(WorkloadError, match=message) as caught:
        load_workload(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "is missing"),
        ("x = 1", "exactly one subclass of Workload; it defines: none"),
        (
            "from compression.workload import Workload\nclass A(Workload): ...\nclass B(Workload): ...",
            "it defines: A, B",
        ),
        ("from compression.workload import Workload\nclass A(Workload): ...", "lacks encode, split"),
        ("1 / 0", "does not import: ZeroDivisionError"),
        ("from model import Net", 'import sibling files with "from .model import'),
    ],
)
def test_bad_code_gives_one_line(tmp_path: Path, code: str | None, message: str) -> None:
    folder = write_workload(tmp_path / "w")
    if code is None:
        (folder / "workload.py").unlink()
    else:
        (folder / "workload.py").write_text(code)
    with pytest.raises(WorkloadError, match=message) as caught:
        load_workload(folder)
    assert "\n" not in str(caught.value)


def test_a_failed_import_leaves_no_module_behind(tmp_path: Path) -> None:
    folder = write_workload(tmp_path / "w")
    (folder / "workload.py").write_text("from .model import Net\n1 / 0")
    before = set(sys.modules)
    with pytest.raises(WorkloadError):
        load_workload(folder)
    assert not {name for name in set(sys.modules) - before if name.startswith("trimtab_workload")}


def test_the_default_decode_is_softmax_and_argmax(tiny: Workload) -> None:
    predictions = tiny.decode({"logits": np.array([[0.0, 0.0], [1.0, 3.0], [1000.0, 0.0]], dtype=np.float32)})
    assert predictions.classes.tolist() == [0, 1, 0]
    assert predictions.confidences == pytest.approx([0.5, 1 / (1 + np.exp(-2)), 1.0])
    assert predictions.classes.dtype == np.int64
    assert predictions.confidences.dtype == np.float64


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 5), (3, 2, 2)])
def test_outputs_of_another_shape_are_refused(tiny: Workload, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidOutput, match=r"not \[N, 2\]"):
        tiny.decode({"logits": np.zeros(shape)})


def test_the_default_group_is_the_raw_value(tiny: Workload) -> None:
    assert tiny.groups({"x": 1, "side": "left"}) == {"side": "left"}


def test_a_split_with_too_few_labels_is_refused() -> None:
    with pytest.raises(WorkloadError, match="2 records but 1 labels"):
        Split(pd.DataFrame({"x": [1, 2]}), np.array([0]))


def test_without_a_serving_section_small_batches_are_joined_and_nothing_is_cached(tiny: Workload) -> None:
    assert tiny.serving == ServingSettings(
        max_batch=32, max_wait_ms=1.0, cache_ttl_s=0.0, cache_max_bytes=64 * 1024 * 1024
    )


def test_the_serving_section_arrives_as_an_attribute(tmp_path: Path) -> None:
    folder = write_workload(tmp_path / "w")
    with (folder / "workload.yaml").open("a") as file:
        file.write("serving: {max_batch: 8, cache_ttl_s: 60}\n")
    serving = load_workload(folder).serving
    assert (serving.max_batch, serving.cache_ttl_s, serving.max_wait_ms) == (8, 60.0, 1.0)


def test_collate_puts_requests_of_one_shape_one_after_the_other(tiny: Workload) -> None:
    records = [{"x": x, "y": 1, "side": side} for x, side in [(1, "left"), (2, "right"), (3, "left")]]
    joined = tiny.collate([tiny.encode(records[:1]), tiny.encode(records[1:])])
    alone = tiny.encode(records)
    assert joined.keys() == alone.keys()
    for name, value in alone.items():
        np.testing.assert_array_equal(joined[name], value, strict=True)


def test_collate_pads_the_ends_of_the_other_axes_with_zeros(tiny: Workload) -> None:
    one = {"ids": np.array([[1, 2, 3]]), "same": np.ones((1, 2), np.float32)}
    two = {"ids": np.array([[4], [5]]), "same": np.full((2, 2), 2, np.float32)}
    joined = tiny.collate([one, two])
    assert joined["ids"].tolist() == [[1, 2, 3], [4, 0, 0], [5, 0, 0]]
    assert joined["ids"].dtype == np.int64
    assert joined["same"].tolist() == [[1, 1], [2, 2], [2, 2]]


def test_collate_pads_every_axis_to_the_largest_of_all_requests(tiny: Workload) -> None:
    wide, tall = np.ones((1, 1, 3), np.float32), np.ones((1, 2, 1), np.float32)
    joined = tiny.collate([{"x": wide}, {"x": tall}])["x"]
    assert joined.tolist() == [[[1, 1, 1], [0, 0, 0]], [[1, 0, 0], [1, 0, 0]]]
    assert joined.dtype == np.float32


def test_collate_pads_text_with_empty_strings(tiny: Workload) -> None:
    one = {"words": np.array([["a", "b"]], dtype=object)}
    two = {"words": np.array([["c"]], dtype=object)}
    assert tiny.collate([one, two])["words"].tolist() == [["a", "b"], ["c", ""]]


def test_collate_of_text_of_fixed_length_cuts_nothing_off(tiny: Workload) -> None:
    one, two = {"words": np.array([["a", "b"]])}, {"words": np.array([["longer"]])}
    assert tiny.collate([one, two])["words"].tolist() == [["a", "b"], ["longer", ""]]


def test_settings_survive_yaml(tiny: Workload) -> None:
    text = yaml.safe_dump(tiny.settings.model_dump(mode="json"))
    assert WorkloadSettings.model_validate(yaml.safe_load(text)) == tiny.settings
