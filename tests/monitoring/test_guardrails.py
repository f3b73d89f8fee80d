"""From counts to verdicts."""

from __future__ import annotations

import numpy as np
import pytest

from monitoring.detector import BLOCK_PAIRS, Detector, follow
from monitoring.groups import GroupSpec
from monitoring.guardrails import Assessment, Scope, Verdict, describe, evaluate, limits
from monitoring.policy import Policy, parse_policy
from monitoring.quality import quality_of
from monitoring.tally import LATENCY_BLOCKS, MISSING

GROUPS = (GroupSpec("DIS=1", 0.1, -0.3), GroupSpec("DIS=2", 0.9, 0.3), GroupSpec("SEX=1", 0.5, 0.0))


def verdict(policy: Policy, totals: dict, name: str):
    return next(v for v in evaluate(policy, Scope(GROUPS), totals).verdicts if v.name == name)


@pytest.mark.parametrize("groups", [(), GROUPS])
def test_the_false_rollback_rate_is_divided_without_rest(groups: tuple) -> None:
    policy = Policy()
    spent = {"rollback": 0.0, "hold": 0.0, "alert": 0.0}
    for (name, _), limit in limits(policy, Scope(groups)).items():
        spent[policy.guardrails.section(name).action] += 10**-limit
    assert spent["rollback"] == pytest.approx(policy.false_rollback_rate)
    assert spent["hold"] + spent["alert"] == pytest.approx(policy.false_rollback_rate)


def test_without_groups_their_share_of_the_rate_goes_to_the_others() -> None:
    assert (
        limits(Policy(), Scope())["accuracy_drop", ""] < limits(Policy(), Scope(GROUPS))["accuracy_drop", ""]
    )
    assert {name for name, _ in limits(Policy(), Scope())} == {
        *("accuracy_drop", "latency_p95", "treatment_errors", "sample_ratio", "resource_use")
    }


def test_a_guardrail_that_is_off_neither_judges_nor_takes_a_share() -> None:
    policy = parse_policy({"guardrails": {"latency_p95": {"enabled": False}}})
    assert ("latency_p95", "") not in limits(policy, Scope(GROUPS))
    assert all(v.guardrail != "latency_p95" for v in evaluate(policy, Scope(GROUPS), {}).verdicts)


def test_nothing_counted_convicts_nobody_and_promotes_nobody() -> None:
    found = evaluate(Policy(), Scope(GROUPS), {})
    assert not found.crossed("rollback")
    assert found.suspicion is None
    assert not found.promotion.ready
    assert "needs pairs" in found.promotion.sentence


def test_a_clear_drop_crosses_and_its_description_says_how_sure_that_is() -> None:
    found = verdict(Policy(), {("accuracy_drop", ""): {1: 150, -1: 20, 0: 830, MISSING: 5}}, "accuracy_drop")
    assert found.crossed
    assert found.estimate == pytest.approx(0.13)
    assert (found.n, found.missing) == (1005, 5)
    assert "accuracy drop 13.0 pt (2 pt tolerated): evidence 10^" in describe(found)


def test_a_harmed_group_is_named() -> None:
    totals = {
        ("group_harm", "DIS=1"): {1: 60, -1: 5, 0: 235},
        ("accuracy_drop", ""): {1: 65, -1: 50, 0: 9000},
    }
    assert [v.name for v in evaluate(Policy(), Scope(GROUPS), totals).crossed("rollback")] == [
        "group_harm/DIS=1"
    ]


def test_a_gap_that_widens_is_found_and_sized() -> None:
    found = verdict(
        Policy(), {("demographic_parity", "DIS=1"): {-1: 120, 0: 280}}, "demographic_parity/DIS=1"
    )
    assert found.crossed
    assert found.estimate == pytest.approx(0.3)


def test_a_gap_that_closes_is_not() -> None:
    found = verdict(Policy(), {("demographic_parity", "DIS=1"): {1: 120, 0: 280}}, "demographic_parity/DIS=1")
    assert not found.crossed
    assert found.estimate == pytest.approx(-0.3)


