"""Policies and guarded groups: what is accepted, and what the refusals say."""

from __future__ import annotations

import pytest

from monitoring.errors import PolicyError
from monitoring.groups import group_specs
from monitoring.policy import STORED, Policy, parse_policy


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
        ({"promoted_pairs_per_s": 0}, "policy.promoted_pairs_per_s"),
        ({"colour": "red"}, "policy.colour: no such setting"),
        ({"guardrails": {"accuracy_drop": {"margin": 2}}}, "policy.guardrails.accuracy_drop.margin"),
        ({"guardrails": {"accuracy_drop": {"action": "pray"}}}, "policy.guardrails.accuracy_drop.action"),
        ({"guardrails": {"reward": {"margin": 0}}}, "policy.guardrails.reward.margin"),
        ({"guardrails": {"reward": {"deadline_s": -1}}}, "policy.guardrails.reward.deadline_s"),
        ({"guardrails": {"reward": {"deadline_s": 90 * 86400 + 1}}}, "policy.guardrails.reward.deadline_s"),
        ({"guardrails": {"speed": {}}}, "policy.guardrails.speed: no such setting"),
        ({"cascade": 0.005}, "policy.cascade"),
        ({"cascade": {}}, "policy.cascade.max_drop"),
        ({"cascade": {"max_drop": -0.1}}, "policy.cascade.max_drop"),
        ({"cascade": {"max_drop": float("nan")}}, "policy.cascade.max_drop"),
        ({"cascade": {"max_drop": 0.005, "threshold": 0.9}}, "policy.cascade.threshold: no such setting"),
        ({"alert_webhook": "file:///etc/passwd"}, "http:// or https://"),
        *(
            ({"alert_webhook": url}, "host that can be called")
            for url in (
                "http://a..b/",
                "http://",
                "http://[::1/",
                "http://a:99999/",
                "http://exa mple/",
                "http://\n/",
            )
        ),
        ({"alert_webhook": f"http://{'a' * 70}.com/"}, "host that can be called"),
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


def test_rewards_are_judged_by_only_where_that_is_asked_for() -> None:
    assert not parse_policy({}).guardrails.reward.enabled
    asked = parse_policy({"guardrails": {"reward": {"enabled": True}}}).guardrails.reward
    assert (asked.margin, asked.deadline_s, asked.weight, asked.action) == (0.02, 3600, 0.2, "rollback")


def test_a_cascade_is_off_unless_a_loss_is_named() -> None:
    assert parse_policy({}).cascade is parse_policy({"cascade": None}).cascade is None
    asked = parse_policy({"cascade": {"max_drop": 0.005}})
    assert asked.cascade is not None
    assert asked.cascade.max_drop == 0.005
    assert Policy.model_validate(asked.model_dump(mode="json"), context=STORED) == asked


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (None, None),
        ("https://hooks.example.com/T0/B0/secret?key=1", "https://hooks.example.com"),
        ("http://user:password@10.0.0.1:8080/x", "http://10.0.0.1:8080"),
        ("http://[::1]:9/x", "http://[::1]:9"),
    ],
)
def test_what_anybody_may_see_of_a_webhook_is_where_it_goes(url: str | None, shown: str | None) -> None:
    policy = parse_policy({"alert_webhook": url, "step_min_pairs": 7})
    assert policy.public() == {**policy.model_dump(mode="json"), "alert_webhook": shown}


def test_a_stored_webhook_that_cannot_be_called_is_hidden() -> None:
    stored = Policy.model_validate({"alert_webhook": "http://a:99999/secret"}, context=STORED)
    assert stored.public()["alert_webhook"] == "hidden"


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


def test_a_gap_is_established_when_the_reference_rows_can_say_so() -> None:
    found = {spec.name: spec for spec in group_specs(REFERENCE)}
    assert found["DIS=1"].error == pytest.approx(0.0435, abs=0.001)
    assert found["DIS=1"].established
    assert found["RAC=1"].gap == pytest.approx(0.098)
    assert found["RAC=1"].established
    few = {"groups": {name: {**entry, "rows": 50} for name, entry in REFERENCE["groups"].items()}}  # type: ignore[attr-defined]
    assert not {spec.name: spec for spec in group_specs(few)}["RAC=1"].established


def test_thirty_equal_rows_do_not_make_a_gap_exact() -> None:
    none = {
        "groups": {"DIS=1": {"rows": 30, "positive_rate": 0.0}, "DIS=2": {"rows": 30, "positive_rate": 0.1}}
    }
    assert not any(spec.established for spec in group_specs(none))


def test_groups_too_small_to_judge_and_groups_of_everybody_are_left_out() -> None:
    assert [spec.name for spec in group_specs(REFERENCE)] == ["DIS=1", "DIS=2", "RAC=1", "RAC=2"]


@pytest.mark.parametrize("reference", [None, {}, {"rows": 5, "groups": {}}])
def test_a_workload_without_sensitive_attributes_has_no_groups(reference: dict | None) -> None:
    assert group_specs(reference) == ()
