"""Tallies: mergeable integer counts of outcomes, and how pairs become such counts.

Everything here is pure: pairs and clock readings in, integers out. Counts are added, so tallies of several
workers, batches and restarts merge in any order to the same result.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from monitoring.baseline import Baseline
from monitoring.label_queue import in_sample
from monitoring.quality import Quality, fraction

MISSING = 9
"""The outcome "never known": no label by the deadline, or an arm that could not answer."""

NO_CLASS = -1
"""The outcome of `prediction_drift` where control gave no answer."""

EVERYBODY = ""
"""The group of a count that is not split by group."""

BUCKET_SECONDS = 10
"""Width of a time bucket; latency is judged on blocks of this length."""

LATENCY_BLOCKS = "latency_blocks"
"""The tally of closed latency blocks: thousandths of their requests over the limit -> blocks."""

CONTROL_BLOCKS = "control_blocks"
"""The tally of the same blocks compared with control's: the difference of both shares, in thousandths -> blocks."""

SAMPLE_RATIO = "sample_ratio"
"""The tally of requests that were assigned by themselves: group is the percent meant for the candidate, outcome 1 is
for those that went there."""

MODEL_TIME = "model_time"
"""The tally of what the arms' models did. Group is the arm; outcome 0: microseconds in the model, 1: records."""

RESOURCE_BLOCKS = "resource_blocks"
"""The tally of blocks in which the candidate's model took too long for a record (1), or did not (0)."""

ODDS = ("true_positive_rate", "false_positive_rate")
"""The tallies of equalized odds: matched rows of the favourable class, and of the others."""

REWARD = "reward"
"""The tally of matched rows of the arms: how much higher control's reward was, in hundredths -> matches."""

MIRROR = "mirror"
"""The tally of the shadow's work. Group "samples": how many it answered; group "microseconds": for how long that
occupied it."""

TALLIED = (
    *("accuracy_drop", "group_harm", "class_harm", "disagreement", "demographic_parity", *ODDS),
    *("estimated_drop", "prediction_drift", "input_drift", MODEL_TIME, RESOURCE_BLOCKS),
    *("latency_p95", LATENCY_BLOCKS, CONTROL_BLOCKS, "treatment_errors", SAMPLE_RATIO, "requests", MIRROR),
    REWARD,
)
"""Everything that is tallied."""

Counts = Mapping[int, int]
"""Outcome -> how often it was seen."""


