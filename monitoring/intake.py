"""The data plane's side of the ledger: what workers write, and the route they read."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import orjson

from monitoring.records import Rollout
from monitoring.rows import (
    LIVE_WITHIN_S,
    FeedbackResult,
    LabelRow,
    PairRow,
    RewardRow,
    Route,
    WorkerBeat,
    cursor_from_json,
    dump,
    rollout_from_json,
)
from monitoring.store import Store
from monitoring.tally import Counts, TallyKey

MAX_CORRECTIONS = 20
"""Of one label; one more is a conflict, so that nobody can fill the disk with them."""

MAX_RECORD_BYTES = 16 << 10
"""A larger record is judged, and not kept for reports: a client may have made it huge."""


class Intake:
    """Route, pairs, labels, rewards, counts and signs of life. Every method may raise LedgerUnavailable.

    Args:
        path: the ledger's file; made at first use. Constructing does not touch it.
        busy_timeout: seconds to wait for another process's write.
    """

    def __init__(self, path: str | Path, busy_timeout: float = 2.0) -> None:
        self.path = Path(path)
        self._store = Store(self.path, busy_timeout)

    def close(self) -> None:
        """Close all connections; the ledger opens again when it is used again."""
        self._store.close()

    # The route -------------------------------------------------------------------------------------------

    def revision(self) -> int:
        """The route's revision: one cheap read, for polling."""
        with self._store.reading() as db:
            return _revision(db)

    def route(self) -> Route:
        """How to split traffic now. A rolled-back rollout stays visible: weight 0, nothing mirrored."""
        with self._store.reading() as db:
            row = db.execute("SELECT body FROM rollouts WHERE active").fetchone()
            revision = _revision(db)
        if row is None:
            return Route(revision=revision)
        rollout = rollout_from_json(row[0])
        return Route(revision, *_routed(rollout))

    # Inputs ----------------------------------------------------------------------------------------------

    def record_pairs(self, rows: Sequence[PairRow]) -> int:
        """Store pairs, each once by (rollout, request, index). Returns how many were new.

        Pairs of a rollout the ledger does not know are dropped: no retry would ever help them.
        """
        if not rows:
            return 0
        with self._store.writing() as db:
            known = _known(db, {row.rollout_id for row in rows})
            values = (
                (
                    row.rollout_id,
                    row.request_id,
                    row.index,
                    row.served_arm,
                    row.control,
                    row.treatment,
                    row.control_confidence,
                    row.treatment_confidence,
                    dump(row.groups),
                    _kept(dump(row.record)),
                    row.created_at,
                )
                for row in rows
                if row.rollout_id in known
            )
            before = db.total_changes
            db.executemany(
                "INSERT OR IGNORE INTO pairs (rollout_id, request_id, idx, served_arm, control, treatment, "
                "control_confidence, treatment_confidence, groups, record, created_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )
            return db.total_changes - before

    def record_labels(self, rows: Sequence[LabelRow]) -> FeedbackResult:
        """Store labels; see `record_feedback`."""
        return self.record_feedback(rows, ())

    def record_feedback(self, labels: Sequence[LabelRow], rewards: Sequence[RewardRow]) -> FeedbackResult:
        """Store labels and rewards, all or none; they survive a power cut once this returns.

        The first label of a record stands, and the first reward of a request. A label that is a correction takes the
        place of the one before, `MAX_CORRECTIONS` times for a record; what it was before is kept beside it. Evidence
        that has counted the pair stays as it is.
        """
        outcomes: Counter[str] = Counter()
        if labels or rewards:
            with self._store.writing(durable=True) as db:
                counted = _Counted(db)
                for row in labels:
                    outcomes[_take_label(db, row, counted)] += 1
                for reward in rewards:
                    outcomes[_take_reward(db, reward)] += 1
        return FeedbackResult(**outcomes)

    def add_counts(
        self, source: str, sequence: int, deltas: Mapping[tuple[str, TallyKey], Counts], at: float = 0.0
    ) -> bool:
        """Add a worker's counts, once. Returns False when this flush was applied before.

        Args:
            source: the worker's run; a restarted worker is a new source.
            sequence: rises with every flush of the source; a flush is repeated unchanged until it was taken.
            deltas: (rollout id, key) -> counts. Unknown rollouts are dropped.
            at: when the flush was made, seconds since the epoch.
        """
        with self._store.writing() as db:
            fresh = db.execute(
                "INSERT INTO sources VALUES (?, ?, ?) ON CONFLICT (source) DO UPDATE "
                "SET sequence = excluded.sequence, at = excluded.at WHERE excluded.sequence > sequence",
                (source, sequence, at),
            ).rowcount
            if not fresh:
                return False
            known = _known(db, {rollout_id for rollout_id, _ in deltas})
            for (rollout_id, key), counts in deltas.items():
                if rollout_id in known:
                    add_tallies(db, rollout_id, known[rollout_id], {key: counts})
            return True

    # Signs of life ---------------------------------------------------------------------------------------

    def heartbeat(self, beat: WorkerBeat) -> None:
        """Store a worker's sign of life in place of its last one."""
        with self._store.writing() as db:
            db.execute(
                "INSERT OR REPLACE INTO workers (worker_id, service, pid, revision, applied_at, loaded, "
                "error, at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    beat.worker_id,
                    beat.service,
                    beat.pid,
                    beat.revision,
                    beat.applied_at,
                    dump(list(beat.loaded)),
                    beat.error,
                    beat.at,
                ),
            )

    def workers(self, now: float, within: float = LIVE_WITHIN_S) -> list[WorkerBeat]:
        """The workers that beat within so many seconds before `now`."""
        with self._store.reading() as db:
            rows = db.execute(
                "SELECT worker_id, service, pid, revision, applied_at, loaded, error, at FROM workers "
                "WHERE at >= ? ORDER BY service, worker_id",
                (now - within,),
            ).fetchall()
        return [WorkerBeat(*(*row[:5], tuple(orjson.loads(row[5])), *row[6:])) for row in rows]


