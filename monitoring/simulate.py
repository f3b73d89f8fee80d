"""Made-up traffic, judged by the real guardrails and the real state machine with a made-up clock. Pure.

`simulate` counts traffic (`monitoring.traffic`) as the controller does, at every look, and hands the counts to
`monitoring.guardrails.evaluate` and `monitoring.rollout.advance`, which decide. Two things make that fast enough for
thousands of runs: all looks are counted at once, and looks at which nothing can happen are passed over.
`tests/monitoring/test_simulate.py` holds both against the real controller on a real ledger: the same decisions at the
same pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from monitoring.detector import BLOCK_PAIRS, Detector, follow
from monitoring.evidence import (
    LOG10,
    LOG_CAPITAL,
    PAIRED,
    Floats,
    agreement_evidence,
    drop_evidence,
    excess_evidence,
    log_evidence,
    log_factors,
    mismatch_evidence,
    no_drop_evidence,
)
from monitoring.groups import GroupSpec
from monitoring.guardrails import Assessment, Scope, Totals, evaluate, scope_of
from monitoring.policy import Policy
from monitoring.records import (
    PENDING,
    PROMOTING,
    ROLLED_BACK,
    SHADOWING,
    STEP,
    WARMUP,
    Decision,
    Rollout,
)
from monitoring.rollout import Fleet, Inputs, advance
from monitoring.tally import (
    BUCKET_SECONDS,
    CONTROL_BLOCKS,
    EVERYBODY,
    LATENCY_BLOCKS,
    MISSING,
    SAMPLE_RATIO,
    compare_blocks,
    count_block,
    group_name,
)
from monitoring.traffic import NO_ANSWER, START, Traffic

__all__ = ["CLASSES", "Made", "Run", "begin", "simulate"]

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

CLASSES = ("no", "yes")
"""Of the simulated model; the second is the favourable one."""
BATCH, RETRIES, BLOCK_GRACE_S, MIN_BLOCK_REQUESTS, LATENCY_SHARE = 2000, 5, 2.0, 20, 0.05
"""As the controller and the guardrails have them; a test compares."""
_EPSILON = 1e-9


# -- what the controller has counted by each look -------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Counts:
    """Counts of pairs since the start, by look; row 0 is before the first look.

    Attributes:
        now: the clock; rows: requests made by then.
        resolved, compared, labels: as in the ledger's cursor.
        paired: d = 1, -1, 0, missing. Shape [looks, subjects, 4]; subjects are everybody, groups, classes.
        answers: disagree, agree, missing. Shape [looks, subjects, 3].
        parity: z = -2, -1, 0, 1, 2, missing. Shape [looks, groups, 6].
        outcome, turn: of each pair: its column of `paired`, and the look at which it was counted.
        subjects: whom each pair is counted for, several arrays of one entry for each pair.
    """

    now: Floats
    rows: Ints
    resolved: Ints
    compared: Ints
    labels: Ints
    paired: Ints
    answers: Ints
    parity: Ints
    outcome: Ints
    turn: Ints
    subjects: tuple[Ints, ...]


def _count(
    policy: Policy, groups: Sequence[GroupSpec], classes: Sequence[str], traffic: Traffic, every: int
) -> _Counts:
    # The ledger keeps a pair once, the first time that it comes.
    first = np.arange(len(traffic.request))
    if (np.diff(traffic.request) <= 0).any():
        first = np.sort(np.unique(traffic.request, return_index=True)[1])
    control, treatment = traffic.control[first], traffic.treatment[first]
    missing, differ = treatment == NO_ANSWER, control != treatment
    created_at, labelled_at = traffic.created_at[first], traffic.labelled_at[first]
    deadline = np.minimum(labelled_at, created_at + policy.label_deadline_s)
    turn = np.maximum.accumulate(np.where(differ & ~missing, deadline, created_at))
    now, rows, answered, resolved = _looks(traffic, first, turn, every)
    looks = len(now)
    by_answer, by_label = _turns(answered, len(first)), _turns(resolved, len(first))
    counted = by_label < looks
    known = labelled_at <= np.where(counted, now[np.minimum(by_label, looks - 1)], -np.inf)
    label = traffic.label[first]
    # Columns d = 1, -1, 0, missing: see `monitoring.tally.label_outcome`.
    told = np.where(control == label, 0, np.where(treatment == label, 1, 2))
    outcome = np.where(missing, 3, np.where(~differ, 2, np.where(known, told, 3)))
    answer = np.where(missing, 2, np.where(differ, 0, 1))
    subjects = _subjects(traffic, first, groups, classes)
    many = 1 + len(groups) + len(classes)
    needed = differ & ~missing & known & counted
    return _Counts(
        now=now,
        rows=rows,
        resolved=resolved,
        compared=_running(by_label[~missing], looks),
        labels=_running(by_label[needed], looks),
        paired=_table(by_label, subjects, outcome, (looks, many, 4)),
        answers=_table(by_answer, subjects, answer, (looks, many, 3)),
        parity=_parity(traffic, first, groups, by_answer, looks),
        outcome=outcome,
        turn=by_label,
        subjects=subjects,
    )


def _looks(traffic: Traffic, first: Ints, turn: Floats, every: int) -> tuple[Floats, Ints, Ints, Ints]:
    """When the controller looked, requests made by then, and how far its two cursors came: a batch at a time."""
    ends = np.arange(every, len(traffic.request) + 1, every)
    at = traffic.created_at[ends - 1]
    arrived = np.searchsorted(first, ends)
    ready = np.minimum(arrived, np.searchsorted(turn, at, side="right"))
    if max(np.diff(arrived, prepend=0).max(), np.diff(ready, prepend=0).max()) <= BATCH:
        return np.r_[START, at], np.r_[0, ends], np.r_[0, arrived], np.r_[0, ready]
    now, rows, answered, resolved = [START], [0], [0], [0]
    for clock, end, answers, labels in zip(
        at.tolist(), ends.tolist(), arrived.tolist(), ready.tolist(), strict=True
    ):
        while True:
            answered.append(min(answers, answered[-1] + BATCH))
            resolved.append(min(labels, resolved[-1] + BATCH))
            now.append(clock)
            rows.append(end)
            if answered[-1] == answers and resolved[-1] == labels:
                break
    return np.array(now), np.array(rows), np.array(answered), np.array(resolved)


def _turns(cursor: Ints, pairs: int) -> Ints:
    """The look at which each pair was counted, by where the cursor was at each; one after the last if it never was."""
    turns = np.full(pairs, len(cursor), dtype=np.int64)
    turns[: cursor[-1]] = np.repeat(np.arange(len(cursor)), np.diff(cursor, prepend=0))
    return turns


def _running(look: Ints, looks: int) -> Ints:
    return np.asarray(np.cumsum(np.bincount(look, minlength=looks + 1)[:looks]), dtype=np.int64)


def _table(look: Ints, subjects: Sequence[Ints], column: Ints, shape: tuple[int, int, int]) -> Ints:
    """Running counts by look, subject and column; a subject of -1 is not guarded."""
    looks, many, columns = shape
    places = [
        ((look * many + subject) * columns + column)[(subject >= 0) & (look < looks)] for subject in subjects
    ]
    counts = np.bincount(np.concatenate(places), minlength=looks * many * columns)
    return np.cumsum(counts.reshape(shape), axis=0)


def _subjects(
    traffic: Traffic, first: Ints, groups: Sequence[GroupSpec], classes: Sequence[str]
) -> tuple[Ints, ...]:
    """Whom each pair is counted for: everybody, one value of each attribute, and the classes that the arms gave."""
    found = [np.zeros(len(first), dtype=np.int64)]
    places = {group.name: 1 + place for place, group in enumerate(groups)}
    for column, attribute in enumerate(traffic.attributes):
        values = traffic.members[first, column]
        most = int(values.max(initial=0))
        places_of = [places.get(group_name(attribute, str(value)), -1) for value in range(most + 1)]
        if max(places_of) > 0:
            found.append(np.array(places_of)[values])
    control, treatment = traffic.control[first], traffic.treatment[first]
    for place in range(len(classes)):
        said = (control == place) | (treatment == place) | (treatment == NO_ANSWER)
        found.append(np.where(said, 1 + len(groups) + place, -1))
    return tuple(found)


def _parity(traffic: Traffic, first: Ints, groups: Sequence[GroupSpec], look: Ints, looks: int) -> Ints:
    """Rows of each group matched with rows of everybody else, as `monitoring.tally.count_answers` does.

    A match is always of neighbours, where the side changes; a row that was matched is not matched again.
    """
    if not groups or len(first) < 2:
        return np.zeros((looks, len(groups), 6), dtype=np.int64)
    control, treatment = traffic.control[first], traffic.treatment[first]
    s = (treatment == 1).astype(np.int64) - (control == 1)
    s[treatment == NO_ANSWER] = MISSING
    sides = np.zeros((len(groups), len(first)), dtype=np.bool_)
    for row, group in enumerate(groups):
        attribute, _, value = group.name.partition("=")
        sides[row] = traffic.members[first, traffic.attributes.index(attribute)] == int(value)
    group_of, before = np.nonzero(sides[:, 1:] != sides[:, :-1])
    place = np.arange(len(before))
    begins = np.r_[True, (np.diff(before) != 1) | (np.diff(group_of) != 0)][: len(before)]
    position = place - np.maximum.accumulate(np.where(begins, place, 0))
    matched = position % 2 == 0
    group_of, before = group_of[matched], before[matched]
    earlier, later = s[before], s[before + 1]
    z = np.where(sides[group_of, before + 1], later - earlier, earlier - later)
    column = np.where((earlier == MISSING) | (later == MISSING), 5, z + 2)
    return _table(look[before + 1], [group_of], column, (looks, len(groups), 6))


@dataclass(slots=True)
class _Served:
    """Counts of requests, which depend on the candidate's weight: kept up to one look, of one epoch.

    Attributes:
        treated: which requests the candidate answered.
        look: up to which they were counted.
        errors: requests without and with a failure.
        ratio: weight -> requests on control and on the candidate.
        blocks, control_blocks: as in the tallies of these names.
        through: the last latency block that was looked at.
    """

    traffic: Traffic
    counts: _Counts
    treated: Bools
    look: int = 0
    errors: tuple[int, int] = (0, 0)
    ratio: dict[int, tuple[int, int]] = field(default_factory=dict)
    blocks: dict[int, int] = field(default_factory=dict)
    control_blocks: dict[int, int] = field(default_factory=dict)
    through: int = int(START // BUCKET_SECONDS) - 1

    def go_on(self, weight: int, look: int, limits: Mapping[str, float], policy: Policy) -> int:
        """Count up to a look at this weight, or to an earlier one at which a guardrail on requests may act.

        Args:
            limits: natural logarithm of the e-value at which each of those that are on acts.

        Returns:
            That look.
        """
        traffic, rows = self.traffic, self.counts.rows
        start = int(rows[self.look])
        treated = traffic.ticket[start : int(rows[look])] < weight / 100
        self.treated[start : start + len(treated)] = treated
        ends = rows[self.look + 1 : look + 1] - start
        ours = _at(treated, ends)
        failed = _at(treated & traffic.failed[start : start + len(treated)], ends)
        errors = np.stack([self.errors[0] + ours - failed, self.errors[1] + failed], axis=1)
        before = self.ratio.get(weight, (0, 0))
        ratio = np.stack([before[0] + ends - ours, before[1] + ours], axis=1)
        acts = np.zeros(len(ends), dtype=np.bool_)
        if "treatment_errors" in limits and errors[-1, 1]:
            allowed = policy.guardrails.treatment_errors.ratio
            evidence = log_evidence(errors, (0.0, 1.0), allowed, 0.0, 1.0, above=True)
            acts |= evidence >= limits["treatment_errors"]
        if "sample_ratio" in limits:
            acts |= self._mismatch(weight, ratio) >= limits["sample_ratio"]
        place = int(acts.argmax()) if acts.any() else len(ends) - 1
        place = self._close(place, limits, policy)
        self.errors = int(errors[place, 0]), int(errors[place, 1])
        if 0 < weight < 100:
            self.ratio[weight] = int(ratio[place, 0]), int(ratio[place, 1])
        self.look += place + 1
        return self.look

    def _mismatch(self, weight: int, ratio: Ints) -> Floats:
        """Evidence of all splits together, by look; only the one of this weight moves."""
        others = sum(
            mismatch_evidence(seen[1], seen[0], each / 100)
            for each, seen in self.ratio.items()
            if each != weight
        )
        if not 0 < weight < 100:
            return np.full(len(ratio), others)
        share = weight / 100
        mine = [mismatch_evidence(treated, control, share) for control, treated in ratio.tolist()]
        return others + np.array(mine)

    def _close(self, place: int, limits: Mapping[str, float], policy: Policy) -> int:
        """Close the blocks that end by so many looks later, or by an earlier one at which they make a guardrail act.

        What a block held depends on the weights there were.
        """
        if not limits.keys() & {"latency_p95", "latency_vs_control"}:
            return place
        now = self.counts.now[self.look + 1 : self.look + 2 + place]
        ended = ((now - BLOCK_GRACE_S) // BUCKET_SECONDS).astype(np.int64)
        for bucket in range(self.through + 1, int(ended[-1])):
            at = int(np.searchsorted(ended, bucket, side="right"))
            if at > place:
                break
            self.through = bucket
            begin, end = np.searchsorted(
                self.traffic.created_at, [bucket * BUCKET_SECONDS, (bucket + 1) * BUCKET_SECONDS]
            )
            treated = self.treated[begin:end]
            treatment = _within(self.traffic.slow[begin:end][treated])
            control = _within(self.traffic.control_slow[begin:end][~treated])
            if sum(treatment.values()) < MIN_BLOCK_REQUESTS:
                continue
            share = count_block(treatment[0], treatment[1])
            self.blocks[share] = self.blocks.get(share, 0) + 1
            if sum(control.values()) >= MIN_BLOCK_REQUESTS:
                difference = compare_blocks(treatment, control)
                self.control_blocks[difference] = self.control_blocks.get(difference, 0) + 1
            if self._slow(limits, policy):
                place = at
        return place

    def _slow(self, limits: Mapping[str, float], policy: Policy) -> bool:
        """Whether a guardrail on latency crosses its limit."""
        if "latency_p95" in limits and self.blocks.keys() - {0}:
            shares = {share / 1000: times for share, times in self.blocks.items()}
            if excess_evidence(shares, LATENCY_SHARE) >= limits["latency_p95"]:
                return True
        if "latency_vs_control" in limits and max(self.control_blocks, default=0) > 0:
            values = sorted(self.control_blocks)
            times = [self.control_blocks[value] for value in values]
            outcomes = tuple(value / 1000 for value in values)
            margin = policy.guardrails.latency_vs_control.margin
            evidence = float(log_evidence(times, outcomes, margin, -1.0, 1.0, above=True))
            return evidence >= limits["latency_vs_control"]
        return False

    def start_afresh(self) -> None:
        """Begin an epoch."""
        self.errors, self.ratio, self.blocks, self.control_blocks = (0, 0), {}, {}, {}


def _at(hits: Bools, ends: Ints) -> Ints:
    """How many there were by each of these places."""
    return np.asarray(np.concatenate([[0], np.cumsum(hits)])[ends], dtype=np.int64)


def _within(slow: Bools) -> dict[int, int]:
    over = int(slow.sum())
    return {0: len(slow) - over, 1: over}


def _totals(
    counts: _Counts,
    served: _Served,
    look: int,
    base: int,
    groups: Sequence[GroupSpec],
    classes: Sequence[str],
) -> dict[tuple[str, str], Mapping[int, int]]:
    """The epoch's counts as the ledger adds them up."""
    found: dict[tuple[str, str], Mapping[int, int]] = {}
    names = [("accuracy_drop", "disagreement", EVERYBODY)]
    names += [("group_harm", "disagreement", group.name) for group in groups]
    names += [("class_harm", "", name) for name in classes]
    paired = (counts.paired[look] - counts.paired[base]).tolist()
    answers = (counts.answers[look] - counts.answers[base]).tolist()
    for (guardrail, disagreement, name), labelled, answered in zip(names, paired, answers, strict=True):
        found[guardrail, name] = dict(zip((1, -1, 0, MISSING), labelled, strict=True))
        if disagreement:
            found[disagreement, name] = dict(zip((1, 0, MISSING), answered, strict=True))
    parity = (counts.parity[look] - counts.parity[base]).tolist()
    for group, matches in zip(groups, parity, strict=True):
        found["demographic_parity", group.name] = dict(zip((-2, -1, 0, 1, 2, MISSING), matches, strict=True))
    found["treatment_errors", EVERYBODY] = dict(enumerate(served.errors))
    found[LATENCY_BLOCKS, EVERYBODY] = dict(served.blocks)
    found[CONTROL_BLOCKS, EVERYBODY] = dict(served.control_blocks)
    for weight, seen in served.ratio.items():
        found[SAMPLE_RATIO, str(weight)] = dict(enumerate(seen))
    return found


