"""Weights in four bits, block by block, with ONNX Runtime's MatMulNBits."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import model_validator

from compression.export import quiet
from compression.steps.base import Property, StepContext, register
from compression.steps.onnx_nodes import (
    Quantize,
    apart,
    cannot,
    check_done,
    drop_unused,
    weight_of,
    without_gemm,
)

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_EMBEDDING_OPSET = 21
"""The first version of ONNX with four-bit types, in which quantized embeddings are stored."""


@register("int4_weights")
class Int4Weights(Quantize):
    """Four-bit weights in matrix products, with a scale for each block of inputs; activations stay in float.

    `rtn` rounds to the nearest. `hqq` moves the zero points so that most weights are met better, at the cost of a few
    (Badri and Shaji, "Half-quadratic quantization", https://mobiusml.github.io/hqq_blog/); they are floats then, so the
    file is larger. Neither needs data. The operator, MatMulNBits, is described in
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

    Blocks are filled up, and their scales are floats: weights of few inputs can take more bytes than before. They are
    named in a warning. A table that is multiplied with too is stored once for each use, which the two operators pack in
    different ways.

    Args:
        method: rtn or hqq.
        block_size: weights that share a scale; smaller blocks are nearer to the weights and larger on disk.
        symmetric: zero is in the middle of the range, and is not stored.
        accuracy_level: how ONNX Runtime multiplies; 4 in INT8, 0 and 1 in float. It has no effect on `hqq`, whose
            fractional zero points are multiplied in float.
        embeddings: tables that rows are looked up in are stored in four bits too.
    """

    method: Literal["rtn", "hqq"] = "rtn"
    block_size: Literal[16, 32, 64, 128, 256] = 32
    symmetric: bool = False
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    embeddings: bool = False

    @model_validator(mode="after")
    def _possible(self) -> Int4Weights:
        if self.method == "hqq" and (self.symmetric or self.embeddings):
            raise ValueError(
                "method hqq moves zero points, so it is neither symmetric nor for embeddings; use rtn"
            )
        return self

    @property
    def destroys(self) -> frozenset[Property]:
        """Each block has a grid of its own; with HQQ's fractional zero points no weight is exactly zero any more."""
        lost: frozenset[Property] = super().destroys | {"codebook"}
        return lost | {"sparsity"} if self.method == "hqq" else lost

    @property
    def kinds(self) -> tuple[str, ...]:
        """Gemm has become MatMul by then."""
        return ("MatMul", "Gather") if self.embeddings else ("MatMul",)

    def prepared(self, model: ModelProto) -> ModelProto:
        """A copy with MatMul in place of Gemm, which MatMulNBits' quantizer passes over."""
        import onnx

        opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        if self.embeddings and opset < _EMBEDDING_OPSET:
            # The quantizer would write the newer number over the older one and leave the nodes as they are.
            try:
                model = onnx.version_converter.convert_version(model, _EMBEDDING_OPSET)
            except Exception as error:
                raise cannot(error) from error
        return without_gemm(model)

    def chosen(self, model: ModelProto, context: StepContext) -> list[str]:
        """The nodes to quantize; with warnings about those that grow, and about the speed of `hqq`."""
        names = super().chosen(model, context)
        if grown := self._grown(model, names):
            context.warnings.append(
                f"int4_weights: {', '.join(grown)} would be no larger in float: a smaller block_size may do, else add "
                "them to nodes_to_exclude"
            )
        if self.method == "hqq":
            context.warnings.append(
                "int4_weights: ONNX Runtime multiplies slowly where zero points are fractional, as those of hqq are: "
                "look at the latency, or use rtn"
            )
        return names

    def _grown(self, model: ModelProto, names: Sequence[str]) -> list[str]:
        """Those of the nodes that the file would not be larger without, with the bytes before and after."""
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        users: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                users.setdefault(name, []).append(node)
        grown = []
        for weight in dict.fromkeys(weight_of(node) for node in model.graph.node if node.name in names):
            inside = [node for node in users[weight] if node.name in names]
            tensor = tensors[weight]
            itemsize = 2 if tensor.data_type == tensor.FLOAT16 else 4
            # Weights that a node in float reads as well stay in the file.
            before = int(np.prod(tensor.dims)) * itemsize if len(inside) == len(users[weight]) else 0
            kinds = {node.op_type for node in inside}
            after = sum(self._bytes(tuple(tensor.dims), kind, itemsize) for kind in kinds)
            if after >= before:
                grown += [f"{node.name} ({before} bytes before, {after} after)" for node in inside]
        return grown

    def _bytes(self, shape: tuple[int, ...], kind: str, itemsize: int) -> int:
        """Bytes of weights in four bits with their scales and zero points."""
        # Tables are packed along their rows as they are, matrices along their inputs in whole blocks.
        *others, inputs = shape if kind == "Gather" else (*shape[:-2], shape[-1], shape[-2])
        rows, blocks = int(np.prod(others)), -(-inputs // self.block_size)
        packed = rows * inputs if kind == "Gather" else rows * blocks * self.block_size
        if self.symmetric:
            points = 0
        elif self.method == "hqq":
            points = rows * blocks * itemsize
        else:
            points = -(-rows * blocks // 2) if kind == "Gather" else rows * -(-blocks // 2)
        return -(-packed // 2) + rows * blocks * itemsize + points

    def quantized(
        self,
        model: ModelProto,
        names: Sequence[str],
        context: StepContext,  # noqa: ARG002
        ranges: Path | None = None,  # noqa: ARG002
    ) -> ModelProto:
        """Quantize the weights of the named nodes."""
        model = apart(model, names)
        tools = _tools()
        config = (
            tools.HQQWeightOnlyQuantConfig(block_size=self.block_size, bits=4)
            if self.method == "hqq"
            else tools.DefaultWeightOnlyQuantConfig(
                block_size=self.block_size,
                is_symmetric=self.symmetric,
                accuracy_level=self.accuracy_level,
                op_types_to_quantize=self.kinds,
            )
        )
        others = [node.name for node in model.graph.node if node.name not in names]
        with quiet():
            try:
                quantizer = tools.MatMulNBitsQuantizer(model, nodes_to_exclude=others, algo_config=config)
                quantizer.process()
            except Exception as error:
                raise cannot(error) from error
        changed: ModelProto = quantizer.model.model
        # Nodes that share weights bring them along once each.
        drop_unused(changed)
        done = [
            node for node in changed.graph.node if node.op_type in ("MatMulNBits", "GatherBlockQuantized")
        ]
        check_done(len(done), names, self.name, "INT4")
        return changed


def _tools() -> ModuleType:
    """The quantizer's module, imported without the handler that it would give to everybody's logger."""
    root, guard = logging.getLogger(), logging.NullHandler()
    root.addHandler(guard)
    try:
        return importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    finally:
        root.removeHandler(guard)
