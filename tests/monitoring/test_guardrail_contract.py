"""What every guardrail must hold to, whatever it guards. A new one joins by its entry in GUARDRAILS and in WORLDS."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.baseline import Baseline, ColumnSpec
from monitoring.errors import PolicyError
from monitoring.evidence import share_bounds
from monitoring.groups import GroupSpec
from monitoring.guardrails import GUARDRAILS, Guardrail, Scope, Totals, describe, evaluate, limits
from monitoring.guardrails.rules import REFERENCE_RISK
from monitoring.policy import Policy, Section, parse_policy
from monitoring.tally import (
    CONTROL_BLOCKS,
    EVERYBODY,
    LATENCY_BLOCKS,
    MISSING,
    NO_CLASS,
    ODDS,
    RESOURCE_BLOCKS,
    REWARD,
    SAMPLE_RATIO,
)
from tests.monitoring.judgement import assert_rate_at_most

OFF_UNLESS_ASKED_FOR = ("latency_vs_control", "equalized_odds", "reward")
POLICY = parse_policy(
    {
        "false_rollback_rate": 0.05,
        "guardrails": {name: {"enabled": True} for name in OFF_UNLESS_ASKED_FOR},
    }
)
GROUP, CLASS, COLUMN = "DIS=1", "yes", "AGE"
BASELINE = Baseline(
    rows=400,
    labels=(0.6, 0.4),
    answers=(0.7, 0.3),
    calibration=((0.5, 0.5), (1.0, 1.0)),
    columns=(ColumnSpec(COLUMN, (30.0,), (), (0.7, 0.3, 0.0)),),
)
SCOPE = Scope((GroupSpec(GROUP, 0.2, 0.1), GroupSpec("DIS=2", 0.8, -0.1)), ("no", CLASS), BASELINE)
ALPHA = 0.05

Draws = list[dict[tuple[str, str], int]]
"""One outcome after another, each for one tally and group."""


def paired(name: str, subject: str, margin: float) -> Callable[[np.random.Generator, int, bool], Draws]:
    """d with the tolerated mean, or with one 0.2 over it."""

    def draw(rng: np.random.Generator, n: int, bad: bool) -> Draws:
        better = 0.05
        worse = margin + 0.2 * bad + better
        return [
            {(name, subject): d} for d in rng.choice([1, -1, 0], n, p=[worse, better, 1 - worse - better])
        ]

    return draw


def parity(rng: np.random.Generator, n: int, bad: bool) -> Draws:
    mean = POLICY.guardrails.demographic_parity.margin + 0.4 * bad
    up, down = (0.5 + mean) / 2, (0.5 - mean) / 2
    return [
        {("demographic_parity", GROUP): z} for z in rng.choice([1, -1, 0], n, p=[up, down, 1 - up - down])
    ]


def odds(rng: np.random.Generator, n: int, bad: bool) -> Draws:
    """Matched rows of both kinds of labels: of one the gap has moved as far as it may, or further; of the other not."""
    mean = POLICY.guardrails.equalized_odds.margin + 0.4 * bad
    up, down = (0.5 + mean) / 2, (0.5 - mean) / 2
    moved, still = (rng.choice([1, -1, 0], n, p=[a, b, 0.5]) for a, b in ((up, down), (0.25, 0.25)))
    return [{(ODDS[0], GROUP): a, (ODDS[1], GROUP): b} for a, b in zip(moved, still, strict=True)]


def drift(name: str, subject: str) -> Callable[[np.random.Generator, int, bool], Draws]:
    """The share of the second bin is as far off as it may be, or further."""

    def draw(rng: np.random.Generator, n: int, bad: bool) -> Draws:
        shares = BASELINE.answers if name == "prediction_drift" else BASELINE.columns[0].shares
        high = share_bounds(shares, BASELINE.rows, REFERENCE_RISK / (2 * len(shares)))[1][1]
        share = high + 0.1 + 0.25 * bad
        return [{(name, subject): int(second)} for second in rng.random(n) < share]

    return draw


def costly(rng: np.random.Generator, n: int, bad: bool) -> Draws:
    return [{(RESOURCE_BLOCKS, EVERYBODY): int(over)} for over in rng.random(n) < 0.5 + 0.3 * bad]


def p95(rng: np.random.Generator, n: int, bad: bool) -> Draws:
    """Blocks that are either quick or slow as a whole: as far from independent requests as can be."""
    share = 0.05 + 0.3 * bad
    return [{(LATENCY_BLOCKS, EVERYBODY): 1000 * slow} for slow in rng.random(n) < share]


def versus_control(rng: np.random.Generator, n: int, bad: bool) -> Draws:
    mean = POLICY.guardrails.latency_vs_control.margin + 0.3 * bad
    up, down = 0.3 + mean / 2, 0.3 - mean / 2
    return [
        {(CONTROL_BLOCKS, EVERYBODY): 1000 * z}
        for z in rng.choice([1, -1, 0], n, p=[up, down, 1 - up - down])
    ]


def errors(rng: np.random.Generator, n: int, bad: bool) -> Draws:
    ratio = POLICY.guardrails.treatment_errors.ratio + 0.2 * bad
    return [{("treatment_errors", EVERYBODY): int(failed)} for failed in rng.random(n) < ratio]


def split(rng: np.random.Generator, n: int, bad: bool) -> Draws:
    """Two steps of a rollout, one after the other."""
    drawn: Draws = []
    for weight in (5, 50):
        share = weight / 100 + 0.2 * bad
        drawn += [{(SAMPLE_RATIO, str(weight)): int(one)} for one in rng.random(n // 2) < share]
    return drawn


def rewards(rng: np.random.Generator, n: int, bad: bool) -> Draws:
    """Matches of clicks, three rows of control with one of the treatment's."""
    lower = POLICY.guardrails.reward.margin + 0.3 * bad
    control, treatment = rng.binomial(3, 0.4, n), rng.random(n) < 0.4 - lower
    return [
        {(REWARD, EVERYBODY): (100 * int(c) - 300 * int(t)) // 3}
        for c, t in zip(control, treatment, strict=True)
    ]


WORLDS: dict[str, Callable[[np.random.Generator, int, bool], Draws]] = {
    "accuracy_drop": paired("accuracy_drop", EVERYBODY, POLICY.guardrails.accuracy_drop.margin),
    "group_harm": paired("group_harm", GROUP, POLICY.guardrails.group_harm.margin),
    "class_harm": paired("class_harm", CLASS, POLICY.guardrails.class_harm.margin),
    "demographic_parity": parity,
    "latency_p95": p95,
    "latency_vs_control": versus_control,
    "treatment_errors": errors,
    "sample_ratio": split,
    "equalized_odds": odds,
    "estimated_drop": paired("estimated_drop", EVERYBODY, POLICY.guardrails.estimated_drop.margin),
    "resource_use": costly,
    "prediction_drift": drift("prediction_drift", EVERYBODY),
    "input_drift": drift("input_drift", COLUMN),
    "reward": rewards,
}
"""For each guardrail: outcomes that are exactly as bad as is tolerated, or much worse."""

every = pytest.mark.parametrize("guardrail", GUARDRAILS, ids=lambda guardrail: guardrail.name)


def counted(drawn: Draws, looks: Sequence[int]) -> list[Totals]:
    """The totals after so many draws."""
    found: list[Totals] = []
    totals: dict[tuple[str, str], Counter[int]] = {}
    for number, one in enumerate(drawn, 1):
        for place, outcome in one.items():
            totals.setdefault(place, Counter())[int(outcome)] += 1
        if number in looks:
            found.append({place: Counter(counts) for place, counts in totals.items()})
    return found


def evidence(guardrail: Guardrail, totals: Totals) -> float:
    """Of the subject that the world is about; natural logarithm."""
    subjects = guardrail.subjects(SCOPE)
    subject = next((s for s in (GROUP, CLASS, COLUMN) if s in subjects), EVERYBODY)
    (reading,) = guardrail.read(POLICY, SCOPE, [subject], totals)
    return reading.evidence


def test_every_guardrail_has_a_world_to_be_tried_in() -> None:
    assert [guardrail.name for guardrail in GUARDRAILS] == list(WORLDS)


@every
def test_it_has_a_section_of_the_policy(guardrail: Guardrail) -> None:
    section = POLICY.guardrails.section(guardrail.name)
    assert isinstance(section, Section)
    assert type(section).__doc__ != Section.__doc__


def test_every_section_of_the_policy_has_its_guardrail() -> None:
    assert list(POLICY.guardrails.sections) == [guardrail.name for guardrail in GUARDRAILS]


@every
def test_nothing_counted_is_no_evidence(guardrail: Guardrail) -> None:
    subjects = guardrail.subjects(SCOPE)
    for reading in guardrail.read(POLICY, SCOPE, subjects, {}):
        assert reading.evidence == pytest.approx(0.0, abs=1e-12)
        assert (reading.estimate, reading.n, reading.missing) == (None, 0, 0)


@every
def test_it_judges_nobody_in_a_world_without_groups_and_classes_or_everybody(guardrail: Guardrail) -> None:
    assert tuple(guardrail.subjects(Scope())) in ((), (EVERYBODY,))


@every
def test_what_is_as_bad_as_tolerated_is_convicted_at_most_at_the_stated_rate_however_often_one_looks(
    guardrail: Guardrail,
) -> None:
    rng = np.random.default_rng(7)
    runs, looks = 400, range(10, 401, 10)
    limit = -math.log(ALPHA)
    hits = 0
    for _ in range(runs):
        after = counted(WORLDS[guardrail.name](rng, 400, False), looks)
        hits += any(evidence(guardrail, totals) >= limit for totals in after)
    # The interval of 400 runs is wide: 0.1 is the least that it can tell from the stated 0.05.
    assert_rate_at_most(hits, runs, 2 * ALPHA)


@every
def test_at_any_moment_its_evidence_is_at_most_1_on_average(guardrail: Guardrail) -> None:
    rng = np.random.default_rng(11)
    values = np.exp(
        [evidence(guardrail, counted(WORLDS[guardrail.name](rng, 40, False), [40])[0]) for _ in range(2000)]
    )
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert values.mean() <= 1 + 4 * error


@every
def test_what_is_much_worse_is_convicted(guardrail: Guardrail) -> None:
    rng = np.random.default_rng(13)
    runs = 50
    hits = sum(
        evidence(guardrail, counted(WORLDS[guardrail.name](rng, 600, True), [600])[0]) >= -math.log(ALPHA)
        for _ in range(runs)
    )
    assert hits >= 0.9 * runs


@every
def test_the_verdict_is_described_in_one_line_with_its_evidence(guardrail: Guardrail) -> None:
    totals = counted(WORLDS[guardrail.name](np.random.default_rng(1), 200, True), [200])[0]
    verdicts = [
        verdict for verdict in evaluate(POLICY, SCOPE, totals).verdicts if verdict.guardrail == guardrail.name
    ]
    for verdict in verdicts:
        assert "\n" not in describe(verdict)
        assert f"limit 10^{verdict.limit_log10:.2f}" in describe(verdict)
        assert verdict.group in describe(verdict)


@every
def test_switched_off_it_neither_judges_nor_takes_a_share(guardrail: Guardrail) -> None:
    off = parse_policy(
        {"guardrails": {guardrail.name: {"enabled": False}, "disagreement": {"enabled": True}}}
    )
    found = limits(off, SCOPE)
    assert guardrail.name not in {name for name, _ in found}
    spent = [0.0, 0.0]
    for (name, _), limit in found.items():
        spent[off.guardrails.section(name).action == "rollback"] += 10**-limit
    assert spent == pytest.approx([off.false_rollback_rate] * 2)


_PAIRED = ("accuracy_drop", "group_harm", "class_harm", "demographic_parity", "estimated_drop")


@pytest.mark.parametrize("guardrail", [g for g in GUARDRAILS if g.name in _PAIRED], ids=lambda g: g.name)
@given(known=st.lists(st.integers(-1, 1), max_size=60), missing=st.integers(1, 20))
def test_an_outcome_that_is_missing_never_speaks_against_the_candidate(
    guardrail: Guardrail, known: list[int], missing: int
) -> None:
    subject = (
        GROUP
        if GROUP in guardrail.subjects(SCOPE)
        else CLASS
        if guardrail.name == "class_harm"
        else EVERYBODY
    )
    place = guardrail.name, subject
    for outcome in (-1, 0, 1):
        with_missing = {place: Counter([*known, *[MISSING] * missing])}
        as_known = {place: Counter([*known, *[outcome] * missing])}
        assert evidence(guardrail, with_missing) <= evidence(guardrail, as_known) + 1e-9


@given(known=st.lists(st.integers(-2, 2), max_size=60), missing=st.integers(1, 20))
def test_a_matched_row_without_a_label_never_speaks_against_the_candidate(
    known: list[int], missing: int
) -> None:
    (guardrail,) = (g for g in GUARDRAILS if g.name == "equalized_odds")
    place = ODDS[1], GROUP
    for outcome in range(-2, 3):
        with_missing = {place: Counter([*known, *[MISSING] * missing])}
        as_known = {place: Counter([*known, *[outcome] * missing])}
        assert evidence(guardrail, with_missing) <= evidence(guardrail, as_known) + 1e-9


@given(known=st.lists(st.integers(0, 1), max_size=60), missing=st.integers(1, 20))
def test_an_answer_that_is_missing_is_no_sign_of_drift(known: list[int], missing: int) -> None:
    (guardrail,) = (g for g in GUARDRAILS if g.name == "prediction_drift")
    place = "prediction_drift", EVERYBODY
    for outcome in (0, 1):
        with_missing = {place: Counter([*known, *[NO_CLASS] * missing])}
        as_known = {place: Counter([*known, *[outcome] * missing])}
        assert evidence(guardrail, with_missing) <= evidence(guardrail, as_known) + 1e-9


@pytest.mark.parametrize("name", ["prediction_drift", "input_drift"])
def test_drift_alone_may_not_roll_back(name: str) -> None:
    with pytest.raises(PolicyError, match=f"{name}.action"):
        parse_policy({"guardrails": {name: {"action": "rollback"}}})


FIRST = ("accuracy_drop", "group_harm", "demographic_parity", "latency_p95", "treatment_errors")
"""Guardrails of the first version."""


def test_a_policy_that_was_stored_before_a_guardrail_came_goes_on_without_it() -> None:
    stored = POLICY.model_dump(mode="json")
    later = [guardrail.name for guardrail in GUARDRAILS if guardrail.name not in FIRST]
    for name in later:
        del stored["guardrails"][name]
    old = Policy.model_validate(stored, context="stored")
    assert not any(old.guardrails.section(name).enabled for name in later)
    assert old.guardrails.accuracy_drop.enabled
    assert parse_policy({}).guardrails.class_harm.enabled
    again = Policy.model_validate(POLICY.model_dump(mode="json"), context="stored")
    assert again == POLICY
