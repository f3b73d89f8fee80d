from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.replay import ReplayResult, replay
from tests import models

ROWS = list(models.points(60, seed=5))
RECORDS, LABELS = [record for record, _ in ROWS], [label for _, label in ROWS]


class Gateway:
    """Stands in for a gateway: right answers from alternating arms, and a memory of what it was sent."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.labels: dict[str, tuple[int, float]] = {}
        self.expected: dict[str, tuple[int, float]] = {}
        self.predict_status: list[int] = []
        self.feedback_status: list[int] = []
        self.feedback_calls = 0
        self.slow = 0.0
        self.at_once = self.most_at_once = 0

    async def predict(self, request: Request) -> Response:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.slow)
        finally:
            self.at_once -= 1
        (record,) = (await request.json())["records"]
        number = len(self.records)
        self.records.append(record)
        self.times.append(time.monotonic())
        status = self.predict_status.pop(0) if self.predict_status else 200
        if status != 200:
            return JSONResponse({"error": "no"}, status)
        answer = models.truth(record)
        request_id = f"r-{number}"
        self.expected[request_id] = (answer, time.monotonic())
        arm = "treatment" if number % 2 else "control"
        return JSONResponse({"request_id": request_id, "arm": arm, "predictions": [{"class": answer}]})

    async def feedback(self, request: Request) -> Response:
        self.feedback_calls += 1
        status = self.feedback_status.pop(0) if self.feedback_status else 200
        if status != 200:
            return JSONResponse({"error": "no"}, status)
        accepted = duplicates = 0
        for item in (await request.json())["feedback"]:
            if item["request_id"] in self.labels:
                duplicates += 1
            else:
                accepted += 1
                self.labels[item["request_id"]] = (item["label"], time.monotonic())
        return JSONResponse({"accepted": accepted, "duplicates": duplicates, "conflicts": 0})


@asynccontextmanager
async def served(gateway: Gateway) -> AsyncIterator[str]:
    app = Starlette(
        routes=[
            Route("/predict", gateway.predict, methods=["POST"]),
            Route("/feedback", gateway.feedback, methods=["POST"]),
        ]
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with asyncio.timeout(10):
                while not server.started:
                    await asyncio.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


async def test_every_record_is_sent_in_order_and_every_label_follows(gateway: Gateway) -> None:
    async with served(gateway) as url:
        result = await replay(url, RECORDS, LABELS, rate=2000, labels_after=0.0, concurrency=1)
    assert gateway.records == RECORDS
    assert {key: label for key, (label, _) in gateway.labels.items()} == {
        key: label for key, (label, _) in gateway.expected.items()
    }
    assert (result.requests, result.failed, result.labels_acknowledged) == (60, 0, 60)
    assert result.by_arm == result.correct == {"control": 30, "treatment": 30}
    assert len(result.latencies_ms) == 60
    assert result.last_treatment_reply_at is not None


async def test_labels_come_as_late_as_asked(gateway: Gateway) -> None:
    async with served(gateway) as url:
        await replay(url, RECORDS[:10], LABELS[:10], rate=1000, labels_after=0.4)
    lags = [gateway.labels[key][1] - at for key, (_, at) in gateway.expected.items()]
    assert len(lags) == 10
    assert min(lags) >= 0.39


async def test_requests_are_sent_on_the_clock(gateway: Gateway) -> None:
    async with served(gateway) as url:
        await replay(url, RECORDS[:40], LABELS[:40], rate=100, labels_after=0.0)
    assert 0.35 <= gateway.times[-1] - gateway.times[0] <= 2.0


async def test_a_slow_server_gets_only_so_many_requests_at_once(gateway: Gateway) -> None:
    gateway.slow = 0.05
    async with served(gateway) as url:
        await replay(url, RECORDS[:40], LABELS[:40], rate=10_000, labels_after=0.0, concurrency=4)
    assert gateway.most_at_once == 4


async def test_failed_requests_are_counted_by_what_went_wrong(gateway: Gateway) -> None:
    gateway.predict_status = [500, 200, 429]
    async with served(gateway) as url:
        result = await replay(url, RECORDS[:10], LABELS[:10], rate=1000, labels_after=0.0, concurrency=1)
    assert (result.requests, result.failed) == (10, 2)
    assert result.errors == {"HTTP 500": 1, "HTTP 429": 1}
    assert result.labels_acknowledged == 8


async def test_a_server_that_is_not_there_fails_every_request() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        result = await replay(url, RECORDS[:5], LABELS[:5], rate=1000, labels_after=0.0)
    assert result.failed == 5
    assert result.errors == {"ConnectError": 5}


async def test_labels_are_sent_again_until_they_are_acknowledged(gateway: Gateway) -> None:
    gateway.feedback_status = [503, 503]
    async with served(gateway) as url:
        result = await replay(url, RECORDS[:10], LABELS[:10], rate=1000, labels_after=0.0)
    assert gateway.feedback_calls >= 3
    assert len(gateway.labels) == 10
    assert result.labels_acknowledged == 10


async def test_labels_that_are_refused_are_not_sent_for_ever(gateway: Gateway) -> None:
    gateway.feedback_status = [404] * 100
    async with served(gateway) as url:
        result = await replay(url, RECORDS[:10], LABELS[:10], rate=1000, labels_after=0.0)
    assert result.labels_acknowledged == 0
    assert result.errors == {"feedback refused": 10}


async def test_a_replay_can_be_stopped_and_still_delivers_its_labels(gateway: Gateway) -> None:
    result = ReplayResult()
    async with served(gateway) as url:
        await replay(
            url,
            RECORDS,
            LABELS,
            rate=200,
            labels_after=0.1,
            stop=lambda: len(gateway.records) >= 10,
            result=result,
        )
    assert 10 <= result.requests < 60
    assert result.labels_acknowledged == result.requests
