"""The self-test before traffic: it holds for every policy, and finds a broken judge out."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import monitoring.guardrails.rules as rules
import monitoring.self_test as module
import monitoring.tally as tally
from monitoring.baseline import Baseline
from monitoring.controller import Controller
from monitoring.groups import GroupSpec
from monitoring.guardrails import evaluate, scope_of
from monitoring.ledger import Ledger
from monitoring.policy import parse_policy
from monitoring.quality import quality_of
from monitoring.records import Rollout, SelfTest
from monitoring.self_test import EVEN_PAIRS, SelfTestRow, self_test
from tests.monitoring.judgement import World

LATE = ("accuracy_drop", "group_harm", "class_harm")
TWO = ("no", "yes")
GROUPS = tuple(GroupSpec(f"A{a}={v}", 1 / 6, 0.01, 0.02) for a in range(5) for v in range(6))
EVERYTHING = {"equalized_odds": {"enabled": True, "action": "rollback", "label_share": 0.3}}


def rollout(policy: dict[str, Any] | None = None, **more: Any) -> Rollout:
    return Rollout("toy-1", "toy", "full", "small", parse_policy(policy), **{"classes": TWO, **more})


def only(name: str, **settings: Any) -> dict[str, Any]:
    """Guardrails of accuracy, all off but one."""
    return {**{other: {"enabled": False} for other in LATE if other != name}, name: settings}


def rows(seed: int = 0, n: int = 400, accuracy: float = 0.8, classes: int = 2) -> list[SelfTestRow]:
    """Rows of the groups A0=0..5 to A4=0..5, some of which are rare."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        label = int(rng.integers(classes))
        control = label if rng.random() < accuracy else (label + 1) % classes
        made.append(SelfTestRow(control, label, {f"A{a}": str(int(6 * rng.random() ** 2)) for a in range(5)}))
    return made


# What it says ----------------------------------------------------------------------------------------------


def test_it_says_what_was_replayed_and_how_soon_the_planted_drop_was_caught() -> None:
    result = self_test(rollout(), rows())
    assert result.passed
    before, after = result.sentence.split("after ")
    assert before == (
        "self-test: A/A replay of 1,500 pairs of reference rows held; a planted drop of 22 pt was caught "
    )
    pairs, _, guardrail = after.partition(" pairs by ")
    assert 20 <= int(pairs) <= 200
    assert guardrail == "accuracy_drop"


@pytest.mark.parametrize("few", [None, [], rows(n=49)], ids=["none", "empty", "too-few"])
def test_without_reference_rows_it_makes_some_up_and_says_so(few: Sequence[SelfTestRow] | None) -> None:
    result = self_test(rollout(groups=GROUPS), few)
    assert result.passed
    assert "1,500 pairs of made-up rows held" in result.sentence


def test_the_same_rollout_gets_the_same_result_each_time() -> None:
    assert self_test(rollout(groups=GROUPS), rows()) == self_test(rollout(groups=GROUPS), rows())


@pytest.mark.parametrize("action", ["hold", "alert", "dry-run"])
def test_a_policy_that_does_not_roll_back_is_judged_by_what_it_does_instead(action: str) -> None:
    guards = {name: {"action": action} for name in LATE}
    result = self_test(rollout({"guardrails": guards}, groups=GROUPS), None)
    assert result.passed
    assert result.sentence.endswith(f"({action})")


def test_the_strongest_action_must_come_even_if_a_weaker_one_comes_first() -> None:
    guards = {"accuracy_drop": {"action": "hold"}, "class_harm": {"margin": 0.4}}
    result = self_test(rollout({"guardrails": guards}), None)
    assert result.passed
    assert "a planted drop of 60 pt was caught" in result.sentence
    assert "by class_harm/" in result.sentence


