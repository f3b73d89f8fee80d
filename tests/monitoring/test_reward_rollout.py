"""Rewards and corrected labels on their way through the ledger into a decision."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from monitoring import controller
from monitoring.controller import Controller
from monitoring.ledger import FeedbackResult, LabelRow, PairRow, RewardRow
from monitoring.tally import REWARD
from tests.monitoring.judgement import World

ON = {"guardrails": {"reward": {"enabled": True, "deadline_s": 60}}, "step_min_pairs": 10**6}


def visits(world: World, rewards: Sequence[tuple[str, float | None]], treatment: int | None = 1) -> list[str]:
    """One request for each (arm, reward), on which both arms agree; returns the request ids."""
    ids = [f"v{world.requests + i}" for i in range(len(rewards))]
    world.requests += len(rewards)
    world.ledger.record_pairs(
        [
            PairRow(world.rollout_id, name, 0, arm, 1, treatment, 0.9, 0.8, {}, {}, world.now)
            for name, (arm, _) in zip(ids, rewards, strict=True)
        ]
    )
    given = zip(ids, rewards, strict=True)
    world.ledger.record_feedback(
        [], [RewardRow(name, value, world.now) for name, (_, value) in given if value is not None]
    )
    world.counts({("requests", "control"): {0: len(rewards)}})
    return ids


def matches(world: World, epoch: int = 0) -> dict[int, int]:
    """Hundredths -> how often."""
    return world.ledger.totals(world.rollout_id, epoch).get((REWARD, ""), {})


# Rewards ---------------------------------------------------------------------------------------------------


def test_a_candidate_that_is_rewarded_less_is_rolled_back_with_the_evidence_it_was_done_on(
    world: World,
) -> None:
    world.start(ON)
    world.warm()
    arrived = world.now
    visits(world, [("control", 1.0), ("treatment", 0.0)] * 60 + [("control", 0.0), ("treatment", 1.0)] * 10)
    world.step()
    decision = world.ledger.decisions(world.rollout_id)[-1]
    assert (decision.to_state, decision.guardrail, decision.group) == ("rolled_back", REWARD, "")
    assert decision.drop == pytest.approx(50 / 70)
    assert decision.evidence_at == arrived
    assert "reward; drop 71.4 pt; evidence 10^" in decision.line()


def test_where_no_guardrail_asks_for_rewards_none_are_counted(world: World) -> None:
    world.start({"step_min_pairs": 10**6})
    world.warm()
    visits(world, [("control", 1.0), ("treatment", 0.0)] * 100)
    world.step()
    assert (world.rollout.state, matches(world)) == ("shadowing", {})
    assert world.ledger.cursor(world.rollout_id).rewards_seq == 0


def test_a_pair_without_a_reward_holds_up_those_behind_it_until_its_deadline(world: World) -> None:
    world.start(ON)
    world.warm()
    visits(world, [("control", None), ("treatment", 0.25), ("control", 1.0)])
    world.step()
    assert matches(world) == {}
    world.step(60)
    assert matches(world) == {-25: 1}
    cursor = world.ledger.cursor(world.rollout_id)
    assert (cursor.rewards_seq, cursor.reward_waiting) == (3, ("control", 1, 1_000_000))


def test_inputs_that_the_candidate_cannot_answer_are_left_out(world: World) -> None:
    world.start(ON)
    world.warm()
    visits(world, [("control", 1.0)], treatment=None)
    visits(world, [("treatment", 1.0), ("control", 0.0)])
    world.step()
    assert matches(world) == {-100: 1}


def test_another_controller_goes_on_with_the_rows_that_wait(world: World) -> None:
    world.start(ON)
    world.warm()
    visits(world, [("control", 1.0), ("control", 0.0)])
    world.step()
    world.controller.close()
    world.controller = Controller(world.ledger, clock=lambda: world.now, holder="second")
    visits(world, [("treatment", 0.25)])
    world.step()
    assert matches(world) == {25: 1}


def test_more_pairs_than_one_step_takes_are_counted_by_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "BATCH", 5)
    world.start(ON)
    world.warm()
    visits(world, [("control", 0.5), ("treatment", 0.5)] * 6)
    assert world.step().more
    assert world.ledger.cursor(world.rollout_id).rewards_seq == 5
    world.step()
    assert not world.step().more
    assert matches(world) == {0: 6}


def test_rewards_count_anew_once_the_candidate_is_promoted(world: World) -> None:
    world.start({**ON, "step_min_pairs": 20})
    world.warm()
    visits(world, [("control", 0.5), ("treatment", 0.5)] * 3)
    world.step()
    before = matches(world)
    for _ in range(200):
        if world.rollout.state == "promoted":
            break
        visits(world, [("control", 1.0)] * 40)
        world.step()
    assert matches(world, 1) == {}
    visits(world, [("treatment", 1.0), ("control", 1.0), ("treatment", 1.0)] * 5)
    world.step()
    assert sum(matches(world, 1).values()) > 0
    assert matches(world) == before


def test_what_waits_for_rewards_does_not_hold_up_the_climb(world: World) -> None:
    world.start({**ON, "step_min_pairs": 20})
    world.warm()
    for _ in range(5):
        visits(world, [("control", None)] * 40)
        world.step()
    assert world.rollout.step > 0
    assert world.ledger.cursor(world.rollout_id).rewards_seq == 0


# Corrections -----------------------------------------------------------------------------------------------


def test_evidence_uses_the_corrected_label_of_a_pair_that_was_not_counted_yet(world: World) -> None:
    world.start({"step_min_pairs": 10**6, "label_deadline_s": 30})
    world.warm()
    world.traffic([1], labels=False)  # It holds up the next one.
    (request,) = world.traffic([1])
    world.step()
    correction = LabelRow(request, 0, 0, world.now, correction=True)
    assert world.ledger.record_labels([correction]) == FeedbackResult(corrected=1)
    world.step(30)
    assert world.ledger.totals(world.rollout_id, 0)["accuracy_drop", ""] == {9: 1, -1: 1}


def test_evidence_stays_as_it_was_once_the_pair_was_counted_and_reports_see_the_correction(
    world: World,
) -> None:
    world.start({"step_min_pairs": 10**6})
    world.warm()
    (request,) = world.traffic([1])
    world.step()
    correction = LabelRow(request, 0, 0, world.now, correction=True)
    assert world.ledger.record_labels([correction]) == FeedbackResult(too_late=1)
    world.step()
    assert world.ledger.totals(world.rollout_id, 0)["accuracy_drop", ""] == {1: 1}
    assert world.ledger.recent_pairs(world.rollout_id)[0].label == 0
