"""The controller from start to end, on a real ledger with a made-up clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from monitoring.controller import Controller, apply_command
from monitoring.errors import RolloutConflict, RolloutNotFound
from monitoring.groups import GroupSpec
from monitoring.ledger import LabelRow, Ledger, WorkerBeat
from monitoring.records import Decision, Rollout, SelfTest
from monitoring.tally import MISSING, TallyKey, bucket_of
from tests.monitoring.judgement import CONTROL, START, TREATMENT, World

DIS = (GroupSpec("DIS=1", 0.1, -0.2), GroupSpec("DIS=2", 0.9, 0.2))


def states(world: World) -> list[str]:
    return [d.to_state for d in world.ledger.decisions(world.rollout_id)]


# The way up ------------------------------------------------------------------------------------------------


def test_without_a_rollout_a_step_finds_nothing_to_do(world: World) -> None:
    result = world.step()
    assert (result.leader, result.rollout, result.error) == (True, None, None)


def test_a_good_candidate_climbs_every_step_and_is_promoted(world: World) -> None:
    world.start()
    world.climb()
    decisions = world.ledger.decisions(world.rollout_id)
    assert [d.weight for d in decisions] == [0, 0, 0, 1, 5, 25, 50, 90, 90, 90]
    assert states(world)[-2:] == ["promoting", "promoted"]
    assert world.ledger.route().weight == 90


def test_labels_are_needed_for_disagreements_only(world: World) -> None:
    world.start()
    world.warm()
    world.traffic([0] * 100, labels=False)
    world.traffic([1, -1])
    assert world.step().resolved == 102
    assert world.ledger.cursor(world.rollout_id).labels == 2


def test_a_worker_that_has_not_loaded_the_candidate_keeps_it_in_warmup(world: World) -> None:
    world.start()
    world.step()
    world.beat("g2", loaded=(CONTROL,), error="no space left")
    result = world.step()
    assert world.rollout.state == "warmup"
    assert "no space left" in result.waiting


def test_a_worker_that_holds_another_control_keeps_it_in_warmup(world: World) -> None:
    world.start()
    world.step()
    world.beat("g2", loaded=("toy-full:2", TREATMENT), error="no variant toy-full:1 in the model store")
    result = world.step()
    assert world.rollout.state == "warmup"
    assert "no variant toy-full:1" in result.waiting


def test_services_that_do_not_serve_need_not_load_the_candidate(world: World) -> None:
    world.start()
    world.ledger.heartbeat(WorkerBeat("m1", "Monitor", 2, 0, START, (), None, START + 0.5))
    world.warm()


def test_an_open_disagreement_holds_up_the_pairs_behind_it_until_its_deadline(world: World) -> None:
    world.start({"label_deadline_s": 30, "step_min_pairs": 1000})
    world.warm()
    world.traffic([1], labels=False)
    world.traffic([0] * 10)
    assert world.step().resolved == 0
    assert world.step(30).resolved == 11
    assert world.ledger.totals(world.rollout_id, 0)["accuracy_drop", ""] == {0: 10, MISSING: 1}


def test_a_label_that_comes_after_its_pair_was_counted_changes_nothing_and_is_kept(world: World) -> None:
    world.start({"label_deadline_s": 30, "step_min_pairs": 1000})
    world.warm()
    (request,) = world.traffic([1], labels=False)
    world.step(31)
    world.ledger.record_labels([LabelRow(request, 0, 1, world.now)])
    world.step()
    assert world.ledger.totals(world.rollout_id, 0)["accuracy_drop", ""] == {MISSING: 1}
    assert world.ledger.recent_pairs(world.rollout_id)[0].label == 1


def test_evidence_starts_afresh_with_promotion_and_goes_on_guarding(world: World) -> None:
    world.start()
    world.climb()
    assert world.ledger.totals(world.rollout_id, 1) == {}
    world.traffic([1] * 40 + [0] * 60)
    world.step()
    assert (world.rollout.state, world.rollout.epoch) == ("rolled_back", 1)


# The way down ----------------------------------------------------------------------------------------------


def test_a_bad_candidate_is_rolled_back_with_the_evidence_it_was_done_on(world: World) -> None:
    world.start()
    world.warm()
    arrived = world.now
    world.traffic([1] * 30 + [-1] * 2 + [0] * 68)
    result = world.step()
    assert world.rollout.state == "rolled_back"
    decision = world.ledger.decisions(world.rollout_id)[-1]
    assert (decision.guardrail, decision.group, decision.actor) == ("accuracy_drop", "", "controller")
    assert decision.drop == pytest.approx(0.28)
    assert decision.evidence_log10 is not None
    assert decision.limit_log10 is not None
    assert decision.evidence_log10 >= decision.limit_log10
    assert (decision.pairs, decision.labels, decision.evidence_at) == (100, 32, arrived)
    assert "accuracy_drop; drop 28.0 pt; evidence 10^" in decision.line()
    assert result.decisions[-1].to_state == "rolled_back"


def test_a_harmed_group_is_named_in_the_decision(world: World) -> None:
    world.start({"step_min_pairs": 10**6}, DIS)
    world.warm()
    world.traffic([0] * 3000, groups={"DIS": "2"})
    world.step()
    world.step()
    world.traffic([1] * 40 + [0] * 80, groups={"DIS": "1"})
    world.step()
    decision = world.ledger.decisions(world.rollout_id)[-1]
    assert (decision.to_state, decision.guardrail, decision.group) == ("rolled_back", "group_harm", "DIS=1")


def test_failing_requests_roll_back(world: World) -> None:
    world.start({"step_min_pairs": 10**6})
    world.warm()
    world.counts({("treatment_errors", ""): {0: 20, 1: 20}})
    world.step()
    assert world.ledger.decisions(world.rollout_id)[-1].guardrail == "treatment_errors"


def test_slow_answers_roll_back_once_their_blocks_have_ended(world: World) -> None:
    world.start({"step_min_pairs": 10**6})
    world.warm()
    world.step(10 - world.now % 10)
    for _ in range(8):
        world.counts({("latency_p95", "treatment"): {0: 10, 1: 30}})
        world.step(10)
    assert world.ledger.decisions(world.rollout_id)[-1].guardrail == "latency_p95"


def test_a_latency_block_counts_when_it_is_over_and_large_enough(world: World) -> None:
    world.start({"step_min_pairs": 10**6})
    world.warm()
    world.step(10 - world.now % 10)
    world.counts({("latency_p95", "treatment"): {0: 30, 1: 10}})
    world.step(11.9)
    assert ("latency_blocks", "") not in world.ledger.totals(world.rollout_id, 0)
    world.step(0.1)
    assert world.ledger.totals(world.rollout_id, 0)["latency_blocks", ""] == {250: 1}
    world.counts({("latency_p95", "treatment"): {1: 19}})
    world.step(20)
    assert world.ledger.totals(world.rollout_id, 0)["latency_blocks", ""] == {250: 1}


def test_a_block_is_compared_with_controls_where_both_are_large_enough(world: World) -> None:
    world.start({"step_min_pairs": 10**6})
    world.warm()
    world.step(10 - world.now % 10)
    world.counts({("latency_p95", "treatment"): {0: 30, 1: 10}, ("latency_p95", "control"): {0: 30, 1: 3}})
    world.step(12)
    found = world.ledger.totals(world.rollout_id, 0)["control_blocks", ""]
    assert found == {250 - 91: 1}  # 3 of 33 is 90.9 in a thousand, and rounded against the alarm
    world.counts({("latency_p95", "treatment"): {0: 30, 1: 10}, ("latency_p95", "control"): {0: 19}})
    world.step(20)
    assert world.ledger.totals(world.rollout_id, 0)["control_blocks", ""] == found


def test_a_candidate_slower_than_control_is_rolled_back_where_both_miss_the_limit(world: World) -> None:
    only = {"latency_p95": {"enabled": False}, "latency_vs_control": {"enabled": True}}
    world.start({"step_min_pairs": 10**6, "guardrails": only})
    world.warm()
    world.step(10 - world.now % 10)
    for _ in range(40):
        world.counts(
            {("latency_p95", "treatment"): {0: 10, 1: 30}, ("latency_p95", "control"): {0: 30, 1: 10}}
        )
        world.step(10)
    assert world.ledger.decisions(world.rollout_id)[-1].guardrail == "latency_vs_control"


def test_requests_that_go_the_wrong_way_hold_the_rollout(world: World) -> None:
    world.start({"step_min_pairs": 10**6})
    world.warm()
    world.counts({("sample_ratio", "5"): {0: 9_500, 1: 500}})
    world.step()
    assert world.rollout.state == "shadowing"
    world.counts({("sample_ratio", "50"): {0: 6_000, 1: 4_000}})
    world.step()
    assert world.rollout.state == "held"
    assert "share of requests on the wrong arm" in world.rollout.reason


def test_the_class_that_is_harmed_is_named(world: World) -> None:
    guards = {"accuracy_drop": {"margin": 0.2}}
    world.start({"step_min_pairs": 10**6, "guardrails": guards}, classes=("no", "yes"))
    world.warm()
    world.traffic([1] * 60 + [0] * 240)  # in these the candidate says no where full precision says yes
    world.step()
    decision = world.ledger.decisions(world.rollout_id)[-1]
    assert (decision.guardrail, decision.to_state) == ("class_harm", "rolled_back")
    assert decision.group in ("no", "yes")


def test_once_promoted_late_harm_is_found_by_a_detector_that_survives_a_restart(world: World) -> None:
    world.start({"step_min_pairs": 10**6, "promoted_run_length": 100_000})
    world.warm()
    apply_command(world.ledger, world.rollout_id, "promote full", "ada", "", world.now)
    world.step()
    world.traffic([0] * 1500)
    world.step()
    held = world.ledger.cursor(world.rollout_id).detectors["accuracy_drop"][""]
    assert sum(held.recent) > 0
    world.controller = Controller(world.ledger, clock=lambda: world.now, holder="first")
    for _ in range(20):
        world.traffic([1, 0, 0, 0] * 25)
        world.step()
    decision = world.ledger.decisions(world.rollout_id)[-1]
    assert (decision.from_state, decision.to_state, decision.guardrail) == (
        "promoted",
        "rolled_back",
        "accuracy_drop",
    )
    assert "accuracy drop of late" in decision.reason


def test_before_promotion_there_are_no_detectors(world: World) -> None:
    world.start({"step_min_pairs": 10**6})
    world.warm()
    world.traffic([0, 1, -1])
    world.step()
    assert world.ledger.cursor(world.rollout_id).detectors == {}


def test_a_dry_run_is_written_down_once_and_changes_nothing(world: World) -> None:
    guards = {"treatment_errors": {"action": "dry-run"}}
    world.start({"step_min_pairs": 10**6, "guardrails": guards})
    world.warm()
    world.counts({("treatment_errors", ""): {0: 20, 1: 20}})
    world.step()
    world.step()
    decisions = world.ledger.decisions(world.rollout_id)
    assert [d.verb for d in decisions if d.guardrail == "treatment_errors"] == ["dry-run"]
    assert world.rollout.state == "shadowing"
    assert world.ledger.undelivered_decisions() == []


def test_a_dry_run_tells_nobody_in_a_state_that_was_told_of(world: World) -> None:
    world.start({"step_min_pairs": 10**6, "guardrails": {"treatment_errors": {"action": "dry-run"}}})
    world.warm()
    apply_command(world.ledger, world.rollout_id, "promote full", "ada", "", world.now)
    for told in world.ledger.undelivered_decisions():
        world.ledger.mark_alerted(told.seq, world.now)
    world.counts({("treatment_errors", ""): {0: 20, 1: 20}})
    world.step()
    assert world.ledger.decisions(world.rollout_id)[-1].verb == "dry-run"
    assert world.ledger.undelivered_decisions() == []


def test_a_candidate_that_no_worker_loads_is_rolled_back(world: World) -> None:
    world.start()
    world.step(beat=False)
    world.step(60, beat=False)
    assert world.rollout.state == "rolled_back"
    assert "no worker is live" in world.rollout.reason


def test_a_guardrail_that_alerts_is_written_down_once_and_stops_nothing(world: World) -> None:
    world.start({"guardrails": {"treatment_errors": {"action": "alert"}}})
    world.warm()
    world.counts({("treatment_errors", ""): {0: 20, 1: 20}})
    world.climb()
    assert [d.verb for d in world.ledger.decisions(world.rollout_id)].count("alert") == 1


def test_a_guardrail_that_holds_waits_for_an_operator(world: World) -> None:
    world.start({"guardrails": {"treatment_errors": {"action": "hold"}}})
    world.warm()
    world.counts({("treatment_errors", ""): {0: 20, 1: 20}})
    assert "operator's resume" in world.step().waiting
    assert world.rollout.state == "held"
    world.order("resume", "known and harmless")
    world.step()
    assert world.rollout.state == "shadowing"


# Blindness -------------------------------------------------------------------------------------------------


def _go_blind(world: World) -> None:
    for _ in range(15):
        world.traffic([0] * 5, pairs=False)
        world.step(5)
    assert world.rollout.state == "blind"


def test_requests_without_pairs_freeze_the_split_until_pairs_come_again(world: World) -> None:
    world.start({"step_min_pairs": 10**6})
    world.warm()
    _go_blind(world)
    world.traffic([0] * 5)
    world.step()
    assert world.rollout.state == "shadowing"
    assert states(world)[-2:] == ["blind", "shadowing"]


def test_lasting_blindness_rolls_back(world: World) -> None:
    world.start({"blind_after_s": 20, "blind_rollback_s": 60, "step_min_pairs": 10**6})
    world.warm()
    for _ in range(30):
        world.traffic([0] * 5, pairs=False)
        world.step(5)
    assert states(world)[-2:] == ["blind", "rolled_back"]


def test_a_quiet_night_is_not_blindness(world: World) -> None:
    world.start()
    world.climb()
    world.step(36_000)
    world.traffic([0] * 50)
    world.step()
    assert world.rollout.state == "promoted"


def test_a_backlog_after_an_outage_of_the_controller_is_not_blindness(world: World) -> None:
    world.start({"step_min_pairs": 10**6})
    world.warm()
    for _ in range(30):
        world.traffic([0] * 150)
        world.now += 10
    while world.step(0.1).more:
        assert world.rollout.state == "shadowing"
    assert world.rollout.state == "shadowing"


def test_a_shadow_behind_a_queue_is_not_blind_as_long_as_pairs_come_in(world: World) -> None:
    world.start({"step_min_pairs": 10**6})
    world.warm()
    for _ in range(40):
        world.traffic([0] * 10, pairs=False)
        world.traffic([0] * 2, age=300)
        world.step(5)
        assert world.rollout.state == "shadowing"


def test_a_blind_rollout_returns_with_the_first_pair_that_comes_in_however_old_it_is(world: World) -> None:
    world.start({"step_min_pairs": 10**6})
    world.warm()
    _go_blind(world)
    world.traffic([0], age=60)
    world.step()
    assert world.rollout.state == "shadowing"


def test_a_candidate_that_never_answers_in_the_shadow_does_not_climb(world: World) -> None:
    world.start()
    world.warm()
    for _ in range(20):
        world.traffic([0] * 60, labels=False, answered=False)
        result = world.step(2)
    assert world.rollout.state == "shadowing"
    assert result.resolved == 1200
    assert "step 0 needs 20 more pairs that both arms answered" in result.waiting
    assert "100 of the newest 100 pairs lack an arm's answer" in result.waiting
    status = world.ledger.status(world.rollout_id)
    assert status is not None
    assert (status["compared"], status["recent_missing"]) == (0, 100)


def test_pairs_whose_label_never_comes_count_for_climbing(world: World) -> None:
    world.start({"label_deadline_s": 1, "guardrails": {"group_harm": {"enabled": False}}})
    world.warm()
    world.traffic([-1] * 20, labels=False)
    world.step(2)
    assert world.rollout.state == "step"


# Taking effect ---------------------------------------------------------------------------------------------


def test_a_decision_is_in_effect_when_the_last_live_worker_has_applied_it(world: World) -> None:
    world.start()
    world.warm()
    for name in ("g1", "g2"):
        world.beat(name)
    world.order("rollback", "because")
    decided = world.now
    world.now += 0.2
    world.beat("g1")
    world.controller.step()
    assert world.ledger.decisions(world.rollout_id)[-1].effective_at is None
    world.now += 0.3
    world.beat("g2")
    result = world.controller.step()
    assert result.effects == (pytest.approx(0.5),)
    assert world.ledger.decisions(world.rollout_id)[-1].effective_at == pytest.approx(decided + 0.5)


def test_a_dead_worker_does_not_keep_a_decision_from_being_in_effect(world: World) -> None:
    world.start()
    world.warm()
    world.beat("doomed")
    world.order("rollback")
    world.step(1.0)
    assert world.ledger.decisions(world.rollout_id)[-1].effective_at is None
    world.step(2.5)
    assert world.ledger.decisions(world.rollout_id)[-1].effective_at is not None


# The self-test ---------------------------------------------------------------------------------------------

FINE = SelfTest(True, "self-test: all is well")


def with_self_test(world: World, test: Callable[[Rollout], SelfTest], **more: Any) -> list[str]:
    """Have the world's controller make this self-test; returns the ids of the rollouts it was made for."""
    calls: list[str] = []

    def noted(rollout: Rollout) -> SelfTest:
        calls.append(rollout.id)
        return test(rollout)

    settings = {"clock": lambda: world.now, "holder": "first", "self_test": noted, **more}
    world.controller = Controller(world.ledger, **settings)
    return calls


