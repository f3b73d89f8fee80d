"""The self-test before traffic: whether this judge, by this rollout's policy, sees what is there and nothing else.

The controller judges two made-up candidates, each on a ledger of its own, a temporary file, by a made-up clock. The
first answers as control does, but for a few pairs in which it is right as often as it is wrong: nobody may object. The
second is wrong clearly more often than is tolerated, and must be caught.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from monitoring.controller import Controller
from monitoring.errors import LedgerUnavailable
from monitoring.guardrails.rules import LATE
from monitoring.ledger import Ledger
from monitoring.policy import Policy
from monitoring.records import SHADOWING, Decision, Rollout, SelfTest
from monitoring.rows import Cursor, LabelRow, PairRow, WorkerBeat
from monitoring.tally import group_name

__all__ = ["MIN_ROWS", "SelfTestError", "SelfTestRow", "self_test"]

MIN_ROWS = 50
"""Of fewer reference rows no use is made."""
MADE_UP_ROWS = 1000
MADE_UP_ACCURACY = 0.9
SEED = 20_261_122
EVEN_PAIRS = 1300
SILENT_PAIRS = 200
"""Pairs to which the candidate has no answer: that speaks against nobody."""
PLANTED = 0.2
"""So much more than is tolerated does the planted candidate lose: 70% in all with the largest margin there is."""
LOOKS = 15
"""How often the controller looks at either candidate."""
AGREEING = 4
"""So many pairs on which both agree come before each one on which they do not: one pair in ten is unequal."""
RUN = 10
"""Rows of the same groups and label that come in a row before a planted candidate."""

_ACTIONS = ("rollback", "hold", "alert", "dry-run")
"""The strongest first."""
_START, _TICK = 1_700_000_000.0, 0.05
_UNREACHED = 10_000_000
_OWN = frozenset(
    {
        *("id", "state", "step", "weight", "epoch", "version", "revision", "active"),
        *("created_at", "entered_at", "step_at", "step_pairs", "mirror_raised_at", "held_from", "blind_from"),
        *("reason", "waived", "alerted", "override_reason", "policy", "baseline"),
    }
)
"""Fields that a rollout under test has of its own; all others, those to come included, are the rollout's. (Without the
baseline nobody judges by the records and confidences, which there are none of.)"""


class SelfTestError(RuntimeError):
    """A self-test could not be made."""


@dataclass(frozen=True, slots=True)
class SelfTestRow:
    """A row that a self-test replays.

    Attributes:
        control: class index of full precision's answer; label: of the truth.
        groups: attribute -> value.
    """

    control: int
    label: int
    groups: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Answers:
    """A row with what each arm answers."""

    row: SelfTestRow
    control: int
    treatment: int | None


@dataclass(frozen=True, slots=True)
class _Trap:
    """The guardrail that is to catch the planted candidate.

    Attributes:
        name, action: of it; there are none stronger.
        drop: how much less accurate the planted candidate is.
        pairs: in so many it must be caught.
        losses: not before so many wrong answers can evidence be enough, whatever the bets.
    """

    name: str
    action: str
    drop: float
    pairs: int
    losses: int


def self_test(rollout: Rollout, rows: Sequence[SelfTestRow] | None) -> SelfTest:
    """Have the controller judge a harmless and a planted candidate by a rollout's policy.

    Args:
        rollout: as it is before its candidate is loaded.
        rows: reference rows; where they are None or fewer than `MIN_ROWS`, rows are made up.

    Raises:
        LedgerUnavailable: there is no room for the temporary ledger.
        SelfTestError: the controller does not start the copy of the rollout.
    """
    rng = np.random.default_rng(SEED)
    # Labels whose losses are counted only by chance, as some metrics want it, would make the outcome one of chance.
    given = [row for row in rows or () if _counts_fully(row.label, rollout)]
    known = len(rows or ()) >= MIN_ROWS and bool(given)
    used = given if known else _made_up(rollout, rng)
    wrong = _wrong(rollout, used)
    pairs = EVEN_PAIRS + SILENT_PAIRS
    what = f"{pairs:,} pairs of {'reference' if known else 'made-up'} rows"
    trap = _trap(rollout)
    with tempfile.TemporaryDirectory(prefix="trimtab-self-test-") as folder:
        even = list(islice(_even(used, wrong, rng), EVEN_PAIRS))
        # Last, as what is missing is taken in the candidate's favour and would make up for much before it.
        even += [replace(one, treatment=None) for one in even[:SILENT_PAIRS]]
        alarm, cursor = _judge(rollout, even, Path(folder) / "even.db", _objects)
        if alarm is not None:
            name = _name(alarm)
            return SelfTest(
                False, f"an A/A replay of {what} did not hold: {alarm.verb} by {name}: {alarm.reason}"
            )
        unequal = sum(one.treatment not in (one.control, None) for one in even)
        if (cursor.answered, cursor.resolved, cursor.labels) != (pairs, pairs, unequal):
            counted = f"{cursor.resolved:,} of them and {cursor.labels:,} of {unequal:,} labels were counted"
            return SelfTest(False, f"an A/A replay of {what}: {counted}")
        held = f"self-test: A/A replay of {what} held"
        if trap is None:
            return SelfTest(
                True, f"{held}; no guardrail of accuracy is on, so nothing would catch a planted drop"
            )
        drop = f"a planted drop of {100 * trap.drop:.0f} pt"
        planted = list(islice(_planted(_victims(rollout, used, trap), wrong, trap.drop, rng), trap.pairs))
        caught, _ = _judge(rollout, planted, Path(folder) / "planted.db", lambda d: _catches(d, trap))
    if caught is None:
        return SelfTest(False, f"{drop} was not caught within {trap.pairs:,} pairs")
    losses = sum(one.treatment != one.control for one in planted[: caught.pairs])
    if losses < trap.losses:
        return SelfTest(
            False,
            f"{drop} was caught after {losses} losses by {_name(caught)}, where evidence takes {trap.losses} or more",
        )
    how = "" if trap.action == "rollback" else f" ({trap.action})"
    return SelfTest(True, f"{held}; {drop} was caught after {caught.pairs:,} pairs by {_name(caught)}{how}")


def _objects(decision: Decision) -> bool:
    return decision.verb != "advance"


def _catches(decision: Decision, trap: _Trap) -> bool:
    return decision.verb == trap.action and decision.guardrail in LATE


def _name(decision: Decision) -> str:
    name = decision.guardrail or decision.actor
    return f"{name}/{decision.group}" if decision.group else name


# Judging ---------------------------------------------------------------------------------------------------


def _judge(
    rollout: Rollout, answers: Sequence[_Answers], path: Path, stop: Callable[[Decision], bool]
) -> tuple[Decision | None, Cursor]:
    """The first decision to stop at, if one is made on these pairs, and how far they were counted."""
    now = _START
    ledger = Ledger(path)
    try:
        controller = Controller(ledger, clock=lambda: now, holder="self-test")
        rollout_id = _copied(ledger, rollout)

        def step() -> Decision | None:
            nonlocal now
            now += _TICK
            loaded = (rollout.control, rollout.treatment)
            ledger.heartbeat(WorkerBeat("g", "Gateway", 0, ledger.revision(), now, loaded, None, now))
            result = controller.step()
            if result.error is not None:
                raise LedgerUnavailable(result.error)
            return next((decision for decision in result.decisions if stop(decision)), None)

        found = step() or step()  # loaded, and shadowed
        if found is None and (state := ledger.rollout(rollout_id).state) != SHADOWING:
            raise SelfTestError(f"the copy of the rollout is {state} and not {SHADOWING}")
        unlabelled: list[tuple[str, _Answers]] = []
        # Labels come one look after their pairs: an open pair has to be waited for.
        for part in (*_parts(answers, math.ceil(len(answers) / LOOKS)), []):
            if found is not None:
                break
            ledger.record_pairs([_pair(rollout_id, request, one, now) for request, one in part])
            ledger.record_labels([LabelRow(request, 0, one.row.label, now) for request, one in unlabelled])
            unlabelled = part
            found = step()
        return found, ledger.cursor(rollout_id)
    finally:
        ledger.close()


def _copied(ledger: Ledger, rollout: Rollout) -> str:
    """Start the same rollout on another ledger; returns its id."""
    made = ledger.create_rollout(
        workload="self-test",
        control=rollout.control,
        treatment=rollout.treatment,
        policy=_patient(rollout.policy),
        actor="self-test",
        now=_START,
    )
    own = {field.name: getattr(made, field.name) for field in fields(made) if field.name in _OWN}
    ledger.apply(made, replace(rollout, **own), None)
    return made.id


def _patient(policy: Policy) -> Policy:
    """The policy with what does not judge changed: it never climbs, waits for labels, and draws all pairs for equalized
    odds."""
    guards = policy.guardrails
    drawn = guards.equalized_odds.model_copy(update={"label_share": 1.0})
    return policy.model_copy(
        update={
            "step_min_pairs": _UNREACHED,
            "label_deadline_s": 86_400.0,
            "guardrails": guards.model_copy(update={"equalized_odds": drawn}),
        }
    )


def _parts(answers: Sequence[_Answers], size: int) -> Iterator[list[tuple[str, _Answers]]]:
    named = [(f"q{number}", one) for number, one in enumerate(answers)]
    return (named[start : start + size] for start in range(0, len(named), size))


def _pair(rollout_id: str, request: str, one: _Answers, now: float) -> PairRow:
    return PairRow(
        rollout_id, request, 0, "control", one.control, one.treatment, None, None, one.row.groups, {}, now
    )


# The candidates --------------------------------------------------------------------------------------------


def _even(
    rows: Sequence[SelfTestRow], wrong: Callable[[int], int], rng: np.random.Generator
) -> Iterator[_Answers]:
    """Answers of a candidate that is as good as control.

    Not by chance but exactly, so that a judge that works objects with probability 0, whatever the policy is. Each pair
    in which the arms differ comes twice, with the answers exchanged: first the candidate is right, and then control is.
    No count of drops, in any group or class, is ever against the candidate. Where rows of a group are matched with
    others (see `monitoring.tally`), each of the two is matched with a like row of a like run: the sum of the outcomes
    is then never further than 1 from 0. One such outcome makes evidence of less than 1.5, and no limit is under 2.
    """
    alike = _Alike(rows)
    for row in _shuffled(rows, rng):
        other = alike.same_label(row, rng)
        answer = row.control if row.control != row.label else wrong(row.label)
        for control, treatment in ((answer, row.label), (row.label, answer)):
            yield from (_agreed(alike.next(row)) for _ in range(AGREEING))
            yield _Answers(row, control, treatment)
            yield from (_agreed(alike.next(other)) for _ in range(AGREEING + 1))


def _planted(
    rows: Sequence[SelfTestRow], wrong: Callable[[int], int], drop: float, rng: np.random.Generator
) -> Iterator[_Answers]:
    """Answers of a candidate that is wrong on the share `drop`, at most 0.8, of rows on which control is right.

    Where rows of a group are matched with others it is the ends of a run that are, and there the arms agree: it must be
    the drop that is seen, and not the side on which it is.
    """
    alike = _Alike(rows)
    seen = lost = 0
    for row in _shuffled(rows, rng):
        for place in range(RUN):
            one = alike.next(row)
            seen += 1
            lose = 0 < place < RUN - 1 and lost < drop * seen
            lost += lose
            yield _Answers(one, one.label, wrong(one.label) if lose else one.label)


def _agreed(row: SelfTestRow) -> _Answers:
    return _Answers(row, row.control, row.control)


class _Alike:
    """Rows by their groups and label, each of them in its turn, round and round."""

    def __init__(self, rows: Sequence[SelfTestRow]) -> None:
        found: dict[tuple[object, ...], list[SelfTestRow]] = {}
        self._labels: dict[int, list[SelfTestRow]] = {}
        for row in rows:
            found.setdefault(self._key(row), []).append(row)
            self._labels.setdefault(row.label, []).append(row)
        self._turns = {key: cycle(alike) for key, alike in found.items()}

    def next(self, row: SelfTestRow) -> SelfTestRow:
        """The next row with the groups and the label of this one."""
        return next(self._turns[self._key(row)])

    def same_label(self, row: SelfTestRow, rng: np.random.Generator) -> SelfTestRow:
        """Any row with the label of this one."""
        found = self._labels[row.label]
        return found[int(rng.integers(len(found)))]

    @staticmethod
    def _key(row: SelfTestRow) -> tuple[object, ...]:
        return (row.label, *sorted(row.groups.items()))


def _shuffled(rows: Sequence[SelfTestRow], rng: np.random.Generator) -> Iterator[SelfTestRow]:
    while True:
        for place in rng.permutation(len(rows)):
            yield rows[place]


def _wrong(rollout: Rollout, rows: Sequence[SelfTestRow]) -> Callable[[int], int]:
    """What to say instead of a class. For all but one it is that one, so that a single class has to do with every wrong
    answer and shows the harm soon, however many classes there are."""
    common = Counter(row.label for row in rows).most_common(1)[0][0]
    classes = max(2, len(rollout.classes), common + 1)
    return lambda label: common if label != common else (common + 1) % classes


def _victims(rollout: Rollout, rows: Sequence[SelfTestRow], trap: _Trap) -> Sequence[SelfTestRow]:
    """The rows that a planted candidate is shown: those of one group where groups are all that is guarded."""
    if trap.name == "group_harm":
        sizes = {group.name: sum(group.name in _member_of(row) for row in rows) for group in rollout.groups}
        largest = max(rollout.groups, key=lambda group: (sizes[group.name], group.share)).name
        attribute, _, value = largest.partition("=")
        members = [row for row in rows if largest in _member_of(row)]
        rows = members or [replace(row, groups={attribute: value}) for row in rows]
    right = [row for row in rows if row.control == row.label]
    return right or [replace(row, control=row.label) for row in rows]


def _member_of(row: SelfTestRow) -> set[str]:
    return {group_name(attribute, value) for attribute, value in row.groups.items()}


def _trap(rollout: Rollout) -> _Trap | None:
    """The guardrail of accuracy that acts soonest among those with the strongest action; None where there is none."""
    sections = rollout.policy.guardrails.sections
    subjects = {"accuracy_drop": 1, "group_harm": len(rollout.groups), "class_harm": len(rollout.classes)}
    on = [name for name in subjects if sections[name].enabled and subjects[name]]
    if not on:
        return None
    strongest = min((sections[name].action for name in on), key=_ACTIONS.index)
    chosen = [name for name in on if sections[name].action == strongest]
    rate = rollout.policy.false_rollback_rate
    total = math.fsum(section.weight for section in sections.values() if section.enabled)
    # Whichever of them catches it, none has more than the whole rate, or a smaller margin than the smallest.
    losses = _losses_needed(min(rollout.policy.guardrails.margin(name) for name in chosen), rate)
    traps = []
    for name in chosen:
        margin = rollout.policy.guardrails.margin(name)
        pairs = _pairs_needed(margin + PLANTED, margin, rate * sections[name].weight / total / subjects[name])
        traps.append(_Trap(name, strongest, margin + PLANTED, pairs, losses))
    return min(traps, key=lambda trap: trap.pairs)


def _losses_needed(margin: float, alpha: float) -> int:
    """So many losses at least make evidence of 1 / alpha: each pays 1 + (1 - margin) / (1 + margin) at most."""
    return math.ceil(math.log(1 / alpha) / math.log(1 + (1 - margin) / (1 + margin)))


def _pairs_needed(drop: float, margin: float, alpha: float) -> int:
    """In so many pairs a loss on the share `drop` of them is found, with half as many to spare.

    By arithmetic of its own, so that a judge that is wrong does not say how long to wait for it. The best of some bets
    (see `monitoring.evidence`) makes so much evidence of each pair; a hundredth of the capital is on one like it. With
    the smallest error rate that there is, and the largest margin, that comes to 15,000 pairs.
    """
    bets = [share / (1 + margin) for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98)]
    gain = max(drop * math.log1p(bet * (1 - margin)) + (1 - drop) * math.log1p(-bet * margin) for bet in bets)
    return math.ceil(1.5 * math.log(100 / alpha) / gain) + 5 * RUN


# Rows ------------------------------------------------------------------------------------------------------


def _counts_fully(label: int, rollout: Rollout) -> bool:
    weights = rollout.quality.weights
    return not weights or (label < len(weights) and weights[label] == max(weights))


def _made_up(rollout: Rollout, rng: np.random.Generator) -> list[SelfTestRow]:
    """Rows with the shares of the rollout's groups, and a control that is right on most of them."""
    classes = max(2, len(rollout.classes), len(rollout.quality.weights))
    labels = [label for label in range(classes) if _counts_fully(label, rollout)]
    attributes: dict[str, list[tuple[str, float]]] = {}
    for group in rollout.groups:
        attribute, _, value = group.name.partition("=")
        attributes.setdefault(attribute, []).append((value, group.share))
    rows = []
    for _ in range(MADE_UP_ROWS):
        groups = {}
        for attribute, values in attributes.items():
            draw = rng.random()
            for value, share in values:
                if 0 <= draw < share:
                    groups[attribute] = value
                draw -= share
        label = labels[int(rng.integers(len(labels)))]
        wrong = (label + int(rng.integers(1, classes))) % classes
        rows.append(SelfTestRow(label if rng.random() < MADE_UP_ACCURACY else wrong, label, groups))
    return rows
