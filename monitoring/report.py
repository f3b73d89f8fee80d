"""The report on a window of traffic: drift, quality of both arms, fairness; HTML and JSON, by Evidently.

It informs people; it decides nothing. What a rollout does follows from the guardrails' evidence alone.

With labels it also says what compression broke (`monitoring.error_analysis`), with examples: a report holds users'
records.

Rows have the raw record's columns, `prediction` (the candidate's class name), `prediction_full` (full
precision's), `label` (or a gap) and one `group_<ATTR>` column per sensitive attribute. Reference rows are
those kept with the full-precision variant: record columns, `label`, `prediction` (full precision's own) and
groups; classes may be names or indices.

Evidently costs seconds and some 300 MB to import, so it is imported inside `make_report` only, and the
Monitor runs `report_job` in a child process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from monitoring.drift import DriftResult, DriftSettings, PreparedColumns, measure_drift, prepare_columns
from monitoring.error_analysis import (
    EXAMPLES,
    FULL,
    LABEL,
    NOT_INPUTS,
    PREDICTION,
    ErrorAnalysis,
    analyse_errors,
)
from monitoring.errors import TrimtabError
from monitoring.fairness import (
    CHANCE_Z,
    MIN_ROWS,
    Fairness,
    FairnessColumns,
    FairnessError,
    FairnessLimits,
    MetricName,
    assess,
)

if TYPE_CHECKING:
    import pandas as pd

STALE_SECONDS = 3600

log = logging.getLogger("trimtab.report")
BOOTSTRAPS = 200


class ReportError(TrimtabError):
    """A report that cannot be made; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class ReportSpec:
    """What to report on, and the limits to judge it by."""

    workload: str
    classes: tuple[str, ...]
    positive: int | str = 1
    """The favourable class, for demographic parity and equalized odds."""
    sensitive: tuple[str, ...] = ()
    rollout_id: str = ""
    candidate: str = "candidate"
    full: str = "full"
    categorical: tuple[str, ...] = ()
    """Record fields that are codes though they look like numbers."""
    accuracy_drop: float = 0.02
    max_rows: int = 5_000
    min_rows: int = 50
    min_group_rows: int = MIN_ROWS
    keep: int = 20
    """This many reports are kept in the folder, and snapshots in the workspace; older ones are deleted."""
    examples: int = EXAMPLES
    """Rows that compression lost are shown, so many at most."""
    drift: DriftSettings = field(default_factory=DriftSettings)
    fairness: FairnessLimits = field(default_factory=FairnessLimits)

    @property
    def positive_class(self) -> str:
        return self.positive if isinstance(self.positive, str) else self.classes[self.positive]


