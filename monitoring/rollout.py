"""The state machine of a rollout: plain data in, plain data out; no clock, no I/O.

pending -> warmup -> shadowing -> step 1 -> ... -> promoting -> promoted, and from anywhere `held`, `blind` or
`rolled_back`, which is final. Rolling back wins over everything that happens at the same moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from monitoring.guardrails import Assessment, Verdict, describe
from monitoring.policy import Policy
from monitoring.records import (
    BLIND,
    HELD,
    NOT_WANTED,
    PENDING,
    PROMOTED,
    PROMOTING,
    ROLLED_BACK,
    SHADOWING,
    STATES,
    STEP,
    WARMUP,
    Decision,
    Rollout,
    SelfTest,
)

__all__ = [
    "STATES",
    "VERBS",
    "Command",
    "Decision",
    "Dry",
    "Fleet",
    "Inputs",
    "Rollout",
    "advance",
    "allowed_weights",
    "refusal",
    "waiting",
]


@dataclass(frozen=True, slots=True)
class Fleet:
    """The workers that beat of late, as far as one rollout's route is concerned.

    Attributes:
        live: how many there are.
        loaded: all of them hold both arms, and work by the rollout's revision or a later one.
        applied: all of them work by that revision or a later one.
        error: what one of them could not load; None when all is well.
    """

    live: int = 0
    loaded: bool = False
    applied: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Dry:
    """Requests since a pair last came in: `requests` of them, since `since`, the last at `last_at`."""

    since: float
    requests: int
    last_at: float


@dataclass(frozen=True, slots=True)
class Command:
    """An operator's verb: "promote", "promote full", "pause", "resume" or "rollback"."""

    verb: str
    actor: str
    reason: str = ""


