"""What a report on a rollout needs, gathered from the workload, the model store and the ledger."""

from __future__ import annotations

import multiprocessing
import os
import threading

from compression.variant import REFERENCE, load_variant
from compression.workload import Workload
from monitoring.records import Rollout
from monitoring.report import ReportJob, ReportSpec
from services.process import give_way, speak
from services.settings import Settings

__all__ = ["CPU_SHARE", "begin_report_process", "next_wait", "report_job_for"]

CPU_SHARE = 0.05
"""Of one core: what reports may use over time, whatever one of them costs."""


def next_wait(period: float, cost: float, share: float = CPU_SHARE) -> float:
    """Seconds from the start of a report to that of the next one, so that reports use at most a share of a core.

    Args:
        period: the wait that was asked for, in seconds.
        cost: CPU seconds of the report.
        share: of one core, more than 0.
    """
    return max(period, cost / share)


def report_job_for(workload: Workload, rollout: Rollout, settings: Settings) -> ReportJob:
    """The job of a child process that reports on a rollout.

    Raises:
        compression.errors.CompressionError: the full-precision variant or its reference rows are missing.
    """
    control = load_variant(rollout.control)
    return ReportJob(
        ledger=settings.ledger_path(workload.name),
        reference=control.asset(REFERENCE),
        out_dir=settings.reports,
        workspace=settings.workspace,
        spec=ReportSpec(
            workload=workload.name,
            classes=workload.classes,
            positive=workload.positive,
            sensitive=workload.sensitive,
            rollout_id=rollout.id,
            candidate=rollout.treatment,
            full=rollout.control,
            accuracy_drop=rollout.policy.guardrails.accuracy_drop.margin,
        ),
    )


def begin_report_process() -> None:
    """Initializer of the report process: give way to whoever serves, and end when the Monitor dies, however it dies."""
    speak()
    give_way()
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
