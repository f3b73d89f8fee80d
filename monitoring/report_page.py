"""How a report looks: its sections, tables and tests, drawn by Evidently.

Importing this imports Evidently. `monitoring.report` does so in the report's own process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pandas as pd
from evidently import DataDefinition, Dataset, Report
from evidently.metrics import DriftedColumnsCount, ValueDrift

from monitoring.error_analysis import FULL, LABEL, PREDICTION, SliceErrors
from monitoring.evidently_metrics import (
    FAIRNESS_METRICS,
    AccuracyDrop,
    Agreement,
    ArmAccuracy,
    ArmBalancedAccuracy,
    EmbeddingDrift,
    Section,
    at_least,
    at_most,
    remember,
)
from monitoring.fairness import GAPS, Fairness, FairnessColumns, GroupFigures, MetricName
from monitoring.report import (
    Findings,
    ReportSpec,
    _safe,
    accuracies_of,
    agreement_of,
)


def draw(found: Findings, spec: ReportSpec, now: float) -> Any:
    """Run the Evidently report and return its snapshot."""
    drift = found.drift.columns
    ours, theirs = _frames(found, spec)
    definition = DataDefinition(
        numerical_columns=[c.column for c in drift if c.kind in ("numeric", "text")],
        categorical_columns=[c.column for c in drift if c.kind == "categorical"] + [PREDICTION],
    )
    failures: list[str] = []
    sections = [
        _quality_section(found, spec, failures),
        *_error_sections(found),
        *(
            _fairness_section(f, found.reference_fairness.get(a), spec, failures)
            for a, f in found.fairness.items()
        ),
        *_drift_sections(found, spec, failures),
    ]
    if found.notes:
        sections.append(Section("Left out, and why", text="\n".join(f"- {n}" for n in found.notes)))
    sections.insert(0, Section("Trimtab report", text=_headline(found, spec, now, failures)))
    current = Dataset.from_pandas(ours, data_definition=definition)
    reference = Dataset.from_pandas(theirs, data_definition=definition) if len(theirs) else None
    where = FairnessColumns(positive=spec.positive_class)
    for rows, assessed in ((current, found.fairness), (reference, found.reference_fairness)):
        for attribute, fairness in assessed.items() if rows is not None else ():
            remember(rows, f"group_{attribute}", where, spec.min_group_rows, fairness)
    tags = [spec.rollout_id] if spec.rollout_id else []
    return Report(sections, include_tests=True).run(current, reference, name=_safe(spec.candidate), tags=tags)


def _frames(found: Findings, spec: ReportSpec) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What Evidently gets: the prepared input columns beside answers, labels and groups."""
    prepared = found.prepared
    rest = [PREDICTION, FULL, LABEL, *(f"group_{a}" for a in spec.sensitive)]
    ours = prepared.current.join(found.current[[c for c in rest if c in found.current]], how="right")
    theirs = prepared.reference.join(found.reference[[c for c in rest if c in found.reference]], how="right")
    return ours, theirs


def _headline(found: Findings, spec: ReportSpec, now: float, failures: list[str]) -> str:
    when = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    rollout = f", rollout `{spec.rollout_id}`" if spec.rollout_id else ""
    what = (
        f"**{spec.workload}**: candidate `{spec.candidate}` beside full precision `{spec.full}`{rollout}, "
        f"{when}. {len(found.current):,} rows, {found.labelled:,} of them labelled; "
        f"{len(found.reference):,} reference rows."
    )
    verdict = (
        "**No test failed.**" if not failures else "**Failed:**\n\n" + "\n".join(f"- {f}" for f in failures)
    )
    how = (
        "A report informs people: promotion and rollback follow from the guardrails' evidence, not from it. "
        "Limits include an allowance for chance, which grows as rows get fewer. All tests are in the *Tests* "
        "tab: a failed one is a change (since the reference rows, or against full precision on the same "
        "rows); a warning is a figure to know of that need not be compression's doing."
    )
    return "\n\n".join((what, verdict, how))


