"""What others make of the same full-precision model and the same calibration rows, in one line of theirs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from benchmarks.serving.processes import BenchmarkError, environment, run
from benchmarks.venvs import PEERS, prepare
from compression.data import Data
from compression.export import quiet
from compression.workload import Workload

__all__ = ["ALL", "NNCF_DROP"]

NNCF_DROP = 0.003
"""Loss of accuracy on validation rows that nncf is told to keep to."""
_CALIBRATION_ROWS = 500
_VALIDATION_ROWS = 2000

Say = Callable[[str], None]


def _dynamic(workload: Workload, data: Data, full: bytes, cache: Path, say: Say) -> bytes:  # noqa: ARG001
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder) / "model.onnx", Path(folder) / "quantized.onnx"
        source.write_bytes(full)
        quantize_dynamic(source, target)
        return target.read_bytes()


def _static(workload: Workload, data: Data, full: bytes, cache: Path, say: Say) -> bytes:  # noqa: ARG001
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    tensors = data.rows("calibration").take(slice(0, _CALIBRATION_ROWS)).tensors

    class Rows(CalibrationDataReader):
        def __init__(self) -> None:
            rows = len(next(iter(tensors.values())))
            self.left = iter(
                [{name: a[i : i + 50] for name, a in tensors.items()} for i in range(0, rows, 50)]
            )

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder) / "model.onnx", Path(folder) / "quantized.onnx"
        source.write_bytes(full)
        quantize_static(source, target, Rows())
        return target.read_bytes()


def _nncf(workload: Workload, data: Data, full: bytes, cache: Path, say: Say) -> bytes:
    bin_ = prepare("nncf", cache, say)
    calibration = data.rows("calibration").take(slice(0, _CALIBRATION_ROWS))
    validation = data.rows("validation").take(slice(0, _VALIDATION_ROWS))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.onnx").write_bytes(full)
        settings = {"max_drop": NNCF_DROP, "transformer": b"Softmax" in full}
        (folder / "settings.json").write_text(json.dumps(settings))
        np.savez(folder / "calibration.npz", **calibration.tensors)  # type: ignore[arg-type]
        np.savez(folder / "validation.npz", labels=validation.labels, **validation.tensors)  # type: ignore[arg-type]
        log = cache / "logs" / f"nncf-{workload.name}.log"
        command = [str(bin_ / "python"), str(PEERS / "nncf_quantize.py"), str(folder)]
        # Its own choice of threads: the quantization is not what is timed.
        run(["timeout", "900", *command], log, environment(PYTHONPATH=""))
        made = folder / "quantized.onnx"
        if not made.is_file():
            raise BenchmarkError(f"nncf wrote no model (see {log})")
        return made.read_bytes()


ALL: Mapping[str, Callable[[Workload, Data, bytes, Path, Say], bytes]] = {
    "onnxruntime quantize_dynamic": _dynamic,
    "onnxruntime quantize_static": _static,
    "nncf quantize_with_accuracy_control": _nncf,
}
"""Name -> from (workload, its data, full precision, a folder to keep things in) to an ONNX file."""
