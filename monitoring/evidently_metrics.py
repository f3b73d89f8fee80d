"""Trimtab's own Evidently metrics: fairness for one sensitive column each, and quality of both arms.

Importing this module imports Evidently (seconds, and some 300 MB), so only a report does it, in a process
of its own. Evidently's `GroupBy(Accuracy(), "g")` gives every group the overall accuracy, and its
classification metrics fail on rows without a label and on absent classes; these do not.

The figures themselves come from `fairness.assess`; what they say and do not say is written there.
A figure that the rows cannot give raises FairnessError with the reason: ask `assess` first.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, Optional, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
from evidently.core.container import MetricContainer, MetricOrContainer
from evidently.core.datasets import Dataset
from evidently.core.metric_types import SingleValue, SingleValueCalculation, SingleValueMetric
from evidently.core.report import Context
from evidently.core.tests import Reference
from evidently.legacy.model.widget import BaseWidgetInfo
from evidently.legacy.renderers.html_widgets import table_data, text_widget
from evidently.tests.numerical_tests import GreaterOrEqualMetricTest, LessOrEqualMetricTest

from monitoring.errors import TrimtabError
from monitoring.fairness import (
    MIN_ROWS,
    Fairness,
    FairnessColumns,
    FairnessError,
    MetricName,
    assess,
    attribute_of,
)

# Evidently's models are pydantic 1 and read these annotations at run time: Optional[str], not `str | None`.


def at_most(limit: float | Reference, told: str, *, warn: bool = False) -> LessOrEqualMetricTest:
    """Evidently's `lte` under a name of its own, by which a failure is told; `warn`: it only warns."""
    return LessOrEqualMetricTest(threshold=limit, alias=told, is_critical=not warn)


def at_least(limit: float | Reference, told: str, *, warn: bool = False) -> GreaterOrEqualMetricTest:
    """Evidently's `gte` under a name of its own."""
    return GreaterOrEqualMetricTest(threshold=limit, alias=told, is_critical=not warn)


class FairnessMetric(SingleValueMetric):
    """A fairness figure of one sensitive column, of the arm whose answers are in `prediction`."""

    column: str
    positive: str
    min_rows: int = MIN_ROWS
    prediction: str = "prediction"
    full: str = "prediction_full"
    label: str = "label"


class AccuracyGap(FairnessMetric):
    """Best minus worst accuracy of a group."""


class DemographicParityDifference(FairnessMetric):
    """Highest minus lowest share of favourable predictions of a group; needs no labels."""


class EqualizedOddsDifference(FairnessMetric):
    """The larger of the gaps between groups in true and in false positive rate."""


class WorstGroupAccuracy(FairnessMetric):
    """Accuracy of the group with the lowest one."""


class GroupAccuracyDrop(FairnessMetric):
    """Accuracy that a group loses against full precision on the same rows.

    Without a group: of the group that loses most.
    """

    group: Optional[str] = None  # noqa: UP045


_ASSESSED: WeakKeyDictionary[Dataset, dict[tuple[str, FairnessColumns, int], Fairness]] = WeakKeyDictionary()


def remember(rows: Dataset, column: str, where: FairnessColumns, min_rows: int, found: Fairness) -> None:
    """Hand in an assessment that has been made, so that the metrics of these rows need not make it again."""
    _ASSESSED.setdefault(rows, {})[column, where, min_rows] = found


MetricT = TypeVar("MetricT", bound=FairnessMetric)


