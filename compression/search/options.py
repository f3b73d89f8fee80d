"""The options of the commands `search` and `target`, read and checked."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compression.search.evaluate import Limits, Objective
    from compression.search.study import SamplerName
    from compression.workload import Workload


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `30m`, `1.5h`, or of a plain number.

    Raises:
        SearchError: it is no duration.
    """
    from compression.search.evaluate import SearchError

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise SearchError(f"--budget {text}: write for example 90s, 30m or 2h")
    return seconds


def parse_objectives(text: str) -> tuple[Objective, ...]:
    """Objectives from a list with commas, in its order.

    Raises:
        SearchError: one is unknown or there twice.
    """
    from compression.search.evaluate import OBJECTIVES, SearchError

    names = [name.strip() for name in text.split(",")]
    known = {name: name for name in OBJECTIVES}
    if not set(names) <= known.keys() or len(set(names)) != len(names):
        raise SearchError(f"--objective {text}: give some of {', '.join(OBJECTIVES)}, each once, with commas")
    return tuple(known[name] for name in names)  # type: ignore[index]


def parse_latency(text: str) -> tuple[float | None, float | None]:
    """A share of full precision's time, or milliseconds; the other one is None.

    Raises:
        SearchError: it is neither.
    """
    from compression.search.evaluate import SearchError

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|%|x?)\s*", text)
    if match is None or float(match[1]) <= 0:
        raise SearchError(f"--max-latency {text}: write 0.5 or 50% of full precision's time, or 2ms")
    number = float(match[1])
    if match[2] == "ms":
        return None, number
    return (number / 100 if match[2] == "%" else number), None


def sampler_named(text: str | None) -> SamplerName | None:
    """The sampler of that name.

    Raises:
        SearchError: there is none.
    """
    from compression.search.evaluate import SearchError
    from compression.search.study import SAMPLERS

    for name in SAMPLERS:
        if text == name:
            return name
    if text is not None:
        raise SearchError(f"--sampler {text}: give one of {', '.join(SAMPLERS)}")
    return None


def limits_of(
    workload: Workload, drop: float | None, latency: str | None, size: str | None, macs: int | None
) -> Limits:
    """The limits; that of the drop is the workload's profile's where none is given.

    Raises:
        SearchError: one is no number, or none that a limit can be.
        TargetError: the size is none.
    """
    from compression.gate import LIMITS
    from compression.search.evaluate import Limits, SearchError
    from compression.search.target import parse_size

    if drop is not None and not 0 <= drop <= 100:  # NaN is neither
        raise SearchError(f"--max-drop {drop:g}: give points of quality, 0 or more, at most 100")
    ratio, ms = (None, None) if latency is None else parse_latency(latency)
    return Limits(
        max_drop=LIMITS[workload.profile] if drop is None else drop / 100,
        max_latency_ratio=ratio,
        max_latency_ms=ms,
        max_size_bytes=None if size is None else parse_size(size),
        max_macs=macs,
    )
