"""The loop that judges: count what is new, weigh it, move the rollout, write down why.

Two controllers at once do no harm: every write compares and swaps, so one of them wins and the other reads
again. The lease only saves the second one the work.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields, replace

from monitoring.detector import Detector, follow
from monitoring.errors import LedgerUnavailable, RolloutConflict
from monitoring.guardrails import (
    Assessment,
    Certificate,
    Promotion,
    Scope,
    Verdict,
    evaluate,
    quality_of,
    scope_of,
)
from monitoring.ledger import PRUNED_AT_ONCE, Ledger
from monitoring.policy import Policy
from monitoring.records import (
    NOT_WANTED,
    PENDING,
    PROMOTED,
    ROLLED_BACK,
    WARMUP,
    Decision,
    Rollout,
    SelfTest,
)
from monitoring.reward import RewardCount, count_rewards
from monitoring.rollout import Command, Dry, Fleet, Inputs, advance, refusal, waiting
from monitoring.rows import Cursor, PairStats, WorkerBeat
from monitoring.sampling import WINDOW_S, measure, next_rate
from monitoring.tally import (
    BUCKET_SECONDS,
    CONTROL_BLOCKS,
    EVERYBODY,
    LATENCY_BLOCKS,
    RESOURCE_BLOCKS,
    Odds,
    Tallies,
    TallyKey,
    compare_blocks,
    compare_cost,
    count_answers,
    count_block,
    count_labels,
    merge,
)

Detectors = Mapping[str, Mapping[str, Detector]]
Ordered = Mapping[tuple[str, str], Sequence[int]]

BATCH = 2000
"""Pairs that one step counts at most, for each of the cursors."""
LEASE_S = 5.0
MIN_BLOCK_REQUESTS = 20
"""Latency blocks with fewer requests of an arm say nothing of it."""
BLOCK_GRACE_S = 2.0
"""Workers have so long after a latency block's end to flush their counts of it."""
STATUS_EVERY_S = 1.0
STATS_EVERY_S = 3.0
PRUNE_EVERY_S = 5.0
RATE_EVERY_S = 5.0
RATE_AFTER_DECISION_S = 2.0
"""The mirror's rate waits for so long after a decision: a worker that goes by a later revision can no longer say when
it had that of the decision."""
RETRIES = 5
SERVING = ("gateway", "shadow")
"""Services that must have loaded both arms before the candidate is used."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did.

    Attributes:
        at: the clock when it began; seconds: how long it took.
        leader: whether this controller holds the lease; without it nothing else was done.
        more: there is more to count than one step takes: step again at once.
        rollout, assessment, resolved, pair_stats: the active rollout as it is now, if there is one.
        waiting: what it waits for, in one sentence.
        decisions: those made in this step.
        effects: seconds from decision to use in every worker, of decisions found in effect by this step.
        error: why the ledger could not be used; None when all went well.
    """

    at: float
    seconds: float = 0.0
    leader: bool = False
    more: bool = False
    rollout: Rollout | None = None
    assessment: Assessment | None = None
    resolved: int = 0
    pair_stats: PairStats | None = None
    waiting: str = ""
    decisions: tuple[Decision, ...] = ()
    effects: tuple[float, ...] = ()
    error: str | None = None


