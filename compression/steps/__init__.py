"""The compression techniques; importing this package registers them all by name."""

from __future__ import annotations

from compression.steps import prune, quantize, train
from compression.steps.base import STEPS, OnnxStep, Step, StepContext, TorchStep, build, register

__all__ = [
    "STEPS",
    "OnnxStep",
    "Step",
    "StepContext",
    "TorchStep",
    "build",
    "prune",
    "quantize",
    "register",
    "train",
]
