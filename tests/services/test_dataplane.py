from __future__ import annotations

import orjson
import pytest

from compression.variant import Variant
from compression.workload import Workload
from services.dataplane import DataPlane
from services.http import Reply, Request
from services.protocol import OpenInference
from services.settings import Settings
from tests.services.test_engine import PLAIN, Bench


@pytest.fixture
def plane(settings: Settings, workload: Workload, variants: dict[str, Variant]) -> DataPlane:
    engine = Bench(settings, workload, variants, None).engine
    inference = OpenInference(
        engine, max_body_bytes=1 << 20, ready=lambda: True, statistics=engine.statistics
    )
    return DataPlane(engine, inference, api_key="sesame")


def status(plane: DataPlane, method: str, path: str, authorization: bytes | None, body: bytes = b"") -> int:
    headers = {} if authorization is None else {b"authorization": authorization}
    reply = plane.handle(Request(method, path, headers, body))
    assert isinstance(reply, Reply)
    return reply.status


RECORDS = orjson.dumps({"records": [PLAIN]})


@pytest.mark.parametrize(
    "given", [None, b"", b"Bearer", b"Bearer open", b"Basic sesame", b"Bearer \xff", b"sesame"]
)
def test_without_the_key_nobody_gets_a_prediction(plane: DataPlane, given: bytes | None) -> None:
    assert status(plane, "POST", "/predict", given, RECORDS) == 401
    assert status(plane, "POST", "/v2/models/points/infer", given) == 401
    assert status(plane, "GET", "/v2", given) == 401


@pytest.mark.parametrize("given", [b"Bearer sesame", b"bearer  sesame "])
def test_with_the_key_everybody_does(plane: DataPlane, given: bytes) -> None:
    assert status(plane, "POST", "/predict", given, RECORDS) == 200
    assert status(plane, "GET", "/v2", given) == 200


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready"])
def test_health_asks_for_no_key(plane: DataPlane, path: str) -> None:
    assert status(plane, "GET", path, None) == 200