class FairnessCalculation(SingleValueCalculation[MetricT], Generic[MetricT], ABC):
    figure: ClassVar[MetricName]
    title: ClassVar[str]

    def calculate(
        self,
        context: Context,  # noqa: ARG002
        current_data: Dataset,
        reference_data: Dataset | None,
    ) -> tuple[SingleValue, SingleValue | None]:
        value = self.result(self.read(self.assess(current_data)))
        if reference_data is None:
            return value, None
        try:
            return value, self.result(self.read(self.assess(reference_data)))
        except FairnessError:
            return value, None  # the reference rows cannot say; a test against them must not be asked for

    def assess(self, rows: Dataset) -> Fairness:
        m = self.metric
        where = FairnessColumns(positive=m.positive, prediction=m.prediction, full=m.full, label=m.label)
        known, key = _ASSESSED.setdefault(rows, {}), (m.column, where, m.min_rows)
        if key not in known:
            known[key] = assess(rows.as_dataframe(), m.column, where, min_rows=m.min_rows)
        return known[key]

    def read(self, found: Fairness) -> float:
        if self.figure not in found.values:
            raise FairnessError(f"{self.display_name()}: {found.unavailable[self.figure]}")
        return found.values[self.figure]

    def display_name(self) -> str:
        return f"{attribute_of(self.metric.column)}: {self.title}"


class AccuracyGapCalculation(FairnessCalculation[AccuracyGap]):
    figure = "accuracy_gap"
    title = "accuracy gap between groups"


class DemographicParityDifferenceCalculation(FairnessCalculation[DemographicParityDifference]):
    figure = "demographic_parity_difference"
    title = "demographic-parity difference"


class EqualizedOddsDifferenceCalculation(FairnessCalculation[EqualizedOddsDifference]):
    figure = "equalized_odds_difference"
    title = "equalized-odds difference"


class WorstGroupAccuracyCalculation(FairnessCalculation[WorstGroupAccuracy]):
    figure = "worst_group_accuracy"
    title = "worst group accuracy"


class GroupAccuracyDropCalculation(FairnessCalculation[GroupAccuracyDrop]):
    figure = "worst_group_drop"
    title = "accuracy drop of the worst group"

    def read(self, found: Fairness) -> float:
        if self.metric.group is None:
            return super().read(found)
        for group in found.groups:
            if group.group == self.metric.group and group.drop is not None:
                return group.drop
        raise FairnessError(
            f"{self.display_name()}: the group is not in these rows, or has too few of them with a label"
        )

    def display_name(self) -> str:
        if self.metric.group is None:
            return super().display_name()
        return f"{attribute_of(self.metric.column)}={self.metric.group}: accuracy drop"


FAIRNESS_METRICS: dict[MetricName, type[FairnessMetric]] = {
    "accuracy_gap": AccuracyGap,
    "demographic_parity_difference": DemographicParityDifference,
    "equalized_odds_difference": EqualizedOddsDifference,
    "worst_group_accuracy": WorstGroupAccuracy,
    "worst_group_drop": GroupAccuracyDrop,
}


class LabelledQuality(SingleValueMetric):
    """Base of the quality figures, over the rows that have a label (Agreement: over all rows)."""

    prediction: str = "prediction"
    full: str = "prediction_full"
    label: str = "label"


class ArmAccuracy(LabelledQuality):
    """Share of right answers of the arm whose answers are in `prediction`."""


class ArmBalancedAccuracy(LabelledQuality):
    """Mean recall over the classes that occur: what accuracy hides when classes are imbalanced."""


class AccuracyDrop(LabelledQuality):
    """Accuracy of full precision minus the candidate's, on the same rows."""


class Agreement(LabelledQuality):
    """Share of rows on which both arms give the same answer; the accuracy drop cannot exceed one minus it."""


QualityT = TypeVar("QualityT", bound=LabelledQuality)


class QualityCalculation(SingleValueCalculation[QualityT], Generic[QualityT], ABC):
    def calculate(
        self,
        context: Context,  # noqa: ARG002
        current_data: Dataset,
        reference_data: Dataset | None,  # noqa: ARG002
    ) -> SingleValue:
        rows = current_data.as_dataframe()
        needed = self.needed()
        for column in needed:
            if column not in rows:
                raise TrimtabError(f"{self.display_name()}: there is no column {column!r} in these rows")
        rows = rows[list(needed)].dropna().astype(str)
        if rows.empty:
            raise TrimtabError(f"{self.display_name()}: no row has everything that it needs")
        return self.result(self.measure(rows))

    def needed(self) -> tuple[str, ...]:
        return (self.metric.label, self.metric.prediction)

    def measure(self, rows: pd.DataFrame) -> float:
        raise NotImplementedError

    def arm(self) -> str:
        return "full precision" if self.metric.prediction == self.metric.full else "candidate"


