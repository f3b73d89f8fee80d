"""Tiny hand-made models of the workload in `tests/points`, and variants of them in the model store."""

from __future__ import annotations

import hashlib
import io
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pandas as pd

from compression.gate import GateResult
from compression.variant import (
    FULL,
    GATE,
    MODEL,
    REFERENCE,
    Manifest,
    Reference,
    ReferenceGroup,
    TensorSpec,
    Variant,
    save_variant,
    this_cpu,
)

WORKLOAD = Path(__file__).parent / "points"
NEVER, ALWAYS = 9.0, -9.0

_GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
points (float[N, 5] x) => (float[N, 2] logits)
<float[5, 1] w = {4.0, 2.0, -1.0, 0.0, 0.0}, int64[1] three = {3}, int64[1] four = {4}, int64[1] zeroth = {0},
 float[1] flip_d = {%(flip_d)f}, float[1] flip_b = {%(flip_b)f}, float[1] nan_a = {%(nan_a)f},
 float[1] minus = {-1.0}, float[1] one = {1.0}, float[1] zero = {0.0}, float[1] nan = {nan},
 float stuck_a = {%(stuck_a)f}, int64 often = {%(trips)d}, int64 for_ever = {1000000000000}, bool go = {1},
 float raise_a = {%(raise_a)f}, int64 inside = {0}, int64 outside = {1}>
{
  score = MatMul(x, w)
  d = Gather <axis = 1> (x, three)
  over = Greater(d, flip_d)
  b = Gather <axis = 1> (x, four)
  in_b = Greater(b, flip_b)
  flip = Or(over, in_b)
  sign = Where(flip, minus, one)
  signed = Mul(score, sign)
  a = Gather <axis = 1> (x, zeroth)
  lost = Greater(a, nan_a)
  largest = ReduceMax <keepdims = 0> (a)
  raises = Greater(largest, raise_a)
  place = Where(raises, outside, inside)
  none = Gather <axis = 0> (zero, place)
  noise = Where(lost, nan, none)
  high = Add(signed, noise)
  low = Mul(high, zero)
  answer = Concat <axis = 1> (low, high)
  hangs = Greater(largest, stuck_a)
  trips = Where(hangs, for_ever, often)
  logits = Loop (trips, go, answer) <body = round (int64 i, bool on, float[N, 2] z) => (bool onward, float[N, 2] next)
    { onward = Identity(on)  next = Identity(z) }>
}
"""

_SLOW = """
<ir_version: 10, opset_import: ["" : 21]>
slow (float[N, 5] x) => (float[N, 2] logits)
<int64[1] two = {2}, int64[1] zeroth = {0}, int64[1] columns = {1}, bool go = {1},
 int64 n = {%(trips)d}>
{
  part = Slice(x, zeroth, two, columns)
  logits = Loop (n, go, part) <body = round (int64 i, bool on, float[N, 2] z) => (bool onward, float[N, 2] next)
    { onward = Identity(on)  next = Cos(z) }>
}
"""


def points_onnx(
    *,
    flip_d: float = NEVER,
    flip_b: float = NEVER,
    nan_a: float = NEVER,
    stuck_a: float = NEVER,
    raise_a: float = NEVER,
    trips: float = 1,
) -> bytes:
    """The line as an ONNX model, spoilt where asked.

    Args:
        flip_d: answers are turned round where d is larger than this.
        flip_b: answers are turned round for team B (0.5) or for nobody.
        nan_a: answers are NaN where a is larger than this.
        stuck_a: no answer ever comes where a is larger than this.
        raise_a: the run fails where a is larger than this.
        trips: how often it goes round a loop that changes nothing; 1,000 take some milliseconds.
    """
    # The parser knows no NaN, so that one weight is put in by hand.
    text = _GRAPH.replace("{nan}", "{0.0}") % {
        "flip_d": flip_d,
        "flip_b": flip_b,
        "nan_a": nan_a,
        "stuck_a": stuck_a,
        "raise_a": raise_a,
        "trips": trips,
    }
    model = onnx.parser.parse_model(text)
    for weight in model.graph.initializer:
        if weight.name == "nan":
            weight.float_data[:] = [float("nan")]
    return bytes(model.SerializeToString())


def slow_onnx(trips: int = 1_000_000) -> bytes:
    """A model of the same input and output that goes round a loop."""
    return bytes(onnx.parser.parse_model(_SLOW % {"trips": trips}).SerializeToString())


def parsed(text: str) -> bytes:
    """An ONNX model from its text form."""
    return bytes(onnx.parser.parse_model(text).SerializeToString())


VARIANTS: dict[str, dict[str, float]] = {
    "same": {"flip_d": 0.999},  # one answer in 2,000
    "worse": {"flip_d": 0.7},  # 15% of all answers
    "harms-b": {"flip_b": 0.5},  # every answer of team B, 10% of the points
    "broken": {"nan_a": 0.5},  # a quarter of the points; its warm-up on zeros is fine
    "stuck": {"stuck_a": 0.8},  # hangs on a tenth of the points
    "raises": {"raise_a": 0.4},  # fails on 30% of the points
    "heavy": {"trips": 5000},  # right, but milliseconds of work: too much for the event loop
    "hopeless": {"nan_a": ALWAYS},  # not even its warm-up
    "refused": {"flip_d": 0.7},  # the gate has said no to this one
    "unmeasured": {"flip_d": 0.999},  # the gate has never seen this one
}


def points(number: int, seed: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Records with their true classes, in which full precision is always right."""
    random_ = random.Random(seed)
    for _ in range(number):
        record: dict[str, Any] = {name: round(random_.uniform(-1, 1), 6) for name in "abcd"}
        record["TEAM"] = "B" if random_.random() < 0.1 else "A"
        yield record, truth(record)


