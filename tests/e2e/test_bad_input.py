"""Whatever a client sends, the answer is a clear 4xx, never a 5xx, and the next request is served."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests import models
from tests.e2e.server import Server, running, until

pytestmark = pytest.mark.e2e

POINT = {"a": 0.4, "b": 0.0, "c": 0.0, "d": 0.0, "TEAM": "A"}
LIMIT = 1 << 20


@pytest.fixture(scope="module")
def server(store: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(store, tmp_path_factory.mktemp("bad-input")) as server:
        # With a rollout, so that both arms and the mirror get to see what is sent.
        server.promoted("same")
        yield server


@pytest.fixture(scope="module")
def _http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as http:
        yield http


@pytest.fixture
def http(_http: httpx.Client) -> Iterator[httpx.Client]:
    yield _http
    assert _http.post("/predict", json={"records": [POINT]}).status_code == 200


def refused(reply: httpx.Response, *statuses: int) -> None:
    assert reply.status_code in statuses, (reply.status_code, reply.text[:300])
    if reply.headers.get("content-type") == "application/json":
        assert "error" in reply.json()


def records(*items: Any) -> bytes:
    return json.dumps({"records": list(items)}).encode()


PREDICT: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"records=1",
    "half": b'{"records": [{"a"',
    "invalid UTF-8": b'{"records": [{"a": "\xff\xfe"}]}',
    "lone surrogate": b'{"records": [{"a": "\\ud800"}]}',
    "null": b"null",
    "a list": b"[]",
    "a number": b"7",
    "NaN": b"NaN",
    "no records": b"{}",
    "records is null": b'{"records": null}',
    "records is a record": json.dumps({"records": POINT}).encode(),
    "records is text": b'{"records": "all of them"}',
    "records is empty": records(),
    "a record is a number": records(1),
    "a record is null": records(POINT, None),
    "a record is a list": records([0.1, 0.2, 0.3, 0.4, "A"]),
    "a record is empty": records({}),
    "a field is missing": records({name: value for name, value in POINT.items() if name != "c"}),
    "the group is missing": records({name: value for name, value in POINT.items() if name != "TEAM"}),
    "a field is null": records({**POINT, "a": None}),
    "a field is text": records({**POINT, "a": "0.4"}),
    "a field is a bool": records({**POINT, "a": True}),
    "a field is a list": records({**POINT, "a": [0.4]}),
    "a field is an object": records({**POINT, "a": {"value": 0.4}}),
    "a field is NaN": b'{"records": [{"a": NaN, "b": 0, "c": 0, "d": 0, "TEAM": "A"}]}',
    "a field is infinite": b'{"records": [{"a": -Infinity, "b": 0, "c": 0, "d": 0, "TEAM": "A"}]}',
    "a field is over the range of floats": b'{"records": [{"a": 1e999, "b": 0, "c": 0, "d": 0, "TEAM": "A"}]}',
    "a field is out of range": records({**POINT, "a": 1.01}),
    "a field is a huge int": records({**POINT, "a": 10**400}),
    "a field has too many digits": b'{"records": [{"a": 1' + b"0" * 5000 + b"}]}",
    "an unknown group": records({**POINT, "TEAM": "C"}),
    "a group of another type": records({**POINT, "TEAM": 1}),
    "deep nesting": b"[" * 100_000 + b"]" * 100_000,
    "deep nesting in a field": b'{"records": [{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}]}",
    "10,000 records": records(*[POINT] * 10_000),
    "one record too many": records(*[POINT] * 257),
    "one bad record among good ones": records(*[POINT] * 100, {**POINT, "b": 3}),
}


@pytest.mark.parametrize("name", PREDICT)
def test_predict_refuses(http: httpx.Client, name: str) -> None:
    headers = {"Content-Type": "application/json"}
    refused(http.post("/predict", content=PREDICT[name], headers=headers), 400)


def test_a_refusal_says_which_record_which_field_and_what_is_allowed(http: httpx.Client) -> None:
    reply = http.post("/predict", content=records(POINT, {**POINT, "b": 3}))
    assert reply.json() == {
        "error": 'record 1, field "b": 3 is not such a number; allowed: a number from -1 to 1'
    }


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Request-Id": ""},
        {"X-Request-Id": "a b"},
        {"X-Request-Id": "x" * 129},
        {"X-Request-Id": "x~000000000000"},
        {"X-Assignment-Key": "x" * 257},
    ],
)
def test_predict_refuses_headers(http: httpx.Client, headers: dict[str, str]) -> None:
    refused(http.post("/predict", json={"records": [POINT]}, headers=headers), 400)


@pytest.mark.parametrize("key", ["ä".encode("latin-1"), b"\xff\xfe", b"", b"\xf0\x9f\x98\x80"])
def test_any_assignment_key_is_good_that_a_header_can_hold(http: httpx.Client, key: bytes) -> None:
    reply = http.post("/predict", json={"records": [POINT]}, headers={b"X-Assignment-Key": key})
    assert reply.status_code == 200


@pytest.mark.parametrize("path", ["/predict", "/feedback"])
@pytest.mark.parametrize(
    "kind", ["multipart/form-data", "multipart/form-data; boundary=x", "application/vnd.bentoml+pickle"]
)
def test_only_json_is_read(http: httpx.Client, path: str, kind: str) -> None:
    refused(http.post(path, content=b"--x\r\nbroken", headers={"Content-Type": kind}), 415)


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize("path", ["/predict", "/feedback", "/rollouts"])
def test_what_is_not_json_is_refused_whatever_it_says_it_is(http: httpx.Client, path: str, kind: str) -> None:
    refused(http.post(path, content=b"<a>1</a>", headers={"Content-Type": kind}), 400, 401)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/predict", 405),
        ("PUT", "/predict", 405),
        ("DELETE", "/predict", 405),
        ("GET", "/feedback", 405),
        ("PUT", "/feedback", 405),
        ("PUT", "/rollouts", 405),
        ("GET", "/rollouts/current/pause", 405),
        ("POST", "/metrics", 405),
        ("GET", "/no/such/route", 404),
        ("GET", "/rollouts/..%2f..%2fetc", 404),
        ("GET", "/rollouts/%00", 404),
    ],
)
def test_other_methods_and_routes_are_refused(
    http: httpx.Client, method: str, path: str, status: int
) -> None:
    reply = http.request(method, path)
    assert 400 <= reply.status_code < 500
    assert reply.status_code in (status, 404, 405)


@pytest.mark.parametrize("path", ["/predict", "/feedback", "/rollouts"])
def test_a_body_over_the_limit_is_refused(http: httpx.Client, server: Server, path: str) -> None:
    refused(http.post(path, content=b"x" * (LIMIT + 1)), 413)


@pytest.mark.parametrize("path", ["/predict", "/feedback"])
def test_a_chunked_body_over_the_limit_is_refused(http: httpx.Client, path: str) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 65536

    with contextlib.suppress(httpx.WriteError):  # the server may answer and close while we still send
        refused(http.post(path, content=chunks()), 413)


@pytest.mark.parametrize("length", ["-5", "many", "99999999999999999999999999"])
def test_a_content_length_that_lies_is_refused(http: httpx.Client, server: Server, length: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        assert raw.recv(4096).split()[1] in (b"400", b"413")


def test_a_client_that_hangs_up_half_way_harms_nobody(http: httpx.Client, server: Server) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
            raw.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")


@pytest.mark.parametrize("extra", [b"1" + b"0" * 40, b"NaN", b'"\\u0000"', b"[[[[1]]]]"])
def test_a_field_nobody_asked_for_does_not_stop_the_mirror(
    http: httpx.Client, server: Server, extra: bytes
) -> None:
    point = json.dumps(POINT).encode()[:-1]
    odd = http.post("/predict", content=b'{"records": [' + point + b', "extra": ' + extra + b"}]}")
    assert odd.status_code in (200, 400)
    before = server.status()["pairs"]["pairs"]
    for _ in range(5):
        http.post("/predict", json={"records": [POINT]})
    until(lambda: server.status()["pairs"]["pairs"] >= before + 5, "pairs flow", pause=0.1)


def test_bad_feedback_is_refused(http: httpx.Client) -> None:
    known = http.post("/predict", json={"records": [POINT]}).json()["request_id"]
    good = {"request_id": known, "label": 1}
    bad: list[Any] = [
        None,
        [],
        {},
        {"feedback": []},
        {"feedback": good},
        {"feedback": [{**good, "label": 2}]},
        {"feedback": [{**good, "label": "unheard of"}]},
        {"feedback": [{**good, "label": None}]},
        {"feedback": [{**good, "label": 10**30}]},
        {"feedback": [{**good, "index": -1}]},
        {"feedback": [{**good, "index": 10**30}]},
        {"feedback": [{**good, "request_id": 1}]},
        {"feedback": [{"label": 1}]},
        {"feedback": [good] * 10_000},
        {"feedback": [{**good, "correction": "yes"}]},
        {"feedback": [{**good, "reward": 1}]},
        {"feedback": [{"request_id": good["request_id"], "index": 0, "reward": 1}]},
        *(
            {"feedback": [{"request_id": good["request_id"], "reward": reward}]}
            for reward in (-1, 1.5, 10**30, float("inf"), float("nan"), None, True, "1")
        ),
    ]
    for body in bad:
        refused(http.post("/feedback", content=json.dumps(body).encode()), 400)
    for content in (b"", b"\xff", b"[" * 100_000, b'{"feedback": [{"request_id": "\\ud800", "label": NaN}]}'):
        refused(http.post("/feedback", content=content), 400)
    for unknown in ("never-given-out", known[:-1], known + "0", "x~" + known.rpartition("~")[2]):
        refused(http.post("/feedback", json={"feedback": [{**good, "request_id": unknown}]}), 404)
        unknown_reward = {"feedback": [{"request_id": unknown, "reward": 1}]}
        refused(http.post("/feedback", json=unknown_reward), 404)
    assert http.post("/feedback", json={"feedback": [good]}).json()["accepted"] == 1


def test_rewards_are_taken_once_beside_labels(http: httpx.Client) -> None:
    request_id = http.post("/predict", json={"records": [POINT]}).json()["request_id"]
    item = {"request_id": request_id, "reward": 0.5}
    for sent, outcome in (
        (item, "accepted"),
        (item, "duplicates"),
        ({**item, "reward": 1}, "conflicts"),
        ({"request_id": request_id, "label": 1}, "accepted"),
        ({"request_id": request_id, "label": 0, "correction": True}, "corrected"),
    ):
        body = http.post("/feedback", json={"feedback": [sent]}).json()
        assert {name for name, number in body.items() if number} == {outcome}


def test_bad_rollouts_are_refused(http: httpx.Client, server: Server) -> None:
    with server.client() as client:
        headers = dict(client._http.headers)
    for body in (b"", b"null", b"\xff", b"{", b'{"variant": NaN}', b"[" * 100_000, b'{"variant": 1e999}'):
        refused(http.post("/rollouts", content=body, headers=headers), 400)
    for body in ({"variant": "points-nothing"}, {"variant": "/etc/passwd"}, {"variant": "Ω"}):
        refused(http.post("/rollouts", json=body, headers=headers), 404)
    for policy in ({"steps": [0]}, {"steps": [0, 10**30]}, {"no": 1}, {"guardrails": 7}):
        body = {"variant": "points-worse", "policy": policy}
        refused(http.post("/rollouts", content=json.dumps(body), headers=headers), 400)
    refused(http.post("/rollouts/current/explode", headers=headers), 404)
    refused(http.post("/rollouts/points-999/pause", headers=headers), 404)
    refused(http.post("/rollouts/current/pause", content=b"[1", headers=headers), 400)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
record = st.fixed_dictionaries(
    {name: st.floats(-1, 1) | anything for name in "abcd"} | {"TEAM": st.just("A") | anything}
)
FUZZ = hypothesis_settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(anything | st.fixed_dictionaries({"records": anything | st.lists(record, max_size=3)}))
@FUZZ
def test_whatever_json_is_sent_to_predict_it_is_answered_or_refused(http: httpx.Client, body: Any) -> None:
    reply = http.post("/predict", content=json.dumps(body).encode())
    assert reply.status_code in (200, 400), (reply.status_code, reply.text[:300])


@given(st.binary(max_size=200))
@FUZZ
def test_whatever_bytes_are_sent_to_predict_they_are_refused(http: httpx.Client, body: bytes) -> None:
    refused(http.post("/predict", content=body), 400)


item = st.fixed_dictionaries(
    {"request_id": anything},
    optional={"label": anything, "index": st.just(0) | anything, "reward": anything, "correction": anything},
)


@given(anything | st.fixed_dictionaries({"feedback": anything | st.lists(item, max_size=3)}))
@FUZZ
def test_whatever_json_is_sent_as_feedback_it_is_taken_or_refused(http: httpx.Client, body: Any) -> None:
    reply = http.post("/feedback", content=json.dumps(body).encode())
    assert reply.status_code in (200, 400, 404), (reply.status_code, reply.text[:300])


def test_after_all_that_the_server_has_not_failed_once(http: httpx.Client, server: Server) -> None:
    assert [record for record, _ in models.points(3)]
    failures = {name: n for name, n in server.metrics().items() if 'http_response_code="5' in name and n}
    assert failures == {}
    assert "Traceback" not in server.log()
