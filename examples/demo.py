"""The whole story on real data, as `make demo` tells it. Every figure it prints is measured in that run."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
WORKLOAD = ROOT / "examples" / "employment"
HOME = Path(".trimtab/demo").absolute()
RATE = 250.0
LABELS_AFTER = 2.0
# A story of minutes: shorter waits than production's, and the same margins and error rates.
POLICY = {"step_min_seconds": 2, "step_min_pairs": 200, "label_deadline_s": 30}
TIMEOUT = 75.0

console = Console(highlight=False, soft_wrap=True)


@dataclass
class Story:
    """What the story needs of one rollout."""

    variant: str
    title: str
    expected: str
    override: str | None = None
    guardrails: tuple[str, ...] = ()
    group: str | None = None


@dataclass
class Outcome:
    """What became of it; the fields of summary.json, and the line printed."""

    row: dict[str, Any]
    line: str
    problems: list[str] = field(default_factory=list)


def main() -> int:
    """Run the story; 0 when every rollout ended as it had to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the server up at the end")
    arguments = parser.parse_args()
    started = time.monotonic()
    shutil.rmtree(HOME, ignore_errors=True)
    os.environ["TRIMTAB_HOME"] = str(HOME)
    os.environ["BENTOML_HOME"] = str(HOME / "bentoml")
    import trimtab

    trimtab.prepare_environment()
    variants = _compress()
    good = _choose(variants)
    stories = [
        Story(good, "A good variant climbs to 90% and is promoted", "promoted"),
        Story(
            "reckless",
            "A reckless variant, forced past the gate, is rolled back",
            "rolled_back",
            override="demo: show that the guardrails catch what the gate would have stopped",
        ),
        Story(
            "no-disability",
            "Fine on average, but it harms one group: rolled back",
            "rolled_back",
            override="demo: show that an average hides a group",
            guardrails=("group_harm", "demographic_parity"),
            group="DIS=1",
        ),
    ]
    with _server(arguments.keep) as (url, process):
        outcomes = _roll_out(url, stories)
        console.rule(f"{3 + len(stories)}  Report on the last one")
        _trimtab("report", str(WORKLOAD))
        summary = _summary(started, variants, outcomes)
        (HOME / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        problems = [problem for outcome in outcomes for problem in outcome.problems]
        _say_end(summary, problems)
        if arguments.keep:
            console.print(f"\nThe server stays up at {url} (process {process.pid}). Try:")
            console.print(f"  TRIMTAB_HOME={HOME} TRIMTAB_URL={url} .venv/bin/trimtab rollout status")
            console.print(f"  curl -s {url}/metrics | grep ^trimtab_")
            console.print(f"  kill {process.pid}    # stops it")
    return 1 if problems else 0


# -- chapter 1: compress and prove -----------------------------------------------------------------------------


def _trimtab(*arguments: str) -> None:
    """Run a command as a user would, with its output on this terminal."""
    shown = " ".join(a.replace(str(ROOT) + "/", "") for a in arguments)
    console.print(f"\n[bold]$ trimtab {shown}[/bold]")
    command = [sys.executable, "-m", "trimtab", *arguments]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"demo: 'trimtab {shown}' failed; its message is above")


def _compress() -> list[Any]:
    console.rule("1  Compress and prove")
    _trimtab("compress", str(WORKLOAD))
    _trimtab("pareto", str(WORKLOAD), "--out", str(HOME / "pareto.png"))
    from compression.variant import list_variants

    variants = list_variants("employment")
    for variant in variants:
        verdict = variant.gate()
        if verdict is not None and not verdict.accepted:
            console.print(f"the gate refuses [bold]{variant.name}[/bold]: {verdict.reasons[0]}")
    return variants


def _choose(variants: list[Any]) -> str:
    """The fastest variant the gate accepted that is within 1 point of full precision with confidence."""

    def fits(variant: Any) -> bool:
        return variant.name != "full" and variant.gate().accepted and variant.scorecard().drop.high <= 0.01

    chosen = min(filter(fits, variants), key=lambda variant: variant.scorecard().latency_at(1).p50_ms)
    console.print(f"chosen for traffic: [bold]{chosen.name}[/bold] (fastest of those within 1 pt)")
    return str(chosen.name)


