"""Fairness figures: against values counted by hand, against fairlearn, and where they cannot be had."""

import warnings
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from monitoring.fairness import Fairness, FairnessColumns, FairnessError, assess

YES = FairnessColumns(positive="yes")


def group(name: str, *, hits: int, misses: int, false_alarms: int, passes: int) -> pd.DataFrame:
    """Rows of one group by what the candidate did; full precision is always right."""
    label = ["yes"] * (hits + misses) + ["no"] * (false_alarms + passes)
    prediction = ["yes"] * hits + ["no"] * misses + ["yes"] * false_alarms + ["no"] * passes
    return pd.DataFrame({"label": label, "prediction": prediction, "prediction_full": label, "group_G": name})


@pytest.fixture
def by_hand() -> pd.DataFrame:
    a = group("a", hits=45, misses=5, false_alarms=10, passes=40)
    b = group("b", hits=12, misses=8, false_alarms=6, passes=14)
    return pd.concat([a, b], ignore_index=True)


def random_rows(n: int, seed: int = 0, *, harmed: float = 0.0, drop: float = 0.02) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    member = rng.choice(["a", "b", "c"], n, p=[0.6, 0.3, 0.1])
    label = rng.random(n) < np.where(member == "a", 0.5, 0.35)
    full = label ^ (rng.random(n) < 0.15)
    candidate = full ^ (rng.random(n) < drop + harmed * (member == "c"))

    def name(flags: np.ndarray) -> np.ndarray:
        return np.where(flags, "yes", "no")

    return pd.DataFrame(
        {
            "label": name(label),
            "prediction": name(candidate),
            "prediction_full": name(full),
            "group_G": member,
        }
    )


def test_figures_are_those_counted_by_hand(by_hand: pd.DataFrame) -> None:
    found = assess(by_hand, "group_G", YES)
    assert found.values["accuracy_gap"] == pytest.approx(85 / 100 - 26 / 40)
    assert found.values["worst_group_accuracy"] == pytest.approx(26 / 40)
    assert found.values["demographic_parity_difference"] == pytest.approx(55 / 100 - 18 / 40)
    true_positive, false_positive = 45 / 50 - 12 / 20, 6 / 20 - 10 / 50
    assert found.values["equalized_odds_difference"] == pytest.approx(max(true_positive, false_positive))
    assert found.values["worst_group_drop"] == pytest.approx(14 / 40)
    assert found.worst_group == "b"
    assert found.full["accuracy_gap"] == 0
    assert found.full["demographic_parity_difference"] == 0


def test_figures_are_fairlearns() -> None:
    from fairlearn.metrics import (
        MetricFrame,
        demographic_parity_difference,
        equalized_odds_difference,
    )
    from sklearn.metrics import accuracy_score

    rows = random_rows(2000, harmed=0.1)
    found = assess(rows, "group_G", YES)
    y, p, g = rows["label"] == "yes", rows["prediction"] == "yes", rows["group_G"]
    frame = MetricFrame(metrics=accuracy_score, y_true=y, y_pred=p, sensitive_features=g)
    parity = demographic_parity_difference(y, p, sensitive_features=g)
    odds = equalized_odds_difference(y, p, sensitive_features=g)
    assert found.values["demographic_parity_difference"] == pytest.approx(parity)
    assert found.values["equalized_odds_difference"] == pytest.approx(odds)
    assert found.values["accuracy_gap"] == pytest.approx(frame.difference())
    assert found.values["worst_group_accuracy"] == pytest.approx(frame.group_min())
    assert {f.group: f.accuracy for f in found.groups} == pytest.approx(frame.by_group.to_dict())


def test_small_groups_are_left_out_and_counted(by_hand: pd.DataFrame) -> None:
    tiny = group("tiny", hits=0, misses=7, false_alarms=0, passes=0)
    found = assess(pd.concat([by_hand, tiny], ignore_index=True), "group_G", YES)
    assert found.left_out == {"tiny": 7}
    assert {f.group for f in found.groups} == {"a", "b"}
    assert found.values["worst_group_accuracy"] == pytest.approx(26 / 40)


def test_without_labels_only_demographic_parity_is_left(by_hand: pd.DataFrame) -> None:
    found = assess(by_hand.assign(label=None), "group_G", YES)
    assert set(found.values) == {"demographic_parity_difference"}
    assert found.unavailable["accuracy_gap"] == "no row has a label yet"
    assert found.unavailable["worst_group_drop"] == "no row has a label yet"


def test_without_full_precision_there_is_no_drop_but_the_rest(by_hand: pd.DataFrame) -> None:
    found = assess(by_hand.drop(columns="prediction_full"), "group_G", YES)
    assert "full precision" in found.unavailable["worst_group_drop"]
    assert found.values["accuracy_gap"] == pytest.approx(0.2)
    assert found.full == {}


def test_a_missing_column_is_named(by_hand: pd.DataFrame) -> None:
    with pytest.raises(FairnessError, match="no column 'group_SEX'"):
        assess(by_hand, "group_SEX", YES)


def test_a_single_group_cannot_be_compared(by_hand: pd.DataFrame) -> None:
    with pytest.raises(FairnessError, match=r"at least two groups .* found: a \(140\)"):
        assess(by_hand.assign(group_G="a"), "group_G", YES)


def test_a_class_that_never_occurs_leaves_equalized_odds_out(by_hand: pd.DataFrame) -> None:
    found = assess(by_hand.assign(label="no"), "group_G", YES)
    assert "either outcome" in found.unavailable["equalized_odds_difference"]
    assert "accuracy_gap" in found.values