def _quality_section(found: Findings, spec: ReportSpec, failures: list[str]) -> Section:
    rows = found.current
    items: list[Any] = [Agreement(tests=[])] if rows[FULL].notna().any() else []
    accuracy, _, drop = accuracies_of(rows)
    if accuracy is not None:
        items += [ArmAccuracy(tests=[]), ArmBalancedAccuracy(tests=[])]
    if drop is not None:
        limit = round(spec.accuracy_drop + found.drop_allowance, 4)
        chance = f"{found.drop_allowance:.3f} for chance"
        told = f"accuracy drop (limit {limit:.3f} = {spec.accuracy_drop:g} + {chance})"
        if drop > limit:
            failures.append(f"{told}: {drop:.3f}")
        items += [
            ArmAccuracy(prediction=FULL, tests=[]),
            ArmBalancedAccuracy(prediction=FULL, tests=[]),
            AccuracyDrop(tests=[at_most(limit, told)]),
        ]
    text = (
        f"On the {found.labelled:,} labelled rows, both arms on the same ones."
        if found.labelled
        else "No row has a label yet, so there is no accuracy; the accuracy drop is at most the disagreement."
    )
    return Section("Quality", items, text=text, tables=_quality_tables(found, spec))


def _quality_tables(found: Findings, spec: ReportSpec) -> list[dict[str, Any]]:
    rows = found.current
    facts = [["agreement of the two arms", "", "", _number(agreement_of(rows))]]
    accuracy, accuracy_full, drop = accuracies_of(rows)
    if accuracy is not None:
        facts.insert(0, ["accuracy", _number(accuracy), _number(accuracy_full), _signed(drop, turn=True)])
    tables = [
        {
            "title": "Candidate beside full precision",
            "columns": ["", "candidate", "full precision", "difference"],
            "rows": facts,
        }
    ]
    labelled = rows[rows[LABEL].notna()]
    if len(labelled):
        by_class = []
        for name in spec.classes:
            those = labelled[labelled[LABEL] == name]
            mine, full, lost = accuracies_of(those)
            by_class.append([name, f"{len(those):,}", _number(mine), _number(full), _signed(lost, turn=True)])
        tables.append(
            {
                "title": "Recall by true class",
                "columns": ["class", "labelled rows", "candidate", "full precision", "difference"],
                "rows": by_class,
            }
        )
    return tables


def _error_sections(found: Findings) -> list[Section]:
    """What compression broke; nothing before a row has a label and both answers."""
    errors = found.errors
    if errors.overall is None:
        return []
    worst = errors.worst
    text = (
        f"Of {errors.rows:,} labelled rows that both arms answered, full precision was right and the candidate wrong "
        f"on **{errors.overall.lost:,}** (*lost*), the other way round on {errors.overall.won:,} (*won*). "
        + (
            f"Lost most: {_safe(worst.told())}."
            if worst is not None
            else "No class or group that is large enough lost accuracy."
        )
        + " The net drop is (lost - won) / rows, with its 95% interval (Bonett and Price 2012). With many classes and "
        "groups some intervals miss 0 by chance."
    )
    tables = [
        _slice_table(title, slices, more)
        for title, slices, more in (
            ("Lost by true class", errors.classes, errors.more_classes),
            ("Lost by group", errors.groups, errors.more_groups),
        )
        if slices
    ]
    if errors.labels:
        counts = zip(errors.labels, errors.matrix_full, errors.matrix, strict=True)
        tables.append(
            {
                "title": "Answers by true class: full precision / candidate",
                "columns": ["true class", *map(_safe, errors.answers)],
                "rows": [
                    [_safe(name), *(f"{a:,} / {b:,}" for a, b in zip(full, mine, strict=True))]
                    for name, full, mine in counts
                ],
            }
        )
    elif errors.confusions:
        tables.append(
            {
                "title": f"The candidate's {len(errors.confusions)} largest confusions",
                "columns": ["true class", "taken for", "full precision", "candidate"],
                "rows": [
                    [_safe(c.label), _safe(c.answer), f"{c.full:,}", f"{c.candidate:,}"]
                    for c in errors.confusions
                ],
            }
        )
    if errors.lost_rows:
        tables.append(
            {
                "title": f"{len(errors.lost_rows):,} of {errors.overall.lost:,} lost rows, "
                "from the class or group that lost most",
                "columns": ["shown for", "label, full precision", "candidate", "groups", "record"],
                "rows": [
                    [
                        _safe(row.because),
                        _safe(row.label),
                        _safe(row.candidate),
                        _safe(", ".join(f"{k}={v}" for k, v in row.groups.items())),
                        _safe(", ".join(f"{k}={v}" for k, v in row.record.items()) or "(tensors)", 400),
                    ]
                    for row in errors.lost_rows
                ],
            }
        )
    return [Section("What compression broke", text=text, tables=tables)]


