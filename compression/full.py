"""The full-precision variant: trained or taken over once, and kept while its source does not change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, cast

from compression.build import Built, export_checked, finish
from compression.cache import Entry, StepCache, key_of, source_key
from compression.data import Data
from compression.errors import VariantCorrupted, VariantNotFound, WorkloadError
from compression.reference import make_reference
from compression.variant import FULL, PROGRAM, REFERENCE, Variant, load_variant, tag_name
from compression.workload import Progress, Workload, no_progress

if TYPE_CHECKING:
    from torch import nn


def stored_full(workload: Workload) -> Variant | None:
    """The `full` variant in the store, if it is intact and made from the same code, data and settings."""
    try:
        stored = load_variant(tag_name(workload.name, FULL))
        for name in stored.manifest.files:
            stored.asset(name)
    except (VariantNotFound, VariantCorrupted):
        return None
    reference = stored.manifest.reference
    if reference is None or not reference.labels:
        return None  # of an earlier version, which kept less of the reference rows
    return stored if stored.manifest.source_hash == source_hash(workload) else None


def make_full(
    workload: Workload, data: Data, progress: Progress = no_progress, cache: StepCache | None = None
) -> Variant:
    """Train full precision, or read the workload's ONNX file, and save it with its reference rows.

    Args:
        cache: holds a network that was trained, but not saved before the run was interrupted.

    Raises:
        WorkloadError: the workload brings no usable model.
        ExportError: its network cannot be exported.
    """
    return save_full(workload, data, train_full(workload, data, progress, cache), progress)


@dataclass(frozen=True)
class Trained:
    """Full precision before it is measured: as an ONNX file and, where it has a torch source, as a program.

    Attributes:
        cached: it was not trained now, but in an earlier run that did not come to saving it.
    """

    onnx: bytes
    program: bytes | None = None
    max_error: float | None = None
    cached: bool = False


def train_full(
    workload: Workload, data: Data, progress: Progress = no_progress, cache: StepCache | None = None
) -> Trained:
    """Train full precision, or take it from the cache or from the workload's ONNX file.

    Raises:
        WorkloadError: the workload brings no usable model.
        ExportError: its network cannot be exported.
    """
    if not workload.has_torch:
        return Trained(_read_onnx(workload))
    key = key_of("training", source_key(data)) if cache else ""
    entry = cache.get(key) if cache else None
    if entry is not None:
        progress("training (from the cache)", 1.0)
        error = cast("float", entry.facts["max_error"])
        return Trained(entry.parts["onnx"], entry.parts["program"], error, cached=True)
    progress("training", 0.0)
    exported = export_checked(workload.train(progress), data)
    content: bytes = exported.onnx.SerializeToString()
    if cache:
        parts = {"onnx": content, "program": exported.program}
        problem = cache.put(key, Entry(parts, {"max_error": exported.max_error}))
        if problem:
            progress(f"training: not cached, {problem}", 1.0)
    return Trained(content, exported.program, exported.max_error)


def save_full(workload: Workload, data: Data, trained: Trained, progress: Progress = no_progress) -> Variant:
    """Measure full precision and save it with its reference rows."""
    progress("measuring", 0.0)
    parquet, reference, warnings = make_reference(workload, data, trained.onnx)
    built = Built(
        name=FULL,
        recipe={"name": FULL, "steps": []},
        recipe_hash=hashlib.sha256(FULL.encode()).hexdigest(),
        source_hash=source_hash(workload),
        onnx=trained.onnx,
        program=trained.program,
        max_error=trained.max_error,
        reference=reference,
        extra={REFERENCE: parquet},
        warnings=warnings,
    )
    return finish(workload, data, built, trained.onnx)


def source_hash(workload: Workload) -> str:
    """sha256 of what full precision is made from: the folder's code and data, the settings, torch's version.

    Guardrail policy, gate profile and how it is served are left out, as they change no model; so are recipes, and texts
    and settings beside the code. Links to other folders are followed.
    """
    total = hashlib.sha256(version("torch").encode() if workload.has_torch else b"")
    # Without defaults: a setting that a later version adds changes no model that does not use it.
    left_out = {"policy", "profile", "max_records", "serving"}
    settings = workload.settings.model_dump_json(exclude=left_out, exclude_defaults=True)
    total.update(settings.encode())
    files = {path: path.relative_to(workload.directory) for path in _files(workload.directory)}
    onnx_file = workload.full_precision_onnx()
    if onnx_file is not None and onnx_file.is_file():
        files.setdefault(onnx_file, type(onnx_file)(onnx_file.name))
    for path, name in sorted(files.items()):
        hidden = any(part.startswith((".", "__pycache__")) for part in name.parts)
        beside = len(name.parts) == 1 and name.suffix in (".md", ".yaml")
        if hidden or beside or name.parts[0] == "recipes" or name.suffix == ".pyc":
            continue
        total.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """Every file of a folder, also behind links to other folders, as data often is; a link to where it is in ends."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = Path(parent)
        above = {at.resolve() for at in (here, *here.parents) if at.is_relative_to(folder)}
        folders[:] = [name for name in folders if (here / name).resolve() not in above]
        yield from (path for name in names if (path := here / name).is_file())


def load_network(workload: Workload, full: Variant) -> nn.Module:
    """The trained full-precision torch network of a stored variant, in eval mode.

    Raises:
        WorkloadError: `network()` has other weights than what `train()` returned.
    """
    import torch

    program = torch.export.load(str(full.asset(PROGRAM)))
    model = workload.network()
    try:
        model.load_state_dict(program.state_dict)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise WorkloadError(
            f"network() and train() of {workload.name} disagree on the weights: {first}"
        ) from None
    return model.eval()


def _read_onnx(workload: Workload) -> bytes:
    import onnx

    path = workload.full_precision_onnx()
    if path is None:
        raise WorkloadError(
            f"{workload.name} has no model: define network() (torch) or full_precision_onnx() in workload.py"
        )
    if not path.is_file():
        raise WorkloadError(f"{path} is missing: full_precision_onnx() must return an ONNX file")
    try:
        # Also takes in weights that are kept in files beside the model.
        model = onnx.load_model(path)
        onnx.checker.check_model(model)
    except Exception as error:  # noqa: BLE001 - a broken file can fail in protobuf, onnx or the file system
        first = str(error).strip().partition("\n")[0]
        raise WorkloadError(f"{path} is no valid ONNX model: {first}") from None
    content: bytes = model.SerializeToString()
    return content
