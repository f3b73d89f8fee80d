"""Networks of full precision's layers as ONNX, without exporting each of them anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from compression.errors import CompressionError
from compression.export import MAX_ERROR, open_session

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

    from compression.steps import Step, StepContext
    from compression.workload import Tensors


class Graft:
    """Puts the weights of changed networks into the graph that full precision was exported to.

    Steps that leave all layers as they are change numbers only, so that the graph stays the same, and tracing a network
    takes seconds each time. This is done only where full precision's graph has each parameter of its network under the
    same name, bit for bit; an exporter that folds one into another, as batch norms, makes that untrue.

    Args:
        model: full precision's graph; `network` what it was exported from. Neither is changed.
        rows: a few encoded ones, on which every result must answer as its network does.
    """

    def __init__(self, model: ModelProto, network: nn.Module, rows: Tensors) -> None:
        from onnx import numpy_helper

        self._model = model
        self._network = network
        self._rows = rows
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self._able = all(
            name in arrays and _same(arrays[name], value.detach().numpy())
            for name, value in network.named_parameters()
        )

    def built(self, steps: Sequence[Step], context: StepContext) -> bytes | None:
        """What steps on the network make of full precision, as ONNX; None where that takes an export.

        Raises:
            CompressionError: a step cannot do what it is asked for.
        """
        if not self._able or any(step.level != "torch" or "shape" in step.makes for step in steps):
            return None
        network = self._network
        try:
            for step in steps:
                network = step.apply(network, context)
        except CompressionError:
            raise
        except Exception:  # noqa: BLE001 - the usual way stumbles over it too, and says so in our words
            return None
        return self._with_weights_of(network)

    def _with_weights_of(self, network: nn.Module) -> bytes | None:
        from onnx import ModelProto, numpy_helper

        from compression.training import predict_logits

        new = {name: value.detach().numpy() for name, value in network.named_parameters()}
        old = {name: value.detach().numpy() for name, value in self._network.named_parameters()}
        if {name: (value.shape, value.dtype) for name, value in new.items()} != {
            name: (value.shape, value.dtype) for name, value in old.items()
        }:
            return None
        buffers = dict(self._network.named_buffers())
        if any(
            name not in buffers or not _same(value.numpy(), buffers[name].numpy())
            for name, value in network.named_buffers()
        ):
            return None
        changed = ModelProto()
        changed.CopyFrom(self._model)
        for tensor in changed.graph.initializer:
            if tensor.name in new:
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(new[tensor.name]), tensor.name))
        content: bytes = changed.SerializeToString()
        answers = open_session(content).run(None, dict(self._rows))[0]
        expected = predict_logits(network, self._rows)
        # Code that differs shows here. Written so that NaN fails as well.
        if answers.shape != expected.shape or not np.abs(answers - expected).max() <= MAX_ERROR:
            return None
        return content


def _same(array: np.ndarray, other: np.ndarray) -> bool:
    return array.dtype == other.dtype and np.array_equal(array, other)
