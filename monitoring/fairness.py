"""How a compressed model treats the groups of people in its rows, beside full precision on the same rows.

What is measured, for one sensitive attribute at a time (rates by fairlearn's MetricFrame):

* accuracy gap: best minus worst accuracy of a group;
* demographic-parity difference: highest minus lowest share of favourable predictions. Needs no labels;
* equalized-odds difference: the larger of the gaps between groups in true and in false positive rate;
* worst group accuracy;
* worst group drop: by how much the group that lost most is less accurate than with full precision.

What it does not say: that a model is fair. Groups may differ in what is to be predicted, labels carry the
judgement of whoever made them, attributes are looked at one by one and not in combination, and a small
group says little. These numbers answer a narrower question: did *compression* change how groups are
treated, and for whom? So what fails a report is a change against full precision on the same rows; a wide
gap that full precision has as well is a warning, because compressing did not cause it and rolling back
would not cure it.

Every figure comes with an allowance for chance (2.58 standard errors by bootstrap): with 40 rows in a
group a gap of ten points is nothing unusual. Rollbacks are not decided here but by the guardrails'
evidence.

Groups with fewer than `min_rows` rows are left out, and named. fairlearn and pandas are imported inside the
functions, because serving workers import this package; the Evidently metrics are in `evidently_metrics.py`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from monitoring.errors import TrimtabError

if TYPE_CHECKING:
    import pandas as pd
    from fairlearn.metrics import MetricFrame

MetricName = Literal[
    "accuracy_gap",
    "demographic_parity_difference",
    "equalized_odds_difference",
    "worst_group_accuracy",
    "worst_group_drop",
]
GAPS: tuple[MetricName, ...] = (
    "accuracy_gap",
    "demographic_parity_difference",
    "equalized_odds_difference",
)

NEED_LABELS: tuple[MetricName, ...] = (
    "accuracy_gap",
    "equalized_odds_difference",
    "worst_group_accuracy",
)

MIN_ROWS = 30
MIN_OUTCOMES = 10
"""Rows of either true outcome that a group needs before its true and false positive rates are looked at."""
CHANCE_Z = 2.58
"""Standard errors allowed for chance: 1% two-sided."""


class FairnessError(TrimtabError):
    """A fairness figure that these rows cannot give; the message says why."""


@dataclass(frozen=True, slots=True)
class FairnessColumns:
    """Where the rows hold what."""

    positive: str
    prediction: str = "prediction"
    full: str = "prediction_full"
    label: str = "label"


@dataclass(frozen=True, slots=True)
class FairnessLimits:
    """What a report passes, warns of and fails."""

    gap: float = 0.10
    """A gap between groups above this is a warning, whoever caused it."""
    gap_increase: float = 0.05
    """A gap wider than full precision's on the same rows by more than this fails."""
    group_drop: float = 0.05
    """A group that lost more accuracy than this against full precision fails."""
    reference: float = 0.05
    """Worse than full precision was on the reference rows by more than this is a warning."""


@dataclass(frozen=True, slots=True)
class GroupFigures:
    """One group. Rates are None without labels, or without full precision's answers."""

    group: str
    rows: int
    labelled: int
    positive_rate: float
    positive_rate_full: float | None = None
    accuracy: float | None = None
    accuracy_full: float | None = None
    chance: float | None = None
    """Allowance for chance of `drop`; smaller groups have a larger one."""

    @property
    def drop(self) -> float | None:
        if self.accuracy is None or self.accuracy_full is None:
            return None
        return self.accuracy_full - self.accuracy


