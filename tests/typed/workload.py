"""Two numbers and a team; the model's other inputs are left at nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compression.workload import Record, Split, SplitName, Tensors, Workload


class Typed(Workload):
    """The larger of the numbers `low` and `high` is the answer."""

    def encode(self, records: Sequence[Record]) -> Tensors:
        rows = len(records)
        return {
            "x": np.array([[record["low"], record["high"]] for record in records], np.float32).reshape(
                rows, 2
            ),
            "half": np.zeros((rows, 2), np.float16),
            "small": np.zeros((rows, 3), np.int8),
            "large": np.zeros((rows, 2), np.int64),
            "flags": np.zeros((rows, 2), np.bool_),
            "text": np.full((rows, 2), "", object),
        }

    def split(self, name: SplitName) -> Split:
        raise NotImplementedError