@dataclass(frozen=True, slots=True)
class ReportSummary:
    """What the report says, for metrics, status pages and the command line."""

    status: Literal["ok", "not_enough_rows"]
    workload: str
    rollout_id: str
    candidate: str
    created_at: float
    rows: int
    labelled_rows: int
    reference_rows: int
    drift_score: float | None = None
    """Share of the input columns that drifted; None when drift could not be measured."""
    drifted_columns: tuple[str, ...] = ()
    column_drift: Mapping[str, float] = field(default_factory=dict)
    """Column -> distance; the predictions' under `prediction`."""
    prediction_drift: float | None = None
    accuracy: float | None = None
    accuracy_full: float | None = None
    accuracy_drop: float | None = None
    agreement: float | None = None
    fairness_gap: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Attribute -> metric -> the candidate's figure."""
    fairness_gap_full: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The same of full precision, on the same rows."""
    worst_group: Mapping[str, str] = field(default_factory=dict)
    lost: int | None = None
    """Rows that full precision answered rightly and the candidate wrongly; None without labels."""
    won: int | None = None
    """Rows that the candidate answered rightly and full precision wrongly."""
    lost_most: str | None = None
    """The class or group whose net drop is largest, in one line; None when none lost anything."""
    tests_passed: int = 0
    tests_failed: int = 0
    tests_warned: int = 0
    failed: tuple[str, ...] = ()
    warned: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    html: str | None = None
    json: str | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """CPU time of the process that made it, while it did; known to whoever ran `report_job`, not to the files."""

    def as_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


@dataclass(frozen=True, slots=True)
class ReportJob:
    """Everything a child process needs to make a report by itself; picklable."""

    ledger: Path
    reference: Path
    out_dir: Path
    spec: ReportSpec
    limit: int = 5_000
    niceness: int = 10
    workspace: Path | None = None
    """Folder of the Evidently workspace that gets the report too; None for none."""


@dataclass(frozen=True, slots=True)
class Findings:
    """All figures of a window, before Evidently draws them."""

    current: pd.DataFrame
    reference: pd.DataFrame
    labelled: int
    prepared: PreparedColumns
    drift: DriftResult
    fairness: dict[str, Fairness]
    reference_fairness: dict[str, Fairness]
    errors: ErrorAnalysis
    drop_allowance: float
    notes: tuple[str, ...]


def report_job(job: ReportJob) -> ReportSummary:
    """Read the newest pairs and the reference rows, and make the report: a child process's entry point.

    New records are counted for the guardrail `input_drift` on the way.
    """
    started = time.process_time()
    with contextlib.suppress(OSError):  # never back up: only root may
        if job.niceness > os.getpriority(os.PRIO_PROCESS, 0):
            os.setpriority(os.PRIO_PROCESS, 0, job.niceness)
    import pandas as pd

    from monitoring.input_counts import tally_inputs
    from monitoring.ledger import Ledger

    if not job.reference.is_file():
        raise ReportError(f"there are no reference rows at {job.reference}: compress the workload first")
    current = read_pairs(job.ledger, job.spec, job.limit)
    tally_inputs(Ledger(job.ledger), job.spec.rollout_id, job.limit, time.time())
    reference = pd.read_parquet(job.reference)
    summary = make_report(current, reference, job.spec, job.out_dir, workspace=job.workspace)
    return replace(summary, cpu_seconds=round(time.process_time() - started, 3))


def make_report(
    current: pd.DataFrame,
    reference: pd.DataFrame,
    spec: ReportSpec,
    out_dir: Path,
    *,
    now: float | None = None,
    workspace: Path | None = None,
) -> ReportSummary:
    """Measure, draw and write; returns what was found and where it was written.

    A workspace that cannot be written costs a warning and a note, and not the report.

    With fewer than `spec.min_rows` current rows nothing is written, and the status says so.
    """
    started, now = time.monotonic(), time.time() if now is None else now
    if PREDICTION not in current:
        raise ReportError(f"the current rows have no column {PREDICTION!r}")
    if len(current) < spec.min_rows:
        return ReportSummary(
            status="not_enough_rows",
            workload=spec.workload,
            rollout_id=spec.rollout_id,
            candidate=spec.candidate,
            created_at=now,
            rows=len(current),
            labelled_rows=int(current[LABEL].notna().sum()) if LABEL in current else 0,
            reference_rows=len(reference),
            notes=(
                f"not enough rows: a report needs {spec.min_rows} with the candidate's answer, there are "
                f"{len(current)}",
            ),
        )
    found = measure(current, reference, spec)
    snapshot = _draw(found, spec, now)
    summary = _summarise(found, spec, snapshot, now)
    summary = _write(summary, found, snapshot, keep=spec.keep, out_dir=out_dir, started=started)
    if workspace is None:
        return summary
    try:
        from monitoring.workspace import add_snapshot

        add_snapshot(workspace, spec.workload, snapshot, keep=spec.keep)
    except Exception as error:  # noqa: BLE001 - Evidently's and the file system's errors share no other base
        told = f"not added to the Evidently workspace {workspace}: {type(error).__name__}: {error}"
        log.warning("%s", told)
        summary = replace(summary, notes=(*summary.notes, _safe(told)))
    return summary


def read_pairs(ledger: Path, spec: ReportSpec, limit: int) -> pd.DataFrame:
    """The newest pairs of the rollout as rows; only those that the candidate answered."""
    from monitoring.ledger import Ledger

    if not ledger.is_file():
        raise ReportError(f"there is no ledger at {ledger}: has the server run?")
    return pairs_to_rows(Ledger(ledger).recent_pairs(spec.rollout_id, limit), spec)


def pairs_to_rows(pairs: Iterable[Any], spec: ReportSpec) -> pd.DataFrame:
    """One row per pair: record fields, both answers, the label, and the groups."""
    import pandas as pd

    rows = []
    for pair in pairs:
        if pair.treatment is None:
            continue
        row = {str(k): v for k, v in dict(pair.record or {}).items() if k not in NOT_INPUTS}
        row |= {f"group_{attribute}": value for attribute, value in dict(pair.groups or {}).items()}
        row |= {PREDICTION: pair.treatment, FULL: pair.control, LABEL: pair.label}
        rows.append(row)
    columns = [PREDICTION, FULL, LABEL, *(f"group_{a}" for a in spec.sensitive)]
    frame = pd.DataFrame(rows, columns=None if rows else columns)
    return _name_classes(frame, spec)


def measure(current: pd.DataFrame, reference: pd.DataFrame, spec: ReportSpec) -> Findings:
    notes: list[str] = []
    current = _tidy(current, spec, "current", notes)
    reference = _tidy(reference, spec, "reference", notes)
    if PREDICTION in reference:
        reference[FULL] = reference[PREDICTION]
    alone = current[FULL].isna()
    if alone.any() and not alone.all():
        notes.append(f"{int(alone.sum())} rows without full precision's answer were left out")
        current = current[~alone].reset_index(drop=True)
    inputs = [c for c in reference.columns if is_input(c)]
    extra = [c for c in current.columns if is_input(c) and c not in reference]
    notes += [f"{c}: left out, not in the reference rows" for c in extra]
    prepared = prepare_columns(current, reference, inputs, categorical=spec.categorical, settings=spec.drift)
    drift = measure_drift(current, reference, settings=spec.drift, prepared=prepared)
    where = FairnessColumns(positive=spec.positive_class)
    fairness: dict[str, Fairness] = {}
    reference_fairness: dict[str, Fairness] = {}
    for attribute in spec.sensitive:
        try:
            found = assess(
                current,
                f"group_{attribute}",
                where,
                min_rows=spec.min_group_rows,
                bootstraps=BOOTSTRAPS,
            )
        except FairnessError as error:
            notes.append(f"fairness of {attribute}: {error}")
            continue
        fairness[attribute] = found
        notes += _fairness_notes(found, spec)
        with contextlib.suppress(FairnessError):
            reference_fairness[attribute] = assess(
                reference, f"group_{attribute}", where, min_rows=spec.min_group_rows
            )
    return Findings(
        current=current,
        reference=reference,
        labelled=int(current[LABEL].notna().sum()),
        prepared=prepared,
        drift=drift,
        fairness=fairness,
        reference_fairness=reference_fairness,
        errors=analyse_errors(
            current,
            spec.classes,
            sensitive=spec.sensitive,
            examples=spec.examples,
            small_rows=spec.min_group_rows,
        ),
        drop_allowance=_drop_allowance(current),
        notes=tuple(_safe(note) for note in (*notes, *drift.notes)),
    )


def _fairness_notes(found: Fairness, spec: ReportSpec) -> list[str]:
    """What an attribute's section does not show, and why."""
    notes = []
    for reason in sorted(set(found.unavailable.values())):
        names = ", ".join(n.replace("_", " ") for n, r in found.unavailable.items() if r == reason)
        notes.append(f"fairness of {found.attribute}: no {names}: {reason}")
    if found.left_out:
        small = ", ".join(f"{g} ({n})" for g, n in found.left_out.items())
        notes.append(
            f"fairness of {found.attribute}: groups with fewer than {spec.min_group_rows} rows left out "
            f"({len(found.left_out)}): {small}"
        )
    return notes


