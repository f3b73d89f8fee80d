"""Tell somebody: every decision worth it, at least once, as a log line, a webhook call and a counter.

This runs beside the controller, on a thread of its own: a slow webhook delays alerts, never a decision.
"""

from __future__ import annotations

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
        "id": f"{decision.rollout_id}/{decision.seq}",
        "text": decision.line(),
        **asdict(decision),
    }


class Alerter:
    """Delivers the alerts that the ledger has not noted as delivered.

    A webhook that fails is called again after 1, 2, 4, ... up to 300 seconds, for as long as it takes, and
    never holds up other alerts. Where there is none, the log line and the counter are the delivery.

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
        self._tries: dict[int, int] = {}
        self._next_try: dict[int, float] = {}
        self._awake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def deliver(self) -> int:
        """Deliver what is due. Returns how many alerts were. May raise LedgerUnavailable."""
        done = 0
        for decision in self._ledger.undelivered_decisions():
            if self._clock() < self._next_try.get(decision.seq, 0.0):
                continue
            alert = alert_of(decision)
            if decision.seq not in self._tries:
                _log.warning("%s", orjson.dumps(alert).decode())
            problem = self._post(decision, alert)
            if problem is None:
                self._ledger.mark_alerted(decision.seq, self._clock())
                self._tries.pop(decision.seq, None)
                self._next_try.pop(decision.seq, None)
                done += 1
            else:
                tries = self._tries[decision.seq] = self._tries.get(decision.seq, 0) + 1
                wait = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(tries - 1, 20))
                self._next_try[decision.seq] = self._clock() + wait
                _log.error("alert %s: %s; next try in %g s", alert["id"], problem, wait)
            outcome = "failed" if problem else "delivered"
            metrics.ALERTS.labels(decision.to_state, outcome).inc()
        return done

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
            self._awake.wait(FIRST_RETRY_S)
            self._awake.clear()

    def _post(self, decision: Decision, alert: dict[str, object]) -> str | None:
        """None when there is nothing to call or the call succeeded; else what went wrong."""
        try:
            url = self._ledger.rollout(decision.rollout_id).policy.alert_webhook or self._webhook
        except RolloutNotFound:
            url = self._webhook
        if url is None:
            return None
        if not url.startswith(("http://", "https://")):
            return f"webhook {url!r}: the address must start with http:// or https://"
        headers = {"Content-Type": "application/json", "Idempotency-Key": str(alert["id"])}
        try:
            answer = httpx.post(url, content=orjson.dumps(alert), headers=headers, timeout=TIMEOUT_S)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return f"webhook: {type(error).__name__}: {error}"
        return None if answer.is_success else f"webhook: HTTP {answer.status_code}"