def test_a_rollout_goes_on_when_its_self_test_has_passed_and_the_ledger_says_so(world: World) -> None:
    calls = with_self_test(world, lambda _: FINE)
    world.start()
    world.climb()
    assert world.ledger.decisions(world.rollout_id)[1].reason == "self-test: all is well"
    assert calls == [world.rollout_id]


def test_a_rollout_whose_self_test_has_failed_is_rolled_back_at_once(world: World) -> None:
    calls = with_self_test(world, lambda _: SelfTest(False, "nothing was caught"))
    world.start()
    world.step()
    world.step()
    assert states(world) == ["pending", "rolled_back"]
    assert world.rollout.reason == "self-test failed: nothing was caught"
    assert calls == [world.rollout_id]


def test_a_self_test_that_raises_has_failed_with_one_line(world: World) -> None:
    with_self_test(world, lambda _: (_ for _ in ()).throw(ValueError("no\nroom")))
    world.start()
    assert world.step().error is None
    assert world.rollout.reason == "self-test failed: ValueError: no room"
    assert world.rollout.state == "rolled_back"


def test_each_rollout_has_a_self_test_of_its_own(world: World) -> None:
    calls = with_self_test(world, lambda rollout: SelfTest(rollout.id == "toy-2", "the first one is bad"))
    first = world.start()
    world.step()
    second = world.start()
    world.warm()
    assert calls == [first.id, second.id]


