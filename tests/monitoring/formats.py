"""The ledger's tables as earlier versions of Trimtab made them."""

from __future__ import annotations

FORMAT_2 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('schema', 2), ('revision', 0), ('swept_labels', 0), ('swept_rollouts', 0);

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
  override INTEGER NOT NULL, revision INTEGER NOT NULL, effective_at REAL, alerted_at REAL
);
CREATE INDEX decision_order ON decisions (rollout_id, seq);
CREATE INDEX decision_ineffective ON decisions (seq) WHERE effective_at IS NULL;
CREATE TRIGGER decisions_stay BEFORE DELETE ON decisions
  BEGIN SELECT RAISE(ABORT, 'decisions are never deleted'); END;
CREATE TRIGGER decisions_stand BEFORE UPDATE OF seq, rollout_id, at, actor, from_state, to_state, verb,
  reason, guardrail, grp, evidence_log10, limit_log10, drop_estimate, pairs, labels, weight, evidence_at,
  override, revision ON decisions
  BEGIN SELECT RAISE(ABORT, 'decisions are never changed'); END;

CREATE TABLE workers (
  worker_id TEXT PRIMARY KEY, service TEXT NOT NULL, pid INTEGER NOT NULL, revision INTEGER NOT NULL,
  applied_at REAL NOT NULL, loaded TEXT NOT NULL, error TEXT, at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE leases (name TEXT PRIMARY KEY, holder TEXT NOT NULL, expires_at REAL NOT NULL) WITHOUT ROWID;
"""

FORMAT_3 = (
    FORMAT_2.replace("('schema', 2)", "('schema', 3)")
    .replace("alerted_at REAL\n", "alerted_at REAL, digest TEXT NOT NULL\n")
    .replace("override, revision ON decisions", "override, revision, digest ON decisions")
    + """
CREATE TRIGGER decisions_linked BEFORE INSERT ON decisions WHEN length(NEW.digest) <> 64
  BEGIN SELECT RAISE(ABORT, 'a decision needs a digest'); END;
"""
)

FORMAT_1 = FORMAT_2.replace(
    "('schema', 2), ('revision', 0), ('swept_labels', 0), ('swept_rollouts', 0)",
    "('schema', 1), ('revision', 0)",
).replace("pairs (request_id, idx, rollout_id)", "pairs (rollout_id, request_id, idx)")
