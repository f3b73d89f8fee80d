"""Runs of the scenarios: seeded traffic, judged by each."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.guardrails.peers import PEERS, as_they_arrive, split
from benchmarks.guardrails.scenarios import (
    ALL_ON,
    ALONE,
    ARRIVAL,
    MANY_GROUPS,
    MARGIN,
    POLICIES,
    SCENARIOS,
    STEP,
    Outcome,
    Scenario,
    result,
    step_result,
)
from monitoring.guardrails import Assessment
from monitoring.policy import parse_policy
from monitoring.records import PROMOTING, ROLLED_BACK
from monitoring.simulate import simulate
from monitoring.traffic import Scene, Traffic, generate, guarded_groups

__all__ = ["LOOK_EVERY", "SEED", "measure", "traces"]

SEED, LOOK_EVERY = 20261122, 20
_PEERS = {peer.name: peer for peer in PEERS}
_COST = {ALL_ON: 6.0, ALONE: 1.0, ARRIVAL: 1.0}
"""About how long the judges take, for telling how much time is left."""


def measure(only: frozenset[str], runs: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows of these scenarios; each gets its part of `runs`."""
    chosen = [scenario for scenario in SCENARIOS if scenario.name in only]
    work = {s.name: s.part * s.scene.requests * sum(1 + _COST.get(j, 0.5) for j in s.judges) for s in chosen}
    rows, done, began = [], 0.0, time.monotonic()
    spoken = began
    for scenario in chosen:
        outcomes: dict[str, list[Outcome]] = {judge: [] for judge in scenario.judges}
        many = max(1, round(scenario.part * runs))
        for run in range(many):
            seed = (SEED, zlib.crc32(scenario.name.encode()), run)
            traffic = generate(scenario.scene, np.random.default_rng(seed))
            for judge in scenario.judges:
                outcomes[judge].append(_judged(scenario, judge, traffic))
            done += work[scenario.name] / many
            if time.monotonic() - spoken > 15:
                spoken = time.monotonic()
                left = (spoken - began) * (sum(work.values()) / done - 1)
                say(f"{scenario.name}: {run + 1} of {many} runs; about {left / 60:.1f} minutes left")
        rows += [result(scenario, judge, found, outcomes.get(ALONE, ())) for judge, found in outcomes.items()]
        say(f"{scenario.title}: done")
    if STEP in only:
        rows.append(step_result(_look_times()))
    return rows


def _judged(scenario: Scenario, judge: str, traffic: Traffic) -> Outcome:
    since = scenario.harm_from or 0
    if judge in _PEERS:
        peer = _PEERS[judge]
        seen = split(traffic, peer.share, scenario.scene.accuracy, LOOK_EVERY)
        stopped = peer.stops(seen, MARGIN, scenario.alpha)
        exposed = traffic.ticket[since : len(traffic.request) if stopped is None else stopped] < peer.share
        return Outcome(stopped, int(exposed.sum()))
    groups = guarded_groups(scenario.scene) if judge == ALL_ON else ()
    until = (ROLLED_BACK, PROMOTING) if scenario.promotes else (ROLLED_BACK,)
    run = simulate(
        POLICIES[ALONE if judge == ARRIVAL else judge],
        groups,
        as_they_arrive(traffic) if judge == ARRIVAL else traffic,
        look_every=LOOK_EVERY,
        until=until,
    )
    end = run.entered(PROMOTING if scenario.promotes else ROLLED_BACK)
    if end is None:
        return Outcome(None, run.exposed(since), rolled_back=run.rollout.state == ROLLED_BACK)
    decision = end.decision
    return Outcome(
        end.requests, run.exposed(since), f"{decision.guardrail}/{decision.group}", decision.labels
    )


def _look_times(requests: int = 10_000) -> list[float]:
    """Milliseconds of each look at a rollout with 30 groups; making the sums for it is in them, reading them is not."""
    scene = Scene(requests=requests, attributes=MANY_GROUPS)
    ends: list[float] = []

    def note(_requests: int, _assessment: Assessment) -> None:
        ends.append(time.perf_counter())

    traffic = generate(scene, np.random.default_rng(SEED))
    simulate(POLICIES[ALL_ON], guarded_groups(scene), traffic, look_every=LOOK_EVERY, watch=note)
    return [1000 * (b - a) for a, b in pairwise(ends)]


def traces(drops: Sequence[float] = (0.0, MARGIN, 0.03, 0.10), requests: int = 4000) -> list[dict[str, Any]]:
    """One run for each drop: log10 of the evidence by requests, until it is rolled back."""
    # It stays in the shadow, so that the evidence is one line.
    settings = POLICIES[ALONE].model_dump(exclude_none=True) | {"step_min_pairs": 1_000_000}
    policy, found = parse_policy(settings), []
    for place, drop in enumerate(drops):
        line: list[tuple[int, float]] = [(0, 0.0)]
        limits: list[float] = []

        def note(
            seen: int,
            assessment: Assessment,
            line: list[tuple[int, float]] = line,
            limits: list[float] = limits,
        ) -> None:
            verdict = next(v for v in assessment.verdicts if v.guardrail == "accuracy_drop")
            line.append((seen, round(verdict.evidence_log10, 3)))
            limits.append(verdict.limit_log10)

        scene = Scene(requests=requests, drop=drop, discordance=max(0.04, drop + 0.02))
        traffic = generate(scene, np.random.default_rng((SEED, place)))
        simulate(policy, (), traffic, look_every=LOOK_EVERY, watch=note)
        found.append({"drop": drop, "limit": round(limits[0], 3), "line": line})
    return found
