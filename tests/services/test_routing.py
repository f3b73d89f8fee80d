from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from services.control.auth import RequestIds
from services.routing import CONTROL, TREATMENT, assign, is_sampled, unit_interval

KEYS = [f"user-{number}" for number in range(20_000)]
SIGNED = [RequestIds("k").issue(key) for key in KEYS]


def within(share: float, expected: float, number: int, sigmas: float = 4.0) -> bool:
    """Whether a share of `number` draws lies within 4 standard deviations: a fair draw fails 1 in 16,000."""
    return abs(share - expected) <= sigmas * math.sqrt(expected * (1 - expected) / number)


@given(st.text(), st.text(), st.integers(0, 100))
def test_a_key_gets_the_same_arm_every_time(key: str, rollout: str, weight: int) -> None:
    assert assign(key, rollout, weight) == assign(key, rollout, weight)


@given(st.text(), st.text(), st.integers(0, 100), st.integers(0, 100))
def test_a_key_on_treatment_stays_there_at_every_larger_weight(
    key: str, rollout: str, one: int, other: int
) -> None:
    small, large = sorted((one, other))
    if assign(key, rollout, small) == TREATMENT:
        assert assign(key, rollout, large) == TREATMENT


@given(st.text())
def test_nobody_is_on_treatment_at_weight_0_or_without_a_rollout_and_everybody_at_100(key: str) -> None:
    assert assign(key, "r", 0) == CONTROL
    assert assign(key, None, 100) == CONTROL
    assert assign(key, "r", 100) == TREATMENT


@given(st.text(), st.text())
def test_the_unit_interval_never_reaches_one(key: str, salt: str) -> None:
    assert 0.0 <= unit_interval(key, salt) < 1.0


def test_the_share_on_treatment_is_the_weight() -> None:
    for weight in (1, 5, 25, 50, 90):
        on_treatment = sum(assign(key, "points-1", weight) == TREATMENT for key in KEYS)
        assert within(on_treatment / len(KEYS), weight / 100, len(KEYS))


def test_each_rollout_shuffles_keys_afresh() -> None:
    both = sum(assign(key, "points-1", 50) == assign(key, "points-2", 50) == TREATMENT for key in KEYS)
    assert within(both / len(KEYS), 0.25, len(KEYS))


def test_sampling_is_independent_of_the_arm() -> None:
    treated = [signed for key, signed in SIGNED if assign(key, "points-1", 50) == TREATMENT]
    sampled = sum(is_sampled(signed, 0.3) for signed in treated)
    assert within(sampled / len(treated), 0.3, len(treated))


def test_everything_is_sampled_at_rate_one_and_nothing_at_zero() -> None:
    assert all(is_sampled(signed, 1.0) for _, signed in SIGNED[:1000])
    assert not any(is_sampled(signed, 0.0) for _, signed in SIGNED[:1000])


def test_what_is_sampled_at_one_rate_is_sampled_at_every_larger_one() -> None:
    at = {rate: {s for _, s in SIGNED if is_sampled(s, rate)} for rate in (0.01, 0.1, 0.5)}
    assert at[0.01] < at[0.1] < at[0.5]


def test_a_repeated_request_is_sampled_again_wherever_it_goes() -> None:
    for _, signed in SIGNED[:100]:
        again = RequestIds("k").issue(signed)[1]
        assert is_sampled(again, 0.3) == is_sampled(signed, 0.3)


def test_the_longest_workload_name_leaves_room_for_the_number_in_the_salt() -> None:
    long = "w" * 41
    assert unit_interval("k", "assign:" + long + "-1") != unit_interval("k", "assign:" + long + "-2")
