"""The Monitor's loops: how often they run, and what a report costs the next one."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from monitoring.report import ReportError, ReportSummary
from services import monitor as module
from services.monitor import Monitor, _Loop


def rounds(asked: float | None, seconds: float = 0.3) -> int:
    """How often a loop of 0.01 s runs its work, which asks for a pause."""
    times: list[float] = []

    def work() -> float | None:
        times.append(time.monotonic())
        return asked

    loop = _Loop("test", work, 0.01)
    loop.start()
    threading.Event().wait(seconds)
    loop.stop()
    loop.join(2.0)
    return len(times)


def test_a_loop_runs_once_in_an_interval() -> None:
    assert rounds(None) > 3


def test_a_loop_waits_longer_when_its_work_asks_for_it() -> None:
    assert rounds(60.0) == 1


def summary(cpu_seconds: float) -> ReportSummary:
    return ReportSummary("not_enough_rows", "w", "r", "c", 0.0, 0, 0, 0, cpu_seconds=cpu_seconds)


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Monitor without its services, whose rollout has 5 pairs."""
    monkeypatch.setattr(module, "report_job_for", lambda *_: "job")
    made = object.__new__(Monitor.inner)
    made._last = SimpleNamespace(rollout=SimpleNamespace(id="r"), leader=True)
    made._ledger = SimpleNamespace(cursor=lambda _: SimpleNamespace(answered=5))
    made._settings = SimpleNamespace(report_interval=60.0)
    made._workload = made._reported = None
    return made


@pytest.mark.parametrize(("cost", "wait"), [(1.0, 60.0), (9.0, 180.0)])
def test_what_a_report_costs_says_when_the_next_one_may_start(monitor: Any, cost: float, wait: float) -> None:
    monitor._draw = lambda _: summary(cost)
    assert monitor._report() == pytest.approx(wait)


def test_a_report_whose_process_was_lost_is_paid_for_by_its_time(
    monitor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 400.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monitor._draw = lambda _: None
    assert monitor._report() == pytest.approx(300.0 / 0.05)
    assert monitor._reported is None


def test_pairs_that_a_report_has_seen_are_not_reported_again(monitor: Any) -> None:
    drawn: list[str] = []

    def draw(job: str) -> ReportSummary:
        drawn.append(job)
        return summary(1.0)

    monitor._draw = draw
    monitor._report()
    assert monitor._report() is None
    assert drawn == ["job"]


def test_a_report_that_cannot_be_made_is_tried_again(monitor: Any) -> None:
    def draw(job: str) -> ReportSummary:
        raise ReportError("there are no reference rows")

    monitor._draw = draw
    assert monitor._report() is None
    assert monitor._reported is None
