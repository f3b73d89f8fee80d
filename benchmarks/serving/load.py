"""The two load generators.

Throughput: `wrk`, one thread, 8 connections, a closed loop. It is the same for every server, costs little, and is
known to the reader.

Latency at a fixed rate: a generator of our own. wrk can only be slowed down by `delay()` between a reply and the next
request of that connection, in whole milliseconds and from when the last reply came: a server that stalls is sent
fewer requests meanwhile, and nobody counts those (coordinated omission). Here request number k is due at
start + k / rate whatever the server does, goes out on the first connection that is free from then on, and its latency
counts from when it was due. It is a plain loop over `select`, whose time-outs have microseconds; the timers of an
asyncio or uvloop event loop have milliseconds, and would send a burst at every tick.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import re
import select
import shutil
import socket
import tempfile
import time
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.formats import Target
from benchmarks.serving.processes import BenchmarkError, Child

__all__ = ["CONNECTIONS", "Closed", "Paced", "PacedLoad", "closed_loop", "need_wrk"]

CONNECTIONS = 8
_SCRIPT = Path(__file__).parent / "wrk.lua"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
_PR_SET_TIMERSLACK = 29
# After the last request was due, so much longer is waited for replies.
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class Closed:
    """What a closed loop saw. Milliseconds; failures are replies other than 2xx and 3xx, and errors of sockets."""

    rate: float
    failures: int
    p50: float
    p99: float


def need_wrk() -> None:
    """Raise BenchmarkError unless wrk is installed."""
    if shutil.which("wrk") is None:
        raise BenchmarkError("wrk is missing: sudo apt-get install wrk")


def closed_loop(target: Target, seconds: int, log: Path) -> Closed:
    """Send the target's requests as fast as they are answered, for whole seconds: wrk knows no others.

    Raises:
        BenchmarkError: wrk failed, or nothing was answered.
    """
    with tempfile.NamedTemporaryFile(prefix="requests-") as pool:
        for request in target.requests:
            pool.write(b"%d\n" % len(request) + request)
        pool.flush()
        command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", "-s", str(_SCRIPT)]
        with Child([*command, target.url, "--", pool.name], log) as child:
            code = child.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("{")]
    if code != 0 or not lines:
        raise BenchmarkError(f"wrk: {child.last_line()} (see {log})")
    said = json.loads(lines[-1])
    if not said["requests"]:
        raise BenchmarkError(f"{target.url} answered nothing in {seconds} s")
    rate = (said["requests"] - min(said["requests"], said["failures"])) / said["seconds"]
    return Closed(rate, said["failures"], said["p50_ms"], said["p99_ms"])


@dataclass(frozen=True)
class Paced:
    """What a fixed rate saw. Milliseconds from when a request was due; `late` is how far behind that the generator
    itself sent requests (99th percentile) while a connection was free."""

    requests: int
    failures: int
    p50: float
    p99: float
    p999: float
    worst: float
    late: float


class _Connection:
    __slots__ = ("buffer", "due", "socket")

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""
        self.due = 0.0

    def fileno(self) -> int:
        return self.socket.fileno()


class PacedLoad:
    """Sends requests at a fixed rate over connections that stay open between runs."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._idle: deque[_Connection] = deque()
        self._at = 0

    def __enter__(self) -> PacedLoad:
        return self

    def __exit__(self, *_: object) -> None:
        while self._idle:
            self._idle.pop().socket.close()

    def run(self, rate: float, seconds: float) -> Paced:
        """Send `rate` requests a second for so long.

        Raises:
            BenchmarkError: the server takes no connections, or nothing was answered.
        """
        try:
            while len(self._idle) < CONNECTIONS:
                self._idle.append(_Connection(self._target.port))
        except OSError as error:
            raise BenchmarkError(f"no connection to {self._target.url}: {error}") from None
        with _undisturbed():
            return self._run(rate, int(rate * seconds))

    def _run(self, rate: float, total: int) -> Paced:
        latencies, lateness = array("d"), array("d")
        busy: dict[int, _Connection] = {}
        pool, size = self._target.requests, len(self._target.requests)
        clock, idle, at = time.perf_counter, self._idle, self._at
        interval, sent, answered, failures = 1.0 / rate, 0, 0, 0
        start = clock() + 0.01
        give_up = start + total * interval + _PATIENCE_SECONDS
        was_free = bool(idle)
        while answered + failures < total:
            now = clock()
            if now > give_up:
                failures += total - answered - failures
                break
            while sent < total and idle and start + sent * interval <= now:
                connection = idle.popleft()
                connection.due = start + sent * interval
                sent += 1
                if was_free:
                    lateness.append(now - connection.due)
                try:
                    connection.socket.sendall(pool[at % size])
                except OSError:
                    failures += 1
                    connection.socket.close()
                    self._replace(idle)
                    continue
                at += 1
                busy[connection.socket.fileno()] = connection
            was_free = bool(idle)
            wait = 0.1
            if sent < total and idle:
                wait = max(0.0, start + sent * interval - clock())
            for number in select.select(list(busy), (), (), wait)[0] if busy else _sleep(wait):
                connection = busy[number]
                ok = _receive(connection)
                if ok is None:
                    continue
                del busy[number]
                if ok:
                    latencies.append(clock() - connection.due)
                    answered += 1
                    idle.append(connection)
                    continue
                failures += 1
                connection.socket.close()
                self._replace(idle)
        for connection in busy.values():
            connection.socket.close()
        self._at = at
        return _paced(latencies, failures, lateness, self._target.url)

    def _replace(self, idle: deque[_Connection]) -> None:
        with contextlib.suppress(OSError):
            idle.append(_Connection(self._target.port))


def _sleep(seconds: float) -> tuple[int, ...]:
    time.sleep(seconds)
    return ()


def _receive(connection: _Connection) -> bool | None:
    """Read what has come: True for a whole reply that is 200, False for another or a broken one, None for a part."""
    try:
        data = connection.socket.recv(65536)
    except OSError:
        return False
    if not data:
        return False
    data = connection.buffer + data
    end = data.find(b"\r\n\r\n")
    found = _LENGTH.search(data, 0, end + 2) if end >= 0 else None
    if end < 0 or found is None or len(data) < end + 4 + int(found[1]):
        connection.buffer = data
        return None if end < 0 or found is not None else False
    connection.buffer = b""
    return data[9:12] == b"200"


def _paced(latencies: array[float], failures: int, lateness: array[float], url: str) -> Paced:
    if not latencies:
        raise BenchmarkError(f"{url} answered none of {failures} requests at a fixed rate")
    ordered, late = sorted(latencies), sorted(lateness) or [0.0]

    def quantile(values: list[float], share: float) -> float:
        return round(values[min(len(values) - 1, int(share * len(values)))] * 1000.0, 4)

    p50, p99, p999, worst = (quantile(ordered, share) for share in (0.5, 0.99, 0.999, 1.0))
    return Paced(len(ordered), failures, p50, p99, p999, worst, quantile(late, 0.99))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection, and timers that wake up when asked and not 50 microseconds later."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
