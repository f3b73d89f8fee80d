"""Hand samples to the shadow, off the request path: bounded, batched, and the first thing to give way.

A full queue sheds the newest sample. Whether a sample is shed depends on the queue alone and never on an
answer, so shedding costs evidence but does not bend it. A batch is sent again until the shadow has stored it
(the ledger counts each request once), so that a shadow which dies and comes back loses nothing that fits
in the queue.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable

from services.errors import ServingError

__all__ = ["Mirror", "ShadowRefused"]

log = logging.getLogger("trimtab.mirror")

_BATCH = 128
_BATCH_BYTES = 4 << 20
_LINGER_SECONDS = 0.02
_BACKOFF_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)


class ShadowRefused(ServingError):
    """The shadow says this batch can never be stored; sending it again would not help."""


class Mirror:
    """A bounded queue and the task that empties it.

    Args:
        send: delivers a batch of samples, each a JSON document, and returns how many of them, from the front, were
            taken; a slow shadow takes what it has time for. Raises when none was stored; ShadowRefused drops the
            batch.
        capacity: most samples held.
        max_bytes: most bytes held, whatever their number.
        on_shed: called with (reason, number) when samples are dropped; reason is `full` or `failed`.
        on_depth: called with the number of samples held, when it changes.
    """

    def __init__(
        self,
        send: Callable[[list[bytes]], Awaitable[int]],
        capacity: int,
        on_shed: Callable[[str, int], None],
        on_depth: Callable[[int], None] = lambda _: None,
        max_bytes: int = 64 << 20,
    ) -> None:
        self._send = send
        self._on_depth = on_depth
        self._capacity = capacity
        self._on_shed = on_shed
        self._queue: deque[bytes] = deque()
        self._max_bytes = max_bytes
        self._bytes = 0
        self._in_flight = 0
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def depth(self) -> int:
        """Samples waiting or being sent."""
        return len(self._queue) + self._in_flight

    def offer(self, sample: bytes) -> bool:
        """Queue a sample; False when it was shed. Never waits."""
        if self.depth >= self._capacity or self._bytes + len(sample) > self._max_bytes:
            self._on_shed("full", 1)
            return False
        self._queue.append(sample)
        self._bytes += len(sample)
        self._arrived.set()
        self._on_depth(self.depth)
        return True

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="mirror")

    async def stop(self, grace: float = 2.0) -> None:
        """Give the queue `grace` seconds to empty, then drop what is left and count it as shed."""
        loop = asyncio.get_running_loop()
        end = loop.time() + grace
        while self.depth and loop.time() < end:
            await asyncio.sleep(0.02)
        left = self.depth
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if left:
            self._on_shed("failed", left)
            self._queue.clear()

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            if len(self._queue) < _BATCH:
                await asyncio.sleep(_LINGER_SECONDS)
            batch = self._take()
            if not self._queue:
                self._arrived.clear()
            if not batch:
                continue
            self._in_flight = len(batch)
            try:
                await self._deliver(batch)
            finally:
                self._in_flight = 0
                self._bytes -= sum(map(len, batch))
                self._on_depth(self.depth)

    def _take(self) -> list[bytes]:
        """The oldest samples, as many as make a batch."""
        batch: list[bytes] = []
        size = 0
        while (
            self._queue and len(batch) < _BATCH and (not batch or size + len(self._queue[0]) <= _BATCH_BYTES)
        ):
            batch.append(self._queue.popleft())
            size += len(batch[-1])
        return batch

    async def _deliver(self, batch: list[bytes]) -> None:
        attempt = 0
        while batch:
            try:
                batch = batch[await self._send(batch) :]
                attempt = 0
            except ShadowRefused as error:
                log.warning("the shadow refused %d samples: %s", len(batch), error)
                self._on_shed("failed", len(batch))
                return
            except Exception as error:  # noqa: BLE001  # whatever is wrong with the shadow must not end this task
                if attempt == 0:
                    log.warning("shadow not reached, trying again: %r", error)
                await asyncio.sleep(_BACKOFF_SECONDS[min(attempt, len(_BACKOFF_SECONDS) - 1)])
                attempt += 1
