"""Faults while the data plane's own port serves steadily, each counted in requests that users saw fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import resource
import select
import socket
import sqlite3
import statistics
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import psutil
import pytest

from tests import models
from tests.e2e.server import ONLY_ERRORS, Memory, Server, Traffic, running, until

pytestmark = pytest.mark.e2e

POINT, TRUTH = next(models.points(1))
BODY = json.dumps({"records": [POINT]}).encode()
MB = 1 << 20


@pytest.fixture(scope="module")
def _server(store: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(store, tmp_path_factory.mktemp("faults"), workers=2) as server:
        yield server


def load(server: Server, **settings: Any) -> Traffic:
    """Steady traffic on the data plane's own port."""
    return Traffic(server, url=server.data_url, **{"rate": 100, **settings})


def no_failure(traffic: Traffic) -> None:
    """Every request that was sent has its answer."""
    assert traffic.requests > 0
    assert traffic.failures == 0, (traffic.statuses, traffic.errors)


def split_is_half(arms: list[tuple[float, str]]) -> None:
    """4.5 standard deviations either way: a right split fails 1 in 100,000."""
    treated = sum(arm == "treatment" for _, arm in arms)
    assert abs(treated - len(arms) / 2) <= 4.5 * math.sqrt(len(arms)) / 2, (treated, len(arms))


def pairs_flow(server: Server, rollout_id: str) -> None:
    before = server.status(rollout_id)["pairs"]["pairs"]
    until(
        lambda: server.status(rollout_id)["pairs"]["pairs"] > before + 20, "pairs are counted", 60, pause=0.2
    )


def all_counted(server: Server, rollout_id: str, traffic: Traffic) -> None:
    """The ledger has every request of a rollout's, once."""

    def counted() -> int:
        totals = server.ledger.totals(rollout_id, 0)
        return sum(totals.get(("requests", arm), {}).get(0, 0) for arm in ("control", "treatment"))

    until(lambda: counted() >= traffic.statuses[200], "all requests are counted", 30)
    assert counted() == traffic.statuses[200]


# -- the treatment ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "outcome"), [("raises", "refused"), ("broken", "invalid"), ("stuck", "timeout")]
)
def test_a_treatment_that_fails_costs_no_request_and_is_rolled_back(
    server: Server, variant: str, outcome: str
) -> None:
    rollout_id = server.halfway(variant)
    with load(server) as traffic:
        server.wait_state(rollout_id, "rolled_back", seconds=60)
        server.wait_effect()
        traffic.wait(60)
    no_failure(traffic)
    assert traffic.wrong == 0
    assert max(seconds for _, seconds in traffic.seconds) < 4
    with server.client() as client:
        assert client.decisions(rollout_id)[-1]["guardrail"] == "treatment_errors"
    metrics = server.metrics()
    fallbacks = metrics[f'trimtab_fallbacks_total{{outcome="{outcome}",variant="{variant}"}}']
    errors = server.ledger.totals(rollout_id, 0)["treatment_errors", ""][1]
    assert 0 < errors <= fallbacks
    assert metrics[f'trimtab_requests_total{{arm="treatment",outcome="failed",variant="{variant}"}}'] == 0


def test_three_rollouts_in_turn_are_loaded_and_unloaded_without_a_failed_request(server: Server) -> None:
    with load(server) as traffic:
        for variant in ("same", "heavy"):
            server.promoted(variant, guardrails=ONLY_ERRORS)
            traffic.wait(60)
        rollout_id = server.halfway("same")
        traffic.wait(60)
        with server.client() as client:
            client.verb(rollout_id, "rollback", reason="for a test")
        server.wait_effect()
        seen = len(traffic.arms)
        traffic.wait(60)
    no_failure(traffic)
    assert set(traffic.replies) == {("control", "full"), ("treatment", "same"), ("treatment", "heavy")}
    assert {arm for _, arm in traffic.arms[seen + traffic.threads :]} == {"control"}


# -- the other processes ---------------------------------------------------------------------------------------


def test_a_shadow_killed_five_times_and_a_monitor_with_it_cost_no_request(server: Server) -> None:
    rollout_id = server.halfway("same")

    def beats_anew(killed: int) -> bool:
        running_now = set(server.pids("Shadow")) - {killed}
        return any(beat.pid in running_now for beat in server.ledger.workers(time.time()))

    with load(server) as traffic:
        monitor = server.kill_one("Monitor")
        for _ in range(5):
            killed = server.kill_one("Shadow")
            until(partial(beats_anew, killed), "the shadow is back", 60)
        until(lambda: server.pids("Monitor") not in ([], [monitor]), "the monitor runs again", 60)
        pairs_flow(server, rollout_id)
    no_failure(traffic)
    split_is_half(traffic.arms)