def _slice_table(title: str, slices: Sequence[SliceErrors], more: int) -> dict[str, Any]:
    rows = [
        [
            _safe(s.name) + (" (few rows)" if s.small else ""),
            f"{s.rows:,}",
            _number(s.accuracy_full),
            _number(s.accuracy),
            f"{s.lost:,}",
            f"{s.won:,}",
            f"{100 * s.drop:z.2f} ({100 * s.low:z.2f} to {100 * s.high:z.2f})",
        ]
        for s in slices
    ]
    return {
        "title": title + (f" (and {more:,} more)" if more else ""),
        "columns": ["", "rows", "full precision", "candidate", "lost", "won", "net drop, pt (95%)"],
        "rows": rows,
    }


def _fairness_section(
    found: Fairness, reference: Fairness | None, spec: ReportSpec, failures: list[str]
) -> Section:
    attribute = found.attribute
    then = reference.values if reference else {}
    items: list[Any] = []
    figures: list[list[str]] = []
    for name, value in found.values.items():
        tests, limit, told = _fairness_tests(name, found, then, spec)
        title = name.replace("_", " ")
        about = {}
        if name == "worst_group_drop":
            about = {"group": found.worst_group}
            title = f"accuracy drop of {attribute}={found.worst_group}"
        items.append(
            FAIRNESS_METRICS[name](
                column=f"group_{attribute}",
                positive=spec.positive_class,
                min_rows=spec.min_group_rows,
                tests=tests,
                **about,
            )
        )
        failed = limit is not None and value > limit
        if failed:
            failures.append(f"{title if about else f'{attribute}: {title}'}: {value:.3f} (limit {told})")
        verdict = "" if limit is None else "FAILS" if failed else "passes"
        figures.append(
            [
                title,
                _number(value),
                _number(found.full.get(name)),
                "-" if about else _number(then.get(name)),
                told,
                verdict,
            ]
        )
    positive = spec.positive_class
    return Section(
        f"Fairness: {attribute}",
        items,
        text=f"How the candidate treats the groups of {attribute}, beside full precision on the same rows; "
        f"the favourable outcome is *{positive}*. It says whether compression changed something, and for "
        "whom; it does not say that the model is fair.",
        tables=[
            {
                "title": f"{attribute}: figures",
                "columns": ["figure", "candidate", "full precision", "reference rows", "limit", ""],
                "rows": figures,
            },
            {
                "title": f"{attribute}: groups",
                "columns": [
                    "group",
                    "rows",
                    "labelled",
                    f"share of {positive}",
                    "... full precision",
                    "accuracy",
                    "... full precision",
                    "accuracy change",
                ],
                "rows": [_group_row(attribute, g) for g in found.groups],
            },
        ],
    )


