"""The full-precision variant: trained or taken over once, and kept while its source does not change."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import TYPE_CHECKING

from compression.build import Built, export_checked, finish
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


def make_full(workload: Workload, data: Data, progress: Progress = no_progress) -> Variant:
    """Train full precision, or read the workload's ONNX file, and save it with its reference rows.

    Raises:
        WorkloadError: the workload brings no usable model.
        ExportError: its network cannot be exported.
    """
    program, max_error = None, None
    if workload.has_torch:
        progress("training", 0.0)
        exported = export_checked(workload.train(progress), data)
        content, program, max_error = exported.onnx.SerializeToString(), exported.program, exported.max_error
    else:
        content = _read_onnx(workload)
    progress("measuring", 0.0)
    built = Built(
        name=FULL,
        recipe={"name": FULL, "steps": []},
        recipe_hash=hashlib.sha256(FULL.encode()).hexdigest(),
        source_hash=source_hash(workload),
        onnx=content,
        program=program,
        max_error=max_error,
    )
    parquet, reference, warnings = make_reference(workload, data, content)
    built = Built(
        **(vars(built) | {"reference": reference, "extra": {REFERENCE: parquet}, "warnings": warnings})
    )
    return finish(workload, data, built, content)


def source_hash(workload: Workload) -> str:
    """sha256 of what full precision is made from: the folder's code and data, the settings, torch's version.

    Guardrail policy, gate profile and how it is served are left out, as they change no model; so are recipes and texts.
    """
    total = hashlib.sha256(version("torch").encode() if workload.has_torch else b"")
    # Without defaults: a setting that a later version adds changes no model that does not use it.
    left_out = {"policy", "profile", "max_records", "serving"}
    settings = workload.settings.model_dump_json(exclude=left_out, exclude_defaults=True)
    total.update(settings.encode())
    files = {
        path: path.relative_to(workload.directory) for path in workload.directory.rglob("*") if path.is_file()
    }
    onnx_file = workload.full_precision_onnx()
    if onnx_file is not None and onnx_file.is_file():
        files.setdefault(onnx_file, type(onnx_file)(onnx_file.name))
    for path, name in sorted(files.items()):
        hidden = any(part.startswith((".", "__pycache__")) for part in name.parts)
        if hidden or name.parts[0] == "recipes" or name.suffix in (".md", ".yaml", ".pyc"):
            continue
        total.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


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