def test_other_classes_count_as_not_favourable() -> None:
    rows = pd.DataFrame(
        {
            "label": ["x", "y", "z"] * 40,
            "prediction": ["x", "y", "y"] * 40,
            "group_G": ["a"] * 60 + ["b"] * 60,
        }
    )
    found = assess(rows, "group_G", FairnessColumns(positive="y"))
    assert [f.positive_rate for f in found.groups] == pytest.approx([2 / 3, 2 / 3])
    assert found.values["worst_group_accuracy"] == pytest.approx(2 / 3)


def test_the_allowance_for_chance_covers_a_candidate_that_harms_nobody() -> None:
    beyond = 0
    for seed in range(12):
        found = assess(random_rows(600, seed), "group_G", YES, bootstraps=100)
        beyond += found.values["worst_group_drop"] > 0.02 + found.chance["worst_group_drop"]
        for name in ("accuracy_gap", "demographic_parity_difference"):
            beyond += found.values[name] > found.full[name] + found.chance[name] + 0.02
    assert beyond <= 2


def test_a_harmed_group_is_named_before_the_noise_of_a_smaller_one() -> None:
    rows = random_rows(4000, harmed=0.3)
    rng = np.random.default_rng(1)
    tiny = rows.sample(32, random_state=2).assign(group_G="tiny")
    tiny["prediction"] = np.where(rng.random(32) < 0.5, "yes", "no")
    found = assess(pd.concat([rows, tiny], ignore_index=True), "group_G", YES, bootstraps=200)
    assert found.worst_group == "c"


def test_chance_is_the_same_every_time() -> None:
    rows = random_rows(500)
    first, second = (assess(rows, "group_G", YES, bootstraps=50) for _ in range(2))
    assert first.chance == second.chance


# The Evidently metrics -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metrics() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Evidently's own imports
        from monitoring import evidently_metrics
    return evidently_metrics


def run(
    items: list[object], current: pd.DataFrame, reference: pd.DataFrame | None = None
) -> dict[str, object]:
    from evidently import DataDefinition, Dataset, Report

    definition = DataDefinition(categorical_columns=["prediction"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = Dataset.from_pandas(current, data_definition=definition)
        theirs = None if reference is None else Dataset.from_pandas(reference, data_definition=definition)
        return Report(items).run(ours, theirs).dict()


def test_every_evidently_metric_says_what_assess_says(metrics: ModuleType, by_hand: pd.DataFrame) -> None:
    found: Fairness = assess(by_hand, "group_G", YES)
    items = [m(column="group_G", positive="yes") for m in metrics.FAIRNESS_METRICS.values()]
    values = [m["value"] for m in run(items, by_hand)["metrics"]]
    assert values == pytest.approx([found.values[name] for name in metrics.FAIRNESS_METRICS])


def test_evidentlys_own_tests_pass_and_fail_on_them(metrics: ModuleType, by_hand: pd.DataFrame) -> None:
    from evidently.tests import lte

    items = [
        metrics.AccuracyGap(column="group_G", positive="yes", tests=[lte(0.1)]),
        metrics.DemographicParityDifference(column="group_G", positive="yes", tests=[lte(0.1001)]),
    ]
    tests = run(items, by_hand)["tests"]
    assert [t["status"].value for t in tests] == ["FAIL", "SUCCESS"]


def test_a_figure_can_be_held_against_the_reference_rows(metrics: ModuleType, by_hand: pd.DataFrame) -> None:
    from evidently.tests import Reference, lte

    def gap(tolerance: float) -> object:
        tests = [lte(Reference(absolute=tolerance))]
        return metrics.AccuracyGap(column="group_G", positive="yes", tests=tests)

    reference = by_hand.assign(prediction=by_hand["prediction_full"])
    tests = run([gap(0.1), gap(0.3)], by_hand, reference)["tests"]
    assert [t["status"].value for t in tests] == ["FAIL", "SUCCESS"]


def test_a_harmed_group_fails_its_test_by_name(metrics: ModuleType, by_hand: pd.DataFrame) -> None:
    drop = metrics.GroupAccuracyDrop(
        column="group_G", positive="yes", group="b", tests=[metrics.at_most(0.05, "accuracy drop of G=b")]
    )
    (test,) = run([drop], by_hand)["tests"]
    assert test["status"].value == "FAIL"
    assert test["name"].startswith("G=b: accuracy drop")
    assert test["description"].startswith("accuracy drop of G=b: Actual value 0.350")


def test_a_warning_is_not_a_failure(metrics: ModuleType, by_hand: pd.DataFrame) -> None:
    gap = metrics.AccuracyGap(
        column="group_G", positive="yes", tests=[metrics.at_most(0.1, "gap", warn=True)]
    )
    (test,) = run([gap], by_hand)["tests"]
    assert test["status"].value == "WARNING"


def test_a_metric_that_cannot_be_had_says_why(metrics: ModuleType, by_hand: pd.DataFrame) -> None:
    gap = metrics.AccuracyGap(column="group_G", positive="yes")
    with pytest.raises(FairnessError, match="G: accuracy gap between groups: no row has a label yet"):
        run([gap], by_hand.assign(label=None))
    with pytest.raises(FairnessError, match="no column 'group_SEX'"):
        run([metrics.AccuracyGap(column="group_SEX", positive="yes")], by_hand)


def test_quality_is_over_labelled_rows_of_either_arm(metrics: ModuleType, by_hand: pd.DataFrame) -> None:
    rows = by_hand.copy()
    rows.loc[rows["group_G"] == "b", "label"] = None
    items = [
        metrics.ArmAccuracy(),
        metrics.ArmAccuracy(prediction="prediction_full"),
        metrics.AccuracyDrop(),
        metrics.ArmBalancedAccuracy(),
        metrics.Agreement(),
    ]
    values = [m["value"] for m in run(items, rows)["metrics"]]
    assert values == pytest.approx([0.85, 1.0, 0.15, 0.85, 111 / 140])