def is_input(column: str) -> bool:
    return column not in NOT_INPUTS and not column.startswith("group_")


def _tidy(rows: pd.DataFrame, spec: ReportSpec, which: str, notes: list[str]) -> pd.DataFrame:
    """A bounded copy with class names, text columns names, and every column that the rest relies on."""
    if len(rows) > spec.max_rows:
        notes.append(f"{spec.max_rows} of {len(rows)} {which} rows were sampled")
        rows = rows.sample(spec.max_rows, random_state=0).sort_index()
    rows = rows.rename(columns=str).reset_index(drop=True)
    rows = _name_classes(rows, spec)
    for column in [c for c in rows.columns if c.startswith("group_")]:
        rows[column] = [
            None if gap else _safe(v) for v, gap in zip(rows[column], rows[column].isna(), strict=True)
        ]
    for column in (LABEL, *((FULL,) if which == "current" else ())):
        if column not in rows:
            rows[column] = None
    return rows


def _name_classes(rows: pd.DataFrame, spec: ReportSpec) -> pd.DataFrame:
    """Class names in place of indices; whatever is neither a class nor an index becomes a gap."""
    import pandas as pd

    def name(value: object) -> str | None:
        if isinstance(value, str):
            return value if value in spec.classes else None
        if isinstance(value, (int, float, np.integer, np.floating)) and float(value).is_integer():
            index = int(value)
            return spec.classes[index] if 0 <= index < len(spec.classes) else None
        return None

    rows = rows.copy()
    for column in (PREDICTION, FULL, LABEL):
        if column in rows:
            rows[column] = pd.Series([name(v) for v in rows[column]], index=rows.index, dtype=object)
    return rows