def connections(server: Server, pid: int) -> int:
    """Clients of the data plane's own port that a worker has."""
    found = psutil.Process(pid).net_connections("tcp4")
    return sum(one.laddr.port == server.data_port and one.status == psutil.CONN_ESTABLISHED for one in found)


def test_a_killed_worker_costs_what_it_held_and_its_successor_takes_connections(server: Server) -> None:
    server.halfway("same")
    with load(server, threads=8) as traffic:
        traffic.wait(100)
        killed, other = sorted(server.pids("Gateway"), key=lambda pid: -connections(server, pid))
        held = connections(server, killed)
        assert held > 0
        psutil.Process(killed).kill()
        until(lambda: killed not in server.pids("Gateway"), "it is gone")
        traffic.wait(100)
        until(lambda: len(server.pids("Gateway")) == 2, "two workers again", 60)
        assert other in server.pids("Gateway")
        server.wait_effect()
        (successor,) = set(server.pids("Gateway")) - {other}

        def takes_connections() -> bool:
            with contextlib.ExitStack() as stack:
                for _ in range(16):
                    client = stack.enter_context(httpx.Client(base_url=server.data_url))
                    assert client.post("/predict", content=BODY).status_code == 200
                return connections(server, successor) > 0

        until(takes_connections, "the successor takes connections", 30, pause=0.5)
        seen = len(traffic.arms)
        traffic.wait(200)
    # One request each on the connections that it held, and no reply of any other kind.
    assert traffic.failures == len(traffic.errors) <= held, (traffic.statuses, traffic.errors)
    split_is_half(traffic.arms[seen:])


# -- the ledger ------------------------------------------------------------------------------------------------


def feedback(server: Server, request_id: str) -> httpx.Response:
    body = {"feedback": [{"request_id": request_id, "label": TRUTH}]}
    return httpx.post(server.url + "/feedback", json=body, timeout=30)


def request_id_of(server: Server) -> str:
    reply = httpx.post(server.data_url + "/predict", content=BODY)
    return str(reply.headers["X-Request-Id"])


def not_stored(reply: httpx.Response) -> None:
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1"), reply.text
    assert "nothing was stored" in reply.json()["error"]


def test_a_ledger_that_is_locked_for_30_s_costs_no_request_and_no_count(server: Server) -> None:
    request_id = request_id_of(server)
    rollout_id = server.halfway("same")
    with load(server, rate=60, label=False) as traffic:
        traffic.wait(30)
        lock = sqlite3.connect(server.home / "points.ledger.db", isolation_level=None, timeout=20)
        with contextlib.closing(lock):
            lock.execute("BEGIN EXCLUSIVE")
            end = time.monotonic() + 30
            seen = len(traffic.arms)
            while time.monotonic() < end:  # each waits a while for the lock
                not_stored(feedback(server, request_id))
            during = traffic.arms[seen:]
        pairs_flow(server, rollout_id)
        until(lambda: feedback(server, request_id).status_code == 200, "feedback is taken again")
    no_failure(traffic)
    assert len(during) > 200
    split_is_half(during)
    all_counted(server, rollout_id, traffic)


