from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compression.gate import LIMITS, GateResult, judge
from compression.scorecard import ClassScore, Estimate, GroupScore, Latency, Scorecard

NONE = Estimate(value=0, low=0, high=0)


def estimate(value: float, half: float = 0.01) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)


def card(drop: Estimate = NONE, groups: dict[str, Estimate] | None = None, **changes: Any) -> Scorecard:
    quality = estimate(0.8)
    fields: dict[str, Any] = {
        "workload": "w",
        "variant": "v",
        "metric": "accuracy",
        "rows": 1000,
        "quality": quality,
        "drop": drop,
        "agreement": 0.9,
        "classes": {"a": ClassScore(rows=500, recall=quality, drop=NONE)},
        "groups": {
            name: GroupScore(
                rows=100,
                quality=quality,
                drop=lost,
                agreement=0.9,
                selection_rate=0.5,
                full_selection_rate=0.5,
            )
            for name, lost in (groups or {}).items()
        },
        "invalid_outputs": 0,
        "size_bytes": 250,
        "full_size_bytes": 1000,
        "parameters": 10,
        "nonzero_parameters": 9,
        "macs": 100,
        "latency": [
            Latency(batch=1, p50_ms=1, p95_ms=2, p99_ms=3, full_p50_ms=4, full_p95_ms=5, full_p99_ms=6)
        ],
        "batch_sensitivity": 0.0,
        "cpu": "this one",
    }
    return Scorecard(**(fields | changes))


drops = st.builds(estimate, st.floats(-0.3, 0.3), st.floats(0, 0.1))


def test_a_variant_without_any_drop_is_accepted_by_every_profile() -> None:
    for profile in LIMITS:
        assert judge(card(), profile) == GateResult(accepted=True, profile=profile, reasons=[])


def test_a_ruined_group_is_named_with_its_drop_and_interval() -> None:
    verdict = judge(card(groups={"SEX=1": estimate(0.01), "DIS=1": estimate(0.089)}), "standard")
    assert verdict.reasons == ["DIS=1 loses 8.9 pt (7.9 to 9.9), over the 5 pt limit"]
    assert not verdict.accepted


def test_the_worst_group_comes_first() -> None:
    groups = {"A=1": estimate(0.06), "B=1": estimate(0.2), "C=1": estimate(0.1)}
    verdict = judge(card(estimate(0.3), groups), "standard")
    assert [reason.split()[0] for reason in verdict.reasons] == ["B=1", "C=1", "A=1", "overall"]


def test_a_group_too_small_to_tell_ruins_nothing() -> None:
    assert judge(card(groups={"RACE=4": estimate(0.3, 0.4)}), "standard").accepted


def test_overall_the_upper_end_of_the_interval_counts() -> None:
    assert judge(card(estimate(0.03, 0.019)), "standard").accepted
    verdict = judge(card(estimate(0.03, 0.03)), "standard")
    assert verdict.reasons == ["overall accuracy may lose up to 6.0 pt (measured 3.0), over the 5 pt limit"]


def test_recall_of_a_class_counts_where_the_metric_is_balanced_accuracy() -> None:
    hurt = {"fraud": ClassScore(rows=30, recall=estimate(0.5), drop=estimate(0.2, 0.1))}
    assert judge(card(classes=hurt), "standard").accepted
    verdict = judge(card(classes=hurt, metric="balanced_accuracy"), "standard")
    assert verdict.reasons == ["recall of class fraud loses 20.0 pt (10.0 to 30.0), over the 5 pt limit"]


def test_where_the_metric_is_recall_the_recall_of_each_named_class_counts() -> None:
    hurt = {name: ClassScore(rows=30, recall=estimate(0.5), drop=estimate(0.2, 0.1)) for name in ("a", "b")}
    verdict = judge(card(classes=hurt, metric="recall", recall_of=("b",)), "standard")
    assert verdict.reasons == ["recall of class b loses 20.0 pt (10.0 to 30.0), over the 5 pt limit"]


def test_outputs_that_are_no_numbers_are_refused() -> None:
    assert judge(card(invalid_outputs=1), "generative").reasons == [
        "1 of 1000 outputs are not finite numbers"
    ]


def test_an_unknown_profile_is_an_error() -> None:
    with pytest.raises(KeyError):
        judge(card(), "lenient")


@given(drops, st.dictionaries(st.sampled_from(["A=1", "B=2", "C=3"]), drops))
def test_what_a_strict_profile_accepts_a_loose_one_accepts_too(
    drop: Estimate, groups: dict[str, Estimate]
) -> None:
    verdicts = [
        judge(card(drop, groups), profile).accepted for profile in sorted(LIMITS, key=LIMITS.__getitem__)
    ]
    assert verdicts == sorted(verdicts)


@given(drops, drops, st.floats(0, 0.2), st.sampled_from(sorted(LIMITS)))
def test_doing_worse_never_turns_a_refusal_into_acceptance(
    drop: Estimate, group: Estimate, worse: float, profile: str
) -> None:
    def lower(by: Estimate) -> Estimate:
        return Estimate(value=by.value + worse, low=by.low + worse, high=by.high + worse)

    before = judge(card(drop, {"A=1": group}), profile)
    after = judge(card(lower(drop), {"A=1": lower(group)}), profile)
    assert before.accepted or not after.accepted


@given(drops, st.dictionaries(st.sampled_from(["A=1", "B=2"]), drops))
def test_a_scorecard_and_its_verdict_survive_json(drop: Estimate, groups: dict[str, Estimate]) -> None:
    scorecard = card(drop, groups)
    assert Scorecard.model_validate_json(scorecard.model_dump_json()) == scorecard
    verdict = judge(scorecard, "standard")
    assert GateResult.model_validate_json(verdict.model_dump_json()) == verdict


def test_ratios_over_one_mean_smaller_and_faster() -> None:
    assert card().size_ratio == 4
    assert card().latency_at(1).speedup == 4
