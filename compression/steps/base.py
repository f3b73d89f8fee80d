"""What a step is, what it declares about itself, and the registry of all steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from compression.data import Data
from compression.errors import RecipeError
from compression.recipe import StepSpec
from compression.workload import Progress, Workload, describe, no_progress

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

Level = Literal["torch", "onnx", "file"]
Need = Literal["training_data", "calibration", "student"]
Property = Literal["float", "shape", "sparsity", "codebook", "grid"]
"""What a model can have: weights in floating point; layer sizes that an earlier step chose; zeroed weights; few
different weights in each layer; a quantization grid."""

PROPERTIES: frozenset[Property] = frozenset({"float", "shape", "sparsity", "codebook", "grid"})


@dataclass
class StepContext:
    """What steps work with besides the model.

    Attributes:
        warnings: what the steps say about doubtful parameters; kept in the manifest.
        calibration_sha256: set by the step that calibrates, to the hash of the rows it used.
        extra: files that a step wants kept with the variant, by name; `sensitivity.json` for example.
    """

    workload: Workload
    data: Data
    seed: int = 0
    progress: Progress = no_progress
    warnings: list[str] = field(default_factory=list)
    calibration_sha256: str | None = None
    extra: dict[str, bytes] = field(default_factory=dict)


class Step(BaseModel, ABC):
    """One technique. The pydantic fields of a subclass are its parameters; unknown ones are refused.

    Class attributes:
        name: how recipes call the step.
        level: `torch` steps take and return a network, `onnx` steps an ONNX model, `file` steps take the bytes of
            the ONNX file and return those of a coded one.
        needs: what the workload must offer beyond the model.
        requires: properties that the model must have when the step starts.
        makes: properties that the step gives the model.
        then: properties that a later step has to make, or this one is for nothing; as a quantization grid after
            training for one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    level: ClassVar[Level]
    needs: ClassVar[frozenset[Need]] = frozenset()
    requires: ClassVar[frozenset[Property]] = frozenset({"float"})
    makes: ClassVar[frozenset[Property]] = frozenset()
    then: ClassVar[frozenset[Property]] = frozenset()

    @property
    def destroys(self) -> frozenset[Property]:
        """Properties of earlier steps that are lost; may depend on the parameters."""
        return frozenset()

    @property
    def preserves(self) -> frozenset[Property]:
        """Properties that survive the step: all that it does not destroy."""
        return PROPERTIES - self.destroys

    @abstractmethod
    def apply(self, model: Any, context: StepContext) -> Any:
        """Return a changed copy of the model; the model itself stays as it is.

        Raises:
            StepError: the step cannot do what its parameters ask for on this model.
        """


class TorchStep(Step):
    """A step on the torch network."""

    level: ClassVar[Level] = "torch"

    @abstractmethod
    def apply(self, model: nn.Module, context: StepContext) -> nn.Module:
        """Return a changed copy of the network."""


class OnnxStep(Step):
    """A step on the ONNX model."""

    level: ClassVar[Level] = "onnx"

    @abstractmethod
    def apply(self, model: ModelProto, context: StepContext) -> ModelProto:
        """Return a changed copy of the ONNX model."""


class FileStep(Step):
    """A step on the finished ONNX file, which comes back byte for byte when the variant is loaded."""

    level: ClassVar[Level] = "file"
    requires: ClassVar[frozenset[Property]] = frozenset()

    @abstractmethod
    def apply(self, model: bytes, context: StepContext) -> bytes:
        """Return the file in the container of `compression.coding`."""


STEPS: dict[str, type[Step]] = {}
"""Every registered step by its name."""

S = TypeVar("S", bound=type[Step])


def register(name: str) -> Callable[[S], S]:
    """Class decorator: make a step known to recipes under a name.

    Raises:
        ValueError: the name is taken.
    """

    def add(cls: S) -> S:
        if name in STEPS:
            raise ValueError(f"a step named {name} is already registered")
        cls.name = name
        STEPS[name] = cls
        return cls

    return add


def build(spec: StepSpec) -> Step:
    """Make the step that a line of a recipe asks for.

    Raises:
        RecipeError: there is no such step, or it does not take these parameters.
    """
    cls = STEPS.get(spec.step)
    if cls is None:
        raise RecipeError(f"no step {spec.step}; there are {', '.join(sorted(STEPS))}")
    try:
        return cls.model_validate(spec.params)
    except ValidationError as error:
        raise RecipeError(f"step {spec.step}: {describe(error)}") from None
