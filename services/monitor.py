"""The Monitor service: the controller's loop, alerts, and Evidently reports in a child process.

Deciding, telling and drawing run apart from each other, so that neither a slow webhook nor a heavy report can
delay a rollback.
"""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

import bentoml

from compression.errors import CompressionError
from compression.workload import load_workload
from monitoring.errors import LedgerUnavailable
from monitoring.ledger import Ledger
from services.process import ProcessSampler, speak
from services.reports import begin_report_process, next_wait, report_job_for
from services.self_test import before_traffic
from services.settings import Settings

if TYPE_CHECKING:
    from monitoring.report import ReportJob, ReportSummary

__all__ = ["Monitor"]

log = logging.getLogger("trimtab.monitor")

_REPORT_TIMEOUT_SECONDS = 300.0


class _Loop:
    """A daemon thread that calls a function again and again, and outlives whatever it raises.

    The function may return how many seconds are to pass from its start to the next one's, if more than the interval.
    """

    def __init__(self, name: str, work: Callable[[], float | None], interval: float) -> None:
        self._work = work
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stop.is_set():
            started, wait = time.monotonic(), self._interval
            try:
                wait = max(wait, self._work() or 0.0)
            except LedgerUnavailable as error:
                log.warning("%s waits: %s", self._thread.name, error)
            except Exception:  # the next round may succeed, and nobody else would take over
                log.exception("%s failed", self._thread.name)
            self._stop.wait(max(0.0, wait - (time.monotonic() - started)))


@bentoml.service(name="Monitor", workers=1, traffic={"timeout": 30}, logging={"access": {"enabled": False}})
class Monitor:
    """Decides on rollouts. Its death leaves the split as it is; another start takes up where it was."""

    def __init__(self) -> None:
        # Imported here, when BentoML has told this process where its metrics files are.
        from monitoring import metrics
        from monitoring.alerts import Alerter
        from monitoring.controller import Controller, StepResult

        self._metrics = metrics
        self._settings = Settings.from_env()
        self._workload = load_workload(self._settings.workload)
        self._ledger = Ledger(self._settings.ledger_path(self._workload.name))
        self._alerter = Alerter(self._ledger)
        self._controller = Controller(
            self._ledger, on_decision=self._alerter.wake, publish=metrics.publish, self_test=before_traffic
        )
        self._last = StepResult(at=0.0)
        self._reporter: ProcessPoolExecutor | None = None
        self._reported: tuple[str, int] | None = None
        self._stopping = False
        self._loops = [
            _Loop("controller", self._control, self._settings.control_interval),
            _Loop("reports", self._report, self._settings.report_interval),
        ]
        self._process = ProcessSampler("monitor")

    @bentoml.on_startup
    def start(self) -> None:
        speak()
        self._alerter.start()
        for loop in self._loops:
            loop.start()
        self._process.start()

    @bentoml.on_shutdown
    def stop(self) -> None:
        self._stopping = True
        self._process.stop()
        for loop in self._loops:
            loop.stop()
        if self._reporter is not None:
            self._end_reporter(self._reporter)
        for loop in self._loops:
            loop.join(2.0)
        self._alerter.stop()
        self._controller.close()

    def _control(self) -> None:
        while True:
            self._last = self._controller.step()
            if not self._last.more:
                return

    def _report(self) -> float | None:
        """Make a report when there are pairs that no report has seen; returns the seconds until the next may start."""
        rollout = self._last.rollout
        if rollout is None or not self._last.leader:
            return None
        answered = self._ledger.cursor(rollout.id).answered
        if self._reported == (rollout.id, answered):
            return None
        try:
            job = report_job_for(self._workload, rollout, self._settings)
        except CompressionError as error:
            log.warning("no report: %s", error)
            return None
        from monitoring.report import ReportError

        period, started = self._settings.report_interval, time.monotonic()
        try:
            summary = self._draw(job)
        except ReportError as error:
            log.warning("no report: %s", error)
            return None
        if summary is None:
            # What it cost is lost with its process; it cannot have been much more than the time it had.
            return next_wait(period, time.monotonic() - started)
        self._reported = (rollout.id, answered)
        self._publish(summary)
        return next_wait(period, summary.cpu_seconds)

    def _draw(self, job: ReportJob) -> ReportSummary | None:
        """Have the report made in its own process; None when that process was lost."""
        from monitoring.report import report_job

        if self._reporter is None:
            # A process of its own, started afresh: Evidently costs seconds and 300 MB to import, once.
            self._reporter = ProcessPoolExecutor(
                1, mp_context=multiprocessing.get_context("spawn"), initializer=begin_report_process
            )
        try:
            return self._reporter.submit(report_job, job).result(timeout=_REPORT_TIMEOUT_SECONDS)
        except (BrokenProcessPool, TimeoutError) as error:
            if not self._stopping:
                log.warning("the report's process was lost (%r); the next report starts a new one", error)
                self._end_reporter(self._reporter)
                self._reporter = None
            return None

    def _publish(self, summary: ReportSummary) -> None:
        if summary.status != "ok":
            log.info("no report yet: %s", "; ".join(summary.notes))
            return
        for column, score in summary.column_drift.items():
            self._metrics.DRIFT.labels(column).set(score)
        for arm, attributes in (("treatment", summary.fairness_gap), ("control", summary.fairness_gap_full)):
            for attribute, gaps in attributes.items():
                for metric, gap in gaps.items():
                    self._metrics.FAIRNESS_GAP.labels(metric, attribute, arm).set(gap)
        log.info("report %s: %d tests failed", summary.html, summary.tests_failed)

    @staticmethod
    def _end_reporter(reporter: ProcessPoolExecutor) -> None:
        for process in list((reporter._processes or {}).values()):
            process.terminate()
        reporter.shutdown(wait=False, cancel_futures=True)
