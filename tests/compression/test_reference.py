"""What is kept of the reference rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from compression.data import Data
from compression.reference import bin_column, calibrate, make_reference
from compression.variant import Reference, Variant
from compression.workload import Workload


def test_the_calibration_rises_and_says_how_often_an_answer_is_right() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.5, 1, 20_000)
    right = rng.random(20_000) < confidence**2  # overconfident
    points = calibrate(confidence, right)
    x, y = np.array(points).T
    assert (np.diff(x) > 0).all()
    assert (np.diff(y) >= 0).all()
    assert np.interp([0.6, 0.8, 0.95], x, y) == pytest.approx([0.36, 0.64, 0.9025], abs=0.05)


def test_equal_confidences_make_one_point_and_those_that_are_no_numbers_none() -> None:
    points = calibrate(np.array([0.7, 0.7, 0.7, 0.7, np.nan]), np.array([True, True, True, False, False]))
    assert points == ((0.7, 0.75),)
    assert calibrate(np.array([np.nan]), np.array([True])) == ()


def test_many_numbers_are_put_into_ranges_of_about_as_many_rows() -> None:
    column = bin_column("AGE", pd.Series(np.arange(1000.0)))
    assert column is not None
    assert len(column.edges) == 4
    assert column.shares == pytest.approx([0.2] * 5 + [0.0])


def test_few_numbers_have_a_bin_each_and_missing_ones_the_last() -> None:
    column = bin_column("N", pd.Series([1.0, 1.0, 2.0, 5.0, None]))
    assert column is not None
    assert column.edges == (1.5, 3.5)
    assert column.shares == pytest.approx([0.4, 0.2, 0.2, 0.2])


def test_the_commonest_values_have_a_bin_each_and_all_others_share_one() -> None:
    column = bin_column("JOB", pd.Series(["a"] * 50 + [f"b{i}" for i in range(48)] + [None, None]))
    assert column is not None
    assert column.values[0] == "a"
    assert len(column.values) == 9
    assert column.shares == pytest.approx([0.5] + [0.01] * 8 + [0.4, 0.02])


def test_numbers_that_are_not_finite_count_as_missing() -> None:
    column = bin_column("N", pd.Series([1.0, 2.0, np.inf, -np.inf]))
    assert column is not None
    assert column.edges == (1.5,)
    assert column.shares == pytest.approx([0.25, 0.25, 0.5])


@pytest.mark.parametrize(
    "values",
    [[np.inf, np.inf], [None, None], [3, 3, 3], ["a long text " * 20] * 3, [[1, 2], [3, 4]], [{"a": 1}]],
)
def test_what_cannot_be_binned_is_left_out(values: list[object]) -> None:
    assert bin_column("X", pd.Series(values)) is None


def test_the_summary_has_the_shares_of_labels_and_answers(tiny: Workload, data: Data, full: Variant) -> None:
    _, reference, _ = make_reference(tiny, data, full.onnx_bytes())
    assert isinstance(reference, Reference)
    assert sum(reference.labels) == pytest.approx(1)
    assert sum(reference.answers) == pytest.approx(1)
    assert reference.calibration
    assert reference.runner_up == 1.0  # of two classes the other one is right
    assert all(sum(column.shares) == pytest.approx(1) for column in reference.columns)
