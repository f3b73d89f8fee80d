"""Ten times what the server can do, on the data plane's own port: who cannot be answered is told so, at once."""

from __future__ import annotations

import asyncio
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests import models
from tests.e2e.server import ROOT, Memory, Server, Traffic, running, until

pytestmark = pytest.mark.e2e

BODY = json.dumps({"records": [next(models.points(1))[0]]}).encode()
REQUEST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
PATIENCE_S = 10.0
QUEUE_S = 0.2
MIRROR_QUEUE = 64
MB = 1 << 20

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Seen:
    """What clients saw.

    Attributes:
        seconds: of the replies of 200.
        rude: replies of 503 without Retry-After.
        errors: no reply, or not within PATIENCE_S.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    rude: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def p99(self) -> float:
        return sorted(self.seconds)[math.ceil(0.99 * len(self.seconds)) - 1]

    async def ask(self, connection: Connection) -> bool:
        """Send one request and note what came of it; False when the connection is of no more use."""
        reader, writer = connection
        began = time.perf_counter()
        try:
            async with asyncio.timeout(PATIENCE_S):
                writer.write(REQUEST)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                await reader.readexactly(length)
        except (OSError, EOFError, TimeoutError) as error:
            self.errors.append(repr(error))
            return False
        status = int(head.split()[1])
        self.statuses[status] += 1
        if status == 200:
            self.seconds.append(time.perf_counter() - began)
        self.rude += status == 503 and b"\r\nretry-after: " not in head
        return b"\r\nconnection: close" not in head


async def connect(port: int) -> Connection:
    return await asyncio.open_connection("127.0.0.1", port)


async def in_turn(port: int, clients: int, seconds: float) -> Seen:
    """So many clients, each of which asks again as soon as it is answered."""
    seen = Seen()
    end = time.perf_counter() + seconds

    async def client() -> None:
        connection = await connect(port)
        while await seen.ask(connection) and time.perf_counter() < end:
            pass
        connection[1].close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return seen


async def at_rate(port: int, rate: float, seconds: float) -> Seen:
    """So many requests a second, whether those before were answered or not."""
    seen = Seen()
    idle: list[Connection] = [await connect(port) for _ in range(64)]

    async def request() -> None:
        connection = idle.pop() if idle else await connect(port)
        if await seen.ask(connection):
            idle.append(connection)
        else:
            connection[1].close()

    began = time.perf_counter()
    under_way = set()
    sent = 0
    while (now := time.perf_counter() - began) < seconds:
        while sent < rate * now:
            under_way.add(asyncio.create_task(request()))
            sent += 1
        await asyncio.sleep(0.005)
    await asyncio.gather(*under_way)
    for _, writer in idle:
        writer.close()
    assert seen.statuses.total() + len(seen.errors) == sent
    return seen


@pytest.fixture(scope="module")
def slow_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store whose full precision takes some 20 ms."""
    store = tmp_path_factory.mktemp("slow-store") / "bentoml"
    code = "from tests import models; models.save('full', models.slow_onnx(7_000))"
    environment = {**os.environ, "BENTOML_HOME": str(store)}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)
    return store


@pytest.fixture(scope="module")
def slow(slow_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"TRIMTAB_MODEL_THREADS": "1", "TRIMTAB_MAX_QUEUE_S": str(QUEUE_S)}
    with running(slow_store, tmp_path_factory.mktemp("slow"), **settings) as server:
        yield server


@pytest.fixture(scope="module")
def small(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose models are small, and whose shadow has 10 ms of CPU a second."""
    settings = {"TRIMTAB_MIRROR_CPU": "0.01", "TRIMTAB_MIRROR_QUEUE": str(MIRROR_QUEUE)}
    with running(store, tmp_path_factory.mktemp("small"), **settings) as server:
        yield server


def answers_at_once(server: Server) -> None:
    began = time.perf_counter()
    reply = httpx.post(server.data_url + "/predict", content=BODY, timeout=PATIENCE_S)
    assert reply.status_code == 200
    assert time.perf_counter() - began < 1.0


def shed(server: Server) -> float:
    return server.metrics()['trimtab_requests_total{arm="control",outcome="shed",variant="full"}']


def test_ten_times_the_requests_that_a_model_can_answer_are_answered_or_refused_at_once(slow: Server) -> None:
    capacity = asyncio.run(in_turn(slow.data_port, clients=4, seconds=2)).statuses[200] / 2
    before = shed(slow)
    with Memory(slow, "Gateway") as memory:
        seen = asyncio.run(at_rate(slow.data_port, 10 * capacity, seconds=5))
    answers_at_once(slow)
    assert seen.errors == []
    assert set(seen.statuses) == {200, 503}
    assert seen.rude == 0
    assert seen.statuses[503] > seen.statuses[200], "this was no overload"
    assert seen.statuses[200] > 0.5 * 5 * capacity, "refusing took the place of answering"
    assert seen.p99 < 5 * QUEUE_S
    assert memory.growth("Gateway") < 50 * MB
    until(lambda: shed(slow) - before == seen.statuses[503], "every request that was refused is counted")


def test_ten_times_the_clients_of_a_small_model_are_all_answered(small: Server) -> None:
    asyncio.run(in_turn(small.data_port, clients=64, seconds=1))
    with Memory(small, "Gateway") as memory:
        seen = asyncio.run(in_turn(small.data_port, clients=640, seconds=3))
    answers_at_once(small)
    assert seen.errors == []
    assert set(seen.statuses) == {200}
    assert seen.p99 < 3
    assert memory.growth("Gateway") < 50 * MB


def median(traffic: Traffic, of_last: int = 0) -> float:
    return statistics.median(seconds for _, seconds in traffic.seconds[-of_last:])


def test_a_shadow_that_is_ten_times_too_slow_costs_evidence_and_nothing_else(small: Server) -> None:
    full = 'trimtab_shadow_shed_total{outcome="full"}'
    small.halfway("heavy", mirror_rate=0.001)
    with Traffic(small, url=small.data_url, rate=100) as before:
        before.wait(200)
    assert small.metrics()[full] == 0
    small.clear()
    # A sample that control answered takes the shadow several milliseconds, and there are 50 of them a second.
    rollout_id = small.halfway("heavy")
    with Traffic(small, url=small.data_url, rate=100) as traffic:
        until(lambda: small.metrics()[full] > 100, "samples are shed", 60, pause=0.2)
        traffic.wait(200)
        until(lambda: median(traffic, of_last=200) < 3 * median(before), "replies are as quick as before", 30)
        metrics = small.metrics()
    assert metrics["trimtab_shadow_queue_depth"] <= MIRROR_QUEUE
    assert small.status(rollout_id)["weight"] == 50
    assert (before.failures, traffic.failures) == (0, 0), (traffic.statuses, traffic.errors)
    assert 0.35 < traffic.by_arm["treatment"] / traffic.requests < 0.65
