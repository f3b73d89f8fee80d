"""A whole server as a user starts it, in a folder of its own, and traffic to it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

from monitoring.ledger import Ledger
from services.client import Client, read_token
from tests import models

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")

# Short waits, and the margins and error rates of production.
QUICK: dict[str, Any] = {"step_min_seconds": 0.3, "step_min_pairs": 30, "label_deadline_s": 20}
ENDED = ("promoted", "rolled_back")
# What tests do to a server makes it slow, too: then nothing but the candidate's errors may end its rollout.
ONLY_ERRORS: dict[str, Any] = {
    name: {"enabled": False}
    for name in (
        *("accuracy_drop", "group_harm", "class_harm", "demographic_parity"),
        *("latency_p95", "latency_vs_control", "sample_ratio"),
    )
}


def until(condition: Callable[[], T], what: str, seconds: float = 20.0, pause: float = 0.02) -> T:
    """Wait for a condition and return what it gave; fail when it does not come."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(pause)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """One server: its folder, its processes and a client with the operators' token.

    Args:
        home: TRIMTAB_HOME; the model store inside it must be there.
        workers: gateway processes.
        command: what to start instead of `trimtab serve`.
        workload: name of the workload that is served.
        environment: added to this process's.
    """

    def __init__(
        self,
        home: Path,
        workers: int = 1,
        command: list[str] | None = None,
        cwd: Path | None = None,
        workload: str = "points",
        **environment: str,
    ) -> None:
        self.home = home
        self.workload = workload
        self.workers = workers
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.data_port = free_port()
        self.data_url = f"http://127.0.0.1:{self.data_port}"
        self._command = command
        self._cwd = cwd or home
        self._environment = {
            **os.environ,
            "TRIMTAB_HOME": str(home),
            "BENTOML_HOME": str(home / "bentoml"),
            "TRIMTAB_DATA_PORT": str(self.data_port),
            "TRIMTAB_REPORT_S": "86400",  # reports have tests of their own, and cost seconds
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: dict[int, psutil.Process] = {}

    # -- life ----------------------------------------------------------------------------------------------

    def start(self, wait: bool = True) -> Server:
        command = self._command or [
            *(sys.executable, "-m", "trimtab", "serve", str(models.WORKLOAD)),
            *("--workers", str(self.workers), "--data-port", str(self.data_port)),
        ]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                env=self._environment,
                cwd=self._cwd,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self, seconds: float = 60.0) -> None:
        """Until all workers answer and all three services beat or have come up."""
        until(self._is_ready, f"the server is ready; its log:\n{self.log()[-3000:]}", seconds)
        until(lambda: len(self.pids("Monitor")) == 1, "the monitor is up")

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the server ended:\n{self.log()[-3000:]}"
        with contextlib.suppress(httpx.HTTPError):
            ready = (self.url + "/readyz", self.data_url + "/v2/health/ready")
            if all(httpx.get(url, timeout=2).status_code == 200 for url in ready):
                beats = self.beats()
                return beats.count("gateway") >= self.workers and beats.count("shadow") >= 1
        return False

    def beats(self) -> list[str]:
        """Services of the workers that beat of late."""
        return [beat.service for beat in self.ledger.workers(time.time())]

    def stop(self) -> None:
        """As Ctrl-C does; whatever is left after that is killed."""
        if self._process is None:
            return
        self._look()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        self.kill()

    def kill(self) -> None:
        """kill -9 of the whole tree, arbiter first, so that nothing is started again."""
        self._look()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
        for process in self._seen.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _, alive = psutil.wait_procs(list(self._seen.values()), timeout=10)
        assert not alive, f"orphans: {alive}"
        self._process = None
        self._seen = {}

    def _look(self) -> list[psutil.Process]:
        """The processes under the arbiter, remembered for the end."""
        if self._process is None:
            return []
        try:
            children = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self._seen |= {child.pid: child for child in children}
        return children

    # -- looks inside ----------------------------------------------------------------------------------------

    def pids(self, service: str) -> list[int]:
        """Process ids of a service's workers."""
        found = []
        for child in self._look():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                command = " ".join(child.cmdline())
                named = re.search(r"--service-name[= ](\w+)", command)
                if (
                    "_bentoml_impl.worker.service" in command
                    and (named[1] if named else "Gateway") == service
                ):
                    found.append(child.pid)
        return sorted(found)

    def kill_one(self, service: str) -> int:
        """kill -9 of one of a service's workers; returns its process id."""
        pid = until(lambda: self.pids(service), f"{service} runs")[0]
        os.kill(pid, signal.SIGKILL)
        return pid

    @property
    def log_path(self) -> Path:
        return self.home / "server.log"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.home / f"{self.workload}.ledger.db", busy_timeout=5.0)

    def client(self) -> Client:
        return Client(self.url, read_token(self.home))

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, by its name and labels."""
        text = httpx.get(self.url + "/metrics", timeout=10).text
        samples = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def rollout(self, variant: str, override: str | None = None, **policy: Any) -> dict[str, Any]:
        """Start a rollout with the quick policy."""
        with self.client() as client:
            return client.start(
                f"points-{variant}", override=override, policy={**QUICK, **policy}, actor="test"
            )

    def status(self, rollout_id: str = "current") -> dict[str, Any]:
        with self.client() as client:
            return client.status(rollout_id)

    def wait_state(self, rollout_id: str, *states: str, seconds: float = 30.0) -> dict[str, Any]:
        """Until the rollout is in one of the states."""

        def reached() -> dict[str, Any] | None:
            status = self.status(rollout_id)
            wrong = status["state"] in ENDED and status["state"] not in states
            assert not wrong, f"{status['state']} instead of {states}: {status['reason']}"
            return status if status["state"] in states else None

        try:
            return until(reached, f"{rollout_id} is {states}", seconds, pause=0.1)  # type: ignore[return-value]
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.status(rollout_id)}\n{self.log()[-3000:]}") from None

    def clear(self) -> None:
        """Roll back what runs or was promoted, so that the next test starts with control alone."""
        with self.client() as client:
            for rollout in client.rollouts():
                if rollout["active"] and rollout["state"] != "rolled_back":
                    client.verb(rollout["id"], "rollback", reason="the test is over")
        self.wait_effect()

    def wait_effect(self) -> None:
        """Until every gateway worker works by the route as it is now."""
        revision = self.ledger.revision()

        def applied() -> bool:
            running = self.pids("Gateway")  # the beat of a killed worker outlives it for a while
            beats = [beat for beat in self.ledger.workers(time.time()) if beat.pid in running]
            return len(beats) >= self.workers and all(beat.revision >= revision for beat in beats)

        until(applied, f"all workers work by revision {revision}")

    def promoted(self, variant: str, **policy: Any) -> dict[str, Any]:
        """A rollout that an operator promoted at once, in effect in every worker."""
        rollout = self.rollout(variant, step_min_seconds=3600, **policy)
        self.wait_state(rollout["id"], "shadowing")
        with self.client() as client:
            client.verb(rollout["id"], "promote", full=True, reason="for a test")
        self.wait_state(rollout["id"], "promoted")
        self.wait_effect()
        return rollout

    def halfway(self, variant: str, **policy: Any) -> str:
        """A rollout at half of the traffic, in effect in every worker, that only an operator or its errors end."""
        quiet = {"steps": [0, 50, 90], "step_min_seconds": 3600, "guardrails": ONLY_ERRORS}
        rollout_id = str(self.rollout(variant, **{**quiet, **policy})["id"])
        self.wait_state(rollout_id, "shadowing")
        with self.client() as client:
            client.verb(rollout_id, "promote")
        self.wait_effect()
        return rollout_id


class Memory:
    """Resident bytes of a server's processes, by service, looked at ten times a second."""

    def __init__(self, server: Server, *services: str) -> None:
        self._processes = {name: [psutil.Process(pid) for pid in server.pids(name)] for name in services}
        self.seen: dict[str, list[int]] = {name: [self._now(name)] for name in services}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def growth(self, service: str) -> int:
        """The most it had at any time, less what it began with."""
        return max(self.seen[service]) - self.seen[service][0]

    def _now(self, service: str) -> int:
        return sum(process.memory_info().rss for process in self._processes[service])

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            for service, seen in self.seen.items():
                seen.append(self._now(service))


