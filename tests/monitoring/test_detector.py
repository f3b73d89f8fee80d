"""Detectors of late harm: what they promise between false alarms, and how soon they see harm."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from monitoring.detector import BLOCK_PAIRS, Detector, follow
from monitoring.evidence import drop_evidence
from monitoring.tally import MISSING
from tests.monitoring.judgement import paired_outcomes

MARGIN = 0.02
outcomes = st.lists(st.sampled_from([1, -1, 0, MISSING]), max_size=200)


def blocks_until_alarm(
    rng: np.random.Generator, drop: float, discordance: float, limit: float, most: int
) -> int:
    """Blocks of pairs until a detector reaches `limit` (not a logarithm), or `most`."""
    detector = Detector()
    for number in range(1, most + 1):
        d = paired_outcomes(rng, drop, discordance, (1, BLOCK_PAIRS))[0]
        detector = follow(detector, d.tolist(), MARGIN)
        if detector.evidence >= math.log(limit):
            return number
    return most


@given(outcomes, st.integers(0, 200))
def test_it_stands_where_it_does_however_the_outcomes_were_cut_into_batches(seen: list[int], at: int) -> None:
    whole = follow(Detector(), seen, MARGIN)
    parts = follow(follow(Detector(), seen[:at], MARGIN), seen[at:], MARGIN)
    assert parts.block == whole.block
    assert_allclose(parts.logs, whole.logs)
    assert_allclose(parts.recent, whole.recent)


def test_before_its_first_block_it_knows_nothing() -> None:
    detector = follow(Detector(), [1] * (BLOCK_PAIRS - 1), MARGIN)
    assert (detector.evidence, detector.drop) == (0.0, None)
    assert follow(detector, [1], MARGIN).drop == 1


@given(st.integers(0, BLOCK_PAIRS), st.integers(0, BLOCK_PAIRS))
def test_its_first_block_is_an_e_process_that_has_just_begun(worse: int, better: int) -> None:
    better = min(better, BLOCK_PAIRS - worse)
    rest = BLOCK_PAIRS - worse - better
    detector = follow(Detector(), [1] * worse + [-1] * better + [0] * rest, MARGIN)
    assert detector.evidence == pytest.approx(float(drop_evidence([worse, better, rest, 0], MARGIN)))


@given(outcomes)
def test_it_is_at_least_the_e_process_that_began_with_any_of_its_blocks(seen: list[int]) -> None:
    detector = follow(Detector(), seen, MARGIN)
    whole = seen[: len(seen) - len(seen) % BLOCK_PAIRS]
    for start in range(0, len(whole), BLOCK_PAIRS):
        counts = [whole[start:].count(outcome) for outcome in (1, -1, 0, MISSING)]
        assert detector.evidence >= float(drop_evidence(counts, MARGIN)) - 1e-9


@given(outcomes, st.sampled_from([1, -1, 0]))
def test_a_missing_outcome_never_speaks_against_the_candidate(seen: list[int], known: int) -> None:
    replaced = [known if outcome == MISSING else outcome for outcome in seen]
    assert follow(Detector(), seen, MARGIN).evidence <= follow(Detector(), replaced, MARGIN).evidence + 1e-9


def test_false_alarms_are_as_far_apart_as_stated_when_the_drop_is_exactly_what_is_tolerated() -> None:
    rng = np.random.default_rng(3)
    limit, runs = 40, 200
    lengths = np.array([blocks_until_alarm(rng, MARGIN, 0.1, limit, 2000) for _ in range(runs)])
    error = lengths.std(ddof=1) / math.sqrt(runs)
    assert lengths.mean() - 2.6 * error >= limit  # the whole 99% interval; cut at 2,000 it is only shorter


def test_harm_that_begins_after_many_good_pairs_is_seen_as_soon_as_harm_that_is_there_from_the_start() -> (
    None
):
    rng = np.random.default_rng(5)
    limit = math.log(1e5)
    late, fresh = [], []
    for _ in range(40):
        good = paired_outcomes(rng, 0.0, 0.04, (1, 10_000))[0].tolist()
        bad = paired_outcomes(rng, 0.06, 0.1, (1, 6_000))[0].tolist()
        for start, found in ((follow(Detector(), good, MARGIN), late), (Detector(), fresh)):
            detector, taken = start, 0
            while detector.evidence < limit and taken < len(bad):
                detector = follow(detector, bad[taken : taken + BLOCK_PAIRS], MARGIN)
                taken += BLOCK_PAIRS
            found.append(taken)
    assert np.median(late) <= 1.1 * np.median(fresh)
    # An e-process that saw the good pairs, too, has not come back by then.
    counts = [sum(np.array(good) == d) for d in (1, -1, 0)]
    at = int(np.median(late))
    counts = [n + bad[:at].count(d) for n, d in zip(counts, (1, -1, 0), strict=True)]
    assert float(drop_evidence([*counts, 0], MARGIN)) < 0


def test_the_estimate_is_of_the_newest_pairs() -> None:
    detector = follow(Detector(), [0] * 20_000 + [1, 0, 0, 0, 0] * 400, MARGIN)
    assert detector.drop is not None
    assert 0.13 < detector.drop <= 0.2
