from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import orjson
import pytest
from starlette.types import Message, Receive, Scope, Send

from services.limits import Limits

LIMIT = 100


class App:
    """Reads the whole body as an application would, and remembers how much it was given."""

    def __init__(self) -> None:
        self.body = b""
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.entered += 1
        await self.gate.wait()
        while True:
            message = await receive()
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


async def call(
    limits: Limits,
    chunks: Iterable[bytes] = (b"",),
    *,
    length: bytes | None = None,
    path: str = "/predict",
    content_type: bytes | None = None,
) -> tuple[int | None, dict[bytes, bytes], bytes, int]:
    """Send a request; returns status, headers and body of the reply, and how many chunks were taken."""
    chunks = list(chunks)
    taken = 0
    sent: list[Message] = []
    headers = [(b"content-length", length)] if length is not None else []
    headers += [(b"content-type", content_type)] if content_type is not None else []

    async def receive() -> Message:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": chunks[taken - 1], "more_body": taken < len(chunks)}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    await limits(scope, receive, send)
    starts = [message for message in sent if message["type"] == "http.response.start"]
    assert len(starts) <= 1
    status = starts[0]["status"] if starts else None
    body = b"".join(message.get("body", b"") for message in sent)
    return status, dict(starts[0]["headers"]) if starts else {}, body, taken


async def test_a_body_within_the_limit_passes_untouched() -> None:
    app = App()
    status, _, body, _ = await call(Limits(app, LIMIT, 10), [b"a" * 60, b"b" * 40], length=b"100")
    assert (status, body) == (200, b"ok")
    assert app.body == b"a" * 60 + b"b" * 40


async def test_a_content_length_over_the_limit_is_refused_before_the_body_is_read() -> None:
    app = App()
    status, _, body, taken = await call(Limits(app, LIMIT, 10), [b"x" * 101], length=b"101")
    assert status == 413
    assert "100 bytes" in orjson.loads(body)["error"]
    assert (taken, app.entered) == (0, 0)


async def test_a_chunked_body_over_the_limit_is_refused_and_not_read_to_its_end() -> None:
    app = App()
    status, _, body, taken = await call(Limits(app, LIMIT, 10), [b"x" * 40] * 1000)
    assert status == 413
    assert "100 bytes" in orjson.loads(body)["error"]
    assert taken == 3
    assert app.entered == 0


@pytest.mark.parametrize("length", [b"", b"-1", b"1.5", b"0x10", b"many", b"\xb2", b"9" * 5000])
async def test_a_content_length_that_is_no_number_of_bytes_is_refused(length: bytes) -> None:
    app = App()
    status, _, _, _ = await call(Limits(app, LIMIT, 10), length=length)
    assert status in (400, 413)
    assert app.entered == 0


async def test_a_body_that_was_cut_off_never_reaches_the_application() -> None:
    app, sent = App(), []
    messages = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
    await Limits(app, LIMIT, 10)(scope, receive, send)
    assert app.entered == 0
    assert sent[0]["status"] == 400


async def test_after_the_body_the_application_hears_of_a_client_that_hangs_up() -> None:
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.extend([(await receive())["type"], (await receive())["type"]])

    messages = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return messages.pop(0)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
    await Limits(app, LIMIT, 10)(scope, receive, None)  # type: ignore[arg-type]
    assert heard == ["http.request", "http.disconnect"]


async def test_requests_over_the_number_in_flight_are_asked_to_come_again() -> None:
    app = App()
    app.gate.clear()
    limits = Limits(app, LIMIT, 2)
    busy = [asyncio.create_task(call(limits)) for _ in range(2)]
    while app.entered < 2:
        await asyncio.sleep(0)
    status, headers, body, _ = await call(limits)
    assert (status, headers[b"retry-after"]) == (503, b"1")
    assert "in flight" in orjson.loads(body)["error"]
    app.gate.set()
    assert [reply[0] for reply in await asyncio.gather(*busy)] == [200, 200]
    assert (await call(limits))[0] == 200


async def test_a_request_that_raises_gives_its_place_back() -> None:
    async def app(*_: Any) -> None:
        raise RuntimeError("boom")

    limits = Limits(app, LIMIT, 1)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="boom"):
            await call(limits)


@pytest.mark.parametrize("path", ["/healthz", "/livez", "/readyz", "/metrics"])
async def test_health_and_metrics_answer_when_everything_else_is_refused(path: str) -> None:
    app = App()
    app.gate.clear()
    limits = Limits(app, LIMIT, 1)
    busy = asyncio.create_task(call(limits))
    while not app.entered:
        await asyncio.sleep(0)
    app.gate.set()
    assert (await call(limits, path=path))[0] == 200
    await busy


async def test_other_scopes_pass() -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    await Limits(app, LIMIT, 0)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert seen == ["lifespan"]


@pytest.mark.parametrize("kind", [b"multipart/form-data; boundary=x", b"application/vnd.bentoml+pickle"])
async def test_a_body_for_a_parser_other_than_json_is_refused(kind: bytes) -> None:
    app = App()
    status, _, body, _ = await call(Limits(app, LIMIT, 10), content_type=kind)
    assert status == 415
    assert "JSON" in orjson.loads(body)["error"]
    assert app.entered == 0


@pytest.mark.parametrize(
    "kind", [None, b"application/json", b"text/plain", b"application/x-www-form-urlencoded"]
)
async def test_a_forgotten_content_type_is_forgiven(kind: bytes | None) -> None:
    assert (await call(Limits(App(), LIMIT, 10), content_type=kind))[0] == 200


async def test_bodies_that_stay_unfinished_keep_out_their_like_and_nobody_else() -> None:
    app = App()
    limits = Limits(app, LIMIT, 2)
    hold = asyncio.Event()

    async def unfinished() -> Message:
        if not began:
            began.append(True)
            return {"type": "http.request", "body": b"a", "more_body": True}
        await hold.wait()
        return {"type": "http.disconnect"}

    async def ignore(_: Message) -> None:
        return

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
    slow = []
    for _ in range(2):
        began: list[bool] = []
        slow.append(asyncio.create_task(limits(scope, unfinished, ignore)))
        await asyncio.sleep(0)
    assert (await call(limits, [b"a", b"b"]))[0] == 503
    assert (await call(limits, [b"whole"]))[0] == 200
    hold.set()
    await asyncio.gather(*slow)
    assert (await call(limits, [b"a", b"b"]))[0] == 200


async def test_a_second_content_type_does_not_hide_the_first() -> None:
    limits = Limits(App(), LIMIT, 2)
    headers = [(b"content-type", b"multipart/form-data"), (b"content-type", b"application/json")]
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await limits({"type": "http", "method": "POST", "path": "/predict", "headers": headers}, receive, send)
    assert sent[0]["status"] == 415
