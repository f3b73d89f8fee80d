"""The ledger keeps what it was given, once, and lets only one of two writers win."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from monitoring import store
from monitoring.chain import FIELDS, GENESIS, Verified, link
from monitoring.errors import LedgerUnavailable, RolloutConflict, RolloutNotFound
from monitoring.groups import GroupSpec
from monitoring.intake import MAX_CORRECTIONS
from monitoring.ledger import Cursor, FeedbackResult, LabelRow, Ledger, PairRow, RewardRow, WorkerBeat
from monitoring.policy import parse_policy
from monitoring.records import Decision, Rollout
from monitoring.reward import NOBODY, RewardedPair
from monitoring.rows import cursor_to_json, rollout_from_json, rollout_to_json
from monitoring.sampling import MirrorCounts
from monitoring.tally import TallyKey, bucket_of
from tests.monitoring.formats import FORMAT_1, FORMAT_2, FORMAT_3
from tests.monitoring.judgement import CONTROL, START, TREATMENT

POLICY = parse_policy({"label_deadline_s": 77, "mirror_rate": 0.5, "latency_slo_ms": 40})


def started(ledger: Ledger, **more: object) -> Rollout:
    given: dict = {"workload": "toy", "control": CONTROL, "treatment": TREATMENT, "policy": POLICY}
    return ledger.create_rollout(**(given | {"actor": "ada", "now": START} | more))


def row(rollout_id: str, request: str, index: int = 0, **changes: object) -> PairRow:
    made = PairRow(
        rollout_id, request, index, "control", 1, 0, 0.9, 0.8, {"DIS": "1"}, {"age": 40, "text": "é"}, START
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def changed(rollout: Rollout, **changes: object) -> Rollout:
    return replace(rollout, **changes)  # type: ignore[arg-type]


def decided(rollout: Rollout, to_state: str = "warmup", **changes: object) -> Decision:
    made = Decision(rollout.id, START + 1, "controller", rollout.state, to_state, "advance", "why not")
    return replace(made, **changes)  # type: ignore[arg-type]


# Rollouts, routes and decisions ----------------------------------------------------------------------------


def test_an_empty_ledger_routes_to_nothing(ledger: Ledger) -> None:
    route = ledger.route()
    assert (route.revision, route.rollout_id, route.treatment, route.weight, route.state) == (
        0,
        None,
        None,
        0,
        "none",
    )


def test_a_rollout_comes_back_as_it_was_stored(ledger: Ledger) -> None:
    made = started(ledger, groups=[GroupSpec("DIS=1", 0.1, -0.2)], positive=0, override_reason="for the demo")
    assert ledger.rollout(made.id) == made == ledger.active_rollout() == ledger.rollouts()[0]
    assert made.id == "toy-1"


def test_the_route_shows_what_workers_need(ledger: Ledger) -> None:
    made = started(ledger)
    route = ledger.route()
    assert (route.rollout_id, route.control, route.treatment) == (made.id, CONTROL, TREATMENT)
    assert (route.mirror_rate, route.label_deadline_s, route.latency_slo_ms) == (0.5, 77, 40)
    assert route.revision == made.revision == ledger.revision() == 1


@pytest.mark.parametrize("threshold", [None, 0.8175744761936437])
def test_a_cascades_threshold_is_stored_and_routed_by(ledger: Ledger, threshold: float | None) -> None:
    made = started(ledger, cascade_threshold=threshold)
    assert ledger.rollout(made.id).cascade_threshold == threshold
    assert ledger.route().cascade_threshold == threshold


def test_a_rollout_stored_before_there_were_cascades_has_none(ledger: Ledger) -> None:
    made = started(ledger)
    stored = json.loads(rollout_to_json(made))
    del stored["cascade_threshold"], stored["policy"]["cascade"]
    assert rollout_from_json(json.dumps(stored)) == made


def test_a_rollout_stored_before_the_mirrors_rate_could_change_has_that_of_its_policy(ledger: Ledger) -> None:
    made = started(ledger)
    stored = json.loads(rollout_to_json(made))
    del stored["mirror_rate"], stored["mirror_raised_at"], stored["policy"]["promoted_pairs_per_s"]
    assert made.mirror_rate == 0.5
    assert rollout_from_json(json.dumps(stored)) == made


def test_a_change_of_the_mirrors_rate_is_routed_and_is_no_revision_of_the_rollout(ledger: Ledger) -> None:
    made = started(ledger)
    lowered = ledger.set_mirror_rate(made, 0.1, START + 5)
    assert lowered == replace(made, mirror_rate=0.1, version=made.version + 1)
    assert ledger.rollout(made.id) == lowered
    assert (ledger.route().mirror_rate, ledger.route().revision) == (0.1, made.revision + 1)
    raised = ledger.set_mirror_rate(lowered, 0.2, START + 9)
    assert raised is not None
    assert raised.mirror_raised_at == START + 9
    assert [d.verb for d in ledger.decisions(made.id)] == ["start"]


def test_of_a_decision_and_a_change_of_the_rate_the_first_wins(ledger: Ledger) -> None:
    made = started(ledger)
    held = ledger.apply(made, changed(made, state="held"), decided(made, "held"))
    assert held is not None
    assert ledger.set_mirror_rate(made, 0.1, START) is None
    assert ledger.rollout(made.id) == held
    assert ledger.set_mirror_rate(held, 0.1, START) is not None
    assert ledger.apply(held, changed(held, state="shadowing"), None) is None
    assert (ledger.rollout(made.id).state, ledger.rollout(made.id).mirror_rate) == ("held", 0.1)


def test_the_mirrors_work_is_added_up_by_time_bucket(ledger: Ledger) -> None:
    made = started(ledger)
    bucket = bucket_of(START)
    for at, requests, samples, micros in ((-9, 99, 99, 99), (0, 7, 3, 1500), (2, 9, 4, 2500)):
        deltas = {
            TallyKey("requests", "control", bucket + at): {0: requests, 1: 50},
            TallyKey("requests", "treatment", bucket + at): {0: 1},
            TallyKey("mirror", "samples", bucket + at): {0: samples},
            TallyKey("mirror", "microseconds", bucket + at): {0: micros},
        }
        assert ledger.add_counts("g", at + 10, {(made.id, key): n for key, n in deltas.items()})
    assert ledger.mirror_counts(made.id, START) == [
        MirrorCounts(bucket * 10.0, 8, 3, 0.0015),
        MirrorCounts(bucket * 10.0 + 20, 10, 4, 0.0025),
    ]


def test_a_huge_record_is_judged_and_not_kept(ledger: Ledger) -> None:
    made = started(ledger)
    long = "é" * 8000
    assert (
        ledger.record_pairs(
            [row(made.id, "q1", record={"x": long}), row(made.id, "q2", record={"x": 2 * long})]
        )
        == 2
    )
    assert [pair.record for pair in ledger.recent_pairs(made.id)] == [{"x": long}, {}]


def test_an_override_is_recorded_with_its_reason(ledger: Ledger) -> None:
    made = started(ledger, override_reason="for the demo")
    first = ledger.decisions(made.id)[0]
    assert (first.verb, first.actor, first.override, first.reason) == ("start", "ada", True, "for the demo")


def test_a_second_rollout_is_refused_while_one_is_under_way(ledger: Ledger) -> None:
    made = started(ledger)
    with pytest.raises(RolloutConflict, match=made.id):
        started(ledger)


@pytest.mark.parametrize("state", ["promoted", "rolled_back"])
def test_a_finished_rollout_makes_way_for_the_next_and_keeps_its_state(ledger: Ledger, state: str) -> None:
    first = started(ledger)
    ledger.apply(first, changed(first, state=state), None)
    second = started(ledger)
    assert ledger.active_rollout() == second
    assert (ledger.rollout(first.id).state, ledger.rollout(first.id).active) == (state, False)


def test_an_unknown_rollout_is_not_found(ledger: Ledger) -> None:
    for ask in (ledger.rollout, ledger.cursor, ledger.pair_stats):
        with pytest.raises(RolloutNotFound, match="toy-9"):
            ask("toy-9")


def test_a_rolled_back_rollout_is_routed_no_traffic_and_mirrored_nothing(ledger: Ledger) -> None:
    made = started(ledger)
    ledger.apply(made, changed(made, state="rolled_back"), None)
    route = ledger.route()
    assert (route.rollout_id, route.state, route.weight, route.mirror_rate) == (made.id, "rolled_back", 0, 0)


def test_the_revision_rises_with_the_route_and_only_then(ledger: Ledger) -> None:
    made = started(ledger)
    noted = ledger.apply(made, changed(made, alerted=("latency_p95",)), None)
    assert noted is not None
    assert ledger.revision() == made.revision
    moved = ledger.apply(noted, changed(noted, weight=5), None)
    assert moved is not None
    assert ledger.revision() == moved.revision == made.revision + 1


def test_of_two_changes_to_the_same_version_one_wins_and_the_other_changes_nothing(ledger: Ledger) -> None:
    made = started(ledger)
    assert ledger.apply(made, changed(made, state="held"), decided(made, "held")) is not None
    assert ledger.apply(made, changed(made, state="warmup"), decided(made)) is None
    assert ledger.rollout(made.id).state == "held"
    assert [d.to_state for d in ledger.decisions(made.id)] == ["pending", "held"]


def test_a_decision_comes_back_as_it_was_written_with_its_number_and_revision(ledger: Ledger) -> None:
    made = started(ledger)
    decision = decided(
        made, guardrail="group_harm", group="DIS=1", evidence_log10=4.2, limit_log10=4.0, drop=0.1, pairs=9
    )
    stored = ledger.apply(made, changed(made, state="warmup"), decision)
    assert stored is not None
    head = ledger.verify_decisions().head
    assert ledger.decisions(made.id)[-1] == replace(decision, seq=2, revision=stored.revision, digest=head)


@pytest.mark.parametrize("statement", ["DELETE FROM decisions", "UPDATE decisions SET reason = 'better'"])
def test_decisions_cannot_be_rewritten(ledger: Ledger, statement: str) -> None:
    started(ledger)
    db = sqlite3.connect(ledger.path)
    with pytest.raises(sqlite3.IntegrityError, match="decisions are never"):
        db.execute(statement)
    db.close()


def test_effect_and_alert_times_are_noted_once(ledger: Ledger) -> None:
    made = started(ledger)
    assert [d.seq for d in ledger.ineffective_decisions()] == [1]
    ledger.mark_effective(1, START + 2)
    ledger.mark_effective(1, START + 9)
    assert ledger.ineffective_decisions() == []
    assert ledger.decisions(made.id)[0].seconds_to_effect == 2


def test_only_decisions_worth_an_alert_wait_for_one(ledger: Ledger) -> None:
    made = started(ledger)
    stored = ledger.apply(made, changed(made, state="warmup"), decided(made))
    assert stored is not None
    assert ledger.undelivered_decisions() == []
    ledger.apply(stored, changed(stored, state="rolled_back"), decided(stored, "rolled_back"))
    assert [d.to_state for d in ledger.undelivered_decisions()] == ["rolled_back"]
    ledger.mark_alerted(3, START)
    assert ledger.undelivered_decisions() == []


def test_one_holder_has_the_lease_until_it_runs_out_or_is_given_back(ledger: Ledger) -> None:
    assert ledger.acquire_lease("a", 5, START)
    assert ledger.acquire_lease("a", 5, START + 3)
    assert not ledger.acquire_lease("b", 5, START + 7)
    assert ledger.acquire_lease("b", 5, START + 8)
    assert not ledger.acquire_lease("a", 5, START + 9)
    ledger.release_lease("b")
    assert ledger.acquire_lease("a", 5, START + 9)


def test_a_lease_that_nobody_could_have_taken_is_void(ledger: Ledger) -> None:
    assert ledger.acquire_lease("dead", 5, START + 3600)
    assert ledger.acquire_lease("b", 5, START)
    assert not ledger.acquire_lease("c", 5, START - 2)


def test_undelivered_decisions_are_read_in_pages_newest_first(ledger: Ledger) -> None:
    rollout = started(ledger)
    for _ in range(5):
        rollout = ledger.apply(rollout, changed(rollout), decided(rollout, "held")) or rollout
    first = ledger.undelivered_decisions(limit=3)
    rest = ledger.undelivered_decisions(limit=3, before=first[-1].seq)
    assert [d.seq for d in (*first, *rest)] == [6, 5, 4, 3, 2]


# The chain of decisions ------------------------------------------------------------------------------------


def decide(ledger: Ledger, number: int, **changes: object) -> Rollout:
    """A rollout with so many decisions, its start among them."""
    rollout = started(ledger)
    for _ in range(number - 1):
        rollout = ledger.apply(rollout, changed(rollout), decided(rollout, "held", **changes)) or rollout
    return rollout


def tamper(path: Path, *statements: str) -> None:
    """Write to the file as somebody does who knows of the triggers."""
    db = sqlite3.connect(path)
    for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        db.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


def test_a_ledger_without_decisions_has_a_whole_chain(ledger: Ledger) -> None:
    assert ledger.verify_decisions() == Verified(0, GENESIS, None)


def test_every_decision_is_a_link_and_every_head_stays_in_the_chain(ledger: Ledger) -> None:
    rollout = started(ledger)
    heads = [ledger.verify_decisions().head]
    for _ in range(3):
        rollout = ledger.apply(rollout, changed(rollout), decided(rollout, "held")) or rollout
        heads.append(ledger.verify_decisions().head)
    assert len(set(heads)) == 4
    assert {ledger.verify_decisions(head) for head in [*heads, GENESIS]} == {Verified(4, heads[-1], None)}


def test_times_of_effect_and_alert_leave_the_chain_whole(ledger: Ledger) -> None:
    decide(ledger, 3)
    before = ledger.verify_decisions()
    ledger.mark_effective(2, START + 2)
    ledger.mark_alerted(2, START + 3)
    assert ledger.verify_decisions() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"at": 5, "evidence_at": 2**53 + 1},
        {"drop": -0.0, "evidence_log10": float("nan"), "limit_log10": float("-inf")},
        {"evidence_log10": 0.1 + 0.2, "drop": 5e-324, "at": 1e300},
        {"reason": "é\x00\n😀'\"\\", "guardrail": "", "group": "\u2028"},
        {"pairs": 2**62, "labels": -1, "override": True, "weight": 100},
    ],
)
def test_what_sqlite_makes_of_a_decision_is_what_its_digest_is_of(
    ledger: Ledger, changes: dict[str, object]
) -> None:
    decide(ledger, 3, **changes)
    assert (ledger.verify_decisions().count, ledger.verify_decisions().problem) == (3, None)


@pytest.mark.parametrize("column", [*FIELDS, "digest"])
def test_a_decision_that_was_changed_behind_the_triggers_is_found(ledger: Ledger, column: str) -> None:
    decide(ledger, 4)
    value = "9" if column in ("seq", "pairs", "labels", "weight", "override", "revision") else "'toy-9'"
    tamper(ledger.path, f"UPDATE decisions SET {column} = {value} WHERE seq = 2")
    verified = ledger.verify_decisions()
    assert verified.problem is not None
    assert (verified.count, verified.problem.seq) == (1, 2)


def test_text_that_is_no_text_is_found(ledger: Ledger) -> None:
    decide(ledger, 2)
    for value in ("CAST(reason AS BLOB)", "CAST(x'ff' AS TEXT)", "x'ff'"):
        tamper(ledger.path, f"UPDATE decisions SET reason = {value} WHERE seq = 1")
        problem = ledger.verify_decisions().problem
        assert problem is not None
        assert (problem.seq, problem.how) == (1, "changed")
    assert ledger.rollouts()[0].id == "toy-1"


def test_a_decision_that_was_replaced_past_the_triggers_is_found(ledger: Ledger) -> None:
    decide(ledger, 3)
    db = sqlite3.connect(ledger.path)
    columns = ", ".join(["'better'" if name == "reason" else name for name in [*FIELDS, "digest"]])
    db.execute(
        f"INSERT OR REPLACE INTO decisions ({', '.join(FIELDS)}, digest) SELECT {columns} FROM decisions WHERE seq = 2"
    )
    db.commit()
    db.close()
    problem = ledger.verify_decisions().problem
    assert problem is not None
    assert (problem.seq, problem.how) == (2, "changed")


def test_a_decision_that_was_taken_out_is_found(ledger: Ledger) -> None:
    decide(ledger, 5)
    tamper(ledger.path, "DELETE FROM decisions WHERE seq IN (2, 3)")
    problem = ledger.verify_decisions().problem
    assert problem is not None
    assert (problem.seq, problem.text) == (2, "decisions 2 to 3 are missing")


def test_an_end_that_was_cut_off_is_found_and_stays_so(ledger: Ledger) -> None:
    rollout = decide(ledger, 4)
    tamper(ledger.path, "DELETE FROM decisions WHERE seq > 2")
    problem = ledger.verify_decisions().problem
    assert problem is not None
    assert (problem.seq, problem.text) == (3, "decisions 3 to 4 are missing")
    assert ledger.apply(rollout, changed(rollout), decided(rollout, "held")) is not None
    assert [d.seq for d in ledger.decisions()] == [1, 2, 5]
    assert ledger.verify_decisions().problem == problem


def test_an_end_that_was_cut_off_with_its_count_is_found_by_a_head_noted_earlier(ledger: Ledger) -> None:
    decide(ledger, 3)
    kept = ledger.verify_decisions().head
    ledger.apply(ledger.rollout("toy-1"), ledger.rollout("toy-1"), decided(ledger.rollout("toy-1"), "held"))
    lost = ledger.verify_decisions().head
    tamper(
        ledger.path,
        "DELETE FROM decisions WHERE seq > 3",
        "UPDATE sqlite_sequence SET seq = 3 WHERE name = 'decisions'",
    )
    assert ledger.verify_decisions() == ledger.verify_decisions(kept) == Verified(3, kept, None)
    problem = ledger.verify_decisions(lost).problem
    assert problem is not None
    assert (problem.seq, problem.how) == (None, "unknown")


def test_a_decision_without_a_digest_is_not_taken(ledger: Ledger) -> None:
    made = started(ledger)
    db = sqlite3.connect(ledger.path)
    with pytest.raises(sqlite3.IntegrityError, match="needs a digest"):
        db.execute(
            "INSERT INTO decisions (rollout_id, at, actor, from_state, to_state, verb, reason, pairs, labels, "
            "weight, override, revision, digest) VALUES (?, 0, '', '', '', '', '', 0, 0, 0, 0, 0, '')",
            (made.id,),
        )
    db.close()


# Inputs ----------------------------------------------------------------------------------------------------


def test_a_pair_is_stored_once_however_often_it_is_sent(ledger: Ledger) -> None:
    made = started(ledger)
    rows = [row(made.id, "q1"), row(made.id, "q1", 1), row(made.id, "q2")]
    assert ledger.record_pairs(rows) == 3
    assert ledger.record_pairs([*rows, row(made.id, "q3")]) == 1


def test_pairs_and_counts_of_an_unknown_rollout_are_dropped(ledger: Ledger) -> None:
    assert ledger.record_pairs([row("toy-9", "q1")]) == 0
    assert ledger.add_counts("g1", 1, {("toy-9", TallyKey("requests", "control", 1)): {0: 5}})


def test_the_first_label_of_a_record_wins(ledger: Ledger) -> None:
    first = ledger.record_labels([LabelRow("q1", 0, 1, START), LabelRow("q1", 1, 0, START)])
    again = ledger.record_labels([LabelRow("q1", 0, 1, START + 1), LabelRow("q1", 1, 1, START + 1)])
    assert (first.accepted, first.duplicates, first.conflicts) == (2, 0, 0)
    assert (again.accepted, again.duplicates, again.conflicts) == (0, 1, 1)


# Corrections -----------------------------------------------------------------------------------------------


def fix(request: str, label: int, at: float = START, index: int = 0) -> LabelRow:
    return LabelRow(request, index, label, at, correction=True)


def corrections(ledger: Ledger) -> list[tuple[object, ...]]:
    with ledger._store.reading() as db:
        return db.execute("SELECT request_id, idx, was, label, at FROM corrections ORDER BY seq").fetchall()


def test_a_correction_replaces_the_label_and_its_arrival_and_what_was_before_is_kept(ledger: Ledger) -> None:
    made = started(ledger)
    ledger.record_pairs([row(made.id, "q1")])
    ledger.record_labels([LabelRow("q1", 0, 1, START + 1)])
    assert ledger.record_labels([fix("q1", 0, START + 5)]) == FeedbackResult(corrected=1)
    assert ledger.record_labels([fix("q1", 1, START + 7)]) == FeedbackResult(corrected=1)
    (pair,) = ledger.recent_pairs(made.id)
    assert (pair.label, pair.labelled_at) == (1, START + 7)
    assert corrections(ledger) == [("q1", 0, 1, 0, START + 5), ("q1", 0, 0, 1, START + 7)]


def test_a_correction_of_nothing_is_a_label_and_one_that_says_the_same_a_duplicate(ledger: Ledger) -> None:
    assert ledger.record_labels([fix("q1", 1)]) == FeedbackResult(accepted=1)
    assert ledger.record_labels([fix("q1", 1, START + 5)]) == FeedbackResult(duplicates=1)
    assert corrections(ledger) == []


def test_after_a_correction_the_first_label_is_the_conflict(ledger: Ledger) -> None:
    ledger.record_labels([LabelRow("q1", 0, 1, START), fix("q1", 0)])
    again = ledger.record_labels([LabelRow("q1", 0, 0, START), LabelRow("q1", 0, 1, START)])
    assert again == FeedbackResult(duplicates=1, conflicts=1)


def test_a_correction_is_too_late_once_the_active_rollout_has_counted_the_pair(ledger: Ledger) -> None:
    first = started(ledger)
    ledger.record_pairs([row(first.id, "old")])
    ledger.commit_progress(first.id, 0, Cursor(), Cursor(labels_seq=1), {})
    ledger.apply(first, changed(first, state="rolled_back"), None)
    made = started(ledger)
    ledger.record_pairs([row(made.id, f"q{i}") for i in range(2)])
    ledger.record_labels([LabelRow(name, 0, 1, START) for name in ("old", "q0", "q1", "unpaired")])
    ledger.commit_progress(made.id, 0, Cursor(), Cursor(labels_seq=2), {})
    result = ledger.record_labels([fix(name, 0) for name in ("old", "q0", "q1", "unpaired")])
    assert result == FeedbackResult(corrected=3, too_late=1)


def test_a_count_that_may_have_read_the_label_before_its_correction_is_not_taken(ledger: Ledger) -> None:
    made = started(ledger)
    ledger.record_pairs([row(made.id, "q1")])
    ledger.record_labels([LabelRow("q1", 0, 1, START)])
    cursor, known = ledger.cursor(made.id), ledger.last_correction()
    ledger.record_labels([fix("q1", 0)])
    assert not ledger.commit_progress(made.id, 0, cursor, replace(cursor, labels_seq=1), {}, known)
    # Of a pair that is not counted now a correction makes no difference.
    assert ledger.commit_progress(made.id, 0, cursor, replace(cursor, answers_seq=1), {}, known)
    again = ledger.cursor(made.id)
    assert ledger.commit_progress(
        made.id, 0, again, replace(again, labels_seq=1), {}, ledger.last_correction()
    )


def test_a_label_is_corrected_so_many_times_and_no_more(ledger: Ledger) -> None:
    ledger.record_labels([LabelRow("q1", 0, 0, START)])
    results = [ledger.record_labels([fix("q1", 1 - i % 2)]) for i in range(MAX_CORRECTIONS + 2)]
    assert sum(result.corrected for result in results) == len(corrections(ledger)) == MAX_CORRECTIONS
    assert [result.conflicts for result in results[-2:]] == [1, 0]  # The last one says what the label is.


@pytest.mark.parametrize("statement", ["UPDATE corrections SET was = 0", "UPDATE corrections SET at = 0"])
def test_corrections_cannot_be_rewritten(ledger: Ledger, statement: str) -> None:
    ledger.record_labels([LabelRow("q1", 0, 0, START), fix("q1", 1)])
    with pytest.raises(LedgerUnavailable, match="never changed"), ledger._store.writing() as db:
        db.execute(statement)


def test_corrections_go_when_their_labels_go(ledger: Ledger) -> None:
    made = started(ledger)
    ledger.record_pairs([row(made.id, f"q{i}") for i in range(2)])
    for name in ("q0", "q1", "lone"):
        ledger.record_labels([LabelRow(name, 0, 0, START), LabelRow(name, 1, 0, START)])
        ledger.record_labels([fix(name, 1), fix(name, 1, index=1)])
    cursor = ledger.cursor(made.id)
    counted = replace(cursor, answers_seq=2, labels_seq=2, answered=2, resolved=2)
    ledger.commit_progress(made.id, 0, cursor, counted, {}, ledger.last_correction())
    assert ledger.prune(made.id, START, keep=1) == 1
    kept = [("lone", 0), ("lone", 1), ("q0", 1), ("q1", 0), ("q1", 1)]
    assert sorted(found[:2] for found in corrections(ledger)) == kept
    swept(ledger, START + 8 * DAY)
    assert [found[:2] for found in corrections(ledger)] == [("q1", 0)]


# Rewards ---------------------------------------------------------------------------------------------------


def rewards_in(ledger: Ledger) -> set[str]:
    with ledger._store.reading() as db:
        return {found[0] for found in db.execute("SELECT request_id FROM rewards")}


def test_the_first_reward_of_a_request_stands(ledger: Ledger) -> None:
    given = [RewardRow("q1", 0.5, START), RewardRow("q1", 0.5, START + 1), RewardRow("q1", 1.0, START + 2)]
    assert ledger.record_feedback([], given) == FeedbackResult(accepted=1, duplicates=1, conflicts=1)


def test_pairs_are_read_with_the_arm_that_served_and_its_reward(ledger: Ledger) -> None:
    made = started(ledger)
    ledger.record_feedback([], [RewardRow("q1", 0.5, START + 3)])
    rows = [
        row(made.id, "q1"),
        row(made.id, "q2", served_arm="treatment"),
        row(made.id, "q3", treatment=None),
    ]
    ledger.record_pairs(rows)
    with ledger.rewarded_after(made.id, 0, 2) as pairs:
        found = list(pairs)
    assert found == [
        RewardedPair(1, "control", True, START, 0.5, START + 3),
        RewardedPair(2, "treatment", True, START),
    ]
    with ledger.rewarded_after(made.id, 2, 10) as pairs:
        assert list(pairs) == [RewardedPair(3, "control", False, START)]


@pytest.mark.parametrize(("enabled", "gone"), [(False, 4), (True, 2)])
def test_pruning_leaves_pairs_that_wait_for_a_reward_where_a_guardrail_asks_for_it(
    ledger: Ledger, enabled: bool, gone: int
) -> None:
    policy = parse_policy({"guardrails": {"reward": {"enabled": enabled}}})
    made = started(ledger, policy=policy)
    ledger.record_pairs([row(made.id, f"q{i}") for i in range(6)])
    ledger.record_feedback([], [RewardRow(f"q{i}", 1.0, START) for i in range(6)])
    counted = Cursor(answers_seq=6, labels_seq=6, answered=6, resolved=6, rewards_seq=2)
    ledger.commit_progress(made.id, 0, Cursor(), counted, {})
    assert ledger.prune(made.id, START, keep=2) == gone
    assert rewards_in(ledger) == set(pairs_of(ledger, made.id)) == {f"q{i}" for i in range(gone, 6)}


def test_old_rewards_without_a_pair_are_swept_after_their_deadline(ledger: Ledger) -> None:
    made = started(ledger)
    ledger.record_pairs([row(made.id, "paired")])
    ledger.record_feedback([], [RewardRow(name, 1.0, START) for name in ("paired", *"abcd")])
    ledger.sweep(START + 20 * DAY, reward_deadline_s=21 * DAY)
    assert len(rewards_in(ledger)) == 5
    swept(ledger, START + 8 * DAY, limit=3)
    assert rewards_in(ledger) == {"paired"}


def test_a_label_may_come_before_its_pair(ledger: Ledger) -> None:
    made = started(ledger)
    ledger.record_labels([LabelRow("q1", 0, 1, START + 3)])
    ledger.record_pairs([row(made.id, "q1")])
    with ledger.pairs_after(made.id, 0, 10) as pairs:
        found = list(pairs)
    assert (found[0].label, found[0].labelled_at, found[0].groups) == (1, START + 3, {"DIS": "1"})


def test_pairs_are_read_in_arrival_order_from_a_place_on(ledger: Ledger) -> None:
    made = started(ledger)
    ledger.record_pairs([row(made.id, f"q{i}") for i in (3, 1, 2)])
    with ledger.pairs_after(made.id, 0, 10) as pairs:
        found = list(pairs)
    assert [p.request_id for p in found] == ["q3", "q1", "q2"]
    with ledger.pairs_after(made.id, found[0].seq, 1) as pairs:
        assert [p.request_id for p in pairs] == ["q1"]


def test_reports_see_records_predictions_and_labels_of_the_newest_pairs(ledger: Ledger) -> None:
    made = started(ledger)
    ledger.record_pairs([row(made.id, f"q{i}", treatment=None) for i in range(5)])
    ledger.record_labels([LabelRow("q4", 0, 1, START + 2), LabelRow("q3", 0, 1, START + 4)])
    newest = ledger.recent_pairs(made.id, 2)
    assert [p.request_id for p in newest] == ["q3", "q4"]
    assert (newest[1].record, newest[1].control, newest[1].treatment) == ({"age": 40, "text": "é"}, 1, None)
    stats = ledger.pair_stats(made.id)
    assert (stats.label_lag_median_s, stats.label_lag_p95_s) == (3.0, pytest.approx(3.9))


def test_a_flush_is_counted_once_however_often_it_is_sent(ledger: Ledger) -> None:
    made = started(ledger)
    deltas = {(made.id, TallyKey("requests", "control", 7)): {0: 5, 1: 1}}
    assert ledger.add_counts("g1", 1, deltas)
    assert not ledger.add_counts("g1", 1, deltas)
    assert ledger.add_counts("g1", 2, deltas)
    assert ledger.add_counts("g2", 1, deltas)
    assert ledger.totals(made.id, 0) == {("requests", "control"): {0: 15, 1: 3}}


def test_counts_of_buckets_add_up_to_the_totals(ledger: Ledger) -> None:
    made = started(ledger)
    for bucket in range(4):
        deltas = {(made.id, TallyKey("latency_p95", "treatment", bucket)): {0: 30 + bucket, 1: bucket}}
        deltas[made.id, TallyKey("latency_p95", "control", bucket)] = {0: 9}
        ledger.add_counts("g1", bucket + 1, deltas)
    blocks, costs = ledger.blocks_after(made.id, 0, 3)
    assert costs == {}
    assert blocks == {
        1: {"treatment": {0: 31, 1: 1}, "control": {0: 9, 1: 0}},
        2: {"treatment": {0: 32, 1: 2}, "control": {0: 9, 1: 0}},
    }
    assert ledger.totals(made.id, 0) == {
        ("latency_p95", "treatment"): {0: 126, 1: 6},
        ("latency_p95", "control"): {0: 36},
    }


def test_flow_tells_when_requests_began_and_how_many_came_after_a_moment(ledger: Ledger) -> None:
    made = started(ledger)
    for i, bucket in enumerate((3, 5, 6)):
        ledger.add_counts("g1", i + 1, {(made.id, TallyKey("requests", "control", bucket)): {0: 10}})
    flow = ledger.flow_after(made.id, 39.0)
    assert (flow.since, flow.requests, flow.last_at) == (50, 20, 70)
    assert ledger.flow_after(made.id, 65.0).requests == 0


def test_only_workers_that_beat_of_late_are_live(ledger: Ledger) -> None:
    beat = WorkerBeat("g1", "Gateway", 7, 3, START, (CONTROL,), None, START)
    ledger.heartbeat(beat)
    ledger.heartbeat(replace(beat, worker_id="g2", at=START - 10))
    ledger.heartbeat(replace(beat, revision=4))
    assert ledger.workers(START + 1) == [replace(beat, revision=4)]


def test_a_cursor_moves_together_with_its_counts_or_not_at_all(ledger: Ledger) -> None:
    made = started(ledger)
    tallies = {TallyKey("accuracy_drop", "", 1): {0: 4}}
    assert ledger.commit_progress(made.id, 0, Cursor(), Cursor(labels_seq=4, resolved=4), tallies)
    assert not ledger.commit_progress(made.id, 0, Cursor(), Cursor(labels_seq=4, resolved=4), tallies)
    assert ledger.cursor(made.id).labels_seq == 4
    assert ledger.totals(made.id, 0) == {("accuracy_drop", ""): {0: 4}}


def test_counts_are_not_added_to_an_epoch_that_is_over(ledger: Ledger) -> None:
    made = started(ledger)
    ledger.apply(made, changed(made, epoch=1, state="promoted"), None)
    assert not ledger.commit_progress(made.id, 0, Cursor(), Cursor(labels_seq=1), {})


def test_pruning_keeps_the_newest_pairs_and_never_one_that_is_not_counted(ledger: Ledger) -> None:
    made = started(ledger)
    ledger.record_pairs([row(made.id, f"q{i}") for i in range(10)])
    ledger.record_labels([LabelRow(f"q{i}", 0, 1, START) for i in range(10)])
    assert ledger.prune(made.id, START, keep=4) == 0
    ledger.commit_progress(
        made.id, 0, Cursor(), Cursor(answers_seq=10, labels_seq=8, answered=10, resolved=8), {}
    )
    assert ledger.prune(made.id, START, keep=4, limit=3) == 3
    assert ledger.prune(made.id, START, keep=4, limit=3) == 1
    assert ledger.prune(made.id, START, keep=4, limit=3) == 0
    assert [p.request_id for p in ledger.recent_pairs(made.id)] == [f"q{i}" for i in range(4, 10)]
    assert ledger.record_labels([LabelRow("q9", 0, 1, START)]).duplicates == 1


DAY = 86400.0


def swept(ledger: Ledger, now: float, **more: int) -> None:
    """Sweep for as long as anything may be left to do."""
    for _ in range(30):
        ledger.sweep(now, 77, **more)


def pairs_of(ledger: Ledger, rollout_id: str) -> list[str]:
    return [p.request_id for p in ledger.recent_pairs(rollout_id)]


def labels_in(ledger: Ledger) -> set[str]:
    with ledger._store.reading() as db:
        return {row[0] for row in db.execute("SELECT request_id FROM labels")}


def test_old_labels_without_a_pair_are_swept_and_all_others_are_kept(ledger: Ledger) -> None:
    made = started(ledger)
    ledger.record_labels([LabelRow(f"lone{i}", 0, 1, START) for i in range(10)])
    ledger.record_pairs([row(made.id, "paired")])
    ledger.record_labels([LabelRow("paired", 0, 1, START), LabelRow("new", 0, 1, START + 2 * DAY)])
    swept(ledger, START + 6 * DAY, limit=3)
    assert len(labels_in(ledger)) == 12
    swept(ledger, START + 8 * DAY, limit=3)
    assert labels_in(ledger) == {"paired", "new"}


def test_labels_are_kept_as_long_as_the_deadline_may_want_them(ledger: Ledger) -> None:
    ledger.record_labels([LabelRow("lone", 0, 1, START)])
    ledger.sweep(START + 20 * DAY, label_deadline_s=21 * DAY)
    assert labels_in(ledger) == {"lone"}


def test_one_sweep_deletes_no_more_than_its_limit_and_says_that_there_may_be_more(ledger: Ledger) -> None:
    ledger.record_labels([LabelRow(f"lone{i}", 0, 1, START) for i in range(5)])
    assert ledger.sweep(START + 8 * DAY, limit=3)
    assert len(labels_in(ledger)) == 2
    assert not ledger.sweep(START + 8 * DAY, limit=3)
    assert labels_in(ledger) == set()


def test_of_replaced_rollouts_the_newest_pairs_are_kept_for_a_month(ledger: Ledger) -> None:
    ids = []
    for number in range(3):
        made = started(ledger)
        ids.append(made.id)
        ledger.record_pairs([row(made.id, f"{number}-{i}") for i in range(10)])
        ledger.add_counts("g1", number + 1, {(made.id, TallyKey("requests", "control", 7)): {0: 5}})
        if number < 2:
            ledger.apply(made, changed(made, state="rolled_back"), None)
    swept(ledger, START + DAY, keep=4, limit=3)
    kept = [f"{n}-{i}" for n in range(2) for i in range(6, 10)]
    assert [p for i in ids[:2] for p in pairs_of(ledger, i)] == kept
    assert len(pairs_of(ledger, ids[2])) == 10  # It is active: `prune` sees to it.
    with ledger._store.reading() as db:
        assert [r[0] for r in db.execute("SELECT rollout_id FROM tallies")] == [ids[2]]
    assert ledger.totals(ids[0], 0) == {("requests", "control"): {0: 5}}
    swept(ledger, START + 31 * DAY, keep=4, limit=3)
    assert pairs_of(ledger, ids[0]) == pairs_of(ledger, ids[1]) == []
    assert len(pairs_of(ledger, ids[2])) == 10


def test_sweeping_finds_a_labels_pair_by_an_index(ledger: Ledger) -> None:
    started(ledger)
    with ledger._store.reading() as db:
        plan = db.execute(
            "EXPLAIN QUERY PLAN SELECT 1 FROM labels WHERE NOT EXISTS "
            "(SELECT 1 FROM pairs p WHERE p.request_id = labels.request_id AND p.idx = labels.idx)"
        ).fetchall()
    assert any("SEARCH p USING COVERING INDEX pair_key" in line[3] for line in plan)


def test_the_newest_pairs_that_lack_an_answer_are_counted(ledger: Ledger) -> None:
    made = started(ledger)
    assert ledger.recent_missing(made.id) == (0, 0)
    ledger.record_pairs([row(made.id, f"a{i}") for i in range(5)])
    ledger.record_pairs([row(made.id, f"b{i}", treatment=None) for i in range(3)])
    assert ledger.recent_missing(made.id) == (3, 8)
    assert ledger.recent_missing(made.id, among=4) == (3, 4)


# What earlier versions stored -------------------------------------------------------------------------------


def old_ledger(path: Path, tables: str) -> Rollout:
    """A file as an earlier version left it: a rollout with three decisions, and a pair."""
    rollout = Rollout("toy-1", "toy", CONTROL, TREATMENT, POLICY, revision=1, created_at=START)
    db = sqlite3.connect(path)
    db.executescript(f"PRAGMA journal_mode=WAL; {tables}")
    db.execute(
        "INSERT INTO rollouts VALUES ('toy-1', 1, 0, 'pending', 0, 1, ?, ?)",
        (START, rollout_to_json(rollout)),
    )
    db.execute("INSERT INTO cursors VALUES ('toy-1', 0, ?)", (cursor_to_json(Cursor()),))
    db.execute(
        "INSERT INTO pairs VALUES (1, 'toy-1', 'q1', 0, 'control', 1, 0, 0.9, 0.8, '{}', '{}', ?)", (START,)
    )
    digest = GENESIS
    for seq, (reason, evidence) in enumerate((("first", None), ("é", 4.25), ("third", 0.0)), 1):
        values = (
            *(seq, "toy-1", START, "ada", "", "pending", "start", reason, "group_harm", "DIS=1", evidence),
            *(4.0, 0.1, 7, 3, 5, None, 1, 1, START + 2, None),
        )
        if tables == FORMAT_3:
            columns = [name for _, name, *_ in db.execute("PRAGMA table_info(decisions)")]
            digest = link(digest, dict(zip(columns, values, strict=False)))
            values = (*values, digest)
        db.execute(f"INSERT INTO decisions VALUES ({', '.join('?' for _ in values)})", values)
    db.execute("UPDATE meta SET value = 1 WHERE key = 'revision'")
    db.commit()
    db.close()
    return rollout


def shape(path: Path) -> tuple[list[tuple[object, ...]], list[tuple[object, ...]]]:
    """The columns of all tables, and the indexes and triggers, of a ledger."""
    db = sqlite3.connect(path)
    columns = db.execute(
        'SELECT m.name, t.name, t.type, t."notnull", t.pk FROM sqlite_master m, pragma_table_info(m.name) t '
        "WHERE m.type IN ('table', 'view') ORDER BY m.name, t.cid"
    ).fetchall()
    others = db.execute(
        "SELECT name, sql FROM sqlite_master WHERE type IN ('index', 'trigger') ORDER BY name"
    ).fetchall()
    db.close()
    return columns, others


@pytest.mark.parametrize("tables", [FORMAT_1, FORMAT_2, FORMAT_3], ids=["format 1", "format 2", "format 3"])
def test_a_ledger_of_an_earlier_format_is_brought_up_to_date(
    tmp_path: Path, ledger: Ledger, tables: str
) -> None:
    made = old_ledger(tmp_path / "old.db", tables)
    old = Ledger(tmp_path / "old.db")
    assert old.rollout("toy-1") == made
    assert old.record_pairs([row("toy-1", "q1"), row("toy-1", "q2")]) == 1
    old.sweep(START)
    assert [(d.seq, d.reason, d.evidence_log10, d.effective_at) for d in old.decisions()] == [
        (1, "first", None, START + 2),
        (2, "é", 4.25, START + 2),
        (3, "third", 0.0, START + 2),
    ]
    before = old.verify_decisions()
    assert (before.count, before.problem) == (3, None)
    assert old.apply(made, changed(made, state="held"), decided(made, "held")) is not None
    after = old.verify_decisions(before.head)
    assert (after.count, after.problem) == (4, None)
    assert old.record_feedback([LabelRow("q1", 0, 1, START)], [RewardRow("q1", 1.0, START)]).accepted == 2
    assert old.record_labels([LabelRow("q1", 0, 0, START, correction=True)]).corrected == 1
    old.close()
    ledger.revision()
    assert shape(old.path) == shape(ledger.path)


def test_the_chain_of_an_old_ledger_covers_its_old_decisions(tmp_path: Path) -> None:
    old_ledger(tmp_path / "old.db", FORMAT_2)
    old = Ledger(tmp_path / "old.db")
    old.revision()
    with pytest.raises(LedgerUnavailable, match="never changed"), old._store.writing() as db:
        db.execute("UPDATE decisions SET digest = ? WHERE seq = 1", (GENESIS,))
    tamper(old.path, "UPDATE decisions SET reason = 'better' WHERE seq = 1")
    problem = old.verify_decisions().problem
    assert problem is not None
    assert problem.seq == 1
    old.close()


def test_an_earlier_version_that_has_the_file_open_adds_nothing_to_a_chained_ledger(tmp_path: Path) -> None:
    old_ledger(tmp_path / "old.db", FORMAT_2)
    earlier = sqlite3.connect(tmp_path / "old.db")
    assert earlier.execute("SELECT count(*) FROM decisions").fetchone() == (3,)
    old = Ledger(tmp_path / "old.db")
    head = old.verify_decisions().head
    with pytest.raises(sqlite3.IntegrityError, match="needs a digest"):
        earlier.execute(
            "INSERT INTO decisions (rollout_id, at, actor, from_state, to_state, verb, reason, pairs, labels, "
            "weight, override, revision) VALUES ('toy-1', 0, '', '', '', '', '', 0, 0, 0, 0, 0)"
        )
    earlier.close()
    assert old.verify_decisions() == Verified(3, head, None)
    old.close()


def test_an_upgrade_that_fails_leaves_the_old_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old.db"
    old_ledger(path, FORMAT_1)
    before = shape(path)

    def fail(*_: object) -> str:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(store, "link", fail)
        with pytest.raises(LedgerUnavailable, match="disk"):
            Ledger(path).revision()
    assert shape(path) == before
    again = Ledger(path)
    assert again.verify_decisions().count == 3
    again.close()


def test_processes_that_bring_the_same_ledger_up_to_date_at_once_agree(tmp_path: Path) -> None:
    old_ledger(tmp_path / "old.db", FORMAT_1)
    _all_at_once([(_open, (tmp_path / "old.db",)) for _ in range(3)])
    old = Ledger(tmp_path / "old.db")
    assert old.verify_decisions().count == 3
    old.close()


def test_rollouts_and_cursors_that_lack_newer_fields_can_be_read(ledger: Ledger) -> None:
    made = started(ledger, groups=[GroupSpec("DIS=1", 0.1, -0.2)])
    with ledger._store.writing() as db:
        db.execute(
            "UPDATE rollouts SET body = json_set(json_remove(body, '$.groups[0].error'), "
            "'$.policy.alert_webhook', 'http://a..b/')"
        )
        db.execute(
            "UPDATE cursors SET body = json_set(json_remove(body, '$.compared', '$.moved_at', '$.reward_waiting', "
            "'$.rewards_seq', '$.rewards_at'), '$.resolved', 7, '$.answers_at', 9.0)"
        )
    assert ledger.rollout(made.id).groups == (GroupSpec("DIS=1", 0.1, -0.2),)
    assert ledger.rollout(made.id).policy.alert_webhook == "http://a..b/"
    cursor = ledger.cursor(made.id)
    assert (cursor.compared, cursor.moved_at) == (7, 9.0)
    assert (cursor.rewards_seq, cursor.rewards_at, cursor.reward_waiting) == (0, 0.0, NOBODY)


def test_status_is_kept_for_whoever_asks(ledger: Ledger) -> None:
    made = started(ledger)
    assert ledger.status(made.id) is None
    ledger.save_status(made.id, START, {"waiting": "pairs"})
    assert ledger.status(made.id) == {"waiting": "pairs", "at": START}


# Many at once ----------------------------------------------------------------------------------------------


def _write(path: Path, rollout_id: str, name: str) -> None:
    ledger = Ledger(path, busy_timeout=20)
    for i in range(20):
        ledger.record_pairs([row(rollout_id, f"{name}-{i}-{k}") for k in range(5)])
        ledger.add_counts(name, i + 1, {(rollout_id, TallyKey("requests", "control", i)): {0: 5}})
        ledger.record_labels([LabelRow(f"{name}-{i}-0", 0, 1, START)])
    ledger.close()


def test_processes_that_write_at_once_lose_nothing(ledger: Ledger) -> None:
    made = started(ledger)
    _all_at_once([(_write, (ledger.path, made.id, f"p{i}")) for i in range(3)])
    assert ledger.totals(made.id, 0) == {("requests", "control"): {0: 300}}
    with ledger.pairs_after(made.id, 0, 1000) as pairs:
        found = list(pairs)
    assert len(found) == 300
    assert sum(p.label is not None for p in found) == 60


def _open(path: Path) -> None:
    Ledger(path, busy_timeout=20).route()


def test_processes_that_make_the_same_ledger_at_once_agree(tmp_path: Path) -> None:
    _all_at_once([(_open, (tmp_path / "new" / "ledger.db",)) for _ in range(3)])


def test_threads_share_a_ledger_and_readers_do_not_wait_for_a_writer(ledger: Ledger) -> None:
    started(ledger)
    seen: list[object] = []

    def read() -> None:
        try:
            seen.append(ledger.revision())
        except LedgerUnavailable as error:
            seen.append(error)

    with ledger._store.writing() as db:
        db.execute("UPDATE meta SET value = 99 WHERE key = 'revision'")
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
    assert seen == [1, 1, 1, 1]
    assert ledger.revision() == 99


def _decide(path: Path, name: str, number: int) -> None:
    ledger = Ledger(path, busy_timeout=20)
    while number:
        rollout = ledger.rollout("toy-1")
        number -= ledger.apply(rollout, rollout, decided(rollout, "held", actor=name)) is not None
    ledger.close()


def _all_at_once(work: Sequence[tuple[Callable[..., None], tuple[object, ...]]]) -> None:
    """Do each of these in a process of its own; all must succeed."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=target, args=given) for target, given in work]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_processes_and_threads_that_decide_at_once_keep_the_chain_whole(ledger: Ledger) -> None:
    started(ledger)
    threads = [
        threading.Thread(target=_decide, args=(ledger.path, f"thread {number}", 15)) for number in range(2)
    ]
    for thread in threads:
        thread.start()
    _all_at_once([(_decide, (ledger.path, f"process {number}", 15)) for number in range(2)])
    for thread in threads:
        thread.join(60)
    actors = [d.actor for d in ledger.decisions()]
    assert sorted(set(actors)) == ["ada", "process 0", "process 1", "thread 0", "thread 1"]
    verified = ledger.verify_decisions()
    assert (verified.count, verified.problem) == (61, None)
