"""What a drop is measured in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.quality import Quality, fraction, quality_of

shares = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8).map(
    lambda values: [value / sum(values) for value in values]
)


def test_accuracy_counts_every_input_alike() -> None:
    quality = quality_of("accuracy", (0.9, 0.1))
    assert quality == Quality()
    assert [quality.outcome(d, 1, "q", 0) for d in (1, -1, 0)] == [1, -1, 0]


@given(shares)
def test_the_weighed_drop_is_the_mean_drop_of_the_classes_recalls(labels: list[float]) -> None:
    quality = quality_of("balanced_accuracy", labels)
    drops = np.linspace(0.0, 0.3, len(labels))  # of each class's recall
    weighed = sum(
        quality.scale * weight * share * drop
        for weight, share, drop in zip(quality.weights, labels, drops, strict=True)
    )
    assert weighed == pytest.approx(drops.mean())
    assert max(quality.weights) == pytest.approx(1)


def test_recall_is_that_of_the_named_classes_alone() -> None:
    quality = quality_of("recall", (0.5, 0.3, 0.2), {2})
    assert quality.weights == (0.0, 0.0, 1.0)
    assert quality.scale == pytest.approx(5)


def test_a_class_without_reference_rows_has_no_weight() -> None:
    assert quality_of("balanced_accuracy", (0.5, 0.5, 0.0)).weights == (1.0, 1.0, 0.0)


@pytest.mark.parametrize(("metric", "labels"), [("balanced_accuracy", ()), ("recall", (1.0, 0.0))])
def test_a_metric_of_classes_that_nobody_has_seen_is_refused(metric: str, labels: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=metric):
        quality_of(metric, labels, {1})


def test_outcomes_are_kept_as_often_as_their_class_weighs_and_the_same_ones_each_time() -> None:
    quality = Quality("balanced_accuracy", (0.2, 1.0), 4.0)
    kept = [quality.outcome(1, 0, f"q{i}", 0) for i in range(20_000)]
    assert np.mean(kept) == pytest.approx(0.2, abs=0.012)
    assert kept == [quality.outcome(1, 0, f"q{i}", 0) for i in range(20_000)]
    assert all(quality.outcome(-1, 1, f"q{i}", 0) == -1 for i in range(100))


def test_the_fractions_of_a_pair_for_different_uses_have_nothing_to_do_with_each_other() -> None:
    one = [fraction("quality", f"q{i}", 0) for i in range(20_000)]
    other = [fraction("odds", f"q{i}", 0) for i in range(20_000)]
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
    assert np.mean(one) == pytest.approx(0.5, abs=0.01)
    assert fraction("odds", "q1", 1) != fraction("odds", "q1", 0)
