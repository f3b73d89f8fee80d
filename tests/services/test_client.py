from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.client import Client, GatewayError, base_url, read_token


def made(handler: Callable[[httpx.Request], httpx.Response], token: str | None = None) -> Client:
    client = Client("http://gateway", token)
    headers = client._http.headers
    client._http.close()
    client._http = httpx.Client(
        base_url="http://gateway", headers=headers, transport=httpx.MockTransport(handler)
    )
    return client


def test_the_address_is_the_given_one_then_the_environments_then_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert base_url(None) == "http://127.0.0.1:3000"
    monkeypatch.setenv("TRIMTAB_URL", "http://elsewhere:1/")
    assert base_url(None) == "http://elsewhere:1"
    assert base_url("http://here:2/") == "http://here:2"


def test_the_token_is_the_environments_then_the_homes_then_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert read_token(tmp_path) is None
    (tmp_path / "token").write_text("from-file\n")
    assert read_token(tmp_path) == "from-file"
    monkeypatch.setenv("TRIMTAB_TOKEN", "from-environment")
    assert read_token(tmp_path) == "from-environment"


def test_the_token_is_sent_with_every_call() -> None:
    seen = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(200, json={"rollouts": []})

    with made(handler, "s3cret") as client:
        assert client.rollouts() == []
    with made(handler) as client:
        client.rollouts()
    assert seen == ["Bearer s3cret", None]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (httpx.Response(409, json={"error": "a rollout is under way"}), "a rollout is under way (HTTP 409)"),
        (httpx.Response(500, text="Internal Server Error"), "Internal Server Error (HTTP 500)"),
        (httpx.Response(404, json=["odd"]), '["odd"] (HTTP 404)'),
        (httpx.Response(502, json={"detail": "proxy"}), '{"detail":"proxy"} (HTTP 502)'),
    ],
)
def test_a_refusal_is_an_error_of_one_line(reply: httpx.Response, message: str) -> None:
    with made(lambda _: reply) as client, pytest.raises(GatewayError) as caught:
        client.status()
    assert str(caught.value) == message


def test_a_gateway_that_is_not_there_is_an_error_with_the_fix() -> None:
    def handler(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with made(handler) as client:
        with pytest.raises(GatewayError, match=r"no gateway at http://gateway .*trimtab serve"):
            client.rollouts()
        assert not client.ready()


def test_a_reply_that_is_not_json_is_an_error_of_one_line() -> None:
    with (
        made(lambda _: httpx.Response(200, text="<html>another server</html>")) as client,
        pytest.raises(GatewayError),
    ):
        client.rollouts()


@pytest.mark.parametrize(
    ("call", "method", "path", "body"),
    [
        (lambda c: c.status(), "GET", "/rollouts/current", None),
        (lambda c: c.decisions("points-1"), "GET", "/rollouts/points-1/decisions", None),
        (lambda c: c.verify(), "GET", "/rollouts/verify", None),
        (
            lambda c: c.start("points-same", policy={"steps": [0, 9]}, actor="me"),
            "POST",
            "/rollouts",
            {"variant": "points-same", "override": None, "policy": {"steps": [0, 9]}, "actor": "me"},
        ),
        (
            lambda c: c.verb("points-1", "pause", reason="lunch"),
            "POST",
            "/rollouts/points-1/pause",
            {"reason": "lunch"},
        ),
        (
            lambda c: c.feedback([{"request_id": "r", "label": 1}]),
            "POST",
            "/feedback",
            {"feedback": [{"request_id": "r", "label": 1}]},
        ),
    ],
)
def test_each_call_has_its_route(call: Callable[[Client], Any], method: str, path: str, body: Any) -> None:
    import orjson

    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"decisions": [], "rollouts": []})

    with made(handler) as client:
        call(client)
    assert (seen[0].method, seen[0].url.path) == (method, path)
    assert (orjson.loads(seen[0].content) if seen[0].content else None) == body


def test_the_head_to_expect_goes_into_the_query() -> None:
    seen = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.query)
        return httpx.Response(200, json={"count": 0, "head": "", "problem": None})

    with made(handler) as client:
        client.verify()
        client.verify("3f")
        client.verify("3f&x= #é")
    assert seen == [b"", b"expect=3f", b"expect=3f%26x%3D+%23%C3%A9"]