VERBS = ("promote", "promote full", "pause", "resume", "rollback")


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything a transition may depend on.

    Attributes:
        now: seconds since the epoch.
        assessment: what the guardrails say.
        resolved, labels: pairs judged so far, and labels that took.
        compared: those of the resolved that both arms answered; only they count for climbing.
        recent, recent_missing: how many of the newest pairs were looked at, and how many of them lack an answer.
        fleet: the workers.
        dry: requests without pairs; None when there are none, or when the controller has not caught up.
        moved_at: when a pair last came in, however old it was; 0 before the first.
        arrivals: guardrail -> arrival time of the newest input that was counted for it.
        command: what an operator asks for.
        self_test: what came of the self-test; None as long as it has not been made.
    """

    now: float
    assessment: Assessment
    resolved: int = 0
    compared: int = 0
    labels: int = 0
    recent: int = 0
    recent_missing: int = 0
    fleet: Fleet = Fleet()
    dry: Dry | None = None
    moved_at: float = 0.0
    arrivals: Mapping[str, float] = field(default_factory=dict)
    command: Command | None = None
    self_test: SelfTest | None = NOT_WANTED


_WATCHED = (SHADOWING, STEP, PROMOTING, PROMOTED, HELD)
"""States in which pairs are expected when there is traffic."""
_MIN_EXPECTED_PAIRS = 10
"""So many pairs should have come of the requests before their absence means anything."""
_MISSING_SHOWN_FROM = 10
"""So many of the newest pairs must lack an answer before the status speaks of it."""
_FLOWING_WITHIN_S = 30.0
"""Requests flow when the last one is at most this old; their counts come in time buckets of 10 s."""

_Step = tuple[Rollout, Decision | None]


def allowed_weights(policy: Policy) -> frozenset[int]:
    """Every weight a rollout by this policy can ever have."""
    return frozenset({0, *policy.steps, policy.promoted_weight})


def refusal(rollout: Rollout, command: Command) -> str | None:
    """Why a command makes no sense in the state the rollout is in; None when it does."""
    state, verb = rollout.state, command.verb
    why: str | None = None
    if verb not in VERBS:
        why = f"no such command: {verb!r} (there are {', '.join(VERBS)})"
    elif not rollout.active:
        why = "another rollout has taken its place"
    elif state == ROLLED_BACK:
        why = "it is rolled back, which is final: start another rollout"
    elif verb == "pause" and HELD in (state, rollout.blind_from):
        why = "it is held already"
    elif verb == "resume" and state != HELD:
        why = f"it is not held but {state}"
    elif verb in ("promote", "promote full"):
        why = _promotion_refusal(rollout, verb)
    return why


def _promotion_refusal(rollout: Rollout, verb: str) -> str | None:
    state = (rollout.blind_from if rollout.state == BLIND else rollout.state) or SHADOWING
    state = (rollout.held_from if state == HELD else state) or SHADOWING
    if state in (PENDING, WARMUP):
        return "its workers have not loaded the candidate yet"
    if state in (PROMOTING, PROMOTED):
        return f"it is {state} already"
    if verb == "promote" and rollout.state not in (SHADOWING, STEP):
        return f"it is {rollout.state}: resume it, or promote it in full"
    return None


def advance(rollout: Rollout, inputs: Inputs) -> _Step:
    """The next state, and the decision that led there; the rollout itself and None when nothing changes.

    At most one transition is made; call again until nothing changes. A command that makes no sense in the
    present state (see `refusal`) is passed over.
    """
    if rollout.state == ROLLED_BACK or not rollout.active:
        return rollout, None
    command = inputs.command
    if command is not None and refusal(rollout, command) is not None:
        command = None
    if command is not None and command.verb == "rollback":
        return _roll_back(rollout, inputs, command.reason or "asked for by an operator", actor=command.actor)
    crossed = inputs.assessment.crossed("rollback")
    if crossed:
        return _roll_back(rollout, inputs, describe(crossed[0]), crossed[0])
    if command is not None:
        return _obey(rollout, inputs, command)
    for step in (_hold, _alert, _blind, _climb):
        found = step(rollout, inputs)
        if found is not None:
            return found
    return rollout, None


def waiting(rollout: Rollout, inputs: Inputs) -> str:
    """One sentence: what the rollout waits for."""
    loading = f": {inputs.fleet.error}" if inputs.fleet.error else ""
    limit = rollout.policy.blind_rollback_s
    fixed = {
        PENDING: "the self-test of its guardrails",
        WARMUP: f"all workers to load the candidate{loading}",
        PROMOTING: "all workers to apply the promotion",
        PROMOTED: "nothing: promoted, and guarded still",
        HELD: f"an operator's resume: {rollout.reason}",
        BLIND: f"pairs: requests come and no pairs do; rolls back when that lasts {limit:g} s",
        ROLLED_BACK: "nothing: rolled back for good",
    }
    sentence = (
        fixed.get(rollout.state) or "; ".join(_lacking(rollout, inputs)) or "nothing: it goes on at once"
    )
    missing, recent = inputs.recent_missing, inputs.recent
    if rollout.state in _WATCHED and missing >= _MISSING_SHOWN_FROM and 2 * missing > recent:
        sentence += f"; {missing} of the newest {recent} pairs lack an arm's answer"
    return sentence


def _lacking(rollout: Rollout, inputs: Inputs) -> list[str]:
    """What the present step still lacks before the next may come."""
    policy = rollout.policy
    found = []
    suspicion = inputs.assessment.suspicion
    if suspicion is not None:
        found.append(f"suspicion to pass: {describe(suspicion)}")
    pairs = policy.step_min_pairs - (inputs.compared - rollout.step_pairs)
    if pairs > 0:
        found.append(f"step {rollout.step} needs {pairs:,} more pairs that both arms answered")
    seconds = policy.step_min_seconds - (inputs.now - rollout.step_at)
    if seconds > 0:
        found.append(f"step {rollout.step} needs {seconds:.0f} more seconds")
    promotion = inputs.assessment.promotion
    if rollout.step == len(policy.steps) - 1 and not promotion.ready:
        found.append(promotion.sentence)
    return found


def _climb(rollout: Rollout, inputs: Inputs) -> _Step | None:
    if rollout.state == PENDING:
        return _tested(rollout, inputs, inputs.self_test) if inputs.self_test is not None else None
    if rollout.state == WARMUP:
        return _warm(rollout, inputs)
    if rollout.state == PROMOTING:
        return _promoted(rollout, inputs) if inputs.fleet.live and inputs.fleet.applied else None
    if rollout.state not in (SHADOWING, STEP) or _lacking(rollout, inputs):
        return None
    if rollout.step < len(rollout.policy.steps) - 1:
        seen = inputs.compared - rollout.step_pairs
        return _next_step(rollout, inputs, "advance", f"step {rollout.step} passed on {seen:,} pairs")
    return _promote(rollout, inputs, inputs.assessment.promotion.sentence, "controller")


def _tested(rollout: Rollout, inputs: Inputs, result: SelfTest) -> _Step:
    if not result.passed:
        return _roll_back(rollout, inputs, f"self-test failed: {result.sentence}")
    return _move(rollout, inputs, WARMUP, "advance", result.sentence)


def _warm(rollout: Rollout, inputs: Inputs) -> _Step | None:
    fleet, limit = inputs.fleet, rollout.policy.warmup_timeout_s
    if fleet.live and fleet.loaded and fleet.error is None:
        started = _at_step(rollout, inputs, 0)
        return _move(started, inputs, SHADOWING, "advance", "all workers have loaded it", was=rollout)
    if inputs.now - rollout.entered_at >= limit:
        why = fleet.error or ("no worker is live" if not fleet.live else "a worker has not loaded it")
        return _roll_back(rollout, inputs, f"not loaded within {limit:g} s: {why}")
    return None


def _obey(rollout: Rollout, inputs: Inputs, command: Command) -> _Step:
    asked = command.reason or "asked for by an operator"
    if command.verb == "pause":
        # What was blind is looked at afresh while it is held.
        before = rollout.blind_from or rollout.state
        return _move(
            rollout, inputs, HELD, "pause", asked, actor=command.actor, held_from=before, blind_from=None
        )
    if command.verb == "resume":
        waived = {*rollout.waived, *(v.name for v in inputs.assessment.crossed("hold"))}
        return _move(
            rollout,
            inputs,
            rollout.held_from or SHADOWING,
            "resume",
            asked,
            actor=command.actor,
            held_from=None,
            waived=tuple(sorted(waived)),
        )
    unproven = not inputs.assessment.promotion.ready
    if command.verb == "promote full":
        return _promoted(rollout, inputs, "promote full", asked, command.actor, override=unproven)
    if rollout.step < len(rollout.policy.steps) - 1:
        return _next_step(
            rollout, inputs, "promote", asked, command.actor, override=bool(_lacking(rollout, inputs))
        )
    return _promote(rollout, inputs, asked, command.actor, override=unproven)


def _hold(rollout: Rollout, inputs: Inputs) -> _Step | None:
    if HELD in (rollout.state, rollout.blind_from):
        return None
    crossed = [v for v in inputs.assessment.crossed("hold") if v.name not in rollout.waived]
    if not crossed:
        return None
    before = rollout.blind_from or rollout.state
    return _move(
        rollout,
        inputs,
        HELD,
        "hold",
        describe(crossed[0]),
        verdict=crossed[0],
        held_from=before,
        blind_from=None,
    )


def _alert(rollout: Rollout, inputs: Inputs) -> _Step | None:
    new = [v for v in inputs.assessment.crossed("alert", "dry-run") if v.name not in rollout.alerted]
    if not new:
        return None
    alerted = (*rollout.alerted, new[0].name)
    changed = replace(rollout, alerted=alerted)
    return changed, _decision(rollout, changed, inputs, new[0].action, describe(new[0]), verdict=new[0])


def _blind(rollout: Rollout, inputs: Inputs) -> _Step | None:
    policy, now, dry = rollout.policy, inputs.now, inputs.dry
    flowing = dry is not None and now - dry.last_at <= _FLOWING_WITHIN_S
    if rollout.state == BLIND:
        if inputs.moved_at > rollout.entered_at:
            return _move(
                rollout,
                inputs,
                rollout.blind_from or SHADOWING,
                "return",
                "pairs come again",
                blind_from=None,
            )
        if flowing and now - rollout.entered_at >= policy.blind_rollback_s:
            return _roll_back(rollout, inputs, f"no pairs for {policy.blind_rollback_s:g} s more")
        return None
    if rollout.state not in _WATCHED or dry is None or not flowing:
        return None
    expected = dry.requests * rollout.mirror_rate >= _MIN_EXPECTED_PAIRS
    if not expected or now - dry.since < policy.blind_after_s:
        return None
    why = f"{dry.requests:,} requests and no pair for {now - dry.since:.0f} s"
    return _move(rollout, inputs, BLIND, "blind", why, blind_from=rollout.state)


def _at_step(rollout: Rollout, inputs: Inputs, step: int) -> Rollout:
    return replace(
        rollout, step=step, weight=rollout.policy.steps[step], step_at=inputs.now, step_pairs=inputs.compared
    )


def _next_step(
    rollout: Rollout,
    inputs: Inputs,
    verb: str,
    reason: str,
    actor: str = "controller",
    *,
    override: bool = False,
) -> _Step:
    climbed = _at_step(rollout, inputs, rollout.step + 1)
    return _move(climbed, inputs, STEP, verb, reason, actor=actor, override=override, was=rollout)


def _promote(rollout: Rollout, inputs: Inputs, reason: str, actor: str, *, override: bool = False) -> _Step:
    raised = replace(rollout, weight=rollout.policy.promoted_weight)
    return _move(raised, inputs, PROMOTING, "promote", reason, actor=actor, override=override, was=rollout)


def _promoted(
    rollout: Rollout,
    inputs: Inputs,
    verb: str = "advance",
    reason: str = "all workers have applied it",
    actor: str = "controller",
    *,
    override: bool = False,
) -> _Step:
    raised = replace(
        rollout,
        weight=rollout.policy.promoted_weight,
        epoch=rollout.epoch + 1,
        held_from=None,
        blind_from=None,
        waived=(),
        alerted=(),
    )
    return _move(raised, inputs, PROMOTED, verb, reason, actor=actor, override=override, was=rollout)


def _roll_back(
    rollout: Rollout, inputs: Inputs, reason: str, verdict: Verdict | None = None, actor: str = "controller"
) -> _Step:
    return _move(
        replace(rollout, weight=0),
        inputs,
        ROLLED_BACK,
        "rollback",
        reason,
        verdict=verdict,
        actor=actor,
        was=rollout,
        held_from=None,
        blind_from=None,
    )


def _move(
    rollout: Rollout,
    inputs: Inputs,
    state: str,
    verb: str,
    reason: str,
    *,
    verdict: Verdict | None = None,
    actor: str = "controller",
    override: bool = False,
    was: Rollout | None = None,
    **changes: object,
) -> _Step:
    """Enter a state. `was` is the rollout as it came, where `rollout` has been changed on the way."""
    changed = replace(rollout, state=state, entered_at=inputs.now, reason=reason, **changes)  # type: ignore[arg-type]
    decision = _decision(was or rollout, changed, inputs, verb, reason, verdict=verdict)
    return changed, replace(decision, actor=actor, override=override)


def _decision(
    before: Rollout, after: Rollout, inputs: Inputs, verb: str, reason: str, *, verdict: Verdict | None
) -> Decision:
    decision = Decision(
        rollout_id=before.id,
        at=inputs.now,
        actor="controller",
        from_state=before.state,
        to_state=after.state,
        verb=verb,
        reason=reason,
        pairs=inputs.resolved,
        labels=inputs.labels,
        weight=after.weight,
        evidence_at=max(inputs.arrivals.values(), default=None),
    )
    if verdict is not None:
        return replace(
            decision,
            guardrail=verdict.guardrail,
            group=verdict.group,
            evidence_log10=verdict.evidence_log10,
            limit_log10=verdict.limit_log10,
            drop=verdict.estimate,
            evidence_at=inputs.arrivals.get(verdict.guardrail),
        )
    if after.state in (PROMOTING, PROMOTED):
        best = inputs.assessment.promotion.best
        return replace(
            decision,
            guardrail=best.guardrail,
            group=best.group,
            evidence_log10=best.evidence_log10,
            limit_log10=best.limit_log10,
            drop=best.estimate,
            evidence_at=inputs.arrivals.get(best.guardrail),
        )
    return decision
