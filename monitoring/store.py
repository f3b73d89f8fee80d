"""The SQLite file under the ledger: connections, transactions, schema, and one place for its errors."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from monitoring.chain import FIELDS, GENESIS, link
from monitoring.errors import LedgerTooNew, LedgerUnavailable

SCHEMA_VERSION = 4

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('schema', 4), ('revision', 0), ('swept_labels', 0), ('swept_rollouts', 0);

CREATE TABLE rollouts (
  id TEXT PRIMARY KEY, number INTEGER NOT NULL UNIQUE, version INTEGER NOT NULL, state TEXT NOT NULL,
  epoch INTEGER NOT NULL, active INTEGER NOT NULL, created_at REAL NOT NULL, body TEXT NOT NULL
) WITHOUT ROWID;
CREATE UNIQUE INDEX one_active ON rollouts (active) WHERE active;

CREATE TABLE pairs (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, rollout_id TEXT NOT NULL REFERENCES rollouts (id),
  request_id TEXT NOT NULL, idx INTEGER NOT NULL, served_arm TEXT NOT NULL,
  control INTEGER, treatment INTEGER, control_confidence REAL, treatment_confidence REAL,
  groups TEXT NOT NULL, record TEXT NOT NULL, created_at REAL NOT NULL
);
-- The request first: labels, which know no rollout, find their pairs by it.
CREATE UNIQUE INDEX pair_key ON pairs (request_id, idx, rollout_id);
CREATE INDEX pair_order ON pairs (rollout_id, seq);

-- Labels know no rollout: they may come before their pair does, or serve two rollouts.
CREATE TABLE labels (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL, idx INTEGER NOT NULL,
  label INTEGER NOT NULL, at REAL NOT NULL
);
CREATE UNIQUE INDEX label_key ON labels (request_id, idx);

CREATE VIEW labelled AS
  SELECT p.*, l.label, l.at AS labelled_at
  FROM pairs p LEFT JOIN labels l ON l.request_id = p.request_id AND l.idx = p.idx;

CREATE TABLE tallies (
  rollout_id TEXT NOT NULL REFERENCES rollouts (id), guardrail TEXT NOT NULL, bucket INTEGER NOT NULL,
  grp TEXT NOT NULL, outcome INTEGER NOT NULL, epoch INTEGER NOT NULL, n INTEGER NOT NULL,
  PRIMARY KEY (rollout_id, guardrail, bucket, grp, outcome, epoch)
) WITHOUT ROWID;
-- The same counts without the bucket: what decisions are made of, so that their cost never grows.
CREATE TABLE totals (
  rollout_id TEXT NOT NULL REFERENCES rollouts (id), epoch INTEGER NOT NULL, guardrail TEXT NOT NULL,
  grp TEXT NOT NULL, outcome INTEGER NOT NULL, n INTEGER NOT NULL,
  PRIMARY KEY (rollout_id, epoch, guardrail, grp, outcome)
) WITHOUT ROWID;
CREATE TABLE sources (source TEXT PRIMARY KEY, sequence INTEGER NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE cursors (
  rollout_id TEXT PRIMARY KEY REFERENCES rollouts (id), version INTEGER NOT NULL, body TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE status (
  rollout_id TEXT PRIMARY KEY REFERENCES rollouts (id), at REAL NOT NULL, body TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE decisions (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, rollout_id TEXT NOT NULL REFERENCES rollouts (id), at REAL NOT NULL,
  actor TEXT NOT NULL, from_state TEXT NOT NULL, to_state TEXT NOT NULL, verb TEXT NOT NULL,
  reason TEXT NOT NULL, guardrail TEXT, grp TEXT, evidence_log10 REAL, limit_log10 REAL, drop_estimate REAL,
  pairs INTEGER NOT NULL, labels INTEGER NOT NULL, weight INTEGER NOT NULL, evidence_at REAL,
  override INTEGER NOT NULL, revision INTEGER NOT NULL, effective_at REAL, alerted_at REAL, digest TEXT NOT NULL
);
CREATE INDEX decision_order ON decisions (rollout_id, seq);
CREATE INDEX decision_ineffective ON decisions (seq) WHERE effective_at IS NULL;
CREATE TRIGGER decisions_stay BEFORE DELETE ON decisions
  BEGIN SELECT RAISE(ABORT, 'decisions are never deleted'); END;

CREATE TABLE workers (
  worker_id TEXT PRIMARY KEY, service TEXT NOT NULL, pid INTEGER NOT NULL, revision INTEGER NOT NULL,
  applied_at REAL NOT NULL, loaded TEXT NOT NULL, error TEXT, at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE leases (name TEXT PRIMARY KEY, holder TEXT NOT NULL, expires_at REAL NOT NULL) WITHOUT ROWID;
"""

