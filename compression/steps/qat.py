"""Quantization-aware training: the weights learn to live with the rounding that a later step does for good."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compression.errors import StepError
from compression.export import dynamic_shapes, free_axes, quiet
from compression.folding import fold_batch_norms
from compression.steps.base import Property, StepContext, register
from compression.steps.patterns import select
from compression.steps.train import Training, zero_masks

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import Graph, GraphModule, Node

    Grid = Callable[[Tensor], Tensor]
    """Rounds a weight, channels first, to the grid that it will have; gradients pass straight through."""

_LEVELS = 255
_SMOOTHING = 0.05
"""Share of a new batch in the moving average of an activation's range."""

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_PRODUCTS = frozenset({"linear", "matmul"})
_QUANTIZED = (
    _CONVOLUTIONS
    | _PRODUCTS
    | {"add", "mul", "relu", "clamp", "hardtanh", "relu6", "leaky_relu", "sigmoid", "softmax", "cat", "where"}
    | {"avg_pool2d", "adaptive_avg_pool2d", "batch_norm", "layer_norm", "instance_norm", "embedding", "bmm"}
)
"""Operators whose inputs and outputs ONNX Runtime's static quantization puts on a grid."""
_REMOVED = frozenset({"relu", "relu6", "clamp", "hardtanh"})
"""Activations that become part of the layer before them, whose own output has no grid then."""
_SAME_GRID = frozenset(
    {
        "flatten",
        "view",
        "reshape",
        "_unsafe_view",
        "permute",
        "transpose",
        "t",
        "squeeze",
        "unsqueeze",
        "dropout",
    }
    | {
        "feature_dropout",
        "contiguous",
        "clone",
        "detach",
        "max_pool1d",
        "max_pool2d",
        "slice",
        "select",
        "identity",
    }
)
"""Operators that only move values about: what comes out is on the grid of what went in."""


@register("qat")
class QuantizationAwareTraining(Training):
    """Train with the rounding of the quantizing step that must follow: put `int8_static`, `int8_dynamic` or
    `int4_weights` after it.

    Forward passes see weights and activations on the grids that ONNX Runtime will use; gradients pass the rounding as
    if it were not there (straight-through). Jacob et al., "Quantization and training of neural networks for efficient
    integer-arithmetic-only inference" (arXiv 1712.05877), section 3; Krishnamoorthi, arXiv 1806.08342, section 2.4.

    With 8 bits, weights are symmetric, and activations are affine uint8 per tensor, by moving averages of their least
    and largest values. The places are those of `int8_static`, found in the graph that torch exports: inputs and outputs
    of layers, of additions and the like; after an activation function where one follows. Batch norms right after a
    layer are folded into it first. With 4 bits the grids are those of `int4_weights`: blocks of the inputs of matrix
    products, activations in float.

    The result is a float network with the weights that were learned. It can be trained on, pruned or clustered, and the
    following step writes the graph that ONNX Runtime fuses. The other way, PyTorch 2 export quantization, gives
    a network with quantizers inside that can do neither, and whose export ONNX Runtime fuses in part only.

    Args:
        bits: of the weights.
        per_channel: 8 bits: a scale per output channel; per tensor otherwise. As in the step that follows.
        reduce_range: 8 bits: 7-bit weights. As in the step that follows.
        block_size: 4 bits: weights that share a scale. As in the step that follows.
        symmetric: 4 bits: zero is in the middle of the range. As in the step that follows.
        targets: shell-style pattern of the weights of linear and convolution layers, for example `mlp.*`. If given,
            only inputs and outputs of these layers are rounded, as by the `targets` of the steps that follow.
        epochs: passes over the train split.
        lr: peak learning rate; a tenth of what the network was trained with, or less, is usual.
    """

    then: ClassVar[frozenset[Property]] = frozenset({"grid"})
    """Properties that a later step has to make, or else this one was for nothing."""

    bits: Literal[4, 8] = 8
    per_channel: bool = True
    reduce_range: bool = False
    block_size: Literal[16, 32, 64, 128, 256] = 32
    symmetric: bool = False
    targets: str = "*"
    epochs: int = Field(default=3, ge=1, le=1000)
    lr: float = Field(default=5e-4, gt=0)

    @model_validator(mode="after")
    def _fitting(self) -> QuantizationAwareTraining:
        if self.bits == 4 and (self.reduce_range or not self.per_channel):
            raise ValueError(
                "per_channel and reduce_range are for 8 bits; 4 bits have a scale for each block_size"
            )
        if self.bits == 8 and (self.symmetric or self.block_size != 32):
            raise ValueError(
                "block_size and symmetric are for 4 bits; 8 bits are symmetric, per_channel or per tensor"
            )
        return self

    @property
    def destroys(self) -> frozenset[Property]:
        """Every weight goes its own way; zeros stay."""
        return frozenset({"codebook"})

    def apply(self, model: nn.Module, context: StepContext) -> nn.Module:
        """Return a trained copy, in float and with its batch norms folded."""
        import torch

        rows = context.data.rows("train").take(slice(0, 32))
        result = copy.deepcopy(model)
        fold_batch_norms(result, {name: torch.from_numpy(array) for name, array in rows.tensors.items()})
        # Two rows: torch.export would specialise a batch of one.
        example = {name: torch.from_numpy(array[:2].copy()) for name, array in rows.tensors.items()}
        graph = traced(copy.deepcopy(result), example)
        self._put_grids(graph, context)
        self.train(graph, context, zero_masks(graph))
        learned = graph.state_dict()
        # Of weights under two names the graph knows one.
        result.load_state_dict(
            {name: learned[name] for name in result.state_dict() if name in learned}, strict=False
        )
        return result.eval()

    def _put_grids(self, graph: GraphModule, context: StepContext) -> None:
        able = dict(weighted(graph.graph, _PRODUCTS | (_CONVOLUTIONS if self.bits == 8 else frozenset())))
        names = select([str(weight.target) for weight in able.values()], self.targets)
        chosen = {layer: weight for layer, weight in able.items() if str(weight.target) in names}
        if not chosen:
            kind = (
                "linear or convolution layer" if self.bits == 8 else "linear layer, and 4 bits are for those"
            )
            there = ", ".join(str(weight.target) for weight in able.values()) or f"no {kind}"
            raise StepError(f"qat: targets {self.targets!r} matches nothing; the network has {there}")
        left = [str(weight.target) for _, weight in weighted(graph.graph, _CONVOLUTIONS)]
        if self.bits == 4 and left:
            context.warnings.append(
                f"qat: 4 bits are for matrix products; trained in float: {', '.join(left)}"
            )
        if self.bits == 8:
            quantize_activations(graph, None if self.targets == "*" else set(chosen))
        quantize_weights(graph, chosen, self._grid())

    def _grid(self) -> Grid:
        if self.bits == 4:
            return partial(in_blocks, size=self.block_size, symmetric=self.symmetric)
        return partial(in_int8, per_channel=self.per_channel, reduce_range=self.reduce_range)


