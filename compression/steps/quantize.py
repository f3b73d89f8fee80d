"""INT8 quantization with ONNX Runtime, which counts what really became INT8."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from compression.data import Rows, digest
from compression.errors import StepError
from compression.export import quiet
from compression.steps.base import Need, OnnxStep, Property, StepContext, register

if TYPE_CHECKING:
    from onnx import ModelProto

MIN_CALIBRATION_ROWS = 100


class _Int8(OnnxStep):
    """Parameters of both quantizations.

    Args:
        targets: shell-style pattern of the names of the nodes to quantize, as in the ONNX graph.
        per_channel: a scale per output channel of the weights; per tensor otherwise.
        reduce_range: 7-bit weights, for processors without VNNI whose 8-bit sums can saturate.
    """

    makes: ClassVar[frozenset[Property]] = frozenset({"grid"})

    targets: str = "*"
    per_channel: bool = True
    reduce_range: bool = False

    @property
    def destroys(self) -> frozenset[Property]:
        """The weights are integers afterwards."""
        return frozenset({"float"})


@register("int8_dynamic")
class Int8Dynamic(_Int8):
    """INT8 weights in matrix products; activations get their scale at run time, one for the whole batch.

    Convolutions are left alone: ONNX Runtime's ConvInteger is slower than float on this path.
    """

    def apply(self, model: ModelProto, context: StepContext) -> ModelProto:  # noqa: ARG002
        """Return a quantized copy."""
        from onnxruntime.quantization import QuantType, quantize_dynamic

        model = _without_gemm(model)
        nodes = _targets(model, ("MatMul",), self.targets, self.name)
        quantized = _to_file_and_back(
            model,
            lambda source, target: quantize_dynamic(
                source,
                target,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=nodes,
                per_channel=self.per_channel,
                reduce_range=self.reduce_range,
                weight_type=QuantType.QInt8,
            ),
        )
        done = sum(
            node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul") for node in quantized.graph.node
        )
        _check_done(done, nodes, self.name)
        return quantized


@register("int8_static")
class Int8Static(_Int8):
    """INT8 weights and activations; the ranges of activations are measured on the calibration split.

    Args:
        method: how ranges come from the measured values: their extremes, the 99.999th percentile, or the
            range that loses the least entropy.
        rows: how many rows to use, the first ones of the split; at least 100.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    method: Literal["minmax", "entropy", "percentile"] = "minmax"
    rows: int = Field(default=500, ge=MIN_CALIBRATION_ROWS)

    def apply(self, model: ModelProto, context: StepContext) -> ModelProto:
        """Return a quantized copy."""
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        rows = context.data.rows("calibration").take(slice(0, self.rows))
        if len(rows) < MIN_CALIBRATION_ROWS:
            raise StepError(
                f"int8_static: the calibration split has {len(rows)} rows, and ranges measured on fewer than "
                f"{MIN_CALIBRATION_ROWS} are a matter of luck: return more rows from split('calibration')"
            )
        context.calibration_sha256 = digest(rows.tensors)
        method = {
            "minmax": CalibrationMethod.MinMax,
            "entropy": CalibrationMethod.Entropy,
            "percentile": CalibrationMethod.Percentile,
        }[self.method]
        model = _to_file_and_back(copy.deepcopy(model), quant_pre_process)
        nodes = _targets(model, ("MatMul", "Gemm", "Conv"), self.targets, self.name)
        others = [node.name for node in model.graph.node if self.targets != "*" and node.name not in nodes]
        quantized = _to_file_and_back(
            model,
            lambda source, target: quantize_static(
                source,
                target,
                _reader(rows),
                quant_format=QuantFormat.QDQ,
                calibrate_method=method,
                per_channel=self.per_channel,
                reduce_range=self.reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=others,
            ),
        )
        dequantized = {
            output
            for node in quantized.graph.node
            if node.op_type == "DequantizeLinear"
            for output in node.output
        }
        done = sum(node.name in nodes and set(node.input[:2]) <= dequantized for node in quantized.graph.node)
        _check_done(done, nodes, self.name)
        return quantized


def _without_gemm(model: ModelProto) -> ModelProto:
    """A copy with every Gemm as MatMul + Add: dynamic quantization passes over Gemm without a word."""
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = copy.deepcopy(model)
    # Exporters note the shapes of weights here; those of transposed ones would be wrong afterwards.
    del model.graph.value_info[:]
    rewritten = ONNXModel(model)
    rewritten.replace_gemm_with_matmul()
    result: ModelProto = rewritten.model
    return result


def _targets(model: ModelProto, kinds: tuple[str, ...], pattern: str, step: str) -> list[str]:
    """Names of the nodes with constant weights that the pattern asks for."""
    weights = {tensor.name for tensor in model.graph.initializer}
    weights |= {output for node in model.graph.node if node.op_type == "Constant" for output in node.output}
    _name_nodes(model)
    able = [node for node in model.graph.node if node.op_type in kinds and node.input[1] in weights]
    names = [node.name for node in able if fnmatch(node.name, pattern)]
    if not names:
        there = ", ".join(node.name for node in able) or f"no {'/'.join(kinds)} with constant weights"
        raise StepError(f"{step}: targets {pattern!r} matches nothing; the model has {there}")
    return names


def _name_nodes(model: ModelProto) -> None:
    """The quantizer picks nodes by name, and hand-made models need not have any."""
    taken = {node.name for node in model.graph.node}
    for number, node in enumerate(model.graph.node):
        if not node.name:
            name = f"{node.op_type}_{number}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)


def _check_done(done: int, nodes: list[str], step: str) -> None:
    if done < len(nodes):
        raise StepError(f"{step}: only {done} of {len(nodes)} nodes became INT8 ({', '.join(nodes)})")


def _to_file_and_back(model: ModelProto, change: Callable[[str, str], None]) -> ModelProto:
    """Run one of ONNX Runtime's tools, which work on files."""
    import onnx

    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder, quiet():
        source, target = str(Path(folder) / "in.onnx"), str(Path(folder) / "out.onnx")
        onnx.save_model(model, source)
        try:
            change(source, target)
        except Exception as error:
            first = re.sub(r"\s+", " ", str(error))[:200]
            raise StepError(f"ONNX Runtime cannot quantize this model: {first}") from error
        return onnx.load_model(target)


def _reader(rows: Rows) -> object:
    """Calibration data in batches of 50."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[dict[str, np.ndarray]] = (
                {name: array[start : start + 50] for name, array in rows.tensors.items()}
                for start in range(0, len(rows), 50)
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    return Reader()
