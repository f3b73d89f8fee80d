"""Rollouts as text for a terminal: the tree of one, the list of all, the decisions of one, and their chain."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["render", "render_decisions", "render_rollouts", "render_verified"]

_MARKS = {"promoted": "✔", "rolled_back": "✖", "held": "‖", "blind": "?"}
_ACTS = {"rollback": "ACTS", "hold": "HOLDS", "alert": "ALERTS", "dry-run": "DRY RUN"}


def render(status: Mapping[str, Any]) -> str:
    """One rollout as a tree: state, arms, steps, guardrails by how near they are to acting, workers."""
    evidence = status.get("evidence") or {}
    pairs = status["pairs"]
    steps = status["policy"]["steps"]
    lines = [
        f"{status['id']}  {_MARKS.get(status['state'], '●')} {status['state']}"
        + (f": {status['reason']}" if status["reason"] else ""),
        f"├─ arms        control {status['control']} {100 - status['weight']}%",
        f"│              treatment {status['treatment']} {status['weight']}%"
        + (f"  (override: {status['override_reason']})" if status.get("override_reason") else ""),
        *_cascade(status),
        f"├─ steps       {_steps(steps, status['step'], status['state'])}",
        f"├─ pairs       {pairs['pairs']:,} seen, {pairs['resolved']:,} judged, {pairs['labels']:,} labels of "
        f"disagreements used, {pairs['waiting']:,} disagreements without a label",
    ]
    if evidence.get("waiting"):
        lines.append(f"├─ waits for   {evidence['waiting']}")
    lines += _guardrails(evidence.get("guardrails") or [])
    workers = status.get("workers") or []
    lines.append(f"└─ workers     {_workers(workers, status)}")
    return "\n".join(lines)


def _cascade(status: Mapping[str, Any]) -> list[str]:
    threshold, asked = status.get("cascade_threshold"), status["policy"].get("cascade")
    if threshold is None or asked is None:
        return []
    return [
        f"├─ cascade     treatment's answers stand from confidence {threshold:.6g} on, "
        f"proven to lose at most {100 * asked['max_drop']:g} pt"
    ]


def _steps(steps: Sequence[int], at: int, state: str) -> str:
    done = state in ("promoting", "promoted")
    shown = [f"[{step}%]" if number == at and not done else f"{step}%" for number, step in enumerate(steps)]
    return " → ".join([*shown, "[promoted]" if done else "promoted"])


def _guardrails(guardrails: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each guardrail whom it is nearest to acting on, the nearest first.

    Evidence is log10 of an e-value; it acts at the limit.
    """
    ordered = sorted(guardrails, key=lambda g: g["limit_log10"] - g["evidence_log10"])
    nearest: dict[str, Mapping[str, Any]] = {}
    for guardrail in ordered:
        nearest.setdefault(guardrail["guardrail"], guardrail)
    lines = []
    if ordered:
        lines.append("├─ guardrails  evidence / limit (log10)   estimate / tolerated")
    for guardrail in nearest.values():
        name = guardrail["guardrail"] + (f" {guardrail['group']}" if guardrail["group"] else "")
        name += "" if guardrail["action"] == "rollback" else f" ({guardrail['action']})"
        estimate = guardrail["estimate"]
        shown = "  none yet" if estimate is None else f"{100 * estimate:z8.2f}%"
        acts = (
            f"  {_ACTS[guardrail['action']]}"
            if guardrail["evidence_log10"] >= guardrail["limit_log10"]
            else ""
        )
        tolerated = "-" if guardrail["guardrail"] == "sample_ratio" else f"{100 * guardrail['tolerated']:g}%"
        lines.append(
            f"│    {name:32} {guardrail['evidence_log10']:6.2f} / {guardrail['limit_log10']:.2f}"
            f"   {shown} / {tolerated}{acts}"
        )
    if len(ordered) > len(nearest):
        more = len(ordered) - len(nearest)
        lines.append(
            f"│    and {more} more groups, classes and fields, further from their limits (--json has all)"
        )
    return lines


def _workers(workers: Sequence[Mapping[str, Any]], status: Mapping[str, Any]) -> str:
    if not workers:
        return "none live"
    counts: dict[str, int] = {}
    behind = 0
    for worker in workers:
        counts[worker["service"]] = counts.get(worker["service"], 0) + 1
        behind += worker["revision"] < status["revision"]
    shown = ", ".join(f"{number} {service}" for service, number in sorted(counts.items()))
    return shown + (f"; {behind} not yet at revision {status['revision']}" if behind else "")


def render_rollouts(rollouts: Sequence[Mapping[str, Any]]) -> str:
    """A line for each rollout, newest first."""
    if not rollouts:
        return "no rollouts yet: start one with 'trimtab rollout start WORKLOAD VARIANT'"
    lines = [f"{'id':20} {'state':12} {'weight':>6}  {'started':19}  treatment"]
    for rollout in rollouts:
        routes = rollout["active"] and rollout["state"] != "rolled_back"
        name = rollout["id"] + ("*" if routes else "")
        superseded = rollout["state"] == "promoted" and not rollout["active"]
        state = "superseded" if superseded else rollout["state"]
        lines.append(
            f"{name:20} {state:12} {rollout['weight']:5}%  {_time(rollout['created_at'])}  "
            f"{rollout['treatment']}"
        )
    return "\n".join([*lines, "(* routes traffic now)"])


def render_decisions(decisions: Sequence[Mapping[str, Any]]) -> str:
    """A line for each decision, oldest first."""
    lines = []
    for decision in decisions:
        change = f"{decision['from_state'] or 'new'} → {decision['to_state']} {decision['weight']}%"
        line = f"{_time(decision['at'])}  {decision['actor']:12} {change:32} {decision['reason']}"
        if decision["guardrail"]:
            who = decision["group"] or "everybody"
            line += f" [{decision['guardrail']}, {who}"
            if decision["evidence_log10"] is not None:
                line += f", 10^{decision['evidence_log10']:.2f} of 10^{decision['limit_log10']:.2f}"
            line += f", {decision['pairs']} pairs, {decision['labels']} labels]"
        if decision["override"]:
            line += " [override]"
        lines.append(line)
    return "\n".join(lines)


def render_verified(verified: Mapping[str, Any]) -> str:
    """One line: that the chain of decisions is whole, and its head, or where it is broken."""
    if verified["problem"] is not None:
        return str(verified["problem"]["text"])
    count = verified["count"]
    return f"{count:,} decision{'' if count == 1 else 's'}, chain whole, head {verified['head']}"


def _time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