def bucket_of(at: float) -> int:
    """The time bucket of `at`, seconds since the epoch."""
    return int(at // BUCKET_SECONDS)


def group_name(attribute: str, value: str) -> str:
    """The name of a group, such as ``DIS=1``."""
    return f"{attribute}={value}"


def merge(a: Counts, b: Counts) -> dict[int, int]:
    """Add two tallies. Commutative and associative; the empty mapping is neutral."""
    total = dict(a)
    for outcome, n in b.items():
        total[outcome] = total.get(outcome, 0) + n
    return total


@dataclass(frozen=True, slots=True)
class TallyKey:
    """What a tally counts: a guardrail's outcomes, for one group, in one time bucket."""

    guardrail: str
    group: str
    bucket: int


Tallies = dict[TallyKey, dict[int, int]]


@dataclass(frozen=True, slots=True)
class Pair:
    """Both arms' answers to one input, with its label once that has come.

    Attributes:
        seq: arrival number in the ledger; rises, with gaps.
        request_id, index: the pair's key; `index` is the record's place in its request.
        control, treatment: class index each arm gave; None when that arm could not answer.
        groups: attribute -> value, one entry per sensitive attribute.
        created_at: when the request was made, seconds since the epoch.
        label, labelled_at: true class index and when it arrived; None while unknown.
        control_confidence: how sure control was, 0 to 1; None where nobody knows.
    """

    seq: int
    request_id: str
    index: int
    control: int | None
    treatment: int | None
    groups: Mapping[str, str]
    created_at: float
    label: int | None = None
    labelled_at: float | None = None
    control_confidence: float | None = None


def answer_outcome(pair: Pair) -> int:
    """0 when the arms agree, 1 when they do not, MISSING when one of them could not answer."""
    if pair.control is None or pair.treatment is None:
        return MISSING
    return int(pair.control != pair.treatment)


def label_outcome(pair: Pair, now: float, deadline_s: float) -> int | None:
    """The pair's outcome for accuracy, d = 1[control right] - 1[treatment right], or None while it is open.

    Where both arms give the same answer d is 0 whatever the label is, so such a pair never waits.
    """
    answers = answer_outcome(pair)
    if answers == MISSING:
        return MISSING
    if answers == 0:
        return 0
    if pair.label is not None:
        return int(pair.control == pair.label) - int(pair.treatment == pair.label)
    return MISSING if now >= pair.created_at + deadline_s else None


@dataclass(slots=True)
class LabelCount:
    """What a run over pairs in arrival order counted, and where it had to stop.

    Attributes:
        tallies: counts to add.
        last_seq: seq of the last counted pair (the cursor's new place); None when nothing was counted.
        pairs: how many pairs were counted.
        compared: how many of them both arms answered.
        labels: how many of them needed a label and had it.
        newest_at: arrival time of the newest input among them; 0 when nothing was counted.
        ordered: (guardrail, group) -> the outcomes in the order of their pairs.
        unmatched: rows that wait for a partner, for equalized odds.
    """

    tallies: Tallies = field(default_factory=dict)
    last_seq: int | None = None
    pairs: int = 0
    compared: int = 0
    labels: int = 0
    newest_at: float = 0.0
    ordered: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    unmatched: dict[str, tuple[int, int]] = field(default_factory=dict)


Unmatched = Mapping[str, tuple[int, int]]
"""Group -> (side, s) of the row that waits for a partner; side 1 is the group, 0 everybody else. s may be MISSING."""


@dataclass(frozen=True, slots=True)
class Odds:
    """What counting for equalized odds needs.

    Attributes:
        guarded: names of the guarded groups.
        favourable: class index that is the favourable decision.
        share: of all pairs those that are judged, drawn as the label queue draws them: they have to be labelled whether
            the arms agree or not.
        unmatched: what the previous run left waiting; keys are a tally and a group.
    """

    guarded: Sequence[str]
    favourable: int
    share: float
    unmatched: Unmatched


def count_labels(
    pairs: Iterable[Pair],
    guarded: frozenset[str],
    now: float,
    deadline_s: float,
    classes: Sequence[str] = (),
    quality: Quality = Quality(),
    odds: Odds | None = None,
) -> LabelCount:
    """Count what needs labels strictly first-in-first-out, up to the first open pair.

    That is `accuracy_drop`, `group_harm`, `class_harm`, and where `odds` are given the two tallies of equalized odds.

    Counting labels as they arrive would be invalid: where wrong answers are labelled sooner than right ones,
    the first labels make an equal candidate look worse. Here a pair's turn depends on its arrival alone.
    """
    result = LabelCount(unmatched=dict(odds.unmatched) if odds is not None else {})
    seen: _Seen = defaultdict(int)
    for pair in pairs:
        outcome = label_outcome(pair, now, deadline_s)
        if outcome is None:
            break
        bucket = bucket_of(pair.created_at)
        if odds is not None and in_sample(pair.request_id, pair.index, odds.share):
            if pair.label is None and now < pair.created_at + deadline_s:
                break
            _count_odds(pair, odds, bucket, seen, result.unmatched)
        weighed = outcome
        if outcome != MISSING:
            weighed = quality.outcome(outcome, pair.label, pair.request_id, pair.index)
        places = [("accuracy_drop", EVERYBODY, weighed)]
        places += [("group_harm", name, outcome) for name in _names(pair.groups) if name in guarded]
        places += [("class_harm", name, outcome) for name in _said(pair, classes)]
        for guardrail, name, counted in places:
            seen[guardrail, name, bucket, counted] += 1
            result.ordered.setdefault((guardrail, name), []).append(counted)
        result.last_seq = pair.seq
        result.pairs += 1
        answers = answer_outcome(pair)
        result.compared += answers != MISSING
        needed_label = pair.label is not None and answers == 1
        result.labels += needed_label
        arrival = pair.created_at
        if needed_label and pair.labelled_at is not None:
            arrival = pair.labelled_at
        elif answers == 1:
            arrival = pair.created_at + deadline_s
        result.newest_at = max(result.newest_at, arrival)
    result.tallies = _tallies(seen)
    return result


def _count_odds(
    pair: Pair, odds: Odds, bucket: int, seen: _Seen, waiting: dict[str, tuple[int, int]]
) -> None:
    """Match the row with one of the other side, among those of the same kind of label.

    A row whose label never came may be of either kind, and takes part in both as one of which nothing is known: of two
    matched rows a missing one makes the outcome missing, which never speaks against the candidate.
    """
    unknown = pair.label is None
    s = MISSING
    if not unknown and answer_outcome(pair) != MISSING:
        s = int(pair.treatment == odds.favourable) - int(pair.control == odds.favourable)
    mine = frozenset(_names(pair.groups))
    for tally, favourable in zip(ODDS, (True, False), strict=True):
        if unknown or (pair.label == odds.favourable) == favourable:
            for name in odds.guarded:
                z = _match(waiting, f"{tally}/{name}", int(name in mine), s)
                if z is not None:
                    seen[tally, name, bucket, z] += 1


def _match(waiting: dict[str, tuple[int, int]], place: str, side: int, s: int) -> int | None:
    """z = s of the group's row minus that of the other side's, where one of the other side waits; else wait."""
    other = waiting.get(place)
    if other is None or other[0] == side:
        waiting[place] = (side, s)
        return None
    del waiting[place]
    if MISSING in (s, other[1]):
        return MISSING
    return s - other[1] if side else other[1] - s


@dataclass(slots=True)
class AnswerCount:
    """What a run over pairs counted that needs no labels; fields as in `LabelCount`."""

    tallies: Tallies = field(default_factory=dict)
    unmatched: dict[str, tuple[int, int]] = field(default_factory=dict)
    last_seq: int | None = None
    pairs: int = 0
    newest_at: float = 0.0


def count_answers(
    pairs: Iterable[Pair],
    guarded: Sequence[str],
    favourable: int,
    unmatched: Unmatched,
    baseline: Baseline = Baseline(),
) -> AnswerCount:
    """Count `disagreement` (everybody and each guarded group), `demographic_parity`, `estimated_drop` and
    `prediction_drift` (control's answers by class; the outcome is the class, or -1 where there is none).

    Demographic parity compares s = 1[treatment favourable] - 1[control favourable] of a row of the group with
    that of a row of everybody else: z = s_group - s_rest, in -2..2 (one row of each side, as in Chugg et al.,
    "Auditing Fairness by Betting", NeurIPS 2023). Rows are matched in arrival order; a newcomer on the side
    that waits takes the place of the one before. Which rows are matched depends on group membership only and
    never on an answer, nor on whether there is one, so the matching cannot favour either outcome. z is MISSING
    where an arm could not answer one of its two rows.

    Args:
        pairs: in arrival order.
        guarded: names of the guarded groups.
        favourable: class index that is the favourable decision.
        unmatched: what the previous run left waiting.
        baseline: of full precision; with a calibration, drops are estimated without labels.
    """
    result = AnswerCount(unmatched=dict(unmatched))
    seen: _Seen = defaultdict(int)
    waiting = result.unmatched
    guarded_set = frozenset(guarded)
    for pair in pairs:
        outcome = answer_outcome(pair)
        bucket = bucket_of(pair.created_at)
        mine = [name for name in _names(pair.groups) if name in guarded_set]
        seen["disagreement", EVERYBODY, bucket, outcome] += 1
        for name in mine:
            seen["disagreement", name, bucket, outcome] += 1
        s = int(pair.treatment == favourable) - int(pair.control == favourable)
        if outcome == MISSING:
            s = MISSING
        for name in guarded:
            z = _match(waiting, name, int(name in mine), s)
            if z is not None:
                seen["demographic_parity", name, bucket, z] += 1
        if baseline.answers:
            answer = pair.control if pair.control is not None else NO_CLASS
            seen["prediction_drift", EVERYBODY, bucket, answer] += 1
        if baseline.calibration:
            seen["estimated_drop", EVERYBODY, bucket, _estimated(pair, outcome, baseline)] += 1
        result.last_seq = pair.seq
        result.pairs += 1
        result.newest_at = max(result.newest_at, pair.created_at)
    result.tallies = _tallies(seen)
    return result


def _estimated(pair: Pair, answers: int, baseline: Baseline) -> int:
    """The drop that full precision's own confidence lets expect of a pair, rounded at random to -1, 0 or 1.

    Where the arms disagree it is p - (1 - p) r: full precision is right with probability p, by its calibrated
    confidence, and where it is wrong the other answer is right as often as its own second choice. (For two classes r is
    1. In the spirit of confidence-based performance estimation: Kivimaki et al., "Confidence-based estimators for
    predictive performance in model monitoring", JAIR 2025, arXiv:2407.08649.)
    """
    if answers != 1:
        return answers
    if pair.control_confidence is None:
        return MISSING
    p = baseline.p_right(pair.control_confidence)
    expected = p - (1 - p) * baseline.runner_up
    chosen = fraction("estimate", pair.request_id, pair.index) < abs(expected)
    return int(math.copysign(chosen, expected))


def compare_cost(treatment: Counts, control: Counts, ratio: float) -> int:
    """1 where a record took the candidate's model more than `ratio` times as long as control's, else 0.

    Counts are microseconds (0) and records (1), of each at least one record.
    """
    return int(treatment.get(0, 0) * control[1] > ratio * control.get(0, 0) * treatment[1])


def _said(pair: Pair, classes: Sequence[str]) -> Sequence[str]:
    """The classes that the arms gave, whichever of them.

    By one arm's answer alone the pairs would be chosen in that arm's favour or against it: among those that full
    precision puts into a rare class are the ones that it alone took for it. Where an arm gave none the pair is a
    missing one of every class: it may have been any, and a missing outcome never speaks against the candidate.
    """
    control, treatment = pair.control, pair.treatment
    if control is None or treatment is None:
        return classes
    said = classes[control : control + 1]
    return said if control == treatment else (*said, *classes[treatment : treatment + 1])


def count_block(within: int, over: int) -> int:
    """The outcome of one latency block: the share of its requests over the limit, in whole thousandths.

    Rounded down, so that the evidence made of it is never too large; as an integer it merges like the rest.
    """
    return 1000 * over // (within + over)


def compare_blocks(treatment: Counts, control: Counts) -> int:
    """The outcome of a block of both arms: how much larger the treatment's share over the limit is, in thousandths.

    Rounded down, for the same reason. Counts are of requests within (0) and over (1) the limit.
    """
    ours, theirs = treatment[0] + treatment[1], control[0] + control[1]
    return 1000 * treatment[1] // ours - -(-1000 * control[1] // theirs)


_Seen = defaultdict[tuple[str, str, int, int], int]
"""(guardrail, group, bucket, outcome) -> how often: what the loops over pairs add to."""


def _tallies(seen: _Seen) -> Tallies:
    tallies: Tallies = {}
    for (guardrail, group, bucket, outcome), n in seen.items():
        tallies.setdefault(TallyKey(guardrail, group, bucket), {})[outcome] = n
    return tallies


def _names(groups: Mapping[str, str]) -> tuple[str, ...]:
    return _joined(tuple(groups.items()))


@lru_cache(maxsize=4096)
def _joined(items: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    return tuple(group_name(attribute, value) for attribute, value in items)
