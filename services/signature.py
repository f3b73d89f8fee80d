"""The inputs and outputs of a model, read from its ONNX Runtime session, in the words of Open Inference v2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.errors import BadRequest

__all__ = ["Signature", "TensorSpec"]

# ONNX Runtime's type -> (Open Inference datatype, NumPy dtype)
_TYPES: dict[str, tuple[str, Any]] = {
    "tensor(float)": ("FP32", np.float32),
    "tensor(double)": ("FP64", np.float64),
    "tensor(float16)": ("FP16", np.float16),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(int32)": ("INT32", np.int32),
    "tensor(int16)": ("INT16", np.int16),
    "tensor(int8)": ("INT8", np.int8),
    "tensor(uint64)": ("UINT64", np.uint64),
    "tensor(uint32)": ("UINT32", np.uint32),
    "tensor(uint16)": ("UINT16", np.uint16),
    "tensor(uint8)": ("UINT8", np.uint8),
    "tensor(bool)": ("BOOL", np.bool_),
    "tensor(string)": ("BYTES", np.object_),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output.

    Attributes:
        datatype: its Open Inference name, such as FP32 or BYTES.
        dtype: the NumPy dtype of the arrays; object (of str) for BYTES.
        shape: -1 where any size will do; the first axis counts records.
    """

    name: str
    datatype: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of that shape fits. Axes of free size may not be empty, but for the first, which counts
        records: models are not made for that, and fail on it."""
        return len(shape) == len(self.shape) and all(
            size == want or (want < 0 and (size > 0 or axis == 0))
            for axis, (size, want) in enumerate(zip(shape, self.shape, strict=True))
        )


@dataclass(frozen=True, slots=True)
class Signature:
    """A model's inputs and outputs, in the model's order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, session: Any) -> Signature:
        """Read it from an `onnxruntime.InferenceSession`. Raises KeyError for a type that no request can carry."""
        return cls(
            tuple(_spec(node) for node in session.get_inputs()),
            tuple(_spec(node) for node in session.get_outputs()),
        )

    def matches(self, other: Signature) -> bool:
        """Whether a client would see no difference: the same names, datatypes and ranks, in the same order."""

        def seen(specs: tuple[TensorSpec, ...]) -> list[tuple[str, str, int]]:
            return [(spec.name, spec.datatype, len(spec.shape)) for spec in specs]

        return seen(self.inputs) == seen(other.inputs) and seen(self.outputs) == seen(other.outputs)

    def check(self, inputs: Mapping[str, np.ndarray], max_rows: int) -> int:
        """Return the number of records.

        Raises:
            BadRequest: an input is missing, unknown, of another dtype or shape, or the records are none, too many,
                or not the same number in every input.
        """
        rows = -1
        for spec in self.inputs:
            value = inputs.get(spec.name)
            if value is None:
                raise BadRequest(f"input {spec.name!r} is missing")
            if value.dtype != spec.dtype:
                raise BadRequest(f"input {spec.name!r} is {value.dtype}, not {spec.datatype}")
            if not spec.accepts(value.shape):
                raise BadRequest(f"input {spec.name!r} has shape {list(value.shape)}, not {list(spec.shape)}")
            count = value.shape[0] if value.ndim else 0
            if rows not in (-1, count):
                raise BadRequest(f"input {spec.name!r} has {count} records, others {rows}")
            rows = count
        if len(inputs) != len(self.inputs):
            known = {spec.name for spec in self.inputs}
            raise BadRequest(f"no such input: {', '.join(sorted(set(inputs) - known))[:200]!r}")
        if rows < 1:
            raise BadRequest("the inputs hold no record")
        if rows > max_rows:
            raise BadRequest(f"{rows} records in one request; the limit of this workload is {max_rows}")
        return rows


def _spec(node: Any) -> TensorSpec:
    datatype, dtype = _TYPES[node.type]
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape)
    return TensorSpec(node.name, datatype, np.dtype(dtype), shape)
