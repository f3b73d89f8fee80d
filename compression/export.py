"""From torch to ONNX, checked; and what can be read off an ONNX graph."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compression.errors import CompressionError, ExportError, one_of
from compression.variant import TensorSpec

if TYPE_CHECKING:
    import onnxruntime
    from onnx import ModelProto
    from torch import Tensor, nn

OUTPUT = "logits"
ROWS_AT_ONCE = 128
"""Rows that are answered at once where answers are measured; of a transformer, a thousand would take gigabytes."""
MAX_ERROR = 1e-3
"""Largest absolute difference between torch and ONNX Runtime that an export may have."""


@dataclass(frozen=True)
class Exported:
    """An ONNX model, the same network as a `torch.export` archive, and how far the two are apart."""

    onnx: ModelProto
    program: bytes
    max_error: float


def export(model: nn.Module, tensors: Mapping[str, np.ndarray]) -> Exported:
    """Export a torch network with a dynamic batch and compare it with ONNX Runtime on real rows.

    Args:
        model: takes `tensors` by name and returns logits [N, K]. The axes that its attribute `dynamic_axes` names, if
            it has one (compression.training says more), are free in the ONNX model, too; rows cut to half their size
            along these are compared as well.
        tensors: encoded rows, at least 8 of them; the first 1 and then all but the first are compared.

    Raises:
        ExportError: torch cannot export the network, the outputs differ by more than MAX_ERROR, or `dynamic_axes`
            names an input or axis that there is not.
    """
    import torch

    model.eval()
    rows = len(next(iter(tensors.values())))
    if rows < 8:
        raise ExportError(f"the export check needs at least 8 rows; the split has {rows}")
    samples = {name: torch.from_numpy(array) for name, array in tensors.items()}
    # Two rows: torch.export would specialise a batch of one.
    example = {name: tensor[:2] for name, tensor in samples.items()}
    free = free_axes(model, tensors)
    shapes = dynamic_shapes(free)
    with quiet():
        try:
            program = torch.export.export(model, (), kwargs=example, dynamic_shapes=shapes)
            converted = torch.onnx.export(
                program, dynamo=True, external_data=False, output_names=[OUTPUT], verbose=False
            )
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise ExportError(f"torch cannot export the network to ONNX: {first}") from error
        assert converted is not None
        graph = bare(_name_axes(converted.model_proto, free))
        archive = io.BytesIO()
        torch.export.save(program, archive)
    return Exported(graph, archive.getvalue(), _compare(model, graph, tensors, free))


def free_axes(model: nn.Module, tensors: Mapping[str, np.ndarray | Tensor]) -> dict[str, dict[int, str]]:
    """Input -> axis -> name of the dimension, of all axes whose size is free.

    Raises:
        ExportError: `dynamic_axes` of the network names an input or axis that there is not.
    """
    own: Mapping[str, Mapping[int, str]] = getattr(model, "dynamic_axes", {})
    for name, axes in own.items():
        if name not in tensors or any(not 0 < axis < tensors[name].ndim for axis in axes):
            there = ", ".join(f"{key} with {array.ndim} axes" for key, array in tensors.items())
            raise ExportError(
                f"dynamic_axes names axes {one_of(list(axes))} of {name}; the inputs are {there}, and the first "
                "axis is free in any case"
            )
    return {name: {0: "batch", **own.get(name, {})} for name in tensors}


def dynamic_shapes(free: Mapping[str, Mapping[int, str]]) -> dict[str, dict[int, Any]]:
    """Free axes in the words of `torch.export.export`; those of one name are of one size."""
    import torch

    sizes = {called: torch.export.Dim(called, min=1) for axes in free.values() for called in axes.values()}
    return {name: {axis: sizes[called] for axis, called in axes.items()} for name, axes in free.items()}


def _shortened(
    tensors: Mapping[str, np.ndarray], free: Mapping[str, Mapping[int, str]]
) -> Mapping[str, np.ndarray]:
    """The rows cut to half their size along their free axes but the first."""
    short = dict(tensors)
    for name, axes in free.items():
        for axis in axes.keys() - {0}:
            short[name] = short[name].take(range(-(-short[name].shape[axis] // 2)), axis)
    return short


def _compare(
    model: nn.Module,
    graph: ModelProto,
    tensors: Mapping[str, np.ndarray],
    free: Mapping[str, Mapping[int, str]],
) -> float:
    from compression.training import predict_logits

    session = open_session(graph.SerializeToString())
    worst = 0.0
    whole = [{name: array[rows] for name, array in tensors.items()} for rows in (slice(0, 1), slice(1, None))]
    more = [_shortened(feed, free) for feed in whole] if any(len(axes) > 1 for axes in free.values()) else []
    for feed in (*whole, *more):
        got = session.run(None, feed)[0]
        expected = predict_logits(model, feed)
        if got.shape != expected.shape:
            raise ExportError(f"ONNX Runtime returns shape {got.shape} where torch returns {expected.shape}")
        # Unlike max(), np.maximum hands NaN on.
        worst = float(np.maximum(worst, np.abs(got - expected).max()))
    # Written so that NaN fails as well.
    if not worst <= MAX_ERROR:
        raise ExportError(
            f"ONNX Runtime and torch differ by {worst:.2g} on real rows, more than {MAX_ERROR:.0e}"
        )
    return worst


def _name_axes(model: ModelProto, free: Mapping[str, Mapping[int, str]]) -> ModelProto:
    """Call the free axes what they are called; the exporter names them after symbols such as s90."""
    graph = model.graph
    names = {
        value.type.tensor_type.shape.dim[axis].dim_param: called
        for value in graph.input
        for axis, called in free.get(value.name, {}).items()
    }
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    return model


def bare(model: ModelProto) -> ModelProto:
    """Take out, in place, what nothing runs on: inner shapes, and the exporter's notes with paths of this machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")
    return model


def open_session(onnx_bytes: bytes, threads: int = 1) -> onnxruntime.InferenceSession:
    """An ONNX Runtime CPU session; more than one thread only helps large batches."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads steal the cores that the other sessions are measured on.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(onnx_bytes, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base class
        first = str(error).strip().partition("\n")[0]
        raise CompressionError(f"ONNX Runtime cannot load the model: {first}") from error


def run(
    session: onnxruntime.InferenceSession, tensors: Mapping[str, np.ndarray], batch: int = ROWS_AT_ONCE
) -> np.ndarray:
    """The first output for all rows, answered `batch` rows at a time."""
    rows = len(next(iter(tensors.values())))
    output = session.get_outputs()[0].name
    parts = [
        session.run([output], {name: array[start : start + batch] for name, array in tensors.items()})[0]
        for start in range(0, rows, batch)
    ]
    return np.concatenate(parts)


def tensor_specs(model: ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a graph; initializers that are listed as inputs are left out."""
    from onnx import helper

    weights = {tensor.name for tensor in model.graph.initializer}

    def spec(value: object) -> TensorSpec:
        kind = value.type.tensor_type  # type: ignore[attr-defined]
        shape = tuple(
            dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?") for dim in kind.shape.dim
        )
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        return TensorSpec(name=value.name, dtype=dtype, shape=shape)  # type: ignore[attr-defined]

    inputs = tuple(spec(value) for value in model.graph.input if value.name not in weights)
    return inputs, tuple(spec(value) for value in model.graph.output)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the chatter of exporters and quantizers off the terminal; errors still pass."""
    logger = logging.getLogger()
    level = logger.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