def in_int8(weight: Tensor, *, per_channel: bool = True, reduce_range: bool = False) -> Tensor:
    """A weight float32 [N, ...] rounded to symmetric INT8 as ONNX Runtime does, with straight-through gradients.

    Args:
        per_channel: a scale for each of the N; one for all otherwise.
        reduce_range: to -64 to 64 in place of -127 to 127.
    """
    import torch

    most = 64 if reduce_range else 127
    flat = weight.detach().flatten(1) if per_channel else weight.detach().reshape(1, -1)
    scale = (
        (flat.abs().amax(1) / most).clamp(min=torch.finfo(torch.float32).eps).expand(len(weight)).contiguous()
    )
    zero = torch.zeros(len(weight), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -most, most)


def in_blocks(weight: Tensor, *, size: int = 32, symmetric: bool = False) -> Tensor:
    """A weight float32 [N, K] rounded to four bits as `int4_weights` (rtn) does, with straight-through gradients.

    Args:
        size: inputs, of the K, that share a scale.
        symmetric: no zero point; the value of largest magnitude in a block is met exactly.
    """
    import torch
    from torch.nn import functional

    outputs, inputs = weight.shape
    blocks = functional.pad(weight, (0, -inputs % size)).reshape(-1, size)
    tiny = torch.finfo(torch.float32).eps
    with torch.no_grad():
        low, high = blocks.amin(1).clamp(max=0), blocks.amax(1).clamp(min=0)
        if symmetric:
            # The range is -8 to 7, and the end that is met exactly is -8: turn the blocks whose largest is positive.
            turn = torch.where(high > -low, -1.0, 1.0)[:, None]
            scale = (torch.maximum(high, -low) / 8).clamp(min=tiny)
            zero = torch.zeros(len(blocks), dtype=torch.int32)
        else:
            scale = ((high - low) / 15).clamp(min=tiny)
            zero = (-low / scale).round().clamp(0, 15).int()
    if symmetric:
        rounded = turn * torch.fake_quantize_per_channel_affine(turn * blocks, scale, zero, 0, -8, 7)
    else:
        rounded = torch.fake_quantize_per_channel_affine(blocks, scale, zero, 0, 0, 15)
    return rounded.reshape(outputs, -1)[:, :inputs]


