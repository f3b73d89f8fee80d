"""`trimtab guardrails`: what a policy promises on made-up traffic, and its JSON schema for editors."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monitoring.errors import PolicyError
from monitoring.policy import Policy, parse_policy
from monitoring.policy_file import read_settings

if TYPE_CHECKING:
    from monitoring.simulate import Run
    from monitoring.traffic import Scene

__all__ = ["guardrails_app", "read_policy", "simulated", "table"]

guardrails_app = typer.Typer(
    help="Try a policy on made-up traffic, before real users do.", no_args_is_help=True
)

_DAY = 86400.0
_UNFED = ("equalized_odds", "reward")
"""Guardrails, off unless asked for, for which the made-up traffic has nothing to judge."""
_ANY_TRAFFIC = 100_000
"""Requests a day where nobody says: it matters for waits and deadlines only."""


@guardrails_app.command("schema")
def schema() -> None:
    """The JSON schema of a policy, for editors that check YAML as it is typed."""
    print(json.dumps(Policy.model_json_schema(), indent=2))


@guardrails_app.command("simulate")
def simulate_command(
    policy: Annotated[
        Path | None, typer.Option(help="YAML with a policy's settings; else the defaults.")
    ] = None,
    drop: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Accuracy that a bad candidate loses.")
    ] = 0.03,
    discordance: Annotated[
        float,
        typer.Option(min=0.0, max=0.9, help="How often exactly one of the two is right; at least the drop."),
    ] = 0.05,
    requests_per_day: Annotated[
        int | None, typer.Option(min=1, help="Your traffic: says how long it all takes.")
    ] = None,
    labels_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Labels that ever come.")] = 1.0,
    groups: Annotated[int, typer.Option(min=0, max=100, help="Guarded groups, all of one size.")] = 0,
    pairs: Annotated[int, typer.Option(min=100, max=1_000_000, help="Of each run.")] = 20_000,
    runs: Annotated[int, typer.Option(min=1, max=100_000)] = 200,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How often a policy rolls back a candidate that loses nothing, and how soon one that loses too much.

    By the real guardrails, looked at every 20 pairs, on made-up traffic with independent requests.
    """
    if discordance < drop:
        raise PolicyError(f"--discordance {discordance:g} cannot be less than --drop {drop:g}")
    found = simulated(
        read_policy(policy),
        drop=drop,
        discordance=discordance,
        requests_per_day=requests_per_day,
        labels_share=labels_share,
        groups=groups,
        pairs=pairs,
        runs=runs,
        seed=seed,
    )
    print(json.dumps(found, indent=2) if as_json else table(found))


def read_policy(path: Path | None) -> Policy:
    """The policy in a file, as `trimtab rollout start --policy` reads it; the defaults without one.

    Raises:
        PolicyError: the file cannot be read, or what it says is not a policy.
    """
    return Policy() if path is None else parse_policy(read_settings(path))


def simulated(
    policy: Policy,
    *,
    drop: float,
    discordance: float,
    requests_per_day: int | None = None,
    labels_share: float = 1.0,
    groups: int = 0,
    pairs: int = 20_000,
    runs: int = 200,
    seed: int = 1,
) -> dict[str, Any]:
    """What becomes of candidates with no drop and with this one; shows its progress on stderr."""
    from monitoring.traffic import Scene

    per_day = (requests_per_day or _ANY_TRAFFIC) * policy.mirror_rate
    scene = Scene(
        requests=pairs,
        per_second=per_day / _DAY,
        discordance=discordance,
        label_share=labels_share,
        attributes=(("group", (1 / groups,) * groups),) if groups > 1 else (),
    )
    drops = [0.0, drop] if drop else [0.0]
    told = Progress(runs * len(drops))
    candidates = [_candidate(policy, scene, each, runs, seed, told) for each in drops]
    told.end()
    return {
        "drop": drop,
        "discordance": discordance,
        "labels_share": labels_share,
        "groups": len(scene.attributes[0][1]) if scene.attributes else 0,
        "pairs": pairs,
        "runs": runs,
        "seed": seed,
        "requests_per_day": requests_per_day,
        "mirror_rate": policy.mirror_rate,
        "margin": policy.guardrails.accuracy_drop.margin,
        "false_rollback_rate": policy.false_rollback_rate,
        "candidates": candidates,
        "not_simulated": [name for name in _UNFED if policy.guardrails.section(name).enabled],
    }