def test_a_policy_without_a_guardrail_of_accuracy_passes_and_is_told_that_nothing_would_catch_it() -> None:
    result = self_test(rollout({"guardrails": {name: {"enabled": False} for name in LATE}}), None)
    assert result.passed
    assert "nothing would catch a planted drop" in result.sentence


def test_guardrails_that_have_nobody_to_guard_catch_nothing() -> None:
    result = self_test(rollout({"guardrails": only("group_harm")}), None)
    assert result.passed
    assert "nothing would catch a planted drop" in result.sentence


def test_the_smallest_error_rate_will_do() -> None:
    policy = {"false_rollback_rate": 1e-300, "guardrails": only("accuracy_drop", margin=0.5)}
    result = self_test(rollout(policy), None)
    assert result.passed, result.sentence


# Policies of every shape -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize(("margin", "alpha"), [(0.005, 1e-4), (0.005, 0.5), (0.5, 1e-4), (0.5, 0.5)])
def test_any_margin_and_error_rate_will_do(name: str, margin: float, alpha: float) -> None:
    policy = {"guardrails": only(name, margin=margin), "false_rollback_rate": alpha}
    result = self_test(rollout(policy, groups=GROUPS), rows())
    assert result.passed, result.sentence
    assert f"by {name}" in result.sentence


@pytest.mark.parametrize(("groups", "classes"), [(0, 2), (1, 10), (30, 2), (0, 1000), (30, 1000)])
def test_any_number_of_groups_and_classes_will_do(groups: int, classes: int) -> None:
    names = tuple(f"c{k}" for k in range(classes))
    policy = {"guardrails": only("class_harm"), "false_rollback_rate": 1e-4}
    result = self_test(rollout(policy, groups=GROUPS[:groups], classes=names), rows(classes=classes))
    assert result.passed, result.sentence
    assert "by class_harm/c" in result.sentence


@pytest.mark.parametrize(
    "policy",
    [
        {"cascade": {"max_drop": 0.01}, "alert_webhook": "http://127.0.0.1:9/nobody"},
        {"label_deadline_s": 0, "step_min_pairs": 0, "step_min_seconds": 0, "steps": [0, 100]},
        {"step_min_seconds": 86400, "label_deadline_s": 90 * 86400, "step_min_pairs": 10_000_000},
        {"blind_after_s": 1, "blind_rollback_s": 1, "warmup_timeout_s": 1, "mirror_rate": 1e-9},
        {"promotion_error_rate": 0.5, "promotion_min_group_share": 1, "promoted_run_length": 10_000},
        {"guardrails": {"disagreement": {"enabled": False}}},
        {"guardrails": {"demographic_parity": {"margin": 1e-6}, **EVERYTHING}, "false_rollback_rate": 0.5},
        {"guardrails": {name: {"weight": 1e-9} for name in LATE}},
    ],
    ids=[
        "cascade",
        "no-waits",
        "long-waits",
        "quick-blind",
        "rash-promotion",
        "labels-only",
        "parity",
        "light",
    ],
)
def test_no_other_setting_stands_in_the_way(policy: dict[str, Any]) -> None:
    made = rollout(policy, groups=GROUPS, cascade_threshold=0.9)
    result = self_test(made, rows())
    assert result.passed, result.sentence
    assert "was caught" in result.sentence


def test_what_is_judged_has_every_field_of_the_rollout_but_its_own_history(ledger: Ledger) -> None:
    made = rollout(
        groups=GROUPS, positive=0, cascade_threshold=0.7, quality=quality_of("recall", [0.9, 0.1], [1])
    )
    copy = ledger.rollout(module._copied(ledger, made))
    names = {field.name for field in fields(Rollout)}
    assert names > module._OWN
    for name in names - module._OWN:
        assert getattr(copy, name) == getattr(made, name), name
    assert copy.policy.guardrails == module._patient(made.policy).guardrails


