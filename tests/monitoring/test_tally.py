"""Counts: how pairs become them and how they merge."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.baseline import Baseline
from monitoring.label_queue import in_sample
from monitoring.quality import quality_of
from monitoring.tally import (
    MISSING,
    NO_CLASS,
    ODDS,
    LabelCount,
    Odds,
    TallyKey,
    bucket_of,
    compare_blocks,
    compare_cost,
    count_answers,
    count_block,
    count_labels,
    label_outcome,
    merge,
)
from tests.monitoring.judgement import START, pair

counts = st.dictionaries(st.integers(-2, 9), st.integers(0, 10**9), max_size=6)
DEADLINE = 100.0


def tally(tallies: dict, guardrail: str, group: str = "") -> dict[int, int]:
    total: dict[int, int] = {}
    for key, seen in tallies.items():
        if (key.guardrail, key.group) == (guardrail, group):
            total = merge(total, seen)
    return total


@given(counts, counts, counts)
def test_tallies_merge_in_any_order(a: dict, b: dict, c: dict) -> None:
    assert merge(a, merge(b, c)) == merge(merge(c, a), b)
    assert merge(a, {}) == a


def test_a_pair_whose_arms_agree_needs_no_label() -> None:
    assert label_outcome(pair(1, 1, 1), START, DEADLINE) == 0


@pytest.mark.parametrize(("label", "outcome"), [(0, 1), (1, -1), (2, 0)])
def test_a_disagreement_is_judged_by_its_label(label: int, outcome: int) -> None:
    assert label_outcome(pair(1, 0, 1, label=label), START, DEADLINE) == outcome


def test_a_disagreement_waits_for_its_label_until_the_deadline() -> None:
    waiting = pair(1, 0, 1)
    assert label_outcome(waiting, waiting.created_at + DEADLINE - 0.1, DEADLINE) is None
    assert label_outcome(waiting, waiting.created_at + DEADLINE, DEADLINE) == MISSING


@pytest.mark.parametrize(("control", "treatment"), [(None, 1), (1, None), (None, None)])
def test_an_arm_that_could_not_answer_is_missing_whatever_the_label(
    control: int | None, treatment: int | None
) -> None:
    assert label_outcome(pair(1, control, treatment, label=1), START, DEADLINE) == MISSING


def test_labels_are_counted_first_in_first_out_and_stop_at_the_first_open_pair() -> None:
    pairs = [pair(1, 0, 0), pair(2, 0, 1, label=0), pair(3, 0, 1), pair(4, 0, 1, label=0)]
    result = count_labels(pairs, frozenset({"DIS=1"}), START + 10, DEADLINE)
    assert (result.last_seq, result.pairs, result.labels) == (2, 2, 1)
    assert tally(result.tallies, "accuracy_drop") == {0: 1, 1: 1}
    assert tally(result.tallies, "group_harm", "DIS=1") == {0: 1, 1: 1}


def test_an_open_pair_is_passed_as_missing_once_its_deadline_is_over() -> None:
    pairs = [pair(1, 0, 1), pair(2, 0, 0)]
    result = count_labels(pairs, frozenset(), START + 1 + DEADLINE, DEADLINE)
    assert tally(result.tallies, "accuracy_drop") == {MISSING: 1, 0: 1}
    assert result.newest_at == START + 1 + DEADLINE


def test_groups_that_are_not_guarded_are_not_counted() -> None:
    result = count_labels([pair(1, 0, 0)], frozenset({"SEX=2"}), START, DEADLINE)
    assert {key.guardrail for key in result.tallies} == {"accuracy_drop"}


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.sampled_from([None, 0, 1])), max_size=30))
def test_counting_in_batches_of_any_size_gives_the_same(rows: list) -> None:
    pairs = [pair(i, c, t, label=label) for i, (c, t, label) in enumerate(rows, 1)]
    whole = count_labels(pairs, frozenset({"DIS=1"}), START, DEADLINE)
    total: dict[TallyKey, dict[int, int]] = {}
    at = 0
    rng = random.Random(len(rows))
    while True:
        batch = [p for p in pairs if p.seq > at][: rng.randint(1, 4)]
        part = count_labels(batch, frozenset({"DIS=1"}), START, DEADLINE)
        for key, seen in part.tallies.items():
            total[key] = merge(total.get(key, {}), seen)
        if part.last_seq is None:
            break
        at = part.last_seq
    assert total == whole.tallies


def test_disagreement_counts_missing_answers_apart() -> None:
    pairs = [pair(1, 0, 0), pair(2, 0, 1), pair(3, None, 1)]
    result = count_answers(pairs, ["DIS=1"], 1, {})
    for group in ("", "DIS=1"):
        assert tally(result.tallies, "disagreement", group) == {0: 1, 1: 1, MISSING: 1}


def parity(
    rows: list[tuple[int, int | None, str]], unmatched: dict | None = None
) -> tuple[dict[int, int], dict]:
    pairs = [pair(i, c, t, groups={"DIS": dis}) for i, (c, t, dis) in enumerate(rows, 1)]
    result = count_answers(pairs, ["DIS=1"], 1, unmatched or {})
    return tally(result.tallies, "demographic_parity", "DIS=1"), dict(result.unmatched)


def test_parity_compares_a_row_of_the_group_with_one_of_the_rest() -> None:
    # In the group a favourable answer is lost (s = -1); in the rest nothing changes.
    assert parity([(1, 0, "1"), (1, 1, "2")]) == ({-1: 1}, {})
    assert parity([(1, 1, "2"), (1, 0, "1")]) == ({-1: 1}, {})
    assert parity([(1, 0, "1"), (0, 1, "2")]) == ({-2: 1}, {})


def test_a_newcomer_takes_the_place_of_the_row_that_waits_on_its_side() -> None:
    assert parity([(1, 0, "1"), (1, 1, "1"), (1, 1, "2")]) == ({0: 1}, {})


def test_the_row_that_waits_is_carried_into_the_next_batch() -> None:
    _, waiting = parity([(1, 0, "1")])
    assert waiting == {"DIS=1": (1, -1)}
    assert parity([(1, 1, "2")], waiting) == ({-1: 1}, {})


def test_a_match_with_a_row_that_an_arm_could_not_answer_is_missing_on_either_side() -> None:
    assert parity([(1, None, "1"), (1, 1, "2")]) == ({MISSING: 1}, {})
    assert parity([(1, 0, "1"), (1, None, "2")]) == ({MISSING: 1}, {})
    assert parity([(1, None, "1"), (1, 0, "1"), (1, 1, "2")]) == ({-1: 1}, {})


def test_pairs_that_both_arms_answered_are_counted_apart_with_or_without_a_label() -> None:
    pairs = [pair(1, 0, 0), pair(2, 0, None), pair(3, None, 1), pair(4, 0, 1)]
    result = count_labels(pairs, frozenset(), START + 4 + DEADLINE, DEADLINE)
    assert (result.pairs, result.compared) == (4, 2)


@given(st.lists(st.sampled_from(["1", "2"]), max_size=40), st.randoms())
def test_which_rows_are_matched_does_not_depend_on_the_answers(
    members: list[str], rng: random.Random
) -> None:
    first = parity([(rng.randint(0, 1), rng.choice([0, 1, None]), m) for m in members])[0]
    second = parity([(rng.randint(0, 1), rng.randint(0, 1), m) for m in members])[0]
    assert sum(first.values()) == sum(second.values())


def test_a_blocks_share_over_the_limit_is_rounded_down() -> None:
    assert count_block(within=2, over=1) == 333
    assert count_block(within=20, over=0) == 0
    assert count_block(within=0, over=20) == 1000


def test_a_pair_belongs_to_the_classes_that_the_arms_give() -> None:
    pairs = [pair(1, 0, 0), pair(2, 1, 0, label=1), pair(3, 2, 2)]
    labels = count_labels(pairs, frozenset(), START, DEADLINE, ("no", "yes", "perhaps")).tallies
    assert tally(labels, "class_harm", "no") == {0: 1, 1: 1}
    assert tally(labels, "class_harm", "yes") == {1: 1}
    assert tally(labels, "class_harm", "perhaps") == {0: 1}


@pytest.mark.parametrize(("control", "treatment"), [(None, 0), (1, None)])
def test_a_pair_that_an_arm_did_not_answer_is_a_missing_one_of_each_class(
    control: int | None, treatment: int | None
) -> None:
    labels = count_labels([pair(1, control, treatment)], frozenset(), START, DEADLINE, ("no", "yes")).tallies
    for name in ("no", "yes"):
        assert tally(labels, "class_harm", name) == {MISSING: 1}


def test_arms_that_are_alike_lose_nothing_in_any_class_however_rare() -> None:
    rng = random.Random(1)
    pairs = []
    for seq in range(40_000):
        sure = rng.gauss(-3.0, 2.0)
        control, treatment = (int(sure + rng.gauss(0, 1) > 0) for _ in range(2))
        label = int(
            rng.random() < 1 / (1 + math.exp(-sure + 2))
        )  # neither arm's threshold is where it should be
        pairs.append(pair(seq, control, treatment, label=label))
    counts = tally(
        count_labels(pairs, frozenset(), START, DEADLINE, ("no", "yes")).tallies, "class_harm", "yes"
    )
    seen, drop = sum(counts.values()), counts[1] - counts[-1]
    assert abs(drop) / seen < 0.03
    alone = [(one.label == 1) - (one.label == one.treatment) for one in pairs if one.control == 1]
    assert abs(sum(alone)) / len(alone) > 0.1  # by control's answer alone one of them would look worse


@given(*[st.integers(0, 10**6)] * 2, *[st.integers(0, 10**6)] * 2)
def test_a_difference_of_blocks_is_never_larger_than_it_was(a: int, b: int, c: int, d: int) -> None:
    treatment, control = {0: a + 1, 1: b}, {0: c + 1, 1: d}
    exact = 1000 * (b / (a + 1 + b) - d / (c + 1 + d))
    assert exact - 2 <= compare_blocks(treatment, control) <= exact + 1e-6


def test_buckets_are_ten_seconds_wide() -> None:
    assert [bucket_of(t) for t in (0.0, 9.99, 10.0)] == [0, 0, 1]


ODDS_OF_DIS = Odds(("DIS=1",), 1, 1.0, {})


def odds(
    rows: list[tuple[int, int, int | None, str]], given: Odds = ODDS_OF_DIS, now: float = START + 1e6
) -> tuple[list[dict[int, int]], LabelCount]:
    """Rows are (control, treatment, label, group); returns both tallies, and all that was counted."""
    pairs = [
        pair(i, c, t, label=y, labelled_at=START, groups={"DIS": dis})
        for i, (c, t, y, dis) in enumerate(rows, 1)
    ]
    found = count_labels(pairs, frozenset(), now, DEADLINE, (), odds=given)
    return [tally(found.tallies, name, "DIS=1") for name in ODDS], found


def test_equalized_odds_match_rows_of_the_same_kind_of_label() -> None:
    # In the group a favourable answer is lost among those who deserve it; among the others nobody is matched.
    assert odds([(1, 0, 1, "1"), (1, 1, 0, "2"), (1, 1, 1, "2")])[0] == [{-1: 1}, {}]
    assert odds([(0, 1, 0, "1"), (0, 0, 0, "2")])[0] == [{}, {1: 1}]


def test_a_row_whose_label_never_came_is_a_missing_one_of_either_kind() -> None:
    (true_positives, false_positives), found = odds([(1, 0, None, "1"), (1, 1, 1, "2"), (0, 0, 0, "2")])
    assert true_positives == false_positives == {MISSING: 1}
    assert found.unmatched == {}


def test_for_equalized_odds_a_pair_on_which_the_arms_agree_waits_for_its_label_too() -> None:
    rows = [(1, 1, None, "1"), (1, 1, 1, "2")]
    assert odds(rows, now=START + 5)[1].pairs == 0
    assert odds(rows, now=START + 5, given=replace(ODDS_OF_DIS, share=1e-12))[1].pairs == 2
    assert odds(rows, now=START + 5 + DEADLINE)[1].pairs == 2


@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_equalized_odds_wait_for_the_pairs_that_the_label_queue_lists_at_the_same_rate(
    number: int, share: float
) -> None:
    waits = pair(number, 1, 1)
    given = replace(ODDS_OF_DIS, share=share)
    counted = count_labels([waits], frozenset(), START, DEADLINE, odds=given).pairs
    assert counted == (not in_sample(waits.request_id, waits.index, share))


def test_what_waits_for_a_partner_waits_across_batches() -> None:
    _, first = odds([(1, 0, 1, "1")])
    assert first.unmatched == {"true_positive_rate/DIS=1": (1, -1)}
    (true_positives, _), second = odds([(1, 1, 1, "2")], replace(ODDS_OF_DIS, unmatched=first.unmatched))
    assert true_positives == {-1: 1}
    assert second.unmatched == {}


def test_a_drop_in_balanced_accuracy_weighs_the_rare_class_more_and_a_class_of_its_own_not_at_all() -> None:
    quality = quality_of("balanced_accuracy", (0.9, 0.1))
    pairs = [pair(i, i % 2, 1 - i % 2, label=i % 2, labelled_at=START) for i in range(1, 2001)]
    found = count_labels(pairs, frozenset({"DIS=1"}), START, DEADLINE, ("no", "yes"), quality).tallies
    everybody = tally(found, "accuracy_drop", "")
    # Of the rare class's losses all count, of the common one's a ninth.
    assert everybody[1] == pytest.approx(1000 + 1000 / 9, abs=40)
    assert tally(found, "group_harm", "DIS=1") == {1: 2000}
    assert tally(found, "class_harm", "no") == {1: 2000}


def test_without_labels_a_disagreement_counts_as_full_precisions_confidence_lets_expect() -> None:
    baseline = Baseline(400, (0.5, 0.5), (0.5, 0.5), ((0.5, 0.5), (1.0, 1.0)))
    pairs = [pair(i, 0, 1, control_confidence=0.8) for i in range(1, 4001)]
    found = tally(count_answers(pairs, [], 1, {}, baseline).tallies, "estimated_drop", "")
    assert found.keys() == {0, 1}
    assert found[1] / 4000 == pytest.approx(0.8 - 0.2, abs=0.03)


def test_a_disagreement_that_full_precision_is_likely_to_lose_speaks_for_the_candidate() -> None:
    baseline = Baseline(400, (0.5, 0.5), (0.5, 0.5), ((0.5, 0.2), (1.0, 1.0)))
    pairs = [pair(i, 0, 1, control_confidence=0.5) for i in range(1, 4001)]
    found = tally(count_answers(pairs, [], 1, {}, baseline).tallies, "estimated_drop", "")
    assert found[-1] / 4000 == pytest.approx(0.8 - 0.2, abs=0.03)


def test_an_estimate_of_a_pair_that_nobody_can_judge_is_missing() -> None:
    baseline = Baseline(400, (0.5, 0.5), (0.5, 0.5), ((0.5, 0.5), (1.0, 1.0)))
    pairs = [pair(1, 0, 0), pair(2, 0, 1), pair(3, None, 1), pair(4, 0, None, control_confidence=0.9)]
    found = count_answers(pairs, [], 1, {}, baseline).tallies
    assert tally(found, "estimated_drop", "") == {0: 1, MISSING: 3}
    assert tally(found, "prediction_drift", "") == {0: 3, NO_CLASS: 1}


@pytest.mark.parametrize(
    ("treatment", "control", "over"),
    [({0: 100, 1: 10}, {0: 100, 1: 10}, 0), ({0: 126, 1: 10}, {0: 100, 1: 10}, 1), ({1: 5}, {1: 5}, 0)],
)
def test_a_block_is_costly_where_a_record_takes_more_than_the_ratio(
    treatment: dict[int, int], control: dict[int, int], over: int
) -> None:
    assert compare_cost(treatment, control, 1.25) == over