class Controller:
    """Judges the active rollout of a ledger, one step at a time.

    Args:
        ledger: where everything is read from and written to.
        clock: seconds since the epoch.
        holder: this controller's name in the lease.
        on_decision: called after decisions were written, e.g. to wake whoever delivers alerts; must be quick.
        publish: shows a step's result, e.g. `monitoring.metrics.publish`.
        self_test: tests the judge for a rollout before its candidate is loaded, once for each rollout, in a thread of
            its own; None for rollouts that go on without. What it raises is a failed test.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        clock: Callable[[], float] = time.time,
        holder: str | None = None,
        on_decision: Callable[[], None] | None = None,
        publish: Callable[[StepResult], None] | None = None,
        self_test: Callable[[Rollout], SelfTest] | None = None,
    ) -> None:
        self.holder = holder or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._ledger = ledger
        self._clock = clock
        self._on_decision = on_decision
        self._publish = publish
        self._self_test = self_test
        self._self_tests: dict[str, SelfTest] = {}
        self._leased_until = 0.0
        self._status_at: dict[str, float] = {}
        self._tidied_at = 0.0
        self._stats_at = 0.0
        self._rated_at = 0.0

    def step(self) -> StepResult:
        """Count, judge and act once. Never raises for the ledger's sake: the result says what was wrong."""
        began, at = time.perf_counter(), self._clock()
        try:
            result = self._step(at)
        except LedgerUnavailable as error:
            result = StepResult(at, error=str(error))
        result = replace(result, seconds=time.perf_counter() - began)
        if result.decisions and self._on_decision is not None:
            self._on_decision()
        if self._publish is not None:
            self._publish(result)
        return result

    def close(self) -> None:
        """Give the lease back, if the ledger lets us."""
        self._leased_until = 0.0
        try:
            self._ledger.release_lease(self.holder)
        except LedgerUnavailable:
            return  # It runs out by itself.

    def _step(self, now: float) -> StepResult:
        if not self._lead(now):
            return StepResult(now)
        ledger = self._ledger
        rollout = ledger.active_rollout()
        if rollout is not None and rollout.state == PENDING and self._tested(rollout) is None:
            self._make_self_test(rollout, now)
            # Time has passed, in which an operator may have rolled it back and another controller may have taken over.
            now = self._clock()
            if not self._lead(now):
                return StepResult(now)
            rollout = ledger.active_rollout()
        beats = ledger.workers(now)
        if rollout is None:
            self._tidy(None, now)
            return StepResult(now, leader=True, effects=self._note_effects(beats))
        decisions: list[Decision] = []
        more = False
        if rollout.state != ROLLED_BACK:
            more = count(ledger, rollout, now)
        rollout, inputs, decisions = self._decide(rollout, beats, now, caught_up=not more)
        effects = self._note_effects(beats)
        sentence = waiting(rollout, inputs)
        if decisions or _due(now, self._status_at.get(rollout.id, 0.0), STATUS_EVERY_S):
            self._status_at = {rollout.id: now}
            ledger.save_status(rollout.id, now, _status(rollout, inputs, sentence, self.holder))
        stats = None
        if _due(now, self._stats_at, STATS_EVERY_S):
            self._stats_at = now
            stats = ledger.pair_stats(rollout.id)
        rollout = self._sample(rollout, now)
        self._tidy(rollout, now)
        return StepResult(
            now,
            leader=True,
            more=more,
            rollout=rollout,
            assessment=inputs.assessment,
            resolved=inputs.resolved,
            pair_stats=stats,
            waiting=sentence,
            decisions=tuple(decisions),
            effects=effects,
        )

    def _lead(self, now: float) -> bool:
        # Renewed well before it runs out, and not at every step: each renewal is a write.
        if now > self._leased_until - LEASE_S / 2 or now < self._leased_until - LEASE_S:
            held = self._ledger.acquire_lease(self.holder, LEASE_S, now)
            self._leased_until = now + LEASE_S if held else 0.0
            return held
        return True

    def _tested(self, rollout: Rollout) -> SelfTest | None:
        """What came of a rollout's self-test; None before it was made."""
        return NOT_WANTED if self._self_test is None else self._self_tests.get(rollout.id)

    def _make_self_test(self, rollout: Rollout, now: float) -> None:
        """Test the judge for this rollout, holding the lease all the while."""
        inputs = gather(self._ledger, rollout, self._ledger.workers(now), now)
        status = _status(rollout, inputs, waiting(rollout, inputs), self.holder)
        self._ledger.save_status(rollout.id, now, status)
        self._self_tests = {rollout.id: SelfTest(False, "it ended without a result")}

        def test() -> None:
            assert self._self_test is not None
            try:
                result = self._self_test(rollout)
            except Exception as error:  # noqa: BLE001  # whatever is wrong with it, the candidate gets no traffic
                result = SelfTest(False, " ".join(f"{type(error).__name__}: {error}".split()))
            self._self_tests[rollout.id] = result

        thread = threading.Thread(target=test, name="self-test", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(LEASE_S / 5)
            # The lease lasts a while, and the next attempt comes before its end.
            with suppress(LedgerUnavailable):
                self._lead(self._clock())

    def _tidy(self, rollout: Rollout | None, now: float) -> None:
        """Delete a little of what is no longer needed, and go on in the next step where that was not all."""
        if not _due(now, self._tidied_at, PRUNE_EVERY_S):
            return
        labels = rollout.policy.label_deadline_s if rollout is not None else 0.0
        rewards = rollout.policy.guardrails.reward.deadline_s if rollout is not None else 0.0
        more = self._ledger.sweep(now, labels, rewards)
        if rollout is not None:
            more |= self._ledger.prune(rollout.id, now) >= PRUNED_AT_ONCE
        self._tidied_at = 0.0 if more else now

    def _decide(
        self, rollout: Rollout, beats: Sequence[WorkerBeat], now: float, *, caught_up: bool
    ) -> tuple[Rollout, Inputs, list[Decision]]:
        """Move the rollout as far as it goes; what somebody else changed meanwhile stands."""
        decisions: list[Decision] = []
        tested = self._tested(rollout)
        inputs = gather(self._ledger, rollout, beats, now, caught_up=caught_up, self_test=tested)
        for _ in range(RETRIES):
            moved, decision = advance(rollout, inputs)
            if moved is rollout:
                break
            stored = self._ledger.apply(rollout, moved, decision)
            if stored is not None and decision is not None:
                decisions.append(replace(decision, revision=stored.revision))
            rollout = stored or self._ledger.rollout(rollout.id)
            inputs = gather(self._ledger, rollout, beats, now, caught_up=caught_up, self_test=tested)
        return rollout, inputs, decisions

    def _sample(self, rollout: Rollout, now: float) -> Rollout:
        """Have the workers mirror more or less, where that is due and clearly better. It is no decision: it moves the
        rollout nowhere, and no evidence depends on it."""
        if (
            rollout.state in (PENDING, WARMUP, ROLLED_BACK)
            or not _due(now, self._rated_at, RATE_EVERY_S)
            or 0 <= now - rollout.entered_at < RATE_AFTER_DECISION_S
        ):
            return rollout
        self._rated_at = now
        load = measure(self._ledger.mirror_counts(rollout.id, now - WINDOW_S), now, since=rollout.created_at)
        if load is None:
            return rollout
        policy = rollout.policy
        rate = next_rate(
            rollout.mirror_rate,
            load,
            ceiling=policy.mirror_rate,
            wanted_per_s=policy.promoted_pairs_per_s if rollout.state == PROMOTED else None,
        )
        if rate == rollout.mirror_rate:
            return rollout
        # What somebody else changed meanwhile stands; the rate is looked at again in a few seconds.
        return self._ledger.set_mirror_rate(rollout, rate, now) or self._ledger.rollout(rollout.id)

    def _note_effects(self, beats: Sequence[WorkerBeat]) -> tuple[float, ...]:
        """Fill in when the last live gateway worker had applied a decision, where all of them have."""
        gateways = [beat for beat in beats if beat.service.lower() == "gateway"]
        if not gateways:
            return ()
        slowest = min(beat.revision for beat in gateways)
        found = []
        for decision in self._ledger.ineffective_decisions():
            if decision.revision <= slowest:
                # Of a worker that is further on already only the later time is known; then this is too late.
                at = max(decision.at, *(beat.applied_at for beat in gateways))
                self._ledger.mark_effective(decision.seq, at)
                found.append(at - decision.at)
        return tuple(found)


def _due(now: float, last: float, every: float) -> bool:
    """Whether to do again what was last done at `last`; at once when the clock was set back since."""
    return not 0 <= now - last < every


def count(ledger: Ledger, rollout: Rollout, now: float) -> bool:
    """Count what is new: answers at once, labels first-in-first-out, latency blocks once they have ended.

    Counts and cursor move in one transaction. When somebody else moved the cursor first, nothing is added.

    Returns:
        Whether there is more to count than one call takes.
    """
    corrections = ledger.last_correction()
    cursor = ledger.cursor(rollout.id)
    guarded = [group.name for group in rollout.groups]
    with ledger.pairs_after(rollout.id, cursor.answers_seq, BATCH) as pairs:
        fresh = list(pairs)
    answers = count_answers(fresh, guarded, rollout.positive, cursor.unmatched, rollout.baseline)
    policy = rollout.policy
    odds = None
    if policy.guardrails.equalized_odds.enabled and guarded:
        share = policy.guardrails.equalized_odds.label_share
        odds = Odds(guarded, rollout.positive, share, cursor.odds_unmatched)
    # Where no pair waits for its label both cursors are at the same place, and reading is most of the work.
    same = cursor.labels_seq == cursor.answers_seq
    with (
        nullcontext(fresh) if same else ledger.pairs_after(rollout.id, cursor.labels_seq, BATCH) as open_pairs
    ):
        labels = count_labels(
            open_pairs,
            frozenset(guarded),
            now,
            policy.label_deadline_s,
            rollout.classes,
            rollout.quality,
            odds,
        )
    ended = int((now - BLOCK_GRACE_S) // BUCKET_SECONDS)
    blocks, costs = ledger.blocks_after(rollout.id, cursor.blocks_through, ended)
    rewards = _rewards(ledger, rollout, cursor, now)
    more = max(answers.pairs, labels.pairs, rewards.pairs) == BATCH
    if not (answers.pairs or labels.pairs or rewards.pairs or blocks or costs):
        return False
    detectors = cursor.detectors
    if rollout.epoch:
        detectors = _followed(detectors, labels.ordered, policy, scope_of(rollout, None))
    tallies: Tallies = {}
    resources = _resource_tallies(costs, policy.guardrails.resource_use.ratio)
    for counted in (answers.tallies, labels.tallies, rewards.tallies, _block_tallies(blocks), resources):
        for key, counts in counted.items():
            tallies[key] = merge(tallies.get(key, {}), counts)
    last_block = max((*blocks, *costs), default=cursor.blocks_through)
    moved = replace(
        cursor,
        answers_seq=answers.last_seq or cursor.answers_seq,
        labels_seq=labels.last_seq or cursor.labels_seq,
        blocks_through=last_block,
        unmatched=answers.unmatched,
        answered=cursor.answered + answers.pairs,
        resolved=cursor.resolved + labels.pairs,
        compared=cursor.compared + labels.compared,
        labels=cursor.labels + labels.labels,
        answers_at=max(cursor.answers_at, answers.newest_at),
        moved_at=now if answers.pairs else cursor.moved_at,
        labels_at=max(cursor.labels_at, labels.newest_at),
        blocks_at=(last_block + 1) * BUCKET_SECONDS if blocks or costs else cursor.blocks_at,
        detectors=detectors,
        odds_unmatched=labels.unmatched,
        rewards_seq=rewards.last_seq or cursor.rewards_seq,
        rewards_at=max(cursor.rewards_at, rewards.newest_at),
        reward_waiting=rewards.waiting,
    )
    ledger.commit_progress(rollout.id, rollout.epoch, cursor, moved, tallies, corrections)
    return more


def _rewards(ledger: Ledger, rollout: Rollout, cursor: Cursor, now: float) -> RewardCount:
    """What is new of rewards; nothing where no guardrail asks for them."""
    section = rollout.policy.guardrails.reward
    if not section.enabled:
        return RewardCount(waiting=cursor.reward_waiting)
    with ledger.rewarded_after(rollout.id, cursor.rewards_seq, BATCH) as pairs:
        return count_rewards(pairs, cursor.reward_waiting, now, section.deadline_s)


def _followed(detectors: Detectors, ordered: Ordered, policy: Policy, scope: Scope) -> Detectors:
    """The detectors after these outcomes."""
    found = {guardrail: dict(groups) for guardrail, groups in detectors.items()}
    for (guardrail, group), outcomes in ordered.items():
        margin = policy.guardrails.margin(guardrail) / quality_of(guardrail, scope).scale
        before = found.setdefault(guardrail, {}).get(group, Detector())
        found[guardrail][group] = follow(before, outcomes, margin)
    return found


def _block_tallies(blocks: dict[int, dict[str, dict[int, int]]]) -> Tallies:
    tallies: Tallies = {}
    for bucket, arms in blocks.items():
        treatment, control = arms["treatment"], arms["control"]
        # Whether a block counts depends on its size only, never on how slow it was.
        if sum(treatment.values()) < MIN_BLOCK_REQUESTS:
            continue
        share = count_block(treatment[0], treatment[1])
        tallies[TallyKey(LATENCY_BLOCKS, EVERYBODY, bucket)] = {share: 1}
        if sum(control.values()) >= MIN_BLOCK_REQUESTS:
            difference = compare_blocks(treatment, control)
            tallies[TallyKey(CONTROL_BLOCKS, EVERYBODY, bucket)] = {difference: 1}
    return tallies


def _resource_tallies(blocks: dict[int, dict[str, dict[int, int]]], ratio: float) -> Tallies:
    tallies: Tallies = {}
    for bucket, arms in blocks.items():
        treatment, control = arms["treatment"], arms["control"]
        if min(treatment[1], control[1]) >= MIN_BLOCK_REQUESTS:
            outcome = compare_cost(treatment, control, ratio)
            tallies[TallyKey(RESOURCE_BLOCKS, EVERYBODY, bucket)] = {outcome: 1}
    return tallies


def gather(
    ledger: Ledger,
    rollout: Rollout,
    beats: Sequence[WorkerBeat],
    now: float,
    *,
    caught_up: bool = True,
    command: Command | None = None,
    self_test: SelfTest | None = None,
) -> Inputs:
    """Everything a transition of this rollout may depend on, as the ledger has it now."""
    cursor = ledger.cursor(rollout.id)
    totals = ledger.totals(rollout.id, rollout.epoch)
    # Pairs come in as long as the cursor moves, however old they are: a shadow behind a queue is not blind.
    began = max(cursor.moved_at, rollout.step_at, rollout.mirror_raised_at)
    flow = ledger.flow_after(rollout.id, began)
    missing, recent = ledger.recent_missing(rollout.id)
    dry = None
    if caught_up and flow.since is not None and flow.last_at is not None:
        dry = Dry(flow.since, flow.requests, flow.last_at)
    return Inputs(
        now=now,
        assessment=evaluate(
            rollout.policy,
            scope_of(rollout, cursor.detectors if rollout.epoch else None),
            totals,
            ledger.totals(rollout.id, rollout.epoch - 1) if rollout.epoch else None,
        ),
        resolved=cursor.resolved,
        compared=cursor.compared,
        labels=cursor.labels,
        recent=recent,
        recent_missing=missing,
        fleet=fleet_of(rollout, beats),
        dry=dry,
        moved_at=cursor.moved_at,
        arrivals=_arrivals(cursor, ledger.last_counts_at()),
        command=command,
        self_test=self_test,
    )


def fleet_of(rollout: Rollout, beats: Sequence[WorkerBeat]) -> Fleet:
    """What the live workers that serve have to say about this rollout."""
    serving = [beat for beat in beats if beat.service.lower() in SERVING]
    gateways = [beat for beat in serving if beat.service.lower() == "gateway"]
    lacking = [beat for beat in serving if not {rollout.control, rollout.treatment} <= set(beat.loaded)]
    return Fleet(
        live=len(gateways),
        loaded=not lacking and all(beat.revision >= rollout.revision for beat in serving),
        applied=all(beat.revision >= rollout.revision for beat in gateways),
        error=next((beat.error for beat in lacking if beat.error), None),
    )


def apply_command(
    ledger: Ledger, rollout_id: str, verb: str, actor: str, reason: str, now: float
) -> Decision:
    """Do what an operator asks for, at once and without the controller.

    Args:
        verb: one of `monitoring.rollout.VERBS`.

    Returns:
        The decision made. It is a rollback instead of what was asked for when a guardrail acts this moment.

    Raises:
        RolloutNotFound: there is no such rollout.
        RolloutConflict: the command makes no sense in the state the rollout is in; the text says why.
        LedgerUnavailable: nothing was changed.
    """
    command = Command(verb, actor, reason)
    for _ in range(RETRIES):
        rollout = ledger.rollout(rollout_id)
        why = refusal(rollout, command)
        if why is not None:
            raise RolloutConflict(f"rollout {rollout_id}: cannot {verb}: {why}")
        inputs = gather(ledger, rollout, ledger.workers(now), now, command=command)
        moved, decision = advance(rollout, inputs)
        stored = ledger.apply(rollout, moved, decision)
        if stored is not None and decision is not None:
            return replace(decision, revision=stored.revision)
    raise RolloutConflict(f"rollout {rollout_id}: it kept changing meanwhile; look at it and ask again")


def _arrivals(cursor: Cursor, counts_at: float | None) -> dict[str, float]:
    """Guardrail -> arrival time of the newest input counted for it, where there was any."""
    found = {
        "accuracy_drop": cursor.labels_at,
        "group_harm": cursor.labels_at,
        "class_harm": cursor.labels_at,
        "disagreement": cursor.answers_at,
        "demographic_parity": cursor.answers_at,
        "latency_p95": cursor.blocks_at,
        "latency_vs_control": cursor.blocks_at,
        "treatment_errors": counts_at or 0.0,
        "sample_ratio": counts_at or 0.0,
        "equalized_odds": cursor.labels_at,
        "estimated_drop": cursor.answers_at,
        "prediction_drift": cursor.answers_at,
        "input_drift": cursor.answers_at,
        "reward": cursor.rewards_at,
        "resource_use": cursor.blocks_at,
    }
    return {name: at for name, at in found.items() if at}


def _status(rollout: Rollout, inputs: Inputs, sentence: str, holder: str) -> dict[str, object]:
    assessment = inputs.assessment
    return {
        "rollout_id": rollout.id,
        "state": rollout.state,
        "step": rollout.step,
        "weight": rollout.weight,
        "mirror_rate": rollout.rate_in_force,
        "waiting": sentence,
        "pairs": inputs.resolved,
        "compared": inputs.compared,
        "recent_pairs": inputs.recent,
        "recent_missing": inputs.recent_missing,
        "labels": inputs.labels,
        "workers": inputs.fleet.live,
        "controller": holder,
        "guardrails": [_fields(verdict) for verdict in assessment.verdicts],
        "certificates": [_fields(certificate) for certificate in assessment.certificates],
        "promotion": {**_fields(assessment.promotion), "best": _fields(assessment.promotion.best)},
    }


def _fields(item: Verdict | Certificate | Promotion) -> dict[str, object]:
    """As `dataclasses.asdict`, without its deep copies."""
    return {field.name: getattr(item, field.name) for field in fields(item)}
