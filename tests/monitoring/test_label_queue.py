"""What is worth labelling next does not depend on who asks, when, or in which order pairs come."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.label_queue import LabelQueue, LabelRequest, UnlabelledPair, in_sample, queue
from monitoring.tally import Pair, count_labels, label_outcome
from tests.monitoring.judgement import START, interval

DEADLINE = 100.0


def pair(
    request: str, control: int | None = 1, treatment: int | None = 1, age: float = 0.0, index: int = 0
) -> UnlabelledPair:
    """A pair of a request made `age` seconds before START."""
    return UnlabelledPair(
        request, index, control, treatment, {"DIS": "1"}, '{"age": 40, "text": "é"}', START - age
    )


def asked(
    pairs: Iterable[UnlabelledPair], now: float = START, rate: float = 0.0, limit: int = 1000
) -> LabelQueue:
    return queue(pairs, now, DEADLINE, rate, limit)


def listed(found: LabelQueue) -> list[str]:
    return [item.request_id for item in found.items]


classes = st.none() | st.integers(0, 2)
pairs_ = st.lists(
    st.builds(pair, st.text(max_size=8), classes, classes, st.floats(0, 2 * DEADLINE), st.integers(0, 3)),
    max_size=40,
    unique_by=lambda made: (made.request_id, made.index),
)
rates = st.floats(0, 1)


# -- the sample ----------------------------------------------------------------------------------------------


@given(pairs_, rates, st.randoms(use_true_random=False), st.floats(0, 0.9 * DEADLINE))
def test_a_pair_is_in_the_sample_or_not_whatever_the_order_and_the_time(
    pairs: list[UnlabelledPair], rate: float, random: Random, later: float
) -> None:
    pairs = [replace(made, created_at=START) for made in pairs]
    mixed = list(pairs)
    random.shuffle(mixed)
    first, again = asked(pairs, START, rate), asked(mixed, START + later, rate)
    assert again == first
    sampled = {(item.request_id, item.index) for item in first.items if item.why == "sample"}
    agree = [made for made in pairs if made.control is not None and made.control == made.treatment]
    assert sampled == {
        (made.request_id, made.index) for made in agree if in_sample(made.request_id, made.index, rate)
    }


@given(st.text(), st.integers(0, 300), rates, rates)
def test_a_larger_rate_keeps_what_a_smaller_one_has_drawn(
    request: str, index: int, one: float, other: float
) -> None:
    small, large = sorted((one, other))
    assert in_sample(request, index, small) <= in_sample(request, index, large)
    assert in_sample(request, index, 1.0)
    assert not in_sample(request, index, 0.0)


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1, 0.5, 0.99])
def test_the_share_that_is_drawn_is_the_rate(rate: float) -> None:
    n = 50_000
    for index in (0, 1):
        low, high = interval(sum(in_sample(f"user.{i:020x}~ab", index, rate) for i in range(n)), n, 0.999)
        assert low <= rate <= high


def test_each_record_of_a_request_is_drawn_by_itself() -> None:
    n = 20_000
    both = sum(in_sample(f"q{i}", 0, 0.5) and in_sample(f"q{i}", 1, 0.5) for i in range(n))
    low, high = interval(both, n, 0.999)
    assert low <= 0.25 <= high


def test_the_sample_does_not_depend_on_the_draw_of_what_is_mirrored() -> None:
    # The mirror takes the ids whose last 48 bits are small.
    n = 20_000
    mirrored = [f"q{i}~{i:012x}" for i in range(n)]
    low, high = interval(sum(in_sample(request, 0, 0.1) for request in mirrored), n, 0.999)
    assert low <= 0.1 <= high


@pytest.mark.parametrize(("request_id", "index", "rate"), [("q1", 0, 0.11), ("q1", 1, 0.1), ("é", 0, 0.5)])
def test_the_draw_stays_what_it_is_in_the_next_version(request_id: str, index: int, rate: float) -> None:
    import hashlib

    digest = hashlib.blake2b(
        f"{index}:{request_id}".encode(), digest_size=8, person=b"trimtab-labels"
    ).hexdigest()
    assert in_sample(request_id, index, rate) == (int(digest, 16) / 2**64 < rate)


def test_figures_weighed_by_the_inverse_of_the_probability_come_out_right() -> None:
    # Every 50th pair is a disagreement; full precision is right on those, and on a fifth of the agreements.
    pairs = [pair(f"q{i}", 1, int(i % 50 != 0)) for i in range(60_000)]
    right = {made.request_id: int(made.request_id[1:]) % 5 == 0 for made in pairs}
    found = asked(pairs, rate=0.1, limit=len(pairs))
    assert len(found.items) < 0.15 * len(pairs)
    weights = [1 / item.probability for item in found.items]
    estimate = sum(w * right[item.request_id] for w, item in zip(weights, found.items, strict=True))
    assert sum(weights) == pytest.approx(len(pairs), rel=0.03)
    assert estimate / sum(weights) == pytest.approx(sum(right.values()) / len(pairs), abs=0.02)


# -- the queue -----------------------------------------------------------------------------------------------


def test_disagreements_come_first_and_the_oldest_of_each_kind_before_the_others() -> None:
    found = asked(
        [pair("a", age=9), pair("new", 1, 0, age=1), pair("old", 0, 1, age=8), pair("b", age=99)], rate=1.0
    )
    assert listed(found) == ["old", "new", "b", "a"]
    assert [(item.why, item.probability) for item in found.items] == [
        ("disagreement", 1.0),
        ("disagreement", 1.0),
        ("sample", 1.0),
        ("sample", 1.0),
    ]


def test_a_request_says_all_that_a_labeller_needs() -> None:
    (item,) = asked([pair("q", 2, 0, age=30, index=1)]).items
    assert item == LabelRequest(
        request_id="q",
        index=1,
        why="disagreement",
        probability=1.0,
        control=2,
        treatment=0,
        created_at=START - 30,
        deadline_at=START + 70,
        groups={"DIS": "1"},
        record={"age": 40, "text": "é"},
    )


def test_an_agreement_carries_the_probability_it_was_drawn_with() -> None:
    found = asked([pair(f"q{i}") for i in range(100)], rate=0.3)
    assert {(item.why, item.probability) for item in found.items} == {("sample", 0.3)}


@given(pairs_, rates, st.integers(1, 50))
def test_a_limit_cuts_the_list_and_not_the_count(
    pairs: list[UnlabelledPair], rate: float, limit: int
) -> None:
    whole, cut = asked(pairs, rate=rate), asked(pairs, rate=rate, limit=limit)
    assert cut.items == whole.items[:limit]
    assert cut.disagreements_waiting == sum(item.why == "disagreement" for item in whole.items)


def test_records_that_are_not_listed_are_not_read() -> None:
    broken = replace(pair("late", 1, 0), record="not JSON")
    assert listed(asked([broken, pair("early", 1, 0, age=1)], limit=1)) == ["early"]


@pytest.mark.parametrize(("control", "treatment"), [(None, 1), (1, None), (None, None)])
def test_a_pair_that_an_arm_could_not_answer_is_not_asked_about(
    control: int | None, treatment: int | None
) -> None:
    assert asked([pair("q", control, treatment)], rate=1.0) == LabelQueue((), 0)


# -- what a label is good for --------------------------------------------------------------------------------


def judged(made: UnlabelledPair, **label: object) -> Pair:
    plain = Pair(1, made.request_id, made.index, made.control, made.treatment, made.groups, made.created_at)
    return replace(plain, **label)  # type: ignore[arg-type]


@given(pairs_, st.floats(0, DEADLINE))
def test_the_disagreements_listed_are_the_pairs_that_the_evidence_waits_for(
    pairs: list[UnlabelledPair], later: float
) -> None:
    now = START + later
    waits = [made for made in pairs if label_outcome(judged(made), now, DEADLINE) is None]
    found = asked(pairs, now)
    assert sorted(listed(found)) == sorted(made.request_id for made in waits)
    assert found.disagreements_waiting == len(waits)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_at_its_deadline_a_pair_is_no_longer_asked_about(rate: float) -> None:
    pairs = [pair("agree"), pair("differ", 1, 0)]
    before, at = START + DEADLINE - 0.01, START + DEADLINE
    assert len(asked(pairs, before, rate).items) == 1 + rate
    assert asked(pairs, at, rate) == LabelQueue((), 0)


def test_a_label_after_the_deadline_counts_only_where_the_pairs_turn_is_yet_to_come() -> None:
    late = START + DEADLINE + 50
    open_ = replace(judged(pair("open", 1, 0)), created_at=late)
    labelled = judged(pair("q", 1, 0), seq=2, label=1, labelled_at=late)
    assert count_labels([open_, labelled], frozenset(), late, DEADLINE).pairs == 0
    unlabelled = replace(labelled, label=None, labelled_at=None)
    assert (
        count_labels([unlabelled], frozenset(), late, DEADLINE).last_seq == 2
    )  # the cursor is past it for good
    assert count_labels([labelled], frozenset(), late, DEADLINE).labels == 1


def test_the_record_comes_back_as_it_was_sent() -> None:
    record = {"text": 'a,"b"\n', "number": 1.5, "none": None, "list": [1, {"x": True}]}
    (item,) = asked([replace(pair("q", 1, 0), record=json.dumps(record))]).items
    assert item.record == record
