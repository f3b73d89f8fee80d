"""The default example: its codebook, its splits, and the recipes that are meant to be refused."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from compression.errors import InvalidRecord
from compression.planner import plan
from compression.recipe import recipes_in
from compression.workload import Record, Workload, load_workload

ROOT = Path(__file__).parents[2] / "examples" / "employment"
RECORD = {
    "AGEP": 41, "SCHL": 21, "MAR": 1, "RELP": 0, "DIS": 2, "ESP": 0, "CIT": 1, "MIG": 1, "MIL": 4, "ANC": 1,
    "NATIVITY": 1, "DEAR": 2, "DEYE": 2, "DREM": 2, "SEX": 2, "RAC1P": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def employment() -> Workload:
    return load_workload(ROOT)


def rows(workload: Workload, name: str) -> set[tuple[object, ...]]:
    frame = workload.split(name).records  # type: ignore[arg-type]
    return set(frame.itertuples(index=False, name=None))


def test_a_record_becomes_indices_and_a_scaled_age(employment: Workload) -> None:
    tensors = employment.encode([RECORD, RECORD | {"SCHL": 1.0, "extra": "ignored"}])
    assert (tensors["codes"].shape, tensors["codes"].dtype) == ((2, 15), "int64")
    assert tensors["age"].tolist() == [[pytest.approx(-0.2)], [pytest.approx(-0.2)]]
    assert tensors["codes"][:, 0].tolist() == [20, 0]
    assert employment.encode([])["codes"].shape == (0, 15)


@pytest.mark.parametrize("field", RECORD)
@pytest.mark.parametrize("value", [True, math.nan, "1", None, -1, 100, 1.5, [1]])
def test_values_outside_the_codebook_are_refused_by_name(
    employment: Workload, field: str, value: object
) -> None:
    with pytest.raises(InvalidRecord) as caught:
        employment.encode([RECORD, RECORD | {field: value}])
    assert (caught.value.index, caught.value.field) == (1, field)
    assert caught.value.allowed


@pytest.mark.parametrize("field", RECORD)
def test_missing_fields_are_refused_by_name(employment: Workload, field: str) -> None:
    record: Record = {name: value for name, value in RECORD.items() if name != field}
    with pytest.raises(InvalidRecord, match=f'"{field}": is missing'):
        employment.encode([record])


@pytest.mark.parametrize(
    ("age", "band"), [(16, "16-24"), (24, "16-24"), (25, "25-44"), (45, "45-64"), (65.0, "65+")]
)
def test_groups_are_codes_and_an_age_band(employment: Workload, age: float, band: str) -> None:
    expected = {"SEX": "2", "RAC1P": "1", "DIS": "2", "NATIVITY": "1", "AGE": band}
    assert employment.groups(RECORD | {"AGEP": age, "SEX": 2.0}) == expected


def test_encoding_one_record_costs_microseconds(employment: Workload) -> None:
    best = math.inf
    for _ in range(50):
        start = time.perf_counter()
        employment.encode([RECORD])
        best = min(best, time.perf_counter() - start)
    assert best < 100e-6


def test_parts_of_a_year_share_no_row_not_even_a_repeated_one(employment: Workload) -> None:
    train, validation, calibration = (
        rows(employment, name) for name in ("train", "validation", "calibration")
    )
    assert not train & validation
    assert not train & calibration
    assert not validation & calibration


def test_no_test_row_is_replayed_within_its_year(employment: Workload) -> None:
    test = employment.split("test")
    production = employment.split("production").records
    of_2016 = 58_043 - len(test.labels)
    replayed = set(production.head(of_2016).itertuples(index=False, name=None))
    assert not rows(employment, "test") & replayed


def test_every_row_is_in_one_part(employment: Workload) -> None:
    names = ("train", "validation", "calibration", "test", "production")
    assert sum(len(employment.split(name).labels) for name in names) == 174_279  # type: ignore[arg-type]


def test_every_row_of_the_data_encodes(employment: Workload) -> None:
    assert employment.encode(employment.split("validation").to_records())["codes"].min() == 0


def test_its_own_recipes_are_plannable(employment: Workload) -> None:
    recipes = recipes_in(ROOT / "recipes")
    assert [recipe.name for recipe in recipes] == ["no-disability", "reckless"]
    for recipe in recipes:
        plan(recipe, employment)
