"""Policies and guarded groups: what is accepted, and what the refusals say."""

from __future__ import annotations

import pytest

from monitoring.errors import PolicyError
from monitoring.groups import group_specs
from monitoring.policy import Policy, parse_policy


def test_an_empty_section_is_the_default_policy() -> None:
    assert parse_policy(None) == parse_policy({}) == Policy()
    assert Policy().steps == (0, 1, 5, 25, 50, 90)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"false_rollback_rate": 0}, "policy.false_rollback_rate"),
        ({"false_rollback_rate": float("nan")}, "policy.false_rollback_rate"),
        ({"steps": [1, 5]}, "first step must be 0"),
        ({"steps": [0, 5, 5]}, "larger than the one before"),
        ({"steps": [0, 101]}, "policy.steps.1"),
        ({"steps": [0]}, "policy.steps"),
        ({"mirror_rate": 0}, "policy.mirror_rate"),
        ({"colour": "red"}, "policy.colour: no such setting"),
        ({"guardrails": {"accuracy_drop": {"margin": 2}}}, "policy.guardrails.accuracy_drop.margin"),
        ({"guardrails": {"accuracy_drop": {"action": "pray"}}}, "policy.guardrails.accuracy_drop.action"),
        ({"guardrails": {"speed": {}}}, "policy.guardrails.speed: no such setting"),
        ({"alert_webhook": "file:///etc/passwd"}, "http:// or https://"),
        (
            {"guardrails": {"accuracy_drop": {"enabled": False}, "disagreement": {"enabled": False}}},
            "nothing can promote",
        ),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line_that_names_it(section: dict, says: str) -> None:
    with pytest.raises(PolicyError) as refused:
        parse_policy(section)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_wrong_setting_is_named_at_once() -> None:
    with pytest.raises(PolicyError, match=r"blind_after_s.*latency_slo_ms"):
        parse_policy({"blind_after_s": -1, "latency_slo_ms": 0})


REFERENCE = {
    "rows": 1000,
    "groups": {
        "DIS=1": {"rows": 100, "positive_rate": 0.2},
        "DIS=2": {"rows": 900, "positive_rate": 0.5},
        "RAC=9": {"rows": 10, "positive_rate": 0.5},
        "RAC=1": {"rows": 500, "positive_rate": 0.5},
        "RAC=2": {"rows": 490, "positive_rate": 0.4},
        "CITY=X": {"rows": 1000, "positive_rate": 0.47},
    },
}


def test_groups_have_the_gap_to_everybody_else_with_the_same_attribute() -> None:
    found = {spec.name: spec for spec in group_specs(REFERENCE)}
    assert found["DIS=1"].gap == pytest.approx(-0.3)
    assert found["DIS=2"].gap == pytest.approx(0.3)
    assert found["DIS=1"].share == pytest.approx(0.1)


def test_groups_too_small_to_judge_and_groups_of_everybody_are_left_out() -> None:
    assert [spec.name for spec in group_specs(REFERENCE)] == ["DIS=1", "DIS=2", "RAC=1", "RAC=2"]


@pytest.mark.parametrize("reference", [None, {}, {"rows": 5, "groups": {}}])
def test_a_workload_without_sensitive_attributes_has_no_groups(reference: dict | None) -> None:
    assert group_specs(reference) == ()
