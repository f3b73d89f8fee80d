"""Child processes, each in a session of its own, ended with everything under it however the benchmark ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

__all__ = ["BenchmarkError", "Child", "environment", "free_ports", "run", "stop_all", "wait_until"]


class BenchmarkError(Exception):
    """Something cannot be measured; the message is one line that says why."""


_running: list[Child] = []


class Child:
    """A command that runs until `stop`; its output goes to a file.

    Raises:
        BenchmarkError: the command cannot be started.
    """

    def __init__(
        self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log_path = log
        self._seen: dict[int, psutil.Process] = {}
        try:
            with log.open("wb") as stream:
                self._process = subprocess.Popen(
                    list(command),
                    env=env,
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    start_new_session=True,
                )
        except OSError as error:
            raise BenchmarkError(f"{command[0]} cannot be started ({error.strerror})") from None
        _running.append(self)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def ended(self) -> bool:
        """Whether the command itself has ended."""
        return self._process.poll() is not None

    def wait(self) -> int:
        """Wait for the end; returns the exit code."""
        return self._process.wait()

    def last_line(self) -> str:
        """The last line of its output that says something; for errors."""
        text = self.log_path.read_text(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:300] if lines else "no output"

    def descendants(self) -> list[psutil.Process]:
        """All processes under the command, remembered for the end: some leave its session."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                self._seen[child.pid] = child
        return list(self._seen.values())

    def stop(self, grace: float = 15.0) -> None:
        """End it as Ctrl-C does; what is left after `grace` seconds is killed, group and descendants."""
        if self not in _running:
            return
        self.descendants()
        if not self.ended:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGINT)
        end = time.monotonic() + grace
        while not self.ended and time.monotonic() < end:
            self.descendants()  # one that is still starting may start more
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.2)
        descendants = self.descendants()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for process in descendants:
            # psutil compares creation times, so that a number used again is left alone.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(descendants, timeout=5)
        _running.remove(self)


def stop_all() -> None:
    """Stop whatever still runs; for the end of the benchmark, however it comes."""
    while _running:
        _running[-1].stop(grace=5.0)


def run(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
    """Run a command to its end.

    Raises:
        BenchmarkError: it failed; with the last line that it said.
    """
    with Child(command, log, env) as child:
        if child.wait() != 0:
            raise BenchmarkError(f"{' '.join(command[:4])} ...: {_blame(child)} (see {log})")


def _blame(child: Child) -> str:
    lines = child.log_path.read_text(errors="replace").splitlines()
    errors = [line.strip() for line in lines if line.startswith("ERROR")]
    return errors[-1][:300] if errors else child.last_line()


def environment(**more: str) -> dict[str, str]:
    """This process's environment for a server: one thread for its mathematics, and no reports to anybody."""
    quiet = {"BENTOML_DO_NOT_TRACK": "True", "DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    return dict(os.environ) | quiet | {"OTEL_SDK_DISABLED": "true", "OMP_NUM_THREADS": "1"} | more


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(number):
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            found.append(int(probe.getsockname()[1]))
        return found


def wait_until(condition: Callable[[], bool], what: str, child: Child, seconds: float = 90.0) -> None:
    """Wait for a condition.

    Raises:
        BenchmarkError: the child ended, or the time is over.
    """
    end = time.monotonic() + seconds
    while not condition():
        if child.ended:
            raise BenchmarkError(f"ended before {what}: {child.last_line()} (see {child.log_path})")
        if time.monotonic() > end:
            raise BenchmarkError(
                f"not within {seconds:g} s: {what}: {child.last_line()} (see {child.log_path})"
            )
        time.sleep(0.1)
