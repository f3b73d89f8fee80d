"""Rewards: what an answer was worth to its user, compared between the users of either arm. Pure.

A reward comes of the one answer that the user saw, so there is no pair of them: rows of the arms are matched instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from monitoring.tally import EVERYBODY, REWARD, Tallies, TallyKey, bucket_of

__all__ = ["NOBODY", "RewardCount", "RewardedPair", "Waiting", "count_rewards"]

Waiting = tuple[str, int, int]
"""Rows that wait for one of the other arm: their arm, how many they are, and the sum of their rewards in millionths."""

NOBODY: Waiting = ("", 0, 0)

_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class RewardedPair:
    """What a pair's reward is counted by.

    Attributes:
        seq: arrival number in the ledger; rises, with gaps.
        arm: who served it, "control" or "treatment".
        answered: whether the candidate has an answer to the input, wherever it ran.
        created_at: when the request was made, seconds since the epoch.
        reward, rewarded_at: 0 to 1, and when it came; None while there is none.
    """

    seq: int
    arm: str
    answered: bool
    created_at: float
    reward: float | None = None
    rewarded_at: float | None = None


@dataclass(slots=True)
class RewardCount:
    """What a run over pairs in arrival order counted, and where it had to stop.

    Attributes:
        tallies: counts to add.
        waiting: the rows that wait for one of the other arm.
        last_seq: seq of the last pair that had its turn; None when none had.
        pairs: how many had.
        newest_at: arrival time of the newest input among them; 0 when there was none.
    """

    tallies: Tallies = field(default_factory=dict)
    waiting: Waiting = NOBODY
    last_seq: int | None = None
    pairs: int = 0
    newest_at: float = 0.0


def count_rewards(
    pairs: Iterable[RewardedPair], waiting: Waiting, now: float, deadline_s: float
) -> RewardCount:
    """Count `reward` strictly first-in-first-out, up to the first pair whose reward may still come.

    Counting rewards as they arrive would be invalid where good news comes sooner: the clicks would be there, and those
    who will not click would not yet have been given up. Here a pair's turn depends on its arrival alone, and a reward
    that did not come within `deadline_s` is 0.

    Rows of one arm wait until one of the other comes. The outcome is then z, the mean reward of control's among them
    minus that of the treatment's, one side of which is a single row, and all begins anew. Which rows are matched
    depends on their arms alone. z is in whole hundredths, rounded down, so that the evidence made of it is never too
    large.

    Pairs to which the candidate has no answer are left out. Where it fails to serve, control serves, and such inputs
    would count for control alone; the shadow finds out which of control's inputs it fails on.

    Args:
        pairs: in arrival order.
        waiting: what the previous run left waiting.
        now: seconds since the epoch.
        deadline_s: seconds from the request.
    """
    result = RewardCount(waiting=waiting)
    for pair in pairs:
        arrival = pair.created_at
        if pair.answered:
            found = _reward(pair, now, deadline_s)
            if found is None:
                break
            reward, arrival = found
            _add(result, pair, reward)
        result.last_seq = pair.seq
        result.pairs += 1
        result.newest_at = max(result.newest_at, arrival)
    return result


def _reward(pair: RewardedPair, now: float, deadline_s: float) -> tuple[int, float] | None:
    """The reward in millionths and when it was known; None while it may still come."""
    ends = pair.created_at + deadline_s
    if pair.reward is not None and pair.rewarded_at is not None and pair.rewarded_at <= ends:
        return round(pair.reward * _MILLION), pair.rewarded_at
    return (0, ends) if now >= ends else None


def _add(result: RewardCount, pair: RewardedPair, reward: int) -> None:
    arm, rows, total = result.waiting
    if not rows or arm == pair.arm:
        result.waiting = (pair.arm, rows + 1, total + reward)
        return
    difference = total - rows * reward if arm == "control" else rows * reward - total
    z = 100 * difference // (rows * _MILLION)
    counts = result.tallies.setdefault(TallyKey(REWARD, EVERYBODY, bucket_of(pair.created_at)), {})
    counts[z] = counts.get(z, 0) + 1
    result.waiting = NOBODY
