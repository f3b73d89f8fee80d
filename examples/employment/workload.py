"""ACS employment: raw Census codes in, employed or not out; trained on 2015, replayed on 2016 and 2017."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from compression.errors import WorkloadError
from compression.fields import category
from compression.workload import Progress, Record, Split, SplitName, Tensors, Workload, no_progress

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

MIN_AGE, MAX_AGE = 16, 99

# The ACS codes that people of 16 and over in Massachusetts have; the README has their meaning. Fixed here and
# not fitted, so that a served model and a training run can never disagree on them.
CODES: dict[str, tuple[int, ...]] = {
    "SCHL": tuple(range(1, 25)),
    "MAR": tuple(range(1, 6)),
    "RELP": tuple(range(18)),
    "DIS": (1, 2),
    "ESP": tuple(range(9)),
    "CIT": tuple(range(1, 6)),
    "MIG": (1, 2, 3),
    "MIL": tuple(range(5)),
    "ANC": (1, 2, 3, 4),
    "NATIVITY": (1, 2),
    "DEAR": (1, 2),
    "DEYE": (1, 2),
    "DREM": (1, 2),
    "SEX": (1, 2),
    "RAC1P": tuple(range(1, 10)),
}
FIELDS = ("AGEP", *CODES)
CARDINALITIES = tuple(len(codes) for codes in CODES.values())
_TABLES: dict[str, Mapping[int, int]] = {
    field: {code: index for index, code in enumerate(codes)} for field, codes in CODES.items()
}
_AGES: Mapping[int, float] = {age: (age - 45.0) / 20.0 for age in range(MIN_AGE, MAX_AGE + 1)}


class Employment(Workload):
    """16 ACS fields as integers to "not_employed" or "employed"."""

    def encode(self, records: Sequence[Record]) -> Tensors:
        """Records to `codes` int64 [N, 15] (indices) and `age` float32 [N, 1] ((years - 45) / 20)."""
        codes = [
            [category(record, field, index, table) for field, table in _TABLES.items()]
            for index, record in enumerate(records)
        ]
        ages = [category(record, "AGEP", index, _AGES) for index, record in enumerate(records)]
        return {
            "codes": np.array(codes, dtype=np.int64).reshape(len(records), len(_TABLES)),
            "age": np.array(ages, dtype=np.float32).reshape(len(records), 1),
        }

    def groups(self, record: Record) -> dict[str, str]:
        """Sex, race, disability and nativity by their codes, and an age band."""
        age = float(record["AGEP"])  # type: ignore[arg-type]
        band = "16-24" if age < 25 else "25-44" if age < 45 else "45-64" if age < 65 else "65+"
        coded = {name: str(int(record[name])) for name in self.sensitive if name != "AGE"}  # type: ignore[call-overload]
        return coded | {"AGE": band}

    def split(self, name: SplitName) -> Split:
        """Train, validation and calibration are of 2015, test is of 2016, and no two of them share a combination.

        Parts 0 to 24 belong to the test split: their rows of 2015 are left unused, so that a row of the test
        was not trained on as another person of the year before. Production is what remains of 2016, then all
        of 2017; there, what was seen before comes back as often as it does in life.
        """
        frame = self._frame
        year, part = frame["year"].to_numpy(), self._parts
        chosen = {
            "train": (year == 2015) & (part >= 42),
            "validation": (year == 2015) & (part >= 25) & (part < 38),
            "calibration": (year == 2015) & (part >= 38) & (part < 42),
            "test": (year == 2016) & (part < 25),
            "production": ((year == 2016) & (part >= 25)) | (year == 2017),
        }[name]
        rows = frame[chosen].sort_values("year", kind="stable").reset_index(drop=True)
        return Split(rows[list(FIELDS)], rows["employed"].to_numpy(np.int64))

    def network(self) -> nn.Module:
        """Embeddings of 8 for the coded columns, then 512-512-2."""
        from .model import EmploymentNet

        return EmploymentNet(CARDINALITIES, 512, dropout=0.3)

    def student(self, width: int) -> nn.Module:
        """The same network with hidden layers of another width."""
        from .model import EmploymentNet

        return EmploymentNet(CARDINALITIES, width)

    def train(self, progress: Progress = no_progress) -> nn.Module:
        """About 10 seconds on two cores. Rates and dropout were chosen on the validation split."""
        from compression.training import fit, seeded

        split = self.split("train")
        with seeded(0):
            model = self.network()
        tensors = self.encode(split.to_records())
        fit(model, tensors, split.labels, epochs=6, lr=3e-3, weight_decay=1e-2, progress=progress)
        return model

    @cached_property
    def _frame(self) -> pd.DataFrame:
        import pandas as pd

        path = self.directory / "data" / "acs_employment_ma_2015_2017.parquet"
        try:
            return pd.read_parquet(path)
        except FileNotFoundError:
            raise WorkloadError(f"{path} is missing: it comes with the example, copy it back") from None

    @cached_property
    def _parts(self) -> np.ndarray:
        """0 to 99 for every row, from a hash of its features alone, whatever its year.

        36% of the rows repeat another row. All copies of a combination of features fall into the same part,
        so that splits of different parts share none.
        """
        rows = np.ascontiguousarray(self._frame[list(FIELDS)].to_numpy(np.uint8))
        digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
        return np.array([int.from_bytes(digest, "big") % 100 for digest in digests])