class ArmAccuracyCalculation(QualityCalculation[ArmAccuracy]):
    def measure(self, rows: pd.DataFrame) -> float:
        return float((rows[self.metric.label] == rows[self.metric.prediction]).mean())

    def display_name(self) -> str:
        return f"Accuracy of {self.arm()}"


class ArmBalancedAccuracyCalculation(QualityCalculation[ArmBalancedAccuracy]):
    def measure(self, rows: pd.DataFrame) -> float:
        right = rows[self.metric.label] == rows[self.metric.prediction]
        return float(np.mean(right.groupby(rows[self.metric.label]).mean()))

    def display_name(self) -> str:
        return f"Balanced accuracy of {self.arm()}"


class AccuracyDropCalculation(QualityCalculation[AccuracyDrop]):
    def needed(self) -> tuple[str, ...]:
        return (self.metric.label, self.metric.prediction, self.metric.full)

    def measure(self, rows: pd.DataFrame) -> float:
        label = rows[self.metric.label]
        lost = (rows[self.metric.full] == label).mean() - (rows[self.metric.prediction] == label).mean()
        return float(lost)

    def display_name(self) -> str:
        return "Accuracy drop against full precision"


class AgreementCalculation(QualityCalculation[Agreement]):
    def needed(self) -> tuple[str, ...]:
        return (self.metric.prediction, self.metric.full)

    def measure(self, rows: pd.DataFrame) -> float:
        return float((rows[self.metric.prediction] == rows[self.metric.full]).mean())

    def display_name(self) -> str:
        return "Agreement of the two arms"


class EmbeddingDrift(SingleValueMetric):
    """How far the mean of an embedding has moved, as `drift.measure_drift` found it; Evidently has no such metric."""

    column: str
    distance: float


class EmbeddingDriftCalculation(SingleValueCalculation[EmbeddingDrift]):
    def calculate(
        self,
        context: Context,  # noqa: ARG002
        current_data: Dataset,  # noqa: ARG002
        reference_data: Dataset | None,  # noqa: ARG002
    ) -> SingleValue:
        return self.result(self.metric.distance)

    def display_name(self) -> str:
        return f"Embedding drift of {self.metric.column}: distance of the means"


class Section(MetricContainer):
    """A titled part of the report: a text, tables made beforehand, and metrics.

    `plots` shows the metrics' own widgets too; without it the tables stand for them.
    """

    title: str
    text: str = ""
    tables: list[dict[str, Any]] = []  # noqa: RUF012
    items: list[Any] = []  # noqa: RUF012
    plots: bool = False

    def __init__(
        self,
        title: str,
        items: Sequence[MetricOrContainer] = (),
        *,
        text: str = "",
        tables: Sequence[dict[str, Any]] = (),
        plots: bool = False,
    ) -> None:
        super().__init__(title=title, text=text, tables=list(tables), items=list(items), plots=plots)

    def generate_metrics(self, context: Context) -> Sequence[MetricOrContainer]:  # noqa: ARG002
        return list(self.items)

    def render(
        self,
        context: Context,
        child_widgets: list[tuple[str | None, list[BaseWidgetInfo]]] | None = None,
    ) -> list[BaseWidgetInfo]:
        widgets = [text_widget(title=self.title, text=self.text)]
        widgets += [
            table_data(title=t["title"], column_names=t["columns"], data=t["rows"]) for t in self.tables
        ]
        if self.plots:
            widgets += super().render(context, child_widgets)
        return widgets
