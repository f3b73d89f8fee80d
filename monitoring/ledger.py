"""The ledger: every rollout, decision, pair, label and count, in one SQLite file."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import lru_cache
from statistics import median, quantiles

import orjson

from monitoring.baseline import Baseline
from monitoring.chain import GENESIS, Verified, link, verify
from monitoring.errors import (
    LedgerTooNew,
    LedgerUnavailable,
    RolloutConflict,
    RolloutNotFound,
    TrimtabError,
)
from monitoring.groups import GroupSpec
from monitoring.intake import Intake, add_tallies, next_revision, same_route
from monitoring.label_queue import UnlabelledPair
from monitoring.policy import Policy
from monitoring.quality import Quality
from monitoring.records import ALERTED_STATES, PENDING, Decision, Rollout
from monitoring.reward import RewardedPair
from monitoring.rows import (
    LIVE_WITHIN_S,
    Cursor,
    FeedbackResult,
    Flow,
    LabelRow,
    PairRow,
    PairStats,
    RewardRow,
    Route,
    StoredPair,
    WorkerBeat,
    cursor_from_json,
    cursor_to_json,
    dump,
    rollout_from_json,
    rollout_to_json,
)
from monitoring.sampling import MirrorCounts
from monitoring.store import decision_rows
from monitoring.tally import BUCKET_SECONDS, MIRROR, MODEL_TIME, TALLIED, Counts, Pair, TallyKey, bucket_of

__all__ = [
    "LIVE_WITHIN_S",
    "Cursor",
    "FeedbackResult",
    "Flow",
    "LabelRow",
    "Ledger",
    "LedgerTooNew",
    "LedgerUnavailable",
    "PairRow",
    "PairStats",
    "RewardRow",
    "RolloutConflict",
    "RolloutNotFound",
    "Route",
    "StoredPair",
    "TrimtabError",
    "WorkerBeat",
]

KEEP_PAIRS = 200_000
KEEP_BUCKETS_S = 6 * 3600
KEEP_SOURCES_S = 24 * 3600
KEEP_LABELS_S = 7 * 86400
"""A label or a reward without a pair is kept for so long, or for its deadline where that is longer."""
KEEP_OLD_PAIRS = 20_000
KEEP_OLD_PAIRS_S = 30 * 86400
"""Of a rollout that another has replaced: its newest pairs, until the newest of them is so old."""
PRUNED_AT_ONCE = 2000
SWEPT_BUCKETS = 30

_COLUMNS = {"group": "grp", "drop": "drop_estimate"}
_DECISION_FIELDS = tuple(f.name for f in fields(Decision))
_DECISION_COLUMNS = ", ".join(_COLUMNS.get(name, name) for name in _DECISION_FIELDS)
_DECISION_INSERT = (  # The names are this file's own.
    f"INSERT INTO decisions ({_DECISION_COLUMNS}) VALUES ({', '.join('?' for _ in _DECISION_FIELDS)})"  # noqa: S608
)


class Ledger(Intake):
    """All of the ledger. Threads and processes may share one file; every method may raise LedgerUnavailable.

    `Intake` holds what the serving workers call.
    """

    # Rollouts and decisions ------------------------------------------------------------------------------

    def create_rollout(
        self,
        *,
        workload: str,
        control: str,
        treatment: str,
        policy: Policy,
        groups: Sequence[GroupSpec] = (),
        classes: Sequence[str] = (),
        baseline: Baseline = Baseline(),
        quality: Quality = Quality(),
        positive: int = 1,
        actor: str,
        now: float,
        reason: str = "",
        override_reason: str | None = None,
        cascade_threshold: float | None = None,
    ) -> Rollout:
        """Start a rollout. One that is promoted already makes way for it; one under way does not.

        Args:
            control, treatment: variant tags.
            groups, classes: who is guarded; `classes` are the names of the model's classes.
            baseline: full precision on the reference rows; quality: what a drop is measured in.
            positive: class index of the favourable decision.
            override_reason: why it starts although the gate refused it; None when the gate accepted.
            cascade_threshold: confidence from which on the treatment's own answer stands; None for no cascade.

        Raises:
            RolloutConflict: another rollout is under way.
        """
        with self._store.writing(durable=True) as db:
            row = db.execute("SELECT body FROM rollouts WHERE active").fetchone()
            if row is not None:
                current = rollout_from_json(row[0])
                if current.live:
                    raise RolloutConflict(
                        f"rollout {current.id} of {current.treatment} is under way ({current.state}): "
                        "wait for it, or roll it back first"
                    )
                _update(db, replace(current, active=False, version=current.version + 1))
            (number,) = db.execute("SELECT coalesce(max(number), 0) + 1 FROM rollouts").fetchone()
            rollout = Rollout(
                id=f"{workload}-{number}",
                workload=workload,
                control=control,
                treatment=treatment,
                policy=policy,
                groups=tuple(groups),
                classes=tuple(classes),
                baseline=baseline,
                quality=quality,
                positive=positive,
                revision=next_revision(db),
                created_at=now,
                entered_at=now,
                step_at=now,
                reason=reason,
                override_reason=override_reason,
                cascade_threshold=cascade_threshold,
                mirror_rate=policy.mirror_rate,
            )
            db.execute(
                "INSERT INTO rollouts VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (rollout.id, number, 0, rollout.state, 0, 1, now, rollout_to_json(rollout)),
            )
            db.execute("INSERT INTO cursors VALUES (?, 0, ?)", (rollout.id, cursor_to_json(Cursor())))
            started = Decision(
                rollout_id=rollout.id,
                at=now,
                actor=actor,
                from_state="",
                to_state=PENDING,
                verb="start",
                reason=override_reason if override_reason is not None else reason,
                override=override_reason is not None,
                revision=rollout.revision,
            )
            _insert_decision(db, started)
            return rollout

    def rollout(self, rollout_id: str) -> Rollout:
        """One rollout; raises RolloutNotFound."""
        with self._store.reading() as db:
            row = db.execute("SELECT body FROM rollouts WHERE id = ?", (rollout_id,)).fetchone()
        if row is None:
            raise RolloutNotFound(f"no rollout is called {rollout_id!r}")
        return rollout_from_json(row[0])

    def rollouts(self, limit: int = 100) -> list[Rollout]:
        """The newest rollouts, newest first."""
        with self._store.reading() as db:
            rows = db.execute("SELECT body FROM rollouts ORDER BY number DESC LIMIT ?", (limit,)).fetchall()
        return [rollout_from_json(row[0]) for row in rows]

    def active_rollout(self) -> Rollout | None:
        """The rollout that workers route by, if any."""
        with self._store.reading() as db:
            row = db.execute("SELECT body FROM rollouts WHERE active").fetchone()
        return None if row is None else rollout_from_json(row[0])

    def apply(self, old: Rollout, new: Rollout, decision: Decision | None) -> Rollout | None:
        """Put `new` in the place of `old`, with its decision, unless somebody else was first.

        Returns:
            The rollout as stored, or None when `old` is no longer what the ledger holds: read it again and
            decide on that.
        """
        with self._store.writing(durable=True) as db:
            row = db.execute("SELECT version FROM rollouts WHERE id = ?", (old.id,)).fetchone()
            if row is None or row[0] != old.version:
                return None
            revision = old.revision if same_route(old, new) else next_revision(db)
            stored = replace(new, version=old.version + 1, revision=revision)
            _update(db, stored)
            if decision is not None:
                _insert_decision(db, replace(decision, revision=revision))
            return stored

    def set_mirror_rate(self, old: Rollout, rate: float, now: float) -> Rollout | None:
        """Have workers mirror another share of requests, unless somebody else has changed the rollout first.

        The route's revision rises, so that workers see it. The rollout's own does not: that is the one which decisions
        wait for, and nobody waits for a rate.

        Returns:
            The rollout as stored, or None when `old` is no longer what the ledger holds.
        """
        with self._store.writing() as db:
            row = db.execute("SELECT version FROM rollouts WHERE id = ?", (old.id,)).fetchone()
            if row is None or row[0] != old.version:
                return None
            next_revision(db)
            raised_at = now if rate > old.mirror_rate else old.mirror_raised_at
            stored = replace(old, version=old.version + 1, mirror_rate=rate, mirror_raised_at=raised_at)
            _update(db, stored)
            return stored

    def decisions(self, rollout_id: str | None = None, limit: int = 1000) -> list[Decision]:
        """The newest decisions in the order they were made, of one rollout or of all."""
        where, given = ("WHERE rollout_id = ?", [rollout_id]) if rollout_id is not None else ("", [])
        return self._decisions(f"{where} ORDER BY seq DESC LIMIT ?", [*given, limit])[::-1]

    def ineffective_decisions(self, limit: int = 100) -> list[Decision]:
        """Decisions that not every live worker was known to have applied."""
        return self._decisions("WHERE effective_at IS NULL ORDER BY seq LIMIT ?", [limit])

    def mark_effective(self, seq: int, at: float) -> None:
        """Note when the last live worker had applied a decision; the first note stands."""
        with self._store.writing() as db:
            db.execute(
                "UPDATE decisions SET effective_at = ? WHERE seq = ? AND effective_at IS NULL", (at, seq)
            )

    def undelivered_decisions(self, limit: int = 100, before: int | None = None) -> list[Decision]:
        """Decisions worth an alert that none was delivered for, newest first.

        Args:
            limit: so many at most.
            before: only those with a smaller number: pass the last one's to read on.
        """
        states = ", ".join("?" for _ in ALERTED_STATES)
        return self._decisions(
            f"WHERE alerted_at IS NULL AND verb <> 'dry-run' AND (verb = 'alert' OR to_state IN ({states})) "
            "AND (? IS NULL OR seq < ?) ORDER BY seq DESC LIMIT ?",
            [*ALERTED_STATES, before, before, limit],
        )

    def mark_alerted(self, seq: int, at: float) -> None:
        """Note that a decision's alert was delivered."""
        with self._store.writing() as db:
            db.execute("UPDATE decisions SET alerted_at = ? WHERE seq = ? AND alerted_at IS NULL", (at, seq))

    def verify_decisions(self, expect: str | None = None) -> Verified:
        """Walk along the chain of all decisions; `monitoring.chain` says what that proves.

        Args:
            expect: a head noted earlier, which must still be part of the chain.
        """
        with self._store.reading() as db, decision_rows(db) as rows:
            return verify(rows, issued=_issued(db), expect=expect)

    def _decisions(self, clause: str, given: Sequence[object]) -> list[Decision]:
        with self._store.reading() as db:
            rows = db.execute(f"SELECT {_DECISION_COLUMNS} FROM decisions {clause}", given).fetchall()  # noqa: S608
        return [_decision(row) for row in rows]

    # Leadership and status -------------------------------------------------------------------------------

    def acquire_lease(self, holder: str, ttl: float, now: float, name: str = "controller") -> bool:
        """Take or renew the lease for `ttl` seconds. False while another holder's has not run out.

        One that runs for more than 2 `ttl` from now was taken before the clock was set back: nobody could take
        it today, and its holder may be dead, so it is void. (Not 1 `ttl`: `now` may be older than the lease by
        the time that this call waited for the file.)
        """
        with self._store.writing() as db:
            changed = db.execute(
                "INSERT INTO leases VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE "
                "SET holder = excluded.holder, expires_at = excluded.expires_at "
                "WHERE holder = excluded.holder OR expires_at <= ? OR expires_at > ?",
                (name, holder, now + ttl, now, now + 2 * ttl),
            ).rowcount
        return bool(changed)

    def release_lease(self, holder: str, name: str = "controller") -> None:
        """Give the lease back, so that the next holder need not wait for it to run out."""
        with self._store.writing() as db:
            db.execute("DELETE FROM leases WHERE name = ? AND holder = ?", (name, holder))

    def save_status(self, rollout_id: str, at: float, status: Mapping[str, object]) -> None:
        """Keep the controller's latest view of a rollout for whoever asks."""
        with self._store.writing() as db:
            db.execute("INSERT OR REPLACE INTO status VALUES (?, ?, ?)", (rollout_id, at, dump(status)))

    def status(self, rollout_id: str) -> dict[str, object] | None:
        """The controller's latest view of a rollout, with its time under "at"; None before the first."""
        with self._store.reading() as db:
            row = db.execute("SELECT at, body FROM status WHERE rollout_id = ?", (rollout_id,)).fetchone()
        return None if row is None else {**orjson.loads(row[1]), "at": row[0]}

    # Counting --------------------------------------------------------------------------------------------

    def cursor(self, rollout_id: str) -> Cursor:
        """How far this rollout's inputs were counted; raises RolloutNotFound."""
        with self._store.reading() as db:
            row = db.execute("SELECT body FROM cursors WHERE rollout_id = ?", (rollout_id,)).fetchone()
        if row is None:
            raise RolloutNotFound(f"no rollout is called {rollout_id!r}")
        return cursor_from_json(row[0])

    @contextmanager
    def pairs_after(self, rollout_id: str, seq: int, limit: int) -> Iterator[Iterator[Pair]]:
        """Stream a rollout's pairs in arrival order, with their labels; stop reading when you have enough."""
        with self._store.reading() as db:
            cursor = db.execute(
                "SELECT seq, request_id, idx, control, treatment, groups, created_at, label, labelled_at, "
                "control_confidence FROM labelled WHERE rollout_id = ? AND seq > ? ORDER BY seq LIMIT ?",
                (rollout_id, seq, limit),
            )
            try:
                yield (Pair(*(*row[:5], _groups(row[5]), *row[6:])) for row in cursor)
            finally:
                cursor.close()

    @contextmanager
    def rewarded_after(self, rollout_id: str, seq: int, limit: int) -> Iterator[Iterator[RewardedPair]]:
        """Stream a rollout's pairs in arrival order, with their rewards; stop reading when you have enough."""
        with self._store.reading() as db:
            cursor = db.execute(
                "SELECT p.seq, p.served_arm, p.treatment IS NOT NULL, p.created_at, r.reward, r.at "
                "FROM pairs p LEFT JOIN rewards r ON r.request_id = p.request_id "
                "WHERE p.rollout_id = ? AND p.seq > ? ORDER BY p.seq LIMIT ?",
                (rollout_id, seq, limit),
            )
            try:
                yield (RewardedPair(seq, arm, bool(answered), *rest) for seq, arm, answered, *rest in cursor)
            finally:
                cursor.close()

    def blocks_after(
        self, rollout_id: str, bucket: int, before: int
    ) -> tuple[dict[int, dict[str, dict[int, int]]], dict[int, dict[str, dict[int, int]]]]:
        """Counts of latency and of model time per bucket and arm, `bucket` < b < `before`, read at one moment.

        Each is {b: {arm: {0: n, 1: n}}}, with both arms.
        """
        with self._store.reading() as db:
            rows = db.execute(
                "SELECT guardrail, bucket, grp, outcome, sum(n) FROM tallies WHERE rollout_id = ? "
                "AND guardrail IN ('latency_p95', ?) AND bucket > ? AND bucket < ? "
                "GROUP BY guardrail, bucket, grp, outcome",
                (rollout_id, MODEL_TIME, bucket, before),
            ).fetchall()
        latency: dict[int, dict[str, dict[int, int]]] = {}
        cost: dict[int, dict[str, dict[int, int]]] = {}
        for tally, at, arm, outcome, n in rows:
            empty = {"control": {0: 0, 1: 0}, "treatment": {0: 0, 1: 0}}
            (cost if tally == MODEL_TIME else latency).setdefault(at, empty)[arm][outcome] = n
        return latency, cost

    def last_correction(self) -> int:
        """The number of the newest correction of a label; 0 before the first."""
        with self._store.reading() as db:
            (newest,) = db.execute("SELECT coalesce(max(seq), 0) FROM corrections").fetchone()
        return int(newest)

    def commit_progress(
        self,
        rollout_id: str,
        epoch: int,
        cursor: Cursor,
        moved: Cursor,
        tallies: Mapping[TallyKey, Counts],
        corrections: int = 0,
    ) -> bool:
        """Move the cursor and add what it passed, in one transaction: a pair is counted once, or not yet.

        Args:
            corrections: `last_correction` before the pairs were read.

        Returns:
            False, with nothing changed, when the cursor or the rollout's epoch is no longer what was read, or when a
            label among those that were counted has been corrected since.
        """
        with self._store.writing() as db:
            (now_epoch,) = db.execute("SELECT epoch FROM rollouts WHERE id = ?", (rollout_id,)).fetchone()
            if now_epoch != epoch:
                return False
            if db.execute(
                "SELECT 1 FROM corrections c JOIN pairs p ON p.request_id = c.request_id AND p.idx = c.idx "
                "WHERE c.seq > ? AND p.rollout_id = ? AND p.seq > ? AND p.seq <= ? LIMIT 1",
                (corrections, rollout_id, cursor.labels_seq, moved.labels_seq),
            ).fetchone():
                return False
            moved = replace(moved, version=cursor.version + 1)
            changed = db.execute(
                "UPDATE cursors SET version = ?, body = ? WHERE rollout_id = ? AND version = ?",
                (moved.version, cursor_to_json(moved), rollout_id, cursor.version),
            ).rowcount
            if not changed:
                return False
            add_tallies(db, rollout_id, epoch, tallies)
            return True

    def totals(self, rollout_id: str, epoch: int) -> dict[tuple[str, str], dict[int, int]]:
        """(guardrail, group) -> counts over all of an epoch."""
        with self._store.reading() as db:
            rows = db.execute(
                "SELECT guardrail, grp, outcome, n FROM totals WHERE rollout_id = ? AND epoch = ?",
                (rollout_id, epoch),
            ).fetchall()
        found: dict[tuple[str, str], dict[int, int]] = {}
        for guardrail, group, outcome, n in rows:
            found.setdefault((guardrail, group), {})[outcome] = n
        return found

    def flow_after(self, rollout_id: str, at: float) -> Flow:
        """Answered requests in the time buckets after the one that `at` is in; no pair comes of the others."""
        with self._store.reading() as db:
            first, n, last = db.execute(
                "SELECT min(bucket), sum(n), max(bucket) FROM tallies "
                "WHERE rollout_id = ? AND guardrail = 'requests' AND outcome = 0 AND bucket > ?",
                (rollout_id, bucket_of(at)),
            ).fetchone()
        if n is None:
            return Flow(None, 0, None)
        return Flow(first * BUCKET_SECONDS, n, (last + 1) * BUCKET_SECONDS)

    def mirror_counts(self, rollout_id: str, since: float) -> list[MirrorCounts]:
        """Requests and the shadow's work in each time bucket from the one that `since` is in, oldest first."""
        with self._store.reading() as db:
            rows = db.execute(
                "SELECT bucket, CASE guardrail WHEN 'requests' THEN guardrail ELSE grp END AS what, sum(n) "
                "FROM tallies WHERE rollout_id = ? AND guardrail IN ('requests', ?) AND bucket >= ? "
                "AND outcome = 0 GROUP BY bucket, what",
                (rollout_id, MIRROR, bucket_of(since)),
            ).fetchall()
        found: dict[int, dict[str, int]] = {}
        for bucket, what, n in rows:
            found.setdefault(bucket, {})[what] = n
        return [
            MirrorCounts(
                start=bucket * float(BUCKET_SECONDS),
                requests=counts.get("requests", 0),
                samples=counts.get("samples", 0),
                seconds=counts.get("microseconds", 0) / 1e6,
            )
            for bucket, counts in sorted(found.items())
        ]

    def last_sequence(self, source: str) -> int:
        """The sequence number of a source's last flush; 0 before its first."""
        with self._store.reading() as db:
            row = db.execute("SELECT sequence FROM sources WHERE source = ?", (source,)).fetchone()
        return 0 if row is None else int(row[0])

    def last_counts_at(self) -> float | None:
        """When the newest flush of counts was made."""
        with self._store.reading() as db:
            return db.execute("SELECT max(at) FROM sources").fetchone()[0]  # type: ignore[no-any-return]

    # Reports and housekeeping ----------------------------------------------------------------------------

    def recent_pairs(self, rollout_id: str, limit: int = 5000) -> list[StoredPair]:
        """The newest pairs with records, predictions and labels, oldest first."""
        with self._store.reading() as db:
            rows = db.execute(
                "SELECT seq, request_id, idx, served_arm, control, treatment, control_confidence, "
                "treatment_confidence, groups, record, created_at, label, labelled_at "
                "FROM labelled WHERE rollout_id = ? ORDER BY seq DESC LIMIT ?",
                (rollout_id, limit),
            ).fetchall()
        return [
            StoredPair(*(*row[:8], orjson.loads(row[8]), orjson.loads(row[9]), *row[10:]))
            for row in reversed(rows)
        ]

    @contextmanager
    def unlabelled_pairs(
        self, rollout_id: str, seq: int, since: float, drawn: Callable[[str, int], bool] | None = None
    ) -> Iterator[Iterator[UnlabelledPair]]:
        """Stream a rollout's pairs that both arms answered and that have no label, in arrival order.

        Args:
            seq: only those after it: disagreements before the cursor's `labels_seq` have had their turn.
            since: only of requests made after it, seconds since the epoch.
            drawn: says of a request id and index whether to take it although the arms agree; without it none is taken.
        """
        where = "control <> treatment"
        if drawn is not None:
            # Asked from within the query, so that the others, which are most pairs, are never brought into Python.
            where = f"control IS NOT NULL AND treatment IS NOT NULL AND ({where} OR drawn(request_id, idx))"
        with self._store.reading() as db:
            if drawn is not None:
                db.create_function("drawn", 2, drawn, deterministic=True)
            cursor = db.execute(
                "SELECT request_id, idx, control, treatment, groups, record, created_at FROM labelled "  # noqa: S608
                f"WHERE rollout_id = ? AND seq > ? AND created_at > ? AND {where} AND label IS NULL ORDER BY seq",
                (rollout_id, seq, since),
            )
            try:
                yield (UnlabelledPair(*(*row[:4], _groups(row[4]), *row[5:])) for row in cursor)
            finally:
                cursor.close()

    def recent_missing(self, rollout_id: str, among: int = 100) -> tuple[int, int]:
        """How many of the newest pairs, `among` at most, lack an arm's answer; and how many there are."""
        with self._store.reading() as db:
            missing, found = db.execute(
                "SELECT coalesce(sum(control IS NULL OR treatment IS NULL), 0), count(*) FROM "
                "(SELECT control, treatment FROM pairs WHERE rollout_id = ? ORDER BY seq DESC LIMIT ?)",
                (rollout_id, among),
            ).fetchone()
        return missing, found

    def pair_stats(self, rollout_id: str) -> PairStats:
        """Counts and label lag of a rollout's pairs; bounded work however many there are."""
        cursor = self.cursor(rollout_id)
        with self._store.reading() as db:
            (waiting,) = db.execute(
                "SELECT count(*) FROM (SELECT 1 FROM labelled WHERE rollout_id = ? AND seq > ? "
                "AND control <> treatment AND label IS NULL LIMIT 10000)",
                (rollout_id, cursor.labels_seq),
            ).fetchone()
            lags = [
                max(0.0, lag)
                for (lag,) in db.execute(
                    # CROSS JOIN has the planner begin with the few labels, not with all pairs.
                    "SELECT l.at - p.created_at "
                    "FROM (SELECT * FROM labels ORDER BY seq DESC LIMIT 1000) l CROSS JOIN pairs p "
                    "ON p.rollout_id = ? AND p.request_id = l.request_id AND p.idx = l.idx",
                    (rollout_id,),
                )
            ]
        p95 = quantiles(lags, n=20, method="inclusive")[-1] if len(lags) > 1 else (lags or [None])[0]
        return PairStats(
            cursor.answered, cursor.resolved, cursor.labels, waiting, median(lags) if lags else None, p95
        )

    def prune(self, rollout_id: str, now: float, keep: int = KEEP_PAIRS, limit: int = PRUNED_AT_ONCE) -> int:
        """Delete the oldest counted pairs beyond the newest `keep`, and stale rows, in small steps.

        Returns how many pairs were deleted: at most `limit`, with their labels and rewards. Counts are kept.
        """
        cursor = self.cursor(rollout_id)
        passed = min(cursor.answers_seq, cursor.labels_seq)
        if self.rollout(rollout_id).policy.guardrails.reward.enabled:
            passed = min(passed, cursor.rewards_seq)
        excess = min(cursor.answered, cursor.resolved) - cursor.pruned - keep
        with self._store.writing() as db:
            # Of a worker nothing more comes; what counts inputs goes on from where it was, however long nothing came.
            db.execute(
                "DELETE FROM sources WHERE at < ? AND source NOT LIKE 'inputs/%'", (now - KEEP_SOURCES_S,)
            )
            db.execute("DELETE FROM workers WHERE at < ?", (now - 3600,))
            for guardrail in TALLIED:
                db.execute(
                    "DELETE FROM tallies WHERE rollout_id = ? AND guardrail = ? AND bucket < ?",
                    (rollout_id, guardrail, bucket_of(now - KEEP_BUCKETS_S)),
                )
            if excess <= 0:
                return 0
            oldest = (rollout_id, passed, min(excess, limit))
            chosen = "FROM pairs WHERE rollout_id = ? AND seq <= ? ORDER BY seq LIMIT ?"
            db.execute(
                f"DELETE FROM labels WHERE (request_id, idx) IN (SELECT request_id, idx {chosen})",  # noqa: S608
                oldest,
            )
            db.execute(f"DELETE FROM rewards WHERE request_id IN (SELECT request_id {chosen})", oldest)  # noqa: S608
            deleted = db.execute(f"DELETE FROM pairs WHERE seq IN (SELECT seq {chosen})", oldest).rowcount  # noqa: S608
            row = db.execute("SELECT body FROM cursors WHERE rollout_id = ?", (rollout_id,)).fetchone()
            fresh = cursor_from_json(row[0])
            pruned = replace(fresh, version=fresh.version + 1, pruned=fresh.pruned + deleted)
            db.execute(
                "UPDATE cursors SET version = ?, body = ? WHERE rollout_id = ?",
                (pruned.version, cursor_to_json(pruned), rollout_id),
            )
            return deleted

    def sweep(
        self,
        now: float,
        label_deadline_s: float = 0.0,
        reward_deadline_s: float = 0.0,
        keep: int = KEEP_OLD_PAIRS,
        limit: int = PRUNED_AT_ONCE,
    ) -> bool:
        """Delete what belongs to no active rollout, in small steps that go round and round.

        That is: labels and rewards older than `KEEP_LABELS_S` and than their deadline that have no pair; and of
        every rollout that another has replaced its counts by time bucket, and its pairs but for the newest `keep`,
        which go as well once the newest of them is older than `KEEP_OLD_PAIRS_S`. One step looks at `limit`
        labels and as many rewards, and deletes of one rollout `limit` pairs and `SWEPT_BUCKETS` buckets at most.

        Returns:
            Whether a full step's worth was deleted, so that there may be more to delete at once.
        """
        with self._store.writing() as db:
            labels = _sweep_lone(db, "labels", now - max(KEEP_LABELS_S, label_deadline_s), limit)
            rewards = _sweep_lone(db, "rewards", now - max(KEEP_LABELS_S, reward_deadline_s), limit)
            pairs = _sweep_rollout(db, now, keep, limit)
        return max(labels, rewards, pairs) >= limit


