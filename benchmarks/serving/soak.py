"""Half load for a long time, with a rollout and its mirror on: does anything grow, does anything fail?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.serving.load import PacedLoad, closed_loop
from benchmarks.serving.measure import MIRROR_RATE, Options, mlp_store
from benchmarks.serving.ours import SERVICES, Trimtab
from benchmarks.serving.processes import BenchmarkError
from benchmarks.serving.rows import SOAK

__all__ = ["soak"]

_EVERY_SECONDS = 10.0
_FLAT = 1.05


def soak(options: Options, minutes: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Run it; returns the row of the results.

    The ratio is the worst process's mean resident memory over the last third of the time, over that of the second
    third; the first third is for caches to fill.

    Raises:
        BenchmarkError: the server does not start, stops answering, or its rollout ends.
    """
    memory: dict[str, list[float]] = {service: [] for service in SERVICES}
    p50: list[float] = []
    p99: list[float] = []
    failures = requests = 0
    with (
        mlp_store(options.cache) as (_, mlp),
        Trimtab(mlp, options.cache) as server,
        server.rollout(MIRROR_RATE),
    ):
        target = server.target("v2-json")
        closed_loop(target, options.warm_up, options.cache / "logs" / "wrk.log")
        rate = closed_loop(target, options.seconds, options.cache / "logs" / "wrk.log").rate / 2
        say(f"soak: {rate:.0f} requests/s for {minutes:g} minutes")
        started = time.monotonic()
        with server.mirrored() as mirrored:
            with PacedLoad(target) as load:
                while time.monotonic() - started < minutes * 60 or len(p50) < 6:
                    seen = load.run(rate, min(_EVERY_SECONDS, minutes * 10))
                    failures, requests = failures + seen.failures, requests + seen.requests
                    p50.append(seen.p50)
                    p99.append(seen.p99)
                    for service, sizes in memory.items():
                        sizes.append(server.resident_mb(service))
                    sizes_now = ", ".join(f"{name} {sizes[-1]:.0f} MB" for name, sizes in memory.items())
                    say(
                        f"soak: {(time.monotonic() - started) / 60:.1f} of {minutes:g} min: {sizes_now}, "
                        f"p99 {seen.p99:.2f} ms, {failures} failed"
                    )
            counted = mirrored()
    hours = (time.monotonic() - started) / 3600
    grown = {service: _grown(sizes) for service, sizes in memory.items()}
    worst = max(grown, key=lambda service: grown[service])
    thirds = {service: _thirds(sizes) for service, sizes in memory.items()}
    return {
        "name": SOAK,
        "title": f"resident memory of the {worst}, last third over second third of {minutes:g} minutes",
        "unit": "MB",
        "ours_series": f"{worst}, last third",
        "peer_series": f"{worst}, second third",
        "ours": round(thirds[worst][1], 1),
        "peer": round(thirds[worst][0], 1),
        "ratio": round(grown[worst], 4),
        "bound": "<=",
        "goal": _FLAT,
        "met": grown[worst] <= _FLAT and failures == 0,
        "ours_range": None,
        "peer_range": None,
        "ratio_range": [round(min(grown.values()), 4), round(max(grown.values()), 4)],
        "rounds": 1,
        "failures": failures,
        "problem": None,
        "details": {
            "minutes": minutes,
            "requests_per_s": round(rate),
            "requests": requests,
            "p50_ms": round(statistics.median(p50), 4),
            "p99_ms": round(statistics.median(p99), 4),
            "worst_p99_ms": max(p99),
            "mirror_in_force": round(counted.share, 5),
            "mirror_shed": sum(counted.shed.values()),
            "memory": {
                service: {
                    "first_mb": round(sizes[0], 1),
                    "last_mb": round(sizes[-1], 1),
                    "second_third_mb": round(thirds[service][0], 1),
                    "last_third_mb": round(thirds[service][1], 1),
                    "slope_mb_per_hour": round(_slope(sizes, hours), 1),
                    "flat": grown[service] <= _FLAT,
                }
                for service, sizes in memory.items()
            },
        },
    }


def _thirds(sizes: Sequence[float]) -> tuple[float, float]:
    third = len(sizes) // 3
    return statistics.fmean(sizes[third : 2 * third]), statistics.fmean(sizes[2 * third :])


def _grown(sizes: Sequence[float]) -> float:
    second, last = _thirds(sizes)
    if second <= 0:
        raise BenchmarkError("a process was gone while its memory was measured")
    return last / second


def _slope(sizes: Sequence[float], hours: float) -> float:
    """MB per hour over the last two thirds, by least squares."""
    kept = sizes[len(sizes) // 3 :]
    times = [hours * at / len(sizes) for at in range(len(kept))]
    return statistics.linear_regression(times, kept).slope
