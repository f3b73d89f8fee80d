"""A real listener on loopback, and clients that write bytes, on asyncio's loop and on uvloop's."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import email.utils
import errno
import functools
import inspect
import ipaddress
import itertools
import logging
import os
import re
import socket
import ssl
import struct
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import httptools
import orjson
import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from services.http import Handler, Reply, Request
from services.listener import Listener, ListenerLimits

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
MB = 1 << 20


def on_each_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a coroutine test on both event loops."""

    @functools.wraps(test)
    def run(loop_name: str, **arguments: Any) -> None:
        async def in_time() -> None:
            async with asyncio.timeout(60):
                await test(**arguments)

        with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
            runner.run(in_time())

    signature = inspect.signature(test)
    first = inspect.Parameter("loop_name", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])  # type: ignore[attr-defined]
    del run.__wrapped__  # type: ignore[attr-defined]
    return pytest.mark.parametrize("loop_name", LOOPS)(run)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def turns(number: int = 5) -> None:
    """Let the loop read what has been sent on loopback."""
    for _ in range(number):
        await asyncio.sleep(0)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        return str(orjson.loads(self.body)["error"])

    @property
    def says_close(self) -> bool:
        return self.headers.get("connection") == "close"


def parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Strictly: a reply that is not well formed fails the test."""
    first, *lines = head.decode("ascii").removesuffix("\r\n\r\n").split("\r\n")
    status = re.fullmatch(r"HTTP/1\.1 (\d{3}) [ -~]*", first)
    assert status, first
    headers: dict[str, str] = {}
    for line in lines:
        header = re.fullmatch(r"([!-9;-~]+): ([ -~]*)", line)
        assert header, line
        assert header[1] not in headers, line
        headers[header[1]] = header[2]
    return int(status[1]), headers


def parse_replies(data: bytes) -> list[Answer]:
    """Everything a server sent on one connection."""
    answers = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, head
        status, headers = parse_head(head)
        size = int(headers.get("content-length", 0))
        assert len(data) >= size, "a reply is cut short"
        answers.append(Answer(status, headers, data[:size]))
        data = data[size:]
    return answers


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self, *, bodiless: bool = False) -> Answer:
        status, headers = parse_head(await self.reader.readuntil(b"\r\n\r\n"))
        size = 0 if bodiless else int(headers.get("content-length", 0))
        return Answer(status, headers, await self.reader.readexactly(size))

    async def ask(self, data: bytes) -> Answer:
        await self.send(data)
        return await self.reply()

    async def rest(self) -> bytes:
        """What comes until the server closes; a reset is an error."""
        return await self.reader.read()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await self.writer.wait_closed()


def reset(client: Client) -> None:
    """Go without a goodbye."""
    sock = client.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.writer.transport.abort()


class _Record(logging.Handler):
    def __init__(self, records: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record.getMessage())


@dataclass
class Server:
    listener: Listener
    refused: list[int]
    requests: list[Request]
    logged: list[str]
    clients: list[Client] = field(default_factory=list)

    async def connect(self, **options: Any) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.listener.port, **options))
        self.clients.append(client)
        return client

    async def ask(self, data: bytes) -> Answer:
        return await (await self.connect()).ask(data)

    async def exchange(self, *pieces: bytes) -> list[Answer]:
        """Send the pieces one by one, then end; and return all replies."""
        client = await self.connect()
        for piece in pieces:
            client.writer.write(piece)
            await turns()
        with contextlib.suppress(OSError):
            client.writer.write_eof()
        answers = parse_replies(await client.rest())
        self.clients.remove(client)
        await client.close()
        return answers


def echo(request: Request) -> Reply:
    """Says what arrived."""
    headers = {name.decode(): value.decode("latin-1") for name, value in request.headers.items()}
    body = request.body.decode("latin-1")
    return Reply(
        200, orjson.dumps({"method": request.method, "path": request.path, "headers": headers, "body": body})
    )


def said(answer: Answer, field_name: str = "body") -> Any:
    assert answer.status == 200, answer
    return orjson.loads(answer.body)[field_name]


@contextlib.asynccontextmanager
async def serving(
    handler: Handler = echo,
    *,
    sweep_s: float = 0.02,
    tls: ssl.SSLContext | None = None,
    port: int = 0,
    reuse_port: bool = False,
    **limits: Any,
) -> AsyncIterator[Server]:
    """A listener, and what it refused, handed over, and logged. What it logged must be taken out by the test."""
    requests: list[Request] = []

    def handle(request: Request) -> Reply | Coroutine[Any, Any, Reply]:
        requests.append(request)
        return handler(request)

    refused: list[int] = []
    logged: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: logged.append(f"loop: {context}"))
    record = _Record(logged)
    loggers = [logging.getLogger(name) for name in ("asyncio", "trimtab.listener")]
    for logger in loggers:
        logger.addHandler(record)
    listener = Listener(handle, ListenerLimits(**limits), on_refused=refused.append, sweep_s=sweep_s)
    await listener.start("127.0.0.1", port, reuse_port=reuse_port, ssl=tls)
    server = Server(listener, refused, requests, logged)
    try:
        yield server
    finally:
        for client in server.clients:
            await client.close()
        await listener.stop(0)
        for logger in loggers:
            logger.removeHandler(record)
    assert not logged
    assert listener.connections == listener.in_flight == 0
    assert listener._shared.bodies_bytes == 0


def get(path: str = "/", *headers: str, version: str = "1.1", method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: test", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def post(body: bytes, *headers: str, path: str = "/", version: str = "1.1") -> bytes:
    return get(path, f"Content-Length: {len(body)}", *headers, version=version, method="POST") + body


def chunked(
    *chunks: bytes, headers: tuple[str, ...] = (), end: bytes = b"0\r\n\r\n", path: str = "/"
) -> bytes:
    head = get(path, "Transfer-Encoding: chunked", *headers, method="POST")
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end


class Held:
    """A handler whose requests to /wait wait until they are let go; others are answered at once."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.ended = 0
        self.afters = 0

    def __call__(self, request: Request) -> Reply | Coroutine[Any, Any, Reply]:
        return self.wait(request) if request.path.startswith("/wait") else echo(request)

    async def wait(self, request: Request) -> Reply:
        await self.go.wait()
        self.ended += 1
        reply = echo(request)
        reply.after = self.after
        return reply

    def after(self) -> None:
        self.afters += 1


# One request.


