"""The workload contract: what a user brings so that Trimtab can compress, serve and watch their model.

A workload is a folder:

    workload.yaml   settings (see WorkloadSettings)
    workload.py     exactly one subclass of Workload
    model.py        optional torch code; `workload.py` imports it with `from .model import ...`
    data/           whatever `split` reads; only needed offline
    recipes/        optional recipes of the workload's own

Serving uses `encode`, `decode`, `groups` and `collate` only, so those must work without `data/` and without torch.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compression.errors import CompressionError, InvalidOutput, InvalidRecord, WorkloadError, one_of

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

__all__ = [
    "InvalidRecord",
    "Predictions",
    "Progress",
    "Record",
    "ServingSettings",
    "Split",
    "SplitName",
    "Tensors",
    "Workload",
    "WorkloadSettings",
    "load_workload",
    "no_progress",
    "read_settings",
]

SplitName = Literal["train", "calibration", "validation", "test", "production"]
Profile = Literal["safety_critical", "medical", "standard", "ranking", "generative"]
Metric = Literal["accuracy", "balanced_accuracy", "recall"]
Record = Mapping[str, object]
Tensors = dict[str, np.ndarray]
Progress = Callable[[str, float], None]
"""Called with what is being done and the share that is done, 0 to 1."""

NAME_PATTERN = r"^[a-z][a-z0-9-]{0,40}$"


def no_progress(what: str, done: float) -> None:
    """A Progress for callers that show none."""


class ServingSettings(BaseModel):
    """The section `serving` of `workload.yaml`; unknown keys are refused.

    Attributes:
        max_batch: rows of several requests that are run together at most; 1 turns this off.
        max_wait_ms: how long a request may wait for others to be run with, in milliseconds, while the model is under
            load; one that finds the model free never waits.
        cache_ttl_s: how long the answer to an input is kept for the same input, in seconds; 0 keeps none.
        cache_max_bytes: memory of all answers that are kept, in each worker.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_batch: int = Field(default=32, ge=1)
    max_wait_ms: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    cache_ttl_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    cache_max_bytes: int = Field(default=64 << 20, ge=1)


