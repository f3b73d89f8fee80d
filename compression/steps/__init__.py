"""The compression techniques; importing this package registers them all by name."""

from __future__ import annotations

from compression.steps import (
    cluster,
    entropy,
    heads,
    int4,
    lottery,
    low_rank,
    mixed_precision,
    prune,
    qat,
    quantize,
    ratios,
    sparsify,
    train,
)
from compression.steps.base import STEPS, FileStep, OnnxStep, Step, StepContext, TorchStep, build, register

__all__ = [
    "STEPS",
    "FileStep",
    "OnnxStep",
    "Step",
    "StepContext",
    "TorchStep",
    "build",
    "cluster",
    "entropy",
    "heads",
    "int4",
    "lottery",
    "low_rank",
    "mixed_precision",
    "prune",
    "qat",
    "quantize",
    "ratios",
    "register",
    "sparsify",
    "train",
]