def _safe(value: object, longest: int = 200) -> str:
    """Users' text ends in a web page: nothing in it may open a tag or end a script. `<25` may stay."""
    return re.sub(r"<(?=[A-Za-z/!?])", "< ", str(value))[:longest]


_INLINE_DATA = re.compile(r"^\s*var (?:additional_graphs_)?metric_\w+ = .*$", re.MULTILINE)


def _inert(page: str) -> str:
    """The page with every `<` in its inline data escaped, so that no value can end the script element.

    Evidently writes each of its two JSON values on one line. In JSON a `<` can only be part of a string.
    """
    return _INLINE_DATA.sub(lambda line: line[0].replace("<", "\\u003c"), page)


def _drop_allowance(rows: pd.DataFrame) -> float:
    """Allowance for chance of the overall accuracy drop."""
    paired = rows[[LABEL, PREDICTION, FULL]].dropna()
    if len(paired) < 2:
        return 0.0
    lost = (paired[FULL] == paired[LABEL]).astype(int) - (paired[PREDICTION] == paired[LABEL]).astype(int)
    return CHANCE_Z * float(np.std(lost)) / math.sqrt(len(paired))


def _draw(found: Findings, spec: ReportSpec, now: float) -> Any:
    """Import Evidently, which is heavy and noisy, and let it draw; returns its snapshot."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from monitoring.report_page import draw

            return draw(found, spec, now)
    finally:
        root.setLevel(level)


def agreement_of(rows: pd.DataFrame) -> float | None:
    paired = rows[[PREDICTION, FULL]].dropna()
    return float((paired[PREDICTION] == paired[FULL]).mean()) if len(paired) else None


def accuracies_of(rows: pd.DataFrame) -> tuple[float | None, float | None, float | None]:
    """The candidate's accuracy on labelled rows; full precision's and the drop where both answered."""
    labelled = rows[rows[LABEL].notna() & rows[PREDICTION].notna()]
    if labelled.empty:
        return None, None, None
    accuracy = float((labelled[PREDICTION] == labelled[LABEL]).mean())
    paired = labelled[labelled[FULL].notna()]
    if paired.empty:
        return accuracy, None, None
    full = float((paired[FULL] == paired[LABEL]).mean())
    return accuracy, full, full - float((paired[PREDICTION] == paired[LABEL]).mean())


def _summarise(found: Findings, spec: ReportSpec, snapshot: Any, now: float) -> ReportSummary:
    accuracy, accuracy_full, drop = accuracies_of(found.current)
    tests = snapshot.tests_results
    by_status: dict[str, list[str]] = {}
    for test in tests:
        told = f"{test.name}: {test.description}" if test.id == "drift" else str(test.description)
        by_status.setdefault(str(test.status.value), []).append(told)
    return ReportSummary(
        status="ok",
        workload=spec.workload,
        rollout_id=spec.rollout_id,
        candidate=spec.candidate,
        created_at=now,
        rows=len(found.current),
        labelled_rows=found.labelled,
        reference_rows=len(found.reference),
        drift_score=found.drift.share if found.drift.columns else None,
        drifted_columns=tuple(c.column for c in found.drift.columns if c.drifted),
        column_drift=found.drift.scores(),
        prediction_drift=found.drift.prediction.score if found.drift.prediction else None,
        accuracy=accuracy,
        accuracy_full=accuracy_full,
        accuracy_drop=drop,
        agreement=agreement_of(found.current),
        fairness_gap={a: _by_name(f.values) for a, f in found.fairness.items()},
        fairness_gap_full={a: _by_name(f.full) for a, f in found.fairness.items()},
        worst_group={a: f.worst_group for a, f in found.fairness.items() if f.worst_group is not None},
        lost=found.errors.overall.lost if found.errors.overall else None,
        won=found.errors.overall.won if found.errors.overall else None,
        lost_most=found.errors.worst.told() if found.errors.worst else None,
        tests_passed=len(by_status.get("SUCCESS", ())),
        tests_failed=len(by_status.get("FAIL", ())) + len(by_status.get("ERROR", ())),
        tests_warned=len(by_status.get("WARNING", ())),
        failed=(*by_status.get("FAIL", ()), *by_status.get("ERROR", ())),
        warned=tuple(by_status.get("WARNING", ())),
        notes=found.notes,
    )


def _write(
    summary: ReportSummary,
    found: Findings,
    snapshot: Any,
    *,
    keep: int,
    out_dir: Path,
    started: float,
) -> ReportSummary:
    out_dir.mkdir(parents=True, exist_ok=True)
    stem = _stem(summary)
    html, data = out_dir / f"{stem}.html", out_dir / f"{stem}.json"
    page = _inert(snapshot.get_html_str(as_iframe=False))
    _write_atomically(html, page)
    summary = replace(summary, html=str(html), json=str(data), seconds=round(time.monotonic() - started, 3))
    body = {
        "format": 1,
        "summary": summary.as_dict(),
        "drift": found.drift.as_dict(),
        "fairness": {a: f.as_dict() for a, f in found.fairness.items()},
        "errors": found.errors.as_dict(),
        "evidently": json.loads(snapshot.json()),
    }
    _write_atomically(data, json.dumps(_plain(body), allow_nan=False, indent=1))
    _prune(out_dir, keep)
    return summary


def _stem(of: ReportSummary) -> str:
    """Names sort by time."""
    when = datetime.fromtimestamp(of.created_at, UTC).strftime("%Y%m%dT%H%M%S.%f")[:-3]
    parts = ["report", when, of.workload, of.rollout_id]
    return "-".join(re.sub(r"[^A-Za-z0-9._=-]+", "_", p) for p in parts if p)


def _write_atomically(path: Path, text: str) -> None:
    """A reader sees the whole file or none. It is its owner's alone: examples in it are users' records."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".report-", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _prune(out_dir: Path, keep: int) -> None:
    stems = sorted(
        {p.stem for p in out_dir.glob("report-*.json")} | {p.stem for p in out_dir.glob("report-*.html")}
    )
    for stem in stems[: max(0, len(stems) - keep)] if keep > 0 else []:
        for suffix in (".html", ".json"):
            (out_dir / f"{stem}{suffix}").unlink(missing_ok=True)
    for left in out_dir.glob(".report-*.tmp"):  # of a job that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                left.unlink()


def _by_name(figures: Mapping[MetricName, float]) -> dict[str, float]:
    return {str(name): value for name, value in figures.items()}


def _plain(value: Any) -> Any:
    """JSON without NaN: what is not a number becomes null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
