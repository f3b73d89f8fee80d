"""What full precision and its inputs looked like."""

from __future__ import annotations

import dataclasses
import math

import pytest

from monitoring.baseline import Baseline, ColumnSpec, baseline_of

AGE = ColumnSpec("AGE", (30.0, 50.0), (), (0.3, 0.4, 0.3, 0.0))
JOB = ColumnSpec("JOB", (), ("cook", "clerk"), (0.5, 0.2, 0.2, 0.1))


@pytest.mark.parametrize(
    ("column", "value", "place"),
    [
        *((AGE, 29, 0), (AGE, 30, 1), (AGE, 49.5, 1), (AGE, 1e9, 2)),
        *(
            (AGE, None, 3),
            (AGE, math.nan, 3),
            (AGE, math.inf, 3),
            (AGE, -math.inf, 3),
            (AGE, "old", 3),
            (AGE, True, 3),
            (AGE, [1], 3),
        ),
        *((JOB, "cook", 0), (JOB, "clerk", 1), (JOB, "pilot", 2), (JOB, None, 3)),
    ],
)
def test_a_value_has_one_bin(column: ColumnSpec, value: object, place: int) -> None:
    assert column.bin_of(value) == place


def test_a_confidence_between_two_points_is_on_the_line_and_beyond_the_last_one_stays() -> None:
    baseline = Baseline(calibration=((0.5, 0.4), (0.9, 0.8), (0.95, 0.8)))
    assert baseline.p_right(0.7) == pytest.approx(0.6)
    assert baseline.p_right(0.92) == pytest.approx(0.8)
    assert (baseline.p_right(0.1), baseline.p_right(1.0)) == (0.4, 0.8)


def test_a_baseline_is_read_as_it_was_written() -> None:
    baseline = Baseline(400, (0.5, 0.5), (0.6, 0.4), ((0.5, 0.5), (1.0, 0.9)), 0.7, (AGE, JOB))
    assert baseline_of(dataclasses.asdict(baseline)) == baseline


def test_a_reference_of_an_earlier_version_says_nothing_of_what_it_lacks() -> None:
    assert baseline_of({"rows": 100, "groups": {}}) == Baseline(rows=100)
    assert baseline_of(None) == Baseline()
