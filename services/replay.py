"""Send held-out rows as traffic, and their labels some time later: how a rollout is tried before users come."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

__all__ = ["ReplayResult", "replay"]

_FEEDBACK_BATCH = 200
_FEEDBACK_PAUSE_SECONDS = 0.25


@dataclass
class ReplayResult:
    """What a replay did, counted as a user would: a request failed if its reply was not 200 or never came."""

    requests: int = 0
    failed: int = 0
    labels_sent: int = 0
    labels_acknowledged: int = 0
    by_arm: dict[str, int] = field(default_factory=dict)
    correct: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    latencies_ms: list[float] = field(default_factory=list)
    last_treatment_reply_at: float | None = None

    def note_error(self, what: str) -> None:
        self.failed += 1
        self.errors[what] = self.errors.get(what, 0) + 1


async def replay(
    url: str,
    records: Sequence[Mapping[Any, Any]],
    labels: Sequence[int],
    *,
    rate: float,
    labels_after: float,
    stop: Callable[[], bool] = lambda: False,
    result: ReplayResult | None = None,
    concurrency: int = 8,
) -> ReplayResult:
    """Send each record as a request, at `rate` per second, and its label `labels_after` seconds later.

    An open loop: requests are sent on the clock, not when the last one returned, but never more than
    `concurrency` at once; if the server is slower than the rate, the rate falls. Labels that cannot be delivered
    are sent again until acknowledged, as a real client of `/feedback` must.

    Args:
        url: the gateway.
        records, labels: the workload's raw records and true class indices, in the order to send them.
        stop: asked before each request; True ends the replay early.
        result: counted into, so that a caller can watch; a new one if None.
    """
    result = result or ReplayResult()
    due: deque[tuple[float, str, int]] = deque()
    rows = iter(zip(records, labels, strict=True))
    limits = httpx.Limits(max_connections=concurrency + 1, max_keepalive_connections=concurrency + 1)
    key = os.environ.get("TRIMTAB_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, timeout=10.0, limits=limits, headers=headers) as client:
        done = asyncio.Event()
        feedback = asyncio.create_task(_send_labels(client, due, done, result))
        clock = _Ticks(rate)
        await asyncio.gather(
            *(
                _send_requests(client, rows, clock, due, labels_after, stop, result)
                for _ in range(concurrency)
            )
        )
        done.set()
        await feedback
    return result


class _Ticks:
    """Hands out the moments at which requests are due; one that is late does not make the next ones bunch up."""

    def __init__(self, rate: float) -> None:
        self._step = 1.0 / rate
        self._next = time.monotonic()

    async def wait(self) -> None:
        now = time.monotonic()
        mine = self._next = max(self._next + self._step, now - 0.25)
        if mine > now:
            await asyncio.sleep(mine - now)


async def _send_requests(
    client: httpx.AsyncClient,
    rows: Iterator[tuple[Mapping[Any, Any], int]],
    ticks: _Ticks,
    due: deque[tuple[float, str, int]],
    labels_after: float,
    stop: Callable[[], bool],
    result: ReplayResult,
) -> None:
    for record, label in rows:
        await ticks.wait()
        if stop():
            return
        result.requests += 1
        started = time.perf_counter()
        try:
            reply = await client.post("/predict", json={"records": [record]})
        except httpx.TransportError as error:
            result.note_error(type(error).__name__)
            continue
        if reply.status_code != 200:
            result.note_error(f"HTTP {reply.status_code}")
            continue
        result.latencies_ms.append((time.perf_counter() - started) * 1000.0)
        body = reply.json()
        arm = body["arm"]
        result.by_arm[arm] = result.by_arm.get(arm, 0) + 1
        if arm == "treatment":
            result.last_treatment_reply_at = time.time()
        if body["predictions"][0]["class"] == label:
            result.correct[arm] = result.correct.get(arm, 0) + 1
        due.append((time.monotonic() + labels_after, body["request_id"], label))


async def _send_labels(
    client: httpx.AsyncClient,
    due: deque[tuple[float, str, int]],
    done: asyncio.Event,
    result: ReplayResult,
) -> None:
    """Send labels that are due, oldest first; ends when the requests have ended and nothing is left."""
    while due or not done.is_set():
        now = time.monotonic()
        batch: list[dict[str, Any]] = []
        while due and due[0][0] <= now and len(batch) < _FEEDBACK_BATCH:
            _, request_id, label = due.popleft()
            batch.append({"request_id": request_id, "label": label})
        if batch:
            result.labels_sent += len(batch)
            await _deliver(client, batch, result)
        elif due:
            await asyncio.sleep(min(_FEEDBACK_PAUSE_SECONDS, max(0.0, due[0][0] - now)))
        else:
            await asyncio.sleep(_FEEDBACK_PAUSE_SECONDS)


async def _deliver(client: httpx.AsyncClient, batch: list[dict[str, Any]], result: ReplayResult) -> None:
    pause = 0.1
    while True:
        try:
            reply = await client.post("/feedback", json={"feedback": batch})
            if reply.status_code == 200:
                body = reply.json()
                result.labels_acknowledged += body["accepted"] + body["duplicates"] + body["conflicts"]
                return
            if reply.status_code < 500:
                result.errors["feedback refused"] = result.errors.get("feedback refused", 0) + len(batch)
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(pause)
        pause = min(2.0, pause * 2)
