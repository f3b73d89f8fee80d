"""Where a model is going to run, and which of several models is the best for it: pure functions on plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from compression.gate import LIMITS

Measure = Literal["size", "latency", "drop"]


@dataclass(frozen=True)
class Candidate:
    """What a choice between models needs to know of one.

    Attributes:
        drop: quality lost against full precision, as a share: 0.01 is one point; `drop_high` the upper end of
            its 95% interval.
        size_bytes: bytes of the file that is kept; `size_ratio` over full precision's.
        latency_ratio: median time at batch 1 over full precision's, both timed in turns.
    """

    name: str
    drop: float
    drop_high: float
    size_bytes: int
    size_ratio: float
    latency_ratio: float


@dataclass(frozen=True)
class Scenario:
    """A place to run a model.

    Attributes:
        max_drop: the most that may be lost, held against the upper end of the drop's interval as the gate does.
        max_size_ratio, max_latency_ratio: the most of full precision's bytes and time.
        weighs: what is compared first, and what then between candidates that are alike in it.
    """

    name: str
    max_drop: float
    max_size_ratio: float
    max_latency_ratio: float
    weighs: tuple[Measure, Measure, Measure]


SCENARIOS: tuple[Scenario, ...] = (
    # A download on somebody else's device: bytes first, and no slower than what it replaces.
    Scenario("mobile", LIMITS["standard"], 0.5, 1.0, ("size", "latency", "drop")),
    # Few machines, many requests: time first; the file lies on a disk of our own.
    Scenario("edge-server", LIMITS["standard"], 1.0, 1.0, ("latency", "drop", "size")),
    # Machines can be added, lost quality cannot: quality first, then what a request costs.
    Scenario("cloud", LIMITS["medical"], 1.0, 1.0, ("drop", "latency", "size")),
)
"""The scenarios and their limits, in the order in which they are reported.

| scenario | drop, at most | size, at most | time, at most | weighs first | then | then |
| --- | --- | --- | --- | --- | --- | --- |
| mobile | 5 points | 50% | 100% | size | latency | drop |
| edge-server | 5 points | 100% | 100% | latency | drop | size |
| cloud | 2 points | 100% | 100% | drop | latency | size |
"""

ALIKE_DROP = 0.0025
"""Drops that differ by no more than this, a quarter of a point, count as alike."""
ALIKE_RATIO = 0.05
"""Sizes and times within this share of the best count as alike: medians of short runs tell no finer."""


@dataclass(frozen=True)
class Choice:
    """The candidate that suits a scenario best, the next best one, and why; `winner` is None where none may run."""

    scenario: str
    winner: str | None
    runner_up: str | None
    why: str


def choose(scenario: Scenario, candidates: Sequence[Candidate]) -> Choice:
    """The best of several candidates for a scenario.

    Of those within the scenario's limits, the ones alike to the best in what weighs first go on to what weighs next;
    what is still alike after the last is told apart by the exact figures, then by name.
    """
    able = [candidate for candidate in candidates if not _over(scenario, candidate)]
    if not able:
        return Choice(scenario.name, None, None, _none_may(scenario, candidates))
    winner = _best(scenario, able)
    others = [candidate for candidate in able if candidate is not winner]
    if not others:
        out = len(candidates) - 1
        why = f"{winner.name} {_figures(winner)} is the only one within the limits ({_limits(scenario)})"
        return Choice(scenario.name, winner.name, None, why + (f"; {out} are not" if out else ""))
    runner_up = _best(scenario, others)
    return Choice(scenario.name, winner.name, runner_up.name, _why(scenario, winner, runner_up, len(able)))


_VALUE: dict[Measure, Callable[[Candidate], float]] = {
    "size": lambda candidate: candidate.size_ratio,
    "latency": lambda candidate: candidate.latency_ratio,
    "drop": lambda candidate: candidate.drop,
}
_BETTER: dict[Measure, str] = {"size": "smaller", "latency": "faster", "drop": "nearer to full precision"}


def _over(scenario: Scenario, candidate: Candidate) -> dict[Measure, float]:
    """By what share of itself each limit is passed, of those that are."""
    compared: dict[Measure, tuple[float, float]] = {
        "drop": (candidate.drop_high, scenario.max_drop),
        "size": (candidate.size_ratio, scenario.max_size_ratio),
        "latency": (candidate.latency_ratio, scenario.max_latency_ratio),
    }
    return {measure: (value - limit) / limit for measure, (value, limit) in compared.items() if value > limit}


def _best(scenario: Scenario, candidates: Sequence[Candidate]) -> Candidate:
    left = list(candidates)
    for measure in scenario.weighs:
        best = min(_VALUE[measure](candidate) for candidate in left)
        left = [candidate for candidate in left if _alike(measure, _VALUE[measure](candidate), best)]
    exact = [_VALUE[measure] for measure in scenario.weighs]
    return min(left, key=lambda candidate: (*(value(candidate) for value in exact), candidate.name))


def _alike(measure: Measure, value: float, best: float) -> bool:
    return value <= (best + ALIKE_DROP if measure == "drop" else best * (1 + ALIKE_RATIO))


def _why(scenario: Scenario, winner: Candidate, runner_up: Candidate, able: int) -> str:
    told_apart = next(
        (
            measure
            for measure in scenario.weighs
            if not _alike(measure, _VALUE[measure](runner_up), _VALUE[measure](winner))
        ),
        None,
    )
    head = f"{winner.name} {_figures(winner)} is the best of {able} within the limits ({_limits(scenario)})"
    if told_apart is None:
        return f"{head}; {runner_up.name} {_figures(runner_up)} is alike in all that counts"
    first = scenario.weighs[0]
    alike = "" if told_apart == first else f"as good in {first}, and "
    return f"{head}: {alike}{_BETTER[told_apart]} than {runner_up.name} {_figures(runner_up)}"


def _none_may(scenario: Scenario, candidates: Sequence[Candidate]) -> str:
    if not candidates:
        return "there is nothing to choose from"
    nearest = min(
        candidates, key=lambda candidate: (max(_over(scenario, candidate).values()), candidate.name)
    )
    over = ", ".join(_over(scenario, nearest))
    return (
        f"none of {len(candidates)} is within the limits ({_limits(scenario)}); the nearest, {nearest.name} "
        f"{_figures(nearest)}, is over those of {over}"
    )


def _figures(candidate: Candidate) -> str:
    return (
        f"({candidate.size_bytes / 1000:,.1f} kB, {candidate.latency_ratio:.0%} of the time, "
        f"drop {100 * candidate.drop:z.1f}, at most {100 * candidate.drop_high:z.1f} pt)"
    )


def _limits(scenario: Scenario) -> str:
    return (
        f"drop {100 * scenario.max_drop:g} pt, size {scenario.max_size_ratio:.0%}, "
        f"time {scenario.max_latency_ratio:.0%}"
    )
