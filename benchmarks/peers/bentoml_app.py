"""A plain BentoML API method with the requests and replies of our `/predict`."""

from __future__ import annotations

import os
from typing import Any

import bentoml
import numpy as np


@bentoml.service(
    workers=1,
    # With BentoML's default of 60 s its timers alone make p99 hundreds of milliseconds; ours has the same limit.
    traffic={"timeout": 5},
    logging={"access": {"enabled": False}},
)
class Mlp:
    """Two classes from 64 numbers."""

    def __init__(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], options)

    # `async`: a plain method would be run in a thread, which costs more than this model does.
    @bentoml.api(route="/predict")
    async def predict(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """One class for each record."""
        x = np.array([record["x"] for record in records], np.float32)
        logits = self.session.run(None, {"x": x})[0].astype(np.float64)
        classes = logits.argmax(axis=1)
        confidences = 1.0 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
        return {
            "predictions": [
                {"class": index, "label": ("low", "high")[index], "confidence": confidence}
                for index, confidence in zip(classes.tolist(), confidences.tolist(), strict=True)
            ]
        }
