"""`trimtab report` and `trimtab guardrails`.

This package knows no workloads, so whoever composes the command line hands in how a workload's name leads to
its ledger and to its reference rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monitoring.errors import RolloutNotFound
from monitoring.rollout import Rollout
from monitoring.simulate_cli import guardrails_app

if TYPE_CHECKING:
    from monitoring.report import ReportJob, ReportSummary

EXIT_FAILED_TESTS = 1
EXIT_NOT_ENOUGH_ROWS = 4


@dataclass(frozen=True, slots=True)
class ReportContext:
    """Where one workload's rollouts are, and how to report on one of them."""

    workload: str
    ledger: Path
    job_for: Callable[[Rollout], ReportJob]


def register(app: typer.Typer, resolve: Callable[[str], ReportContext]) -> None:
    """Add this package's commands; `resolve` turns the WORKLOAD argument into a context."""
    app.add_typer(guardrails_app, name="guardrails")

    @app.command("report")
    def report(
        workload: Annotated[str, typer.Argument(help="A workload folder, or module:attribute.")],
        rollout: Annotated[
            str, typer.Option("--rollout", help="A rollout's id; else the active one, else the newest.")
        ] = "",
        out: Annotated[
            Path | None, typer.Option("--out", help="Folder for the report; else the Monitor's own.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
        strict: Annotated[
            bool, typer.Option("--strict", help=f"Exit {EXIT_FAILED_TESTS} when a test of the report fails.")
        ] = False,
    ) -> None:
        """Drift, quality and fairness of a rollout's newest traffic, as HTML and JSON.

        Exit codes: 0 a report was written, 2 it cannot be made, 4 there is not enough traffic yet.
        """
        context = resolve(workload)
        job = context.job_for(find_rollout(context, rollout))
        if out is not None:
            job = replace(job, out_dir=out)
        print("loading Evidently and drawing the report (some 10 s) ...", file=sys.stderr, flush=True)
        from monitoring.report import report_job

        summary = report_job(job)
        print(json.dumps(summary.as_dict(), indent=2) if as_json else describe(summary))
        if summary.status != "ok":
            raise typer.Exit(EXIT_NOT_ENOUGH_ROWS)
        if strict and summary.tests_failed:
            raise typer.Exit(EXIT_FAILED_TESTS)


def find_rollout(context: ReportContext, rollout_id: str = "") -> Rollout:
    """The workload's rollout asked for; without one its active one, else its newest."""
    from monitoring.ledger import Ledger

    if not context.ledger.is_file():
        raise RolloutNotFound(f"there is no ledger at {context.ledger}: serve {context.workload} first")
    ledger = Ledger(context.ledger)
    if rollout_id:
        found = ledger.rollout(rollout_id)
        if found.workload != context.workload:
            raise RolloutNotFound(f"rollout {rollout_id} is of {found.workload}, not of {context.workload}")
        return found
    ours = [r for r in ledger.rollouts() if r.workload == context.workload]
    if not ours:
        raise RolloutNotFound(f"{context.workload} has had no rollout yet, so there is nothing to report on")
    return next((r for r in ours if r.active), ours[0])


def describe(summary: ReportSummary) -> str:
    """The summary for people, a few lines."""
    if summary.status != "ok":
        return "\n".join(summary.notes)
    rows = f"{summary.rows:,} rows ({summary.labelled_rows:,} labelled)"
    lines = [f"{summary.workload}: {summary.candidate}, {rows}, {summary.reference_rows:,} reference rows"]
    if summary.accuracy is not None:
        line = f"accuracy {summary.accuracy:.3f}"
        if summary.accuracy_full is not None and summary.accuracy_drop is not None:
            line += f", full precision {summary.accuracy_full:.3f}, drop {summary.accuracy_drop:+.3f}"
        lines.append(line)
    if summary.drift_score is not None:
        named = f": {', '.join(summary.drifted_columns)}" if summary.drifted_columns else ""
        lines.append(f"drifted columns {summary.drift_score:.0%}{named}")
    if summary.lost is not None:
        most = f"; most by {summary.lost_most}" if summary.lost_most else ""
        lines.append(f"lost by compression: {summary.lost:,} rows, won {summary.won:,}{most}")
    for attribute, group in summary.worst_group.items():
        drop = summary.fairness_gap[attribute]["worst_group_drop"]
        lines.append(f"lost most by {attribute}: {attribute}={group}, {100 * drop:z.2f} pt")
    passed, failed, warned = summary.tests_passed, summary.tests_failed, summary.tests_warned
    lines.append(f"tests: {passed} passed, {failed} failed, {warned} warnings")
    lines += [f"  FAILED {told}" for told in summary.failed]
    lines += [f"wrote {summary.html}", f"wrote {summary.json}"]
    return "\n".join(lines)
