"""The default example: its codebook, its splits, and the recipes that are meant to be refused."""

from __future__ import annotations

import collections
import itertools
import math
import time
from pathlib import Path

import pandas as pd
import pytest

from compression.errors import InvalidRecord
from compression.planner import plan
from compression.recipe import recipes_in
from compression.workload import Record, Workload, load_workload

ROOT = Path(__file__).parents[2] / "examples" / "employment"
DATA = ROOT / "data" / "acs_employment_ma_2015_2017.parquet"
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


def labelled(workload: Workload, name: str) -> list[tuple[object, ...]]:
    split = workload.split(name)  # type: ignore[arg-type]
    return list(split.records.assign(employed=split.labels).itertuples(index=False, name=None))


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


HELD_APART = ("train", "validation", "calibration", "test")


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(HELD_APART, 2)))
def test_splits_share_no_combination_of_features(employment: Workload, one: str, other: str) -> None:
    assert not rows(employment, one) & rows(employment, other)


def test_the_test_split_and_production_share_no_row(employment: Workload) -> None:
    frame = pd.read_parquet(DATA)
    used = collections.Counter(
        frame[frame["year"] > 2015].drop(columns="year").itertuples(index=False, name=None)
    )
    for name in ("test", "production"):
        used.subtract(labelled(employment, name))
    # Every row of 2016 and 2017 is in one of them, once.
    assert not any(used.values())


def test_no_combination_of_the_test_is_replayed_within_its_year(employment: Workload) -> None:
    of_2016 = pd.read_parquet(DATA, columns=["year"])["year"].eq(2016).sum()
    replayed = employment.split("production").records.head(of_2016 - len(employment.split("test").labels))
    assert not rows(employment, "test") & set(replayed.itertuples(index=False, name=None))


def test_production_is_in_time_order(employment: Workload) -> None:
    frame = pd.read_parquet(DATA)
    last = frame[frame["year"] == 2017].drop(columns="year")
    assert labelled(employment, "production")[-len(last) :] == list(last.itertuples(index=False, name=None))


def test_only_rows_of_2015_are_learnt_from(employment: Workload) -> None:
    frame = pd.read_parquet(DATA)
    left = collections.Counter(
        frame[frame["year"] == 2015].drop(columns="year").itertuples(index=False, name=None)
    )
    for name in ("train", "validation", "calibration"):
        left.subtract(labelled(employment, name))
    assert min(left.values()) >= 0
    # What is left over was set aside because its features may be the test's.
    unused = {row[:-1] for row, count in left.items() if count}
    assert unused & rows(employment, "test")
    assert not any(unused & rows(employment, name) for name in ("train", "validation", "calibration"))


def test_every_row_of_the_data_encodes(employment: Workload) -> None:
    assert employment.encode(employment.split("validation").to_records())["codes"].min() == 0


def test_its_own_recipes_are_plannable(employment: Workload) -> None:
    recipes = recipes_in(ROOT / "recipes")
    assert [recipe.name for recipe in recipes] == ["no-disability", "reckless"]
    for recipe in recipes:
        plan(recipe, employment)
