"""The ledger goes away under load: predictions go on by the last split, and it all mends itself."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests import models
from tests.e2e.server import Server, Traffic, running, until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def server(store: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(store, tmp_path_factory.mktemp("outage")) as server:
        yield server


@contextmanager
def locked(server: Server) -> Iterator[None]:
    """Another process's exclusive lock: nobody can write."""
    lock = sqlite3.connect(server.home / "points.ledger.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        lock.execute("ROLLBACK")
        lock.close()


@contextmanager
def garbage(server: Server) -> Iterator[None]:
    """Another file in its place, that is no database."""
    path = server.home / "points.ledger.db"
    with _aside(server):
        path.write_bytes(b"this is not a database, whatever its name says " * 100)
        yield


@contextmanager
def gone(server: Server) -> Iterator[None]:
    """The file is not there. A new, empty one would forget every decision, so none may be made."""
    with _aside(server):
        yield
        assert not (server.home / "points.ledger.db").exists()


@contextmanager
def _aside(server: Server) -> Iterator[None]:
    names = [path.name for path in server.home.glob("points.ledger.db*")]
    for name in names:
        (server.home / name).rename(server.home / f"aside-{name}")
    try:
        yield
    finally:
        for path in server.home.glob("points.ledger.db*"):
            path.unlink()
        for name in names:
            (server.home / f"aside-{name}").rename(server.home / name)


@pytest.mark.parametrize("outage", [locked, garbage, gone])
def test_predictions_go_on_by_the_last_split_and_feedback_asks_to_come_again(
    server: Server, outage: Callable[[Server], Any]
) -> None:
    server.clear()
    rollout = server.promoted("same")
    with httpx.Client(base_url=server.url, timeout=10) as http, Traffic(server, label=False) as traffic:
        traffic.wait(50)
        record, truth = next(models.points(1))
        request_id = http.post("/predict", json={"records": [record]}).json()["request_id"]
        label = {"feedback": [{"request_id": request_id, "label": truth}]}
        with outage(server):
            reply = until(
                lambda: reply if (reply := http.post("/feedback", json=label)).status_code != 200 else None,
                "feedback is not acknowledged",
            )
            assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
            assert "nothing was stored" in reply.json()["error"]
            seen = len(traffic.arms)
            traffic.wait(300)
            assert http.get("/readyz").status_code == 200
        during = [arm for _, arm in traffic.arms[seen:]]
        assert during.count("treatment") / len(during) > 0.75

        acknowledged = until(
            lambda: reply if (reply := http.post("/feedback", json=label)).status_code == 200 else None,
            "feedback is taken again",
        )
        assert acknowledged.json()["accepted"] + acknowledged.json()["duplicates"] == 1
        # The controller judges again, and an operator is heard in every worker.
        before = server.status(rollout["id"])["pairs"]["pairs"]
        until(
            lambda: server.status(rollout["id"])["pairs"]["pairs"] > before,
            "pairs are judged again",
            pause=0.2,
        )
    server.clear()
    reply = httpx.post(server.url + "/predict", json={"records": [record]})
    assert reply.headers["X-Trimtab-Arm"] == "control"
    assert set(traffic.statuses) == {200}
    assert traffic.errors == []


def test_counts_of_the_time_without_a_ledger_are_not_lost(server: Server) -> None:
    server.clear()
    rollout = server.promoted("same")
    record, _ = next(models.points(1))
    with httpx.Client(base_url=server.url) as http, locked(server):
        for _ in range(50):
            assert http.post("/predict", json={"records": [record]}).status_code == 200

    def counted() -> bool:
        totals = server.ledger.totals(rollout["id"], 1)
        return sum(totals.get(("requests", arm), {}).get(0, 0) for arm in ("control", "treatment")) == 50

    until(counted, "50 requests are counted, once")
    until(
        lambda: server.status(rollout["id"])["pairs"]["pairs"] == 50, "50 pairs are counted, once", pause=0.2
    )
    server.clear()
