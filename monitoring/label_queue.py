"""What is worth labelling next: where the arms disagree, and a sample of where they agree. Pure.

Where both arms give the same answer a label changes nothing for accuracy, so those that the evidence waits for are
labels of disagreements. Figures that need the truth of agreements too, such as recall by true class or the gaps of
equalized odds, take a sample of them: each sampled pair stands for 1 / `probability` pairs like it, and each
disagreement for itself.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import orjson

from monitoring.quality import fraction

__all__ = ["LabelQueue", "LabelRequest", "UnlabelledPair", "Why", "in_sample", "queue"]

Why = Literal["disagreement", "sample"]

_USE = "trimtab-labels"


@dataclass(frozen=True, slots=True)
class UnlabelledPair:
    """A pair without a label, as the ledger has it; see `monitoring.tally.Pair` for the fields they share.

    Attributes:
        record: JSON text, so that only the few records that are asked for have to be read.
    """

    request_id: str
    index: int
    control: int | None
    treatment: int | None
    groups: Mapping[str, str]
    record: str
    created_at: float


@dataclass(frozen=True, slots=True)
class LabelRequest:
    """One record whose true class is asked for.

    Attributes:
        request_id, index: its key, as feedback takes it.
        why: the arms disagree on it, or it was drawn from those on which they agree.
        probability: of being asked for at all: 1 for a disagreement, the sample's rate for an agreement.
        control, treatment: class index each arm gave; None when that arm could not answer.
        created_at, deadline_at: when the request was made, and until when its label is waited for.
        groups: attribute -> value.
        record: what the client sent; empty for tensors and for records too large to be kept.
    """

    request_id: str
    index: int
    why: Why
    probability: float
    control: int | None
    treatment: int | None
    created_at: float
    deadline_at: float
    groups: Mapping[str, str]
    record: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class LabelQueue:
    """What to label, the most urgent first; and how many disagreements wait in all, whether listed or not."""

    items: tuple[LabelRequest, ...]
    disagreements_waiting: int


def in_sample(request_id: str, index: int, rate: float) -> bool:
    """Whether a pair is in the sample at `rate`, 0 to 1: the same whoever asks, and whenever.

    What is mirrored and which record of a request is judged are drawn from the same id, and this depends on neither.
    What is in the sample at one rate is in it at every larger one.
    """
    return rate >= 1.0 or fraction(_USE, request_id, index) < rate


def queue(
    pairs: Iterable[UnlabelledPair], now: float, deadline_s: float, rate: float, limit: int
) -> LabelQueue:
    """The `limit` labels that are most worth having: disagreements, then the sample, each the oldest first.

    Left out are pairs that an arm could not answer, which count as missing whatever their label is; and pairs whose
    deadline has passed, sampled ones as well, so that both parts are drawn from the same time. From the deadline on a
    disagreement counts as missing when its turn comes, and it is never counted again: reports still use a label that
    comes after that, the evidence does not. (A pair that is held up by an open one before it has not had its turn, and
    its label would count; that is not worth relying on.)

    Args:
        pairs: in any order. They are gone through once, and only `limit` of them are held.
        now: seconds since the epoch.
        deadline_s: how long labels are waited for.
        rate: share of the agreements to sample, 0 to 1.
        limit: 1 or more.
    """
    disagreements = 0

    def wanted() -> Iterator[UnlabelledPair]:
        nonlocal disagreements
        for pair in pairs:
            if pair.control is None or pair.treatment is None or now >= pair.created_at + deadline_s:
                continue
            if pair.control != pair.treatment:
                disagreements += 1
                yield pair
            elif in_sample(pair.request_id, pair.index, rate):
                yield pair

    chosen = heapq.nsmallest(limit, wanted(), key=_turn)
    return LabelQueue(tuple(_asked(pair, deadline_s, rate) for pair in chosen), disagreements)


def _turn(pair: UnlabelledPair) -> tuple[bool, float, str, int]:
    return pair.control == pair.treatment, pair.created_at, pair.request_id, pair.index


def _asked(pair: UnlabelledPair, deadline_s: float, rate: float) -> LabelRequest:
    agree = pair.control == pair.treatment
    return LabelRequest(
        request_id=pair.request_id,
        index=pair.index,
        why="sample" if agree else "disagreement",
        probability=rate if agree else 1.0,
        control=pair.control,
        treatment=pair.treatment,
        created_at=pair.created_at,
        deadline_at=pair.created_at + deadline_s,
        groups=pair.groups,
        record=orjson.loads(pair.record),
    )
