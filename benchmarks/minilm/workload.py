"""64 tokens to `low` or `high`. It is only ever served: `benchmarks/serving/models.py` makes its variant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compression.errors import InvalidRecord, WorkloadError
from compression.workload import Record, Split, SplitName, Tensors, Workload

LENGTH = 64
VOCABULARY = 30522


class MiniLm(Workload):
    """Records are `{"input_ids": [64 token numbers]}`: tokens are made elsewhere, and all of them count."""

    def encode(self, records: Sequence[Record]) -> Tensors:
        """Records to `input_ids`, `attention_mask` and `token_type_ids`, each int64 [N, 64]."""
        rows = []
        for index, record in enumerate(records):
            row = record.get("input_ids")
            right = isinstance(row, list) and len(row) == LENGTH
            if not right or not all(type(token) is int and 0 <= token < VOCABULARY for token in row):
                problem = f"{str(row)[:40]} is not such a list"
                raise InvalidRecord(index, "input_ids", problem, f"{LENGTH} numbers below {VOCABULARY}")
            rows.append(row)
        tokens = np.array(rows, np.int64).reshape(len(records), LENGTH)
        return {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "token_type_ids": np.zeros_like(tokens),
        }

    def split(self, name: SplitName) -> Split:
        """There is no data."""
        raise WorkloadError(f"{self.name} has no {name} split: it is only served")
