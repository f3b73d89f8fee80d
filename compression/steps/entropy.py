"""Entropy coding of the finished file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from compression.coding import Coder, Span, decode, encode
from compression.errors import StepError
from compression.steps.base import FileStep, StepContext, register

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

_WORTH = 0.2
"""Share of the file that coding saves at least where enough weights are pruned or shared; of floats that are all
different it saves a tenth, by their exponents."""


@register("entropy_code")
class EntropyCode(FileStep):
    """Store the ONNX file coded; loading gives the same bytes back, so that no answer and no latency changes.

    What an earlier step made of few different values becomes small: shared weights, zeros, INT8. Weights of full
    precision lose a tenth or so. The third stage of Han et al., "Deep Compression" (1510.00149), section 4; the format
    is in `compression.coding`.

    Args:
        coder: `ans`, which comes close to the entropy; or `huffman`, as in the paper, which takes at least a bit for
            each weight, so that it is larger where one value is frequent, and takes longer to load.
        min_bytes: arrays smaller than this are deflated with the rest of the file.
    """

    coder: Coder = "ans"
    min_bytes: int = Field(default=512, ge=1)

    def apply(self, model: bytes, context: StepContext) -> bytes:
        """Return the coded file."""
        import onnx

        graph = onnx.load_model_from_string(model)
        spans = list(_spans(graph, model, self.min_bytes))
        coded = encode(model, spans, self.coder)
        context.progress(f"{len(model)} bytes became {len(coded)}", 0.9)
        saved = 1 - len(coded) / len(model)
        if 0 < saved < _WORTH and not _on_a_grid(graph):
            context.warnings.append(
                f"entropy_code: the file became only {saved:.0%} smaller: weights in full precision hardly repeat; "
                "prune, cluster or quantize them first"
            )
        if len(coded) >= len(model):
            raise StepError(
                f"entropy_code: the file would grow from {len(model)} to {len(coded)} bytes: leave it out"
            )
        # Whatever can go wrong when it is loaded goes wrong here.
        if decode(coded, len(model)) != model:
            raise StepError("entropy_code: the coded file does not decode to the model")
        return coded


def _on_a_grid(model: ModelProto) -> bool:
    """Whether any matrix is stored in integers of a byte or less."""
    from onnx import helper

    return any(
        len(tensor.dims) > 1 and helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize == 1
        for tensor in _tensors(model)
    )


def _spans(model: ModelProto, content: bytes, min_bytes: int) -> Iterator[Span]:
    """Where the file has the model's large arrays."""
    from onnx import helper, numpy_helper

    position = 0
    for tensor in _tensors(model):
        # Types of less than a byte are packed; they are coded by bytes.
        kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        raw = tensor.raw_data
        if not raw and tensor.float_data:
            raw = numpy_helper.to_array(tensor).tobytes()
        width = kind.itemsize if kind.kind in "iufb" and len(raw) % kind.itemsize == 0 else 1
        if len(raw) < min_bytes:
            continue
        # Protobuf writes arrays as they are, in the order of the graph; one that is kept otherwise is not found.
        at = content.find(raw, position)
        if at >= 0:
            position = at + len(raw)
            yield Span(at, len(raw) // width, width)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
    yield from model.graph.initializer