# -- late harm ------------------------------------------------------------------------------------------------

_OUTCOMES = (1, -1, 0, MISSING)

Detectors = Mapping[str, Mapping[str, Detector]]


class _Late:
    """Detectors of the pairs that were counted after one look.

    Attributes:
        places: (guardrail, group or class) -> its place among the subjects of the counts.
    """

    def __init__(
        self, counts: _Counts, base: int, groups: Sequence[GroupSpec], classes: Sequence[str]
    ) -> None:
        self._counts, self._base = counts, base
        names = [("accuracy_drop", EVERYBODY), *(("group_harm", group.name) for group in groups)]
        names += [("class_harm", name) for name in classes]
        self.places = {name: place for place, name in enumerate(names)}
        self._followed: dict[tuple[str, str], tuple[int, Detector]] = {}

    def evidence(self, name: tuple[str, str], margin: float) -> Floats:
        """Natural logarithm of a detector's evidence at each look from the first one on; all blocks at once."""
        outcomes = self._sequence(self.places[name])
        blocks = len(outcomes) // BLOCK_PAIRS
        of_block = np.arange(blocks * BLOCK_PAIRS) // BLOCK_PAIRS * 4 + outcomes[: blocks * BLOCK_PAIRS]
        table = np.bincount(of_block, minlength=blocks * 4).reshape(blocks, 4)
        paid = np.zeros((blocks + 1, len(log_factors(PAIRED, margin, -1.0, 1.0, True))))
        np.cumsum(table @ log_factors(PAIRED, margin, -1.0, 1.0, True).T, axis=0, out=paid[1:])
        logs = np.zeros(blocks + 1)
        if blocks:
            # The sum over the blocks at which an e-process began, of what all blocks since then have paid.
            summed = paid[1:] + np.logaddexp.accumulate(-paid, axis=0)[:-1]
            logs[1:] = np.logaddexp.reduce(summed + LOG_CAPITAL, axis=1)
        counts = (
            self._counts.paired[self._base :, self.places[name]]
            - self._counts.paired[self._base, self.places[name]]
        )
        return np.asarray(logs[counts.sum(axis=1) // BLOCK_PAIRS], dtype=np.float64)

    def at(self, look: int, names: Sequence[tuple[str, str]], policy: Policy) -> Detectors:
        """These detectors at a look, later than any before, each by the real `follow`."""
        found: dict[str, dict[str, Detector]] = {}
        for name in names:
            place, margin = self.places[name], policy.guardrails.margin(name[0])
            seen = self._counts.paired[look, place].sum() - self._counts.paired[self._base, place].sum()
            begin, detector = self._followed.get(name, (0, Detector()))
            outcomes = [_OUTCOMES[column] for column in self._sequence(place)[begin : int(seen)]]
            if outcomes:
                detector = follow(detector, outcomes, margin)
            self._followed[name] = int(seen), detector
            found.setdefault(name[0], {})[name[1]] = detector
        return found

    def _sequence(self, place: int) -> Ints:
        """Columns of a subject's outcomes in the order of its pairs."""
        counts = self._counts
        counted = (counts.turn > self._base) & (counts.turn < len(counts.now))
        for subject in counts.subjects:
            mine = subject == place
            if mine.any():
                return np.asarray(counts.outcome[mine & counted], dtype=np.int64)
        return np.zeros(0, dtype=np.int64)


# -- looks at which nothing can happen ------------------------------------------------------------------------

_SCREENED = {"accuracy_drop", "group_harm", "class_harm", "demographic_parity"}
_BY_REQUEST = {"latency_p95", "latency_vs_control", "treatment_errors", "sample_ratio"}
_UNFED = {"equalized_odds", "resource_use", "reward"}
"""Made-up traffic has nothing for these to judge."""


def _where_positive(
    counts: Ints, values: Sequence[float], margin: float, evidence: Callable[[Ints], Floats]
) -> Floats:
    """Evidence that a mean is above `margin` where it may be more than 0, and 0 elsewhere.

    What a bet has won is concave in its size, and 0 without a bet: where the mean so far is at most the margin, no bet
    has won anything.
    """
    found = np.zeros(counts.shape[:-1])
    place = np.nonzero(counts @ (np.array(values) - margin) > 0)
    found[place] = evidence(counts[place])
    return found


@lru_cache(maxsize=64)
def _unseen(
    policy: Policy, groups: tuple[GroupSpec, ...], classes: tuple[str, ...], promoted: bool
) -> Assessment:
    """What the guardrails say before anything was counted; it has their limits."""
    return evaluate(policy, Scope(groups, classes, detectors={} if promoted else None), {})


class _Epoch:
    """Says of all looks of an epoch at once where a guardrail may act, or the rollout climb.

    It may err on one side only: where it says no, `advance` would change nothing.
    """

    def __init__(self, rollout: Rollout, counts: _Counts, base: int) -> None:
        self.base = base
        self._policy, self._groups, self._counts = rollout.policy, rollout.groups, counts
        promoted = rollout.epoch > 0
        unseen = _unseen(rollout.policy, rollout.groups, rollout.classes, promoted)
        self._paired = counts.paired[base:] - counts.paired[base]
        self._certificates = unseen.certificates
        self.limits = {(v.guardrail, v.group): v.limit_log10 * LOG10 - _EPSILON for v in unseen.verdicts}
        self.by_request = {name: at for (name, _), at in self.limits.items() if name in _BY_REQUEST}
        self._may = np.zeros(len(self._paired), dtype=np.bool_)
        self._worst = np.full(len(self._paired), -np.inf)
        self._overall: Bools | None = None
        self._suspicious_from = np.inf
        """The smallest evidence at which the real thing was found to be suspicious."""
        self._late = _Late(counts, base, rollout.groups, rollout.classes) if promoted else None
        self._crossed: dict[tuple[str, str], Bools] = {}
        if self._late is None:
            self._drops(rollout.classes, self._paired, self.limits)
        else:
            before = _unseen(rollout.policy, rollout.groups, rollout.classes, False)
            limits = {(v.guardrail, v.group): v.limit_log10 * LOG10 - _EPSILON for v in before.verdicts}
            self._drops(rollout.classes, counts.paired[base:], limits)  # what there was before goes on
            self._harm(self._late)
        if rollout.groups and ("demographic_parity", rollout.groups[0].name) in self.limits:
            self._may |= self._moved(counts.parity[base:] - counts.parity[base])
        if not {v.guardrail for v in unseen.verdicts} <= _SCREENED | _BY_REQUEST | _UNFED:
            self._may[:] = True  # one that is not known here: nothing is passed over

    def _drops(self, classes: tuple[str, ...], paired: Ints, limits: Mapping[tuple[str, str], float]) -> None:
        parts, many = self._policy.guardrails, len(self._groups)
        for name, margin, place, names in (
            ("accuracy_drop", parts.accuracy_drop.margin, slice(0, 1), (EVERYBODY,)),
            ("group_harm", parts.group_harm.margin, slice(1, 1 + many), tuple(g.name for g in self._groups)),
            ("class_harm", parts.class_harm.margin, slice(1 + many, None), classes),
        ):
            if not names or (name, names[0]) not in limits:
                continue
            evidence = _where_positive(
                paired[:, place], PAIRED, margin, partial(drop_evidence, margin=margin)
            )
            self._may |= (evidence >= [limits[name, each] for each in names]).any(axis=1)
            if parts.section(name).action in ("rollback", "hold"):
                self._worst = np.maximum(self._worst, evidence.max(axis=1))

    def _harm(self, late: _Late) -> None:
        for name in late.places:
            if name in self.limits:
                evidence = late.evidence(name, self._policy.guardrails.margin(name[0]))
                self._crossed[name] = evidence >= self.limits[name]
                self._may |= self._crossed[name]

    def _moved(self, parity: Ints) -> Bools:
        """The larger of the bets on either direction, each at the smaller limit, is never less than their mean."""
        margin = self._policy.guardrails.demographic_parity.margin
        values = (-2.0, -1.0, 0.0, 1.0, 2.0, -2.0)

        def evidence(rows: Ints) -> Floats:
            return log_evidence(rows, values, margin, -2.0, 2.0, above=True)

        either = np.maximum(
            _where_positive(parity, values, margin, evidence),
            _where_positive(parity[..., [4, 3, 2, 1, 0, 5]], values, margin, evidence),
        )
        limits = [self.limits["demographic_parity", group.name] for group in self._groups]
        return np.asarray((either >= limits).any(axis=1), dtype=np.bool_)

    def _proven(self, place: int | slice, subjects: int | Sequence[int], margin: float) -> Bools:
        """Whether these subjects are proven to lose less than the margin, at these looks of the epoch."""
        limits = {c.guardrail: c.limit_log10 * LOG10 - _EPSILON for c in self._certificates}
        paired = self._paired[place, subjects]
        proven = np.zeros(paired.shape[:-1], dtype=np.bool_)
        if "accuracy_drop" in limits:
            proven |= no_drop_evidence(paired, margin) >= limits["accuracy_drop"]
        if "disagreement" in limits:
            answers = self._counts.answers[self.base :][place, subjects]
            answers = answers - self._counts.answers[self.base][subjects]
            proven |= agreement_evidence(answers, margin) >= limits["disagreement"]
        return proven

    def _ready(self, begin: int, climbs: Bools) -> Bools:
        """Of these looks the first at which everybody and all larger groups are proven."""
        parts, found = self._policy.guardrails, np.zeros_like(climbs)
        if self._overall is None:
            self._overall = self._proven(slice(None), 0, parts.accuracy_drop.margin)
        larger = [
            1 + place
            for place, group in enumerate(self._groups)
            if parts.group_harm.enabled and group.share >= self._policy.promotion_min_group_share
        ]
        for look in np.flatnonzero(climbs & self._overall[begin:]).tolist():
            if not larger or self._proven(begin + look, larger, parts.group_harm.margin).all():
                found[look] = True
                break
        return found

    def next_look(self, rollout: Rollout, look: int) -> int | None:
        """The first look from `look` on at which something about pairs may happen."""
        policy, counts, begin = rollout.policy, self._counts, look - self.base
        may = self._may[begin:].copy()
        if rollout.state in (PENDING, WARMUP, PROMOTING):
            may[:] = True
        if rollout.state in (SHADOWING, STEP):
            climbs = counts.compared[look:] - rollout.step_pairs >= policy.step_min_pairs
            climbs &= policy.step_min_seconds - (counts.now[look:] - rollout.step_at) <= 0
            climbs &= self._worst[begin:] < self._suspicious_from
            if rollout.step == len(policy.steps) - 1:
                climbs = self._ready(begin, climbs)
            may |= climbs
        return look + int(may.argmax()) if may.any() else None

    def detectors(self, look: int, *, everyone: bool) -> Detectors | None:
        """Those that act at a look, or all; None before promotion. The others would not change what is done."""
        if self._late is None:
            return None
        names = [name for name, crossed in self._crossed.items() if everyone or crossed[look - self.base]]
        return self._late.at(look, names, self._policy)

    def note(self, assessment: Assessment) -> None:
        """Learn from what the guardrails really say which evidence is enough for suspicion."""
        if assessment.suspicion is not None:
            found = assessment.suspicion.evidence_log10 * LOG10 + _EPSILON
            self._suspicious_from = min(self._suspicious_from, found)


# -- the rollout ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Made:
    """A decision, and how many requests had been made by then."""

    decision: Decision
    requests: int


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What became of a rollout.

    Attributes:
        rollout: as it was in the end.
        made: the decisions from its first step on.
        requests: how many were made until it was over.
        treated: which of them the candidate answered.
    """

    rollout: Rollout
    made: tuple[Made, ...]
    requests: int
    treated: Bools

    def entered(self, *states: str) -> Made | None:
        """The decision by which it first came into one of these states."""
        return next((made for made in self.made if made.decision.to_state in states), None)

    def exposed(self, since: int = 0) -> int:
        """How many requests the candidate answered, from the one with this number on."""
        return int(self.treated[since : self.requests].sum())


def begin(policy: Policy, groups: tuple[GroupSpec, ...] = (), classes: tuple[str, ...] = CLASSES) -> Rollout:
    """A rollout that all workers have just loaded."""
    rollout = Rollout(
        "simulated-1",
        "simulated",
        "full",
        "candidate",
        policy,
        groups,
        classes=classes,
        created_at=START,
        entered_at=START,
        step_at=START,
        mirror_rate=policy.mirror_rate,
    )
    inputs = Inputs(now=START, assessment=_unseen(policy, groups, classes, False), fleet=Fleet(1, True, True))
    while rollout.state in (PENDING, WARMUP):
        rollout, _ = advance(rollout, inputs)
    return rollout


def simulate(
    policy: Policy,
    groups: tuple[GroupSpec, ...],
    traffic: Traffic,
    *,
    classes: tuple[str, ...] = CLASSES,
    look_every: int = 20,
    until: Sequence[str] = (ROLLED_BACK,),
    watch: Callable[[int, Assessment], None] | None = None,
) -> Run:
    """Have a rollout judged by such traffic, looked at after every so many requests.

    Args:
        until: states in which to stop.
        watch: called at every look with the requests so far and what the guardrails say; no look is passed over then.
    """
    counts = _count(policy, groups, classes, traffic, look_every)
    served = _Served(traffic, counts, np.zeros(len(traffic.request), dtype=np.bool_))
    rollout, look = begin(policy, groups, classes), 0
    epoch, made = _Epoch(rollout, counts, look), list[Made]()
    last = len(counts.now) - 1
    totals: Totals = {}
    earlier: Totals | None = None
    while look < last and rollout.state not in until:
        found = look + 1 if watch is not None else epoch.next_look(rollout, look + 1)
        look = served.go_on(rollout.weight, last if found is None else found, epoch.by_request, policy)
        applied, assessment = True, None
        for _ in range(RETRIES):
            if assessment is None:  # nothing has changed since it was made
                totals = _totals(counts, served, look, epoch.base, groups, classes)
                detectors = epoch.detectors(look, everyone=watch is not None)
                assessment = evaluate(policy, scope_of(rollout, detectors), totals, earlier)
                epoch.note(assessment)
            inputs = Inputs(
                now=float(counts.now[look]),
                assessment=assessment,
                resolved=int(counts.resolved[look]),
                compared=int(counts.compared[look]),
                labels=int(counts.labels[look]),
                # The workers see a new split only after this step.
                fleet=Fleet(1, applied, applied),
            )
            if watch is not None and applied:
                watch(int(counts.rows[look]), assessment)
            moved, decision = advance(rollout, inputs)
            if moved is rollout:
                break
            if decision is not None:
                made.append(Made(decision, int(counts.rows[look])))
            applied &= (moved.state, moved.weight) == (rollout.state, rollout.weight)
            afresh, rollout = moved.epoch != rollout.epoch, moved
            if afresh:
                served.start_afresh()
                earlier = totals
                epoch, assessment = _Epoch(rollout, counts, look), None
    return Run(rollout, tuple(made), int(counts.rows[look]), served.treated)