def test_a_gap_that_is_not_established_may_move_in_neither_direction() -> None:
    groups = (GroupSpec("DIS=1", 0.1, 0.01, error=0.05),)
    for moved in (1, -1):
        totals = {("demographic_parity", "DIS=1"): {moved: 120, 0: 280}}
        (found,) = [
            v
            for v in evaluate(Policy(), Scope(groups), totals).verdicts
            if v.guardrail == "demographic_parity"
        ]
        assert found.crossed
        assert found.estimate == pytest.approx(0.3)
        assert "favourable-rate gap of DIS=1 moved by 30.0 pt (5 pt tolerated)" in describe(found)


def test_a_gap_that_is_established_may_close() -> None:
    groups = (GroupSpec("DIS=1", 0.1, -0.3, error=0.05),)
    found = evaluate(Policy(), Scope(groups), {("demographic_parity", "DIS=1"): {1: 120, 0: 280}})
    assert not found.crossed("rollback")
    found = evaluate(Policy(), Scope(groups), {("demographic_parity", "DIS=1"): {-1: 120, 0: 280}})
    assert "favourable-rate gap of DIS=1 wider by" in describe(found.crossed("rollback")[0])


def test_missing_rows_are_no_evidence_of_a_wider_gap() -> None:
    seen = {-1: 120, 0: 280}
    name = "demographic_parity/DIS=1"
    assert not verdict(Policy(), {("demographic_parity", "DIS=1"): {**seen, MISSING: 60}}, name).crossed
    found = verdict(Policy(), {("demographic_parity", "DIS=1"): {**seen, MISSING: 5}}, name)
    assert found.crossed
    assert (found.n, found.missing, found.estimate) == (405, 5, pytest.approx(0.3))


def test_every_latency_block_counts_alike_and_the_description_says_so() -> None:
    # 8 of 100 blocks are small and slow: 8% of the blocks, and hardly any of the requests.
    totals = {(LATENCY_BLOCKS, ""): {0: 92, 1000: 8}, ("latency_p95", "treatment"): {0: 184_000, 1: 200}}
    found = verdict(Policy(), totals, "latency_p95")
    assert (found.n, found.estimate) == (100, pytest.approx(0.08))
    assert "share over the latency limit, averaged over 10 s blocks: 8.0% (5% tolerated)" in describe(found)


def test_slow_blocks_cross_and_quick_ones_do_not() -> None:
    slow = {(LATENCY_BLOCKS, ""): {400: 6}, ("latency_p95", "treatment"): {0: 600, 1: 400}}
    quick = {(LATENCY_BLOCKS, ""): {0: 500, 60: 20}, ("latency_p95", "treatment"): {0: 999, 1: 1}}
    assert verdict(Policy(), slow, "latency_p95").crossed
    assert verdict(Policy(), slow, "latency_p95").estimate == pytest.approx(0.4)
    assert not verdict(Policy(), quick, "latency_p95").crossed


def test_failing_requests_cross() -> None:
    assert verdict(Policy(), {("treatment_errors", ""): {0: 180, 1: 20}}, "treatment_errors").crossed
    assert not verdict(Policy(), {("treatment_errors", ""): {0: 10_000, 1: 90}}, "treatment_errors").crossed


def test_agreement_alone_promotes_without_any_label() -> None:
    found = evaluate(Policy(), Scope(), {("disagreement", ""): {0: 995, 1: 5}})
    assert found.promotion.ready
    assert found.promotion.best.guardrail == "disagreement"


def test_missing_answers_keep_agreement_from_promoting() -> None:
    assert not evaluate(Policy(), Scope(), {("disagreement", ""): {0: 995, MISSING: 30}}).promotion.ready


def test_labels_promote_where_the_arms_disagree_too_much_for_a_certificate() -> None:
    totals = {("disagreement", ""): {0: 3800, 1: 200}, ("accuracy_drop", ""): {0: 3800, 1: 100, -1: 100}}
    found = evaluate(Policy(), Scope(), totals)
    assert found.promotion.ready
    assert found.promotion.best.guardrail == "accuracy_drop"


def test_the_two_ways_to_promote_share_the_error_rate() -> None:
    both = evaluate(Policy(), Scope(), {}).certificates
    alone = evaluate(
        parse_policy({"guardrails": {"disagreement": {"enabled": False}}}), Scope(), {}
    ).certificates
    assert 10 ** -both[0].limit_log10 + 10 ** -both[1].limit_log10 == pytest.approx(0.05)
    assert 10 ** -alone[0].limit_log10 == pytest.approx(0.05)


