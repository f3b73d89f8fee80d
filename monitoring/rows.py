"""What goes into the ledger and what comes out of it, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson

from monitoring.baseline import baseline_of
from monitoring.detector import Detector
from monitoring.groups import GroupSpec
from monitoring.policy import STORED, Policy
from monitoring.quality import Quality
from monitoring.records import Rollout
from monitoring.reward import NOBODY, Waiting

LIVE_WITHIN_S = 3.0
"""A worker is live when it beat within this many seconds."""


@dataclass(frozen=True, slots=True)
class Route:
    """What a worker needs to split traffic.

    Attributes:
        revision: rises with every change of any other field.
        rollout_id, control, treatment: None without a rollout.
        weight: percent of traffic on the treatment.
        state: the rollout's state, or "none".
        mirror_rate: share of requests to mirror to the other arm; 0 where no pairs are wanted.
        label_deadline_s: how long labels are waited for.
        latency_slo_ms: limit that `latency_p95` outcomes are made with.
        cascade_threshold: confidence from which on the treatment's own answer stands; None for no cascade.
    """

    revision: int
    rollout_id: str | None = None
    control: str | None = None
    treatment: str | None = None
    weight: int = 0
    state: str = "none"
    mirror_rate: float = 0.0
    label_deadline_s: float = 0.0
    latency_slo_ms: float = 0.0
    cascade_threshold: float | None = None


@dataclass(frozen=True, slots=True)
class PairRow:
    """A pair as the shadow writes it; see `monitoring.tally.Pair` for the fields they share."""

    rollout_id: str
    request_id: str
    index: int
    served_arm: str
    control: int | None
    treatment: int | None
    control_confidence: float | None
    treatment_confidence: float | None
    groups: Mapping[str, str]
    record: Mapping[str, object]
    created_at: float


@dataclass(frozen=True, slots=True)
class StoredPair:
    """A pair with all that is known about it, for reports."""

    seq: int
    request_id: str
    index: int
    served_arm: str
    control: int | None
    treatment: int | None
    control_confidence: float | None
    treatment_confidence: float | None
    groups: Mapping[str, str]
    record: Mapping[str, object]
    created_at: float
    label: int | None
    labelled_at: float | None


@dataclass(frozen=True, slots=True)
class LabelRow:
    """The true class of one record; `at` is when it arrived. A correction takes the place of the label before."""

    request_id: str
    index: int
    label: int
    at: float
    correction: bool = False


@dataclass(frozen=True, slots=True)
class RewardRow:
    """What a request was worth to its user, 0 to 1; `at` is when that was known."""

    request_id: str
    reward: float
    at: float


@dataclass(frozen=True, slots=True)
class FeedbackResult:
    """How many labels and rewards had which outcome. Each has one.

    Attributes:
        accepted: were new.
        duplicates: were known already and the same.
        conflicts: were known already and different, and changed nothing.
        corrected: took the place of a label before its pair was counted.
        too_late: took the place of a label whose pair the active rollout had counted.
    """

    accepted: int = 0
    duplicates: int = 0
    conflicts: int = 0
    corrected: int = 0
    too_late: int = 0


@dataclass(frozen=True, slots=True)
class WorkerBeat:
    """A sign of life.

    Attributes:
        service: "gateway", "shadow" or "monitor", in any case of letters.
        revision, applied_at: the route revision the worker works by, and since when.
        loaded: tags of the variants it holds.
        error: why it could not load one; None when all is well.
        at: when it beat.
    """

    worker_id: str
    service: str
    pid: int
    revision: int
    applied_at: float
    loaded: tuple[str, ...]
    error: str | None
    at: float


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far the controller has counted one rollout's inputs.

    Attributes:
        version: rises with every move (compare-and-swap).
        answers_seq, labels_seq: last pair counted for its answers, and for its label.
        blocks_through: last time bucket whose latency block was counted.
        unmatched: rows that wait for a partner; see `monitoring.tally.count_answers`.
        answered, resolved: pairs counted so far by either cursor, for their answers and for their labels.
        compared: those of the resolved that both arms answered.
        labels: labels the evidence needed and had.
        pruned: pairs deleted since.
        answers_at: creation time of the newest pair counted for its answers.
        moved_at: the controller's clock when `answers_seq` last moved.
        detectors: guardrail -> group -> the detector of late harm; none before promotion.
        odds_unmatched: rows that wait for a partner; see `monitoring.tally.Odds`.
        labels_at, blocks_at: arrival time of the newest input counted for labels, and for latency.
        rewards_seq, rewards_at: last pair counted for its reward, and arrival time of the newest input among them.
        reward_waiting: rows of an arm that wait for one of the other; see `monitoring.reward.Waiting`.
    """

    version: int = 0
    answers_seq: int = 0
    labels_seq: int = 0
    blocks_through: int = 0
    unmatched: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    answered: int = 0
    resolved: int = 0
    compared: int = 0
    labels: int = 0
    pruned: int = 0
    answers_at: float = 0.0
    moved_at: float = 0.0
    labels_at: float = 0.0
    blocks_at: float = 0.0
    detectors: Mapping[str, Mapping[str, Detector]] = field(default_factory=dict)
    odds_unmatched: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    rewards_seq: int = 0
    rewards_at: float = 0.0
    reward_waiting: Waiting = NOBODY


