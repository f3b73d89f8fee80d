"""What the gateway costs: throughput and latency of /predict, with a rollout off and on, in turns.

    python -m benchmarks.serving [--seconds 5] [--rounds 3] [--connections 8] [--json FILE]

Needs the employment variants (`trimtab compress examples/employment`). Starts a server of its own in a temporary
TRIMTAB_HOME, sends one record per request from `connections` keep-alive connections in a closed loop, and
prints medians over the rounds with their range. The load generator shares this machine's cores with the server,
so that the figures are lower bounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parent.parent


async def _load(
    url: str, bodies: list[bytes], seconds: float, connections: int
) -> tuple[int, int, list[float]]:
    """Closed loop; returns (requests, failures, latencies in ms)."""
    end = time.monotonic() + seconds
    latencies: list[float] = []
    failures = 0

    async def one(session: aiohttp.ClientSession, offset: int) -> None:
        nonlocal failures
        at = offset
        while time.monotonic() < end:
            started = time.perf_counter()
            async with session.post(f"{url}/predict", data=bodies[at % len(bodies)]) as reply:
                await reply.read()
                failures += reply.status != 200
            latencies.append((time.perf_counter() - started) * 1000.0)
            at += connections

    connector = aiohttp.TCPConnector(limit=connections)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        await asyncio.gather(*(one(session, offset) for offset in range(connections)))
    return len(latencies), failures, latencies


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _measure(url: str, bodies: list[bytes], seconds: float, connections: int) -> dict[str, float]:
    requests, failures, latencies = asyncio.run(_load(url, bodies, seconds, connections))
    return {
        "requests_per_s": requests / seconds,
        "failures": failures,
        "p50_ms": _quantile(latencies, 0.50),
        "p95_ms": _quantile(latencies, 0.95),
        "p99_ms": _quantile(latencies, 0.99),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--variant", default="int8-dynamic")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    import trimtab

    home = trimtab.prepare_environment()
    from compression.workload import load_workload
    from examples.demo import free_port
    from services.client import Client, read_token

    records = load_workload(ROOT / "examples/employment").split("production").records.head(2000)
    bodies = [json.dumps({"records": [record]}).encode() for record in records.to_dict("records")]
    modes: dict[str, list[dict[str, float]]] = {"no rollout": [], "rollout, all mirrored": []}
    with tempfile.TemporaryDirectory() as state:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        # The model store is the user's; ledger, metrics and token are this benchmark's own.
        environment = dict(os.environ) | {"TRIMTAB_HOME": state, "BENTOML_HOME": str(home / "bentoml")}
        command = [
            sys.executable,
            "-m",
            "trimtab",
            "serve",
            str(ROOT / "examples/employment"),
            "--port",
            str(port),
        ]
        with (Path(state) / "server.log").open("wb") as log:
            server = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            with Client(url) as client:
                while not client.ready():
                    if server.poll() is not None:
                        raise SystemExit((Path(state) / "server.log").read_text()[-2000:])
                    time.sleep(0.1)
            _measure(url, bodies, 1.0, arguments.connections)
            with Client(url, read_token(Path(state))) as client:
                for _ in range(arguments.rounds):
                    modes["no rollout"].append(
                        _measure(url, bodies, arguments.seconds, arguments.connections)
                    )
                    # Held at half the traffic: no step is ever left, nothing is decided.
                    policy = {
                        "steps": [0, 50],
                        "step_min_pairs": 0,
                        "step_min_seconds": 0,
                        "label_deadline_s": 3600,
                    }
                    client.start(f"employment-{arguments.variant}", policy=policy, override="benchmark")
                    while client.status()["weight"] != 50:
                        time.sleep(0.1)
                    client.verb("current", "pause", reason="benchmark")
                    mode = modes["rollout, all mirrored"]
                    mode.append(_measure(url, bodies, arguments.seconds, arguments.connections))
                    client.verb("current", "rollback", reason="benchmark")
                    time.sleep(1.0)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(20)
    rows = [{"mode": name, **_summary(runs)} for name, runs in modes.items()]
    for row in rows:
        low, high = row["requests_per_s_range"]
        print(
            f"{row['mode']:24} {row['requests_per_s']:8.0f} requests/s ({low:.0f} to {high:.0f})"
            f"  p50 {row['p50_ms']:.2f} ms  p95 {row['p95_ms']:.2f} ms  p99 {row['p99_ms']:.2f} ms"
            f"  {row['failures']:.0f} failed"
        )
    if arguments.json:
        machine = {"cpu": platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()}
        arguments.json.write_text(json.dumps({"rows": rows, "machine": machine}, indent=2) + "\n")


def _summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    rates = [run["requests_per_s"] for run in runs]
    medians = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
    return medians | {
        "requests_per_s_range": [round(min(rates), 1), round(max(rates), 1)],
        "failures": sum(run["failures"] for run in runs),
    }


if __name__ == "__main__":
    main()
