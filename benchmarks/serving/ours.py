"""Trimtab as a user starts it: `trimtab serve` with a model store and a state folder of its own."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.serving.formats import FORMATS, Inputs, Target, check
from benchmarks.serving.models import CANDIDATE
from benchmarks.serving.processes import BenchmarkError, Child, environment, free_ports, run, wait_until
from services.client import Client, GatewayError, read_token

__all__ = ["SERVICES", "Mirrored", "Store", "Trimtab", "store"]

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("gateway", "shadow", "monitor")
_SERVICE = re.compile(r"--service-name[= ](\w+)")
_SHED = re.compile(r"trimtab_shadow_shed_total\{(\w+)\}")
_SAMPLE_LINE = re.compile(r"^(trimtab_\w+)(?:\{([^}]*)\})? (\S+)", re.M)
# Halfway, and paused there: both arms answer, and nothing is decided.
_STEPS, _WEIGHT = [0, 50], 50


@dataclass(frozen=True)
class Store:
    """A workload with its variants in a model store, what to ask it, and what its model says."""

    workload: str
    folder: Path
    records: list[Inputs]
    logits: Any


@contextlib.contextmanager
def store(
    workload: str, model: Path, records: list[Inputs], logits: Any, cache: Path, *, candidate: bool
) -> Iterator[Store]:
    """Save a model's variants into a temporary model store.

    Raises:
        BenchmarkError: they cannot be saved.
    """
    with tempfile.TemporaryDirectory(prefix="trimtab-store-") as name:
        command = [sys.executable, "-m", "benchmarks.serving.models", workload, str(model)]
        variables = environment(BENTOML_HOME=name, PYTHONPATH=str(ROOT))
        run(
            [*command, *([CANDIDATE] if candidate else [])],
            cache / "logs" / f"{workload}-save.log",
            variables,
        )
        yield Store(workload, Path(name), records, logits)


@dataclass
class Mirrored:
    """What the server's own metrics say of the mirror between two looks.

    Attributes:
        requests: answered.
        pairs: formed, for these requests.
        shed: samples that were chosen and not mirrored, by reason.
        meant: the rate that the Monitor had set at the end, within its budget.
        share: pairs for each request; the mirror rate that was really in force.
    """

    requests: int
    pairs: int
    shed: dict[str, int]
    meant: float

    @property
    def share(self) -> float:
        return self.pairs / self.requests if self.requests else 0.0


class Trimtab:
    """One server, with a fresh state folder, from `with` to its end.

    Args:
        store: what it serves.
        workers: gateway processes.
        env: what it needs besides.
    """

    def __init__(self, store: Store, cache: Path, workers: int = 1, **env: str) -> None:
        self._store, self._cache, self._workers, self._env = store, cache, workers, env
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Trimtab:
        with contextlib.ExitStack() as stack:
            self.home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trimtab-home-")))
            shutil.copytree(self._store.folder, self.home / "bentoml")
            self.port, self.data_port = free_ports(2)
            command = [
                *(sys.executable, "-m", "trimtab", "serve", str(ROOT / "benchmarks" / self._store.workload)),
                *("--port", str(self.port), "--data-port", str(self.data_port)),
                *("--workers", str(self._workers)),
            ]
            variables = environment(
                TRIMTAB_HOME=str(self.home),
                BENTOML_HOME=str(self.home / "bentoml"),
                PYTHONPATH=str(ROOT),
                **self._env,
            )
            log = self._cache / "logs" / f"trimtab-{self._store.workload}.log"
            self._child = stack.enter_context(Child(command, log, variables))
            wait_until(self._is_ready, "trimtab serve is ready", self._child)
            self._client = stack.enter_context(Client(f"http://127.0.0.1:{self.port}", read_token(self.home)))
            check(self.target("v2-json"))
            self._child.descendants()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _is_ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            urls = (f"{self.port}/readyz", f"{self.data_port}/v2/health/ready")
            ready = all(httpx.get(f"http://127.0.0.1:{url}", timeout=2).status_code == 200 for url in urls)
            return ready and len(self._beats()) >= self._workers
        return False

    def _beats(self) -> list[int]:
        """The revision of the split that each gateway worker works by."""
        from monitoring.errors import LedgerUnavailable
        from monitoring.ledger import Ledger

        with contextlib.suppress(LedgerUnavailable):
            self._ledger = Ledger(self.home / f"{self._store.workload}.ledger.db", busy_timeout=5.0)
            beats = self._ledger.workers(time.time())
            return [beat.revision for beat in beats if beat.service == "gateway"]
        return []

    def target(self, format_: str) -> Target:
        """Where to ask in a format: on the data plane's own port."""
        path = "/predict" if format_ == "records" else f"/v2/models/{self._store.workload}/infer"
        return Target(self.data_port, path, FORMATS[format_], self._store.records, self._store.logits)

    # -- rollouts -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def rollout(self, mirror_rate: float) -> Iterator[None]:
        """With a rollout held at half of the traffic.

        Raises:
            BenchmarkError: it does not get there, or something ended it meanwhile.
        """
        policy = {
            "steps": _STEPS,
            "step_min_pairs": 0,
            "step_min_seconds": 0,
            "mirror_rate": mirror_rate,
        }
        try:
            started = self._client.start(
                f"{self._store.workload}-{CANDIDATE}", policy=policy, override="benchmark"
            )
            wait_until(
                lambda: self._client.status()["weight"] == _WEIGHT, "the rollout is halfway", self._child
            )
            self._client.verb(started["id"], "pause", reason="benchmark")
            self._wait_effect()
            yield
            now = self._client.status()
            if now["id"] != started["id"] or now["weight"] != _WEIGHT:
                raise BenchmarkError(f"the rollout was {now['state']} while it was measured: {now['reason']}")
            self._client.verb(started["id"], "rollback", reason="benchmark")
            self._wait_effect()
        except GatewayError as error:
            raise BenchmarkError(f"rollout: {error}") from None

    def _wait_effect(self) -> None:
        def applied() -> bool:
            beats, wanted = self._beats(), self._ledger.revision()
            return len(beats) >= self._workers and all(revision >= wanted for revision in beats)

        wait_until(applied, "every worker works by the new split", self._child)

    # -- looks inside ---------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Our series on the control port, summed over their labels; labels that tell what something is are kept as
        `name{outcome}`."""
        found: dict[str, float] = {}
        for name, labels, value in _SAMPLE_LINE.findall(self._client.metrics()):
            outcome = re.search(r'outcome="(\w+)"', labels)
            for key in {name, f"{name}{{{outcome[1]}}}" if outcome else name}:
                found[key] = found.get(key, 0.0) + float(value)
        return found

    @contextlib.contextmanager
    def mirrored(self) -> Iterator[Callable[[], Mirrored]]:
        """Count what is answered and mirrored from here on; the result waits until the mirror's queue is empty."""
        before = self.metrics()

        def result() -> Mirrored:
            with contextlib.suppress(BenchmarkError):
                wait_until(
                    lambda: self.metrics().get("trimtab_shadow_queue_depth", 0.0) == 0,
                    "the mirror's queue is empty",
                    self._child,
                    15.0,
                )
            # Counters are flushed now and then; twice the longest of those intervals.
            time.sleep(1.5)
            after = self.metrics()

            def since(name: str) -> int:
                return round(after.get(name, 0.0) - before.get(name, 0.0))

            return Mirrored(
                since("trimtab_requests_total{ok}"),
                since("trimtab_pairs_total"),
                {reason[1]: since(name) for name in after if (reason := _SHED.fullmatch(name))},
                after.get("trimtab_mirror_rate", float("nan")),
            )

        yield result

    def processes(self, service: str) -> list[psutil.Process]:
        """The worker processes of one of SERVICES."""
        found = []
        for process in self._child.descendants():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                command = " ".join(process.cmdline())
                if "_bentoml_impl.worker.service" in command:
                    named = _SERVICE.search(command)
                    if (named[1] if named else "Gateway").lower() == service:
                        found.append(process)
        return found

    def cpu_seconds(self, service: str) -> float:
        """CPU time that a service's processes have used so far, with their children's."""
        total = 0.0
        for process in self.processes(service):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def resident_mb(self, service: str) -> float:
        """Resident memory of a service's processes, without the Monitor's children that draw reports."""
        total = 0
        for process in self.processes(service):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total / 1e6