@dataclass
class Traffic:
    """What clients saw: replies by arm and variant, errors, and the labels they gave.

    Attributes:
        url: the door to knock at; BentoML's port where it is empty.
        seconds: of every reply that was a prediction, by the arm that made it.
        wrong: predictions that are not the point's true class.
    """

    server: Server
    rate: float = 150.0
    records: int = 1
    threads: int = 3
    label: bool = True
    url: str = ""
    seconds: list[tuple[str, float]] = field(default_factory=list)
    wrong: int = 0
    replies: Counter[tuple[str, str]] = field(default_factory=Counter)
    arms: list[tuple[float, str]] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    errors: list[tuple[float, str]] = field(default_factory=list)
    acknowledged: set[tuple[str, int]] = field(default_factory=set)
    refused: Counter[int] = field(default_factory=Counter)
    requests: int = 0

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._workers = [threading.Thread(target=self._run, args=(n,)) for n in range(self.threads)]

    def __enter__(self) -> Traffic:
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for worker in self._workers:
            worker.join(60)

    @property
    def by_arm(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for (arm, _), number in self.replies.items():
            found[arm] += number
        return found

    @property
    def failures(self) -> int:
        """Requests that got no prediction, for whatever reason; exact once the traffic is over."""
        return self.requests - self.statuses[200]

    def wait(self, requests: int, seconds: float = 30.0) -> None:
        """Until so many more requests were answered."""
        goal = self.statuses[200] + requests
        until(lambda: self.statuses[200] >= goal, f"{requests} more replies", seconds)

    def _run(self, number: int) -> None:
        rows = models.points(10_000_000, seed=number)
        labels: list[dict[str, Any]] = []
        due = time.monotonic()
        with httpx.Client(base_url=self.url or self.server.url, timeout=10.0) as client:
            while not self._stop.is_set():
                due = max(due + self.threads / self.rate, time.monotonic() - 0.2)
                self._stop.wait(max(0.0, due - time.monotonic()))
                batch = [next(rows) for _ in range(self.records)]
                request_id = self._predict(client, batch)
                if request_id and self.label:
                    labels += [
                        {"request_id": request_id, "index": index, "label": truth}
                        for index, (_, truth) in enumerate(batch)
                    ]
                if len(labels) >= 20 and self._feedback(client, labels[:500]):
                    labels = labels[500:]
            while labels and self._feedback(client, labels[:500]):
                labels = labels[500:]

    def _predict(self, client: httpx.Client, batch: list[tuple[dict[str, Any], int]]) -> str | None:
        with self._lock:
            self.requests += 1
        started = time.perf_counter()
        try:
            reply = client.post("/predict", json={"records": [record for record, _ in batch]})
        except httpx.TransportError as error:
            with self._lock:
                self.errors.append((time.time(), repr(error)))
            return None
        seconds = time.perf_counter() - started
        with self._lock:
            self.statuses[reply.status_code] += 1
            if reply.status_code != 200:
                return None
            arm = reply.headers["X-Trimtab-Arm"]
            self.seconds.append((arm, seconds))
            classes = [prediction["class"] for prediction in reply.json()["predictions"]]
            self.wrong += sum(found != truth for found, (_, truth) in zip(classes, batch, strict=True))
            self.replies[arm, reply.headers["X-Trimtab-Variant"]] += 1
            self.arms.append((time.time(), arm))
        return reply.headers["X-Request-Id"]

    def _feedback(self, client: httpx.Client, labels: list[dict[str, Any]]) -> bool:
        try:
            reply = client.post(self.server.url + "/feedback", json={"feedback": labels})
        except httpx.TransportError:
            return False
        with self._lock:
            if reply.status_code != 200:
                self.refused[reply.status_code] += 1
                return False
            self.acknowledged |= {(label["request_id"], label["index"]) for label in labels}
        return True


@contextlib.contextmanager
def running(store: Path, home: Path, **settings: Any) -> Iterator[Server]:
    """A server with a copy of a model store, stopped at the end whatever happens."""
    home.mkdir(parents=True, exist_ok=True)
    shutil.copytree(store, home / "bentoml", dirs_exist_ok=True)
    server = Server(home, **settings)
    try:
        yield server.start()
    finally:
        server.stop()
