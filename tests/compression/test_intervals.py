from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from compression.intervals import mean_of, paired_drop, proportion
from compression.scorecard import Estimate

answers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_proportion_has_scipys_wilson_interval(counts: tuple[int, int]) -> None:
    expected = binomtest(*counts).proportion_ci(method="wilson")
    found = proportion(*counts)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(answers)
def test_a_drop_lies_in_its_interval_and_turns_with_its_sign(pairs: list[tuple[bool, bool]]) -> None:
    right, full = (np.array(column) for column in zip(*pairs, strict=True))
    drop, turned = paired_drop(right, full), paired_drop(full, right)
    assert -1 <= drop.low <= drop.value <= drop.high <= 1
    assert (turned.value, turned.low, turned.high) == pytest.approx((-drop.value, -drop.high, -drop.low))


def test_no_disagreement_still_leaves_some_width() -> None:
    same = np.ones(100, dtype=bool)
    drop = paired_drop(same, same)
    assert drop.value == 0
    assert drop.low < 0 < drop.high < 0.05


def test_the_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        # Lost 6%, won 2%: a true drop of 4 points.
        kind = draw.choice(3, 400, p=[0.06, 0.02, 0.92])
        drop = paired_drop(kind != 0, kind != 1)
        covered += drop.low <= 0.04 <= drop.high
    assert 0.935 < covered / 2000 < 0.97


@given(st.integers(1, 5))
def test_the_mean_of_equal_parts_is_narrower_by_the_root_of_their_number(count: int) -> None:
    part = Estimate(value=0.5, low=0.4, high=0.7)
    mean = mean_of([part] * count)
    assert mean.value == pytest.approx(0.5)
    assert mean.value - mean.low == pytest.approx(0.1 / count**0.5)
    assert mean.high - mean.value == pytest.approx(0.2 / count**0.5)
