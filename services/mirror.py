"""Hand samples to the shadow, off the request path: bounded, batched, and the first thing to give way.

Nothing is queued while users' requests wait; a full queue sheds the newest sample; one that has waited too long is
shed too, because evidence about the past delays that about the present. Whether a sample is shed depends on queues
and clocks alone and never on an answer, so shedding costs evidence but does not bend it. A batch is sent again until
the shadow has stored it (the ledger counts each request once), so that a shadow which dies and is back within
`_STALE_SECONDS` loses nothing that fits in the queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable

from services.errors import ServingError

__all__ = ["Mirror", "ShadowRefused"]

log = logging.getLogger("trimtab.mirror")

# The deeper the queue, the larger the batch: a call costs the shadow as much as several samples.
_BATCH, _MOST_BATCH = 128, 512
_BATCH_BYTES = 4 << 20
_LINGER_SECONDS = 0.1
_STALE_SECONDS = 30.0
_BACKOFF_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)


class ShadowRefused(ServingError):
    """The shadow says this batch can never be stored; sending it again would not help."""


class Mirror:
    """A bounded queue and the task that empties it.

    Args:
        send: delivers a batch of samples, each a JSON document, and returns how many of them, from the front, were
            taken; a slow shadow takes what it has time for, which may be none. Raises when it was not reached;
            ShadowRefused drops the batch.
        capacity: most samples held.
        max_bytes: most bytes held, whatever their number.
        on_shed: called with (reason, number) when samples are dropped; reason is `full`, `busy` or `failed`.
        on_depth: called with the number of samples held, when it changes.
        busy: whether the machine has better things to do; asked for each sample, so it must be quick.
        clock: seconds, never set back.
    """

    def __init__(
        self,
        send: Callable[[list[bytes]], Awaitable[int]],
        capacity: int,
        on_shed: Callable[[str, int], None],
        on_depth: Callable[[int], None] = lambda _: None,
        max_bytes: int = 64 << 20,
        busy: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._on_depth = on_depth
        self._capacity = capacity
        self._on_shed = on_shed
        self._busy = busy
        self._clock = clock
        self._queue: deque[tuple[float, bytes]] = deque()
        self._max_bytes = max_bytes
        self._bytes = 0
        self._in_flight = 0
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def depth(self) -> int:
        """Samples waiting or being sent."""
        return len(self._queue) + self._in_flight

    def wants(self) -> bool:
        """Whether to make a sample of a request at all; False when it is shed, and counted so. Ask before `offer`.

        While the machine is busy, only what the shadow takes at once: a trickle, without which the evidence would stop
        and the rollout be taken for blind.
        """
        if self.depth and self._busy():
            self._on_shed("busy", 1)
            return False
        if self.depth >= self._capacity:
            self._on_shed("full", 1)
            return False
        return True

    def offer(self, sample: bytes) -> bool:
        """Queue a sample; False when it was shed. Never waits."""
        if self.depth >= self._capacity or self._bytes + len(sample) > self._max_bytes:
            self._on_shed("full", 1)
            return False
        self._queue.append((self._clock(), sample))
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
        failures = 0
        while True:
            await self._arrived.wait()
            if len(self._queue) < _BATCH:
                await asyncio.sleep(_LINGER_SECONDS)
            batch = self._take()
            done, pause = 0, 0.0
            self._in_flight = len(batch)
            try:
                if batch:
                    done = await self._deliver([sample for _, sample in batch])
                failures = 0
                if not done:  # It rests, and has waited for a while before it said so.
                    pause = _BACKOFF_SECONDS[0]
            except Exception as error:  # noqa: BLE001  # whatever is wrong with the shadow must not end this task
                if not failures:
                    log.warning("shadow not reached, trying again: %r", error)
                pause = _BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS) - 1)]
                failures += 1
            finally:
                self._in_flight = 0
                self._queue.extendleft(reversed(batch[done:]))
                self._bytes -= sum(len(sample) for _, sample in batch[:done])
                self._on_depth(self.depth)
                if not self._queue:
                    self._arrived.clear()
            if pause and self._queue:
                await asyncio.sleep(pause)

    async def _deliver(self, batch: list[bytes]) -> int:
        """Send a batch; returns how many samples, from the front, are done with."""
        try:
            return await self._send(batch)
        except ShadowRefused as error:
            log.warning("the shadow refused %d samples: %s", len(batch), error)
            self._on_shed("failed", len(batch))
            return len(batch)

    def _take(self) -> list[tuple[float, bytes]]:
        """The oldest samples that are not stale, as many as make a batch."""
        self._drop_stale()
        queue = self._queue
        most = max(_BATCH, min(_MOST_BATCH, len(queue) // 4))
        batch: list[tuple[float, bytes]] = []
        size = 0
        while queue and len(batch) < most and (not batch or size + len(queue[0][1]) <= _BATCH_BYTES):
            batch.append(queue.popleft())
            size += len(batch[-1][1])
        return batch

    def _drop_stale(self) -> None:
        queue, oldest = self._queue, self._clock() - _STALE_SECONDS
        dropped = 0
        while queue and queue[0][0] < oldest:
            self._bytes -= len(queue.popleft()[1])
            dropped += 1
        if dropped:
            self._on_shed("full", dropped)
