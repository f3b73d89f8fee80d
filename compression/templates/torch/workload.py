"""A workload that runs as it is, on made-up data. Put your own in place: encode, split, network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from compression.fields import category, number
from compression.workload import Record, Split, SplitName, Tensors, Workload

if TYPE_CHECKING:
    from torch import nn

REGIONS = {"north": 0, "middle": 1, "south": 2}


class MyWorkload(Workload):
    """Will a customer say yes? From age, income, months as a customer, and region."""

    def encode(self, records: Sequence[Record]) -> Tensors:
        """Records to `numbers` float32 [N, 3] and `region` int64 [N, 1]."""
        numbers = [
            (
                number(record, "age", index, 18, 120) / 50 - 1,
                number(record, "income", index, 0, 10_000_000) / 50_000 - 1,
                number(record, "months", index, 0, 1200) / 60 - 1,
            )
            for index, record in enumerate(records)
        ]
        regions = [category(record, "region", index, REGIONS) for index, record in enumerate(records)]
        return {
            "numbers": np.array(numbers, dtype=np.float32).reshape(len(records), 3),
            "region": np.array(regions, dtype=np.int64).reshape(len(records), 1),
        }

    def split(self, name: SplitName) -> Split:
        """Labelled rows. The parts must not share rows, and production comes in time order."""
        import pandas as pd

        seed = {"train": 1, "calibration": 2, "validation": 3, "test": 4, "production": 5}[name]
        rows = {"train": 8000, "calibration": 500, "validation": 4000, "test": 6000, "production": 20000}[
            name
        ]
        draw = np.random.default_rng(seed)
        records = pd.DataFrame(
            {
                "age": draw.integers(18, 91, rows),
                "income": draw.gamma(3, 15_000, rows).round(2),
                "months": draw.integers(0, 121, rows),
                "region": draw.choice(list(REGIONS), rows, p=[0.5, 0.3, 0.2]),
            }
        )
        score = (
            (records["income"] - 45_000) / 20_000
            + (records["months"] - 60) / 40
            - ((records["age"] - 50) / 25) ** 2
            + records["region"].map({"north": 0.9, "middle": 0.4, "south": -0.2})
        )
        labels = (score + draw.logistic(0, 0.7, rows) > 0).to_numpy().astype(np.int64)
        return Split(records, labels)

    def network(self) -> nn.Module:
        """The full-precision network, untrained; `train()` fits it (override that to train your own way)."""
        return self.student(256)

    def student(self, width: int) -> nn.Module:
        """A network of another width, for distillation."""
        from .model import Net

        return Net(width)