class WorkloadSettings(BaseModel):
    """The contents of `workload.yaml`; unknown keys are refused.

    Attributes:
        name: lower-case letters, digits and hyphens; names the variants in the model store.
        classes: class names in the order of the model's output columns.
        positive: index of the favourable class, for demographic parity.
        metric: what quality means; `balanced_accuracy`, the mean recall of the classes, for imbalanced ones; `recall`,
            that of the classes in `recall_of` alone.
        recall_of: names of classes, for the metric `recall` only.
        sensitive: attributes that `Workload.groups` returns; empty when there are none.
        profile: acceptance profile of the gate (compression/gate.py has the limits).
        max_records: largest number of records in one request.
        bfloat16: networks are trained in bfloat16 where the processor multiplies matrices in it, else in float32;
            weights, and all that is not training, are float32 in any case.
        policy: settings of the guardrails of a rollout; checked where rollouts are made.
        serving: how requests are run together, and whether answers are cached.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    classes: tuple[str, ...] = Field(min_length=2)
    positive: int = 1
    metric: Metric = "accuracy"
    recall_of: tuple[str, ...] = ()
    sensitive: tuple[str, ...] = ()
    profile: Profile = "standard"
    max_records: int = Field(default=256, ge=1)
    bfloat16: bool = False
    policy: Mapping[str, object] = Field(default_factory=dict)
    serving: ServingSettings = ServingSettings()

    @model_validator(mode="after")
    def _consistent(self) -> WorkloadSettings:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must differ from each other")
        if len(set(self.sensitive)) != len(self.sensitive):
            raise ValueError("sensitive attributes must differ from each other")
        if not 0 <= self.positive < len(self.classes):
            raise ValueError(f"positive must be a class index, 0 to {len(self.classes) - 1}")
        if (self.metric == "recall") != bool(self.recall_of):
            raise ValueError(
                "recall_of names the classes that the metric recall is about, and belongs to no other metric"
            )
        unknown = sorted(set(self.recall_of) - set(self.classes))
        if unknown or len(set(self.recall_of)) != len(self.recall_of):
            raise ValueError(f"recall_of must name different classes of {', '.join(self.classes)}")
        return self


@dataclass(frozen=True)
class Split:
    """Labelled rows: raw records as a client would send them, and class indices int64 [N]."""

    records: pd.DataFrame
    labels: np.ndarray

    def __post_init__(self) -> None:
        if len(self.records) != len(self.labels):
            raise WorkloadError(f"a split has {len(self.records)} records but {len(self.labels)} labels")

    def to_records(self) -> list[Record]:
        """The rows as the mappings that `encode` takes, with plain Python values."""
        return cast("list[Record]", self.records.to_dict("records"))


@dataclass(frozen=True)
class Predictions:
    """Decoded answers: class indices int64 [N] and the probability of that class, float64 [N]."""

    classes: np.ndarray
    confidences: np.ndarray


class Workload(ABC):
    """Subclass this in `workload.py`; the settings of `workload.yaml` arrive as attributes."""

    def __init__(self, settings: WorkloadSettings, directory: Path) -> None:
        self.settings = settings
        self.directory = directory
        self.name = settings.name
        self.classes = settings.classes
        self.positive = settings.positive
        self.metric = settings.metric
        self.recall_of = frozenset(map(settings.classes.index, settings.recall_of))
        self.sensitive = settings.sensitive
        self.profile = settings.profile
        self.max_records = settings.max_records
        self.bfloat16 = settings.bfloat16
        self.policy = settings.policy
        self.serving = settings.serving

    # --- needed by serving: fast, no torch, no data -------------------------------------------------------

    @abstractmethod
    def encode(self, records: Sequence[Record]) -> Tensors:
        """Turn raw records into the model's input tensors, first axis = records.

        Raises:
            InvalidRecord: a record lacks a field or holds a value that the model was not made for.
        """

    def decode(self, outputs: Mapping[str, np.ndarray]) -> Predictions:
        """Turn model outputs into predictions; the default reads the first output as logits [N, K].

        The arrays are others' too, and may be read-only: do not work in place.
        """
        logits = np.asarray(next(iter(outputs.values())), dtype=np.float64)
        if logits.ndim != 2 or logits.shape[1] != len(self.classes):
            raise InvalidOutput(
                f"the first output has shape {list(logits.shape)}, not [N, {len(self.classes)}]: "
                "return one logit per class, or override decode() in workload.py"
            )
        classes = logits.argmax(axis=1)
        # Softmax of the winner alone: 1 / sum(exp(logit - winner)).
        confidences = 1.0 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
        return Predictions(classes.astype(np.int64, copy=False), confidences)

    def groups(self, record: Record) -> dict[str, str]:
        """The group of one record per sensitive attribute; the default is the raw value as a string."""
        return {attribute: str(record[attribute]) for attribute in self.sensitive}

    def collate(self, batch: Sequence[Tensors]) -> Tensors:
        """Join the tensors of several requests along the first axis, in the order given.

        The default pads the other axes at their end, to the largest of the requests, with zeros (text with empty
        strings) where their sizes differ. Override it for another padding, such as a tokenizer's pad id. It is called
        from several threads.

        Args:
            batch: at least one request's tensors; all have the same names, dtypes and numbers of axes.
        """
        return {name: _join([tensors[name] for tensors in batch]) for name in batch[0]}

    # --- needed offline -----------------------------------------------------------------------------------

    @abstractmethod
    def split(self, name: SplitName) -> Split:
        """Rows of one part of the data; the parts must not share rows, production is in time order."""

    def full_precision_onnx(self) -> Path | None:
        """The full-precision model as an ONNX file, for a workload that has no torch source."""
        return None

    def network(self) -> nn.Module:
        """A fresh, untrained full-precision torch network.

        `forward` takes the tensors of `encode` by name and returns logits [N, K]. A network of texts or series says in
        its attributes `dynamic_axes` and `padding_mask` which axes have no fixed size and what is padding; see
        `compression.training`.
        """
        raise WorkloadError(f"{self.name} has no torch source: define network() in workload.py")

    def train(self, progress: Progress = no_progress) -> nn.Module:
        """A trained full-precision network; the default fits `network()` on the train split for 5 epochs."""
        from compression.training import fit, seeded

        split = self.split("train")
        with seeded(0):
            model = self.network()
        fit(
            model,
            self.encode(split.to_records()),
            split.labels,
            epochs=5,
            balanced=self.metric != "accuracy",
            bfloat16=self.bfloat16,
            progress=progress,
        )
        return model

    def student(self, width: int) -> nn.Module:
        """An untrained smaller network for distillation, with the inputs and outputs of `network()`."""
        raise WorkloadError(
            f"{self.name} has no student of width {width}: define student(width) in workload.py to distil"
        )

    @property
    def has_torch(self) -> bool:
        """Whether torch-level steps can work on this workload."""
        return type(self).network is not Workload.network


def load_workload(ref: str | Path) -> Workload:
    """Load a workload from a folder, or from `module:attribute` (a Workload or a subclass of it).

    Raises:
        WorkloadError: in one line, what is wrong with the folder, the settings or the code.
    """
    text = str(ref)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return _from_folder(folder.resolve())
    module, separator, attribute = text.partition(":")
    if separator and re.fullmatch(r"[A-Za-z_][\w.]*", module) and attribute.isidentifier():
        return _from_module(module, attribute)
    raise WorkloadError(
        f"no workload folder at {folder}: give a folder with workload.py, or module:attribute"
    )


def read_settings(folder: Path) -> WorkloadSettings:
    """Read and check `workload.yaml` in a folder."""
    path = folder / "workload.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WorkloadError(f"{path} is missing: it gives at least name and classes") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise WorkloadError(f"{path} cannot be read: {_one_line(error)}") from None
    if not isinstance(raw, dict):
        raise WorkloadError(f"{path} must be a mapping with at least name and classes")
    try:
        return WorkloadSettings.model_validate(raw)
    except ValidationError as error:
        raise WorkloadError(f"{path}: {describe(error)}") from None


def describe(error: ValidationError) -> str:
    """Put a pydantic error into one line: `field: what is wrong; field: ...`."""
    parts = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "no such setting"
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts)


def _from_folder(folder: Path) -> Workload:
    settings = read_settings(folder)
    path = folder / "workload.py"
    if not path.is_file():
        raise WorkloadError(f"{path} is missing: it holds one subclass of compression.workload.Workload")
    module = _import_file(path)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Workload) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = one_of([cls.__name__ for cls in found]) or "none"
        raise WorkloadError(f"{path} must define exactly one subclass of Workload; it defines: {names}")
    return _instantiate(found[0], settings, folder)


def _import_file(path: Path) -> ModuleType:
    """Import a workload's file as a package of its own.

    The folder becomes the package's search path, so `from .model import Net` finds the sibling file, sys.path
    stays as it is, and two workloads that both have a model.py do not meet. The name carries a digest of the
    sources, so an edited workload is imported anew while an unchanged one is imported once.
    """
    digest = hashlib.sha256(str(path).encode())
    for source in sorted(path.parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    name = f"trimtab_workload_{digest.hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(path.parent)])
    if spec is None or spec.loader is None:  # pragma: no cover - a .py file always has a loader
        raise WorkloadError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[loaded]
        if isinstance(error, CompressionError) or not isinstance(error, Exception):
            raise
        hint = ""
        if (
            isinstance(error, ModuleNotFoundError)
            and error.name
            and (path.parent / f"{error.name}.py").is_file()
        ):
            hint = f' (import sibling files with "from .{error.name} import ...")'
        raise WorkloadError(f"{path} does not import: {_one_line(error)}{hint}") from error
    return module


def _from_module(module_name: str, attribute: str) -> Workload:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise WorkloadError(f"{module_name} does not import: {_one_line(error)}") from error
    value = getattr(module, attribute, None)
    if isinstance(value, Workload):
        return value
    if isinstance(value, type) and issubclass(value, Workload) and module.__file__:
        folder = Path(module.__file__).resolve().parent
        return _instantiate(value, read_settings(folder), folder)
    raise WorkloadError(f"{module_name}:{attribute} is not a Workload")


def _instantiate(cls: type[Workload], settings: WorkloadSettings, folder: Path) -> Workload:
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise WorkloadError(f"{cls.__name__} in {folder} lacks {one_of(missing)}()")
    return cls(settings, folder)


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) == 1:
        return np.concatenate(parts)
    widest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    joined = np.zeros((sum(map(len, parts)), *widest), np.result_type(*parts))
    if joined.dtype == object:
        joined.fill("")
    end = 0
    for part in parts:
        start, end = end, end + len(part)
        joined[(slice(start, end), *map(slice, part.shape[1:]))] = part
    return joined


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
