"""The inputs and outputs of a model, read from its ONNX Runtime session, in the words of Open Inference v2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

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
        """Whether a client would see no difference: the same names, datatypes, ranks and fixed sizes, in the same
        order."""

        def alike(ours: tuple[TensorSpec, ...], theirs: tuple[TensorSpec, ...]) -> bool:
            return len(ours) == len(theirs) and all(
                (one.name, one.datatype, len(one.shape)) == (two.name, two.datatype, len(two.shape))
                and all(a == b or min(a, b) < 0 for a, b in zip(one.shape, two.shape, strict=True))
                for one, two in zip(ours, theirs, strict=True)
            )

        return alike(self.inputs, other.inputs) and alike(self.outputs, other.outputs)


def _spec(node: Any) -> TensorSpec:
    datatype, dtype = _TYPES[node.type]
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape)
    return TensorSpec(node.name, datatype, np.dtype(dtype), shape)
