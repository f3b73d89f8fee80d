"""Tell somebody: every decision worth it, at least once, as a log line, a webhook call and a counter.

This runs beside the controller, on a thread of its own: a slow webhook delays alerts, never a decision.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict

import httpx
import orjson

from monitoring import metrics
from monitoring.errors import LedgerUnavailable, RolloutNotFound
from monitoring.ledger import Ledger
from monitoring.records import Decision

WEBHOOK_VARIABLE = "TRIMTAB_ALERT_WEBHOOK"
TIMEOUT_S = 2.0
FIRST_RETRY_S = 1.0
LAST_RETRY_S = 300.0

_log = logging.getLogger("trimtab.alerts")


def alert_of(decision: Decision) -> dict[str, object]:
    """The alert as it is logged and posted; `id` is the same for every repetition."""
    return {
        "event": "trimtab.rollout",
        "id": _id(decision),
        "text": decision.line(),
        **asdict(decision),
    }


class Alerter:
    """Delivers the alerts that the ledger has not noted as delivered.

    All of them are logged first, whatever becomes of webhooks. Then they are posted, the newest first. A webhook
    that fails is left alone for the rest of the round, and called again with the alert that failed after 1, 2,
    4, ... up to 300 seconds, for as long as it takes; so it never holds up alerts to others, nor old alerts a
    new one. Where there is no webhook, the log line and the counter are the delivery.

    Args:
        ledger: where decisions are read and deliveries noted.
        webhook: address to post to where a rollout's policy names none; else the environment's
            TRIMTAB_ALERT_WEBHOOK. Redirects are not followed.
        clock: seconds since the epoch.
    """

    def __init__(
        self, ledger: Ledger, webhook: str | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._ledger = ledger
        self._webhook = webhook or os.environ.get(WEBHOOK_VARIABLE) or None
        self._clock = clock
        self._logged: set[int] = set()
        self._tries: dict[int, int] = {}
        self._next_try: dict[int, float] = {}
        self._awake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def deliver(self) -> int:
        """Deliver what is due. Returns how many alerts were. May raise LedgerUnavailable."""
        undelivered = self._undelivered()
        for decision in reversed(undelivered):
            if decision.seq not in self._logged:
                _log.warning("%s", _json(alert_of(decision)).decode())
                self._logged.add(decision.seq)
        done = 0
        failing: set[str] = set()
        for decision in undelivered:
            if self._clock() < self._next_try.get(decision.seq, 0.0):
                continue
            try:
                url = self._address(decision)
                if url in failing:
                    continue
                problem = None if url is None else _post(url, alert_of(decision))
            except LedgerUnavailable:
                raise
            except Exception as error:  # noqa: BLE001  # whatever is wrong with one alert, others wait
                url, problem = None, f"{type(error).__name__}: {error}"
            self._note(decision, problem)
            if problem is None:
                done += 1
            elif url is not None:
                failing.add(url)
        return done

    def _note(self, decision: Decision, problem: str | None) -> None:
        """Write down that an alert was delivered, or when to try it again."""
        seq = decision.seq
        if problem is None:
            self._ledger.mark_alerted(seq, self._clock())
            self._logged.discard(seq)
            self._tries.pop(seq, None)
            self._next_try.pop(seq, None)
        else:
            tries = self._tries[seq] = self._tries.get(seq, 0) + 1
            wait = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(tries - 1, 20))
            self._next_try[seq] = self._clock() + wait
            _log.error("alert %s: %s; next try in %g s", _id(decision), problem, wait)
        metrics.ALERTS.labels(decision.to_state, "failed" if problem else "delivered").inc()

    def _undelivered(self) -> list[Decision]:
        """All of them, newest first: any number may be waiting for a webhook that has gone for good."""
        found: list[Decision] = []
        while page := self._ledger.undelivered_decisions(before=found[-1].seq if found else None):
            found += page
        return found

    def start(self) -> None:
        """Deliver in the background until `stop`."""
        self._thread = threading.Thread(target=self._run, name="trimtab-alerts", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There may be something to deliver. Returns at once."""
        self._awake.set()

    def stop(self) -> None:
        """End the background delivery; what is not delivered is kept for the next start."""
        self._stopping = True
        self._awake.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * TIMEOUT_S)

    def _run(self) -> None:
        while not self._stopping:
            try:
                self.deliver()
            except LedgerUnavailable as error:
                _log.error("alerts wait: %s", error)
            except Exception:  # noqa: BLE001  # nobody else would tell anybody of the next rollback.
                _log.exception("alerts failed; they are tried again")
            self._awake.wait(FIRST_RETRY_S)
            self._awake.clear()

    def _address(self, decision: Decision) -> str | None:
        try:
            return self._ledger.rollout(decision.rollout_id).policy.alert_webhook or self._webhook
        except RolloutNotFound:
            return self._webhook


def _post(url: str, alert: dict[str, object]) -> str | None:
    """None when the call succeeded; else what went wrong, as far as that can be foreseen."""
    if not url.startswith(("http://", "https://")):
        return f"webhook {url!r}: the address must start with http:// or https://"
    headers = {"Content-Type": "application/json", "Idempotency-Key": str(alert["id"])}
    try:
        answer = httpx.post(url, content=_json(alert), headers=headers, timeout=TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        return f"webhook: {type(error).__name__}: {error}"
    return None if answer.is_success else f"webhook: HTTP {answer.status_code}"


def _json(alert: dict[str, object]) -> bytes:
    """JSON; text that is not valid Unicode, such as half of a surrogate pair, is escaped."""
    try:
        return orjson.dumps(alert)
    except TypeError:
        return json.dumps(alert).encode()


def _id(decision: Decision) -> str:
    return f"{decision.rollout_id}/{decision.seq}"