@pytest.mark.parametrize("accuracy", [0.0, 0.5, 1.0])
def test_control_may_be_as_bad_as_it_likes(accuracy: float) -> None:
    result = self_test(rollout(groups=GROUPS), rows(accuracy=accuracy))
    assert result.passed, result.sentence


def test_groups_that_no_row_belongs_to_will_do() -> None:
    strange = (GroupSpec("B=1", 0.01, 0.0, 0.01), GroupSpec("B=2", 0.99, 0.0, 0.01))
    result = self_test(rollout({"guardrails": only("group_harm")}, groups=strange), rows())
    assert result.passed, result.sentence
    assert result.sentence.endswith("by group_harm/B=2")


@pytest.mark.parametrize("metric", ["balanced_accuracy", "recall"])
@pytest.mark.parametrize("known", [None, rows()], ids=["made-up", "reference"])
def test_a_metric_that_weighs_the_classes_will_do(metric: str, known: list[SelfTestRow] | None) -> None:
    weighed = quality_of(metric, [0.97, 0.03], named=[1])
    result = self_test(rollout({"false_rollback_rate": 0.5}, groups=GROUPS, quality=weighed), known)
    assert result.passed, result.sentence


def test_the_baseline_of_the_inputs_makes_no_difference() -> None:
    skewed = Baseline(
        rows=5000, labels=(0.99, 0.01), answers=(0.99, 0.01), calibration=((0.5, 0.5), (1.0, 1.0))
    )
    drift = {"prediction_drift": {"action": "hold"}, "estimated_drop": {"action": "rollback"}}
    result = self_test(rollout({"guardrails": drift}, baseline=skewed), rows())
    assert result.passed, result.sentence


@pytest.mark.parametrize("seed", range(2))
def test_at_no_moment_of_the_a_a_replay_does_any_guardrail_come_near_a_limit(seed: int) -> None:
    policy = {"false_rollback_rate": 0.5, "guardrails": {"equalized_odds": {"enabled": True}}}
    made, given = rollout(policy, groups=GROUPS), rows(seed)
    even = islice(module._even(given, module._wrong(made, given), np.random.default_rng(seed)), EVEN_PAIRS)
    names = [group.name for group in GROUPS]
    odds = tally.Odds(names, 1, 1.0, {})
    waiting: dict[str, tuple[int, int]] = {}
    totals: dict[tuple[str, str], dict[int, int]] = {}
    highest = moved = 0.0
    for number, one in enumerate(even):
        pair = tally.Pair(
            number, f"q{number}", 0, one.control, one.treatment, one.row.groups, 0.0, one.row.label, 0.0
        )
        answers = tally.count_answers([pair], names, 1, waiting)
        labels = tally.count_labels([pair], frozenset(names), 0.0, 60.0, TWO, odds=odds)
        waiting, odds = answers.unmatched, tally.Odds(names, 1, 1.0, labels.unmatched)
        for key, counts in [*answers.tallies.items(), *labels.tallies.items()]:
            place = key.guardrail, key.group
            totals[place] = tally.merge(totals.get(place, {}), counts)
            moved += key.guardrail in ("demographic_parity", *tally.ODDS) and set(counts) != {0}
        if one.control != one.treatment or number % 20 == 5:
            verdicts = evaluate(made.policy, scope_of(made), totals).verdicts
            highest = max(highest, *(verdict.evidence_log10 for verdict in verdicts))
    assert highest < math.log10(1.5)
    assert moved > 100


# A broken judge --------------------------------------------------------------------------------------------


def test_a_judge_that_never_objects_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "drop_evidence", lambda counts, _: np.zeros(len(counts)))
    result = self_test(rollout(groups=GROUPS), rows())
    assert not result.passed
    assert "a planted drop of 22 pt was not caught within" in result.sentence


def test_a_judge_that_takes_the_arms_for_each_other_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rules.drop_evidence
    monkeypatch.setattr(rules, "drop_evidence", lambda counts, margin: right(counts[:, [1, 0, 2, 3]], margin))
    assert "was not caught" in self_test(rollout(), rows()).sentence


