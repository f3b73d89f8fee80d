"""Late harm: e-detectors, which start anew at every moment and so never have to make up for good weeks.

An e-process that has seen many good pairs has lost its capital, and has to win it back before it can show harm that
began today. A detector is the sum of the e-processes that began at each block of pairs so far, which one line keeps up:
M = (1 + M) * what this block pays (Shiryaev 1963; Roberts 1966; Shin, Ramdas & Rinaldo, "E-detectors: a
nonparametric framework for sequential change detection", NEJSDS 2023, arXiv:2203.03532, section 2). Before any harm M
grows by at most 1 a block on average, so that an alarm at M >= A comes after A blocks on average or later. That is a
promise on the time between false alarms and not on their probability: a detector that looks for ever raises one some
day.

A weighted mean of detectors, with weights that sum to 1, is a detector again. So one stands for each of the bets of
`monitoring.evidence`, and one more mean for all guardrails and groups: each acts at A over its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from monitoring.evidence import BETS, LOG_CAPITAL, PAIRED, log_factors
from monitoring.tally import MISSING

__all__ = ["BLOCK_PAIRS", "Detector", "follow"]

BLOCK_PAIRS = 25
"""Pairs of a group that make a block; a detector moves once a block."""

_FADES = 0.98
"""What a block adds to `recent` fades by this with each later one: about the last 50 count."""
_OUTCOMES = (1, -1, 0, MISSING)


@dataclass(frozen=True, slots=True)
class Detector:
    """Where a detector of paired outcomes stands.

    Attributes:
        logs: natural logarithm of M for each bet; empty before the first block.
        block: counts of d = 1, -1, 0 and missing in the block that is being filled.
        recent: the same of about the last 50 blocks, the later ones counting more.
    """

    logs: tuple[float, ...] = ()
    block: tuple[int, ...] = (0, 0, 0, 0)
    recent: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)

    @property
    def evidence(self) -> float:
        """Natural logarithm of the mean of M over the bets, weighed by their capital; 0 before the first block."""
        if not self.logs:
            return 0.0
        return float(np.logaddexp.reduce(LOG_CAPITAL + self.logs))

    @property
    def drop(self) -> float | None:
        """The drop of late, among known outcomes."""
        known = sum(self.recent[:3])
        return (self.recent[0] - self.recent[1]) / known if known else None


def follow(detector: Detector, outcomes: Sequence[int], margin: float) -> Detector:
    """The detector after more outcomes, in the order in which their pairs arrived.

    Args:
        outcomes: d = 1, -1, 0 or MISSING.
        margin: the drop that is tolerated.
    """
    factors = log_factors(PAIRED, margin, -1.0, 1.0, True)
    logs = np.array(detector.logs) if detector.logs else np.full(BETS, -np.inf)
    block, recent, moved = list(detector.block), np.array(detector.recent), bool(detector.logs)
    position = 0
    while position < len(outcomes):
        taken = outcomes[position : position + BLOCK_PAIRS - sum(block)]
        position += len(taken)
        block = [count + taken.count(outcome) for count, outcome in zip(block, _OUTCOMES, strict=True)]
        if sum(block) == BLOCK_PAIRS:
            logs = np.logaddexp(0.0, logs) + factors @ block
            recent = _FADES * recent + block
            block, moved = [0] * len(block), True
    return Detector(tuple(logs.tolist()) if moved else (), tuple(block), tuple(recent.tolist()))