def test_a_rollout_that_is_resumed_is_not_tested_again(world: World) -> None:
    calls = with_self_test(world, lambda _: world.order("pause") and FINE)
    world.start()
    world.step()
    assert (world.rollout.state, world.rollout.held_from) == ("held", "pending")
    world.order("resume")
    world.warm()
    assert calls == [world.rollout_id]


def test_an_operators_rollback_during_the_self_test_wins(world: World) -> None:
    with_self_test(world, lambda _: world.order("rollback", "not today") and FINE)
    world.start()
    world.step()
    world.step()
    last = world.ledger.decisions(world.rollout_id)[-1]
    assert states(world) == ["pending", "rolled_back"]
    assert (last.actor, last.reason) == ("ada", "not today")


def test_during_the_self_test_the_status_says_what_is_waited_for(world: World) -> None:
    seen: list[object] = []
    with_self_test(world, lambda rollout: seen.append(world.ledger.status(rollout.id)) or FINE)
    world.start()
    world.step()
    assert seen[0]["waiting"] == "the self-test of its guardrails"  # type: ignore[index]


def test_a_long_self_test_does_not_cost_the_lease(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monitoring.controller.LEASE_S", 0.5)
    second = Controller(world.ledger, holder="second")
    leaders: list[bool] = []

    def slow(_: Rollout) -> SelfTest:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            leaders.append(second.step().leader)
            time.sleep(0.05)
        return FINE

    with_self_test(world, slow, clock=time.time)
    world.start()
    assert world.controller.step().leader
    assert world.rollout.state != "pending"
    assert len(leaders) > 5
    assert not any(leaders)


def test_a_controller_without_the_lease_makes_no_self_test(world: World) -> None:
    world.step()
    calls = with_self_test(world, lambda _: FINE, holder="second")
    world.start()
    assert not world.step().leader
    assert calls == []


def test_an_operators_verb_never_takes_a_rollout_past_its_self_test(world: World) -> None:
    world.start()
    world.order("pause")
    world.order("resume")
    for verb in ("promote", "promote full"):
        with pytest.raises(RolloutConflict):
            world.order(verb)
    assert world.rollout.state == "pending"


# Several controllers, operators and crashes ------------------------------------------------------------------


def test_a_second_controller_waits_for_the_first_ones_lease(world: World) -> None:
    world.start()
    world.step()
    second = Controller(world.ledger, clock=lambda: world.now, holder="second")
    assert not second.step().leader
    world.now += 6
    assert second.step().leader
    assert not world.controller.step().leader


def test_a_controller_that_closes_lets_the_next_one_begin_at_once(world: World) -> None:
    world.step()
    world.controller.close()
    assert Controller(world.ledger, clock=lambda: world.now, holder="second").step().leader


def test_a_lease_from_before_the_clock_was_set_back_stops_nobody(world: World) -> None:
    world.start()
    world.step()
    world.now -= 3600
    assert Controller(world.ledger, clock=lambda: world.now, holder="second").step().leader


def test_status_and_housekeeping_go_on_after_the_clock_was_set_back(world: World) -> None:
    world.start({"step_min_pairs": 10**6})
    world.warm()
    world.step(10)
    world.step(-3600)
    status = world.ledger.status(world.rollout_id)
    assert status is not None
    assert status["at"] == world.now


def test_two_controllers_at_once_count_nothing_twice(world: World) -> None:
    world.start({"step_min_pairs": 10**6})
    world.warm()
    world.traffic([0] * 500)
    racing = [Controller(world.ledger, clock=lambda: world.now, holder="first") for _ in range(2)]
    for controller in racing:
        controller.step()
    assert world.ledger.totals(world.rollout_id, 0)["accuracy_drop", ""] == {0: 500}


def test_a_crash_between_counting_and_deciding_loses_neither(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.start()
    world.warm()
    world.traffic([1] * 40 + [0] * 60)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "apply", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            world.step()
    assert world.ledger.totals(world.rollout_id, 0)["accuracy_drop", ""] == {0: 60, 1: 40}
    assert world.rollout.state == "shadowing"
    world.step()
    assert world.rollout.state == "rolled_back"
    assert world.ledger.totals(world.rollout_id, 0)["accuracy_drop", ""] == {0: 60, 1: 40}


def test_what_an_operator_does_while_the_controller_decides_is_not_overwritten(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.start()
    world.warm()
    world.traffic([0] * 50)
    world.now += 5
    apply = Ledger.apply

    def interrupted(ledger: Ledger, old: Rollout, new: Rollout, decision: Decision | None) -> Rollout | None:
        monkeypatch.setattr(Ledger, "apply", apply)
        world.order("pause", "wait a moment")
        return apply(ledger, old, new, decision)

    monkeypatch.setattr(Ledger, "apply", interrupted)
    world.step()
    assert world.rollout.state == "held"
    assert states(world)[-1] == "held"


def test_an_operators_command_needs_no_controller(world: World) -> None:
    world.start()
    world.warm()
    decision = apply_command(world.ledger, world.rollout_id, "rollback", "ada", "a hunch", world.now)
    assert (decision.to_state, decision.actor, decision.reason) == ("rolled_back", "ada", "a hunch")
    assert world.ledger.route().weight == 0


def test_promote_full_is_an_override_while_proof_is_lacking(world: World) -> None:
    world.start()
    world.warm()
    decision = world.order("promote full", "the boss said so")
    assert (decision.to_state, decision.weight, decision.override) == ("promoted", 90, True)


def test_a_command_that_makes_no_sense_is_refused_with_the_reason(world: World) -> None:
    world.start()
    with pytest.raises(RolloutConflict, match=r"cannot resume: it is not held but pending"):
        world.order("resume")
    with pytest.raises(RolloutNotFound):
        apply_command(world.ledger, "toy-9", "pause", "ada", "", world.now)


# The mirror's rate -----------------------------------------------------------------------------------------


def _serve(world: World, seconds: int, requests_per_s: int, sample_s: float) -> None:
    """Requests, sampled at the rate in force and answered by the shadow as far as its time goes."""
    for _ in range(seconds):
        samples = min(round(requests_per_s * world.rollout.rate_in_force), int(1 / sample_s))
        world.mirrored(requests_per_s, samples, sample_s)
        world.step(1)


@pytest.fixture
def shadowed(world: World) -> World:
    """A rollout that is shadowed for as long as it takes."""
    world.start({"step_min_pairs": 10**6, "blind_after_s": 3600})
    world.warm()
    return world


def test_where_the_shadow_cannot_answer_all_that_is_offered_less_is(shadowed: World) -> None:
    _serve(shadowed, 20, 1000, 0.005)
    rate = shadowed.ledger.route().mirror_rate
    assert 0.1 < rate * 1000 * 0.005 < 1
    status = shadowed.ledger.status(shadowed.rollout_id)
    assert status is not None
    assert status["mirror_rate"] == rate == shadowed.rollout.mirror_rate


def test_in_steady_traffic_the_rate_and_with_it_the_revision_stay_where_they_are(shadowed: World) -> None:
    _serve(shadowed, 30, 1000, 0.005)
    revision = shadowed.ledger.revision()
    _serve(shadowed, 300, 1000, 0.005)
    assert shadowed.ledger.revision() == revision


def test_the_rate_changes_every_few_seconds_at_most(shadowed: World) -> None:
    _serve(shadowed, 30, 1000, 0.1)
    changed = []
    for _ in range(100):
        before = shadowed.ledger.revision()
        _serve(shadowed, 1, 10, 0.1)
        if shadowed.ledger.revision() != before:
            changed.append(shadowed.now)
    assert len(changed) > 2
    assert min(b - a for a, b in pairwise(changed)) >= 5


def test_when_traffic_falls_everything_is_mirrored_again(shadowed: World) -> None:
    _serve(shadowed, 30, 1000, 0.005)
    assert shadowed.rollout.mirror_rate < 0.2
    _serve(shadowed, 120, 20, 0.005)
    assert shadowed.rollout.mirror_rate == 1.0


def test_more_than_the_policy_allows_is_never_mirrored(world: World) -> None:
    world.start({"step_min_pairs": 10**6, "mirror_rate": 0.25, "blind_after_s": 3600})
    world.warm()
    assert world.ledger.route().mirror_rate == 0.25
    _serve(world, 30, 1000, 0.02)
    assert world.rollout.mirror_rate < 0.1
    _serve(world, 120, 10, 0.001)
    assert world.rollout.mirror_rate == 0.25


def test_once_promoted_a_few_pairs_a_second_are_enough(world: World) -> None:
    world.start({"promoted_pairs_per_s": 5})
    world.climb()
    _serve(world, 20, 100, 0.0001)
    assert world.ledger.route().mirror_rate == pytest.approx(0.05, rel=0.2)


def test_a_held_rollout_is_undecided_and_gets_all_the_pairs_there_can_be(world: World) -> None:
    world.start({"promoted_pairs_per_s": 5, "blind_after_s": 3600})
    world.climb()
    _serve(world, 20, 100, 0.0001)
    world.order("pause")
    _serve(world, 60, 100, 0.0001)
    assert world.rollout.mirror_rate == 1.0


def test_nothing_is_mirrored_once_it_is_rolled_back(shadowed: World) -> None:
    _serve(shadowed, 20, 1000, 0.005)
    shadowed.order("rollback")
    assert shadowed.ledger.route().mirror_rate == 0
    revision = shadowed.ledger.revision()
    _serve(shadowed, 20, 10, 0.001)
    assert shadowed.ledger.revision() == revision


def test_another_controller_goes_on_with_the_same_rate(shadowed: World) -> None:
    _serve(shadowed, 30, 1000, 0.005)
    rate = shadowed.rollout.mirror_rate
    shadowed.controller.close()
    shadowed.controller = Controller(shadowed.ledger, clock=lambda: shadowed.now, holder="second")
    _serve(shadowed, 60, 1000, 0.005)
    assert shadowed.rollout.mirror_rate == rate


def test_a_change_of_the_rate_is_no_decision_and_nobody_waits_for_it(world: World) -> None:
    world.start({"step_min_seconds": 0, "blind_after_s": 3600})
    world.climb("promoting")
    applied = world.rollout.revision
    decided = world.ledger.decisions(world.rollout_id)
    for _ in range(10):
        world.mirrored(1000, 200, 0.005)
        world.step(1, beat=False)
    before = world.rollout
    assert before.mirror_rate < 1
    assert before.revision == applied < world.ledger.revision()
    assert world.ledger.decisions(world.rollout_id) == [
        replace(one, effective_at=other.effective_at)
        for one, other in zip(decided, world.ledger.decisions(world.rollout_id), strict=True)
    ]
    # A worker that has the promotion, and not the rate, does not hold it up.
    world.ledger.heartbeat(
        WorkerBeat("g1", "Gateway", 1, applied, world.now, (CONTROL, TREATMENT), None, world.now)
    )
    world.controller.step()
    assert world.rollout.state == "promoted"
    assert (before.step, before.step_at, before.step_pairs) == (
        world.rollout.step,
        world.rollout.step_at,
        world.rollout.step_pairs,
    )


def test_the_rate_waits_until_a_decision_is_in_effect(shadowed: World) -> None:
    for _ in range(15):
        shadowed.mirrored(1000, 200, 0.005)
        shadowed.now += 1
    shadowed.beat()
    shadowed.order("pause")
    revision = shadowed.ledger.revision()
    shadowed.step(1.9)
    assert shadowed.ledger.revision() == revision
    shadowed.step(0.2)
    assert shadowed.ledger.revision() == revision + 1


def test_an_operators_order_at_the_moment_of_a_change_of_the_rate_stands(
    shadowed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_rate = Ledger.set_mirror_rate

    def interrupted(ledger: Ledger, old: Rollout, rate: float, now: float) -> Rollout | None:
        monkeypatch.setattr(Ledger, "set_mirror_rate", set_rate)
        shadowed.order("pause", "wait a moment")
        return set_rate(ledger, old, rate, now)

    monkeypatch.setattr(Ledger, "set_mirror_rate", interrupted)
    for _ in range(15):
        shadowed.mirrored(1000, 200, 0.005)
        shadowed.now += 1
    result = shadowed.step(1)
    assert (shadowed.rollout.state, shadowed.rollout.mirror_rate) == ("held", 1.0)
    assert result.rollout == shadowed.rollout
    _serve(shadowed, 10, 1000, 0.005)
    assert (shadowed.rollout.state, shadowed.rollout.mirror_rate < 0.2) == ("held", True)


def test_a_low_rate_does_not_make_a_rollout_blind_and_a_dead_shadow_does(world: World) -> None:
    world.start({"step_min_pairs": 10**6})
    world.warm()
    world.traffic([0])
    _serve(world, 20, 2000, 0.1)
    rate = world.rollout.mirror_rate
    assert rate < 0.01
    world.traffic([0])
    for _ in range(16):
        world.counts({("requests", "control"): {0: 100}})
        world.step(5)
    assert world.rollout.state == "shadowing"
    for _ in range(16):
        world.counts({("requests", "control"): {0: 10_000}})
        world.step(5)
    assert world.rollout.state == "blind"


def test_requests_from_before_the_rate_was_raised_promise_no_pairs(world: World) -> None:
    world.start({"step_min_pairs": 10**6, "blind_after_s": 20})
    world.warm()
    assert world.ledger.set_mirror_rate(world.rollout, 0.0001, world.now) is not None
    for _ in range(6):
        world.counts({("requests", "control"): {0: 100}})
        world.step(5)
    assert world.ledger.set_mirror_rate(world.rollout, 1.0, world.now) is not None
    world.step(1)
    assert world.rollout.state == "shadowing"
    for _ in range(7):
        world.counts({("requests", "control"): {0: 100}})
        world.step(5)
    assert world.rollout.state == "blind"


# What is seen of it ----------------------------------------------------------------------------------------


def test_status_says_what_is_waited_for_and_shows_the_evidence(world: World) -> None:
    world.start({"steps": [0, 50], "step_min_pairs": 10}, DIS)
    world.warm()
    world.traffic([0] * 30, groups={"DIS": "1"})
    world.step(5)
    world.traffic([0] * 30, groups={"DIS": "1"})
    world.step(5)
    status = world.ledger.status(world.rollout_id)
    assert status is not None
    assert "needs pairs to prove a drop under 5 pt in DIS=2" in str(status["waiting"])
    names = {(g["guardrail"], g["group"]) for g in status["guardrails"]}  # type: ignore[attr-defined]
    assert ("group_harm", "DIS=1") in names
    assert status["pairs"] == 60


def test_a_step_result_is_shown_and_decisions_are_announced(world: World) -> None:
    shown: list = []
    told: list = []
    world.controller = Controller(
        world.ledger, clock=lambda: world.now, on_decision=lambda: told.append(1), publish=shown.append
    )
    world.start()
    world.step()
    world.step(0.1)
    world.step(0.1)
    assert [bool(s.decisions) for s in shown] == [True, True, False]
    assert len(told) == 2


def test_a_step_over_thirty_groups_takes_less_than_20_ms(world: World) -> None:
    groups = tuple(GroupSpec(f"A{i // 5}={i % 5}", 0.2, 0.1 * (i % 3 - 1)) for i in range(30))
    world.start({"step_min_pairs": 10**6}, groups)
    world.warm()
    for k in range(20):
        world.traffic([0] * 95 + [1] * 2 + [-1] * 3, groups={f"A{a}": str((k + a) % 5) for a in range(6)})
        world.ledger.add_counts(
            "more",
            k + 1,
            {(world.rollout_id, TallyKey("treatment_errors", "", bucket_of(world.now))): {0: 9}},
        )
    while world.step().more:
        pass
    seconds = []
    for _ in range(20):
        world.now += 0.2
        world.beat()
        cpu = time.thread_time()
        world.controller.step()
        seconds.append(time.thread_time() - cpu)
    assert sorted(seconds)[10] < 0.020


def test_pairs_that_are_counted_are_pruned_in_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    prune = Ledger.prune
    monkeypatch.setattr(Ledger, "prune", lambda self, rollout_id, now: prune(self, rollout_id, now, keep=50))
    world.start({"step_min_pairs": 10**6})
    world.warm()
    world.traffic([0] * 300)
    world.step()
    world.step(6)
    assert len(world.ledger.recent_pairs(world.rollout_id)) == 50
    world.traffic([0] * 10)
    assert world.step().resolved == 310


def test_more_than_one_pruning_takes_goes_on_in_the_next_step(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []
    monkeypatch.setattr(
        Ledger, "prune", lambda *_: calls.append(world.now) or (2000 if len(calls) < 3 else 7)
    )
    world.start()
    for _ in range(10):
        world.step(0.5)
    assert len(calls) == 3
    assert calls[2] - calls[0] == 1


def test_labels_are_swept_without_any_rollout(world: World) -> None:
    world.ledger.record_labels([LabelRow("lone", 0, 1, world.now)])
    world.step(8 * 86400)
    assert world.ledger.record_labels([LabelRow("lone", 0, 1, world.now)]).accepted == 1


def test_a_rollout_follows_its_own_policy_whatever_a_later_one_says(world: World) -> None:
    first = world.start({"promoted_weight": 60})
    world.climb()
    world.start({"promoted_weight": 70})
    assert world.ledger.rollout(first.id).policy.promoted_weight == 60
    assert world.ledger.rollout(first.id).state == "promoted"
    assert replace(world.rollout).policy.promoted_weight == 70
    assert world.ledger.route().treatment == TREATMENT
