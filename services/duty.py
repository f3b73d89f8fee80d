"""Work that must not take more than its share of the CPU."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

__all__ = ["DutyCycle"]

_MOST_REST_SECONDS = 1.0
# Less is not worth a turn: reading a batch costs something too.
_LEAST = 0.1


class DutyCycle:
    """Keeps a process whose work is done in turns to a share of one core.

    A bucket of CPU seconds fills with time, and all that the process uses is taken out, on credit where a turn used
    more than there was. Work that comes now and then finds the bucket full and never waits.

    Args:
        share: CPU seconds a second.
        burst: CPU seconds the bucket holds.
        clock: seconds, never set back.
        cpu: CPU seconds that this process has used: what surrounds a turn, such as reading what is asked for, can cost
            as much as the turn.
    """

    def __init__(
        self,
        share: float,
        *,
        burst: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.process_time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._share = share
        self._burst = burst
        self._clock = clock
        self._cpu = cpu
        self._sleep = sleep
        self._least = min(_LEAST, share * _MOST_REST_SECONDS)
        self._left = burst
        self._settled_at = clock()
        self._settled_cpu = self._ended_cpu = cpu()

    async def allowance(self) -> float:
        """CPU seconds that may be used now, after a rest of at most a second where there were too few; 0 when there
        still are."""
        self._settle()
        lacking = self._least - self._left
        if lacking > 0:
            await self._sleep(min(_MOST_REST_SECONDS, lacking / self._share))
            self._settle()
        # Half of it will do: clocks and sleeps are not exact.
        return self._left if self._left >= self._least / 2 else 0.0

    def begin(self) -> float:
        """A turn begins; what this returns goes to `end`."""
        return self._clock()

    def end(self, begun: float) -> float:
        """A turn has ended. Returns the seconds it occupied: those that went by, or those in which the share allows
        what the process has used since the turn before, whichever is longer."""
        self._settle()
        used = self._settled_cpu - self._ended_cpu
        self._ended_cpu = self._settled_cpu
        return max(self._settled_at - begun, used / self._share)

    def _settle(self) -> None:
        now, used = self._clock(), self._cpu()
        filled = self._share * (now - self._settled_at)
        self._left = min(self._burst, self._left + filled - (used - self._settled_cpu))
        self._settled_at, self._settled_cpu = now, used
