"""What the ledger does when things go wrong: it says so in one kind of error, and loses and doubles nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from monitoring.controller import Controller
from monitoring.errors import LedgerTooNew, LedgerUnavailable
from monitoring.ledger import LabelRow, Ledger, PairRow, RewardRow, WorkerBeat
from monitoring.policy import Policy, parse_policy
from monitoring.records import Rollout
from monitoring.tally import TallyKey
from tests.monitoring.judgement import START


def _start(ledger: Ledger, policy: Policy = Policy()) -> Rollout:  # noqa: B008  # frozen
    return ledger.create_rollout(
        workload="toy", control="full", treatment="small", policy=policy, actor="ada", now=START
    )


def _row(rollout_id: str, request: str, text: str = "") -> PairRow:
    return PairRow(rollout_id, request, 0, "control", 1, 1, 0.9, 0.9, {}, {"text": text}, START)


WRITES: list[Callable[[Ledger], object]] = [
    lambda ledger: ledger.record_pairs([_row("toy-1", "q1")]),
    lambda ledger: ledger.record_labels([LabelRow("q1", 0, 1, START)]),
    lambda ledger: ledger.record_feedback([], [RewardRow("q1", 1.0, START)]),
    lambda ledger: ledger.add_counts("g1", 1, {("toy-1", TallyKey("requests", "control", 1)): {0: 1}}),
    lambda ledger: ledger.heartbeat(WorkerBeat("g1", "Gateway", 1, 1, START, (), None, START)),
    lambda ledger: ledger.acquire_lease("a", 1, START),
    _start,
]


def test_a_file_that_vanishes_while_it_is_opened_is_not_made_again(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    _start(ledger)
    ledger.close()
    connect = sqlite3.connect

    def too_late(*args: object, **kwargs: object) -> sqlite3.Connection:
        if ledger.path.exists():
            ledger.path.rename(ledger.path.with_name("aside"))
        return connect(*args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(sqlite3, "connect", too_late)
    with pytest.raises(LedgerUnavailable):
        ledger.rollouts()
    assert not ledger.path.exists()


@pytest.mark.parametrize("write", WRITES)
def test_a_locked_ledger_is_unavailable_within_the_time_out_and_can_be_read(
    ledger: Ledger, write: Callable[[Ledger], object]
) -> None:
    ledger.revision()
    other = sqlite3.connect(ledger.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    with pytest.raises(LedgerUnavailable, match="locked"):
        write(ledger)
    assert 0.4 <= time.monotonic() - began < 2
    assert ledger.revision() == 0
    other.close()
    write(ledger)


@pytest.mark.parametrize("write", WRITES)
def test_a_file_that_is_no_ledger_is_unavailable(tmp_path: Path, write: Callable[[Ledger], object]) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"this is not a database, and long enough to be taken for one" * 100)
    with pytest.raises(LedgerUnavailable, match="not a database"):
        write(Ledger(path))


def test_a_ledger_damaged_while_it_is_used_is_unavailable(ledger: Ledger) -> None:
    rollout = _start(ledger)
    ledger.record_pairs([_row(rollout.id, f"q{i}", "x" * 500) for i in range(200)])
    ledger.close()
    size = ledger.path.stat().st_size
    with ledger.path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))
    with pytest.raises(LedgerUnavailable):
        ledger.recent_pairs(rollout.id)


def test_a_path_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerUnavailable):
        Ledger(tmp_path / "file" / "ledger.db").route()


def test_a_ledger_whose_file_is_gone_is_unavailable_and_not_made_anew(ledger: Ledger, tmp_path: Path) -> None:
    rollout = _start(ledger)
    away = tmp_path / "away"
    away.mkdir()
    for file in tmp_path.glob("ledger.db*"):
        file.rename(away / file.name)
    with pytest.raises(LedgerUnavailable, match="gone"):
        ledger.route()
    assert not ledger.path.exists()
    for file in away.iterdir():
        file.rename(tmp_path / file.name)
    assert ledger.route().rollout_id == rollout.id


def test_a_full_disk_is_unavailable_and_leaves_what_was_there(ledger: Ledger) -> None:
    rollout = _start(ledger)
    ledger.record_pairs([_row(rollout.id, "q1")])
    with ledger._store.reading() as db:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
    ledger._store._connection().execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(LedgerUnavailable, match="full"):
        ledger.record_pairs([_row(rollout.id, f"r{i}", "x" * 2000) for i in range(50)])
    assert [p.request_id for p in ledger.recent_pairs(rollout.id)] == ["q1"]


def test_a_read_only_disk_is_unavailable_for_writing_and_can_be_read(ledger: Ledger) -> None:
    _start(ledger)
    ledger._store._connection().execute("PRAGMA query_only = ON")
    with pytest.raises(LedgerUnavailable, match="readonly"):
        WRITES[0](ledger)
    assert ledger.revision() == 1


def test_a_ledger_of_a_newer_version_is_left_alone(ledger: Ledger) -> None:
    ledger.revision()
    ledger.close()
    db = sqlite3.connect(ledger.path)
    db.execute("UPDATE meta SET value = 99 WHERE key = 'schema'")
    db.commit()
    db.close()
    with pytest.raises(LedgerTooNew, match="format 99"):
        ledger.revision()


def test_a_controller_reports_an_unavailable_ledger_and_recovers(ledger: Ledger) -> None:
    _start(ledger)
    controller = Controller(ledger, clock=lambda: START)
    other = sqlite3.connect(ledger.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert "locked" in (controller.step().error or "")
    other.close()
    result = controller.step()
    assert result.error is None
    assert result.rollout is not None


# Death in the middle ---------------------------------------------------------------------------------------

_HALF_WRITTEN = """
import sys, time
from monitoring.ledger import Ledger
ledger = Ledger(sys.argv[1])
with ledger._store.writing() as db:
    db.execute("UPDATE meta SET value = 77 WHERE key = 'revision'")
    db.execute("INSERT INTO labels (request_id, idx, label, at) VALUES ('half', 0, 1, 0)")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_writer_killed_in_the_middle_leaves_nothing_behind_and_blocks_nobody(ledger: Ledger) -> None:
    ledger.record_labels([LabelRow("whole", 0, 1, START)])
    command = [sys.executable, "-c", _HALF_WRITTEN, str(ledger.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        writer.send_signal(signal.SIGKILL)
    assert ledger.revision() == 0
    assert ledger.record_labels([LabelRow("half", 0, 0, START), LabelRow("whole", 0, 1, START)]).accepted == 1


def _judge(path: Path) -> None:
    controller = Controller(Ledger(path, busy_timeout=10))
    while True:
        controller.step()


def test_a_controller_killed_again_and_again_counts_every_pair_once(ledger: Ledger) -> None:
    now = time.time()
    groups, arms = {"DIS": "1"}, ("control", "treatment")
    # Nobody is waited for, so all rewards are 0.
    rollout = _start(ledger, parse_policy({"guardrails": {"reward": {"enabled": True, "deadline_s": 0}}}))
    ledger.apply(rollout, _shadowing(rollout, now), None)
    spawn = multiprocessing.get_context("spawn")
    sent = 0
    for _ in range(2):
        process = spawn.Process(target=_judge, args=(ledger.path,))
        process.start()
        before, give_up = ledger.cursor(rollout.id).answered, time.monotonic() + 30
        while ledger.cursor(rollout.id).answered < before + 1000:  # It is at work now: kill it amid more.
            assert time.monotonic() < give_up
            rows = [
                PairRow(rollout.id, f"q{sent + i}", 0, arms[i % 2], 1, 1, 0.9, 0.9, groups, {}, now)
                for i in range(300)
            ]
            ledger.record_pairs(rows)
            sent += 300
            time.sleep(0.02)
        process.kill()
        process.join()
    last = Controller(ledger, clock=lambda: now + 60)
    while last.step().more:
        pass
    cursor = ledger.cursor(rollout.id)
    totals = ledger.totals(rollout.id, 0)
    assert (cursor.answered, cursor.resolved) == (sent, sent)
    assert totals["accuracy_drop", ""] == totals["disagreement", ""] == {0: sent}
    assert totals["reward", ""] == {0: sent // 2}


def _shadowing(rollout: Rollout, now: float) -> Rollout:
    policy = rollout.policy.model_copy(update={"step_min_pairs": 10**6})
    return replace(rollout, state="shadowing", policy=policy, step_at=now)