def add_tallies(
    db: sqlite3.Connection, rollout_id: str, epoch: int, tallies: Mapping[TallyKey, Counts]
) -> None:
    """Add counts to their buckets and to the totals, inside the caller's transaction."""
    totals: dict[tuple[str, str, int], int] = {}
    buckets = []
    for key, counts in tallies.items():
        for outcome, n in counts.items():
            buckets.append((rollout_id, key.guardrail, key.bucket, key.group, outcome, epoch, n))
            place = (key.guardrail, key.group, outcome)
            totals[place] = totals.get(place, 0) + n
    db.executemany(
        "INSERT INTO tallies VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n",
        buckets,
    )
    db.executemany(
        "INSERT INTO totals VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n",
        ((rollout_id, epoch, *place, n) for place, n in totals.items()),
    )


def _take_label(db: sqlite3.Connection, row: LabelRow, counted: _Counted) -> str:
    """Store a label or a correction; returns what became of it, as `FeedbackResult` calls it."""
    added = db.execute(
        "INSERT OR IGNORE INTO labels (request_id, idx, label, at) VALUES (?, ?, ?, ?)",
        (row.request_id, row.index, row.label, row.at),
    ).rowcount
    if added:
        return "accepted"
    record = (row.request_id, row.index)
    (known,) = db.execute("SELECT label FROM labels WHERE request_id = ? AND idx = ?", record).fetchone()
    if known == row.label:
        return "duplicates"
    (before,) = db.execute(
        "SELECT count(*) FROM corrections WHERE request_id = ? AND idx = ?", record
    ).fetchone()
    if not row.correction or before >= MAX_CORRECTIONS:
        return "conflicts"
    db.execute(
        "INSERT INTO corrections (request_id, idx, was, label, at) VALUES (?, ?, ?, ?, ?)",
        (*record, known, row.label, row.at),
    )
    db.execute(
        "UPDATE labels SET label = ?, at = ? WHERE request_id = ? AND idx = ?", (row.label, row.at, *record)
    )
    return "too_late" if counted.has(*record) else "corrected"


def _take_reward(db: sqlite3.Connection, row: RewardRow) -> str:
    """Store a reward; returns what became of it, as `FeedbackResult` calls it."""
    added = db.execute(
        "INSERT OR IGNORE INTO rewards (request_id, reward, at) VALUES (?, ?, ?)",
        (row.request_id, row.reward, row.at),
    ).rowcount
    if added:
        return "accepted"
    (known,) = db.execute("SELECT reward FROM rewards WHERE request_id = ?", (row.request_id,)).fetchone()
    return "duplicates" if known == row.reward else "conflicts"


class _Counted:
    """Which pairs the active rollout has counted for their labels, inside the caller's transaction.

    Args:
        db: the connection whose transaction it is.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._rollout: tuple[str, int] | None = None
        self._asked = False

    def has(self, request_id: str, index: int) -> bool:
        """Whether it has counted the pair of this record."""
        if not self._asked:
            self._asked = True
            row = self._db.execute(
                "SELECT c.rollout_id, c.body FROM cursors c JOIN rollouts r ON r.id = c.rollout_id WHERE r.active"
            ).fetchone()
            self._rollout = None if row is None else (row[0], cursor_from_json(row[1]).labels_seq)
        if self._rollout is None:
            return False
        rollout_id, labels_seq = self._rollout
        pair = self._db.execute(
            "SELECT seq FROM pairs WHERE request_id = ? AND idx = ? AND rollout_id = ?",
            (request_id, index, rollout_id),
        ).fetchone()
        return pair is not None and bool(pair[0] <= labels_seq)


def _routed(rollout: Rollout) -> tuple[str, str, str, int, str, float, float, float, float | None]:
    policy = rollout.policy
    return (
        rollout.id,
        rollout.control,
        rollout.treatment,
        rollout.weight,
        rollout.state,
        rollout.rate_in_force,
        policy.label_deadline_s,
        policy.latency_slo_ms,
        rollout.cascade_threshold,
    )


def same_route(a: Rollout, b: Rollout) -> bool:
    """Whether workers route alike by both."""
    return a.active == b.active and _routed(a) == _routed(b)


def _kept(record: str) -> str:
    return record if len(record.encode()) <= MAX_RECORD_BYTES else "{}"


def _revision(db: sqlite3.Connection) -> int:
    (value,) = db.execute("SELECT value FROM meta WHERE key = 'revision'").fetchone()
    return int(value)


def next_revision(db: sqlite3.Connection) -> int:
    """Raise the route's revision, inside the caller's transaction."""
    (value,) = db.execute(
        "UPDATE meta SET value = value + 1 WHERE key = 'revision' RETURNING value"
    ).fetchone()
    return int(value)


def _known(db: sqlite3.Connection, ids: Iterable[str]) -> dict[str, int]:
    """Of these rollouts, those that exist, with their epoch."""
    found = {}
    for rollout_id in ids:
        row = db.execute("SELECT epoch FROM rollouts WHERE id = ?", (rollout_id,)).fetchone()
        if row is not None:
            found[rollout_id] = row[0]
    return found
