"""The chain through the ledger's decisions: the digest of each covers the decision and the digest before it.

A digest vouches for every decision up to its own: none of them can be changed, taken out, put in or moved without
the digest changing too. That is worth as much as a copy of it which is out of reach of whoever can write the file.

- Without a copy, a whole chain says only that nobody changed a decision and left it at that. Who can rewrite the
  file can make all digests anew, and who cuts off the end leaves a whole chain as well.
- With the copy of a head that was noted earlier (`expect`), both are found, for the decisions up to that head.
- No chain says that a decision was true when it was written, or who changed it. The times of effect and of the
  alert, which are noted later, are not covered.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

GENESIS = "0" * 64
"""What the first decision follows, and the head of a ledger without decisions."""
FIELDS = (
    *("seq", "rollout_id", "at", "actor", "from_state", "to_state", "verb", "reason", "guardrail", "grp"),
    *("evidence_log10", "limit_log10", "drop_estimate", "pairs", "labels", "weight", "evidence_at"),
    *("override", "revision"),
)
"""The ledger's columns that a digest covers: all that never change."""
_REAL = frozenset({"at", "evidence_log10", "limit_log10", "drop_estimate", "evidence_at"})


@dataclass(frozen=True, slots=True)
class Problem:
    """Where the chain is broken first.

    Attributes:
        seq: the number of the decision it is about; None for "unknown".
        how: it was changed, is missing, stands in the wrong place, or the expected digest is unknown.
        text: the same in one line.
    """

    seq: int | None
    how: Literal["changed", "missing", "out of order", "unknown"]
    text: str


@dataclass(frozen=True, slots=True)
class Verified:
    """What a walk along the chain found.

    Attributes:
        count: decisions up to the first problem, or all.
        head: digest of the last of them.
        problem: the first one; None when the chain is whole.
    """

    count: int
    head: str
    problem: Problem | None


def link(previous: str, fields: Mapping[str, Any]) -> str:
    """The digest of a decision whose predecessor has the digest `previous`.

    It is the SHA-256 of that digest, a line feed, and the decision as JSON: `FIELDS` as keys in alphabetical order, no
    spaces, ASCII with the rest escaped. Other keys of `fields` are left out.
    """
    values = {name: _stored(name, fields[name]) for name in FIELDS}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=_blob)
    return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()


def verify(
    rows: Iterable[tuple[Mapping[str, Any], object]], *, issued: int = 0, expect: str | None = None
) -> Verified:
    """Walk along the chain from its start to the first problem. Rows are not kept.

    Args:
        rows: the fields and the digest of every decision, in the order of `seq`.
        issued: the highest `seq` that was ever given out, as far as that is known.
        expect: a digest noted earlier, which must be that of one of the decisions, or `GENESIS`.
    """
    rest = iter(rows)
    count, head = 0, GENESIS
    known = expect is None or expect == GENESIS
    for fields, digest in rest:
        seq: int = fields["seq"]
        problem = None
        if seq <= count:
            problem = _misplaced(seq, count)
        elif seq > count + 1:
            late = any(later["seq"] == count + 1 for later, _ in rest)
            problem = _misplaced(count + 1, seq) if late else _missing(count + 1, seq - 1)
        elif digest != link(head, fields):
            problem = Problem(
                seq,
                "changed",
                f"decision {seq} does not match its digest: it was changed, "
                "or the one before it was and got a new digest",
            )
        if problem is not None:
            return Verified(count, head, problem)
        count, head = seq, str(digest)
        known = known or head == expect
    if issued > count:
        return Verified(count, head, _missing(count + 1, issued))
    if not known:
        text = f"no decision has the digest {expect}: the end was cut off, or decisions were rewritten"
        return Verified(count, head, Problem(None, "unknown", text))
    return Verified(count, head, None)


def _missing(first: int, last: int) -> Problem:
    which = f"decision {first} is" if first == last else f"decisions {first} to {last} are"
    return Problem(first, "missing", f"{which} missing")


def _misplaced(seq: int, after: int) -> Problem:
    return Problem(seq, "out of order", f"decision {seq} stands after decision {after}")


def _stored(name: str, value: object) -> object:
    """A value as SQLite gives it back, so that a digest made before the row was written holds afterwards."""
    if isinstance(value, bool):
        value = int(value)
    if name in _REAL and isinstance(value, (int, float)):
        value = float(value) + 0.0  # SQLite knows no negative zero, and stores NaN as NULL.
        return None if math.isnan(value) else value
    return value


def _blob(value: bytes) -> dict[str, str]:
    """Bytes, which no program of ours writes, as something that no other value is written as."""
    return {"blob": value.hex()}
