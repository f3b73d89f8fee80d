from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compression.cost import Cost, Deployment, Prices, costs, deployments, full_ms
from compression.errors import CompressionError
from compression.gate import GateResult
from compression.scorecard import CascadePoint, Estimate, Latency

from .test_gate import NONE, card, estimate

ACCEPTED = GateResult(accepted=True, profile="standard", reasons=[])
REFUSED = GateResult(accepted=False, profile="standard", reasons=["no"])
PRICES = Prices(requests_per_day=1_000_000, price_per_hour=0.4, cores=4, utilization=0.5)


def timed(own: float, full: float) -> list[Latency]:
    return [Latency(batch=1, p50_ms=own, p95_ms=9, p99_ms=9, full_p50_ms=full, full_p95_ms=9, full_p99_ms=9)]


def point(max_drop: float, threshold: float, escalated: float, cost_ratio: float) -> CascadePoint:
    return CascadePoint(
        max_drop=max_drop,
        threshold=threshold,
        escalated=estimate(escalated),
        quality=estimate(0.8),
        drop=estimate(max_drop / 2),
        worst_group=None,
        worst_group_drop=None,
        cost_ratio=cost_ratio,
    )


def deployment(time_ratio: float, drop: Estimate | None = NONE) -> Deployment:
    return Deployment("v", "v", time_ratio, drop, accepted=True)


def test_a_thousand_requests_and_a_year_of_them_cost_what_one_reckons_by_hand() -> None:
    # 2 ms at half of full precision's 4; a core-hour costs 0.1, and half of it works: 0.2 for each hour of work.
    (found,) = costs([deployment(0.5)], 4.0, PRICES)
    assert found.cpu_s_per_request == pytest.approx(0.002)
    assert found.cpu_s_per_1000 == pytest.approx(2)
    assert found.kwh_per_1000 == pytest.approx(2 * 10 / 3_600_000)
    assert found.cost_per_1000 == pytest.approx(2 / 3600 * 0.2)
    assert found.cost_per_year == pytest.approx(2 / 3600 * 0.2 * 1000 * 365)
    assert found.saving_per_year == pytest.approx(found.cost_per_year)


def test_the_mirror_is_charged_to_the_variant_and_not_to_full_precision() -> None:
    chosen = [deployment(1.0, drop=None), deployment(0.5)]
    full, variant = costs(chosen, 4.0, replace(PRICES, mirror_rate=0.25))
    assert full.cpu_s_per_1000 == pytest.approx(4)
    assert (full.saving_per_year, full.break_even_mirror_rate) == (0, None)
    assert variant.cpu_s_per_1000 == pytest.approx(2 + 0.25 * 4)


ratios = st.floats(0.001, 3)
prices = st.builds(
    Prices,
    requests_per_day=st.floats(1, 1e9),
    price_per_hour=st.floats(0.001, 100),
    cores=st.integers(1, 128),
    watts_per_core=st.floats(0.1, 100),
    mirror_rate=st.floats(0, 1),
    utilization=st.floats(0.01, 1),
)


@given(st.floats(0.001, 1000), ratios, prices)
def test_what_is_saved_and_what_is_spent_are_together_what_full_precision_costs(
    ms: float, ratio: float, asked: Prices
) -> None:
    full, variant = costs([deployment(1.0, drop=None), deployment(ratio)], ms, asked)
    assert variant.cost_per_year + variant.saving_per_year == pytest.approx(full.cost_per_year)


@given(st.floats(0.001, 1000), ratios, prices)
def test_at_the_break_even_mirror_rate_nothing_is_saved(ms: float, ratio: float, asked: Prices) -> None:
    full, before = costs([deployment(1.0, drop=None), deployment(ratio)], ms, asked)
    rate = before.break_even_mirror_rate
    assert rate is not None
    assert 0 <= rate <= 1
    (at,) = costs([deployment(ratio)], ms, replace(asked, mirror_rate=rate))
    if ratio <= 1:
        assert at.saving_per_year == pytest.approx(0, abs=1e-9 * full.cost_per_year)
    else:
        assert (rate, at.saving_per_year < 0) == (0, True)


