"""Judgement: numbers in, decisions out.

`Ledger` is what services write to and read the route from; `Controller` decides; `Policy` says by what rules.
Metrics live in `monitoring.metrics`, which is not imported here: it must be imported only once the process's
metrics folder is known.
"""

from monitoring.controller import Controller, apply_command
from monitoring.errors import (
    LedgerTooNew,
    LedgerUnavailable,
    PolicyError,
    RolloutConflict,
    RolloutNotFound,
    TrimtabError,
)
from monitoring.groups import GroupSpec, group_specs
from monitoring.ledger import FeedbackResult, LabelRow, Ledger, PairRow, RewardRow, Route, WorkerBeat
from monitoring.policy import Policy, parse_policy
from monitoring.records import Decision, Rollout
from monitoring.tally import MISSING, Pair, TallyKey, bucket_of, merge

__all__ = [
    "MISSING",
    "Controller",
    "Decision",
    "FeedbackResult",
    "GroupSpec",
    "LabelRow",
    "Ledger",
    "LedgerTooNew",
    "LedgerUnavailable",
    "Pair",
    "PairRow",
    "Policy",
    "PolicyError",
    "RewardRow",
    "Rollout",
    "RolloutConflict",
    "RolloutNotFound",
    "Route",
    "TallyKey",
    "TrimtabError",
    "WorkerBeat",
    "apply_command",
    "bucket_of",
    "group_specs",
    "merge",
    "parse_policy",
]
