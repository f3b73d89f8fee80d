"""Helpers of the judgement tests: rates with their intervals, and a small world with a clock of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from monitoring.controller import Controller, StepResult, apply_command
from monitoring.groups import GroupSpec
from monitoring.ledger import LabelRow, Ledger, PairRow, WorkerBeat
from monitoring.policy import Policy, parse_policy
from monitoring.records import Decision, Rollout
from monitoring.tally import Pair, TallyKey, bucket_of

CONTROL, TREATMENT = "toy-full:1", "toy-small:1"
START = 1_700_000_000.0


def interval(hits: int, runs: int, confidence: float = 0.99) -> tuple[float, float]:
    """Clopper-Pearson interval of a rate."""
    from scipy.stats import beta  # Slow to import, and processes that tests start import this file.

    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, runs - hits + 1))
    high = 1.0 if hits == runs else float(beta.ppf(1 - tail, hits + 1, runs - hits))
    return low, high


def assert_rate_at_most(hits: int, runs: int, rate: float) -> None:
    """Fail unless the whole 99% interval of hits / runs is at most `rate`: doubt fails too."""
    low, high = interval(hits, runs)
    assert high <= rate, (
        f"{hits} of {runs} is {hits / runs:.4f}, 99% interval {low:.4f} to {high:.4f}, over {rate}"
    )


def paired_outcomes(
    rng: np.random.Generator, drop: float, discordance: float, size: tuple[int, int]
) -> np.ndarray:
    """Draws of d in {-1, 0, 1} with mean `drop`, non-zero with probability `discordance`. Shape `size`."""
    u = rng.random(size)
    worse, better = (discordance + drop) / 2, (discordance - drop) / 2
    return np.where(u < worse, 1, np.where(u < worse + better, -1, 0))


def running_counts(d: np.ndarray, every: int) -> np.ndarray:
    """Counts of d = 1, -1, 0 and missing (none) after every so many draws. Shape [runs, looks, 4]."""
    worse = np.cumsum(d == 1, axis=1)[:, every - 1 :: every]
    better = np.cumsum(d == -1, axis=1)[:, every - 1 :: every]
    n = np.arange(1, d.shape[1] + 1)[every - 1 :: every]
    return np.stack([worse, better, n - worse - better, np.zeros_like(worse)], axis=2)


def pair(seq: int, control: int | None, treatment: int | None, **changes: object) -> Pair:
    """A pair of request ``q<seq>`` at START + seq, of the group DIS=1."""
    made = Pair(seq, f"q{seq}", 0, control, treatment, {"DIS": "1"}, START + seq)
    return replace(made, **changes)  # type: ignore[arg-type]


class World:
    """A ledger, a controller and a gateway worker that live by one made-up clock."""

    def __init__(self, path: Path) -> None:
        self.ledger = Ledger(path, busy_timeout=0.5)
        self.now = START
        self.requests = 0
        self.flushes = 0
        self.controller = Controller(self.ledger, clock=lambda: self.now, holder="first")
        self.rollout_id = ""

    def start(
        self,
        policy: Mapping[str, object] | Policy | None = None,
        groups: Sequence[GroupSpec] = (),
        **more: object,
    ) -> Rollout:
        """Start a rollout; small steps unless the policy says otherwise."""
        small = {"step_min_pairs": 20, "step_min_seconds": 1}
        parsed = policy if isinstance(policy, Policy) else parse_policy({**small, **(policy or {})})
        rollout = self.ledger.create_rollout(
            workload="toy",
            control=CONTROL,
            treatment=TREATMENT,
            policy=parsed,
            groups=groups,
            actor="ada",
            now=self.now,
            **more,  # type: ignore[arg-type]
        )
        self.rollout_id = rollout.id
        return rollout

    @property
    def rollout(self) -> Rollout:
        return self.ledger.rollout(self.rollout_id)

    def beat(
        self, name: str = "g1", loaded: tuple[str, ...] = (CONTROL, TREATMENT), error: str | None = None
    ) -> None:
        """A gateway worker shows that it works by the newest route."""
        self.ledger.heartbeat(
            WorkerBeat(name, "Gateway", 1, self.ledger.revision(), self.now, loaded, error, self.now)
        )

    def step(self, seconds: float = 0.5, beat: bool = True) -> StepResult:
        """Time passes, the worker beats and the controller looks."""
        self.now += seconds
        if beat:
            self.beat()
        return self.controller.step()

    def traffic(
        self,
        outcomes: Sequence[int],
        *,
        labels: bool = True,
        groups: Mapping[str, str] | None = None,
        pairs: bool = True,
        answered: bool = True,
        age: float = 0.0,
    ) -> list[str]:
        """One request per outcome d, with its pair and label; returns the request ids.

        `answered`: else the candidate's answer is missing. `age`: seconds since the requests of these pairs.
        """
        rows, marks, ids = [], [], []
        for d in outcomes:
            request = f"q{self.requests}"
            self.requests += 1
            ids.append(request)
            control, treatment, label = {0: (1, 1, 1), 1: (1, 0, 1), -1: (1, 0, 0)}[d]
            rows.append(
                PairRow(
                    self.rollout_id,
                    request,
                    0,
                    "control",
                    control,
                    treatment if answered else None,
                    0.9,
                    0.8,
                    groups or {},
                    {"x": 1.5},
                    self.now - age,
                )
            )
            marks.append(LabelRow(request, 0, label, self.now))
        if pairs:
            self.ledger.record_pairs(rows)
        if labels:
            self.ledger.record_labels(marks)
        self.counts({("requests", "control"): {0: len(outcomes)}})
        return ids

    def counts(self, deltas: Mapping[tuple[str, str], Mapping[int, int]]) -> None:
        """A worker's flush: (guardrail, group) -> counts, in the present time bucket."""
        self.flushes += 1
        keyed = {
            (self.rollout_id, TallyKey(guardrail, group, bucket_of(self.now))): counts
            for (guardrail, group), counts in deltas.items()
        }
        assert self.ledger.add_counts("g1", self.flushes, keyed, self.now)

    def mirrored(self, requests: int, samples: int, sample_s: float) -> None:
        """Requests, of which the shadow has answered some, each of which occupied it for so long."""
        self.counts(
            {
                ("requests", "control"): {0: requests},
                ("mirror", "samples"): {0: samples},
                ("mirror", "microseconds"): {0: round(samples * sample_s * 1e6)},
            }
        )

    def warm(self) -> None:
        """Go on until the candidate is shadowed."""
        self.step()
        self.step()
        assert self.rollout.state == "shadowing"

    def order(self, verb: str, reason: str = "") -> Decision:
        """An operator's command."""
        return apply_command(self.ledger, self.rollout_id, verb, "ada", reason, self.now)

    def climb(self, state: str = "promoted", most: int = 200) -> None:
        """Good traffic until the rollout is in a state."""
        for _ in range(most):
            if self.rollout.state == state:
                return
            if self.rollout.state not in ("pending", "warmup"):
                self.traffic([0] * 40)
            self.step()
        raise AssertionError(f"still {self.rollout.state}: {self.rollout.reason}")
