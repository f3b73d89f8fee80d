"""The model of the workload in this folder, and its full-precision variant in the model store."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd

from compression.variant import FULL, GATE, REFERENCE, Reference, ReferenceGroup, TensorSpec, Variant
from tests import models

WORKLOAD = Path(__file__).parent

# Input -> (ONNX type, dtype, size of the second axis, datatype of the protocol)
INPUTS: dict[str, tuple[str, type[np.generic], int, str]] = {
    "x": ("float", np.float32, 2, "FP32"),
    "half": ("float16", np.float16, 2, "FP16"),
    "small": ("int8", np.int8, 3, "INT8"),
    "large": ("int64", np.int64, 2, "INT64"),
    "flags": ("bool", np.bool_, 2, "BOOL"),
    "text": ("string", np.object_, 2, "BYTES"),
}


def echo_onnx() -> bytes:
    """Every input comes out again: `x` as `logits`, the others under `NAME_out`."""
    taken = ", ".join(f"{kind}[N, {size}] {name}" for name, (kind, _, size, _) in INPUTS.items())
    given = ", ".join(f"{kind}[N, {size}] {output(name)}" for name, (kind, _, size, _) in INPUTS.items())
    nodes = "  ".join(f"{output(name)} = Identity({name})" for name in INPUTS)
    return models.parsed(
        f'<ir_version: 10, opset_import: ["" : 21]> echo ({taken}) => ({given}) {{ {nodes} }}'
    )


def output(name: str) -> str:
    """The output that an input comes out at."""
    return "logits" if name == "x" else f"{name}_out"


def save_full() -> Variant:
    """The model as a full-precision variant, in the store that BENTOML_HOME names."""
    rows = pd.DataFrame({"low": [0.0, 1.0] * 50, "high": [1.0, 0.0] * 50, "TEAM": ["A"] * 100})
    rows["label"] = rows["prediction"] = [1, 0] * 50
    rows["confidence"] = 0.7
    rows["group_TEAM"] = rows["TEAM"]
    buffer = io.BytesIO()
    rows.to_parquet(buffer)
    return models.save(
        FULL,
        echo_onnx(),
        workload="typed",
        files={REFERENCE: buffer.getvalue(), GATE: models.verdict(True)},
        reference=Reference(rows=100, groups={"TEAM=A": ReferenceGroup(rows=100, positive_rate=0.5)}),
        inputs=tuple(_spec(name, name) for name in INPUTS),
        outputs=tuple(_spec(output(name), name) for name in INPUTS),
    )


def _spec(name: str, like: str) -> TensorSpec:
    _, dtype, size, _ = INPUTS[like]
    return TensorSpec(name=name, dtype=np.dtype(dtype).name, shape=("N", size))
