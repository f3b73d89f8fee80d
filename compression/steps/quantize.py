"""INT8 quantization with ONNX Runtime; what really became INT8 is counted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compression.data import Rows, digest
from compression.errors import StepError
from compression.steps.base import Need, StepContext, register
from compression.steps.onnx_nodes import (
    Quantize,
    apart,
    check_done,
    matching,
    named_copy,
    through_files,
    unfolded,
    weight_count,
    weighted,
    without_gemm,
)
from compression.steps.patterns import select

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto
    from onnxruntime.quantization import CalibrationMethod

    from compression.workload import Tensors

MIN_CALIBRATION_ROWS = 100
_BATCH = 50
_ENTROPY_BINS = 512


class _Int8(Quantize):
    """Parameters of both quantizations to INT8, besides those of every quantization.

    Args:
        per_channel: a scale per output channel of the weights; per tensor otherwise.
        reduce_range: 7-bit weights, for processors without VNNI whose 8-bit sums can saturate.
    """

    per_channel: bool = True
    reduce_range: bool = False

    def chosen(self, model: ModelProto, context: StepContext) -> list[str]:
        """The nodes to quantize, with a warning about those that cannot have a scale for each channel."""
        names = super().chosen(model, context)
        if stacked := self._stacked(model, names):
            context.warnings.append(
                f"{self.name}: {', '.join(stacked)} multiply by stacks of matrices, which ONNX Runtime takes with one "
                "scale for all channels only"
            )
        return names

    def _stacked(self, model: ModelProto, names: Sequence[str]) -> list[str]:
        """Those of the nodes whose weights cannot have a scale for each channel, if that is asked for.

        ONNX Runtime's quantizers make such scales for weights of any rank, and its operators refuse them at run time.
        """
        ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
        nodes = {node.name: node for node in model.graph.node if node.op_type == "MatMul"}
        return [
            name for name in names if self.per_channel and name in nodes and ranks[nodes[name].input[1]] > 2
        ]


@register("int8_dynamic")
class Int8Dynamic(_Int8):
    """INT8 weights in matrix products; activations get their scale at run time, one for the whole batch.

    Convolutions are never touched: ONNX Runtime runs them as ConvInteger on this path, which is several times slower
    than float. https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html

    Args:
        embeddings: tables of embeddings as well, each with one scale. That makes them smaller, not faster. One that is
            multiplied with too is stored once for each use if `per_channel`.
    """

    embeddings: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """Gemm has become MatMul by then."""
        return ("MatMul", "Gather") if self.embeddings else ("MatMul",)

    def prepared(self, model: ModelProto) -> ModelProto:
        """A copy with MatMul in place of Gemm, which dynamic quantization passes over."""
        return without_gemm(model)

    def chosen(self, model: ModelProto, context: StepContext) -> list[str]:
        """The matrix products to quantize; a model that is mostly convolutions gets a warning."""
        able, convolutions = weighted(model, self.kinds), weighted(model, ("Conv",))
        asked = select([node.name for node in (*able, *convolutions)], self.targets)
        if asked and not {node.name for node in able} & set(asked):
            raise StepError(
                f"int8_dynamic: {self.targets!r} matches only convolutions ({', '.join(asked)}), which dynamic INT8 "
                "makes several times slower: use int8_static"
            )
        names = super().chosen(model, context)
        in_convolutions = weight_count(model, convolutions)
        share = in_convolutions / max(1, in_convolutions + weight_count(model, able))
        if share > 0.5:
            context.warnings.append(
                f"int8_dynamic: {share:.0%} of the weights are in convolutions and stay in float: "
                "int8_static quantizes those too"
            )
        return names

    def quantized(
        self,
        model: ModelProto,
        names: Sequence[str],
        context: StepContext,  # noqa: ARG002
        ranges: Path | None = None,  # noqa: ARG002
    ) -> ModelProto:
        """Quantize the weights of the named nodes."""
        from onnx import TensorProto
        from onnxruntime.quantization import QuantType, quantize_dynamic

        stacked = self._stacked(model, names)
        # A table has one scale, and a product its own for each channel.
        changed = apart(model, names) if self.per_channel else model
        for per_channel, some in (
            (self.per_channel, [name for name in names if name not in stacked]),
            (False, stacked),
        ):
            if some:  # an empty list would mean all of them
                options = partial(
                    quantize_dynamic,
                    op_types_to_quantize=list(self.kinds),
                    nodes_to_quantize=some,
                    per_channel=per_channel,
                    reduce_range=self.reduce_range,
                    weight_type=QuantType.QInt8,
                )
                changed = through_files(changed, options)
        kinds = (TensorProto.INT8, TensorProto.UINT8)
        integers = {tensor.name for tensor in changed.graph.initializer if tensor.data_type in kinds}
        done = sum(
            node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul")
            or (node.op_type == "Gather" and node.input[0] in integers)
            for node in changed.graph.node
        )
        check_done(done, names, self.name, "INT8")
        return changed


@register("int8_static")
class Int8Static(_Int8):
    """INT8 weights and activations; the ranges of activations are measured on the calibration split.

    BatchNormalization is folded into the convolution before it, first. The result has QuantizeLinear and
    DequantizeLinear around every quantized node (QDQ), which ONNX Runtime fuses when it loads the model. Jacob et al.,
    "Quantization and training of neural networks for efficient integer-arithmetic-only inference" (arXiv 1712.05877);
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html

    Args:
        method: how ranges come from the measured values: their extremes, the 99.999th percentile, or the
            range that loses the least entropy.
        rows: how many rows to use, the first ones of the split; at least 100.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    method: Literal["minmax", "entropy", "percentile"] = "minmax"
    rows: int = Field(default=500, ge=MIN_CALIBRATION_ROWS)

    @property
    def kinds(self) -> tuple[str, ...]:
        """All operators with weights that ONNX Runtime runs fast in INT8."""
        return ("MatMul", "Gemm", "Conv")

    def prepared(self, model: ModelProto) -> ModelProto:
        """A copy optimised offline, in which constants and BatchNormalization after Conv are folded."""
        from onnxruntime.quantization.shape_inference import quant_pre_process

        # ONNX's own inference of shapes follows; the symbolic one fails on networks that compute their masks' shapes.
        prepared = through_files(named_copy(model), partial(quant_pre_process, skip_symbolic_shape=True))
        for node in prepared.graph.node:
            # A product that took in the addition after it keeps its name, so that patterns still find it.
            node.name = node.name.partition("/MatMulAddFusion")[0]
        return named_copy(prepared)

    def chosen(self, model: ModelProto, context: StepContext) -> list[str]:
        """The nodes to quantize.

        Raises:
            StepError: also if the normalization after one of them could not be folded into it.
        """
        names = super().chosen(model, context)
        for node, before in unfolded(model):
            if before.op_type == "Conv" and before.name in names:
                raise StepError(
                    f"int8_static: {node.name} could not be folded into {before.name}, whose output is used elsewhere "
                    "too or whose weights are computed: export the network in evaluation mode, or add "
                    f"{before.name} to nodes_to_exclude"
                )
        return names

    def quantized(
        self, model: ModelProto, names: Sequence[str], context: StepContext, ranges: Path | None = None
    ) -> ModelProto:
        """Measure ranges, unless the file has them, and quantize the named nodes and what lies between them."""
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

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

        weights = {node.name: node.input[1] for node in model.graph.node if len(node.input) > 1}
        one_scale = {
            weights[name]: [
                {"quant_type": QuantType.QInt8, "symmetric": True, "reduce_range": self.reduce_range}
            ]
            for name in self._stacked(model, names)
        }

        def quantize(source: str, target: str) -> None:
            path = ranges or Path(target).with_suffix(".ranges.json")
            if not path.exists():
                _measure_ranges(source, method, rows, path)
            quantize_static(
                source,
                target,
                None,
                quant_format=QuantFormat.QDQ,
                calibrate_method=method,
                per_channel=self.per_channel,
                reduce_range=self.reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=self._left_in_float(model, names),
                calibration_cache_path=path,
                extra_options={"TensorQuantOverrides": one_scale} if one_scale else {},
            )

        changed = through_files(model, quantize)
        dequantized = {
            output
            for node in changed.graph.node
            if node.op_type == "DequantizeLinear"
            for output in node.output
        }
        done = sum(node.name in names and set(node.input[:2]) <= dequantized for node in changed.graph.node)
        check_done(done, names, self.name, "INT8")
        return changed

    def _left_in_float(self, model: ModelProto, names: Sequence[str]) -> list[str]:
        """Nodes that the quantizer must not touch."""
        if self.targets != "*":
            return [node.name for node in model.graph.node if node.name not in names]
        layers = [node for node in weighted(model, self.kinds) if node.name not in names]
        biases = [node.name for layer in layers for node in _bias(model, layer)]
        asked = matching(model, self.nodes_to_exclude, self.name)
        return sorted({*asked, *(layer.name for layer in layers), *biases})


