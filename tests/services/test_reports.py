"""What a report on a rollout gets, and how long the next one waits."""

from __future__ import annotations

import pytest

from compression.variant import Variant
from compression.workload import Workload
from monitoring.ledger import Ledger
from monitoring.policy import Policy
from services.reports import CPU_SHARE, next_wait, report_job_for
from services.settings import Settings


@pytest.mark.parametrize("cost", [0.0, 0.5, 3.0])
def test_a_report_that_can_be_paid_for_comes_once_in_a_period(cost: float) -> None:
    assert next_wait(60.0, cost) == 60.0


@pytest.mark.parametrize("cost", [3.1, 20.0, 300.0])
def test_a_dearer_report_makes_the_next_one_wait_until_the_share_is_kept(cost: float) -> None:
    wait = next_wait(60.0, cost)
    assert wait > 60.0
    assert cost / wait == pytest.approx(CPU_SHARE)


def test_another_share_can_be_asked_for() -> None:
    assert next_wait(1.0, 2.0, share=0.5) == 4.0


def test_reports_go_where_the_user_interface_looks(
    workload: Workload, variants: dict[str, Variant], settings: Settings, ledger: Ledger
) -> None:
    rollout = ledger.create_rollout(
        workload="points",
        control=variants["full"].tag,
        treatment=variants["same"].tag,
        policy=Policy(),
        actor="ada",
        now=0.0,
    )
    job = report_job_for(workload, rollout, settings)
    assert job.workspace == settings.workspace
    assert job.out_dir == settings.workspace.parent
    assert job.reference.is_file()