class Progress:
    """How far it is, on stderr, every two seconds."""

    def __init__(self, of: int) -> None:
        self._of, self._done, self._began, self._told = of, 0, time.monotonic(), time.monotonic()

    def one(self) -> None:
        """Another run is over."""
        self._done += 1
        now = time.monotonic()
        if now - self._told > 2:
            self._told = now
            left = (now - self._began) / self._done * (self._of - self._done)
            print(f"{self._done} of {self._of} runs, {left:.0f} s left", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Everything is over."""
        if self._told > self._began:
            print(f"{self._of} runs in {time.monotonic() - self._began:.0f} s", file=sys.stderr, flush=True)


def _candidate(
    policy: Policy, scene: Scene, drop: float, runs: int, seed: int, told: Progress
) -> dict[str, Any]:
    import numpy as np

    from monitoring.records import PROMOTED, ROLLED_BACK
    from monitoring.simulate import simulate
    from monitoring.traffic import generate, guarded_groups

    scene = replace(scene, drop=drop)
    back: list[tuple[float, float]] = []
    promoted: list[tuple[float, float]] = []
    by: dict[str, int] = {}
    labels: list[float] = []
    for run in range(runs):
        # The same people come to both candidates.
        traffic = generate(scene, np.random.default_rng((seed, run)))
        done = simulate(policy, guarded_groups(scene), traffic)
        if end := done.entered(PROMOTED):
            labels.append(end.decision.labels)
        for state, found in ((ROLLED_BACK, back), (PROMOTED, promoted)):
            found.append(_when(done, state))
        if end := done.entered(ROLLED_BACK):
            name = end.decision.guardrail or end.decision.reason
            by[name] = by.get(name, 0) + 1
        told.one()
    return {
        "drop": drop,
        "rolled_back": _told(back),
        "by": dict(sorted(by.items(), key=lambda item: -item[1])),
        "promoted": _told(promoted) | {"labels": _quantile(labels, 0.5)},
    }


def _when(run: Run, state: str) -> tuple[float, float]:
    """Pairs and seconds until it came into a state."""
    from monitoring.traffic import START

    made = run.entered(state)
    return (math.inf, math.inf) if made is None else (made.requests, made.decision.at - START)


def _told(found: Sequence[tuple[float, float]]) -> dict[str, Any]:
    hits = sum(pairs < math.inf for pairs, _ in found)
    low, high = _interval(hits, len(found))
    told: dict[str, Any] = {"runs": hits, "rate": hits / len(found), "interval": [low, high]}
    for place, unit in enumerate(("pairs", "seconds")):
        values = [each[place] for each in found]
        told |= {f"median_{unit}": _quantile(values, 0.5), f"p95_{unit}": _quantile(values, 0.95)}
    return told


def _interval(hits: int, runs: int) -> tuple[float, float]:
    """Wilson's 95% interval of a rate."""
    z2 = 1.959964**2
    middle = (hits + z2 / 2) / (runs + z2)
    half = math.sqrt(z2 * (hits * (runs - hits) / runs + z2 / 4)) / (runs + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def _quantile(values: Sequence[float], share: float) -> float | None:
    """The value that at least this share of all is at most; None where that is beyond the run."""
    if not values:
        return None
    value = sorted(values)[math.ceil(share * len(values)) - 1]
    return None if value == math.inf else value


# -- for people -----------------------------------------------------------------------------------------------


def table(found: Mapping[str, Any]) -> str:
    """The result as a plain table, and what it was made with."""
    timed = found["requests_per_day"] is not None
    heads = ["candidate", "rolled back", "95% interval", "pairs (median, p95)", "time (median, p95)"]
    lines = [heads]
    for candidate in found["candidates"]:
        back = candidate["rolled_back"]
        low, high = back["interval"]
        what = f"a drop of {100 * candidate['drop']:g} pt" if candidate["drop"] else "no drop"
        lines.append(
            [
                what,
                f"{100 * back['rate']:.3g}% ({back['runs']} of {found['runs']})",
                f"{100 * low:.3g}% to {100 * high:.3g}%",
                _both(back, "pairs", found["pairs"]) if candidate["drop"] else "-",
                _both(back, "seconds", None) if candidate["drop"] else "-",
            ]
        )
    width = 5 if timed else 4
    widths = [max(len(line[column]) for line in lines) for column in range(width)]
    text = [
        "  ".join(cell.ljust(size) for cell, size in zip(line, widths, strict=False)).rstrip()
        for line in lines
    ]
    return "\n".join([*text, *_notes(found, timed)])


def _notes(found: Mapping[str, Any], timed: bool) -> list[str]:
    margin, rate = found["margin"], found["false_rollback_rate"]
    lines = [f"promised: within a margin of {100 * margin:g} pt at most {100 * rate:g}% are ever rolled back"]
    for candidate in found["candidates"]:
        if candidate["by"]:
            names = ", ".join(f"{name} {times}" for name, times in candidate["by"].items())
            lines.append(f"rolled back with a drop of {100 * candidate['drop']:g} pt by: {names}")
    promoted = found["candidates"][0]["promoted"]
    line = f"no drop is promoted in {100 * promoted['rate']:.3g}% of runs"
    if promoted["runs"]:
        line += f", after (median, p95) {_both(promoted, 'pairs', found['pairs'])} pairs"
        line += f", {_both(promoted, 'seconds', None)}" if timed else ""
        line += f"; it takes {promoted['labels']:,.0f} labels"
    lines.append(line)
    made = f"{found['runs']} runs of {found['pairs']:,} pairs, {100 * found['discordance']:g}% discordance, "
    made += f"{100 * found['labels_share']:g}% of labels, {found['groups']} groups, seed {found['seed']}"
    lines += [
        f"{name} is not simulated: it has its part of the rate, and nothing here to judge"
        for name in found["not_simulated"]
    ]
    if found["mirror_rate"] < 1:
        made += f"; one request in {1 / found['mirror_rate']:.3g} makes a pair"
    return [*lines, made]


def _both(told: Mapping[str, Any], unit: str, most: int | None) -> str:
    """Median and p95; beyond the run where there is none."""
    values = (told[f"median_{unit}"], told[f"p95_{unit}"])
    beyond = "longer" if most is None else f"> {most:,}"
    return ", ".join(
        beyond if value is None else f"{value:,.0f}" if unit == "pairs" else _duration(value)
        for value in values
    )


def _duration(seconds: float) -> str:
    for size, name in ((_DAY, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.2g} s"