@on_each_loop
async def test_a_request_reaches_the_handler_as_it_was_sent() -> None:
    async with serving() as server:
        answer = await server.ask(post(b"some bytes", "X-Thing: a b", path="/v2/models"))
    assert said(answer, "method") == "POST"
    assert said(answer, "path") == "/v2/models"
    assert said(answer, "body") == "some bytes"
    assert said(answer, "headers") == {"host": "test", "content-length": "10", "x-thing": "a b"}


@on_each_loop
async def test_of_a_repeated_header_the_last_one_counts() -> None:
    async with serving() as server:
        answer = await server.ask(get("/", "X-Thing: 1", "x-thing: 2"))
    assert said(answer, "headers")["x-thing"] == "2"


@on_each_loop
async def test_a_reply_carries_type_length_date_and_its_own_headers() -> None:
    def handler(_: Request) -> Reply:
        return Reply(429, b"slow down", b"text/plain", ((b"retry-after", b"7"), (b"x-request-id", b"abc")))

    async with serving(handler) as server:
        answer = await server.ask(get())
    sent = email.utils.parsedate_to_datetime(answer.headers.pop("date"))
    assert abs((dt.datetime.now(dt.UTC) - sent).total_seconds()) < 60
    assert answer == Answer(
        429,
        {"content-type": "text/plain", "content-length": "9", "retry-after": "7", "x-request-id": "abc"},
        b"slow down",
    )


@on_each_loop
async def test_a_status_without_a_name_is_sent_all_the_same() -> None:
    async with serving(lambda _: Reply(299, b"{}")) as server:
        assert (await server.ask(get())).status == 299


@on_each_loop
async def test_a_head_request_gets_the_length_but_not_the_body() -> None:
    async with serving(lambda _: Reply(200, b"twelve bytes")) as server:
        client = await server.connect()
        await client.send(get(method="HEAD") + get())
        assert (await client.reply(bodiless=True)).headers["content-length"] == "12"
        assert (await client.reply()).body == b"twelve bytes"


@on_each_loop
async def test_a_reply_without_content_has_neither_body_nor_length() -> None:
    async with serving(
        lambda request: Reply(204, b"") if request.path == "/none" else echo(request)
    ) as server:
        client = await server.connect()
        answer = await client.ask(get("/none"))
        assert answer.status == 204
        assert not answer.headers.keys() & {"content-length", "content-type"}
        assert said(await client.ask(get("/next")), "path") == "/next"


@on_each_loop
@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/a%20b/%C3%A9?x=%2F", "/a b/é"),
        ("/100%", "/100%"),
        ("/%ff", "/\N{REPLACEMENT CHARACTER}"),
        ("/a%3Fb", "/a?b"),
        ("//other/path", "//other/path"),
        ("http://test:80/p%61th?q", "/path"),
        ("http://test", "/"),
        ("*", "*"),
    ],
)
async def test_the_path_is_decoded_and_the_query_dropped(target: str, path: str) -> None:
    async with serving() as server:
        assert said(await server.ask(get(target)), "path") == path


@on_each_loop
async def test_line_ends_in_a_decoded_path_cannot_split_a_reply() -> None:
    async with serving() as server:
        answers = await server.exchange(
            get("/%0d%0aX-Evil:%20yes%0d%0a%0d%0aHTTP/1.1%20200%20OK%0d%0a%0d%0a")
        )
    assert [said(answer, "path")[:12] for answer in answers] == ["/\r\nX-Evil: y"]
    assert answers[0].headers.keys() == {"content-type", "content-length", "date"}


# One connection, many requests.


@on_each_loop
async def test_a_connection_serves_one_request_after_another() -> None:
    async with serving() as server:
        client = await server.connect()
        for number in range(5):
            assert said(await client.ask(post(b"%d" % number))) == str(number)
        assert server.listener.connections == 1


@on_each_loop
@pytest.mark.parametrize(
    "request_", [get("/", "Connection: close"), get(version="1.0")], ids=["close", "1.0"]
)
async def test_a_client_that_wants_one_reply_gets_it_and_the_end(request_: bytes) -> None:
    async with serving() as server:
        client = await server.connect()
        assert (await client.ask(request_)).says_close
        assert await client.rest() == b""


@on_each_loop
async def test_an_old_client_that_asks_for_it_is_kept_and_told_so() -> None:
    async with serving() as server:
        client = await server.connect()
        for _ in range(2):
            answer = await client.ask(post(b"x", "Connection: keep-alive", version="1.0"))
            assert answer.headers["connection"] == "keep-alive"


@on_each_loop
async def test_pipelined_requests_are_answered_in_order_whatever_their_kind() -> None:
    async def later(request: Request) -> Reply:
        await asyncio.sleep(0)
        return echo(request)

    def handler(request: Request) -> Reply | Coroutine[Any, Any, Reply]:
        return later(request) if request.path.startswith("/later") else echo(request)

    paths = [f"/{kind}/{number}" for number in range(200) for kind in ("now", "later", "later", "now")]
    requests = [
        [get(path), post(b"body", path=path), chunked(b"bo", b"dy", path=path)][number % 3]
        for number, path in enumerate(paths)
    ]
    async with serving(handler) as server:
        answers = await server.exchange(b"".join(requests))
    assert [said(answer, "path") for answer in answers] == paths
    assert [said(answer) for answer in answers] == [["", "body", "body"][n % 3] for n in range(len(paths))]


@on_each_loop
async def test_a_burst_of_requests_of_one_client_lets_others_in_between() -> None:
    order: list[str] = []

    def handler(request: Request) -> Reply:
        order.append(request.path)
        return Reply(200, b"")

    async with serving(handler) as server:
        burst, other = await server.connect(), await server.connect()
        await burst.send(get("/burst") * 2000)
        await other.send(get("/other"))
        await other.reply()
        for _ in range(2000):
            await burst.reply()
    assert order.index("/other") < 1900


@on_each_loop
async def test_nothing_is_read_ahead_of_a_request_that_waits() -> None:
    held = Held()
    async with serving(held) as server:
        with socket.create_connection(("127.0.0.1", server.listener.port)) as client:
            client.sendall(get("/wait"))
            await until(lambda: server.listener.in_flight == 1)
            client.setblocking(False)
            block = get("/next") * 1000
            sent = stuck = 0
            while stuck < 200 and sent < 100 * MB:
                try:
                    sent += client.send(block)
                    stuck = 0
                except BlockingIOError:
                    stuck += 1
                await asyncio.sleep(0)
            assert stuck == 200, "the listener went on reading"
            assert [request.path for request in server.requests] == ["/wait"]
            (connection,) = server.listener._shared.connections
            assert len(connection.rest) <= MB
        held.go.set()