@dataclass(frozen=True, slots=True)
class Flow:
    """Requests seen after a point in time: when they began, how many, and when the last ones came."""

    since: float | None
    requests: int
    last_at: float | None


@dataclass(frozen=True, slots=True)
class PairStats:
    """Figures about a rollout's pairs.

    Attributes:
        pairs: counted for their answers.
        resolved: counted for their label.
        labels: labels the evidence needed and had.
        waiting: disagreeing pairs that wait for a label (counted up to 10,000).
        label_lag_median_s, label_lag_p95_s: from request to label, over the newest 1,000 labelled pairs; None
            where there are none.
    """

    pairs: int
    resolved: int
    labels: int
    waiting: int
    label_lag_median_s: float | None
    label_lag_p95_s: float | None


def dump(value: object) -> str:
    """JSON text; NumPy scalars are taken too, and NaN becomes null."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # The options below make it a third slower, and few values need them.
        pass
    return orjson.dumps(
        value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS, default=str
    ).decode()


def rollout_to_json(rollout: Rollout) -> str:
    """The rollout with its policy, as JSON text."""
    fields = {f.name: getattr(rollout, f.name) for f in dataclasses.fields(rollout)}
    fields["policy"] = rollout.policy.model_dump(mode="json")
    fields["groups"] = [dataclasses.asdict(group) for group in rollout.groups]
    return dump(fields)


def rollout_from_json(text: str) -> Rollout:
    """The inverse of `rollout_to_json`; fields a newer version added are left out."""
    names = {f.name for f in dataclasses.fields(Rollout)}
    fields = {name: value for name, value in orjson.loads(text).items() if name in names}
    fields["policy"] = Policy.model_validate(fields["policy"], context=STORED)
    # Rollouts stored before the rate could change.
    fields.setdefault("mirror_rate", fields["policy"].mirror_rate)
    fields["groups"] = tuple(GroupSpec(**group) for group in fields["groups"])
    # Rollouts stored before these two were kept.
    fields["baseline"] = baseline_of(fields.get("baseline"))
    quality = fields.get("quality", {})
    fields["quality"] = Quality(**{**quality, "weights": tuple(quality.get("weights", ()))})
    fields["classes"] = tuple(fields.get("classes", ()))
    fields["waived"] = tuple(fields["waived"])
    fields["alerted"] = tuple(fields["alerted"])
    return Rollout(**fields)


def cursor_to_json(cursor: Cursor) -> str:
    """The cursor as JSON text."""
    return dump(dataclasses.asdict(cursor))


def cursor_from_json(text: str) -> Cursor:
    """The inverse of `cursor_to_json`."""
    fields = orjson.loads(text)
    # Cursors stored before these two were kept.
    fields.setdefault("compared", fields["resolved"])
    fields.setdefault("moved_at", fields["answers_at"])
    for waiting in ("unmatched", "odds_unmatched"):
        fields[waiting] = {name: (side, s) for name, (side, s) in fields.get(waiting, {}).items()}
    fields["detectors"] = {
        guardrail: {
            group: Detector(**{name: tuple(values) for name, values in detector.items()})
            for group, detector in groups.items()
        }
        for guardrail, groups in fields.get("detectors", {}).items()
    }
    fields["reward_waiting"] = tuple(fields.get("reward_waiting", NOBODY))
    return Cursor(**fields)