def test_a_judge_that_objects_to_any_difference_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "drop_evidence", lambda counts, _: np.asarray(counts)[:, :2].sum(axis=1))
    result = self_test(rollout(), rows())
    assert not result.passed
    assert result.sentence.startswith(
        "an A/A replay of 1,500 pairs of reference rows did not hold: rollback by accuracy_drop: accuracy drop"
    )


def test_a_judge_that_forgets_what_speaks_for_the_candidate_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = rules.drop_evidence
    monkeypatch.setattr(
        rules, "drop_evidence", lambda counts, margin: right(np.asarray(counts) * [1, 0, 1, 1], margin)
    )
    assert not self_test(rollout(), rows()).passed


def test_an_alarm_that_only_holds_or_tells_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "drop_evidence", lambda counts, _: np.asarray(counts)[:, :2].sum(axis=1))
    guards = {name: {"action": "alert"} for name in LATE}
    assert (
        "did not hold: alert by accuracy_drop" in self_test(rollout({"guardrails": guards}), rows()).sentence
    )


def test_a_judge_that_counts_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monitoring.controller.count", lambda *_: False)
    result = self_test(rollout(), rows())
    assert not result.passed
    assert "0 of them and 0 of 130 labels were counted" in result.sentence


def test_a_rollout_whose_judge_is_broken_is_rolled_back_before_it_gets_any_traffic(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "drop_evidence", lambda counts, _: np.zeros(len(counts)))
    world.controller = Controller(
        world.ledger, clock=lambda: world.now, self_test=lambda given: self_test(given, None)
    )
    world.start()
    world.step()
    decisions = world.ledger.decisions(world.rollout_id)
    assert [(d.to_state, d.weight) for d in decisions] == [("pending", 0), ("rolled_back", 0)]
    assert decisions[-1].reason.startswith("self-test failed: a planted drop of 22 pt was not caught")


# What it leaves behind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [False, True])
def test_its_ledgers_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if broken:
        monkeypatch.setattr(Ledger, "record_pairs", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            self_test(rollout(), None)
    else:
        assert self_test(rollout(), None).passed
    assert list(tmp_path.iterdir()) == []


def test_the_result_of_a_real_rollout_stands_in_its_ledger(world: World) -> None:
    results: list[SelfTest] = []
    world.controller = Controller(
        world.ledger,
        clock=lambda: world.now,
        self_test=lambda given: results.append(self_test(given, rows())) or results[-1],
    )
    world.start(groups=GROUPS, classes=TWO)
    world.warm()
    assert world.ledger.decisions(world.rollout_id)[1].reason == results[0].sentence
    assert world.ledger.verify_decisions().problem is None


def test_it_takes_little_time() -> None:
    cpu = time.thread_time()
    assert self_test(rollout(groups=GROUPS), rows()).passed
    assert time.thread_time() - cpu < 3.0


def test_a_judge_whose_evidence_is_too_large_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rules.drop_evidence
    monkeypatch.setattr(rules, "drop_evidence", lambda counts, margin: 5 * right(counts, margin))
    result = self_test(rollout(), rows())
    assert not result.passed
    assert "where evidence takes" in result.sentence


def test_a_judge_that_takes_what_is_missing_for_harm_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rules.drop_evidence

    def harmful(counts: np.ndarray, margin: float) -> np.ndarray:
        table = np.asarray(counts)
        return right(table * [1, 1, 1, 0] + table[..., 3:] * [1, 0, 0, 0], margin)

    monkeypatch.setattr(rules, "drop_evidence", harmful)
    assert not self_test(rollout(), rows()).passed


def test_a_judge_that_does_not_wait_for_labels_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tally.label_outcome
    monkeypatch.setattr(tally, "label_outcome", lambda *given: right(*given) or 0)
    assert not self_test(rollout(), rows()).passed
