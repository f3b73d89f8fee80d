from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import bentoml
import pandas as pd
import pytest

from compression.errors import CompressionError, VariantCorrupted, VariantNotFound
from compression.variant import (
    MODEL,
    PROGRAM,
    REFERENCE,
    Manifest,
    Variant,
    list_variants,
    load_variant,
    save_variant,
)


@pytest.fixture
def manifest(full: Variant) -> Manifest:
    return full.manifest.model_copy(
        update={"workload": "shelf", "name": "one", "files": {}, "created_at": 1.0}
    )


@pytest.fixture(autouse=True)
def cleared() -> Iterator[None]:
    yield
    for model in bentoml.models.list():
        if model.info.labels.get("workload") in ("shelf", "shelf-one"):
            bentoml.models.delete(model.tag)


def test_a_saved_variant_loads_by_name_and_by_version(manifest: Manifest) -> None:
    saved = save_variant(manifest, {MODEL: b"model", "notes.txt": b"hello"})
    assert saved.tag.startswith("shelf-one:")
    assert len(saved.tag.partition(":")[2]) == 12
    assert load_variant(saved.tag) == load_variant("shelf-one") == saved
    assert saved.onnx_bytes() == b"model"
    assert saved.asset("notes.txt").read_bytes() == b"hello"
    assert (saved.scorecard(), saved.gate()) == (None, None)


def test_a_staged_model_that_another_process_finishes_with_meanwhile_is_no_error(manifest: Manifest) -> None:
    store = save_variant(manifest, {MODEL: b"1"}).path.parent.parent.parent
    gone = store / ".trimtab-gone"
    gone.symlink_to(store / "nowhere")  # as a folder that was there when the names were read
    try:
        save_variant(manifest.model_copy(update={"created_at": 2.0}), {MODEL: b"2"})
    finally:
        gone.unlink()


def test_the_newest_of_a_name_wins(manifest: Manifest) -> None:
    old = save_variant(manifest, {MODEL: b"old"})
    new = save_variant(manifest.model_copy(update={"created_at": 2.0}), {MODEL: b"new"})
    assert load_variant("shelf-one") == new
    assert load_variant(old.tag).onnx_bytes() == b"old"
    assert [variant.tag for variant in list_variants("shelf")] == [new.tag]


def test_full_precision_is_listed_first(manifest: Manifest) -> None:
    for name in ("zoo", "full", "ant"):
        save_variant(manifest.model_copy(update={"name": name}), {MODEL: b"x"})
    assert [variant.name for variant in list_variants("shelf")] == ["full", "ant", "zoo"]
    assert list_variants("nobody") == []


@pytest.mark.parametrize("name", [MODEL, "notes.txt"])
def test_an_altered_file_is_found_out(manifest: Manifest, name: str) -> None:
    saved = save_variant(manifest, {MODEL: b"model", "notes.txt": b"hello"})
    (saved.path / name).write_bytes(b"evil!")
    with pytest.raises(VariantCorrupted, match=f"{name} does not match its sha256"):
        saved.asset(name)
    (saved.path / name).unlink()
    with pytest.raises(VariantCorrupted, match=f"{name} cannot be read"):
        saved.asset(name)


def test_an_altered_manifest_is_found_out(manifest: Manifest) -> None:
    saved = save_variant(manifest, {MODEL: b"model"})
    path = saved.path / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(VariantCorrupted, match="does not match its version"):
        load_variant(saved.tag)
    path.write_text("{")
    with pytest.raises(VariantCorrupted, match="missing or unreadable"):
        load_variant(saved.tag)


def test_what_is_not_there_is_not_found(manifest: Manifest) -> None:
    saved = save_variant(manifest, {MODEL: b"model"})
    with pytest.raises(VariantNotFound, match="no variant shelf-two in the model store"):
        load_variant("shelf-two")
    with pytest.raises(VariantNotFound):
        load_variant("shelf-one:000000000000")
    with pytest.raises(VariantNotFound, match=r"has no file program\.pt2"):
        saved.asset(PROGRAM)


def test_two_workloads_cannot_share_a_name_in_the_store(manifest: Manifest) -> None:
    save_variant(manifest.model_copy(update={"name": "one-two"}), {MODEL: b"x"})
    with pytest.raises(CompressionError, match="already names a variant of workload shelf"):
        save_variant(manifest.model_copy(update={"workload": "shelf-one", "name": "two"}), {MODEL: b"x"})


def test_a_failed_save_leaves_nothing(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, data: bytes) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        save_variant(manifest, {MODEL: b"x"})
    monkeypatch.undo()
    with pytest.raises(VariantNotFound):
        load_variant("shelf-one")
    with pytest.raises(CompressionError, match=r"needs model\.onnx"):
        save_variant(manifest, {})


def test_a_manifest_survives_json(manifest: Manifest) -> None:
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_full_precision_carries_the_reference_rows(full: Variant) -> None:
    reference = full.manifest.reference
    assert reference is not None
    frame = pd.read_parquet(io.BytesIO(full.asset(REFERENCE).read_bytes()))
    assert list(frame.columns) == ["x", "y", "side", "label", "prediction", "confidence", "group_side"]
    assert len(frame) == reference.rows == 600
    assert {str(dtype) for dtype in frame[["label", "prediction"]].dtypes} == {"int64"}
    for name, group in reference.groups.items():
        rows = frame[frame["group_side"] == name.removeprefix("side=")]
        assert group.rows == len(rows)
        assert group.positive_rate == pytest.approx((rows["prediction"] == 1).mean())
