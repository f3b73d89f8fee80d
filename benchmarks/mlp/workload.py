"""64 numbers to `low` or `high`. It is only ever served: `benchmarks/serving/models.py` makes its variants."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from compression.errors import InvalidRecord, WorkloadError
from compression.workload import Record, Split, SplitName, Tensors, Workload

WIDTH = 64


class Mlp(Workload):
    """Records are `{"x": [64 finite numbers]}`."""

    def encode(self, records: Sequence[Record]) -> Tensors:
        """Records to `x` float32 [N, 64]."""
        rows = []
        for index, record in enumerate(records):
            row = record.get("x")
            if not isinstance(row, list) or len(row) != WIDTH:
                raise InvalidRecord(index, "x", f"{str(row)[:40]} is not such a list", f"{WIDTH} numbers")
            rows.append(row)
        x = np.array(rows, np.float32)
        # One look at all of them: the sum of finite numbers of this size is finite.
        if x.shape != (len(records), WIDTH) or not math.isfinite(x.sum(dtype=np.float64)):
            raise InvalidRecord(0, "x", "a value is not a finite number", f"{WIDTH} numbers")
        return {"x": x}

    def split(self, name: SplitName) -> Split:
        """There is no data."""
        raise WorkloadError(f"{self.name} has no {name} split: it is only served")