@contextlib.contextmanager
def disk_full(server: Server) -> Iterator[None]:
    """No process of the server can make a file larger than 1 MB, and the ledger's log is that large already."""
    limit = MB
    path = server.home / "points.ledger.db"
    log = server.home / "points.ledger.db-wal"
    with (
        contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=20)) as db,
        contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=20)) as reader,
    ):
        db.execute("PRAGMA wal_autocheckpoint = 0")
        db.execute("PRAGMA synchronous = OFF")
        until(lambda: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0, "the log is empty")
        # As long as somebody reads what was there at the beginning, the log only grows.
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM meta").fetchall()
        until(
            lambda: db.execute("UPDATE meta SET value = value") and log.stat().st_size > limit,
            "it is long",
            pause=0,
        )
        assert len(server.log()) < limit / 2, "the server's own log must have room"
        processes = [pid for name in ("Gateway", "Shadow", "Monitor") for pid in server.pids(name)]
        before = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in processes}
        try:
            for pid, (_, hard) in before.items():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, hard))
            yield
        finally:
            for pid, limits in before.items():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_costs_no_request_and_no_count_and_mends_itself(server: Server) -> None:
    request_id = request_id_of(server)
    rollout_id = server.halfway("same")
    processes = [server.pids(name) for name in ("Gateway", "Shadow", "Monitor")]
    said = len(server.log())
    with load(server, label=False) as traffic:
        traffic.wait(30)
        with disk_full(server):
            pairs = server.status(rollout_id)["pairs"]["pairs"]
            seen = len(traffic.arms)
            for _ in range(4):
                not_stored(feedback(server, request_id))
                traffic.wait(100)
            during = traffic.arms[seen:]
            assert server.status(rollout_id)["pairs"]["pairs"] == pairs, "the disk was not full"
        pairs_flow(server, rollout_id)
        assert feedback(server, request_id).status_code == 200
    no_failure(traffic)
    split_is_half(during)
    all_counted(server, rollout_id, traffic)
    assert [server.pids(name) for name in ("Gateway", "Shadow", "Monitor")] == processes
    assert "Traceback" not in server.log()[said:]
    with contextlib.closing(sqlite3.connect(server.home / "points.ledger.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# -- clients ---------------------------------------------------------------------------------------------------


def head(length: int) -> bytes:
    return b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length


async def creeping_head(port: int) -> tuple[int, float]:
    """Send a header that never ends; returns the status and the seconds until it came."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /predict HTTP/1.1\r\nHost: x\r\nX-Long: ")
    reply = asyncio.create_task(reader.readline())
    while not reply.done():
        writer.write(b"x")
        await asyncio.wait([reply], timeout=0.5)
    seconds = time.monotonic() - began
    writer.close()
    return int(reply.result().split()[1]), seconds


async def creeping_body(port: int) -> None:
    """Send a body so slowly that it would take minutes."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head(1000))
        while True:
            writer.write(b" ")
            await asyncio.sleep(0.5)
    finally:
        writer.close()


async def deaf(port: int) -> None:
    """Ask again and again for a large document and read none of them; returns when all was sent."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        # Small, so that the kernel takes little of what nobody reads.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, b"GET /v2/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100_000)


async def slow_clients(port: int) -> list[tuple[int, float]]:
    """All of them at once, until the last of those with slow headers was answered."""
    others = [asyncio.create_task(slow(port)) for slow in [creeping_body, deaf] * 50]
    try:
        return await asyncio.gather(*(creeping_head(port) for _ in range(200)))
    finally:
        done = [other for other in others if other.done()]
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        assert not done, f"{len(done)} of those that send or read slowly were not held up"


def test_slow_clients_are_cut_off_and_harm_nobody(server: Server) -> None:
    server.halfway("same")
    with load(server, rate=60) as traffic:
        refused = asyncio.run(slow_clients(server.data_port))
        traffic.wait(30)
    no_failure(traffic)
    assert max(seconds for _, seconds in traffic.seconds) < 4
    assert Counter(status for status, _ in refused) == {408: 200}
    assert min(seconds for _, seconds in refused) >= 10
    assert max(seconds for _, seconds in refused) < 15  # 10 s and the listener's interval, on a busy machine


@pytest.mark.parametrize("door", ["data_url", "url"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_of_100_mb_is_refused_without_being_held(server: Server, door: str, framing: str) -> None:
    piece = b" " * 65536
    headers = {"Content-Length": str(1600 * len(piece))} if framing == "length" else {}
    with Memory(server, "Gateway") as memory, load(server, rate=30) as traffic:
        for _ in range(2):
            pieces = (piece for _ in range(1600))
            reply = httpx.post(
                getattr(server, door) + "/predict", content=pieces, headers=headers, timeout=30
            )
            assert reply.status_code == 413
            assert "bytes" in reply.json()["error"]
    no_failure(traffic)
    assert memory.growth("Gateway") < 32 * MB


@pytest.mark.parametrize("door", ["data_port", "port"])
def test_clients_that_hang_up_harm_nobody(server: Server, door: str) -> None:
    server.halfway("heavy")  # half of them hang up while a thread works for them
    said = len(server.log())
    sent = {
        "in the headers": head(len(BODY))[:-9],
        "in the body": head(len(BODY)) + BODY[:9],
        "before the reply": head(len(BODY)) + BODY,
        "with more sent ahead": (head(len(BODY)) + BODY) * 3,
    }
    with load(server) as traffic:
        for number in range(25):
            for content in sent.values():
                with socket.create_connection(("127.0.0.1", getattr(server, door)), timeout=10) as client:
                    client.sendall(content)
                    if number % 2:  # a reset instead of an end
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        traffic.wait(100)
    no_failure(traffic)
    assert "Traceback" not in server.log()[said:]
    until(
        lambda: not sum(connections(server, pid) for pid in server.pids("Gateway")), "all connections ended"
    )


# -- for longer ------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_time(server: Server) -> None:
    rollout_id = server.halfway("same")
    services = ("Gateway", "Shadow", "Monitor")
    with load(server, rate=150) as traffic:
        traffic.wait(150)
        with Memory(server, *services) as memory:
            traffic.wait(3000, seconds=120)
    no_failure(traffic)
    assert server.status(rollout_id)["pairs"]["pairs"] > 1000
    for service in services:
        third = len(memory.seen[service]) // 3
        second, last = (statistics.mean(memory.seen[service][third * n : third * (n + 1)]) for n in (1, 2))
        assert last - second < max(0.05 * second, 8 * MB), (service, memory.seen[service][:: third // 5])


# -- the end ---------------------------------------------------------------------------------------------------


@dataclass
class Stopped:
    """What clients saw who kept asking while the server was told to stop.

    Attributes:
        answered: replies of 200, whole.
        lost: requests sent before the server was told, without a reply.
        crossed: requests sent later, without a reply; the end of the connection may have been on its way.
        cut: replies of another kind, or that broke off.
        finished: replies to requests of which only a part had come when the listener closed.
    """

    answered: int = 0
    lost: int = 0
    crossed: int = 0
    cut: list[bytes] = field(default_factory=list)
    finished: list[bytes] = field(default_factory=list)


def received(client: socket.socket) -> bytes:
    """A reply, as much as comes of it."""
    reply = b""
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(65536):
            reply += piece
            if whole(reply):
                break
    return reply


def whole(reply: bytes) -> bool:
    top, end, body = reply.partition(b"\r\n\r\n")
    lengths = [line for line in top.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(end) and len(body) == int(lengths[0].split(b":")[1])


def keep_asking(server: Server, told: threading.Event, seen: Stopped, lock: threading.Lock) -> None:
    """One connection after the other until the server takes no more; a request as soon as there is a reply."""
    try:
        while True:
            with socket.create_connection(("127.0.0.1", server.data_port), timeout=20) as client:
                reply = b"none yet"
                while reply and b"\r\nconnection: close" not in reply:
                    if select.select([client], [], [], 0)[0]:
                        break  # it has ended between two requests, as it may
                    reply, before = b"", False
                    with contextlib.suppress(ConnectionError):
                        client.sendall(head(len(BODY)) + BODY)
                        before = not told.is_set()
                        reply = received(client)
                    with lock:
                        if reply.startswith(b"HTTP/1.1 200 ") and whole(reply):
                            seen.answered += 1
                        elif reply:
                            seen.cut.append(reply)
                        elif before:
                            seen.lost += 1
                        else:
                            seen.crossed += 1
    except ConnectionError:
        with lock:
            seen.lost += not told.is_set()


def finish_late(server: Server, begun: Callable[[], object], seen: Stopped, lock: threading.Lock) -> None:
    """Send half a request, and the rest when the listener takes no more connections."""
    with socket.create_connection(("127.0.0.1", server.data_port), timeout=20) as client:
        request = head(len(BODY)) + BODY
        client.sendall(request[:-9])
        begun()

        def closed() -> bool:
            try:
                socket.create_connection(("127.0.0.1", server.data_port), timeout=20).close()
            except ConnectionError:
                return True
            return False

        until(closed, "the listener has closed", 30, pause=0.05)
        reply = b""
        with contextlib.suppress(ConnectionError):
            client.sendall(request[-9:])
            reply = received(client)
        with lock:
            seen.finished.append(reply)


@pytest.fixture
def last(_server: Server) -> Server:
    """The module's server, for a test that leaves none behind."""
    _server.clear()
    return _server


def test_a_server_that_is_told_to_stop_answers_what_it_has_and_cuts_nothing_off(last: Server) -> None:
    server = last
    # All requests wait for a thread, or are in one, when it is told.
    server.promoted("heavy", promoted_weight=100, guardrails=ONLY_ERRORS)
    said = len(server.log())
    told, lock, seen = threading.Event(), threading.Lock(), Stopped()
    begun = threading.Barrier(5)
    clients = [threading.Thread(target=keep_asking, args=(server, told, seen, lock)) for _ in range(16)]
    clients += [threading.Thread(target=finish_late, args=(server, begun.wait, seen, lock)) for _ in range(4)]
    for client in clients:
        client.start()
    begun.wait(20)
    until(lambda: seen.answered > 100, "replies flow")
    told.set()
    server.stop()
    for client in clients:
        client.join(30)
        assert not client.is_alive()
    assert (seen.lost, seen.cut) == (0, [])
    assert seen.crossed <= 2
    assert [reply[:12] for reply in seen.finished] == [b"HTTP/1.1 200"] * 4, seen.finished
    assert "Traceback" not in server.log()[said:]
