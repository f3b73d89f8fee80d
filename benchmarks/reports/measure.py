"""The report job again and again in one process, as the Monitor's child runs it, on pairs of the employment example.

Records, labels and groups are real; the answers are made up, with the rates that full precision and its INT8 variant
have, so that nothing has to be trained. Before every report some new pairs come in, as they would from traffic.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from compression.workload import Split, Workload, load_workload

__all__ = ["GROWTH_LIMIT", "Run", "measure", "summarise"]

_ROOT = Path(__file__).resolve().parents[2]
_WORKLOAD = _ROOT / "examples" / "employment"
ROWS, NEW_ROWS = 5_000, 250
WRONG, FLIPPED = 0.214, 0.002
"""Share of rows that full precision gets wrong, and on which the candidate differs from it."""
SETTLED = 20
"""Reports until memory is looked at: what is kept for good has been allocated by then."""
GROWTH_LIMIT = 0.05
"""Memory counts as flat if it grew by no more than this share since then."""


@dataclass(frozen=True)
class Run:
    """One report: CPU seconds, resident bytes after it, bytes of its page."""

    cpu: float
    resident: int
    page: int


def measure(runs: int, say: Callable[[str], None]) -> list[Run]:
    """Make so many reports in one fresh process; raises ValueError if one of them cannot be made."""
    with tempfile.TemporaryDirectory(prefix="trimtab-reports-") as folder:
        say("writing pairs and reference rows")
        _prepare(Path(folder), runs)
        context = multiprocessing.get_context("spawn")
        found: list[Run] = []
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            for number in range(runs):
                found.append(pool.submit(_one, Path(folder), number).result())
                if number % 10 == 0 or number == runs - 1:
                    last = found[-1]
                    say(f"report {number + 1}: {last.cpu:.2f} CPU s, {last.resident / 1e6:.0f} MB resident")
        return found


def _one(folder: Path, number: int) -> Run:
    """In the measured process: new pairs, then a report."""
    from monitoring.ledger import Ledger
    from monitoring.report import report_job

    job = _job(folder)
    pairs, labels = _pairs(folder, ROWS + number * NEW_ROWS, NEW_ROWS)
    ledger = Ledger(job.ledger)
    ledger.record_pairs(pairs)
    ledger.record_labels(labels)
    summary = report_job(job)
    if summary.status != "ok" or summary.html is None:
        raise ValueError(f"report {number + 1} was not made: {summary.notes}")
    return Run(summary.cpu_seconds, psutil.Process().memory_info().rss, Path(summary.html).stat().st_size)


def _prepare(folder: Path, runs: int) -> None:
    from monitoring.ledger import Ledger
    from monitoring.policy import Policy

    workload = load_workload(_WORKLOAD)
    rows = _rows(workload, "production", ROWS + NEW_ROWS * runs, seed=1)
    rows.to_parquet(folder / "rows.parquet")
    reference = _rows(workload, "validation", ROWS, seed=2).drop(columns="prediction")
    reference = reference.rename(columns={"prediction_full": "prediction"})
    reference.to_parquet(folder / "reference.parquet")
    ledger = Ledger(folder / "ledger.db")
    rollout = ledger.create_rollout(
        workload=workload.name,
        control="employment-full:1",
        treatment="employment-int8:1",
        policy=Policy(),
        actor="benchmark",
        now=0.0,
    )
    (folder / "rollout").write_text(rollout.id)
    pairs, labels = _pairs(folder, 0, ROWS)
    ledger.record_pairs(pairs)
    ledger.record_labels(labels)


def _rows(workload: Workload, split: Any, rows: int, seed: int) -> Any:
    """Records of a split, again from its start where it is too short, with made-up answers of both arms."""
    found: Split = workload.split(split)
    place = np.arange(rows) % len(found.labels)
    records, labels = found.records.iloc[place].reset_index(drop=True), found.labels[place]
    draw = np.random.default_rng(seed)
    full = labels ^ (draw.random(rows) < WRONG)
    groups = [workload.groups(record) for record in Split(records, labels).to_records()]
    told = {"label": labels, "prediction_full": full, "prediction": full ^ (draw.random(rows) < FLIPPED)}
    return records.assign(
        **told, **{f"group_{name}": [group[name] for group in groups] for name in workload.sensitive}
    )


def _pairs(folder: Path, start: int, count: int) -> tuple[list[Any], list[Any]]:
    """Pairs and labels of the prepared rows from `start` on; nine in ten have a label."""
    import pandas as pd

    from monitoring.ledger import LabelRow, PairRow

    rollout_id = (folder / "rollout").read_text()
    rows = pd.read_parquet(folder / "rows.parquet").iloc[start : start + count]
    sensitive = [name.removeprefix("group_") for name in rows.columns if name.startswith("group_")]
    answers = ("label", "prediction", "prediction_full")
    fields = [name for name in rows.columns if not name.startswith("group_") and name not in answers]
    pairs = [
        PairRow(
            rollout_id=rollout_id,
            request_id=f"q{start + i}",
            index=0,
            served_arm="treatment",
            control=int(row["prediction_full"]),
            treatment=int(row["prediction"]),
            control_confidence=0.9,
            treatment_confidence=0.9,
            groups={name: row[f"group_{name}"] for name in sensitive},
            record={name: int(row[name]) for name in fields},
            created_at=float(start + i),
        )
        for i, row in enumerate(rows.to_dict("records"))
    ]
    labels = [
        LabelRow(f"q{start + i}", 0, int(label), float(start + i))
        for i, label in enumerate(rows["label"])
        if i % 10
    ]
    return pairs, labels


def _job(folder: Path) -> Any:
    from monitoring.report import ReportJob, ReportSpec

    workload = load_workload(_WORKLOAD)
    return ReportJob(
        ledger=folder / "ledger.db",
        reference=folder / "reference.parquet",
        out_dir=folder / "reports",
        workspace=folder / "reports" / "workspace",
        limit=ROWS,
        niceness=0,  # on a busy machine it would take hours; CPU seconds are the same
        spec=ReportSpec(
            workload=workload.name,
            classes=workload.classes,
            positive=workload.positive,
            sensitive=workload.sensitive,
            rollout_id=(folder / "rollout").read_text(),
        ),
    )


def summarise(runs: list[Run], period: float) -> list[dict[str, Any]]:
    """The figures beside their goals; `period` is the default number of seconds between two reports."""
    from services.reports import CPU_SHARE, next_wait

    later = np.array([run.cpu for run in runs[1:]] or [runs[0].cpu])
    resident = np.array([run.resident for run in runs]) / 1e6
    low, median, high = np.percentile(later, [5, 50, 95])
    settled = min(SETTLED, len(runs)) - 1
    growth = float(resident[-1] / resident[settled] - 1)
    after = resident[settled:]
    slope = float(np.polyfit(np.arange(len(after)), after, 1)[0]) if len(after) > 1 else 0.0
    wait = next_wait(period, float(median))
    plain, share = float(median) / period, float(median) / wait
    goal = period * CPU_SHARE
    most = f"<= {CPU_SHARE:g}"

    def row(measure: str, value: float, goal: str | None = None, met: bool | None = None) -> dict[str, Any]:
        return {"measure": measure, "value": round(value, 4), "goal": goal, "met": met}

    return [
        row("CPU seconds of a report, median", median, f"<= {goal:g}", bool(median <= goal)),
        row("CPU seconds of a report, 5th percentile", low),
        row("CPU seconds of a report, 95th percentile", high),
        row("CPU seconds of the first report, with the import of Evidently", runs[0].cpu),
        row(f"share of one core at one report in {period:g} s", plain, most, plain <= CPU_SHARE),
        row("seconds from one report to the next", wait),
        row("share of one core with that wait", share, most, share <= CPU_SHARE + 1e-9),
        row(f"resident MB after report {settled + 1}", float(resident[settled])),
        row(f"resident MB after report {len(runs)}", float(resident[-1])),
        row("growth between the two", growth, f"<= {GROWTH_LIMIT:g}", growth <= GROWTH_LIMIT),
        row("slope, kB a report", 1000 * slope),
        row("MB of a page", runs[-1].page / 1e6),
    ]
