"""The state machine: what may never happen, whatever is thrown at it, and each transition by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.guardrails import Assessment, Certificate, Promotion, Verdict
from monitoring.policy import parse_policy
from monitoring.records import BLIND, HELD, ROLLED_BACK, STATES, Rollout, SelfTest
from monitoring.rollout import VERBS, Command, Dry, Fleet, Inputs, advance, allowed_weights, refusal, waiting

POLICY = parse_policy(
    {"steps": [0, 5, 50], "promoted_weight": 80, "step_min_pairs": 10, "step_min_seconds": 5}
)
READY = Fleet(live=2, loaded=True, applied=True)
NEW = Rollout("r1", "toy", "full", "small", POLICY)


def assessment(
    crossed: dict[str, str] | None = None, ready: bool = False, suspicious: bool = False
) -> Assessment:
    """Guardrails that act (name -> action), and whether promotion is proven."""
    verdicts = [
        Verdict(name, "", action, 3.0, 2.0, 0.1, 0.02, 100, 0)  # type: ignore[arg-type]
        for name, action in (crossed or {}).items()
    ]
    if suspicious:
        verdicts.append(Verdict("latency_p95", "", "rollback", 1.5, 3.0, 0.1, 0.05, 100, 0))
    best = Certificate("accuracy_drop", "", 2.0 if ready else 0.5, 1.6, 0.0, 100)
    return Assessment(tuple(verdicts), (best,), Promotion(ready, best, "needs about 50 more pairs", 50))


def inputs(now: float = 100.0, **more: object) -> Inputs:
    return Inputs(**{"now": now, "assessment": assessment(), "fleet": READY, **more})  # type: ignore[arg-type]


def order(verb: str) -> Command:
    return Command(verb, "ada", "because")


def at(state: str, **more: object) -> Rollout:
    """A rollout in a state, as if it had come there by itself."""
    base: dict = {"state": state, "entered_at": 100.0, "step_at": 100.0}
    if state in ("step", HELD, BLIND):
        base |= {"step": 1, "weight": 5}
    if state in ("promoting", "promoted"):
        base |= {"step": 2, "weight": 80}
    if state == HELD:
        base["held_from"] = "step"
    if state == BLIND:
        base["blind_from"] = "step"
    return replace(NEW, **(base | more))


# Whatever happens ------------------------------------------------------------------------------------------

actions = st.sampled_from(["rollback", "hold", "alert"])
assessments = st.builds(
    assessment,
    st.one_of(
        st.just({}), st.dictionaries(st.sampled_from(["accuracy_drop", "latency_p95"]), actions, max_size=2)
    ),
    st.booleans(),
    st.booleans(),
)
events = st.builds(
    Inputs,
    now=st.floats(0, 300),  # added to the clock by the test
    assessment=assessments,
    resolved=st.integers(0, 1000),
    compared=st.integers(0, 1000),
    recent=st.just(100),
    recent_missing=st.integers(0, 100),
    labels=st.integers(0, 100),
    fleet=st.builds(Fleet, st.integers(0, 2), st.booleans(), st.booleans(), st.sampled_from([None, "no"])),
    dry=st.one_of(st.none(), st.builds(Dry, st.floats(0, 3000), st.integers(0, 100), st.floats(0, 3000))),
    moved_at=st.floats(0, 3000),
    command=st.one_of(st.none(), st.builds(Command, st.sampled_from([*VERBS, "dance"]), st.just("ada"))),
)


@settings(max_examples=300)
@given(st.lists(events, max_size=40))
def test_no_history_breaks_the_rules(history: list[Inputs]) -> None:
    rollout, now = NEW, 0.0
    for event in history:
        now += event.now
        before = rollout
        rollout, decision = advance(before, replace(event, now=now))
        assert rollout.state in STATES
        assert rollout.weight in allowed_weights(POLICY)
        assert (rollout is before) == (decision is None)
        if rollout.state in ("pending", "warmup", "shadowing", ROLLED_BACK):
            assert rollout.weight == 0
        if before.state == ROLLED_BACK:
            assert rollout is before
        if rollout.state in (HELD, BLIND) and before.state != rollout.state:
            assert rollout.weight == before.weight
        aborting = event.command is not None and event.command.verb == "rollback"
        if before.state != ROLLED_BACK and (aborting or event.assessment.crossed("rollback")):
            assert rollout.state == ROLLED_BACK
        if decision is not None:
            assert (decision.from_state, decision.to_state) == (before.state, rollout.state)
            assert decision.weight == rollout.weight
        assert rollout.epoch == (
            1 if "promoted" in (rollout.state, rollout.held_from, rollout.blind_from) else 0
        ) or (rollout.state == ROLLED_BACK)


@settings(max_examples=200)
@given(st.sampled_from([s for s in STATES if s != ROLLED_BACK]), events)
def test_abort_beats_everything_in_every_state(state: str, event: Inputs) -> None:
    event = replace(event, now=500.0)
    by_operator, decision = advance(at(state), replace(event, command=order("rollback")))
    assert (by_operator.state, by_operator.weight) == (ROLLED_BACK, 0)
    assert decision is not None
    assert decision.actor == "ada"
    crossed = replace(event, assessment=assessment({"accuracy_drop": "rollback"}, ready=True))
    by_guardrail, _ = advance(at(state), crossed)
    assert (by_guardrail.state, by_guardrail.weight) == (ROLLED_BACK, 0)


@given(events)
def test_nothing_leads_out_of_rolled_back(event: Inputs) -> None:
    rollout = at(ROLLED_BACK)
    assert advance(rollout, event) == (rollout, None)


@given(events)
def test_a_rollout_that_another_has_replaced_does_not_move(event: Inputs) -> None:
    rollout = at("promoted", active=False)
    assert advance(rollout, event) == (rollout, None)


@settings(max_examples=300)
@given(st.sampled_from(STATES), st.sampled_from(VERBS))
def test_a_command_is_either_refused_with_a_reason_or_obeyed(state: str, verb: str) -> None:
    rollout, command = at(state), order(verb)
    _, decision = advance(rollout, inputs(fleet=Fleet(), command=command))
    if refusal(rollout, command) is None:
        assert decision is not None
        assert (decision.verb, decision.actor) == (verb, "ada")
    elif decision is not None:
        assert decision.actor == "controller"


# One transition after the other ----------------------------------------------------------------------------


def test_pending_goes_on_at_once_where_no_self_test_is_wanted() -> None:
    moved, decision = advance(NEW, inputs())
    assert (moved.state, moved.reason) == ("warmup", "workers load the candidate")
    assert decision is not None
    assert decision.verb == "advance"


def test_pending_waits_for_the_self_test() -> None:
    untested = inputs(1e9, self_test=None)
    assert advance(NEW, untested) == (NEW, None)
    assert waiting(NEW, untested) == "the self-test of its guardrails"


def test_a_self_test_that_passed_lets_the_workers_load_the_candidate() -> None:
    moved, decision = advance(NEW, inputs(self_test=SelfTest(True, "self-test: all is well")))
    assert (moved.state, moved.reason) == ("warmup", "self-test: all is well")
    assert decision is not None
    assert (decision.verb, decision.reason, decision.actor) == (
        "advance",
        "self-test: all is well",
        "controller",
    )


def test_a_self_test_that_failed_rolls_back() -> None:
    moved, decision = advance(NEW, inputs(self_test=SelfTest(False, "nothing was caught")))
    assert (moved.state, moved.weight) == (ROLLED_BACK, 0)
    assert decision is not None
    assert (decision.verb, decision.reason) == ("rollback", "self-test failed: nothing was caught")


@pytest.mark.parametrize("result", [None, SelfTest(True, "fine"), SelfTest(False, "not so")])
@pytest.mark.parametrize(("verb", "state"), [("rollback", ROLLED_BACK), ("pause", HELD)])
def test_an_operator_does_not_wait_for_the_self_test(verb: str, state: str, result: SelfTest | None) -> None:
    moved, decision = advance(NEW, inputs(command=order(verb), self_test=result))
    assert moved.state == state
    assert decision is not None
    assert decision.actor == "ada"


@pytest.mark.parametrize("state", [state for state in STATES if state != "pending"])
def test_a_self_test_has_no_say_after_the_beginning(state: str) -> None:
    rollout = at(state)
    failed = advance(rollout, inputs(self_test=SelfTest(False, "late")))
    assert failed == advance(rollout, inputs())


@pytest.mark.parametrize(
    "fleet",
    [Fleet(), Fleet(live=1), Fleet(live=1, loaded=True, error="no space")],
    ids=["none", "slow", "broken"],
)
def test_warmup_waits_for_the_workers_and_gives_up_in_the_end(fleet: Fleet) -> None:
    rollout = at("warmup")
    assert advance(rollout, inputs(101.0, fleet=fleet))[0] is rollout
    rolled_back, decision = advance(rollout, inputs(160.0, fleet=fleet))
    assert rolled_back.state == ROLLED_BACK
    assert decision is not None
    assert "not loaded within 60 s" in decision.reason


def test_warmup_ends_when_all_workers_have_loaded_the_candidate() -> None:
    moved, _ = advance(at("warmup"), inputs(101.0, resolved=9, compared=7))
    assert (moved.state, moved.step, moved.weight, moved.step_at, moved.step_pairs) == (
        "shadowing",
        0,
        0,
        101.0,
        7,
    )


@pytest.mark.parametrize(
    ("now", "pairs", "suspicious", "goes_on"),
    [
        (105.0, 10, False, True),
        (104.9, 10, False, False),
        (105.0, 9, False, False),
        (105.0, 10, True, False),
    ],
)
def test_a_step_needs_time_and_pairs_and_no_suspicion(
    now: float, pairs: int, suspicious: bool, goes_on: bool
) -> None:
    moved, _ = advance(
        at("shadowing"), inputs(now, compared=pairs, assessment=assessment(suspicious=suspicious))
    )
    assert (moved.state, moved.weight) == (("step", 5) if goes_on else ("shadowing", 0))


def test_pairs_of_earlier_steps_do_not_count() -> None:
    rollout = at("step", step_pairs=100)
    assert advance(rollout, inputs(110.0, compared=109))[0] is rollout
    assert advance(rollout, inputs(110.0, compared=110))[0].weight == 50


def test_pairs_that_lack_an_answer_do_not_count_for_climbing_and_the_status_says_so() -> None:
    rollout = at("shadowing")
    unanswered = inputs(110.0, resolved=500, compared=3, recent=100, recent_missing=97)
    assert advance(rollout, unanswered)[0] is rollout
    sentence = waiting(rollout, unanswered)
    assert "step 0 needs 7 more pairs that both arms answered" in sentence
    assert "97 of the newest 100 pairs lack an arm's answer" in sentence
    assert "97 of the newest" in waiting(at("promoted"), unanswered)
    assert "lack" not in waiting(rollout, replace(unanswered, recent_missing=50))


def test_the_last_step_waits_for_proof() -> None:
    last = at("step", step=2, weight=50)
    assert advance(last, inputs(110.0, compared=10))[0] is last
    assert "needs about 50 more pairs" in waiting(last, inputs(110.0, compared=10))
    moved, decision = advance(last, inputs(110.0, compared=10, assessment=assessment(ready=True)))
    assert (moved.state, moved.weight) == ("promoting", 80)
    assert decision is not None
    assert (decision.guardrail, decision.evidence_log10, decision.override) == ("accuracy_drop", 2.0, False)


def test_promoting_ends_when_all_workers_have_applied_it_and_evidence_starts_afresh() -> None:
    rollout = at("promoting")
    assert advance(rollout, inputs(fleet=Fleet(live=1)))[0] is rollout
    moved, _ = advance(rollout, inputs())
    assert (moved.state, moved.epoch, moved.weight) == ("promoted", 1, 80)


def test_a_promoted_rollout_is_still_rolled_back() -> None:
    moved, _ = advance(at("promoted"), inputs(assessment=assessment({"accuracy_drop": "rollback"})))
    assert (moved.state, moved.weight) == (ROLLED_BACK, 0)


def test_hold_freezes_and_resume_overrules_that_guardrail_only() -> None:
    holding = assessment({"latency_p95": "hold"})
    held, decision = advance(at("step"), inputs(assessment=holding))
    assert (held.state, held.weight) == (HELD, 5)
    assert decision is not None
    assert (decision.verb, decision.guardrail) == ("hold", "latency_p95")
    resumed, _ = advance(held, inputs(assessment=holding, command=order("resume")))
    assert (resumed.state, resumed.weight, resumed.waived) == ("step", 5, ("latency_p95",))
    assert advance(resumed, inputs(assessment=holding))[0] is resumed
    again, _ = advance(
        resumed, inputs(assessment=assessment({"latency_p95": "hold", "accuracy_drop": "hold"}))
    )
    assert again.state == HELD


def test_an_alert_is_decided_once_and_changes_nothing_else() -> None:
    alerting = inputs(assessment=assessment({"latency_p95": "alert"}))
    alerted, decision = advance(at("step"), alerting)
    assert decision is not None
    assert (decision.verb, decision.from_state, decision.to_state) == ("alert", "step", "step")
    assert replace(alerted, alerted=()) == at("step")
    assert advance(alerted, alerting)[1] is None


@pytest.mark.parametrize("state", ["pending", "warmup", "shadowing", "step", "promoting", "promoted"])
def test_pause_and_resume_return_to_the_same_state_and_weight(state: str) -> None:
    held, _ = advance(at(state), inputs(command=order("pause")))
    assert (held.state, held.weight) == (HELD, at(state).weight)
    back, _ = advance(held, inputs(command=order("resume")))
    assert (back.state, back.weight, back.step) == (state, at(state).weight, at(state).step)


def test_held_waits_for_an_operator_whatever_else_is_ready() -> None:
    held = at(HELD)
    assert advance(held, inputs(1e6, compared=10**6, assessment=assessment(ready=True)))[0] is held


def dry(since: float, last_at: float, requests: int = 50) -> Dry:
    return Dry(since, requests, last_at)


@pytest.mark.parametrize("state", ["shadowing", "step", "promoting", "promoted", HELD])
def test_requests_without_pairs_make_it_blind_with_the_split_frozen(state: str) -> None:
    rollout = at(state)
    waits = Fleet(live=1)
    assert advance(rollout, inputs(159.0, fleet=waits, dry=dry(100.0, 159.0)))[0] is rollout
    blind, _ = advance(rollout, inputs(160.0, fleet=waits, dry=dry(100.0, 160.0)))
    assert (blind.state, blind.weight) == (BLIND, rollout.weight)
    back, _ = advance(blind, inputs(165.0, moved_at=161.0))
    assert (back.state, back.weight, back.held_from) == (state, rollout.weight, rollout.held_from)


def test_a_blind_rollout_is_rolled_back_after_its_time() -> None:
    blind = at(BLIND)
    assert advance(blind, inputs(699.0, dry=dry(40.0, 699.0)))[0] is blind
    assert advance(blind, inputs(700.0, dry=dry(40.0, 700.0)))[0].state == ROLLED_BACK


def test_no_traffic_is_not_blindness() -> None:
    rollout = at("promoted")
    assert advance(rollout, inputs(5000.0))[0] is rollout
    assert advance(rollout, inputs(5000.0, dry=dry(100.0, 200.0)))[0] is rollout
    blind = at(BLIND)
    assert advance(blind, inputs(5000.0, dry=dry(40.0, 200.0)))[0] is blind


def test_too_few_requests_to_expect_a_pair_are_not_blindness() -> None:
    rollout = replace(at("step"), mirror_rate=0.01)
    assert advance(rollout, inputs(200.0, dry=dry(100.0, 200.0, requests=900)))[0] is rollout
    assert advance(rollout, inputs(200.0, dry=dry(100.0, 200.0, requests=1000)))[0].state == BLIND


def test_promote_skips_the_wait_of_one_step_and_is_marked_as_an_override() -> None:
    moved, decision = advance(at("shadowing"), inputs(command=order("promote")))
    assert (moved.state, moved.step, moved.weight) == ("step", 1, 5)
    assert decision is not None
    assert decision.override


def test_promote_at_the_last_step_promotes() -> None:
    moved, decision = advance(at("step", step=2, weight=50), inputs(command=order("promote")))
    assert moved.state == "promoting"
    assert decision is not None
    assert decision.override


@pytest.mark.parametrize("state", ["shadowing", "step", HELD, BLIND])
@pytest.mark.parametrize("ready", [True, False])
def test_promote_full_promotes_at_once_and_is_an_override_without_proof(state: str, ready: bool) -> None:
    command = inputs(command=order("promote full"), assessment=assessment(ready=ready))
    moved, decision = advance(at(state), command)
    assert (moved.state, moved.weight, moved.epoch) == ("promoted", 80, 1)
    assert (moved.held_from, moved.blind_from) == (None, None)
    assert decision is not None
    assert decision.override == (not ready)


@pytest.mark.parametrize(
    ("state", "verb", "why"),
    [
        ("warmup", "promote", "have not loaded"),
        ("warmup", "promote full", "have not loaded"),
        ("promoted", "promote full", "promoted already"),
        (HELD, "promote", "resume it"),
        (HELD, "pause", "held already"),
        ("step", "resume", "not held"),
        (ROLLED_BACK, "rollback", "final"),
        ("step", "dance", "no such command"),
    ],
)
def test_commands_that_make_no_sense_are_refused_with_the_reason(state: str, verb: str, why: str) -> None:
    assert why in (refusal(at(state), order(verb)) or "")


@pytest.mark.parametrize("state", STATES)
def test_every_state_says_in_one_sentence_what_it_waits_for(state: str) -> None:
    sentence = waiting(at(state), inputs())
    assert sentence
    assert "\n" not in sentence
