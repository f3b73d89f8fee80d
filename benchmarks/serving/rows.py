"""The rows of the table: which series each compares, and the goal. Pure: measurements in, verdicts out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["ROWS", "SOAK", "Row", "Series", "names", "result"]


@dataclass
class Series:
    """One thing measured once a round.

    Attributes:
        values: one for each round.
        failures: requests that failed, all rounds together.
        problem: why there are none, or not as many as rounds.
        details: more figures of each round, by name.
    """

    values: list[float] = field(default_factory=list)
    failures: int = 0
    problem: str | None = None
    details: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        ours, peer: series; the ratio is the one's median over the other's.
        bound: how the goal limits the ratio; there is none on a row that only informs.
    """

    name: str
    title: str
    ours: str
    peer: str
    unit: str
    bound: Literal[">=", "<="] = ">="
    goal: float | None = None


ROWS = (
    Row(
        "v2-json-vs-fastapi", "V2 JSON against FastAPI", "trimtab v2-json", "fastapi", "requests/s", goal=2.2
    ),
    Row(
        "v2-json-vs-mlserver",
        "V2 JSON against MLServer",
        "trimtab v2-json",
        "mlserver",
        "requests/s",
        goal=6.0,
    ),
    Row("v2-json-vs-ray", "V2 JSON against Ray Serve", "trimtab v2-json", "ray", "requests/s", goal=40.0),
    Row(
        "v2-json-vs-litserve",
        "V2 JSON against LitServe",
        "trimtab v2-json",
        "litserve",
        "requests/s",
        goal=9.0,
    ),
    Row(
        "v2-json-vs-bare-asgi",
        "V2 JSON against bare ASGI",
        "trimtab v2-json",
        "bare-asgi v2-json",
        "requests/s",
        goal=0.8,
    ),
    Row(
        "v2-binary-vs-bare-asgi",
        "V2 binary against bare ASGI",
        "trimtab v2-binary",
        "bare-asgi v2-binary",
        "requests/s",
        goal=0.8,
    ),
    Row(
        "predict-vs-bentoml",
        "/predict against a BentoML API",
        "trimtab predict",
        "bentoml",
        "requests/s",
        goal=5.0,
    ),
    Row("tail", "p99 over p50 at half of saturation", "tail p99", "tail p50", "ms", "<=", 4.0),
    Row(
        "tail-bare-asgi",
        "the same of bare ASGI: what the machine allows",
        "bare-asgi tail p99",
        "bare-asgi tail p50",
        "ms",
        "<=",
    ),
    Row(
        "transformer",
        "MiniLM INT8 through V2 against its session called directly",
        "minilm served",
        "minilm direct",
        "runs/s",
        goal=0.9,
    ),
    Row(
        "everything-on",
        "V2 JSON with a rollout and mirror against without",
        "trimtab v2-json",
        "trimtab v2-json off",
        "requests/s",
        goal=0.85,
    ),
    Row(
        "mirrored-p50",
        "p50 with all requests mirrored against next to none",
        "p50 mirrored 100%",
        "p50 mirrored 0.1%",
        "ms",
        "<=",
        1.05,
    ),
    *(
        Row(
            f"mirror-cpu-{percent}",
            f"CPU of the shadow over the gateway's, mirror rate {percent}%",
            f"shadow CPU at {percent}%",
            f"gateway CPU at {percent}%",
            "CPU s/s",
        )
        for percent in (1, 10, 100)
    ),
    Row("multi-worker", "V2 JSON, 2 workers against 1", "trimtab 2 workers", "trimtab v2-json", "requests/s"),
)
SOAK = "soak"


def names() -> list[str]:
    """All rows in the order of the table."""
    return [*(row.name for row in ROWS), SOAK]


def result(row: Row, series: Mapping[str, Series], rounds: int) -> dict[str, Any]:
    """The row of the results. One that was not measured in full, or had failures, is not met."""
    ours, peer = series.get(row.ours, Series()), series.get(row.peer, Series())
    problems = [
        f"{name}: {one.problem or 'not measured in every round'}"
        for name, one in ((row.ours, ours), (row.peer, peer))
        if one.problem or len(one.values) < rounds
    ]
    failures = ours.failures + peer.failures
    body: dict[str, Any] = {
        "name": row.name,
        "title": row.title,
        "unit": row.unit,
        "ours_series": row.ours,
        "peer_series": row.peer,
        "ours": _median(ours.values),
        "peer": _median(peer.values),
        "ratio": None,
        "bound": row.bound if row.goal is not None else None,
        "goal": row.goal,
        "met": None if row.goal is None else False,
        "ours_range": _range(ours.values),
        "peer_range": _range(peer.values),
        "ratio_range": None,
        "rounds": min(len(ours.values), len(peer.values)),
        "failures": failures,
        "problem": "; ".join(problems) or None,
    }
    if ours.values and peer.values and statistics.median(peer.values) > 0:
        ratio = statistics.median(ours.values) / statistics.median(peer.values)
        body["ratio"] = _rounded(ratio)
        if len(ours.values) == len(peer.values):
            # Round by round: what the two have in common, such as a slow hour of the machine, is not in it.
            body["ratio_range"] = _range(
                [a / b for a, b in zip(ours.values, peer.values, strict=True) if b > 0]
            )
        if row.goal is not None:
            within = ratio >= row.goal if row.bound == ">=" else ratio <= row.goal
            body["met"] = within and not failures and not problems
    return body


def _median(values: Sequence[float]) -> float | None:
    return _rounded(statistics.median(values)) if values else None


def _range(values: Sequence[float]) -> list[float] | None:
    return [_rounded(min(values)), _rounded(max(values))] if values else None


def _rounded(value: float) -> float:
    """To four digits that say something."""
    return float(f"{value:.4g}") if abs(value) < 1000 else round(value, 1)