@lru_cache(maxsize=4096)
def _groups(text: str) -> Mapping[str, str]:
    """A pair's groups; few differ, and nobody changes them."""
    found: dict[str, str] = orjson.loads(text)
    return found


_SAME_RECORD = {
    "labels": "p.request_id = labels.request_id AND p.idx = labels.idx",
    "rewards": "p.request_id = rewards.request_id",
}


def _sweep_lone(db: sqlite3.Connection, table: str, old: float, limit: int) -> int:
    """Delete labels or rewards from before `old` that have no pair, among the next `limit`; returns how many."""
    position = f"swept_{table}"
    at = _position(db, position)
    seen, last = db.execute(
        f"SELECT count(*), max(seq) FROM (SELECT seq FROM {table} WHERE seq > ? ORDER BY seq LIMIT ?)",  # noqa: S608
        (at, limit),
    ).fetchone()
    _set_position(db, position, last if seen == limit else 0)
    if not seen:
        return 0
    return db.execute(
        f"DELETE FROM {table} WHERE seq > ? AND seq <= ? AND at < ? AND NOT EXISTS "  # noqa: S608
        f"(SELECT 1 FROM pairs p WHERE {_SAME_RECORD[table]})",
        (at, last, old),
    ).rowcount


def _sweep_rollout(db: sqlite3.Connection, now: float, keep: int, limit: int) -> int:
    """Delete what is too old or too much of the next replaced rollout; returns how many pairs that were."""
    row = db.execute(
        "SELECT number, id FROM rollouts WHERE NOT active AND number > ? ORDER BY number LIMIT 1",
        (_position(db, "swept_rollouts"),),
    ).fetchone()
    if row is None:
        _set_position(db, "swept_rollouts", 0)
        return 0
    number, rollout_id = row
    of = "FROM pairs WHERE rollout_id = ? ORDER BY seq DESC LIMIT 1"
    newest = db.execute(f"SELECT created_at {of}", (rollout_id,)).fetchone()
    if newest is not None and newest[0] < now - KEEP_OLD_PAIRS_S:
        keep = 0
    last = db.execute(f"SELECT seq {of} OFFSET ?", (rollout_id, keep)).fetchone()
    pairs = 0
    if last is not None:
        pairs = db.execute(
            "DELETE FROM pairs WHERE seq IN "
            "(SELECT seq FROM pairs WHERE rollout_id = ? AND seq <= ? ORDER BY seq LIMIT ?)",
            (rollout_id, last[0], limit),
        ).rowcount
    buckets = 0
    for guardrail in TALLIED:
        place = (rollout_id, guardrail)
        (first,) = db.execute(
            "SELECT min(bucket) FROM tallies WHERE rollout_id = ? AND guardrail = ?", place
        ).fetchone()
        if first is not None:
            before = min(first + SWEPT_BUCKETS, bucket_of(now - KEEP_BUCKETS_S))
            buckets += db.execute(
                "DELETE FROM tallies WHERE rollout_id = ? AND guardrail = ? AND bucket < ?", (*place, before)
            ).rowcount
    if not pairs and not buckets:
        _set_position(db, "swept_rollouts", number)
    return pairs


