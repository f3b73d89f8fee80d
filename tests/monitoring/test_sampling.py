"""The mirror's rate: within its bounds whatever was measured, near what can be afforded, and still once it is there."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from monitoring.sampling import Load, MirrorCounts, measure, next_rate
from monitoring.tally import BUCKET_SECONDS, bucket_of

LOOK_S = 5
START = 1_700_000_000


def rate_of(
    current: float,
    requests_per_s: float,
    sample_s: float | None,
    wanted_per_s: float | None = None,
    ceiling: float = 1.0,
) -> float:
    return next_rate(current, Load(requests_per_s, sample_s), ceiling=ceiling, wanted_per_s=wanted_per_s)


# The next rate -------------------------------------------------------------------------------------------------


@settings(max_examples=500)
@given(
    current=st.floats(1e-6, 1),
    ceiling=st.floats(1e-3, 1),
    requests_per_s=st.floats(0.02, 1e6),
    sample_s=st.one_of(st.none(), st.floats(0, 100)),
    wanted_per_s=st.one_of(st.none(), st.floats(0.1, 1e5)),
)
def test_the_rate_is_never_nothing_and_never_over_its_ceiling(
    current: float,
    ceiling: float,
    requests_per_s: float,
    sample_s: float | None,
    wanted_per_s: float | None,
) -> None:
    current = min(current, ceiling)
    rate = rate_of(current, requests_per_s, sample_s, wanted_per_s, ceiling)
    assert 0 < rate <= ceiling
    if rate < current:
        assert rate >= min(ceiling, 0.1 / requests_per_s) * 0.95  # two digits are kept


def test_what_the_shadow_can_pay_for_stays_as_it_is() -> None:
    assert rate_of(1.0, 100, 0.002) == 1.0
    assert rate_of(0.5, 1000, 0.0015) == 0.5


def test_more_than_the_shadow_can_pay_for_falls_at_once_to_what_it_can_with_room_to_spare() -> None:
    assert rate_of(1.0, 1000, 0.004) == 0.2


def test_the_rate_rises_at_most_to_the_double_and_not_over_what_can_be_paid_for() -> None:
    assert rate_of(0.01, 100, 0.0001) == 0.02
    assert rate_of(0.1, 1000, 0.005) == 0.16


def test_no_more_than_what_is_wanted_is_sampled_however_little_it_costs() -> None:
    assert rate_of(1.0, 1000, 0.0001, wanted_per_s=20) == 0.02
    assert rate_of(1.0, 1000, 0.4, wanted_per_s=20) == 0.002


def test_what_is_wanted_and_more_than_there_is_stops_at_the_ceiling() -> None:
    assert rate_of(0.2, 10, 0.001, wanted_per_s=20, ceiling=0.3) == 0.3


def test_a_sample_every_ten_seconds_is_taken_whatever_it_costs() -> None:
    assert rate_of(1.0, 100, 60.0) == 0.001


def test_a_shadow_that_answers_nothing_changes_nothing() -> None:
    assert rate_of(0.3, 100, None) == 0.3


def test_where_too_little_was_sampled_to_learn_its_cost_more_is() -> None:
    rate, rounds = 1e-6, 0
    while rate_of(rate, 1.0, None) != rate:
        rate, rounds = rate_of(rate, 1.0, None), rounds + 1
    assert 60 * rate > 5
    assert rounds < 25


# What is measured ----------------------------------------------------------------------------------------------


def counts(age: float, requests: int = 0, samples: int = 0, seconds: float = 0.0) -> MirrorCounts:
    """A time bucket that began so many seconds ago."""
    return MirrorCounts(START - age, requests, samples, seconds)


def test_the_newest_buckets_that_tell_enough_are_the_measure() -> None:
    buckets = [
        counts(39, 9000, 9000, 9.0),
        counts(29, 9000, 100, 1.2),
        counts(19, 1000, 100, 0.2),
        counts(9, 900, 100, 0.1),
    ]
    assert measure(buckets, START, since=0) == Load(100.0, 0.005)


def test_few_requests_are_counted_over_a_longer_time() -> None:
    buckets = [counts(61, 99, 99, 9.9), counts(49, 30, 30, 0.3), counts(29, 60, 10, 0.2)]
    assert measure(buckets, START, since=0) == Load(1.5, 0.0125)
    assert measure(buckets, START, since=START - 30) == Load(3.0, 0.0125)


@pytest.mark.parametrize(
    ("buckets", "since"),
    [([], 0.0), ([counts(9, 0, 5, 0.1)], 0.0), ([counts(5, 9000)], 0.0), ([counts(9, 9000)], START - 5.0)],
    ids=["nothing", "no requests", "too short", "begun just now"],
)
def test_too_little_tells_nothing(buckets: list[MirrorCounts], since: float) -> None:
    assert measure(buckets, START, since) is None


def test_what_was_more_than_a_minute_ago_is_forgotten() -> None:
    assert measure([counts(61, 5000, 5000, 5.0), counts(9, 1000)], START, since=0) == Load(1000 / 9, None)


# In a loop -----------------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """Poisson requests, and a shadow that answers what is sampled as far as its time goes."""

    rng: np.random.Generator
    rate: float
    requests_per_s: float
    sample_s: float
    ceiling: float = 1.0
    wanted_per_s: float | None = None
    now: int = START
    changes: list[int] = field(default_factory=list)
    buckets: dict[int, list[float]] = field(default_factory=dict)

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            requests = int(self.rng.poisson(self.requests_per_s))
            offered = int(self.rng.binomial(requests, self.rate))
            each = self.sample_s * self.rng.lognormal(0, 0.1)
            samples = min(offered, max(1, int(1 / each)))
            for place, n in enumerate((requests, samples, samples * each)):
                # The last second has not been flushed yet when somebody looks.
                self.buckets.setdefault(bucket_of(self.now), [0, 0, 0])[place] += n
            if self.now % LOOK_S == 0:
                self.look()

    def look(self) -> None:
        made = [
            MirrorCounts(bucket * float(BUCKET_SECONDS), int(requests), int(samples), seconds)
            for bucket, (requests, samples, seconds) in self.buckets.items()
        ]
        load = measure(made, self.now + 1, since=START)
        if load is None:
            return
        rate = next_rate(self.rate, load, ceiling=self.ceiling, wanted_per_s=self.wanted_per_s)
        if rate != self.rate:
            self.changes.append(self.now)
            self.rate = rate

    @property
    def demand(self) -> float:
        """Share of the shadow's time that is asked for."""
        return self.rate * self.requests_per_s * self.sample_s

    def changes_since(self, at: int) -> int:
        return sum(changed > at for changed in self.changes)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    start=st.floats(0.001, 1),
    requests_per_s=st.floats(5, 3000),
    sample_s=st.floats(0.0001, 0.5),
)
@example(seed=0, start=0.5, requests_per_s=236.0, sample_s=0.0078125)  # just under where it would fall
def test_from_any_rate_it_comes_within_the_budget_and_stays_still(
    seed: int, start: float, requests_per_s: float, sample_s: float
) -> None:
    machine = Machine(np.random.default_rng(seed), start, requests_per_s, sample_s)
    machine.run(120)
    assert machine.demand < 1.0
    assert machine.demand > 0.4 or machine.rate == 1.0
    machine.run(600)
    assert machine.changes_since(START + 120) <= 3
    assert machine.demand < 1.0