def _fairness_tests(
    name: MetricName, found: Fairness, then: Mapping[MetricName, float], spec: ReportSpec
) -> tuple[list[Any], float | None, str]:
    """A figure's tests; the limit that fails it, if it has one; and how that limit comes about."""
    limits, chance = spec.fairness, found.chance.get(name, 0.0)
    title = f"{found.attribute}: {name.replace('_', ' ')}"
    tests: list[Any] = []
    limit, told = None, "-"
    if name in GAPS:
        tests.append(at_most(limits.gap, f"{title} (in itself)", warn=True))
        if name in then:
            most = round(then[name] + limits.reference, 4)
            why = f"{most:.3f} = reference rows {then[name]:.3f} + {limits.reference:g}"
            tests.append(at_most(most, f"{title} (limit {why})", warn=True))
        if name in found.full:
            limit = round(found.full[name] + limits.gap_increase + chance, 4)
            told = (
                f"{limit:.3f} = full precision {found.full[name]:.3f} + {limits.gap_increase:g} "
                f"+ {chance:.3f} for chance"
            )
    elif name == "worst_group_drop":
        title = f"accuracy drop of {found.attribute}={found.worst_group}"
        limit = round(limits.group_drop + chance, 4)
        told = f"{limit:.3f} = {limits.group_drop:g} + {chance:.3f} for chance"
    elif name in then:
        least = round(then[name] - limits.reference, 4)
        why = f"{least:.3f} = reference rows {then[name]:.3f} - {limits.reference:g}"
        tests.append(at_least(least, f"{title} (at least {why})", warn=True))
    if limit is not None:
        tests.append(at_most(limit, f"{title} (limit {told})"))
    return tests, limit, told


def _group_row(attribute: str, g: GroupFigures) -> list[str]:
    chance = f" (chance {g.chance:.3f})" if g.chance and g.drop is not None else ""
    return [
        f"{attribute}={g.group}",
        f"{g.rows:,}",
        f"{g.labelled:,}",
        _number(g.positive_rate),
        _number(g.positive_rate_full),
        _number(g.accuracy),
        _number(g.accuracy_full),
        _signed(g.drop, turn=True) + chance,
    ]


def _drift_sections(found: Findings, spec: ReportSpec, failures: list[str]) -> list[Section]:
    sections: list[Section] = []
    p, columns = found.drift.prediction, found.drift.columns
    failures += [
        f"drift of {c.column}: {c.score:.3f} (limit {c.threshold:.3f}, {c.method} distance)"
        for c in (p, *columns)
        if c is not None and c.drifted
    ]
    if p is not None:
        sections.append(
            Section(
                "Prediction drift",
                [ValueDrift(column=PREDICTION, method=p.method, threshold=p.threshold)],
                text="The candidate's answers against full precision's on the reference rows.",
                plots=True,
            )
        )
    if columns:
        theirs = [c for c in columns if c.kind != "embedding"]
        items: list[Any] = [
            EmbeddingDrift(
                column=c.column,
                distance=c.score,
                tests=[at_most(c.threshold, f"drift of {c.column} (limit {c.threshold:.3f}, {c.method})")],
            )
            for c in columns
            if c.kind == "embedding"
        ]
        if theirs:
            # What DataDriftPreset is made of, without its table, which measures and draws every column once more.
            items += [
                DriftedColumnsCount(
                    columns=[c.column for c in theirs],
                    drift_share=spec.drift.drift_share,
                    per_column_method={c.column: c.method for c in theirs},
                    per_column_threshold={c.column: c.threshold for c in theirs},
                ),
                *(ValueDrift(column=c.column, method=c.method, threshold=c.threshold) for c in theirs),
            ]
        text = (
            "Numbers and descriptors of texts: Wasserstein distance in standard deviations of the reference; codes: "
            "Jensen-Shannon distance; embeddings: distance of the means in total standard deviations of the reference. "
            "A column's threshold is at least what chance alone would give with so many rows. Drift says that inputs "
            "look different, not that the model is worse."
        )
        table = {
            "title": f"{sum(c.drifted for c in columns)} of {len(columns)} columns drifted",
            "columns": ["column", "kind", "distance", "limit", ""],
            "rows": [
                [
                    _safe(c.column),
                    c.kind,
                    _number(c.score),
                    _number(c.threshold),
                    "DRIFTED" if c.drifted else "",
                ]
                for c in sorted(columns, key=lambda c: c.threshold / max(c.score, 1e-9))
            ],
        }
        sections.append(Section("Input drift", items, text=text, tables=[table], plots=True))
    return sections


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _signed(drop: float | None, *, turn: bool = False) -> str:
    if drop is None or math.isnan(drop):
        return "-"
    return f"{-drop if turn else drop:+.3f}"
