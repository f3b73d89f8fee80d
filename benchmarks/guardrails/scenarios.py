"""The scenarios, who judges them, and the goals. Pure: outcomes of runs in, rows of the table out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.guardrails.peers import PEERS
from monitoring.policy import Policy, parse_policy
from monitoring.traffic import Scene

__all__ = [
    "ALL_ON",
    "ALONE",
    "JUDGES",
    "POLICIES",
    "SCENARIOS",
    "STEP",
    "TITLES",
    "Goal",
    "Outcome",
    "Scenario",
    "interval",
    "result",
    "step_result",
]

ALL_ON, ALONE, ARRIVAL, STEP = "trimtab", "trimtab-accuracy", "arrival-order", "controller-step"
MARGIN = 0.01
_ONLY_ACCURACY = {
    name: {"enabled": False}
    for name in (
        *("group_harm", "class_harm", "demographic_parity", "latency_p95", "latency_vs_control"),
        *("treatment_errors", "sample_ratio"),
    )
}
POLICIES: Mapping[str, Policy] = {
    ALL_ON: parse_policy({"false_rollback_rate": 0.01, "guardrails": {"accuracy_drop": {"margin": MARGIN}}}),
    ALONE: parse_policy(
        {
            "false_rollback_rate": 0.05,
            "guardrails": {"accuracy_drop": {"margin": MARGIN}, **_ONLY_ACCURACY},
        }
    ),
}
"""All guardrails on at alpha 1%; and the accuracy alone at alpha 5%, as its figures were published."""

TITLES: Mapping[str, str] = {
    ALL_ON: "Trimtab, all guardrails, 1%",
    ALONE: "Trimtab, accuracy alone, 5%",
    ARRIVAL: "the same bets, labels as they arrive",
    **{peer.name: peer.title for peer in PEERS},
    STEP: "Trimtab, 30 groups",
}
PEER_NAMES = tuple(peer.name for peer in PEERS)
JUDGES = (ALL_ON, ALONE, *PEER_NAMES)
MANY_GROUPS = tuple((name, (0.02, *(0.98 / 9,) * 9)) for name in "ABC")
"""Three attributes of ten values each: 30 groups, of which three hold 2% of people."""
GROUPS = MANY_GROUPS[:1]

Kind = Literal["false rollbacks", "median delay", "named", "wrong promotions", "promotion", "ratio", "ms"]


@dataclass(frozen=True, slots=True)
class Goal:
    """What a row has to show.

    A promise on a rate is kept when the whole 95% interval keeps it; everything else goes by the figure itself.
    """

    kind: Kind
    bound: float
    labels: int | None = None

    def __str__(self) -> str:
        if self.kind in ("false rollbacks", "wrong promotions"):
            return f"{self.kind} <= {self.bound:.0%}"
        if self.kind == "named":
            return f"caught and named >= {self.bound:.0%}"
        if self.kind == "promotion":
            return f"median <= {self.bound:,.0f} pairs, {self.labels} labels"
        if self.kind == "ratio":
            return f">= {self.bound:g}x the requests of Trimtab"
        return f"median <= {self.bound:,.0f}{' ms' if self.kind == 'ms' else ''}"


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of traffic.

    Attributes:
        judges: whose runs are measured, of TITLES.
        harm_from: the request from which on the candidate is worse than its margin; None when it never is.
        alpha: error rate that peers are given, where they take one.
        promotes: the question is whether and when it is promoted, and not whether it is rolled back.
        part: of the runs that are asked for, how many it gets; rare events take more of them than medians.
        goals: judge -> goal.
    """

    name: str
    title: str
    scene: Scene
    judges: tuple[str, ...] = JUDGES
    harm_from: int | None = None
    alpha: float = 0.05
    promotes: bool = False
    part: float = 1.0
    goals: Mapping[str, Goal] = field(default_factory=dict)


def _drop(points: int, requests: int, goal: int | None = None) -> Scenario:
    drop = points / 100
    goals = {} if goal is None else {ALONE: Goal("median delay", goal)}
    if points == 3:
        goals["unpaired-50"] = Goal("ratio", 5.0)
    return Scenario(
        f"drop-{points}",
        f"a drop of {points} pt",
        Scene(requests=requests, drop=drop, discordance=drop + 0.02, attributes=GROUPS),
        harm_from=0,
        part=0.2,
        goals=goals,
    )