def _bias(model: ModelProto, layer: NodeProto) -> list[NodeProto]:
    """The addition of a bias right after a matrix product; in INT8 it would round a product that is left in float."""
    constants = {tensor.name for tensor in model.graph.initializer}
    users = [node for node in model.graph.node if layer.output[0] in node.input]
    return [node for node in users if node.op_type == "Add" and constants & set(node.input)]


def _measure_ranges(source: str, method: CalibrationMethod, rows: Rows, path: Path) -> None:
    """Run a model on calibration rows and write the ranges of its tensors to a file.

    Batch by batch: histograms would else keep the activations of all rows in memory, and cannot be made at all where
    the last batch is shorter.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        create_calibrator,
        save_tensors_data,
    )

    class Batch(CalibrationDataReader):
        def __init__(self, tensors: Tensors) -> None:
            self.left = [tensors]

        def get_next(self) -> Tensors | None:
            return self.left.pop() if self.left else None

    calibrator = create_calibrator(
        Path(source),
        augmented_model_path=str(path.with_suffix(".augmented.onnx")),
        calibrate_method=method,
        # With the 128 bins of its default, ONNX Runtime's search has one range to choose from: the whole.
        extra_options={"num_bins": _ENTROPY_BINS} if method == CalibrationMethod.Entropy else {},
    )
    for start in range(0, len(rows), _BATCH):
        batch = {name: array[start : start + _BATCH] for name, array in rows.tensors.items()}
        calibrator.collect_data(Batch(batch))
    save_tensors_data(calibrator.compute_data(), path)
