"""Whatever is done to a chain of decisions is found, as far as a chain can show it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from monitoring.chain import FIELDS, GENESIS, Problem, Verified, link, verify
from monitoring.store import _GUARDS

Row = tuple[dict[str, Any], object]

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

texts = st.text(max_size=8)
reals = st.floats(allow_nan=False)
counts = st.integers(0, 2**40)
contents = st.fixed_dictionaries(
    {
        "rollout_id": texts,
        "at": reals,
        "actor": texts,
        "from_state": texts,
        "to_state": texts,
        "verb": texts,
        "reason": texts,
        "guardrail": st.none() | texts,
        "grp": st.none() | texts,
        "evidence_log10": st.none() | reals,
        "limit_log10": st.none() | reals,
        "drop_estimate": st.none() | reals,
        "pairs": counts,
        "labels": counts,
        "weight": st.integers(0, 100),
        "evidence_at": st.none() | reals,
        "override": st.booleans(),
        "revision": counts,
    }
)
anything = st.none() | st.booleans() | counts | reals | texts | st.binary(max_size=8)


def chained(decisions: Sequence[dict[str, Any]]) -> list[Row]:
    """The rows of a whole chain."""
    rows: list[Row] = []
    digest = GENESIS
    for seq, decision in enumerate(decisions, start=1):
        fields = {**decision, "seq": seq}
        digest = link(digest, fields)
        rows.append((fields, digest))
    return rows


@st.composite
def chains(draw: st.DrawFn, least: int = 1) -> tuple[list[Row], int]:
    """A whole chain, and an index into it."""
    rows = chained(draw(st.lists(contents, min_size=least, max_size=6)))
    return rows, draw(st.integers(0, len(rows) - 1))


def found(rows: Sequence[Row], **known: Any) -> Problem:
    problem = verify(rows, **known).problem
    assert problem is not None
    assert "\n" not in problem.text
    return problem


def head(rows: Sequence[Row]) -> str:
    return str(rows[-1][1])


def example(number: int = 3) -> list[Row]:
    fields = {
        **dict.fromkeys(FIELDS),
        "rollout_id": "toy-1",
        "at": 1.5,
        "actor": "ada",
        "from_state": "",
        "to_state": "pending",
        "verb": "start",
        "reason": "é\n",
        "pairs": 0,
        "labels": 0,
        "weight": 0,
        "override": False,
    }
    return chained([{**fields, "revision": revision} for revision in range(number)])


# What holds ------------------------------------------------------------------------------------------------


def test_the_digest_is_what_anybody_can_compute() -> None:
    (first, digest), *_ = example()
    text = (
        '{"actor":"ada","at":1.5,"drop_estimate":null,"evidence_at":null,"evidence_log10":null,'
        '"from_state":"","grp":null,"guardrail":null,"labels":0,"limit_log10":null,"override":0,"pairs":0,'
        '"reason":"\\u00e9\\n","revision":0,"rollout_id":"toy-1","seq":1,"to_state":"pending",'
        '"verb":"start","weight":0}'
    )
    assert digest == link(GENESIS, first) == hashlib.sha256(f"{'0' * 64}\n{text}".encode()).hexdigest()


def test_the_chain_covers_exactly_what_the_trigger_protects() -> None:
    protected = _GUARDS.split("BEFORE UPDATE OF")[1].split(" ON decisions")[0].replace(",", " ").split()
    assert protected == [*FIELDS, "digest"]


def test_a_ledger_without_decisions_is_whole() -> None:
    assert verify([]) == verify([], expect=GENESIS) == Verified(0, GENESIS, None)


@patient
@given(chains())
def test_a_whole_chain_holds_and_so_does_each_head_it_had(chain: tuple[list[Row], int]) -> None:
    rows, at = chain
    assert verify(rows, issued=len(rows), expect=str(rows[at][1])) == Verified(len(rows), head(rows), None)
    assert verify(rows, expect=GENESIS).problem is None


@pytest.mark.parametrize(
    ("given_as", "kept_as"),
    [
        ({"at": 5}, {"at": 5.0}),
        ({"drop_estimate": -0.0}, {"drop_estimate": 0.0}),
        ({"evidence_log10": float("nan")}, {"evidence_log10": None}),
        ({"override": True}, {"override": 1}),
    ],
)
def test_a_value_has_the_digest_of_what_sqlite_keeps_of_it(
    given_as: dict[str, Any], kept_as: dict[str, Any]
) -> None:
    fields = example()[0][0]
    assert link(GENESIS, {**fields, **given_as}) == link(GENESIS, {**fields, **kept_as})


def test_rows_are_read_one_at_a_time_and_no_further_than_the_first_change() -> None:
    rows = example(5)
    read = []

    def stream() -> Iterator[Row]:
        for fields, digest in rows:
            read.append(fields["seq"])
            yield {**fields, "weight": 90 if fields["seq"] == 2 else fields["weight"]}, digest

    assert verify(stream()).count == 1
    assert read == [1, 2]


# What is found ---------------------------------------------------------------------------------------------


@patient
@given(chains(), st.sampled_from([name for name in FIELDS if name != "seq"]), anything)
def test_any_change_of_a_decision_is_found_and_named(
    chain: tuple[list[Row], int], name: str, value: object
) -> None:
    rows, at = chain
    fields, digest = rows[at]
    changed = {**fields, name: value}
    assume(not _same(fields[name], value))
    rows[at] = (changed, digest)
    assert (found(rows).seq, found(rows).how) == (at + 1, "changed")
    assert verify(rows).count == at


@patient
@given(chains(), counts)
def test_any_change_of_a_decisions_number_is_found(chain: tuple[list[Row], int], seq: int) -> None:
    rows, at = chain
    assume(seq != at + 1)
    rows[at] = ({**rows[at][0], "seq": seq}, rows[at][1])
    found(rows)


@patient
@given(chains(), anything)
def test_any_change_of_a_digest_is_found_and_named(chain: tuple[list[Row], int], digest: object) -> None:
    rows, at = chain
    rows[at] = (rows[at][0], digest)
    assert (found(rows).seq, found(rows).how) == (at + 1, "changed")


@patient
@given(chains(least=2), st.data())
def test_any_deletion_is_found_and_named(chain: tuple[list[Row], int], data: st.DataObject) -> None:
    rows, first = chain
    last = data.draw(st.integers(first, len(rows) - 1))
    left = rows[:first] + rows[last + 1 :]
    problem = found(left, issued=len(rows))
    assert (problem.seq, problem.how) == (first + 1, "missing")
    assert str(first + 1) in problem.text
    assert str(last + 1) in problem.text


@patient
@given(chains(least=2), st.data())
def test_a_deletion_is_found_although_the_rest_was_numbered_anew(
    chain: tuple[list[Row], int], data: st.DataObject
) -> None:
    rows, at = chain
    assume(at < len(rows) - 1)
    left = rows[:at] + [({**fields, "seq": fields["seq"] - 1}, digest) for fields, digest in rows[at + 1 :]]
    assert (found(left).seq, found(left).how) == (at + 1, "changed")


@patient
@given(chains(), st.integers(0, 5))
def test_an_end_that_was_cut_off_is_found_by_the_head_before(chain: tuple[list[Row], int], left: int) -> None:
    rows, _ = chain
    assume(left < len(rows))
    assert verify(rows[:left]).problem is None
    problem = found(rows[:left], expect=head(rows))
    assert (problem.seq, problem.how) == (None, "unknown")
    assert head(rows) in problem.text


@patient
@given(chains(least=2), st.data())
def test_any_two_decisions_that_changed_places_are_found(
    chain: tuple[list[Row], int], data: st.DataObject
) -> None:
    rows, i = chain
    j = data.draw(st.integers(0, len(rows) - 1).filter(lambda other: other != i))
    (one, one_digest), (other, other_digest) = rows[i], rows[j]
    moved = list(rows)
    moved[i], moved[j] = rows[j], rows[i]
    first = min(i, j) + 1
    assert (found(moved).seq, found(moved).how) == (first, "out of order")
    moved[i] = ({**other, "seq": one["seq"]}, other_digest)
    moved[j] = ({**one, "seq": other["seq"]}, one_digest)
    assert (found(moved).seq, found(moved).how) == (first, "changed")


@patient
@given(chains(), st.data())
def test_a_decision_that_was_put_in_is_found(chain: tuple[list[Row], int], data: st.DataObject) -> None:
    rows, at = chain
    place = data.draw(st.integers(at + 1, len(rows)))
    assert found([*rows[:place], rows[at], *rows[place:]]).how == "out of order"
    fields = {**rows[at][0], "reason": "put in", "seq": at + 1}
    digest = link(str(rows[at - 1][1]) if at else GENESIS, fields)
    later = [({**fields, "seq": fields["seq"] + 1}, digest) for fields, digest in rows[at:]]
    found([*rows[:at], (fields, digest), *later])


@patient
@given(chains(least=2))
def test_a_change_with_a_new_digest_is_found_at_the_next_decision(chain: tuple[list[Row], int]) -> None:
    rows, at = chain
    assume(at < len(rows) - 1)
    fields = {**rows[at][0], "reason": rows[at][0]["reason"] + "!"}
    rows[at] = (fields, link(str(rows[at - 1][1]) if at else GENESIS, fields))
    assert (found(rows).seq, found(rows).how) == (at + 2, "changed")
    assert "the one before it" in found(rows).text


@patient
@given(chains())
def test_a_chain_that_was_made_anew_is_whole_and_lacks_the_head_it_had(chain: tuple[list[Row], int]) -> None:
    rows, at = chain
    decisions = [fields for fields, _ in rows]
    decisions[at] = {**decisions[at], "reason": decisions[at]["reason"] + "!"}
    anew = chained(decisions)
    assert verify(anew).problem is None
    assert found(anew, expect=head(rows)).how == "unknown"
    if at:
        assert verify(anew, expect=str(rows[at - 1][1])).problem is None


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        ((1, 2, 4, 5), "decision 3 is missing"),
        ((1, 5), "decisions 2 to 4 are missing"),
        ((2, 3, 4, 5), "decision 1 is missing"),
        ((1, 2, 3), "decisions 4 to 5 are missing"),
        ((1, 3, 2, 4, 5), "decision 2 stands after decision 3"),
        ((1, 2, 2, 3), "decision 2 stands after decision 2"),
    ],
)
def test_a_problem_is_one_line_that_says_which_and_how(kept: tuple[int, ...], text: str) -> None:
    rows = example(5)
    assert found([rows[seq - 1] for seq in kept], issued=5).text == text


def _same(old: object, new: object) -> bool:
    """Whether a column that holds `old` holds the same after `new` was written to it."""
    if isinstance(old, (bool, int, float)) and isinstance(new, (bool, int, float)):
        return old == new
    return type(old) is type(new) and old == new
