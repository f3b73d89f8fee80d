"""A workload of an ONNX file alone, on made-up data. Put your own in place: encode, split, model.onnx."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compression.fields import number
from compression.workload import Record, Split, SplitName, Tensors, Workload

FIELDS = ("amount", "hour", "distance", "age_of_account", "tries")


class MyWorkload(Workload):
    """Is a payment fraud? 3% are."""

    def full_precision_onnx(self) -> Path:
        """The model: inputs named as `encode` names them, a dynamic batch, one logit per class [N, 2]."""
        return self.directory / "model.onnx"

    def encode(self, records: Sequence[Record]) -> Tensors:
        """Records to `features` float32 [N, 5]."""
        features = [
            (
                number(record, "amount", index, 0, 1_000_000) / 200 - 1,
                number(record, "hour", index, 0, 24) / 12 - 1,
                number(record, "distance", index, 0, 20_100) / 500 - 1,
                number(record, "age_of_account", index, 0, 100) / 5 - 1,
                number(record, "tries", index, 0, 1000) / 2 - 1,
            )
            for index, record in enumerate(records)
        ]
        return {"features": np.array(features, dtype=np.float32).reshape(len(records), len(FIELDS))}

    def split(self, name: SplitName) -> Split:
        """Labelled rows. The parts must not share rows, and production comes in time order."""
        import pandas as pd

        seed = {"train": 1, "calibration": 2, "validation": 3, "test": 4, "production": 5}[name]
        rows = {"train": 30000, "calibration": 500, "validation": 5000, "test": 15000, "production": 20000}[
            name
        ]
        draw = np.random.default_rng(seed)
        fraud = draw.random(rows) < 0.03
        records = pd.DataFrame(
            {
                "amount": (draw.gamma(2, 40, rows) * (1 + 2.5 * fraud)).round(2),
                "hour": np.where(fraud, draw.normal(3, 3, rows) % 24, draw.normal(15, 4, rows) % 24).round(2),
                "distance": (draw.exponential(60, rows) * (1 + 5 * fraud)).clip(0, 20_000).round(1),
                "age_of_account": (draw.exponential(4, rows) / (1 + 1.5 * fraud)).clip(0, 100).round(2),
                "tries": draw.poisson(0.2 + 1.2 * fraud, rows),
            }
        )
        return Split(records, fraud.astype(np.int64))