_NONE = Goal("false rollbacks", 0.01)
SCENARIOS = (
    Scenario(
        "aa",
        "no drop (A/A)",
        Scene(attributes=GROUPS),
        judges=(ALL_ON, *PEER_NAMES),
        alpha=0.01,
        goals={ALL_ON: _NONE},
    ),
    Scenario(
        "margin",
        "a drop of 1 pt, exactly the margin",
        Scene(drop=MARGIN, attributes=GROUPS),
        alpha=0.01,
        part=3.0,
        goals={ALL_ON: _NONE, ALONE: Goal("false rollbacks", 0.05)},
    ),
    Scenario(
        "limits",
        "everything exactly at its limit",
        Scene(drop=MARGIN, failing=0.01, slow=0.05, attributes=GROUPS),
        judges=(ALL_ON,),
        part=0.4,
        goals={ALL_ON: _NONE},
    ),
    Scenario(
        "delayed",
        "A/A, labels for the candidate 5 min late",
        Scene(good_news_delay_s=300.0, attributes=GROUPS),
        judges=(*JUDGES, ARRIVAL),
        alpha=0.01,
        part=0.4,
        goals={ALL_ON: _NONE, ALONE: Goal("false rollbacks", 0.05)},
    ),
    Scenario(
        "missing",
        "A/A, half of the labels for the candidate never come, 5% of requests twice",
        Scene(per_second=1.0, good_news_share=0.5, repeated=0.05, attributes=GROUPS),
        judges=(*JUDGES, ARRIVAL),
        alpha=0.01,
        part=0.4,
        goals={ALL_ON: _NONE, ALONE: Goal("false rollbacks", 0.05)},
    ),
    _drop(2, 20_000),
    _drop(3, 20_000, 950),
    _drop(5, 10_000, 340),
    _drop(10, 4_000, 130),
    Scenario(
        "late",
        "good for 10,000, then a drop of 4 pt",
        Scene(discordance=0.02, late_after=10_000, late_drop=0.04, attributes=GROUPS),
        harm_from=10_000,
        part=0.3,
        goals={ALL_ON: Goal("median delay", 1300), ALONE: Goal("median delay", 1300)},
    ),
    Scenario(
        "group",
        "one of 30 groups, of 2% of people, loses 15 pt",
        Scene(requests=30_000, harmed="A=0", harm=0.15, attributes=MANY_GROUPS),
        judges=(ALL_ON,),
        harm_from=0,
        part=0.2,
        goals={ALL_ON: Goal("named", 0.95)},
    ),
    Scenario(
        "promotion",
        "no drop: until promoted",
        Scene(requests=20_000, label_agreements=False, attributes=GROUPS),
        judges=(ALONE, ALL_ON),
        promotes=True,
        part=0.3,
        goals={ALONE: Goal("promotion", 3200, 150)},
    ),
    Scenario(
        "wrong-promotion",
        "exactly at the margin: promoted wrongly",
        Scene(drop=MARGIN, attributes=GROUPS),
        judges=(ALONE, ALL_ON),
        promotes=True,
        part=0.6,
        goals={ALONE: Goal("wrong promotions", 0.05), ALL_ON: Goal("wrong promotions", 0.05)},
    ),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one run.

    Attributes:
        stopped: requests made when it was rolled back or held, or where that is the question promoted; None if never.
        exposed: answers of the candidate's, from the harm on where there is one, until then.
        named: the guardrail and group that decided.
        labels: labels that the evidence had used.
        rolled_back: in a promoting scenario, that it was rolled back instead.
    """

    stopped: int | None
    exposed: int
    named: str = ""
    labels: int = 0
    rolled_back: bool = False


def interval(hits: int, runs: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a rate."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, runs - hits + 1))
    high = 1.0 if hits == runs else float(beta.ppf(1 - tail, hits + 1, runs - hits))
    return low, high


def result(
    scenario: Scenario, judge: str, outcomes: Sequence[Outcome], ours: Sequence[Outcome] = ()
) -> dict[str, Any]:
    """The row of the results.

    Args:
        ours: what Trimtab made of the same runs, for a goal that compares with it.
    """
    runs, since = len(outcomes), scenario.harm_from or 0
    early = [o for o in outcomes if o.stopped is not None and o.stopped <= since]
    stopped = [o for o in outcomes if o.stopped is not None and o.stopped > since]
    wrong = len(stopped) if scenario.harm_from is None else len(early)
    # Without harm, and before it, every rollback is a false one.
    judged = scenario.harm_from is None or scenario.harm_from > 0
    low, high = interval(wrong, runs)
    body: dict[str, Any] = {
        "name": f"{scenario.name}/{judge}",
        "scenario": scenario.title,
        "method": TITLES[judge],
        "runs": runs,
        "requests": scenario.scene.requests,
        "false_rollback": wrong / runs if judged and not scenario.promotes else None,
        "ci": [_rounded(low), _rounded(high)] if judged and not scenario.promotes else None,
        "caught": len(stopped) / (runs - len(early) or 1) if scenario.harm_from is not None else None,
        "median_delay": None,
        "p95_delay": None,
        "exposed": round(statistics.fmean(o.exposed for o in outcomes), 1),
        "named": None,
        "labels": None,
        "promoted": None,
        "goal": None,
        "met": None,
    }
    if scenario.harm_from is not None or scenario.promotes:
        # A run in which nothing happened took longer than it lasted.
        delays = sorted(
            (o.stopped - since) if o.stopped else float("inf") for o in outcomes if o not in early
        )
        body["median_delay"], body["p95_delay"] = _quantile(delays, 0.5), _quantile(delays, 0.95)
    if scenario.scene.harmed:
        named = sum(o.named.endswith(f"/{scenario.scene.harmed}") for o in stopped)
        body["named"] = named / runs
    if scenario.promotes:
        body["promoted"] = len(stopped) / runs
        body["ci"] = [_rounded(value) for value in interval(len(stopped), runs)]
        body["labels"] = statistics.median(o.labels for o in stopped) if stopped else None
        body["rolled_back"] = sum(o.rolled_back for o in outcomes) / runs
    goal = scenario.goals.get(judge)
    if goal is not None:
        body["goal"] = str(goal)
        body["met"] = _met(goal, body, _quantile(sorted(o.stopped or float("inf") for o in ours), 0.5))
    return body


def _met(goal: Goal, row: Mapping[str, Any], ours: float | None) -> bool:
    if goal.kind in ("false rollbacks", "wrong promotions"):
        return bool(row["ci"][1] <= goal.bound)
    if goal.kind == "named":
        return bool(row["named"] >= goal.bound)
    delay = row["median_delay"]
    if goal.kind == "ratio":
        # A peer that never stops within the run took more requests than it had.
        return ours is not None and (delay or row["requests"]) >= goal.bound * ours
    if goal.kind == "promotion":
        return delay is not None and delay <= goal.bound and row["labels"] <= (goal.labels or 0)
    return delay is not None and delay <= goal.bound


def step_result(milliseconds: Sequence[float], goal: float = 20.0) -> dict[str, Any]:
    """The row of the time that one look takes."""
    ordered = sorted(milliseconds)
    found = Goal("ms", goal)
    median = _quantile(ordered, 0.5)
    return {
        "name": STEP,
        "scenario": "one look of the controller: evaluate and advance",
        "method": TITLES[STEP],
        "runs": len(ordered),
        "false_rollback": None,
        "ci": None,
        "median_delay": None,
        "p95_delay": None,
        "exposed": None,
        "median_ms": _rounded(median or 0.0),
        "p95_ms": _rounded(_quantile(ordered, 0.95) or 0.0),
        "goal": str(found),
        "met": median is not None and median <= goal,
    }


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """The value that at least this share is at most; None where that is beyond the run, or there is none."""
    if not ordered:
        return None
    value = ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.499999) - 1))]
    return None if value == float("inf") else float(value)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
