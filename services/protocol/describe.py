"""What clients can ask about the server and its models: metadata, configuration, statistics, index."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from services.signature import TensorSpec

if TYPE_CHECKING:
    from services.arms import Model
    from services.counters import Statistics

__all__ = ["model_config", "model_metadata", "model_statistics", "repository_index", "server_metadata"]

_EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
_PLATFORM = "onnxruntime_onnx"


def server_metadata() -> dict[str, Any]:
    """Name, version and extensions of this server."""
    return {"name": "trimtab", "version": server_version(), "extensions": _EXTENSIONS}


def server_version() -> str:
    """The installed version; a bento has the sources without it."""
    try:
        return version("trimtab")
    except PackageNotFoundError:
        return "unknown"


def model_metadata(name: str, models: Sequence[Model]) -> dict[str, Any]:
    """The tensors of the first of `models`, and the names of all as versions."""
    signature = models[0].signature
    return {
        "name": name,
        "versions": [model.name for model in models],
        "platform": _PLATFORM,
        "inputs": [_metadata(spec) for spec in signature.inputs],
        "outputs": [_metadata(spec) for spec in signature.outputs],
    }


def _metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}


def model_config(name: str, model: Model, max_records: int) -> dict[str, Any]:
    """The least that Triton's clients expect of a model's configuration.

    There, `dims` leave out the first axis of a model that takes batches; `max_batch_size` 0 says that this one has an
    axis of a fixed size there.
    """
    signature = model.signature
    specs = (*signature.inputs, *signature.outputs)
    batches = all(spec.shape and spec.shape[0] < 0 for spec in specs)
    return {
        "name": name,
        "platform": _PLATFORM,
        "backend": "onnxruntime",
        "max_batch_size": max_records if batches else 0,
        "input": [_config(spec, batches) for spec in signature.inputs],
        "output": [_config(spec, batches) for spec in signature.outputs],
    }


def _config(spec: TensorSpec, batches: bool) -> dict[str, Any]:
    kind = "STRING" if spec.datatype == "BYTES" else spec.datatype
    return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": spec.shape[1:] if batches else spec.shape}


def model_statistics(name: str, variant: str, statistics: Statistics) -> dict[str, Any]:
    """What a variant has done in this worker. Requests do not say how long they waited, nor batches how long they
    took: those times are 0."""
    runs = _duration(statistics.runs, statistics.run_seconds)
    unmeasured = _duration(statistics.runs, 0.0)
    return {
        "name": name,
        "version": variant,
        "last_inference": int(statistics.last_at * 1000),
        "inference_count": statistics.rows,
        "execution_count": statistics.runs,
        "inference_stats": {
            "success": _duration(statistics.requests, statistics.request_seconds),
            "fail": _duration(statistics.failures, statistics.failure_seconds),
            "queue": unmeasured,
            "compute_input": unmeasured,
            "compute_infer": runs,
            "compute_output": unmeasured,
            "cache_hit": _duration(statistics.hits, 0.0),
            "cache_miss": _duration(statistics.misses, 0.0),
        },
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": _duration(count, 0.0),
                "compute_infer": _duration(count, 0.0),
                "compute_output": _duration(count, 0.0),
            }
            for size, count in sorted(statistics.batches.items())
        ],
    }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": int(seconds * 1e9)}


def repository_index(name: str, models: Sequence[Model]) -> list[dict[str, str]]:
    """The loaded variants; what else is in the store, a rollout loads."""
    return [{"name": name, "version": model.name, "state": "READY", "reason": ""} for model in models]
