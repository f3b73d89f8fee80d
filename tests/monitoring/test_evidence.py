"""The evidence is what it claims to be: exact properties, no simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from monitoring.evidence import (
    BETS,
    BOLD,
    LOG_CAPITAL,
    agreement_evidence,
    bet_grid,
    drop_evidence,
    excess_evidence,
    gap_evidence,
    log_factors,
    mismatch_evidence,
    more_needed,
    moved_evidence,
    no_drop_evidence,
    share_bounds,
    shares_evidence,
)

margins = st.floats(0.001, 0.5)
small_counts = st.lists(st.integers(0, 500), min_size=4, max_size=4)
GAMES = [
    ((-1.0, 0.0, 1.0), -1.0, 1.0),  # paired outcomes
    ((0.0, 1.0), 0.0, 1.0),  # single events
    ((0.0, 0.03, 0.4, 1.0), 0.0, 1.0),  # shares of blocks
    ((-2.0, -1.0, 0.0, 1.0, 2.0), -2.0, 2.0),  # matched rows of two groups
]


@given(st.sampled_from(GAMES), margins, st.booleans(), st.lists(st.floats(0.001, 1), min_size=5, max_size=5))
def test_no_bet_gains_on_average_where_its_hypothesis_is_true(
    game: tuple, mean: float, above: bool, weights: list[float]
) -> None:
    values, low, high = np.array(game[0]), game[1], game[2]
    p = np.array(weights[: len(values)])
    p /= p.sum()
    # Mix in the far end until the mean is where the hypothesis just holds.
    end = low if above else high
    excess = (p @ values - mean) if above else (mean - p @ values)
    if excess > 0:
        share = excess / (excess + abs(mean - end))
        p = p * (1 - share)
        p[np.argmin(np.abs(values - end))] += share
    factors = np.exp(log_factors(game[0], mean, low, high, above))
    assert (factors > 0).all()
    assert (factors @ p <= 1 + 1e-12).all()


@given(margins)
def test_bets_stay_within_what_keeps_the_capital_positive(margin: float) -> None:
    bets = bet_grid(1 / (1 + margin))
    assert len(bets) == 24
    assert bets[0] == pytest.approx(0.01 / (1 + margin))
    assert bets[-1] == pytest.approx(0.98 / (1 + margin))


@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=60), margins)
def test_evidence_is_the_capital_of_all_bets_in_whatever_order(d: list[int], margin: float) -> None:
    capital = np.ones(24)
    for outcome in d:
        capital = capital * (1 + bet_grid(1 / (1 + margin)) * (outcome - margin))
    counts = [d.count(1), d.count(-1), d.count(0), 0]
    assert_allclose(
        float(drop_evidence(counts, margin)), math.log(capital @ np.exp(LOG_CAPITAL)), rtol=1e-9, atol=1e-9
    )


@given(small_counts, small_counts, margins)
def test_merged_counts_give_the_product_bet_by_bet_and_never_depend_on_how_they_were_split(
    a: list[int], b: list[int], margin: float
) -> None:
    table = log_factors((1.0, -1.0, 0.0, -1.0), margin, -1.0, 1.0, True)
    apart = table @ np.array(a) + table @ np.array(b)
    together = table @ (np.array(a) + np.array(b))
    assert_allclose(apart, together, rtol=1e-9, atol=1e-9)


def test_nothing_counted_is_no_evidence() -> None:
    assert drop_evidence([0, 0, 0, 0], 0.02) == pytest.approx(0, abs=1e-12)
    assert excess_evidence({}, 0.05) == 0
    assert gap_evidence([0, 0, 0, 0, 0, 0], 0.05, 0.1) == pytest.approx(0)


@given(small_counts, st.integers(1, 50), margins)
def test_what_is_missing_never_makes_a_case_stronger_than_knowing_it(
    counts: list[int], unknown: int, margin: float
) -> None:
    missing = np.array(counts) + np.array([0, 0, 0, unknown])
    for place in range(3):
        known = np.array(counts)
        known[place] += unknown
        assert drop_evidence(missing, margin) <= drop_evidence(known, margin) + 1e-9
        assert no_drop_evidence(missing, margin) <= no_drop_evidence(known, margin) + 1e-9


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300), margins)
def test_few_disagreements_never_prove_more_than_their_labels_would(
    worse: int, better: int, same: int, margin: float
) -> None:
    # Taking every disagreement as a loss is the worst that labels could say.
    certificate = agreement_evidence([worse + better, same, 0], margin)
    assert certificate <= no_drop_evidence([worse, better, same, 0], margin) + 1e-9


@given(st.lists(st.integers(0, 200), min_size=5, max_size=5), st.floats(-0.9, 0.9))
def test_gap_evidence_is_the_same_when_groups_change_sides(z: list[int], gap: float) -> None:
    if gap != 0:
        assert gap_evidence([*z, 3], 0.05, gap) == pytest.approx(gap_evidence([*z[::-1], 3], 0.05, -gap))


def test_a_gap_that_closes_is_no_harm_and_one_that_opens_is() -> None:
    away, towards = [0, 0, 700, 300, 0, 0], [0, 300, 700, 0, 0, 0]
    assert gap_evidence(away, 0.05, gap=0.4) > 20
    assert gap_evidence(towards, 0.05, gap=0.4) < 0


def test_a_gap_that_passes_zero_and_comes_out_on_the_other_side_is_harm() -> None:
    assert gap_evidence([0, 400, 600, 0, 0, 0], 0.05, gap=0.06) > 20


def test_a_gap_may_have_been_larger_than_measured_when_it_passes_zero() -> None:
    closes = [0, 400, 600, 0, 0, 0]
    assert gap_evidence(closes, 0.05, gap=0.06, uncertainty=0.05) < gap_evidence(closes, 0.05, gap=0.06)
    assert gap_evidence(closes, 0.05, gap=0.06, uncertainty=0.12) < 0


def test_a_movement_in_either_direction_is_found() -> None:
    away = [0, 0, 700, 300, 0, 0]
    assert moved_evidence(away, 0.05, 0.05) > 20
    assert moved_evidence(away, 0.05, 0.05) == pytest.approx(
        moved_evidence([0, 300, 700, 0, 0, 0], 0.05, 0.05)
    )
    assert moved_evidence([0, 20, 700, 20, 0, 0], 0.05, 0.05) < 0


@given(
    st.lists(st.integers(0, 200), min_size=5, max_size=5),
    st.integers(1, 50),
    st.floats(-0.9, 0.9),
    st.integers(0, 4),
)
def test_a_missing_z_never_makes_a_gap_look_wider_than_knowing_it(
    z: list[int], unknown: int, gap: float, place: int
) -> None:
    known = list(z)
    known[place] += unknown
    assert gap_evidence([*z, unknown], 0.05, gap) <= gap_evidence([*known, 0], 0.05, gap) + 1e-9
    assert moved_evidence([*z, unknown], 0.05, 0.05) <= moved_evidence([*known, 0], 0.05, 0.05) + 1e-9


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_evidence_of_a_mismatch_is_1_on_average_whatever_the_number_of_requests(share: float) -> None:
    for n in (1, 2, 40):
        chances = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
        values = [math.exp(mismatch_evidence(k, n - k, share)) for k in range(n + 1)]
        assert math.fsum(p * value for p, value in zip(chances, values, strict=True)) == pytest.approx(1)


def test_a_mismatch_is_found_on_either_side_and_a_match_is_not() -> None:
    limit = math.log(1e4)
    assert mismatch_evidence(5_300, 4_700, 0.5) > limit
    assert mismatch_evidence(4_700, 5_300, 0.5) > limit
    assert mismatch_evidence(5_000, 5_000, 0.5) < 0
    assert mismatch_evidence(0, 0, 0.5) == 0


def test_more_needed_names_about_the_number_of_pairs_that_suffices() -> None:
    counts, limit = np.array([6.0, 5.0, 289.0, 0.0]), math.log(40)
    more = more_needed(lambda n: float(no_drop_evidence(n, 0.02)), counts, limit)
    assert more is not None
    assert more > 0
    assert no_drop_evidence(counts * (1 + more / 300), 0.02) >= limit
    assert no_drop_evidence(counts * (1 + 0.9 * more / 300), 0.02) < limit


def test_more_needed_is_none_where_no_number_would_do() -> None:
    counts = [40.0, 5.0, 955.0, 0.0]
    assert more_needed(lambda n: float(no_drop_evidence(n, 0.02)), counts, math.log(40)) is None


@pytest.mark.parametrize("n", [10**7, 10**9])
def test_evidence_is_finite_after_any_number_of_pairs(n: int) -> None:
    assert np.isfinite(drop_evidence([n // 20, n // 50, n, 0], 0.02))
    assert np.isfinite(no_drop_evidence([n // 50, n // 50, n, n // 1000], 0.02))


def test_the_bets_share_the_capital_without_rest_and_most_is_on_the_bold_ones() -> None:
    capital = np.exp(LOG_CAPITAL)
    assert capital.shape == (BETS,)
    assert capital.sum() == pytest.approx(1)
    assert capital[bet_grid(1.0) >= BOLD].sum() == pytest.approx(0.85)


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_one_look_at_a_share_within_its_ends_pays_at_most_1_on_average(
    one: float, other: float, where: float
) -> None:
    low, high = min(one, other), max(one, other)
    p = low + where * (high - low)
    ends = [low, 1 - high], [high, 1 - low]
    paid = [math.exp(shares_evidence(counts, 0, *ends)) for counts in ([1, 0], [0, 1])]
    assert p * paid[0] + (1 - p) * paid[1] <= 1 + 1e-9


def test_an_end_that_a_share_cannot_pass_is_not_bet_on() -> None:
    assert shares_evidence([0, 100], 0, [0.0, 0.0], [1.0, 1.0]) == 0.0
    assert shares_evidence([0, 100], 0, [0.2, 0.0], [1.0, 0.8]) > 5


@pytest.mark.parametrize("p", [0.0, 0.003, 0.05, 0.3, 0.5])
@pytest.mark.parametrize("rows", [20, 300])
def test_reference_rows_leave_their_bounds_no_more_often_than_the_risk(p: float, rows: int) -> None:
    """Exact: the chance of every number of hits is added up."""
    outside = 0.0
    for hits in range(rows + 1):
        low, high = share_bounds((hits / rows,), rows, 0.01)
        if not low[0] - 1e-9 <= p <= high[0] + 1e-9:
            outside += math.comb(rows, hits) * p**hits * (1 - p) ** (rows - hits)
    assert outside <= 2 * 0.01


def test_more_rows_narrow_the_bounds_around_the_share() -> None:
    few, many = (share_bounds((0.2, 0.8), rows, 0.001) for rows in (50, 5000))
    assert few[0][0] < many[0][0] < 0.2 < many[1][0] < few[1][0]
    assert share_bounds((0.2,), 0, 0.001)[1][0] > 0.99