@on_each_loop
async def test_a_client_that_does_not_read_gets_no_further_request_answered() -> None:
    async with serving(lambda _: Reply(200, bytes(2 * MB)), idle_timeout_s=0.05) as server:
        client = await server.connect(limit=1024)
        await client.send(get() * 50)
        await asyncio.sleep(0.3)  # nor does anybody take it for idle
        assert len(server.requests) < 25  # the kernel's buffers hold a few replies
        for _ in range(50):
            assert len((await client.reply()).body) == 2 * MB


@on_each_loop
async def test_a_client_that_has_half_closed_gets_the_reply_it_waits_for() -> None:
    held = Held()
    async with serving(held) as server:
        client = await server.connect()
        await client.send(get("/wait"))
        client.writer.write_eof()
        await until(lambda: server.listener.in_flight == 1)
        await turns(20)
        held.go.set()
        (answer,) = parse_replies(await client.rest())
        assert said(answer, "path") == "/wait"


@on_each_loop
async def test_a_client_that_has_sent_everything_and_half_closed_gets_all_its_replies() -> None:
    held = Held()
    async with serving(held) as server:
        client = await server.connect()
        await client.send(get("/wait/1") + get("/2") + get("/wait/3") + b"GET /4 HT")
        client.writer.write_eof()
        await until(lambda: server.listener.in_flight == 1)
        await turns()
        held.go.set()
        answers = parse_replies(await client.rest())
    assert [said(answer, "path") for answer in answers] == ["/wait/1", "/2", "/wait/3"]


# Bodies.


@on_each_loop
async def test_a_chunked_body_arrives_whole() -> None:
    async with serving() as server:
        client = await server.connect()
        assert (
            said(await client.ask(chunked(b"some ", b"\r\n\r\n", b"0\r\n\r\n", b"bytes")))
            == "some \r\n\r\n0\r\n\r\nbytes"
        )
        assert said(await client.ask(chunked())) == ""
        assert said(await client.ask(chunked(end=b'3;name="value"\r\nabc\r\n0\r\n\r\n'))) == "abc"


@on_each_loop
async def test_trailers_are_part_of_no_request() -> None:
    trailers = b"0\r\nX-Trailer: 1\r\nHost: 1\r\nHost: 2\r\n\r\n"
    async with serving() as server:
        first, second = await server.exchange(chunked(b"abc", end=trailers) + get("/next"))
    assert said(first, "headers") == {"host": "test", "transfer-encoding": "chunked"}
    assert said(second, "headers") == {"host": "test"}