_FEEDBACK = """
INSERT INTO meta VALUES ('swept_rewards', 0);

-- What labels were before somebody corrected them.
CREATE TABLE corrections (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL, idx INTEGER NOT NULL,
  was INTEGER NOT NULL, label INTEGER NOT NULL, at REAL NOT NULL
);
CREATE INDEX correction_key ON corrections (request_id, idx);
CREATE TRIGGER corrections_stand BEFORE UPDATE ON corrections
  BEGIN SELECT RAISE(ABORT, 'corrections are never changed'); END;
CREATE TRIGGER corrections_go AFTER DELETE ON labels
  BEGIN DELETE FROM corrections WHERE request_id = OLD.request_id AND idx = OLD.idx; END;

-- Of a whole request, as labels are of its records; they know no rollout either.
CREATE TABLE rewards (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL, reward REAL NOT NULL, at REAL NOT NULL
);
CREATE UNIQUE INDEX reward_key ON rewards (request_id);
"""

_GUARDS = """
CREATE TRIGGER decisions_stand BEFORE UPDATE OF seq, rollout_id, at, actor, from_state, to_state, verb,
  reason, guardrail, grp, evidence_log10, limit_log10, drop_estimate, pairs, labels, weight, evidence_at,
  override, revision, digest ON decisions
  BEGIN SELECT RAISE(ABORT, 'decisions are never changed'); END;
-- A program of an earlier format that has the file open cannot add what the chain would not cover.
CREATE TRIGGER decisions_linked BEFORE INSERT ON decisions WHEN length(NEW.digest) <> 64
  BEGIN SELECT RAISE(ABORT, 'a decision needs a digest'); END;
"""

_FROM_1 = """
DROP INDEX pair_key;
CREATE UNIQUE INDEX pair_key ON pairs (request_id, idx, rollout_id);
INSERT INTO meta VALUES ('swept_labels', 0), ('swept_rollouts', 0);
UPDATE meta SET value = 2 WHERE key = 'schema';
"""

_FROM_2 = """
ALTER TABLE decisions ADD COLUMN digest TEXT NOT NULL DEFAULT '';
DROP TRIGGER IF EXISTS decisions_stand;
UPDATE meta SET value = 3 WHERE key = 'schema';
"""

_FROM_3 = """
UPDATE meta SET value = 4 WHERE key = 'schema';
"""