PEOPLE = (GroupSpec("DIS=1", 0.15, -0.5), GroupSpec("DIS=2", 0.85, 0.5), GroupSpec("RAC1P=7", 0.01, 0.1))
GOOD: dict[tuple[str, str], dict[int, int]] = {
    ("accuracy_drop", ""): {0: 3960, 1: 20, -1: 20},
    ("group_harm", "DIS=1"): {0: 590, 1: 5, -1: 5},
    ("group_harm", "DIS=2"): {0: 3370, 1: 15, -1: 15},
}


def test_everybody_and_each_larger_group_proven_promotes() -> None:
    found = evaluate(Policy(), Scope(PEOPLE), GOOD).promotion
    assert found.ready
    assert found.sentence == "accuracy_drop proves a drop under 2 pt, and under 5 pt in 2 groups"


def test_a_larger_group_that_is_harmed_is_not_averaged_away() -> None:
    harmed = {**GOOD, ("group_harm", "DIS=1"): {0: 530, 1: 70}}
    found = evaluate(Policy(), Scope(PEOPLE), harmed)
    assert not found.promotion.ready
    assert found.promotion.more_pairs is None
    assert "5 pt in DIS=1 (accuracy_drop stands at 11.7 pt)" in found.promotion.sentence


def test_a_group_that_needs_more_of_its_own_needs_the_more_of_everybodys() -> None:
    few = {**GOOD, ("group_harm", "DIS=1"): {0: 60}}
    found = evaluate(Policy(), Scope(PEOPLE), few).promotion
    assert found.more_pairs is not None
    assert 200 < found.more_pairs < 600  # some 60 of the group's own, which is 15% of everybody


@pytest.mark.parametrize("enabled", [True, False])
def test_every_group_has_its_certificates_shown_needed_or_not(enabled: bool) -> None:
    policy = parse_policy({"guardrails": {"group_harm": {"enabled": enabled}}})
    shown = {(c.guardrail, c.group) for c in evaluate(policy, Scope(PEOPLE), GOOD).certificates}
    assert {("disagreement", group.name) for group in PEOPLE} <= shown


def test_without_the_group_guardrail_groups_need_no_proof() -> None:
    policy = parse_policy({"guardrails": {"group_harm": {"enabled": False}}})
    assert evaluate(policy, Scope(PEOPLE), {("accuracy_drop", ""): GOOD["accuracy_drop", ""]}).promotion.ready


def test_a_candidate_at_the_margin_in_one_group_is_promoted_at_most_at_the_stated_rate() -> None:
    # Everybody is fine and DIS=1 loses just the margin, 5 pt, on 15% discordance; looked at every 60 of its pairs.
    random = np.random.default_rng(7)
    runs, promoted = 150, 0
    for _ in range(runs):
        drawn = random.choice([1, -1, 0], size=1500, p=[0.10, 0.05, 0.85])
        for end in range(60, 1501, 60):
            seen = {d: int((drawn[:end] == d).sum()) for d in (1, -1, 0)}
            if evaluate(Policy(), Scope(PEOPLE), {**GOOD, ("group_harm", "DIS=1"): seen}).promotion.ready:
                promoted += 1
                break
    # At a true rate of 5%, more than 14 of 150 has a probability under 1%.
    assert promoted <= 14


def test_a_promotion_that_is_not_ready_says_how_many_pairs_it_needs() -> None:
    found = evaluate(Policy(), Scope(), {("accuracy_drop", ""): {0: 190, 1: 5, -1: 5}})
    assert not found.promotion.ready
    assert found.promotion.more_pairs
    assert "needs about" in found.promotion.sentence


def test_a_candidate_at_the_margin_is_told_that_more_pairs_would_not_help() -> None:
    totals = {("accuracy_drop", ""): {0: 940, 1: 40, -1: 20}, ("disagreement", ""): {0: 940, 1: 60}}
    assert "would not prove" in evaluate(Policy(), Scope(), totals).promotion.sentence


def test_each_group_has_its_certificate() -> None:
    found = evaluate(Policy(), Scope(GROUPS), {("disagreement", "DIS=1"): {0: 400}})
    by_group = {c.group: c for c in found.certificates if c.group}
    assert set(by_group) == {"DIS=1", "DIS=2", "SEX=1"}
    assert by_group["DIS=1"].reached
    assert not by_group["SEX=1"].reached


