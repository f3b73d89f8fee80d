"""The tiny MLP, the same file for every server; and how a model becomes a variant without training."""

from __future__ import annotations

import hashlib
import io
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.formats import Inputs

__all__ = ["CANDIDATE", "SAMPLE", "mlp", "mlp_records", "predict", "save_variants"]

CANDIDATE = "copy"
"""The treatment's name. It is full precision's own file: INT8 makes a model of this size slower, and the benchmark is
about serving, so that every server and both arms do the same work and must give the same answers."""

SAMPLE = 64
"""Records in a pool."""
_REFERENCE_ROWS = 1000


def mlp() -> bytes:
    """64 -> 32 -> 2 with seeded weights, as an ONNX file."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.normal(scale=0.2, size=(64, 32)),
        "b1": rng.normal(scale=0.1, size=32),
        "w2": rng.normal(scale=0.3, size=(32, 2)),
        "b2": rng.normal(scale=0.1, size=2),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["hidden"]),
            helper.make_node("Relu", ["hidden"], ["active"]),
            helper.make_node("Gemm", ["active", "w2", "b2"], ["logits"]),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def mlp_records(number: int = SAMPLE) -> list[Inputs]:
    """What is asked: rounded as it is written into JSON, so that the binary requests say the same."""
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(1, 64)).round(6).astype(np.float32)} for _ in range(number)]


def predict(model: bytes, records: list[Inputs]) -> np.ndarray:
    """The first output for each record, run alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, dict(record))[0] for record in records])


def save_variants(workload: str, model: bytes, candidate: str | None = None) -> None:
    """Put a model into the store that BENTOML_HOME names: as full precision, and as a candidate if one is wanted.

    BentoML reads BENTOML_HOME when it is imported, so that this belongs into a process of its own.
    """
    from compression.gate import GateResult
    from compression.variant import FULL, GATE, MODEL, REFERENCE, Manifest, Reference, save_variant, this_cpu

    verdict = GateResult(accepted=True, profile="standard", reasons=[]).model_dump_json().encode()
    inputs, outputs = _specs(model)
    parent = None
    # Without them the Monitor would draw no reports, which belong to what a rollout costs.
    reference = _reference(model) if candidate is not None else None
    for name in (FULL, candidate):
        if name is None:
            continue
        manifest = Manifest(
            workload=workload,
            name=name,
            recipe={"name": name, "steps": []},
            recipe_hash=hashlib.sha256(name.encode()).hexdigest(),
            parent=parent,
            classes=("low", "high"),
            positive=1,
            sensitive=(),
            inputs=inputs,
            outputs=outputs,
            parameters=0,
            macs=0,
            seed=0,
            versions={},
            cpu=this_cpu(),
            source_hash="0" * 64,
            calibration_sha256=None,
            export_max_error=None,
            created_at=time.time(),
            reference=Reference(rows=_REFERENCE_ROWS, groups={}) if reference is not None else None,
        )
        files = {MODEL: model, GATE: verdict} | ({REFERENCE: reference} if reference is not None else {})
        saved = save_variant(manifest, files)
        parent = parent or saved.tag


def _reference(model: bytes) -> bytes:
    """What the MLP says of random records; they come as tensors, so that there are no columns of records."""
    import pandas as pd

    logits = predict(model, mlp_records(_REFERENCE_ROWS))
    classes = logits.argmax(axis=1)
    confidences = 1.0 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    buffer = io.BytesIO()
    pd.DataFrame({"label": classes, "prediction": classes, "confidence": confidences}).to_parquet(buffer)
    return buffer.getvalue()


def _specs(model: bytes) -> tuple[Any, Any]:
    import onnx

    from compression.export import tensor_specs

    return tensor_specs(onnx.load_from_string(model))


if __name__ == "__main__":
    _workload, _path, *_candidate = sys.argv[1:]
    save_variants(_workload, Path(_path).read_bytes(), *_candidate)
