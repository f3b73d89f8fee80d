"""The space that a workload comes with: the techniques that can work on it, and what each may be given."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from compression.errors import RecipeError
from compression.planner import plan
from compression.recipe import StepSpec
from compression.search.space import TRIAL, Choices, Draw, Parameter, Range, Space
from compression.variant import Variant
from compression.workload import Workload

MAX_LAYERS = 16
"""Networks with more layers than this get one ratio, and one number of float layers, for all of them."""
NONE = "none"
_FINE_TUNED = "int8_static.qat"


@dataclass(frozen=True)
class WorkloadSpace(Space):
    """A family of techniques on the network, a quantization after it, and entropy coding or not.

    Static INT8 may have quantization-aware training before it, where there is a torch network.

    Attributes:
        layers: linear and convolution layers of the full-precision network, empty where there are too many to choose
            for one by one; `nodes` the nodes of the ONNX graph that can be quantized.
        depth: how many such nodes there are.
    """

    layers: Sequence[str] = ()
    nodes: Sequence[str] = ()
    depth: int = 0

    def specs(self, draw: Draw) -> list[StepSpec]:
        """The steps for a family, a quantization and their parameters."""
        family, quantize = draw("family"), draw("quantize")
        steps = [*self._family(family, draw), *self._shared(family, quantize, draw)]
        steps += self._quantized(family, quantize, draw)
        if draw("entropy_code"):
            steps.append(_spec("entropy_code"))
        return steps

    def starts(self) -> list[dict[str, JsonValue]]:
        """Every quantization alone, static INT8 after training for it, then every family alone and with static INT8."""
        families = [name for name in _choices(self, "family") if name != NONE]
        quantizations = [name for name in _choices(self, "quantize") if name != NONE]
        static = [name for name in quantizations if name == "int8_static"]
        pairs = [(NONE, name) for name in quantizations if name != "mixed"]
        pairs += [(family, name) for family in families for name in (NONE, *static)]
        found: list[dict[str, JsonValue]] = [{"family": family, "quantize": name} for family, name in pairs]
        if static and _FINE_TUNED in self.parameters:
            trained: dict[str, JsonValue] = {"family": NONE, "quantize": "int8_static", _FINE_TUNED: True}
            found.insert(len(pairs) - len(families) * (1 + len(static)), trained)
        return found

    def _family(self, family: str, draw: Draw) -> list[StepSpec]:
        if family == "structured":
            cut = list(self._structured(draw))
        elif family == "low_rank":
            cut = list(self._low_rank(draw))
        elif family == "sparse":
            cut = list(self._sparse(draw))
        elif family == "distilled":
            names = ("width", "epochs", "temperature", "alpha")
            return [_spec("distill", **{name: draw(f"distilled.{name}") for name in names})]
        else:
            return []
        return [*cut, _spec("finetune", epochs=draw(f"{family}.epochs"))] if cut else []

    def _structured(self, draw: Draw) -> Iterator[StepSpec]:
        # The last layer is the output, as a rule; a network of one layer has no hidden ones.
        if len(self.layers) < 2 or not draw("structured.per_layer"):
            yield _spec("prune_structured", amount=draw("structured.amount"))
            return
        for layer in self.layers[:-1]:
            amount = draw(f"structured.amount.{layer}")
            if amount > 0:
                yield _spec("prune_structured", amount=amount, targets=glob.escape(layer))

    def _low_rank(self, draw: Draw) -> Iterator[StepSpec]:
        if not self.layers or not draw("low_rank.per_layer"):
            yield _spec("low_rank", size=draw("low_rank.size"))
            return
        for layer in self.layers:
            size = draw(f"low_rank.size.{layer}")
            if size < 1:
                yield _spec("low_rank", size=size, targets=glob.escape(layer))

    def _sparse(self, draw: Draw) -> Iterator[StepSpec]:
        if not self.layers or not draw("sparse.per_layer"):
            yield _spec("prune_magnitude", amount=draw("sparse.amount"))
            return
        for layer in self.layers:
            amount = draw(f"sparse.amount.{layer}")
            if amount > 0:
                yield _spec("prune_magnitude", amount=amount, targets=glob.escape(f"{layer}.weight"))

    def _shared(self, family: str, quantize: str, draw: Draw) -> list[StepSpec]:
        # Quantization would undo the codebooks.
        if family != "sparse" or quantize != NONE or not draw("sparse.shared"):
            return []
        return [_spec("cluster_weights", clusters=draw("sparse.clusters"), init="density")]

    def _quantized(self, family: str, quantize: str, draw: Draw) -> list[StepSpec]:
        if quantize == NONE:
            return []
        if quantize != "mixed":
            params = self._params(quantize, draw)
            trained = quantize == "int8_static" and _FINE_TUNED in self.parameters and draw(_FINE_TUNED)
            # Weights are trained for the grid that they get.
            before = (
                [_spec("qat", per_channel=params["per_channel"], epochs=draw("int8_static.qat_epochs"))]
                if trained
                else []
            )
            return [*before, _spec(quantize, **params)]
        step = draw("mixed.step")
        params = self._params(step, draw)
        # The other families have layers of their own, whose names nobody knows before.
        if self.nodes and family not in ("low_rank", "distilled"):
            floats: list[JsonValue] = [
                glob.escape(node) for node in self.nodes if draw(f"mixed.float.{node}")
            ]
            if len(floats) == len(self.nodes):
                return []
            return [_spec(step, **(params | {"nodes_to_exclude": floats} if floats else params))]
        layers = draw("mixed.float_layers")
        return [
            _spec("mixed_precision", step=step, params=params, float_layers=layers, keep_ends=False)
            if layers
            else _spec(step, **params)
        ]

    @staticmethod
    def _params(step: str, draw: Draw) -> dict[str, JsonValue]:
        names = {
            "int8_dynamic": ("per_channel",),
            "int8_static": ("per_channel", "method"),
            "int4_weights": ("block_size", "symmetric"),
        }[step]
        return {name: draw(f"{step}.{name}") for name in names}


def workload_space(workload: Workload, full: Variant) -> WorkloadSpace:
    """All families and quantizations that can work on a workload.

    Layer by layer there are shares of neurons to remove, of weights to zero and of weights to keep in low-rank factors,
    and whether the layer is quantized; a network of more than MAX_LAYERS layers has one share for all.
    """
    import onnx

    from compression.full import load_network
    from compression.steps.onnx_nodes import named_copy, weighted
    from compression.steps.prune import weight_names

    graph = named_copy(onnx.load_model_from_string(full.onnx_bytes()))
    nodes = [node.name for node in weighted(graph, ("MatMul", "Gemm", "Conv"))]
    layers: list[str] = []
    widths: Range | None = None
    if workload.has_torch:
        network = load_network(workload, full)
        layers = [name.removesuffix("weight").removesuffix(".") for name in weight_names(network)]
        layers = layers if "" not in layers and len(layers) <= MAX_LAYERS else []
        widths = _widths(workload, sum(parameter.numel() for parameter in network.parameters()))
    named = nodes if len(nodes) <= MAX_LAYERS else []
    yes_no = Choices(choices=(False, True))
    shares = Range(low=0.1, high=0.9, step=0.05)
    parameters: dict[str, Parameter] = {
        "entropy_code": yes_no,
        "structured.amount": shares,
        "structured.epochs": Range(low=1, high=4),
        "low_rank.size": shares,
        "low_rank.epochs": Range(low=1, high=4),
        "sparse.amount": Range(low=0.3, high=0.95, step=0.05),
        "sparse.epochs": Range(low=1, high=4),
        "sparse.shared": yes_no,
        "sparse.clusters": Range(low=8, high=256, log=True),
        "int8_dynamic.per_channel": yes_no,
        "int8_static.per_channel": yes_no,
        "int8_static.method": Choices(choices=("minmax", "entropy", "percentile")),
        "int4_weights.block_size": Choices(choices=(16, 32, 64, 128)),
        "int4_weights.symmetric": yes_no,
        "mixed.step": Choices(choices=("int8_static", "int8_dynamic", "int4_weights")),
    }
    if workload.has_torch:
        parameters |= {_FINE_TUNED: yes_no, "int8_static.qat_epochs": Range(low=1, high=4)}
    if layers:
        parameters |= {f"{family}.per_layer": yes_no for family in ("structured", "low_rank", "sparse")}
        # 1 and 0 leave a layer as it is.
        parameters |= {f"low_rank.size.{layer}": Range(low=0.1, high=1.0, step=0.1) for layer in layers}
        parameters |= {
            f"structured.amount.{layer}": Range(low=0.0, high=0.9, step=0.1) for layer in layers[:-1]
        }
        parameters |= {f"sparse.amount.{layer}": Range(low=0.0, high=0.9, step=0.1) for layer in layers}
    parameters |= {
        # Without a student the family is left out below.
        "distilled.width": widths or Range(low=8, high=16),
        "distilled.epochs": Range(low=4, high=12),
        "distilled.temperature": Range(low=1.5, high=6.0, step=0.5),
        "distilled.alpha": Range(low=0.1, high=0.9, step=0.1),
    }
    parameters |= {f"mixed.float.{node}": yes_no for node in named}
    if len(nodes) > 1:
        parameters["mixed.float_layers"] = Range(low=0, high=len(nodes) - 1)
    offered: dict[str, list[str]] = {
        "family": [NONE, "structured", "low_rank", "distilled", "sparse"],
        "quantize": [NONE, "int8_dynamic", "int8_static", "int4_weights", "mixed"],
    }
    everything = WorkloadSpace(parameters, 0, {}, layers, named, len(nodes))
    left_out: dict[str, str] = {}
    if len(nodes) < 2:
        offered["quantize"].remove("mixed")
        left_out["mixed"] = (
            f"the model has {len(nodes)} layers that can be quantized: there is nothing to mix"
        )
    if workload.has_torch and widths is None:
        offered["family"].remove("distilled")
        left_out["distilled"] = "no student is smaller than the network: define student(width) in workload.py"
    for slot, names in offered.items():
        for name in names[1:]:
            reason = _cannot(everything, {slot: name}, workload)
            if reason:
                names.remove(name)
                left_out[name] = reason
    choices = {slot: Choices(choices=tuple(names)) for slot, names in offered.items()}
    return WorkloadSpace(choices | _needed(parameters, offered), 0, left_out, layers, named, len(nodes))


def _cannot(space: WorkloadSpace, fixed: Mapping[str, str], workload: Workload) -> str | None:
    """Why a family or a quantization cannot work, if it cannot."""
    given: dict[str, Any] = {"family": NONE, "quantize": NONE} | dict(fixed)
    try:
        plan(space.recipe(lambda name: given.get(name) or space.parameters[name].ends()[0]), workload)
    except RecipeError as error:
        return str(error).removeprefix(f"recipe {TRIAL}, ")
    return None


def _needed(
    parameters: Mapping[str, Parameter], offered: Mapping[str, Sequence[str]]
) -> dict[str, Parameter]:
    """The parameters of what is offered."""
    owners = {name for names in offered.values() for name in names} | {"entropy_code"}
    if "mixed" in owners:
        owners |= {"int8_static", "int8_dynamic", "int4_weights"}
    return {name: parameter for name, parameter in parameters.items() if name.partition(".")[0] in owners}


def _widths(workload: Workload, parameters: int) -> Range | None:
    """Widths of students with fewer parameters than the network; doubled until they have no fewer."""
    able: list[int] = []
    for power in range(2, 13):
        try:
            student = workload.student(2**power)
        except Exception:  # noqa: BLE001 - users' code may take no such width, or none at all
            if able:
                break
            continue
        if sum(parameter.numel() for parameter in student.parameters()) >= parameters:
            break
        able.append(2**power)
    return Range(low=able[0], high=able[-1], log=True) if len(able) > 1 else None


def _spec(step: str, /, **params: JsonValue) -> StepSpec:
    return StepSpec(step=step, params=params)


def _choices(space: Space, name: str) -> list[Any]:
    parameter = space.parameters[name]
    return list(parameter.choices) if isinstance(parameter, Choices) else []
