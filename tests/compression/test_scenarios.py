from __future__ import annotations

from dataclasses import replace

import pytest

from compression.search.scenarios import SCENARIOS, Candidate, Scenario, choose

MOBILE, EDGE, CLOUD = SCENARIOS


def candidate(
    name: str, *, drop: float = 0.0, size: float = 0.3, latency: float = 0.5, width: float = 0.005
) -> Candidate:
    """A candidate by its shares of full precision, whose file has 100 kB."""
    return Candidate(name, drop, drop + width, int(100_000 * size), size, latency)


def test_each_scenario_takes_what_it_weighs_most() -> None:
    small = candidate("small", size=0.1, latency=0.8, drop=0.015)
    fast = candidate("fast", size=0.4, latency=0.3, drop=0.012)
    near = candidate("near", size=0.45, latency=0.9, drop=0.0)
    chosen = [choose(scenario, [near, fast, small]) for scenario in SCENARIOS]
    assert [(choice.scenario, choice.winner) for choice in chosen] == [
        ("mobile", "small"),
        ("edge-server", "fast"),
        ("cloud", "near"),
    ]
    assert [choice.runner_up for choice in chosen] == ["fast", "small", "fast"]


def test_what_is_alike_is_told_apart_by_what_weighs_next() -> None:
    smallest = candidate("smallest", size=0.100, latency=0.9)
    faster = candidate("faster", size=0.104, latency=0.5)
    choice = choose(MOBILE, [smallest, faster])
    assert choice.winner == "faster"
    assert "as good in size, and faster than smallest" in choice.why
    # Over a twentieth more bytes are a difference.
    assert choose(MOBILE, [smallest, replace(faster, size_ratio=0.106)]).winner == "smallest"


def test_a_quarter_of_a_point_is_no_difference_in_quality() -> None:
    nearest, cheaper = (
        candidate("nearest", drop=0.0, latency=0.9),
        candidate("cheaper", drop=0.002, latency=0.4),
    )
    assert choose(CLOUD, [nearest, cheaper]).winner == "cheaper"
    assert choose(CLOUD, [nearest, replace(cheaper, drop=0.003)]).winner == "nearest"


@pytest.mark.parametrize(
    ("scenario", "outside", "words"),
    [
        (MOBILE, candidate("big", size=0.51), "is over those of size"),
        (MOBILE, candidate("slow", latency=1.1), "is over those of latency"),
        (EDGE, candidate("lossy", drop=0.049, width=0.002), "is over those of drop"),
        (CLOUD, candidate("lossy", drop=0.019, width=0.002), "is over those of drop"),
    ],
)
def test_a_limit_is_a_limit_and_is_named(scenario: Scenario, outside: Candidate, words: str) -> None:
    choice = choose(scenario, [outside])
    assert choice.winner is None
    assert choice.runner_up is None
    assert words in choice.why
    within = candidate("within")
    assert choose(scenario, [outside, within]).winner == "within"
    assert "only one within the limits" in choose(scenario, [outside, within]).why


def test_the_nearest_is_so_by_the_share_that_it_is_over_its_limits() -> None:
    # Ten points over a limit of five are further than twelve hundredths over a half.
    lossy, big = candidate("lossy", drop=0.145), candidate("big", size=0.62)
    assert "the nearest, big" in choose(MOBILE, [lossy, big]).why


def test_the_order_of_the_candidates_does_not_matter() -> None:
    twins = [candidate("b"), candidate("a"), candidate("c", size=0.31)]
    assert choose(MOBILE, twins) == choose(MOBILE, twins[::-1])
    assert choose(MOBILE, twins).winner == "a"
    assert "is alike in all that counts" in choose(MOBILE, twins).why


def test_nothing_to_choose_from_is_said() -> None:
    assert choose(MOBILE, []).why == "there is nothing to choose from"
