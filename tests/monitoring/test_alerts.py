"""Alerts are delivered at least once, and nothing waits for them."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from monitoring import alerts
from monitoring.alerts import WEBHOOK_VARIABLE, Alerter
from monitoring.ledger import Ledger
from monitoring.records import Decision
from tests.monitoring.judgement import START, World


class Hook:
    """A webhook that answers with the statuses it is given, then 200."""

    def __init__(self) -> None:
        self.received: list[tuple[dict, str]] = []
        self.statuses: list[int] = []
        self.wait = 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.received.append((body, self.headers["Idempotency-Key"]))
                time.sleep(outer.wait)
                status = outer.statuses.pop(0) if outer.statuses else 200
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", outer.url)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def hook() -> Iterator[Hook]:
    made = Hook()
    yield made
    made.close()


def rolled_back(world: World, **policy: object) -> None:
    world.start(policy)
    world.warm()
    world.order("rollback", "a hunch")


def alerted(ledger: Ledger) -> list[bool]:
    return [d.alerted_at is not None for d in ledger.decisions() if d.to_state == "rolled_back"]


def test_without_a_webhook_the_log_line_is_the_delivery(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    rolled_back(world)
    with caplog.at_level(logging.WARNING, "trimtab.alerts"):
        assert Alerter(world.ledger).deliver() == 1
    line = json.loads(caplog.records[0].message)
    assert (line["event"], line["to_state"], line["reason"]) == ("trimtab.rollout", "rolled_back", "a hunch")
    assert Alerter(world.ledger).deliver() == 0
    assert alerted(world.ledger) == [True]


def test_a_webhook_gets_the_decision_with_a_key_that_never_changes(world: World, hook: Hook) -> None:
    rolled_back(world, alert_webhook=hook.url)
    assert Alerter(world.ledger).deliver() == 1
    body, key = hook.received[0]
    assert body["to_state"] == "rolled_back"
    assert key == body["id"] == f"{world.rollout_id}/{body['seq']}"
    assert "toy-1 rolled_back" in body["text"]


def test_the_environment_names_a_webhook_where_the_policy_does_not(
    world: World, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WEBHOOK_VARIABLE, hook.url)
    rolled_back(world)
    Alerter(world.ledger).deliver()
    assert len(hook.received) == 1


@pytest.mark.parametrize("status", [500, 404, 302])
def test_a_webhook_that_fails_is_called_again_later_and_later_with_the_same_key(
    world: World, hook: Hook, status: int
) -> None:
    rolled_back(world, alert_webhook=hook.url)
    hook.statuses = [status, status]
    alerter = Alerter(world.ledger, clock=lambda: world.now)
    waits = []
    while not alerted(world.ledger)[0]:
        before = world.now
        tried = len(hook.received)
        while len(hook.received) == tried:
            alerter.deliver()
            if len(hook.received) == tried:
                world.now += 0.5
        waits.append(world.now - before)
    assert waits == [0, 1, 2]
    assert len({key for _, key in hook.received}) == 1


def test_a_webhook_that_is_down_does_not_hold_up_other_alerts(world: World, hook: Hook) -> None:
    rolled_back(world, alert_webhook="http://127.0.0.1:9/nobody")
    first = world.rollout_id
    rolled_back(world, alert_webhook=hook.url)
    assert Alerter(world.ledger).deliver() == 1
    assert [body["rollout_id"] for body, _ in hook.received] == [world.rollout_id]
    assert first != world.rollout_id


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/x", "http://[broken", "nonsense"])
def test_an_address_that_cannot_be_called_is_an_error_in_the_log_and_no_crash(
    world: World, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    rolled_back(world)
    assert Alerter(world.ledger, webhook=url).deliver() == 0
    assert "webhook" in caplog.text
    assert alerted(world.ledger) == [False]


def test_whatever_one_alert_raises_the_others_are_delivered(
    world: World, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    rolled_back(world, alert_webhook="http://127.0.0.1:9/poison")
    poisoned = world.rollout_id
    rolled_back(world, alert_webhook=hook.url)
    address = Alerter._address

    def broken(self: Alerter, decision: Decision) -> str | None:
        if decision.rollout_id == poisoned:
            raise RuntimeError("nobody foresaw this")
        return address(self, decision)

    monkeypatch.setattr(Alerter, "_address", broken)
    assert Alerter(world.ledger).deliver() == 1
    assert alerted(world.ledger) == [False, True]


def test_an_address_that_httpx_chokes_on_is_a_failed_delivery(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    rolled_back(world)
    assert Alerter(world.ledger, webhook="http://a..b/").deliver() == 0
    assert "UnicodeError" in caplog.text


def test_the_thread_outlives_whatever_is_raised(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rolled_back(world)
    undelivered = Ledger.undelivered_decisions
    failures = [RuntimeError("once")]

    def fails_once(ledger: Ledger, limit: int = 100, before: int | None = None) -> list[Decision]:
        if failures:
            raise failures.pop()
        return undelivered(ledger, limit, before)

    monkeypatch.setattr(Ledger, "undelivered_decisions", fails_once)
    alerter = Alerter(world.ledger)
    alerter.start()
    give_up = time.monotonic() + 8
    while not all(alerted(world.ledger)) and time.monotonic() < give_up:
        alerter.wake()
        time.sleep(0.05)
    alerter.stop()
    assert alerted(world.ledger) == [True]


def test_any_number_of_undeliverable_alerts_starves_no_other(
    world: World, hook: Hook, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = "http://127.0.0.1:9/nobody"
    world.start({"alert_webhook": hook.url})
    world.order("rollback")
    rollout = world.start({"alert_webhook": dead})
    for i in range(120):
        held = Decision(rollout.id, START + i, "ada", "held", "held", "pause", "again")
        rollout = world.ledger.apply(rollout, rollout, held) or rollout
    tried: list[str] = []
    post = alerts._post
    monkeypatch.setattr(alerts, "_post", lambda url, alert: tried.append(url) or post(url, alert))
    alerter = Alerter(world.ledger, clock=lambda: world.now)
    assert alerter.deliver() == 1
    assert tried == [dead, hook.url]
    assert sum("trimtab.rollout" in record.message for record in caplog.records) == 121
    rolled = len(hook.received)
    world.order("rollback")
    rolled_back(world, alert_webhook=hook.url)
    assert alerter.deliver() == 1
    assert len(hook.received) == rolled + 1


def test_a_slow_webhook_delays_no_decision(world: World, hook: Hook) -> None:
    hook.wait = 1.0
    alerter = Alerter(world.ledger, webhook=hook.url)
    alerter.start()
    rolled_back(world)
    began = time.monotonic()
    alerter.wake()
    world.step()
    assert time.monotonic() - began < 0.9
    give_up = time.monotonic() + 8
    while not all(alerted(world.ledger)) and time.monotonic() < give_up:
        time.sleep(0.05)
    alerter.stop()
    assert alerted(world.ledger) == [True]


def test_what_was_not_delivered_before_a_crash_is_delivered_after_it(world: World, hook: Hook) -> None:
    rolled_back(world, alert_webhook=hook.url)
    hook.statuses = [500]
    assert Alerter(world.ledger).deliver() == 0
    assert Alerter(world.ledger).deliver() == 1