@on_each_loop
@pytest.mark.parametrize("size", [0, 1, 300_000, MB])
async def test_a_body_of_any_size_up_to_the_limit_arrives_whole(size: int) -> None:
    body = (b"0123456789abcdef\r\n" * (size // 18 + 1))[:size]
    async with serving(lambda request: Reply(200, request.body), max_body_bytes=MB) as server:
        client = await server.connect()
        assert (await client.ask(post(body))).body == body
        assert (await client.ask(chunked(*([body] if body else [])))).body == body


@on_each_loop
@pytest.mark.parametrize(
    ("head", "body"),
    [
        (get("/", "Expect: 100-Continue", "Content-Length: 4", method="POST"), b"body"),
        (chunked(headers=("Expect: 100-continue",), end=b""), b"4\r\nbody\r\n0\r\n\r\n"),
    ],
    ids=["length", "chunked"],
)
async def test_a_client_that_expects_to_be_told_is_told_to_go_on(head: bytes, body: bytes) -> None:
    async with serving() as server:
        client = await server.connect()
        assert await client.ask(head) == Answer(100, {}, b"")
        assert said(await client.ask(body)) == "body"
        assert said(await client.ask(head + body)) == "body"  # not told what it knew already


@on_each_loop
async def test_an_old_client_is_not_told_to_go_on() -> None:
    async with serving() as server:
        client = await server.connect()
        await client.send(get("/", "Expect: 100-continue", "Content-Length: 4", method="POST", version="1.0"))
        await turns()
        assert said(await client.ask(b"body")) == "body"


@on_each_loop
async def test_a_client_that_expects_to_be_told_is_told_that_its_body_is_too_large() -> None:
    async with serving(max_body_bytes=10) as server:
        answer = await server.ask(get("/", "Content-Length: 11", "Expect: 100-continue", method="POST"))
    assert answer.status == 413


# What is refused.

HOST = b"Host: test\r\n"
SMUGGLED = get("/smuggled")
REFUSED = {
    "length and chunked": (400, b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    "chunked and length": (400, b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", b"0\r\n\r\n"),
    "two lengths": (400, b"Content-Length: 5\r\nContent-Length: 6\r\n", b"abcdef"),
    "a list of lengths": (400, b"Content-Length: 5, 5\r\n", b"abcde"),
    "a signed length": (400, b"Content-Length: +5\r\n", b"abcde"),
    "a negative length": (400, b"Content-Length: -5\r\n", b"abcde"),
    "a hexadecimal length": (400, b"Content-Length: 0x5\r\n", b"abcde"),
    "an empty length": (400, b"Content-Length: \r\n", b"abcde"),
    "a huge length": (400, b"Content-Length: 99999999999999999999999\r\n", b"abcde"),
    "a length with thousands of zeros": (400, b"Content-Length: " + b"0" * 5000 + b"5\r\n", b"abcde"),
    "space before the colon": (400, b"Content-Length : 5\r\n", b"abcde"),
    "a folded header": (400, b"Content-Length: 5\r\n 0\r\n", b"abcde"),
    "a bare line feed": (400, b"X: 1\nContent-Length: 5\r\n", b"abcde"),
    "a bare carriage return": (400, b"X: 1\rContent-Length: 5\r\n", b"abcde"),
    "a zero byte": (400, b"X: \0\r\nContent-Length: 5\r\n", b"abcde"),
    "another coding": (400, b"Transfer-Encoding: identity\r\n", b"0\r\n\r\n"),
    "almost chunked": (400, b"Transfer-Encoding: xchunked\r\n", b"0\r\n\r\n"),
    "chunked, but not last": (400, b"Transfer-Encoding: chunked, identity\r\n", b"0\r\n\r\n"),
    "a second coding": (501, b"Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n"),
    "codings in two headers": (
        400,
        b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
        b"0\r\n\r\n",
    ),
    "two hosts": (400, b"Host: other\r\nContent-Length: 5\r\n", b"abcde"),
    "a bad chunk size": (400, b"Transfer-Encoding: chunked\r\n", b"0x5\r\nabcde\r\n0\r\n\r\n"),
    "a signed chunk size": (400, b"Transfer-Encoding: chunked\r\n", b"+5\r\nabcde\r\n0\r\n\r\n"),
    "no chunk size": (400, b"Transfer-Encoding: chunked\r\n", b"\r\nabcde\r\n0\r\n\r\n"),
    "a huge chunk size": (400, b"Transfer-Encoding: chunked\r\n", b"fffffffffffffffff\r\nabcde\r\n0\r\n\r\n"),
    "a chunk longer than its size": (400, b"Transfer-Encoding: chunked\r\n", b"4\r\nabcde\r\n0\r\n\r\n"),
    "a chunk line that ends with a line feed": (
        400,
        b"Transfer-Encoding: chunked\r\n",
        b"5\nabcde\r\n0\r\n\r\n",
    ),
    "an upgrade": (501, b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b""),
    "an upgrade with a body": (
        501,
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n",
        b"abcde",
    ),
    "an upgrade to HTTP/2 in two lines": (
        400,
        b"Connection: Upgrade\r\nUpgrade: h2c\r\n , websocket\r\n",
        b"",
    ),
}


@on_each_loop
@pytest.mark.parametrize("line", [b"Upgrade: h2c", b"upgrade:h2c ", b"UPGRADE:\th2c"])
async def test_an_offer_of_http_2_is_overlooked(line: bytes) -> None:
    async with serving() as server:
        offer = b"Connection: Upgrade, HTTP2-Settings\r\n" + line + b"\r\nHTTP2-Settings: AAMAAABk\r\n"
        request = b"POST / HTTP/1.1\r\n" + HOST + offer + b"Content-Length: 5\r\n\r\nabcde"
        answers = await server.exchange(request + request)
        assert [answer.status for answer in answers] == [200, 200]
        assert [asked.body for asked in server.requests] == [b"abcde", b"abcde"]


@on_each_loop
@pytest.mark.parametrize(("status", "headers", "body"), REFUSED.values(), ids=REFUSED)
async def test_framing_that_could_be_read_in_two_ways_is_refused(
    status: int, headers: bytes, body: bytes
) -> None:
    async with serving() as server:
        answers = await server.exchange(b"POST / HTTP/1.1\r\n" + HOST + headers + b"\r\n" + body + SMUGGLED)
        assert [(answer.status, answer.says_close) for answer in answers] == [(status, True)]
        assert answers[0].error
        assert not server.requests
        assert server.refused == [status]


@on_each_loop
@pytest.mark.parametrize(
    ("status", "data"),
    [
        (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        (400, b"get / HTTP/1.1\r\n" + HOST + b"\r\n"),
        (400, b"NONSENSE / HTTP/1.1\r\n" + HOST + b"\r\n"),
        (400, b"GET / HTTP/1.1\n" + HOST + b"\n\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\n\r\n"),
        (400, b"GET nowhere HTTP/1.1\r\n" + HOST + b"\r\n"),
        (400, b"GET http:// HTTP/1.1\r\n" + HOST + b"\r\n"),
        (400, b"GET / two HTTP/1.1\r\n" + HOST + b"\r\n"),
        (400, b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        (501, b"CONNECT test:80 HTTP/1.1\r\n" + HOST + b"\r\n"),
        (505, b"GET / HTTP/2.0\r\n" + HOST + b"\r\n"),
        (505, b"GET / HTTP/0.9\r\n" + HOST + b"\r\n"),
        (505, b"GET / RTSP/1.0\r\n" + HOST + b"\r\n"),
        (505, b"GET /\r\n\r\n"),
    ],
)
async def test_what_is_not_a_request_is_refused_at_once(status: int, data: bytes) -> None:
    async with serving() as server:
        client = await server.connect()
        await client.send(data)
        (answer,) = parse_replies(await client.rest())
        assert (answer.status, answer.says_close) == (status, True)
        assert server.refused == [status]
        assert not server.requests


@on_each_loop
async def test_blank_lines_before_a_request_are_ignored() -> None:
    async with serving() as server:
        client = await server.connect()
        await client.send(b"\r\n\r\n")
        await turns()
        assert said(await client.ask(post(b"one") + b"\r\n")) == "one"
        assert said(await client.ask(b"\r\n\n" + post(b"two"))) == "two"


@on_each_loop
async def test_a_parser_that_sees_two_requests_where_one_was_framed_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lenient(protocol: object) -> httptools.HttpRequestParser:
        parser = real(protocol)
        parser.set_dangerous_leniencies(lenient_chunked_length=True)
        return parser

    real = httptools.HttpRequestParser
    monkeypatch.setattr(httptools, "HttpRequestParser", lenient)
    async with serving() as server:
        (answer,) = await server.exchange(post(b"0\r\n\r\n" + SMUGGLED, "Transfer-Encoding: chunked"))
        assert answer.status == 400
        assert not server.requests


@on_each_loop
async def test_a_body_over_the_limit_is_refused_before_it_is_sent() -> None:
    async with serving(max_body_bytes=1000) as server:
        client = await server.connect()
        answer = await client.ask(get("/", "Content-Length: 1001", method="POST"))
        assert (answer.status, answer.says_close) == (413, True)
        assert await client.rest() == b""
        assert server.refused == [413]


@on_each_loop
@pytest.mark.parametrize("body", [post(bytes(8 * MB)), chunked(bytes(8 * MB))], ids=["length", "chunked"])
async def test_a_client_that_sends_all_before_it_reads_still_sees_the_refusal(body: bytes) -> None:
    async with serving(max_body_bytes=1000) as server:
        client = await server.connect()
        answer = await client.ask(body)
        assert (answer.status, answer.says_close) == (413, True)
        assert await client.rest() == b""
        await client.close()
        await until(lambda: server.listener.connections == 0)


@on_each_loop
async def test_a_refused_client_that_keeps_sending_is_cut_off() -> None:
    async with serving(max_body_bytes=1000, linger_bytes=100_000) as server:
        client = await server.connect()
        with contextlib.suppress(OSError):
            await client.send(get("/", "Content-Length: 100000000", method="POST") + bytes(64 * MB))
            pytest.fail("all of it was read")


@on_each_loop
async def test_a_refused_client_that_stays_is_cut_off() -> None:
    async with serving(max_body_bytes=1000, linger_s=0.05) as server:
        client = await server.connect()
        assert (await client.ask(get("/", "Content-Length: 1001", method="POST"))).status == 413
        await until(lambda: server.listener.connections == 0)


@on_each_loop
async def test_a_chunked_body_is_refused_when_it_crosses_the_limit() -> None:
    async with serving(max_body_bytes=1000) as server:
        assert (await server.ask(chunked(bytes(1000)))).status == 200
        assert (await server.ask(chunked(bytes(500), bytes(501)))).status == 413
        client = await server.connect()
        await client.send(chunked(bytes(1000), end=b"1\r\n"))
        assert (await client.ask(b"x")).status == 413  # and the body has not ended yet


@on_each_loop
async def test_headers_over_the_limit_are_refused_and_at_the_limit_served() -> None:
    start, end = b"GET / HTTP/1.1\r\nHost: test\r\nX: ", b"\r\n\r\n"
    fits = start + b"x" * (1000 - len(start) - len(end)) + end
    async with serving(max_header_bytes=1000) as server:
        assert (await server.ask(fits)).status == 200
        assert (await server.ask(get() + fits)).status == 200
        for data in (b"GET /x" + fits[5:], start + bytes([120]) * 2000, b"GET /" + bytes([120]) * 2000):
            answer = await server.ask(data)
            assert (answer.status, answer.says_close) == (431, True)
        assert server.refused == [431] * 3


@on_each_loop
@pytest.mark.parametrize(
    "start", [b"3\r\nabc\r\n0\r\nX: ", b"3\r\nabc\r\n4;extension="], ids=["trailer", "extension"]
)
async def test_what_is_not_content_of_a_chunked_body_is_limited(start: bytes) -> None:
    async with serving() as server:
        client = await server.connect()
        await client.send(chunked(end=start))
        with contextlib.suppress(OSError):
            for _ in range(100):
                await client.send(b"x" * 10_000)
                await turns()
                if server.refused:
                    break
        assert (await client.reply()).status == 431


@on_each_loop
async def test_too_many_connections_are_told_to_come_back() -> None:
    async with serving(max_connections=2) as server:
        one, two = await server.connect(), await server.connect()
        assert (await one.ask(get())).status == (await two.ask(get())).status == 200
        three, four, five = [await server.connect() for _ in range(3)]
        answer = await three.ask(get())
        assert (answer.status, answer.headers["retry-after"], answer.says_close) == (503, "1", True)
        assert await three.rest() == b""
        assert (await four.ask(get())).status == 503
        with contextlib.suppress(ConnectionResetError):
            assert await five.rest() == b""  # more than twice the limit: no answer
        assert server.refused == [503, 503]
        assert (await two.ask(get())).status == 200
        for client in (one, three, four):
            await client.close()
        await until(lambda: server.listener.connections == 1)
        assert (await server.ask(get())).status == 200


@on_each_loop
async def test_a_connection_too_many_that_sends_nothing_is_not_kept() -> None:
    async with serving(max_connections=1, linger_s=0.05) as server:
        await (await server.connect()).ask(get())
        client = await server.connect()
        assert [answer.status for answer in parse_replies(await client.rest())] == [503]


@on_each_loop
async def test_too_many_coroutines_are_told_to_come_back_while_others_are_served() -> None:
    held = Held()
    async with serving(held, max_in_flight=2) as server:
        waiting = [await server.connect() for _ in range(2)]
        for client in waiting:
            await client.send(get("/wait"))
        await until(lambda: server.listener.in_flight == 2)
        client = await server.connect()
        answer = await client.ask(get("/wait"))
        assert (answer.status, answer.headers["retry-after"], answer.says_close) == (503, "1", False)
        assert (await client.ask(get("/now"))).status == 200
        assert server.refused == [503]
        held.go.set()
        assert [(await one.reply()).status for one in waiting] == [200, 200]
        assert (await client.ask(get("/wait"))).status == 200


@on_each_loop
@pytest.mark.parametrize("kind", [post, chunked])
async def test_bodies_that_together_are_too_large_are_told_to_come_back(
    kind: Callable[[bytes], bytes],
) -> None:
    whole = kind(bytes(600_000))
    async with serving(max_bodies_bytes=MB) as server:
        first = await server.connect()
        await first.send(whole[:-10])
        await until(lambda: server.listener._shared.bodies_bytes >= 599_000)
        second = await server.ask(whole)
        assert (second.status, second.headers["retry-after"], second.says_close) == (503, "1", True)
        assert (await server.ask(post(b"small"))).status == 200
        assert (await first.ask(whole[-10:])).status == 200
        assert server.listener._shared.bodies_bytes == 0
        assert (await server.ask(whole)).status == 200


@on_each_loop
async def test_the_body_of_a_waiting_request_counts_until_it_is_answered() -> None:
    held = Held()
    async with serving(held, max_bodies_bytes=1000) as server:
        first = await server.connect()
        await first.send(post(bytes(600), path="/wait"))
        await until(lambda: server.listener.in_flight == 1)
        assert (await server.ask(post(bytes(600)))).status == 503
        held.go.set()
        assert (await first.reply()).status == 200
        assert (await server.ask(post(bytes(600)))).status == 200


@on_each_loop
async def test_the_body_of_a_waiting_request_counts_even_when_its_client_has_gone() -> None:
    held = Held()
    async with serving(held, max_bodies_bytes=1000) as server:
        first = await server.connect()
        await first.send(post(bytes(600), path="/wait"))
        await until(lambda: server.listener.in_flight == 1)
        reset(first)
        await until(lambda: server.listener.connections == 0)
        assert (await server.ask(post(bytes(600)))).status == 503
        held.go.set()
        await until(lambda: server.listener.in_flight == 0)
        assert (await server.ask(post(bytes(600)))).status == 200


# Slow clients.


@on_each_loop
@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: te"], ids=["nothing", "half"])
async def test_a_client_whose_headers_do_not_come_is_timed_out(sent: bytes) -> None:
    async with serving(header_timeout_s=0.05) as server:
        client = await server.connect()
        await client.send(sent)
        (answer,) = parse_replies(await client.rest())
        assert (answer.status, answer.says_close) == (408, True)
        assert server.refused == [408]


@on_each_loop
@pytest.mark.parametrize("before", [b"", get()], ids=["first request", "later request"])
async def test_headers_that_come_byte_by_byte_do_not_get_more_time(before: bytes) -> None:
    async with serving(header_timeout_s=0.1) as server:
        client = await server.connect()
        answers = 0
        client.writer.write(before)
        for byte in get("/", "X: " + "x" * 10_000):
            if client.reader.at_eof() or server.refused:
                break
            client.writer.write(bytes([byte]))
            await asyncio.sleep(0.01)
        answers = parse_replies(await client.rest())
        assert answers[-1].status == 408
        assert server.refused == [408]


@on_each_loop
@pytest.mark.parametrize("request_", [post(b"body"), chunked(b"body")], ids=["length", "chunked"])
async def test_a_client_whose_body_does_not_come_is_timed_out(request_: bytes) -> None:
    async with serving(body_timeout_s=0.05) as server:
        client = await server.connect()
        await client.send(request_[:-3])
        (answer,) = parse_replies(await client.rest())
        assert (answer.status, answer.says_close) == (408, True)
        assert "body" in answer.error


@on_each_loop
async def test_an_idle_connection_is_closed_without_a_reply() -> None:
    async with serving(idle_timeout_s=0.05) as server:
        client = await server.connect()
        assert (await client.ask(get())).status == 200
        assert await client.rest() == b""
        assert server.refused == []


@on_each_loop
async def test_a_request_that_waits_for_its_answer_is_not_timed_out() -> None:
    held = Held()
    limits = dict.fromkeys(("header_timeout_s", "body_timeout_s", "idle_timeout_s", "write_timeout_s"), 0.02)
    async with serving(held, sweep_s=0.005, **limits) as server:
        client, ahead = await server.connect(), await server.connect()
        await client.send(post(b"body", path="/wait"))
        await ahead.send(post(b"body", path="/wait") + get("/next") + get("/half")[:-5])
        await until(lambda: server.listener.in_flight == 2)
        await asyncio.sleep(0.2)
        held.go.set()
        assert said(await client.reply(), "path") == "/wait"
        assert [said(await ahead.reply(), "path") for _ in range(2)] == ["/wait", "/next"]


@on_each_loop
async def test_time_in_which_the_loop_was_held_up_is_not_held_against_clients() -> None:
    request = get("/punctual")

    def handler(slow: Request) -> Reply:
        if slow.path == "/slow":
            time.sleep(0.5)
            os.write(punctual.writer.get_extra_info("socket").fileno(), request[10:])
        return Reply(200, b"")

    async with serving(handler, header_timeout_s=0.1) as server:
        punctual, other = await server.connect(), await server.connect()
        await punctual.send(request[:10])
        await turns()
        assert (await other.ask(get("/slow"))).status == 200
        assert (await punctual.reply()).status == 200


@on_each_loop
async def test_a_client_that_does_not_read_is_cut_off() -> None:
    async with serving(lambda _: Reply(200, bytes(32 * MB)), write_timeout_s=0.1) as server:
        client = await server.connect(limit=1024)
        await client.send(get())
        await until(lambda: server.listener.connections == 1)
        await until(lambda: server.listener.connections == 0)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await client.reply()


@on_each_loop
async def test_a_client_that_does_not_read_the_end_of_its_last_reply_is_cut_off() -> None:
    async with serving(lambda _: Reply(200, bytes(16384)), write_timeout_s=0.1) as server:
        client = await server.connect(limit=1024)
        await client.send(get())
        await until(lambda: server.listener.connections == 1)
        (connection,) = server.listener._shared.connections
        for _ in range(2000):  # until the kernel takes no more, but the transport does
            if connection.transport.get_write_buffer_size():
                break
            await client.send(get())
            await turns()
        await client.send(get("/", "Connection: close"))
        await until(connection.transport.is_closing)
        assert not connection.full
        await until(lambda: server.listener.connections == 0)


# Clients that go, handlers that fail.


@on_each_loop
@pytest.mark.parametrize("abort", [False, True])
async def test_a_request_whose_client_has_gone_is_finished_and_its_reply_dropped(abort: bool) -> None:
    held = Held()
    async with serving(held) as server:
        client = await server.connect()
        await client.send(post(bytes(1000), path="/wait"))
        await until(lambda: server.listener.in_flight == 1)
        if abort:
            reset(client)
            await until(lambda: server.listener.connections == 0)
        else:
            client.writer.close()
        await turns(20)
        assert server.listener.in_flight == 1
        held.go.set()
        await until(lambda: held.afters == 1)
        assert held.ended == 1
        await until(lambda: server.listener.connections == server.listener.in_flight == 0)


@on_each_loop
async def test_a_connection_that_breaks_while_a_reply_is_written_answers_no_more() -> None:
    async with serving() as server:
        client = await server.connect()
        await client.ask(get())
        (connection,) = server.listener._shared.connections
        real = connection.transport
        connection.transport = mock.Mock(wraps=real, write=lambda _: real.abort())
        await client.send(get("/broken") + get("/next"))
        await until(lambda: server.listener.connections == 0)
        assert [request.path for request in server.requests] == ["/", "/broken"]


@on_each_loop
async def test_a_client_that_has_gone_before_the_end_of_its_refusal_is_nobodys_error() -> None:
    held = Held()
    async with serving(held) as server:
        client = await server.connect()
        await client.send(get("/wait") + b"nonsense")
        await until(lambda: server.listener.in_flight == 1)
        (connection,) = server.listener._shared.connections
        shutdown = mock.Mock(side_effect=OSError(errno.ENOTCONN, "not connected"))
        connection.transport = mock.Mock(wraps=connection.transport, write_eof=shutdown)
        held.go.set()
        assert [(await client.reply()).status for _ in range(2)] == [200, 400]
        shutdown.assert_called_once()


@on_each_loop
async def test_what_comes_after_a_reply_runs_after_it_was_written() -> None:
    async with serving() as server:
        events: list[str] = []

        def handler(_: Request) -> Reply:
            (connection,) = server.listener._shared.connections
            write = connection.transport.write

            def spy(data: bytes) -> None:
                events.append("written")
                write(data)

            connection.transport = mock.Mock(wraps=connection.transport, write=spy)
            return Reply(200, b"", after=lambda: events.append("after"))

        server.listener._shared.handler = handler
        await server.ask(get())
        await turns()
        assert events == ["written", "after"]


@on_each_loop
async def test_a_failure_after_a_reply_is_logged_and_costs_nobody_anything() -> None:
    def after() -> None:
        raise OSError("queue gone")

    async with serving(lambda _: Reply(200, b"", after=after)) as server:
        client = await server.connect()
        assert (await client.ask(get())).status == (await client.ask(get())).status == 200
        await until(lambda: len(server.logged) == 2)
        assert all("queue gone" in message for message in server.logged)
        server.logged.clear()


async def _raises(_: Request) -> Reply:
    raise KeyError("secret")


async def _cancelled(_: Request) -> Reply:
    raise asyncio.CancelledError


async def _nothing(_: Request) -> Any:
    return None


def _raises_at_once(_: Request) -> Reply:
    raise KeyError("secret")


@on_each_loop
@pytest.mark.parametrize("handler", [_raises_at_once, _raises, _cancelled, _nothing, lambda _: None])
async def test_a_handler_that_fails_is_logged_once_and_answered_500(handler: Handler) -> None:
    async with serving(lambda request: handler(request) if request.path == "/" else echo(request)) as server:
        client = await server.connect()
        answer = await client.ask(post(b"body"))
        assert (answer.status, answer.error) == (500, "internal error")
        assert len(server.logged) == 1
        server.logged.clear()
        assert (await client.ask(get("/fine"))).status == 200


@on_each_loop
async def test_a_failing_on_refused_is_logged_and_the_refusal_sent() -> None:
    def on_refused(status: int) -> None:
        raise RuntimeError(f"no counter for {status}")

    async with serving() as server:
        server.listener._shared.on_refused = on_refused
        assert (await server.ask(b"nonsense")).status == 400
        assert len(server.logged) == 1
        server.logged.clear()


# Starting and stopping.


@on_each_loop
async def test_stopping_closes_idle_connections_at_once_and_answers_what_has_begun() -> None:
    held = Held()
    async with serving(held) as server:
        new, idle, half, waiting, pipelined = [await server.connect() for _ in range(5)]
        await idle.ask(get())
        await half.send(post(b"body")[:-2])
        await waiting.send(get("/wait"))
        await pipelined.send(get("/wait") + get("/next"))
        await until(lambda: server.listener.in_flight == 2)
        stopping = asyncio.create_task(server.listener.stop(30))
        assert await new.rest() == await idle.rest() == b""
        with pytest.raises(OSError):
            await server.connect()
        assert not stopping.done()
        held.go.set()
        await half.send(b"dy")
        for client in (half, waiting, pipelined):
            (answer,) = parse_replies(await client.rest())
            assert (answer.status, answer.says_close) == (200, True)
            await client.close()
        await stopping


@on_each_loop
async def test_a_request_that_has_reached_this_machine_when_stopping_begins_is_answered() -> None:
    async with serving() as server:
        client = await server.connect()
        await client.ask(get())
        os.write(client.writer.get_extra_info("socket").fileno(), get("/last"))
        await server.listener.stop(5)
        (answer,) = parse_replies(await client.rest())
        assert said(answer, "path") == "/last"


@on_each_loop
async def test_what_is_not_answered_when_the_grace_is_over_is_cut_off() -> None:
    held = Held()
    async with serving(held) as server:
        waiting, half = await server.connect(), await server.connect()
        await waiting.send(get("/wait"))
        await half.send(post(b"body")[:-2])
        await until(lambda: server.listener.in_flight == 1)
        await server.listener.stop(0.05)
        assert server.listener.connections == server.listener.in_flight == 0
        for client in (waiting, half):
            with contextlib.suppress(ConnectionResetError):
                assert await client.rest() == b""
        assert held.ended == 0


@on_each_loop
async def test_a_coroutine_cut_off_before_its_first_step_leaves_nothing_behind() -> None:
    held = Held()
    async with serving(held) as server:
        client = await server.connect()
        original = server.listener._shared.handler
        stopping: list[asyncio.Task[None]] = []

        def handler(request: Request) -> Any:
            stopping.append(asyncio.ensure_future(server.listener.stop(0)))
            return original(request)

        server.listener._shared.handler = handler
        await client.send(get("/wait"))
        with contextlib.suppress(ConnectionResetError):
            assert await client.rest() == b""
        await stopping[0]
        assert server.listener.in_flight == 0


@on_each_loop
async def test_stopping_twice_or_before_starting_is_harmless() -> None:
    listener = Listener(echo, ListenerLimits())
    await listener.stop(1)
    await listener.start("127.0.0.1", 0, reuse_port=False, ssl=None)
    await listener.stop(1)
    await listener.stop(1)
    with pytest.raises(RuntimeError, match="make another one"):
        await listener.start("127.0.0.1", 0, reuse_port=False, ssl=None)


@on_each_loop
async def test_listeners_share_a_port_only_when_asked() -> None:
    async with serving(reuse_port=True) as first:
        port = first.listener.port
        async with serving(reuse_port=True, port=port) as second:
            for _ in range(64):
                await (await first.connect()).ask(get())
            assert first.requests
            assert second.requests
        with pytest.raises(OSError, match="choose another"):
            await Listener(echo, ListenerLimits()).start("127.0.0.1", port, reuse_port=False, ssl=None)


@on_each_loop
async def test_a_host_that_cannot_be_listened_on_is_named() -> None:
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1 port 0"):
        await Listener(echo, ListenerLimits()).start("192.0.2.1", 0, reuse_port=False, ssl=None)


@on_each_loop
async def test_small_replies_are_not_held_back() -> None:
    async with serving() as server:
        await server.ask(get())
        (connection,) = server.listener._shared.connections
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# TLS.


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and the client's, around a certificate made for this test."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + pem
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cadata=pem.decode())


@on_each_loop
async def test_tls_serves_refuses_and_stops_like_plain_http(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    held = Held()
    async with serving(held, tls=contexts[0], max_body_bytes=MB) as server:
        client = await server.connect(ssl=contexts[1])
        body = b"x" * 700_000
        assert (
            said(await client.ask(post(body) + chunked(body, path="/wait") + get("/next"))) == body.decode()
        )
        held.go.set()
        assert said(await client.reply()) == body.decode()
        assert said(await client.reply(), "path") == "/next"
        answer = await client.ask(post(bytes(4 * MB)))
        assert (answer.status, answer.says_close) == (413, True)
        held.go.clear()
        waiting, gone, idle = [await server.connect(ssl=contexts[1]) for _ in range(3)]
        await idle.ask(get())
        await waiting.send(get("/wait"))
        await gone.send(get("/wait"))
        await until(lambda: server.listener.in_flight == 2)
        await gone.close()
        await client.close()
        stopping = asyncio.create_task(server.listener.stop(30))
        assert await idle.rest() == b""
        held.go.set()
        assert [answer.says_close for answer in parse_replies(await waiting.rest())] == [True]
        await waiting.close()
        await idle.close()
        await stopping


@on_each_loop
async def test_plain_http_to_a_tls_port_is_closed_and_the_next_client_served(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    async with serving(tls=contexts[0]) as server:
        client = await server.connect()
        await client.send(get())
        with contextlib.suppress(ConnectionResetError):
            await client.rest()
        assert (await (await server.connect(ssl=contexts[1])).ask(get())).status == 200


# Memory.


@on_each_loop
@pytest.mark.parametrize(
    ("head", "status"),
    [
        (get("/", "Content-Length: 100000000", method="POST"), 413),
        (chunked(end=b"5f5e100\r\n"), 413),
        (get("/", "Content-Length: 100000000", "X-Allowed: yes", method="POST"), 503),
    ],
    ids=["announced", "chunked", "allowed one by one"],
)
async def test_memory_is_bounded_whatever_many_clients_send(head: bytes, status: int) -> None:
    block = bytes(65536)

    async def upload(server: Server) -> None:
        client = await server.connect()
        with contextlib.suppress(OSError):
            await client.send(head)
            for _ in range(100_000_000 // len(block)):
                await client.send(block)

    limit = 200 * MB if b"X-Allowed" in head else MB // 2
    limits = {"max_body_bytes": limit, "max_bodies_bytes": 16 * MB, "linger_bytes": 4 * MB}
    async with serving(**limits) as server:
        tracemalloc.start()
        try:
            await asyncio.gather(*[upload(server) for _ in range(20)])
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert set(server.refused) == {status}
        assert len(server.refused) == 20
        assert not server.requests
        assert peak < 60 * MB


# Any bytes at all.

WHOLE = [
    post(b'{"rows": [[1.0, 2.0]]}', "Content-Type: application/json", path="/predict?x=1"),
    chunked(b"some ", b"\r\n\r\n", b"bytes", headers=("X-Y: z",), path="/chunked"),
    chunked(b"abc", end=b"0\r\nX-Trailer: 1\r\n\r\n"),
    get("/ready"),
    get("http://test/absolute?q"),
]
TOKENS = [
    *(
        b"GET ",
        b"POST ",
        b"CONNECT ",
        b"/",
        b"*",
        b"%0d%0a",
        b"http://h/",
        b" HTTP/1.1\r\n",
        b" HTTP/1.0\r\n",
    ),
    *(HOST, b"\r\n", b"\n", b"\r", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"X: y\r\n", b": "),
    *(
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
    ),
    *(b"Expect: 100-continue\r\n", b"hello", b"5\r\nhello\r\n", b"0\r\n\r\n", b"0\r\n", b"\0", b"\xff"),
    *(b"ffffffff\r\n", b"-1\r\n", *WHOLE),
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Valid requests in a row, with some bytes changed, lost or added."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(WHOLE), min_size=1, max_size=4))))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 3))] = draw(st.sampled_from(TOKENS) | st.binary(max_size=3))
    return bytes(data)


def split(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@contextlib.contextmanager
def served(loop_name: str) -> Iterator[Callable[[Callable[[Server], Awaitable[None]]], None]]:
    """A server that stays up from one example to the next."""
    with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
        stack = contextlib.AsyncExitStack()
        held = serving(max_body_bytes=1000, max_header_bytes=500)
        server = runner.run(stack.enter_async_context(held))

        def run(example: Callable[[Server], Awaitable[None]]) -> None:
            async def in_time() -> None:
                async with asyncio.timeout(10):
                    await example(server)
                    assert (await server.exchange(get("/alive")))[0].status == 200
                    assert not server.logged

            runner.run(in_time())

        try:
            yield run
        finally:
            runner.run(stack.aclose())


@pytest.mark.parametrize("loop_name", LOOPS)
def test_any_bytes_get_well_formed_replies_or_the_end(loop_name: str) -> None:
    with served(loop_name) as run:

        @settings(max_examples=150, deadline=None)
        @given(
            st.binary(max_size=400)
            | st.lists(st.sampled_from(TOKENS), max_size=20).map(b"".join)
            | mutated(),
            st.lists(st.integers(0, 2000), max_size=5),
        )
        def check(data: bytes, places: list[int]) -> None:
            async def example(server: Server) -> None:
                answers = await server.exchange(*split(data, places))
                assert {answer.status for answer in answers} <= {100, 200, 400, 413, 431, 501, 505}
                assert all(answer.status in (100, 200) for answer in answers[:-1])

            run(example)

        check()


@pytest.mark.parametrize("loop_name", LOOPS)
def test_replies_do_not_depend_on_how_the_bytes_were_cut(loop_name: str) -> None:
    with served(loop_name) as run:

        @settings(max_examples=100, deadline=None)
        @given(mutated(), st.lists(st.integers(0, 2000), min_size=1, max_size=8))
        def check(data: bytes, places: list[int]) -> None:
            async def example(server: Server) -> None:
                answers = [await server.exchange(data), await server.exchange(*split(data, places))]
                one, other = [
                    [(answer.status, answer.body) for answer in replies if answer.status != 100]
                    for replies in answers
                ]
                assert one == other

            run(example)

        check()


@on_each_loop
@pytest.mark.parametrize("request_", WHOLE, ids=range(len(WHOLE)))
async def test_a_request_cut_anywhere_gets_the_same_reply(request_: bytes) -> None:
    async with serving() as server:
        (expected,) = await server.exchange(request_)
        (bytewise,) = await server.exchange(*[bytes([byte]) for byte in request_])
        assert bytewise.body == expected.body
        client = await server.connect()
        for place in range(1, len(request_)):
            client.writer.write(request_[:place])
            await turns()
            assert (await client.ask(request_[place:])).body == expected.body
