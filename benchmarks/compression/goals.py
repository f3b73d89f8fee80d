"""What the variants are meant to reach, decided before they were measured, and which workloads they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["BASELINES", "GOALS", "WORKLOADS", "Bench", "Goal", "judge"]


@dataclass(frozen=True)
class Bench:
    """A workload of the benchmark.

    Attributes:
        folder: from the top of the repository.
        recipes: names of the recipes that are run; every one that can work when None.
    """

    folder: str
    recipes: tuple[str, ...] | None = None


WORKLOADS: Mapping[str, Bench] = {
    "employment": Bench("examples/employment"),
    "fashion": Bench("examples/fashion"),
    "lenet-300-100": Bench("benchmarks/lenet", ("twelfth", "int8-static", "deep-compression")),
    "sentiment": Bench(
        "examples/sentiment",
        ("int8", "int8-dynamic", "int8-static", "int4-weights", "distilled-heads-int8"),
    ),
}
"""A recipe of the library trains a transformer for half an hour and more; sentiment has those that take minutes."""

BASELINES: Mapping[str, float] = {"employment": 0.79, "fashion": 0.91, "sentiment": 0.88}
"""Accuracy that a practitioner would accept of full precision."""


@dataclass(frozen=True)
class Goal:
    """What one variant has to reach. Each part is left out when None.

    Attributes:
        smaller: at least this many times smaller than full precision's file.
        faster: at least this many times faster than full precision in ONNX Runtime, one record, one thread.
        faster_than_torch: the same beside torch, eager.
        drop: largest loss of accuracy, in points.
        kept: least share of full precision's accuracy.
        fewer_weights: at least this many times fewer non-zero weights.
        no_loss: the loss' interval must reach down to zero.
        no_group_worse: the same for every group.
    """

    workload: str
    variant: str
    title: str
    smaller: float | None = None
    faster: float | None = None
    faster_than_torch: float | None = None
    drop: float | None = None
    kept: float | None = None
    fewer_weights: float | None = None
    no_loss: bool = False
    no_group_worse: bool = False

    def text(self) -> str:
        """The goal in words."""
        parts = [
            f"{self.title}: ",
            f">= {self.smaller:g}x smaller, " if self.smaller else "",
            f">= {self.fewer_weights:g}x fewer weights, " if self.fewer_weights else "",
            f">= {self.faster:g}x faster, " if self.faster else "",
            f">= {self.faster_than_torch:g}x faster than torch, " if self.faster_than_torch else "",
            f"drop <= {self.drop:g} pt, " if self.drop is not None else "",
            f"keeps >= {100 * self.kept:g}% of the accuracy, " if self.kept else "",
            "no loss beyond the interval, " if self.no_loss else "",
            "no group worse beyond its interval, " if self.no_group_worse else "",
        ]
        return "".join(parts).removesuffix(", ")


GOALS: tuple[Goal, ...] = (
    Goal("fashion", "int8-static", "INT8", smaller=3.9, faster=3, drop=0.3),
    Goal("fashion", "fast", "prune and quantize", smaller=8, faster=4, drop=1.0),
    Goal("fashion", "distilled-int8", "distil and quantize", smaller=12, faster=8, drop=2.0),
    Goal("fashion", "deep-compression", "deep compression", smaller=35, drop=1.0),
    Goal("lenet-300-100", "twelfth", "pruned", fewer_weights=12, no_loss=True),
    Goal("sentiment", "int8", "INT8", smaller=3.8, faster=2.5, faster_than_torch=5, drop=0.5),
    Goal("sentiment", "distilled-heads-int8", "distil, heads and INT8", smaller=12.6, faster=5.3, kept=0.97),
    Goal("employment", "distilled-int8", "best", smaller=20, no_group_worse=True),
)


def judge(goal: Goal, row: Mapping[str, Any]) -> list[str]:
    """Which parts of a goal a row misses, in words; none when it is met."""
    low, _ = row["ci"]
    kept = row["quality"] / (row["quality"] + row["quality_drop"])
    missed = {
        "smaller": goal.smaller and row["size_ratio"] < goal.smaller,
        "fewer weights": goal.fewer_weights and row["weights_ratio"] < goal.fewer_weights,
        "faster": goal.faster and row["latency_ratio"] < goal.faster,
        "faster than torch": goal.faster_than_torch and row["torch_ratio"] < goal.faster_than_torch,
        "drop": goal.drop is not None and 100 * row["quality_drop"] > goal.drop,
        "accuracy kept": goal.kept and kept < goal.kept,
        "no loss": goal.no_loss and low > 0,
        "groups": goal.no_group_worse and bool(row["groups_worse"]),
        "a peer is better": bool(row["beaten_by"]),
    }
    return [name for name, miss in missed.items() if miss]
