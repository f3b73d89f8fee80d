"""The ways popular rollout tools judge, on the same traffic. Pure.

None of them sees pairs: a request is answered by one arm, and judged once its label has come. Each is given what its
users would give it at best: one metric, the accuracy, and nobody to look after but everybody.
docs/guardrail-benchmarks.md says what stands for what.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from monitoring.evidence import log_evidence
from monitoring.traffic import NO_ANSWER, Traffic

__all__ = ["PEERS", "Peer", "Split", "as_they_arrive", "split"]

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Requests split between both arms, in the order in which their labels came.

    Attributes:
        treated: whether the candidate answered.
        right: whether the answer that was given was right.
        labels: how many labels had come by each look.
        requests: how many requests were made by each look.
        accuracy: full precision's, as it is known from long ago.
    """

    treated: Bools
    right: Bools
    labels: Ints
    requests: Ints
    accuracy: float


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to judge.

    Attributes:
        share: of requests that the candidate answers.
        stops: the requests at which it rolls back, or None; of the split, the margin and the error rate asked for.
    """

    name: str
    title: str
    share: float
    stops: Callable[[Split, float, float], int | None]


def split(traffic: Traffic, share: float, accuracy: float, every: int = 20) -> Split:
    """Give each request to one arm by its ticket. A request that was sent twice is judged once."""
    first = np.sort(np.unique(traffic.request, return_index=True)[1])
    order = first[np.argsort(traffic.labelled_at[first], kind="stable")]
    treated = traffic.ticket[order] < share
    # A failing candidate's requests are answered by full precision, as with us.
    answer = np.where(
        treated & (traffic.treatment[order] != NO_ANSWER), traffic.treatment[order], traffic.control[order]
    )
    requests = np.arange(every, len(traffic.request) + 1, every)
    labels = np.searchsorted(traffic.labelled_at[order], traffic.created_at[requests - 1], side="right")
    return Split(treated, answer == traffic.label[order], labels, requests, accuracy)


def as_they_arrive(traffic: Traffic) -> Traffic:
    """The same traffic as a judge sees it that counts labels as they arrive and not in the order of the requests.

    Pairs on which both arms agree need no label, and come at once. What has not come by the end is never judged.
    """
    at = np.where(traffic.control != traffic.treatment, traffic.labelled_at, traffic.created_at)
    order = np.argsort(at, kind="stable")
    order = order[at[order] <= traffic.created_at[-1]]
    names = (
        "request",
        "control",
        "treatment",
        "label",
        "members",
        "ticket",
        "failed",
        "slow",
        "control_slow",
    )
    moved = {name: getattr(traffic, name)[order] for name in names}
    return replace(traffic, created_at=at[order], labelled_at=at[order], **moved)


# -- a threshold with a failure limit ---------------------------------------------------------------------------

WINDOW, FAILURE_LIMIT = 500, 3


def _threshold(seen: Split, margin: float, _alpha: float) -> int | None:
    """As an analysis step of Argo Rollouts or a metric check of Flagger: the candidate's accuracy over its last 500
    labels is under the known baseline minus the margin, at three looks in a row."""
    right = np.concatenate([[0], np.cumsum(seen.right[seen.treated])])
    many = np.concatenate([[0], np.cumsum(seen.treated)])[seen.labels]
    mean = (right[many] - right[np.maximum(many - WINDOW, 0)]) / WINDOW
    under = (many >= WINDOW) & (mean < seen.accuracy - margin)
    return _first(seen, under[2:] & under[1:-1] & under[:-2], FAILURE_LIMIT - 1)


# -- a z-test, looked at again and again ------------------------------------------------------------------------

LEAST = 100


def _z_test(seen: Split, margin: float, alpha: float) -> int | None:
    """Two proportions, one-sided, against "the drop is at most the margin": every look once each arm has 100 labels."""
    ones, zeros, right_ones, right_zeros = _both(seen)
    p1, p0 = right_ones / np.maximum(ones, 1), right_zeros / np.maximum(zeros, 1)
    error = np.sqrt(p1 * (1 - p1) / np.maximum(ones, 1) + p0 * (1 - p0) / np.maximum(zeros, 1))
    z = (p0 - p1 - margin) / np.maximum(error, 1e-9)
    return _first(seen, (np.minimum(ones, zeros) >= LEAST) & (z > NormalDist().inv_cdf(1 - alpha)))


def _both(seen: Split) -> tuple[Ints, Ints, Ints, Ints]:
    """By look: labels of the candidate's and of control's answers, and how many of either were right."""
    found = [
        np.concatenate([[0], np.cumsum(of)])[seen.labels]
        for of in (seen.treated, ~seen.treated, seen.treated & seen.right, ~seen.treated & seen.right)
    ]
    return found[0], found[1], found[2], found[3]


# -- Mann-Whitney, interval by interval --------------------------------------------------------------------------

INTERVAL, POINT = 1000, 50
CONFIDENCE, TOLERANCE = 0.98, 0.25


def _mann_whitney(seen: Split, _margin: float, _alpha: float) -> int | None:
    """As Kayenta's judge: each interval of 1,000 labels has 20 points of each arm's accuracy over 50 labels. The metric
    is Low where the upper end of the 98% interval of the Hodges-Lehmann shift is under -25% of the shift's size, and
    one Low fails the only metric there is. There is no margin: it asks whether the candidate is worse at all."""
    intervals = int(seen.labels[-1]) // INTERVAL
    if not intervals:
        return None
    end = intervals * INTERVAL
    place = np.arange(end) // POINT
    treated, right = seen.treated[:end], seen.right[:end]
    series = []
    for arm in (treated, ~treated):
        many = np.bincount(place, weights=arm, minlength=end // POINT)
        good = np.bincount(place, weights=arm & right, minlength=end // POINT)
        # A point without a request of one arm, which is rare, repeats the arm's accuracy so far.
        series.append(np.where(many > 0, good / np.maximum(many, 1), seen.accuracy).reshape(intervals, -1))
    shifts = np.sort((series[0][:, :, None] - series[1][:, None, :]).reshape(intervals, -1), axis=1)
    points = INTERVAL // POINT
    spread = math.sqrt(points * points * (2 * points + 1) / 12)
    # The order statistics of the shifts at which the test turns significant, by the normal approximation.
    below = max(1, round(points * points / 2 - NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * spread))
    upper, shift = shifts[:, points * points - below], np.median(shifts, axis=1)
    low = upper < -TOLERANCE * np.abs(shift)
    if not low.any():
        return None
    labels = (int(low.argmax()) + 1) * INTERVAL
    return int(seen.requests[np.searchsorted(seen.labels, labels)])


# -- an always-valid test without pairs ---------------------------------------------------------------------------


def _unpaired(others: int) -> Callable[[Split, float, float], int | None]:
    """Bets like ours on blocks of one answer of the candidate's and the mean of `others` of control's beside it."""

    def stops(seen: Split, margin: float, alpha: float) -> int | None:
        ones, zeros = np.flatnonzero(seen.treated), np.flatnonzero(~seen.treated)
        blocks = min(len(ones), len(zeros) // others)
        if not blocks:
            return None
        zeros = zeros[: blocks * others].reshape(blocks, others)
        ones = ones[:blocks]
        # z is a whole number of others-ths: control's share of right answers minus the candidate's.
        z = seen.right[zeros].sum(axis=1) - others * seen.right[ones]
        done = np.maximum(ones, zeros[:, -1])
        complete = np.searchsorted(np.maximum.accumulate(done), seen.labels, side="left")
        values = tuple(value / others for value in range(-others, others + 1))
        table = np.zeros((blocks + 1, len(values)), dtype=np.int64)
        table[np.arange(1, blocks + 1), z + others] = 1
        counts = np.cumsum(table, axis=0)[complete]
        evidence = log_evidence(counts, values, margin, -1.0, 1.0, above=True)
        return _first(seen, evidence >= -math.log(alpha))

    return stops


def _first(seen: Split, acts: Bools, later: int = 0) -> int | None:
    """Requests at the first look at which it acts."""
    return int(seen.requests[int(acts.argmax()) + later]) if acts.any() else None


PEERS = (
    Peer("threshold", "fixed threshold, three failures", 0.5, _threshold),
    Peer("z-test", "z-test, peeked", 0.5, _z_test),
    Peer("mann-whitney", "Mann-Whitney per interval", 0.5, _mann_whitney),
    Peer("unpaired-50", "always-valid, unpaired, 50/50", 0.5, _unpaired(1)),
    Peer("unpaired-10", "always-valid, unpaired, 90/10", 0.1, _unpaired(9)),
)
