"""How many requests to mirror: as many as the decision needs and the shadow's share of the CPU can pay for.

Plain data in, plain data out; no clock, no I/O.

Why the evidence stays valid: which requests are sampled is decided by a keyed hash of the request's id, and the rate by
counts and times of what came *before* it. So whether a request becomes a pair depends on the past and on the key, never
on an answer to it, and the evidence, whose hypotheses are about each pair given the past, has the same error rates at
every rate. (How long an answer takes is part of the past too: the time of earlier samples, not of this one.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["WINDOW_S", "Load", "MirrorCounts", "measure", "next_rate"]

WINDOW_S = 60.0
"""Older counts say nothing about the present."""

LEAST_PER_S = 0.1
"""Samples a second that are taken whatever they cost: nobody would see a candidate that is looked at less often."""

_FILL = 0.8
"""Share of the shadow's time that samples may take. The rest is for bursts: a queue that is always full makes every
pair late, and with it a rollback."""
_FALL, _RISE, _MOST_RISE = 0.85, 1.5, 2.0
"""The rate falls to its target when that is below 0.85 of it, and rises when it is above 1.5 of it, at most to the
double. Between the two it stays, so that noise does not move it; it rises slowly, because a lull looks like little
traffic."""
_ENOUGH_SECONDS, _ENOUGH_REQUESTS = 8.0, 200
_ENOUGH_COST_SECONDS, _ENOUGH_SAMPLES = 20.0, 200
"""What a sample costs changes with whatever else the machine does from one second to the next: it is averaged over a
longer time than the traffic, which may double in a moment."""
_FIND_OUT_PER_S = 10 / WINDOW_S
"""So many samples a second are affordable as long as nothing is known of their cost."""


@dataclass(frozen=True, slots=True)
class MirrorCounts:
    """One time bucket.

    Attributes:
        start: seconds since the epoch.
        requests: those that were answered.
        samples: those that the shadow answered too.
        seconds: how long they occupied it: the time they took, or the time in which its share of the CPU allows what
            they used, whichever is longer.
    """

    start: float
    requests: int = 0
    samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """Requests a second, and the seconds that one sample occupies the shadow; None when it answered none of late."""

    requests_per_s: float
    sample_s: float | None


def measure(buckets: Sequence[MirrorCounts], now: float, since: float) -> Load | None:
    """What the newest time buckets say: as few of them as tell enough, none from before WINDOW_S ago.

    Args:
        buckets: oldest first; those without any count may be left out.
        now: seconds since the epoch.
        since: when counting began.

    Returns:
        None when there are too few seconds to tell, or no requests.
    """
    recent = [bucket for bucket in reversed(buckets) if bucket.start > now - WINDOW_S]
    requests, seconds = 0, 0.0
    for bucket in recent:
        requests += bucket.requests
        seconds = now - max(bucket.start, since)
        if seconds >= _ENOUGH_SECONDS and requests >= _ENOUGH_REQUESTS:
            break
    if requests < _ENOUGH_REQUESTS:
        seconds = min(WINDOW_S, now - since)
    if not requests or seconds < _ENOUGH_SECONDS:
        return None
    samples, occupied = 0, 0.0
    for bucket in recent:
        samples += bucket.samples
        occupied += bucket.seconds
        if now - bucket.start >= _ENOUGH_COST_SECONDS and samples >= _ENOUGH_SAMPLES:
            break
    return Load(requests / seconds, occupied / samples if samples else None)


def next_rate(current: float, load: Load, *, ceiling: float, wanted_per_s: float | None) -> float:
    """The share of requests to mirror from now on; `current` unless another one is clearly better.

    Args:
        current: the share in force, more than 0.
        load: what was measured under it.
        ceiling: the largest share allowed.
        wanted_per_s: pairs a second that are enough; None for as many as can be had.
    """
    if load.sample_s is None:
        # The shadow is away, or so little was sampled that nothing could be learnt: no more than now, or enough to.
        affordable = max(current * load.requests_per_s, _FIND_OUT_PER_S)
    else:
        affordable = _FILL / load.sample_s if load.sample_s > 0 else math.inf
    wanted = affordable if wanted_per_s is None else min(wanted_per_s, affordable)
    target = max(wanted, LEAST_PER_S) / load.requests_per_s
    if target >= _RISE * current:
        rate = min(target, _MOST_RISE * current)
    elif target < _FALL * current:
        rate = target
    else:
        return current
    return min(ceiling, float(f"{rate:.1e}"))
