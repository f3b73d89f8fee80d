"""The ledger streams the pairs that have no label, by an index and beside whoever writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from monitoring.errors import LedgerUnavailable
from monitoring.label_queue import UnlabelledPair
from monitoring.ledger import LabelRow, Ledger, PairRow
from monitoring.policy import parse_policy
from tests.monitoring.judgement import CONTROL, START, TREATMENT, World

Drawn = Callable[[str, int], bool]


@pytest.fixture
def rollout_id(ledger: Ledger) -> str:
    return started(ledger)


def started(ledger: Ledger) -> str:
    made = ledger.create_rollout(
        workload="toy", control=CONTROL, treatment=TREATMENT, policy=parse_policy({}), actor="ada", now=START
    )
    return made.id


def row(rollout_id: str, request: str, control: int | None = 1, treatment: int | None = 1) -> PairRow:
    return PairRow(
        *(rollout_id, request, 0, "control", control, treatment, 0.9, 0.8),
        groups={"DIS": "1"},
        record={"age": 40, "text": "é"},
        created_at=START,
    )


def found(
    ledger: Ledger, rollout_id: str, seq: int = 0, since: float = 0.0, drawn: Drawn | None = None
) -> list[UnlabelledPair]:
    with ledger.unlabelled_pairs(rollout_id, seq, since, drawn) as pairs:
        return list(pairs)


def ids(pairs: list[UnlabelledPair]) -> list[str]:
    return [pair.request_id for pair in pairs]


def everything(_: str, __: int) -> bool:
    return True


def test_disagreements_without_a_label_come_in_arrival_order(ledger: Ledger, rollout_id: str) -> None:
    ledger.record_pairs(
        [
            row(rollout_id, "z", 1, 0),
            row(rollout_id, "same"),
            row(rollout_id, "labelled", 1, 0),
            row(rollout_id, "a", 0, 1),
        ]
    )
    ledger.record_labels([LabelRow("labelled", 0, 1, START), LabelRow("z", 7, 1, START)])
    assert ids(found(ledger, rollout_id)) == ["z", "a"]


def test_a_pair_comes_with_all_but_a_read_record(ledger: Ledger, rollout_id: str) -> None:
    ledger.record_pairs([row(rollout_id, "q", 1, 0)])
    assert found(ledger, rollout_id) == [
        UnlabelledPair("q", 0, 1, 0, {"DIS": "1"}, '{"age":40,"text":"é"}', START)
    ]


@pytest.mark.parametrize("drawn", [None, everything])
def test_pairs_that_an_arm_could_not_answer_are_left_out(
    ledger: Ledger, rollout_id: str, drawn: Drawn | None
) -> None:
    ledger.record_pairs(
        [row(rollout_id, "a", None), row(rollout_id, "b", 1, None), row(rollout_id, "c", None, None)]
    )
    assert found(ledger, rollout_id, drawn=drawn) == []


def test_agreements_come_as_they_are_drawn_by_id_and_index(ledger: Ledger, rollout_id: str) -> None:
    ledger.record_pairs(
        [replace(row(rollout_id, f"q{i}"), index=i % 2) for i in range(6)] + [row(rollout_id, "differ", 1, 0)]
    )
    ledger.record_labels([LabelRow("q3", 1, 1, START)])
    asked: list[tuple[str, int]] = []

    def odd(request_id: str, index: int) -> bool:
        asked.append((request_id, index))
        return index == 1

    assert ids(found(ledger, rollout_id, drawn=odd)) == ["q1", "q5", "differ"]
    assert asked == [(f"q{i}", i % 2) for i in range(6)]  # of a disagreement nothing has to be drawn


def test_only_pairs_after_the_place_and_the_time_asked_for_come(ledger: Ledger, rollout_id: str) -> None:
    ledger.record_pairs(
        [replace(row(rollout_id, f"q{i}", 1, 0), created_at=START + at) for i, at in enumerate((5, 1, 9))]
    )
    assert ids(found(ledger, rollout_id, seq=1)) == ["q1", "q2"]
    assert ids(found(ledger, rollout_id, since=START + 1)) == ["q0", "q2"]


def test_another_rollouts_pairs_are_left_out(ledger: Ledger, rollout_id: str) -> None:
    ledger.record_pairs([row(rollout_id, "mine", 1, 0)])
    assert found(ledger, "toy-9") == []


def test_disagreements_that_had_their_turn_are_before_the_cursor(world: World) -> None:
    rollout_id = world.start({"label_deadline_s": 30}).id
    world.beat()
    late = world.traffic([1, 0, -1], labels=False)
    world.step(31)
    world.traffic([0, 0])
    waiting = world.traffic([1, 0], labels=False)
    world.step()
    seq = world.ledger.cursor(rollout_id).labels_seq
    assert ids(found(world.ledger, rollout_id)) == [late[0], late[2], waiting[0]]
    assert ids(found(world.ledger, rollout_id, seq)) == [waiting[0]]
    totals = world.ledger.totals(rollout_id, world.rollout.epoch)
    world.ledger.record_labels([LabelRow(late[0], 0, 1, world.now)])
    world.step()
    assert world.ledger.totals(rollout_id, world.rollout.epoch) == totals


def test_others_write_while_pairs_are_read(ledger: Ledger, rollout_id: str) -> None:
    ledger.record_pairs([row(rollout_id, f"q{i}", 1, 0) for i in range(50)])
    worker = Ledger(ledger.path, busy_timeout=0.0)
    with ledger.unlabelled_pairs(rollout_id, 0, 0.0, everything) as pairs:
        first = next(pairs)
        assert worker.record_pairs([row(rollout_id, "new", 1, 0)]) == 1
        assert worker.record_labels([LabelRow("q9", 0, 1, START)]).accepted == 1
        rest = ids(list(pairs))
    assert [first.request_id, *rest] == [f"q{i}" for i in range(50)]  # as they were when the reading began
    assert len(found(ledger, rollout_id)) == 50
    worker.close()


def test_a_reader_may_stop_early_and_read_again(ledger: Ledger, rollout_id: str) -> None:
    ledger.record_pairs([row(rollout_id, f"q{i}", 1, i % 2) for i in range(50)])
    with ledger.unlabelled_pairs(rollout_id, 0, 0.0, everything) as pairs:
        next(pairs)
    assert len(found(ledger, rollout_id, drawn=lambda request_id, _: request_id == "q1")) == 26
    assert ledger.record_pairs([row(rollout_id, "new")]) == 1


@pytest.mark.parametrize("drawn", [None, everything])
def test_pairs_and_labels_are_found_by_their_indexes(
    ledger: Ledger, rollout_id: str, drawn: Drawn | None
) -> None:
    said: list[str] = []
    with ledger._store.reading() as db:
        db.set_trace_callback(said.append)
        try:
            found(ledger, rollout_id, drawn=drawn)
        finally:
            db.set_trace_callback(None)
        (query,) = [text for text in said if "labelled" in text]
        plan = [line[3] for line in db.execute("EXPLAIN QUERY PLAN " + query)]
    assert [step.partition(" (")[0] for step in plan] == [
        "SEARCH p USING INDEX pair_order",
        "SEARCH l USING INDEX label_key",
    ]


def test_without_the_file_the_error_is_the_ledgers(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    rollout_id = started(ledger)
    ledger.path.unlink()
    with pytest.raises(LedgerUnavailable):
        found(ledger, rollout_id)


def test_what_the_draw_raises_is_an_error_of_the_ledger_and_leaves_it_usable(
    ledger: Ledger, rollout_id: str
) -> None:
    def broken(_: str, __: int) -> bool:
        raise ValueError

    ledger.record_pairs([row(rollout_id, "q")])
    with pytest.raises(LedgerUnavailable, match="user-defined function"):
        found(ledger, rollout_id, drawn=broken)
    assert ids(found(ledger, rollout_id, drawn=everything)) == ["q"]