@pytest.mark.parametrize("seed", range(20))
def test_where_requests_are_rare_the_rate_moves_less_than_once_a_minute(seed: int) -> None:
    machine = Machine(np.random.default_rng(seed), 1.0, 2.0, 0.5)
    machine.run(720)
    assert machine.changes_since(START + 120) < 10
    assert machine.demand <= 1.0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), requests_per_s=st.floats(5, 3000), wanted=st.floats(1, 100))
def test_once_promoted_it_settles_near_the_pairs_that_are_wanted(
    seed: int, requests_per_s: float, wanted: float
) -> None:
    machine = Machine(np.random.default_rng(seed), 1.0, requests_per_s, 0.0005, wanted_per_s=wanted)
    machine.run(60)
    pairs = machine.rate * requests_per_s
    assert machine.rate == 1.0 or 0.6 * wanted < pairs < 1.4 * wanted
    machine.run(600)
    assert machine.changes_since(START + 60) <= 3


@pytest.mark.parametrize("ceiling", [1.0, 0.25])
def test_when_traffic_falls_the_rate_returns_to_its_ceiling(ceiling: float) -> None:
    machine = Machine(np.random.default_rng(1), ceiling, 3000, 0.005, ceiling)
    machine.run(60)
    assert machine.rate < 0.07
    machine.requests_per_s = 20
    machine.run(120)
    assert machine.rate == ceiling


def test_when_traffic_surges_the_rate_falls_within_a_quarter_of_a_minute() -> None:
    machine = Machine(np.random.default_rng(1), 1.0, 50, 0.005)
    machine.run(300)
    assert machine.rate == 1.0
    machine.requests_per_s = 2000
    machine.run(20)
    assert machine.demand < 1.2
    machine.run(20)
    assert machine.demand < 1.0


def test_when_the_machine_gets_slower_the_rate_follows() -> None:
    machine = Machine(np.random.default_rng(1), 1.0, 500, 0.001)
    machine.run(60)
    assert machine.rate == 1.0
    machine.sample_s = 0.01
    machine.run(60)
    assert 0.4 < machine.demand < 1.0