def traced(model: nn.Module, example: dict[str, Tensor]) -> GraphModule:
    """The network as torch exports it, in training mode; parameters keep their names.

    Args:
        example: inputs of two rows, by the name that `forward` has for them.

    Raises:
        StepError: torch cannot export it.
    """
    import torch

    # What the network says about its inputs, see compression.training.
    about = {name: getattr(model, name) for name in ("dynamic_axes", "padding_mask") if hasattr(model, name)}
    shapes = dynamic_shapes(free_axes(model, example))
    with quiet():
        try:
            program = torch.export.export(model.train(), (), kwargs=example, dynamic_shapes=shapes)
        except Exception as error:  # the exporter's errors share no base class
            first = str(error).strip().partition("\n")[0]
            raise StepError(
                f"qat: torch cannot export the network in training mode ({first}): leave data-dependent branches out "
                "of forward(), or quantize without qat"
            ) from error
        exported = program.module(check_guards=False)
        # An exported module refuses train() and eval(); the graph itself is a network like any other.
        graph = torch.fx.GraphModule(exported, exported.graph)
    for name, value in about.items():
        setattr(graph, name, value)
    return graph


def quantize_weights(graph: GraphModule, layers: dict[Node, Node], grid: Grid) -> None:
    """Put a grid between weights and the layers that use them, in place.

    Args:
        layers: node of a layer -> node of its weight.
    """
    for number, (layer, weight) in enumerate(layers.items()):
        # The operator x @ weight has its outputs in the last axis.
        turned = _kind(layer) == "matmul"
        _insert_after(
            graph, weight, _module(_turned(grid) if turned else grid), f"weight_grid_{number}", [layer]
        )
    graph.recompile()


def quantize_activations(graph: GraphModule, layers: set[Node] | None = None) -> None:
    """Put grids on activations where ONNX Runtime's static quantization does, in place.

    Args:
        layers: only inputs and outputs of these nodes; None for all that can be quantized.
    """
    found: dict[Node, None] = {}
    for node in list(graph.graph.nodes):
        if _kind(node) not in _QUANTIZED or (layers is not None and node not in layers):
            continue
        for tensor in (*node.all_input_nodes, node):
            place = _origin(tensor)
            if place.op != "get_attr" and _is_float(place):
                found[place] = None
    for node in graph.graph.nodes:
        if layers is None and _kind(node) in _REMOVED and node in found:
            before = node.all_input_nodes[0]
            if len(before.users) == 1 and before.op == "call_function":
                found.pop(before, None)
    for number, node in enumerate(found):
        _insert_after(graph, node, _range(), f"activation_grid_{number}", list(node.users))
    graph.recompile()


def weighted(graph: Graph, kinds: frozenset[str] = _PRODUCTS | _CONVOLUTIONS) -> Iterator[tuple[Node, Node]]:
    """Layers and the parameters that they multiply with."""
    from torch import fx

    for node in graph.nodes:
        weight = node.args[1] if _kind(node) in kinds else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.meta["val"].dim() >= 2:
            yield node, weight


def _kind(node: Node) -> str:
    """The operator's name without overload and in-place mark; empty for what is none."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__.removesuffix("_") if packet is not None else ""


def _origin(node: Node) -> Node:
    while _kind(node) in _SAME_GRID and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_float(node: Node) -> bool:
    from torch import Tensor

    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _insert_after(graph: GraphModule, node: Node, module: nn.Module, name: str, users: list[Node]) -> None:
    while hasattr(graph, name):
        name += "_"
    graph.add_submodule(name, module)
    # Placeholders stay together at the start of a graph.
    last = node
    while node.op == "placeholder" and last.next.op == "placeholder":
        last = last.next
    with graph.graph.inserting_after(last):
        made = graph.graph.call_module(name, (node,))
    for user in users:
        user.replace_input_with(node, made)


def _turned(grid: Grid) -> Grid:
    return lambda weight: grid(weight.transpose(0, -1)).transpose(0, -1)


def _module(function: Grid) -> nn.Module:
    from torch import nn

    class Function(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return function(weight)

    return Function()


def _range() -> nn.Module:
    """Rounds to uint8 by a moving average of the range, as section 3.1 of Jacob et al. has it."""
    import torch
    from torch import nn

    class Range(nn.Module):
        low: Tensor
        high: Tensor

        def __init__(self) -> None:
            super().__init__()
            for name in ("low", "high"):
                self.register_buffer(name, torch.tensor(torch.nan))

        def forward(self, values: Any) -> Tensor:
            values = values.float()  # under autocast they can be of another type
            if self.training:
                with torch.no_grad():
                    # Zero is always met exactly: it is what padding adds and what ReLU leaves.
                    low, high = values.min().clamp(max=0), values.max().clamp(min=0)
                    self.low.copy_(torch.where(self.low.isnan(), low, self.low.lerp(low, _SMOOTHING)))
                    self.high.copy_(torch.where(self.high.isnan(), high, self.high.lerp(high, _SMOOTHING)))
            scale = ((self.high - self.low) / _LEVELS).clamp(min=torch.finfo(torch.float32).eps)
            zero = (-self.low / scale).round().clamp(0, _LEVELS).int()
            rounded: Tensor = torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, _LEVELS)
            return rounded

    return Range()
