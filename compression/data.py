"""A workload's splits, encoded once and shared by every recipe of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from compression.errors import StepError, WorkloadError
from compression.workload import Split, SplitName, Tensors, Workload

if TYPE_CHECKING:
    import pandas as pd

Made = TypeVar("Made")


@dataclass(frozen=True)
class Rows:
    """Encoded rows: raw records, tensors by input name [N, ...], labels int64 [N]."""

    records: pd.DataFrame
    tensors: Tensors
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray | slice) -> Rows:
        """The rows at these positions, in this slice, or where a boolean mask is true."""
        tensors = {name: array[rows] for name, array in self.tensors.items()}
        return Rows(self.records.iloc[np.arange(len(self))[rows]], tensors, self.labels[rows])


class Data:
    """Encodes a split when it is first asked for."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._rows: dict[SplitName, Rows] = {}
        self._groups: dict[SplitName, dict[str, np.ndarray]] = {}
        self._made: dict[Hashable, Any] = {}

    def rows(self, name: SplitName) -> Rows:
        """The encoded rows of a split.

        Raises:
            WorkloadError: the split is empty, or its labels are no class indices.
        """
        if name not in self._rows:
            split = self.workload.split(name)
            labels = np.asarray(split.labels)
            classes = len(self.workload.classes)
            if len(labels) == 0:
                raise WorkloadError(f"the {name} split of {self.workload.name} is empty")
            if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes:
                raise WorkloadError(f"labels of the {name} split must be class indices, 0 to {classes - 1}")
            tensors = self.workload.encode(split.to_records())
            for key, array in tensors.items():
                if len(array) != len(labels):
                    raise WorkloadError(
                        f"encode() made {len(array)} rows of {key} from {len(labels)} records"
                    )
            self._rows[name] = Rows(split.records, tensors, labels.astype(np.int64, copy=False))
        return self._rows[name]

    def groups(self, name: SplitName) -> dict[str, np.ndarray]:
        """Sensitive attribute -> group value per row, as strings [N]."""
        if name not in self._groups:
            rows = self.rows(name)
            records = Split(rows.records, rows.labels).to_records()
            per_record = [self.workload.groups(record) for record in records]
            self._groups[name] = {
                attribute: np.array([groups[attribute] for groups in per_record])
                for attribute in self.workload.sensitive
            }
        return self._groups[name]

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, made for the first that asks for `key`: what all variants need of the same rows."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made


def drop_rows(rows: Rows, unwanted: Mapping[str, Sequence[object]]) -> Rows:
    """Leave out the rows whose raw field holds one of the values: `{"DIS": [1]}`.

    Raises:
        StepError: there is no such field, a value matches no row, or no row is left.
    """
    keep = np.ones(len(rows), dtype=bool)
    for field, values in unwanted.items():
        if field not in rows.records:
            raise StepError(
                f"drop_rows: no field {field}; there are {', '.join(map(str, rows.records.columns))}"
            )
        column = rows.records[field]
        for value in values:
            matches = (column == value).to_numpy()
            if not matches.any():
                raise StepError(f"drop_rows: no row has {field} = {value!r}")
            keep &= ~matches
    if not keep.any():
        raise StepError("drop_rows leaves no row to train on")
    return rows.take(keep)


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 of named arrays: names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        total.update(f"{name} {array.dtype} {array.shape}\n".encode() + np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