@given(ratios, prices, st.floats(1.1, 100))
def test_all_costs_grow_with_price_and_years_with_requests(ratio: float, asked: Prices, times: float) -> None:
    def one(prices: Prices) -> Cost:
        return costs([deployment(ratio)], 1.0, prices)[0]

    before = one(asked)
    dearer = one(replace(asked, price_per_hour=times * asked.price_per_hour))
    busier = one(replace(asked, requests_per_day=times * asked.requests_per_day))
    assert dearer.cost_per_1000 == pytest.approx(times * before.cost_per_1000)
    assert busier.cost_per_1000 == pytest.approx(before.cost_per_1000)
    assert busier.cost_per_year == pytest.approx(times * before.cost_per_year)


def test_a_variants_time_is_its_share_of_full_precisions_in_the_same_scorecard() -> None:
    # Measured on a machine that was three times slower by then: the share is what counts.
    cards = [
        card(variant="full", latency=timed(1.0, 1.0)),
        card(variant="slow-day", latency=timed(1.5, 3.0)),
        card(variant="other", latency=timed(1.1, 1.1)),
    ]
    found = deployments("full", [(entry, ACCEPTED) for entry in cards])
    assert [entry.time_ratio for entry in found] == [1, 0.5, 1]
    assert full_ms(cards) == 1.1


def test_each_variant_is_followed_by_its_cascades_with_its_own_verdict() -> None:
    cascade = [point(0.0025, 0.9, 0.4, 0.7), point(0.005, 0.0, 0.0, 0.3)]
    judged = [
        (card(variant="full", latency=timed(1, 1)), ACCEPTED),
        (card(estimate(0.06), variant="int8", latency=timed(3, 10), cascade=cascade), REFUSED),
    ]
    full, alone, *points = deployments("full", judged)
    assert (full.drop, full.accepted) == (None, True)
    assert (alone.name, alone.time_ratio, alone.drop, alone.threshold) == ("int8", 0.3, estimate(0.06), None)
    assert [(entry.name, entry.time_ratio, entry.escalated, entry.threshold) for entry in points] == [
        ("int8 + cascade 0.25 pt", 0.7, 0.4, 0.9),
        ("int8 + cascade 0.5 pt", 0.3, 0.0, 0.0),
    ]
    assert {entry.accepted for entry in (alone, *points)} == {False}


def test_all_figures_go_into_json_on_one_level() -> None:
    found = [entry.as_dict() for entry in costs([deployment(1.0, drop=None), deployment(0.5)], 4.0, PRICES)]
    assert json.loads(json.dumps(found)) == found
    assert found[0]["drop"] is None
    assert found[1]["drop"] == {"value": 0, "low": 0, "high": 0}
    assert found[1]["time_ratio"] == 0.5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"requests_per_day": 0}, "--requests-per-day must be a number above 0 (not 0)"),
        ({"requests_per_day": -5}, "--requests-per-day must be a number above 0 (not -5)"),
        ({"requests_per_day": math.nan}, "--requests-per-day must be a number above 0 (not nan)"),
        ({"price_per_hour": 0}, "--price-per-hour must be a number above 0 (not 0)"),
        ({"price_per_hour": math.inf}, "--price-per-hour must be a number above 0 (not inf)"),
        ({"cores": 0}, "--cores must be a number above 0 (not 0)"),
        ({"watts_per_core": -1}, "--watts-per-core must be a number above 0 (not -1)"),
        ({"mirror_rate": 1.5}, "--mirror-rate must be from 0 to 1 (not 1.5)"),
        ({"mirror_rate": math.nan}, "--mirror-rate must be from 0 to 1 (not nan)"),
        ({"utilization": 0}, "--utilization must be above 0 and at most 1 (not 0)"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_the_options_name(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(CompressionError) as refused:
        replace(PRICES, **changes)
    assert str(refused.value) == says