# -- chapter 2: serve and roll out -----------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _server(keep: bool) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`trimtab serve` as a process of its own; stopped at the end unless it is to be kept."""
    from services.client import Client

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    console.rule("2  Serve")
    console.print(
        f"\n[bold]$ trimtab serve examples/employment --port {port}[/bold]   (log: {HOME / 'server.log'})"
    )
    command = [sys.executable, "-m", "trimtab", "serve", str(WORKLOAD), "--port", str(port)]
    with (HOME / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    succeeded = False
    try:
        with Client(url) as client, console.status("starting gateway, shadow and monitor"):
            for _ in range(600):
                if process.poll() is not None or client.ready():
                    break
                time.sleep(0.1)
            if process.poll() is not None or not client.ready():
                raise SystemExit(f"the server did not start; see {HOME / 'server.log'}")
        console.print(f"ready at {url}")
        yield url, process
        succeeded = True
    finally:
        if not (keep and succeeded) and process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _roll_out(url: str, stories: list[Story]) -> list[Outcome]:
    from compression.workload import load_workload
    from services.client import Client, read_token

    split = load_workload(WORKLOAD).split("production")
    traffic = _Traffic(url, split.records.to_dict("records"), split.labels.tolist())
    outcomes = []
    with Client(url, read_token(HOME)) as client:
        for number, story in enumerate(stories, start=3):
            console.rule(f"{number}  {story.title}")
            outcomes.append(_tell(client, traffic, story))
    return outcomes


class _Traffic:
    """Replays production rows in time order; each rollout takes up where the last one stopped."""

    def __init__(self, url: str, records: list[Any], labels: list[int]) -> None:
        self._url, self._records, self._labels = url, records, labels
        self._at = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[Any]:
        from services.replay import ReplayResult, replay

        result, stop = ReplayResult(), threading.Event()
        rows = slice(self._at, None)
        work = replay(
            self._url,
            self._records[rows],
            self._labels[rows],
            rate=RATE,
            labels_after=LABELS_AFTER,
            stop=stop.is_set,
            result=result,
        )
        thread = threading.Thread(target=asyncio.run, args=(work,), name="traffic")
        thread.start()
        try:
            yield result
        finally:
            stop.set()
            thread.join()
            self._at += result.requests


def _tell(client: Any, traffic: _Traffic, story: Story) -> Outcome:
    command = f"$ trimtab rollout start examples/employment {story.variant}"
    console.print(f"\n[bold]{command}{' --override ...' if story.override else ''}[/bold]")
    with traffic.running() as result:
        rollout = client.start(
            f"employment-{story.variant}", override=story.override, policy=POLICY, actor="demo"
        )
        end = time.monotonic() + TIMEOUT
        shown = ""
        with console.status("") as spinner:
            while True:
                status = client.status(rollout["id"])
                stage = f"{status['state']} {status['weight']}%"
                if stage != shown:
                    console.print(f"  {_clock(result)}  {stage:14}  {status['reason']}")
                    shown = stage
                spinner.update(f"{stage}, {result.requests} requests, {_progress(status)}")
                if status["state"] in ("promoted", "rolled_back") or time.monotonic() > end:
                    break
                time.sleep(0.25)
            # The traffic goes on for a moment, to see that the decision holds for users.
            time.sleep(2.0)
    return _judge(client, story, status, result)


def _clock(result: Any) -> str:
    return f"{result.requests:6d} requests"


def _progress(status: dict[str, Any]) -> str:
    pairs = status["pairs"]
    return f"{pairs['pairs']} pairs, {pairs['labels']} labels, {pairs['waiting']} waiting for one"


def _judge(client: Any, story: Story, status: dict[str, Any], result: Any) -> Outcome:
    """Read the decision back from the ledger and hold it against what the story needs."""
    outcome = status["state"]
    # A promotion is decided on entering `promoting`; `promoted` only says that every worker has it.
    decisive = {"promoted": "promoting", "rolled_back": "rolled_back"}.get(outcome)
    ended = next((d for d in client.decisions(status["id"]) if d["to_state"] == decisive), None)
    row: dict[str, Any] = {
        "variant": story.variant,
        "outcome": outcome,
        "guardrail": ended and ended["guardrail"],
        "group": (ended and ended["group"]) or None,
        "pairs": ended["pairs"] if ended else 0,
        "labels": ended["labels"] if ended else 0,
        "requests": result.requests,
        "failed_requests": result.failed,
        "seconds_to_effect": _seconds_to_effect(ended, result) if ended else None,
        "expected": story.expected,
    }
    problems = []
    if outcome != story.expected:
        problems.append(f"{story.variant}: expected {story.expected}, got {outcome}")
    elif story.guardrails and row["guardrail"] not in story.guardrails:
        problems.append(f"{story.variant}: expected a fairness guardrail, got {row['guardrail']}")
    elif story.group and row["group"] != story.group:
        problems.append(f"{story.variant}: expected group {story.group}, got {row['group']}")
    if result.failed:
        problems.append(f"{story.variant}: {result.failed} user requests failed: {result.errors}")
    line = _line(row, ended) if ended else f"{outcome}: no decision in {TIMEOUT:g} s"
    console.print(f"  [bold]{line}[/bold]")
    return Outcome(row, line, problems)


def _seconds_to_effect(decision: dict[str, Any], result: Any) -> float | None:
    """From the arrival of the evidence that decided to the last worker's switch, or the last treatment reply
    that a user got, whichever came later."""
    if decision["effective_at"] is None:
        return None
    effect = decision["effective_at"]
    if decision["to_state"] == "rolled_back" and result.last_treatment_reply_at:
        effect = max(effect, result.last_treatment_reply_at)
    return round(float(effect - (decision["evidence_at"] or decision["at"])), 3)


def _line(row: dict[str, Any], decision: dict[str, Any]) -> str:
    counted = f"{row['pairs']} pairs, {row['labels']} labels"
    if row["outcome"] == "promoted":
        return (
            f"promoted: {row['guardrail']} {100 * decision['drop']:z.1f} pt, proven under the margin: "
            f"evidence 10^{decision['evidence_log10']:.2f} against its limit 10^{decision['limit_log10']:.2f}, "
            f"{counted}"
        )
    from monitoring.records import MOVES

    drop = decision["drop"]
    what = "moved" if decision["guardrail"] in MOVES else "drop"
    seen = "" if drop is None else f"{what} {100 * drop:z.1f} pt, "
    return (
        f"rolled back by {row['guardrail']}, group {row['group'] or 'everybody'}: {seen}"
        f"evidence 10^{decision['evidence_log10']:.2f} against its limit 10^{decision['limit_log10']:.2f}, "
        f"{counted}, {row['seconds_to_effect']:.2f} s to effect"
    )


# -- the end ---------------------------------------------------------------------------------------------------


def _summary(started: float, variants: list[Any], outcomes: list[Outcome]) -> dict[str, Any]:
    rows = []
    for variant in variants:
        card, verdict = variant.scorecard(), variant.gate()
        latency = card.latency_at(1)
        rows.append(
            {
                "name": variant.name,
                "recipe": variant.manifest.recipe,
                "size_bytes": card.size_bytes,
                "size_ratio": round(card.size_ratio, 3),
                "quality": round(card.quality.value, 5),
                "quality_drop": round(card.drop.value, 5),
                "latency_p50_ms": round(latency.p50_ms, 5),
                "latency_ratio": round(latency.speedup, 3),
                "accepted": verdict.accepted,
                "reasons": verdict.reasons,
            }
        )
    return {
        "workload": "employment",
        "duration_s": round(time.monotonic() - started, 1),
        "variants": rows,
        "rollouts": [outcome.row for outcome in outcomes],
    }


def _say_end(summary: dict[str, Any], problems: list[str]) -> None:
    requests = sum(row["requests"] for row in summary["rollouts"])
    failed = sum(row["failed_requests"] for row in summary["rollouts"])
    console.rule("The end")
    console.print(f"{requests} user requests, {failed} failed; {summary['duration_s']:.0f} s in all")
    console.print(f"summary: {HOME / 'summary.json'}   picture: {HOME / 'pareto.png'}")
    console.print(f"to go on with what it made: export TRIMTAB_HOME={HOME}")
    for problem in problems:
        console.print(f"[red]not as it should be:[/red] {problem}")


if __name__ == "__main__":
    raise SystemExit(main())
