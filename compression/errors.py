"""What can go wrong while compressing; every message is one line that says how to mend it."""

from __future__ import annotations

from collections.abc import Sequence


class CompressionError(Exception):
    """Base class: show `str(error)` to the user, without a traceback."""


class WorkloadError(CompressionError):
    """A workload folder, its `workload.yaml` or its `workload.py` is not usable."""


class InvalidRecord(CompressionError):
    """A record that a client sent does not follow the workload's codebook.

    Attributes:
        index: position of the record in its request, from 0.
        field: name of the offending field.
        problem: what was wrong with the value.
        allowed: what the field may hold.
    """

    def __init__(self, index: int, field: str, problem: str, allowed: str) -> None:
        super().__init__(f'record {index}, field "{field}": {problem}; allowed: {allowed}')
        self.index = index
        self.field = field
        self.problem = problem
        self.allowed = allowed


class InvalidOutput(CompressionError):
    """A model's outputs do not have the shape that the workload decodes."""


class RecipeError(CompressionError):
    """A recipe cannot be read, names an unknown step, or gives a step parameters that it does not take."""


class PlanError(RecipeError):
    """A recipe's steps are in an order that cannot work, or need what the workload does not have."""


class StepError(CompressionError):
    """A step could not do what it was asked to do."""


class ExportError(CompressionError):
    """The ONNX export failed or does not compute what the torch model computes."""


class CodingError(CompressionError):
    """An entropy-coded file is damaged, or of a version that this Trimtab cannot read."""


class VariantNotFound(CompressionError):
    """No variant of that name (and version) is in the model store."""


class VariantCorrupted(CompressionError):
    """A file of a variant is missing or does not match the sha256 in its manifest."""


def one_of(names: Sequence[object]) -> str:
    """Join what is allowed into one readable list: `a, b, c`."""
    return ", ".join(str(name) for name in names)