class Store:
    """One SQLite file in WAL mode, used by many threads and processes at once.

    Every thread has a connection of its own: readers then never wait for a writer, so that a worker's look at
    the revision is quick while its flusher waits for the write lock. The file must be on a local disk.

    Args:
        path: the file; it and its folder are made at first use, and never again once they were seen.
        busy_timeout: seconds to wait for another process's write before giving up.
    """

    def __init__(self, path: Path, busy_timeout: float) -> None:
        self.path = path
        self._timeout = busy_timeout
        self._lock = threading.Lock()
        self._open: dict[int, tuple[sqlite3.Connection, tuple[int, int]]] = {}
        self._pid = os.getpid()
        self._seen = False

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent view of the file; raises LedgerUnavailable."""
        with self._errors():
            connection = self._connection()
            if connection.in_transaction:
                yield connection
                return
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.rollback()

    @contextmanager
    def writing(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """A write transaction, all or nothing; raises LedgerUnavailable.

        Args:
            durable: the commit survives a power cut too (synchronous=FULL). Without it it survives the
                death of any process, which is enough for what can be counted again.
        """
        with self._errors():
            connection = self._connection()
            connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.commit()
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.rollback()
                raise

    def close(self) -> None:
        """Close every thread's connection. The store opens again when it is used again."""
        with self._lock:
            for connection, _ in self._open.values():
                connection.close()
            self._open.clear()

    def _connection(self) -> sqlite3.Connection:
        if self._pid != os.getpid():  # A connection must not be used on both sides of a fork.
            self._open = {}
            self._lock = threading.Lock()
            self._pid = os.getpid()
        here = threading.get_ident()
        held = self._open.get(here)
        try:
            found = self.path.stat()
        except FileNotFoundError:
            if self._seen:  # Making a new one would quietly forget every decision.
                raise LedgerUnavailable(f"ledger {self.path}: the file is gone") from None
            found = None
        if held is not None and found is not None:
            if held[1] == (found.st_dev, found.st_ino):
                return held[0]
            held[0].close()  # Another file has taken its place.
        connection = self._connect(make=found is None)
        made = self.path.stat()
        with self._lock:
            alive = {thread.ident for thread in threading.enumerate()}
            for ident in [ident for ident in self._open if ident not in alive]:
                self._open.pop(ident)[0].close()
            self._open[here] = (connection, (made.st_dev, made.st_ino))
        self._seen = True
        return connection

    def _connect(self, *, make: bool) -> sqlite3.Connection:
        """Open the file; only `make` may make it, or one that vanished just now would come back empty."""
        if make:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={'rwc' if make else 'rw'}",
            timeout=self._timeout,
            isolation_level=None,
            check_same_thread=False,
            uri=True,
        )
        try:
            connection.execute("PRAGMA foreign_keys=ON")
            self._into_wal(connection)
            _migrate(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _into_wal(self, connection: sqlite3.Connection) -> None:
        # Changing the journal mode does not wait for a lock, so processes that start together could fail.
        give_up = time.monotonic() + self._timeout
        while True:
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() >= give_up:
                    raise
                time.sleep(0.01)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if not isinstance(error, sqlite3.OperationalError):
                self._drop()  # "Not a database", "malformed": a fresh connection may find the file mended.
            raise LedgerUnavailable(f"ledger {self.path}: {error}") from error
        except OSError as error:
            raise LedgerUnavailable(f"ledger {self.path}: {error.strerror or error}") from error

    def _drop(self) -> None:
        with self._lock:
            held = self._open.pop(threading.get_ident(), None)
        if held is not None:
            with suppress(sqlite3.Error):
                held[0].close()


@contextmanager
def decision_rows(db: sqlite3.Connection) -> Iterator[Iterator[tuple[dict[str, Any], object]]]:
    """Stream what the chain covers of every decision, and its digest; text that is not UTF-8 comes escaped."""
    factory = db.text_factory
    db.text_factory = _escaped
    cursor = db.execute(f"SELECT {', '.join(FIELDS)}, digest FROM decisions ORDER BY seq")  # noqa: S608
    try:
        yield ((dict(zip(FIELDS, row[:-1], strict=True)), row[-1]) for row in cursor)
    finally:
        cursor.close()
        db.text_factory = factory


def _escaped(text: bytes) -> str:
    return text.decode(errors="surrogateescape")


def _from_1(connection: sqlite3.Connection) -> None:
    _run(connection, _FROM_1)


def _from_2(connection: sqlite3.Connection) -> None:
    """Chain the decisions that were made before there was a chain, as they are now."""
    _run(connection, _FROM_2)
    with decision_rows(connection) as rows:
        decisions = [fields for fields, _ in rows]
    digest = GENESIS
    for fields in decisions:
        digest = link(digest, fields)
        connection.execute("UPDATE decisions SET digest = ? WHERE seq = ?", (digest, fields["seq"]))
    _run(connection, _GUARDS)


def _from_3(connection: sqlite3.Connection) -> None:
    _run(connection, _FEEDBACK + _FROM_3)


_STEPS = (_from_1, _from_2, _from_3)
"""From format 1 on, each to the next."""


def _migrate(connection: sqlite3.Connection) -> None:
    """Make the tables of a new file, bring an older one up to date, refuse one of a newer version."""
    version = _version(connection)
    if version < SCHEMA_VERSION:
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = _version(connection)  # Another process may have been first.
            if version == 0:
                _run(connection, _SCHEMA + _FEEDBACK + _GUARDS)
            else:
                for step in _STEPS[version - 1 :]:
                    step(connection)
            connection.commit()
        except BaseException:
            connection.rollback()
            raise
        version = _version(connection)
    if version > SCHEMA_VERSION:
        raise LedgerTooNew(
            f"the ledger has format {version} and this version of Trimtab knows up to {SCHEMA_VERSION}: "
            "use the newer Trimtab, or another TRIMTAB_HOME"
        )


def _version(connection: sqlite3.Connection) -> int:
    """The format of the file; 0 when it has no tables yet."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() is None:
        return 0
    return int(connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()[0])


def _run(connection: sqlite3.Connection, script: str) -> None:
    """Single statements, because executescript() would commit between them."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            connection.execute(statement)
            statement = ""