def truth(record: dict[str, Any]) -> int:
    """The true class of a point."""
    return int(4 * record["a"] + 2 * record["b"] - record["c"] > 0)


def save(
    name: str,
    content: bytes,
    *,
    workload: str = "points",
    parent: str | None = None,
    files: dict[str, bytes] | None = None,
    reference: Reference | None = None,
    **fields: Any,
) -> Variant:
    """Put a model into the store as a variant."""
    manifest = Manifest(
        **{
            "workload": workload,
            "name": name,
            "recipe": {"name": name, "steps": []},
            "recipe_hash": hashlib.sha256(name.encode()).hexdigest(),
            "parent": parent,
            "classes": ("low", "high"),
            "positive": 1,
            "sensitive": ("TEAM",),
            "inputs": (TensorSpec(name="x", dtype="float32", shape=("N", 5)),),
            "outputs": (TensorSpec(name="logits", dtype="float32", shape=("N", 2)),),
            "parameters": 5,
            "macs": 5,
            "seed": 0,
            "versions": {},
            "cpu": this_cpu(),
            "source_hash": "0" * 64,
            "calibration_sha256": None,
            "export_max_error": None,
            "created_at": time.time(),
            "reference": reference,
            **fields,
        }
    )
    return save_variant(manifest, {MODEL: content, **(files or {})})


def verdict(accepted: bool) -> bytes:
    """A gate's file."""
    reasons = [] if accepted else ["TEAM=B loses 30.0 pt (25.0 to 35.0), over the 5 pt limit"]
    return GateResult(accepted=accepted, profile="standard", reasons=reasons).model_dump_json().encode()


def save_full() -> Variant:
    """The full-precision variant, with its reference rows."""
    rows = list(points(1000, seed=99))
    frame = pd.DataFrame([record for record, _ in rows])
    labels = np.array([label for _, label in rows])
    frame["label"] = frame["prediction"] = labels
    frame["confidence"] = 0.9
    frame["group_TEAM"] = frame["TEAM"]
    groups = {}
    for team, part in frame.groupby("TEAM"):
        groups[f"TEAM={team}"] = ReferenceGroup(rows=len(part), positive_rate=float(part["label"].mean()))
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    return save(
        FULL,
        points_onnx(),
        files={REFERENCE: buffer.getvalue(), GATE: verdict(True)},
        reference=Reference(rows=len(frame), groups=groups),
    )


def save_variants() -> dict[str, Variant]:
    """Full precision and every one of VARIANTS, in the store that BENTOML_HOME names."""
    full = save_full()
    saved = {FULL: full}
    for name, spoilt in VARIANTS.items():
        files = {} if name == "unmeasured" else {GATE: verdict(accepted=name != "refused")}
        saved[name] = save(name, points_onnx(**spoilt), parent=full.tag, files=files)
    return saved
