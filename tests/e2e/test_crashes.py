"""kill -9 of every kind of process in mid-rollout, under load, on a server of two gateway workers."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.server import Server, Traffic, running, until

pytestmark = pytest.mark.e2e

# Slow enough to be in the middle of things when something dies, and nothing but an operator ends it.
MIDWAY: dict[str, Any] = {"steps": [0, 50, 90], "step_min_seconds": 3600, "label_deadline_s": 3600}


@pytest.fixture(scope="module")
def _server(store: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(store, tmp_path_factory.mktemp("crashes"), workers=2) as server:
        yield server


def begin(server: Server, variant: str = "worse", **policy: Any) -> str:
    """A rollout that stands at half of the traffic until somebody ends it."""
    blunt = {name: {"margin": 0.5} for name in ("accuracy_drop", "group_harm", "class_harm")}
    rollout_id = str(server.rollout(variant, **{**MIDWAY, "guardrails": blunt, **policy})["id"])
    server.wait_state(rollout_id, "shadowing")
    with server.client() as client:
        client.verb(rollout_id, "promote")
    server.wait_effect()
    return rollout_id


def ready(server: Server) -> bool:
    return httpx.get(server.url + "/readyz", timeout=2.0).status_code == 200


def check_books(server: Server, rollout_id: str, traffic: Traffic) -> None:
    """Nothing that was acknowledged is lost, and nothing is counted twice."""
    path = f"file:{server.home / 'points.ledger.db'}?mode=ro"
    with contextlib.closing(sqlite3.connect(path, uri=True, isolation_level=None)) as db:

        def one(query: str) -> int:
            return int(db.execute(query, {"id": rollout_id}).fetchone()[0] or 0)

        def settled() -> bool:
            if db.in_transaction:
                db.execute("ROLLBACK")
            db.execute("BEGIN")  # one view of everything, however the server goes on
            counted = one("SELECT json_extract(body, '$.answered') FROM cursors WHERE rollout_id = :id")
            return 0 < counted == one("SELECT count(*) FROM pairs WHERE rollout_id = :id")

        until(settled, "every pair is counted")
        labels = set(db.execute("SELECT request_id, idx FROM labels"))
        assert traffic.acknowledged
        assert traffic.acknowledged <= labels, "an acknowledged label is lost"

        pairs = one("SELECT count(*) FROM pairs WHERE rollout_id = :id")
        distinct = "SELECT count(*) FROM (SELECT DISTINCT request_id, idx FROM pairs WHERE rollout_id = :id)"
        assert pairs == one(distinct)
        total = "SELECT sum(n) FROM totals WHERE rollout_id = :id AND grp = '' AND guardrail = "
        resolved = one("SELECT json_extract(body, '$.resolved') FROM cursors WHERE rollout_id = :id")
        assert one(total + "'disagreement'") == pairs
        assert one(total + "'accuracy_drop'") == resolved
        # The buckets add up to the totals, for every guardrail.
        for guardrail in ("disagreement", "accuracy_drop", "treatment_errors", "requests", "latency_p95"):
            where = f"FROM {{}} WHERE rollout_id = :id AND guardrail = '{guardrail}'"
            assert one("SELECT sum(n) " + where.format("totals")) == one(
                "SELECT sum(n) " + where.format("tallies")
            )
        requests = "SELECT sum(n) FROM totals WHERE rollout_id = :id AND guardrail = 'requests'"
        assert one(requests) <= traffic.requests, "a request is counted twice"


def test_a_killed_shadow_costs_no_request_and_no_pair_that_fits_the_queue(server: Server) -> None:
    with Traffic(server) as traffic:
        rollout_id = begin(server)
        traffic.wait(50)
        killed = server.kill_one("Shadow")
        for _ in range(10):
            assert ready(server), "a dead shadow takes the gateway down with it"
            traffic.wait(5)
        until(lambda: server.pids("Shadow") not in ([], [killed]), "the shadow runs again")
        before = server.status(rollout_id)["pairs"]["pairs"]
        until(
            lambda: server.status(rollout_id)["pairs"]["pairs"] > before + 50, "pairs flow again", pause=0.2
        )
    assert set(traffic.statuses) == {200}
    assert traffic.errors == []
    assert server.status(rollout_id)["weight"] == 50
    check_books(server, rollout_id, traffic)
    metrics = server.metrics()
    assert metrics['trimtab_shadow_shed_total{outcome="full"}'] == 0
    assert metrics['trimtab_shadow_shed_total{outcome="failed"}'] == 0


def test_a_killed_monitor_costs_nothing_and_decisions_go_on(server: Server) -> None:
    with Traffic(server, records=2) as traffic:
        # The margins of production: it has to be rolled back, by whichever monitor lives then.
        rollout_id = begin(server, "worse")
        with server.client() as client:
            client.verb(rollout_id, "pause", reason="the monitor is about to die")
        killed = server.kill_one("Monitor")
        for _ in range(10):
            assert ready(server), "a dead monitor takes the gateway down with it"
            traffic.wait(5)
        with server.client() as client:
            # A dead monitor does not stand in an operator's way.
            assert client.verb(rollout_id, "resume")["state"] == "step"
        until(lambda: server.pids("Monitor") not in ([], [killed]), "the monitor runs again")
        before = server.status(rollout_id)["pairs"]["pairs"]
        until(
            lambda: server.status(rollout_id)["pairs"]["pairs"] > before + 50,
            "pairs are judged again",
            pause=0.2,
        )
    assert set(traffic.statuses) == {200}
    assert traffic.errors == []
    check_books(server, rollout_id, traffic)


def test_a_killed_worker_costs_what_it_held_and_the_new_one_has_the_split(server: Server) -> None:
    threads = 4
    with Traffic(server, threads=threads, rate=200) as traffic:
        rollout_id = begin(server)
        traffic.wait(100)
        killed = server.kill_one("Gateway")
        at = time.time()
        until(
            lambda: killed not in server.pids("Gateway") and len(server.pids("Gateway")) == 2,
            "two workers again",
        )
        server.wait_effect()
        seen = len(traffic.arms)
        traffic.wait(300)
    assert set(traffic.statuses) == {200}
    # A client holds one connection to one worker: at most one request each was in that worker, and at most one
    # more had been sent into its closing connection.
    assert len(traffic.errors) <= 2 * threads, traffic.errors
    assert all(error_at - at < 5 for error_at, _ in traffic.errors), traffic.errors

    def resident() -> list[float]:
        found = server.metrics().items()
        return [n for name, n in found if name.startswith("trimtab_resident") and 'service="gateway"' in name]

    until(lambda: sum(map(bool, resident())) == 2, "the dead worker is out of the sums", pause=0.5)
    after = [arm for _, arm in traffic.arms[seen:]]
    assert 0.35 < after.count("treatment") / len(after) < 0.65
    check_books(server, rollout_id, traffic)


def test_a_rollback_survives_the_death_of_everything(server: Server) -> None:
    rollout_id = begin(server, "same")
    with server.client() as client:
        client.verb(rollout_id, "rollback", reason="enough")
    server.kill()
    server.start()
    status = server.status(rollout_id)
    assert (status["state"], status["weight"], status["reason"]) == ("rolled_back", 0, "enough")
    with Traffic(server) as traffic:
        traffic.wait(100)
    assert traffic.by_arm == {"control": traffic.statuses[200]}
    assert set(traffic.statuses) == {200}


def test_the_split_in_mid_rollout_survives_the_death_of_everything(server: Server) -> None:
    with Traffic(server) as traffic:
        rollout_id = begin(server, "same")
        traffic.wait(100)
        labelled = len(traffic.acknowledged)
        until(lambda: len(traffic.acknowledged) > labelled, "labels flow")
        server.kill()
        server.start()
        seen = len(traffic.arms)
        traffic.wait(200)
    after = [arm for _, arm in traffic.arms[seen:]]
    assert 0.3 < after.count("treatment") / len(after) < 0.7
    assert set(traffic.statuses) <= {200, 503}
    check_books(server, rollout_id, traffic)