def _position(db: sqlite3.Connection, key: str) -> int:
    return int(db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0])


def _set_position(db: sqlite3.Connection, key: str, value: int) -> None:
    db.execute("UPDATE meta SET value = ? WHERE key = ? AND value <> ?", (value, key, value))


def _update(db: sqlite3.Connection, rollout: Rollout) -> None:
    db.execute(
        "UPDATE rollouts SET version = ?, state = ?, epoch = ?, active = ?, body = ? WHERE id = ?",
        (
            rollout.version,
            rollout.state,
            rollout.epoch,
            int(rollout.active),
            rollout_to_json(rollout),
            rollout.id,
        ),
    )


def _insert_decision(db: sqlite3.Connection, decision: Decision) -> None:
    """Add a decision under the next number, linked to the last; nobody else adds one before the commit."""
    values = {_COLUMNS.get(name, name): getattr(decision, name) for name in _DECISION_FIELDS}
    values["seq"] = _issued(db) + 1
    last = db.execute("SELECT digest FROM decisions ORDER BY seq DESC LIMIT 1").fetchone()
    values["digest"] = link(GENESIS if last is None else last[0], values)
    db.execute(_DECISION_INSERT, [*values.values()])


def _issued(db: sqlite3.Connection) -> int:
    """The highest number that a decision ever had. SQLite keeps count of it, so that an end that was cut off shows."""
    (highest,) = db.execute(
        "SELECT max(coalesce((SELECT max(seq) FROM decisions), 0), coalesce("
        "(SELECT max(CAST(seq AS INTEGER)) FROM sqlite_sequence WHERE name = 'decisions'), 0))"
    ).fetchone()
    return int(highest)


def _decision(row: tuple[object, ...]) -> Decision:
    values = dict(zip(_DECISION_FIELDS, row, strict=True))
    values["override"] = bool(values["override"])
    return Decision(**values)  # type: ignore[arg-type]
