"""What the gateway hands to the shadow about one request, as JSON."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["packed", "unpacked"]


def packed(inputs: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """Tensors as JSON: name -> [dtype, shape, data], data being base64 or, for text, a list."""
    return {
        name: [
            value.dtype.str,
            value.shape,
            value.ravel().tolist() if value.dtype.kind == "O" else b64encode(value.tobytes()).decode(),
        ]
        for name, value in inputs.items()
    }


def unpacked(tensors: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    """The inverse of `packed`. The arrays are read-only."""
    found = {}
    for name, (dtype, shape, data) in tensors.items():
        flat = np.array(data, object) if dtype == "|O" else np.frombuffer(b64decode(data), dtype)
        found[name] = flat.reshape(shape)
    return found
