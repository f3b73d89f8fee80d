"""The last stage of every variant: measure, judge, write the manifest, save."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from compression.data import Data
from compression.export import Exported, export, tensor_specs
from compression.gate import judge
from compression.measure import measure
from compression.variant import (
    CODED,
    GATE,
    MODEL,
    PROGRAM,
    SCORECARD,
    Manifest,
    Reference,
    Variant,
    file_entry,
    save_variant,
    this_cpu,
)
from compression.workload import Workload

if TYPE_CHECKING:
    from torch import nn

CHECK_ROWS = 64
"""Rows of the validation split on which torch and ONNX Runtime are compared at export."""


@dataclass(frozen=True)
class Built:
    """A finished model on its way into the store; the fields mean what they mean in the manifest.

    Attributes:
        coded: the ONNX file as a file step has coded it; what is kept of it then.
    """

    name: str
    recipe: Mapping[str, object]
    recipe_hash: str
    source_hash: str
    onnx: bytes
    seed: int = 0
    parent: str | None = None
    program: bytes | None = None
    max_error: float | None = None
    calibration_sha256: str | None = None
    warnings: tuple[str, ...] = ()
    reference: Reference | None = None
    extra: Mapping[str, bytes] | None = None
    coded: bytes | None = None
    build_key: str | None = None


def export_checked(model: nn.Module, data: Data) -> Exported:
    """Export a network and compare it with ONNX Runtime on validation rows."""
    return export(model, data.rows("validation").take(slice(0, CHECK_ROWS)).tensors)


def finish(workload: Workload, data: Data, built: Built, full_onnx: bytes) -> Variant:
    """Measure a model against full precision, judge it by the workload's profile, and save it."""
    import onnx

    stored = {MODEL: built.onnx} if built.coded is None else {CODED: built.coded}
    size = sum(map(len, stored.values()))
    scorecard = measure(workload, data, built.name, built.onnx, full_onnx, size)
    inputs, outputs = tensor_specs(onnx.load_model_from_string(built.onnx))
    manifest = Manifest(
        workload=workload.name,
        name=built.name,
        recipe=dict(built.recipe),
        recipe_hash=built.recipe_hash,
        parent=built.parent,
        classes=workload.classes,
        positive=workload.positive,
        sensitive=workload.sensitive,
        inputs=inputs,
        outputs=outputs,
        parameters=scorecard.parameters,
        macs=scorecard.macs,
        seed=built.seed,
        versions=_versions(),
        cpu=this_cpu(),
        source_hash=built.source_hash,
        calibration_sha256=built.calibration_sha256,
        export_max_error=built.max_error,
        warnings=built.warnings,
        created_at=time.time(),
        reference=built.reference,
        decoded=None if built.coded is None else file_entry(built.onnx),
        build_key=built.build_key,
    )
    files = dict(built.extra or {}) | stored
    files |= {
        SCORECARD: scorecard.model_dump_json(indent=1).encode(),
        GATE: judge(scorecard, workload.profile).model_dump_json(indent=1).encode(),
    }
    if built.program is not None:
        files[PROGRAM] = built.program
    return save_variant(manifest, files)


def _versions() -> dict[str, str]:
    names = ("bentoml", "constriction", "numpy", "onnx", "onnxruntime", "torch", "torch-pruning")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
