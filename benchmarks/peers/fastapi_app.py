"""FastAPI with ONNX Runtime, as its documentation would have it: a pydantic body, its own JSON."""

from __future__ import annotations

import os

import numpy as np
import onnxruntime
from fastapi import FastAPI
from pydantic import BaseModel

_options = onnxruntime.SessionOptions()
_options.intra_op_num_threads = _options.inter_op_num_threads = 1
_session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], _options)
app = FastAPI()


class Body(BaseModel):
    """One record."""

    data: list[float]


class Answer(BaseModel):
    """The model's output for it."""

    logits: list[float]


# `async`: a plain function would be run in a thread, which costs more than this model does.
@app.post("/predict")
async def predict(body: Body) -> Answer:
    """Run the model."""
    logits = _session.run(None, {"x": np.array([body.data], np.float32)})[0]
    return Answer(logits=logits[0].tolist())
