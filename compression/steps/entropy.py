"""Entropy coding of the finished file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from compression.coding import Span, decode, encode
from compression.errors import StepError
from compression.steps.base import FileStep, StepContext, register

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto


@register("entropy_code")
class EntropyCode(FileStep):
    """Store the ONNX file coded; loading gives the same bytes back, so that no answer and no latency changes.

    What an earlier step made of few different values becomes small: shared weights, zeros, INT8. Weights of full
    precision lose a tenth or so. The third stage of Han et al., "Deep Compression" (1510.00149), section 4, with rANS
    in place of Huffman codes; the format is in `compression.coding`.

    Args:
        min_bytes: arrays smaller than this are deflated with the rest of the file.
    """

    min_bytes: int = Field(default=512, ge=1)

    def apply(self, model: bytes, context: StepContext) -> bytes:
        """Return the coded file."""
        import onnx

        spans = list(_spans(onnx.load_model_from_string(model), model, self.min_bytes))
        coded = encode(model, spans)
        context.progress(f"{len(model)} bytes became {len(coded)}", 0.9)
        if len(coded) >= len(model):
            raise StepError(
                f"entropy_code: the file would grow from {len(model)} to {len(coded)} bytes: leave it out"
            )
        # Whatever can go wrong when it is loaded goes wrong here.
        if decode(coded, len(model)) != model:
            raise StepError("entropy_code: the coded file does not decode to the model")
        return coded


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