def test_what_there_was_against_a_group_before_promotion_is_not_forgotten() -> None:
    before = {("group_harm", "DIS=1"): {1: 14, 0: 80}}
    since = {("group_harm", "DIS=1"): {1: 14, 0: 80}}
    detectors = {"group_harm": {"DIS=1": follow(Detector(), [1] * 14 + [0] * 80, 0.05)}}
    alone = evaluate(Policy(), Scope(GROUPS, detectors=detectors), since)
    assert not alone.crossed("rollback")
    found = evaluate(Policy(), Scope(GROUPS, detectors=detectors), since, before)
    assert [v.name for v in found.crossed("rollback")] == ["group_harm/DIS=1"]
    (verdict,) = found.crossed("rollback")
    assert (verdict.late, verdict.n) == (False, 188)


def test_once_promoted_the_detector_speaks_where_it_is_nearer_to_its_limit() -> None:
    good = {("accuracy_drop", ""): {0: 100_000}}
    detectors = {"accuracy_drop": {"": follow(Detector(), [1, 0] * 200, 0.02)}}
    found = verdict_of(evaluate(Policy(), Scope(detectors=detectors), good, {}), "accuracy_drop")
    assert found.late
    assert found.crossed
    assert "accuracy drop of late" in describe(found)
    assert not verdict_of(evaluate(Policy(), Scope(), good), "accuracy_drop").late


def verdict_of(found: Assessment, name: str) -> Verdict:
    return next(v for v in found.verdicts if v.name == name)


def test_once_promoted_the_detectors_share_the_run_length_without_rest() -> None:
    policy = parse_policy({"promoted_run_length": 1_000_000})
    found = limits(policy, Scope(GROUPS, ("no", "yes", "perhaps"), detectors={}))
    late = [
        limit for (name, _), limit in found.items() if name in ("accuracy_drop", "group_harm", "class_harm")
    ]
    assert len(late) == 1 + len(GROUPS) + 3
    assert sum(10**-limit for limit in late) == pytest.approx(BLOCK_PAIRS / 1_000_000)
    others = {name: limit for name, limit in found.items() if limit not in late}
    assert others.items() <= limits(policy, Scope(GROUPS, ("no", "yes", "perhaps"))).items()


def test_suspicion_ignores_guardrails_that_only_alert() -> None:
    totals = {("accuracy_drop", ""): {1: 28, -1: 5, 0: 250}}
    assert evaluate(Policy(), Scope(), totals).suspicion is not None
    quiet = parse_policy({"guardrails": {"accuracy_drop": {"action": "alert"}}})
    assert evaluate(quiet, Scope(), totals).suspicion is None


def test_the_guardrail_furthest_past_its_limit_comes_first() -> None:
    totals = {("accuracy_drop", ""): {1: 60, 0: 500}, ("treatment_errors", ""): {1: 200, 0: 100}}
    assert [v.name for v in evaluate(Policy(), Scope(), totals).crossed("rollback")] == [
        "treatment_errors",
        "accuracy_drop",
    ]


def test_few_disagreements_prove_nothing_of_balanced_accuracy_if_all_may_be_of_a_rare_class() -> None:
    policy = parse_policy({"guardrails": {"accuracy_drop": {"enabled": False}}})
    few = {("disagreement", ""): {0: 9950, 1: 50}}
    assert evaluate(policy, Scope(), few).promotion.ready
    rare = quality_of("balanced_accuracy", (0.98, 0.02))
    assert not evaluate(policy, Scope(quality=rare), few).promotion.ready


def test_a_drop_of_the_metric_is_held_against_the_margin_in_points_of_the_metric() -> None:
    # 25 times the drop of accuracy, if all of it is in a class of 2%.
    seen = {("accuracy_drop", ""): {1: 40, 0: 9960}}
    rare = quality_of("balanced_accuracy", (0.98, 0.02))
    (found,) = (
        v for v in evaluate(Policy(), Scope(quality=rare), seen).verdicts if v.guardrail == "accuracy_drop"
    )
    assert found.estimate == pytest.approx(0.1)
    assert found.crossed
    assert "balanced accuracy drop 10.0 pt (2 pt tolerated)" in describe(found)
    assert not evaluate(Policy(), Scope(), seen).crossed("rollback")