@dataclass(frozen=True, slots=True)
class Fairness:
    """Everything about one sensitive attribute in one window."""

    attribute: str
    groups: tuple[GroupFigures, ...]
    values: Mapping[MetricName, float]
    """Metric name -> the candidate's figure."""
    full: Mapping[MetricName, float]
    """Metric name -> full precision's figure on the same rows."""
    chance: Mapping[MetricName, float]
    """Metric name -> allowance for chance of (candidate - full precision), or of the drop."""
    unavailable: Mapping[MetricName, str] = field(default_factory=dict)
    """Metric name -> why there is no figure."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Groups with too few rows -> their rows."""
    worst_group: str | None = None
    """The group that lost most against full precision; with `chance`
    known, most beyond its allowance, so that the noise of a small group does not hide the loss of a large
    one."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "attribute": self.attribute,
            "worst_group": self.worst_group,
            "values": dict(self.values),
            "full_precision": dict(self.full),
            "chance": dict(self.chance),
            "unavailable": dict(self.unavailable),
            "left_out": dict(self.left_out),
            "groups": [{**asdict(g), "drop": g.drop} for g in self.groups],
        }


def attribute_of(column: str) -> str:
    return column.removeprefix("group_")


def assess(
    rows: pd.DataFrame,
    column: str,
    columns: FairnessColumns,
    *,
    min_rows: int = MIN_ROWS,
    bootstraps: int = 0,
    seed: int = 0,
) -> Fairness:
    """Measure one sensitive column; what cannot be measured is in `unavailable`, with the reason.

    `bootstraps` > 0 also estimates the allowance for chance. Raises FairnessError only when not one figure
    can be given: the column is missing or names fewer than two groups that are large enough.
    """
    for needed in (column, columns.prediction):
        if needed not in rows:
            raise FairnessError(f"there is no column {needed!r} in these rows")
    rows = rows[rows[column].notna() & rows[columns.prediction].notna()]
    sizes = rows[column].astype(str).value_counts()
    large = sorted(sizes[sizes >= min_rows].index)
    left_out = {str(g): int(n) for g, n in sizes[sizes < min_rows].sort_index().items()}
    if len(large) < 2:
        found = ", ".join(f"{g} ({n})" for g, n in sizes.items()) or "none"
        raise FairnessError(
            f"{column} needs at least two groups of {min_rows} rows or more to compare; found: {found}"
        )
    rows = rows[rows[column].astype(str).isin(large)]
    group = rows[column].astype(str).to_numpy()
    labels = rows.get(columns.label)
    known = labels.notna().to_numpy() if labels is not None else np.zeros(len(rows), dtype=bool)
    full = rows.get(columns.full)
    paired = full is not None and bool(full.notna().all())

    values, unavailable, figures = _arm(rows, group, known, columns, min_rows)
    full_values: dict[MetricName, float] = {}
    if paired:
        full_values, full_figures = dict(values), figures
        if full is not None and not full.equals(
            rows[columns.prediction]
        ):  # in the reference rows both are full precision's
            as_full = rows.assign(**{columns.prediction: full})
            full_values, _, full_figures = _arm(as_full, group, known, columns, min_rows)
        figures = {
            g: replace(
                f, positive_rate_full=full_figures[g].positive_rate, accuracy_full=full_figures[g].accuracy
            )
            for g, f in figures.items()
        }
    chance: dict[MetricName, float] = {}
    if bootstraps:
        chance, by_group = _chance(
            rows,
            group,
            known,
            columns,
            min_rows=min_rows,
            bootstraps=bootstraps,
            seed=seed,
            paired=paired,
        )
        chance = {name: c for name, c in chance.items() if name in values}
        figures = {g: replace(f, chance=by_group.get(g)) for g, f in figures.items()}
    losers = [f for f in figures.values() if f.drop is not None]
    worst = max(losers, key=_loss) if losers else None
    if worst is not None and worst.drop is not None:
        values["worst_group_drop"] = worst.drop
        if worst.chance is not None:
            chance["worst_group_drop"] = worst.chance
    else:
        unavailable["worst_group_drop"] = (
            unavailable.get("worst_group_accuracy") or "full precision's answers are missing in these rows"
        )
    return Fairness(
        attribute=attribute_of(column),
        groups=tuple(figures[g] for g in sorted(figures)),
        values=values,
        full=full_values,
        chance=chance,
        unavailable=unavailable,
        left_out=left_out,
        worst_group=worst.group if worst else None,
    )


def _arm(
    rows: pd.DataFrame, group: np.ndarray, known: np.ndarray, columns: FairnessColumns, min_rows: int
) -> tuple[dict[MetricName, float], dict[MetricName, str], dict[str, GroupFigures]]:
    """Figures of the arm in `columns.prediction`: values, reasons for absent ones, the table of groups."""
    import pandas as pd

    answered = rows[columns.prediction].astype(str).to_numpy()
    truth = rows[columns.label].astype(str).to_numpy() if columns.label in rows else answered
    each = pd.DataFrame(
        {
            "group": group,
            "known": known,
            "wanted": truth == columns.positive,
            "favourable": answered == columns.positive,
            "right": truth == answered,
        }
    )
    # Rows of one kind are counted: MetricFrame is many times faster on a few weighted rows.
    cells = each.value_counts().rename("n").reset_index()
    by_rate = _by_group(cells, "favourable")
    rates = {str(g): float(r) for g, r in by_rate.by_group["rate"].items()}
    values: dict[MetricName, float] = {"demographic_parity_difference": float(by_rate.difference()["rate"])}
    unavailable: dict[MetricName, str] = {}
    accuracy: dict[str, float] = {}

    sizes = each.groupby("group").size()
    seen = cells[cells["known"]]
    labelled = {g: int(seen.loc[seen["group"] == g, "n"].sum()) for g in sizes.index}
    enough = [g for g in sizes.index if labelled[g] >= min_rows]
    seen = seen[seen["group"].isin(enough)]
    outcomes = seen.pivot_table(index="group", columns="wanted", values="n", aggfunc="sum", fill_value=0)
    outcomes = outcomes.reindex(columns=[False, True], fill_value=0)
    least = outcomes.min(axis=1)
    both = [g for g, n in least.items() if n >= MIN_OUTCOMES]
    if len(enough) < 2:
        reason = f"fewer than two groups have {min_rows} labelled rows"
        for name in NEED_LABELS:
            unavailable[name] = reason if known.any() else "no row has a label yet"
    else:
        by_accuracy = _by_group(seen, "right")
        accuracy = {str(g): float(a) for g, a in by_accuracy.by_group["rate"].items()}
        values["accuracy_gap"] = float(by_accuracy.difference()["rate"])
        values["worst_group_accuracy"] = float(by_accuracy.group_min()["rate"])
        if len(both) >= 2:
            odds = seen[seen["group"].isin(both)]
            values["equalized_odds_difference"] = max(
                float(_by_group(odds[odds["wanted"] == wanted], "favourable").difference()["rate"])
                for wanted in (True, False)
            )
        else:
            unavailable["equalized_odds_difference"] = (
                f"fewer than two groups have {MIN_OUTCOMES} labelled rows of either outcome"
            )
    figures = {
        str(g): GroupFigures(
            group=str(g),
            rows=int(n),
            labelled=labelled[g],
            positive_rate=rates[str(g)],
            accuracy=accuracy.get(str(g)),
        )
        for g, n in sizes.items()
    }
    return values, unavailable, figures


def _by_group(cells: pd.DataFrame, flag: str) -> MetricFrame:
    """The rate of a flag within each group, from counted rows."""
    from fairlearn.metrics import MetricFrame, selection_rate

    hits = cells[flag].astype(int)
    return MetricFrame(
        metrics={"rate": selection_rate},
        y_true=hits,
        y_pred=hits,
        sensitive_features=cells["group"],
        sample_params={"rate": {"sample_weight": cells["n"]}},
    )


def _loss(figures: GroupFigures) -> tuple[float, float]:
    """By what chance does not explain, where there is any such loss; else by the loss itself."""
    drop = figures.drop or 0.0
    return max(0.0, drop - (figures.chance or 0.0)), drop


def _chance(
    rows: pd.DataFrame,
    group: np.ndarray,
    known: np.ndarray,
    columns: FairnessColumns,
    *,
    min_rows: int,
    bootstraps: int,
    seed: int,
    paired: bool,
) -> tuple[dict[MetricName, float], dict[str, float]]:
    """Allowances for chance, of the metrics and of each group's drop, by resampling each group's rows.

    Both arms' answers to a row are drawn together, so that pairing helps. A row is in one of 2^6 cells, so
    resampling a group's rows is one multinomial draw.
    """
    answered = rows[columns.prediction].astype(str).to_numpy()
    full = rows[columns.full].astype(str).to_numpy() if paired else answered
    truth = rows[columns.label].astype(str).to_numpy() if columns.label in rows else answered
    bits = np.stack(
        [
            answered == columns.positive,
            full == columns.positive,
            truth == columns.positive,
            answered == truth,
            full == truth,
            known,
        ]
    ).astype(int)
    cell = (bits * (2 ** np.arange(len(bits)))[:, None]).sum(axis=0)
    cells = 2 ** len(bits)
    chosen, chosen_full, wanted, right, right_full, seen = (
        np.arange(cells) >> np.arange(len(bits))[:, None]
    ) & 1
    rng = np.random.default_rng(seed)
    order = sorted(set(group))
    observed = np.stack([np.bincount(cell[group == g], minlength=cells) for g in order])
    draws = np.stack([rng.multinomial(n.sum(), n / n.sum(), bootstraps) for n in observed])

    def rate(top: np.ndarray, bottom: np.ndarray, least: int) -> np.ndarray:
        """Per group and replicate; groups with too few rows to be looked at are not a number."""
        below = draws @ bottom
        enough = (observed @ bottom >= least)[:, None] & (below > 0)
        rates = np.full(below.shape, np.nan)
        np.divide(draws @ (top * bottom), below, out=rates, where=enough)
        return rates

    def gap(rates: np.ndarray) -> np.ndarray:
        return np.asarray(np.nanmax(rates, axis=0) - np.nanmin(rates, axis=0))

    def parity(arm: np.ndarray) -> np.ndarray:
        return gap(rate(arm, np.ones(cells, dtype=int), 1))

    def odds(arm: np.ndarray) -> np.ndarray:
        tpr = rate(arm, seen * wanted, MIN_OUTCOMES)
        fpr = rate(arm, seen * (1 - wanted), MIN_OUTCOMES)
        tpr[np.isnan(fpr)] = fpr[np.isnan(tpr)] = np.nan
        return np.asarray(np.maximum(gap(tpr), gap(fpr)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a replicate in which no group can be looked at
        accuracy, accuracy_full = rate(right, seen, min_rows), rate(right_full, seen, min_rows)
        samples: dict[MetricName, np.ndarray] = {
            "demographic_parity_difference": parity(chosen) - (parity(chosen_full) if paired else 0),
            "accuracy_gap": gap(accuracy) - (gap(accuracy_full) if paired else 0),
            "worst_group_accuracy": np.nanmin(accuracy, axis=0),
            "equalized_odds_difference": odds(chosen) - (odds(chosen_full) if paired else 0),
        }
        errors: dict[MetricName, float] = {name: float(np.nanstd(v)) for name, v in samples.items()}
        lost = np.nanstd(accuracy_full - accuracy, axis=1).tolist() if paired else [math.nan] * len(order)
        drop_errors = dict(zip(order, lost, strict=True))

    return (
        {name: round(CHANCE_Z * e, 6) for name, e in errors.items() if math.isfinite(e)},
        {name: round(CHANCE_Z * e, 6) for name, e in drop_errors.items() if math.isfinite(e)},
    )
