"""Thresholds are proven: chosen ones lose more than they may at most once in twenty, exact counts say so too."""

from __future__ import annotations

from collections.abc import Callable
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln, xlogy
from scipy.stats import binom

from compression.cascade import MAX_DROPS, THRESHOLDS, choose, log_evidence
from compression.workload import Metric

ENOUGH = 20.0
METRICS: tuple[Metric, ...] = ("accuracy", "balanced_accuracy")


@st.composite
def answered(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Two models' answers to some rows, from nearly always right to nearly always wrong."""
    rows = draw(st.integers(2, 4000))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    wrong, full_wrong = draw(st.floats(0, 0.3)), draw(st.floats(0, 0.3))
    confidences = random.uniform(0.5, 1, rows)
    confidences[random.random(rows) < draw(st.sampled_from([0, 0.1]))] = np.nan
    return {
        "right": random.random(rows) >= wrong,
        "full_right": random.random(rows) >= full_wrong,
        "confidences": confidences,
        "labels": random.integers(0, 3, rows),
    }


@given(answered(), st.sampled_from(METRICS))
@settings(max_examples=60, deadline=None)
def test_a_larger_loss_never_asks_for_a_higher_threshold(rows: dict[str, np.ndarray], metric: Metric) -> None:
    chosen = choose(metric, **rows)
    assert list(chosen) == list(MAX_DROPS)
    found = [2.0 if threshold is None else threshold for threshold in chosen.values()]
    assert found == sorted(found, reverse=True)
    assert set(found) - {2.0} <= set(THRESHOLDS)


@given(answered(), st.sampled_from(METRICS))
@settings(max_examples=30, deadline=None)
def test_no_loss_at_all_is_never_proven(rows: dict[str, np.ndarray], metric: Metric) -> None:
    assert choose(metric, **rows)[0.0] is None


@given(answered(), st.sampled_from(METRICS), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_the_order_of_the_rows_does_not_matter(
    rows: dict[str, np.ndarray], metric: Metric, seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(rows["labels"]))
    assert choose(metric, **{name: array[order] for name, array in rows.items()}) == choose(metric, **rows)


@pytest.mark.parametrize(("rows", "expected"), [(148, None), (165, 0.0)])
def test_where_nothing_is_lost_it_takes_few_more_rows_than_an_exact_binomial_limit(
    rows: int, expected: float | None
) -> None:
    # 0.98 ** 149 is the first power of 0.98 that is below 5%, so no valid method could do with fewer rows.
    right = np.ones(rows, dtype=bool)
    found = choose("accuracy", right, right, np.full(rows, 0.9), np.zeros(rows, dtype=int), [0.02])
    assert found == {0.02: expected}


def test_losses_among_unsure_answers_go_to_full_precision() -> None:
    confidences = np.linspace(0.5, 1, 4000)
    right = confidences > 0.7
    every = np.ones(4000, dtype=bool)
    found = choose("accuracy", right, every, confidences, np.zeros(4000, dtype=int))
    assert found[0.005] is not None
    assert 0.69 < found[0.005] < 0.71
    assert found[0.02] is not None
    assert found[0.02] < found[0.005]


def test_losses_among_the_surest_answers_leave_no_threshold() -> None:
    confidences = np.linspace(0.5, 1, 4000).round(1)  # 400 rows at 1.0
    right = confidences < 1
    found = choose("accuracy", right, np.ones(4000, dtype=bool), confidences, np.zeros(4000, dtype=int))
    assert set(found.values()) == {None}


def test_the_walk_stops_at_the_first_loss_whatever_is_won_below() -> None:
    confidences = np.repeat([0.99, 0.6], 2000)
    right = np.ones(4000, dtype=bool)
    full_right = right.copy()
    right[:400], full_right[2000:3500] = False, False
    found = choose("accuracy", right, full_right, confidences, np.zeros(4000, dtype=int))
    assert set(found.values()) == {None}


def test_a_threshold_keeps_the_answers_that_are_exactly_as_sure() -> None:
    loses = float(THRESHOLDS[1700])
    confidences = np.repeat([0.9999, loses, 0.5], 2000)
    right = confidences != loses
    found = choose("accuracy", right, np.ones(6000, dtype=bool), confidences, np.zeros(6000, dtype=int))
    assert found[0.01] == THRESHOLDS[1699]


def test_a_loss_in_a_rare_class_counts_where_the_metric_is_balanced_accuracy() -> None:
    labels = (np.arange(20_000) % 50 == 0).astype(int)
    confidences = np.full(20_000, 0.9)
    right = (labels == 0) | (np.arange(20_000) % 500 != 0)  # a tenth of the rare class is lost
    every = np.ones(20_000, dtype=bool)
    assert choose("accuracy", right, every, confidences, labels)[0.005] == 0.0
    assert choose("balanced_accuracy", right, every, confidences, labels)[0.02] is None


@pytest.mark.parametrize("metric", METRICS)
def test_a_row_without_a_confidence_is_never_kept(metric: Metric) -> None:
    labels = np.arange(3000) % 2
    every, right = np.ones(3000, dtype=bool), np.arange(3000) < 2000
    assert choose(metric, right, every, np.where(right, 0.9, np.nan), labels)[0.01] == 0.0
    assert choose(metric, right, every, np.full(3000, 0.9), labels)[0.01] is None
    assert choose(metric, every, every, np.full(3000, np.nan), labels)[0.01] is None


@given(
    rows=st.integers(1, 150),
    max_drop=st.floats(0.001, 0.5),
    more=st.floats(0, 0.3),
    won=st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_one_threshold_is_wrongly_proven_at_most_once_in_twenty_by_exact_count(
    rows: int, max_drop: float, more: float, won: float
) -> None:
    drop = min(max_drop + more, 1.0)  # at least what may be lost: whatever is proven is false
    p_won = won * (1 - drop) / 2
    p_lost = p_won + drop
    every = np.stack([array.ravel() for array in np.meshgrid(np.arange(rows + 1), np.arange(rows + 1))])
    lost_count, won_count = every[:, every.sum(axis=0) <= rows]
    counts = (lost_count, won_count, rows - lost_count - won_count)
    chances_of_one = (p_lost, p_won, max(0.0, 1 - p_lost - p_won))
    logs = gammaln(rows + 1) - sum(gammaln(count + 1) for count in counts)
    logs += sum(xlogy(count, chance) for count, chance in zip(counts, chances_of_one, strict=True))
    chances = np.exp(logs)
    assert chances.sum() == pytest.approx(1)
    evidence = log_evidence(lost_count[np.newaxis], won_count[np.newaxis], np.array([rows]), max_drop)
    assert chances[evidence >= np.log(ENOUGH)].sum() <= 1 / ENOUGH


@given(sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)), drops=st.tuples(*[st.floats(0.01, 0.9)] * 2))
@settings(max_examples=150, deadline=None)
def test_strata_that_are_not_alike_are_wrongly_proven_at_most_once_in_twenty_by_exact_count(
    sizes: tuple[int, int], drops: tuple[float, float]
) -> None:
    lost = np.stack([array.ravel() for array in np.meshgrid(*(np.arange(size + 1) for size in sizes))])
    chances = np.prod(
        [
            [comb(size, int(count)) * drop**count * (1 - drop) ** (size - count) for count in counts]
            for counts, size, drop in zip(lost, sizes, drops, strict=True)
        ],
        axis=0,
    )
    assert chances.sum() == pytest.approx(1)
    evidence = log_evidence(lost, np.zeros_like(lost), np.array(sizes), sum(drops) / 2)
    assert chances[evidence >= np.log(ENOUGH)].sum() <= 1 / ENOUGH


# The whole walk, on rows whose truth is known ---------------------------------------------------------------

DRAWS, ROWS, MAX_DROP = 400, 2000, 0.01
_LOST, _WON = {0: 0.08, 1: 0.16}, {0: 0.03, 1: 0.04}
_RARE = 0.2
Chooser = Callable[..., dict[float, float | None]]


def drawn(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows of which the unsure ones are lost more often than won, a rare class most of all."""
    labels = (random.random(ROWS) < _RARE).astype(int)
    sure = random.random(ROWS)
    chance = random.random(ROWS)
    lost = chance < np.where(labels == 1, _LOST[1], _LOST[0]) * (1 - sure)
    won = 1 - chance < np.where(labels == 1, _WON[1], _WON[0]) * (1 - sure)
    return {"right": ~lost, "full_right": ~won, "confidences": 0.5 + sure / 2, "labels": labels}


def true_drop(metric: Metric, threshold: float | None) -> float:
    """What keeping the answers above a threshold loses, from the probabilities that `drawn` draws by."""
    if threshold is None:
        return 0.0
    above = max(0.0, 2 * threshold - 1)
    kept = (1 - above) ** 2 / 2  # the integral of 1 - sure
    of_class = [(_LOST[label] - _WON[label]) * kept for label in (0, 1)]
    share = _RARE if metric == "accuracy" else 0.5
    return (1 - share) * of_class[0] + share * of_class[1]


def by_estimate(
    metric: Metric,
    right: np.ndarray,
    full_right: np.ndarray,
    confidences: np.ndarray,
    labels: np.ndarray,
    max_drops: list[float],
) -> dict[float, float | None]:
    """What one would do without statistics: the lowest threshold whose measured drop is small enough."""
    (max_drop,) = max_drops
    loss = full_right.astype(int) - right
    weight = 1 / len(labels) if metric == "accuracy" else 0.5 / np.bincount(labels)[labels]
    losses = loss * weight
    fits = [t for t in np.linspace(0.5, 1, 201) if losses[confidences >= t].sum() <= max_drop]
    return {max_drop: min(fits, default=None)}


def times_exceeded(chooser: Chooser, metric: Metric) -> int:
    random = np.random.default_rng(0)
    found = (chooser(metric, **drawn(random), max_drops=[MAX_DROP])[MAX_DROP] for _ in range(DRAWS))
    return sum(true_drop(metric, threshold) > MAX_DROP for threshold in found)


AT_MOST = int(binom.ppf(0.975, DRAWS, 0.05))
"""Of DRAWS that each fail with probability 5%, so many may."""


@pytest.mark.parametrize("metric", METRICS)
def test_a_chosen_threshold_loses_more_than_it_may_at_most_once_in_twenty(metric: Metric) -> None:
    assert times_exceeded(choose, metric) <= AT_MOST


@pytest.mark.parametrize("metric", METRICS)
def test_choosing_by_the_measured_drop_fails_the_same_test(metric: Metric) -> None:
    assert times_exceeded(by_estimate, metric) > 3 * AT_MOST


@pytest.mark.parametrize("metric", METRICS)
def test_a_proof_leaves_most_of_the_saving(metric: Metric) -> None:
    random = np.random.default_rng(1)
    found = [choose(metric, **drawn(random), max_drops=[MAX_DROP])[MAX_DROP] for _ in range(20)]
    best = next(t for t in np.linspace(0.5, 1, 5001) if true_drop(metric, t) <= MAX_DROP)
    assert all(threshold is not None and threshold < best + 0.25 for threshold in found)
