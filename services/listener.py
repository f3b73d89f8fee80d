"""The data plane's own HTTP/1.1 server: from bytes to handler to bytes within one callback of the event loop.

A connection takes one request at a time. What follows it on the wire stays bytes until its reply is written: replies
keep their order, and a client cannot make this process hold more than one read of what it sent ahead. The parser is
given a head, or a piece of a body, and never a byte of what comes after: where a request ends is decided in one place.
Framing that two servers could read in two ways is refused, and the connection closed.

One timer looks after all time-outs. None is early, and none is later than two of its intervals.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import unquote_to_bytes

import httptools

from services.errors import BadRequest, ServingError, Unavailable
from services.http import Handler, Reply, Request, error_reply

__all__ = ["Listener", "ListenerLimits"]

log = logging.getLogger("trimtab.listener")

# What a connection is doing. From _ANSWERING on it takes no request.
_NEW, _IDLE, _HEAD, _BODY, _ANSWERING, _SURPLUS, _CLOSING = range(7)

_BACKLOG = 2048
# So many steps (a head, or a piece of a body) of what one client sent ahead are taken before others have their turn.
_TURN = 32
_END = b"\r\n\r\n"
# Not one that goes on in the next line: what is left of it would become part of the header before.
_H2C = re.compile(rb"\r\nupgrade:[ \t]*h2c[ \t]*(?=\r\n[^ \t])", re.IGNORECASE)
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}".encode() for status in HTTPStatus}
_WITHOUT_BODY = frozenset((204, 304))
_NOT_TWICE = frozenset((b"host", b"transfer-encoding"))
_STOPPED = Reply(503, b"")
_BUSY = error_reply(Unavailable("too many requests in flight; try again"))


@dataclass(frozen=True, slots=True)
class ListenerLimits:
    """What a listener takes from its clients. Sizes in bytes, times in seconds.

    Attributes:
        max_body_bytes: of one request; 413 beyond.
        max_header_bytes: request line and headers together, as sent; 431 beyond. A chunked body may have as much, in a
            row, that is not content.
        max_connections: more are answered 503 and closed; once there are twice as many, closed without an answer.
        max_in_flight: coroutines that run for requests; 503 beyond.
        max_bodies_bytes: of all bodies that are still arriving, or whose coroutine has not ended; a body that does not
            fit gets 503. Besides these a connection holds at most one read (256 KiB) of what was sent ahead.
        header_timeout_s: from the opening of a connection, or the first byte of a later request, to the end of the
            headers; then 408.
        body_timeout_s: from the headers to the end of the body; then 408.
        idle_timeout_s: between two requests; then closed, and without a reply, for there is no request.
        write_timeout_s: for a client that does not read its replies; then cut off.
        linger_s: how long what a refused client still sends is read and dropped. Closing earlier could reset the
            connection before the client has seen the reply.
        linger_bytes: how much of it.
    """

    max_body_bytes: int = 16 << 20
    max_header_bytes: int = 16 << 10
    max_connections: int = 1024
    max_in_flight: int = 1024
    max_bodies_bytes: int = 256 << 20
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 75.0
    write_timeout_s: float = 30.0
    linger_s: float = 5.0
    linger_bytes: int = 16 << 20


class Listener:
    """An HTTP/1.1 server on one socket, in one event loop.

    Args:
        handler: called with each request once its body has arrived. A coroutine it returns becomes a task, or is
            closed without having run when too many are in flight, so it must hold nothing before its first step. It
            runs to its end, and its reply's `after` is called, even if the client has gone. Should the handler raise,
            that is logged and answered 500.
        limits: see there.
        on_refused: called with the status of each reply that did not come from the handler's answer to a request.
        sweep_s: interval, in seconds, of the timer that looks for time-outs.
    """

    def __init__(
        self,
        handler: Handler,
        limits: ListenerLimits,
        *,
        on_refused: Callable[[int], None] = lambda _: None,
        sweep_s: float = 1.0,
    ) -> None:
        self._shared = _Shared(handler, limits, on_refused, sweep_s)
        self._server: asyncio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._port = 0

    @property
    def port(self) -> int:
        """Where it listens, once started."""
        return self._port

    @property
    def connections(self) -> int:
        """Open connections, including those being refused."""
        return len(self._shared.connections)

    @property
    def in_flight(self) -> int:
        """Requests whose coroutine has not ended, including those whose client has gone."""
        return len(self._shared.tasks)

    async def start(self, host: str, port: int, *, reuse_port: bool, ssl: ssl.SSLContext | None) -> None:
        """Begin to accept connections.

        Args:
            host: an address or a name; of a name's addresses the first.
            port: 0 for any that is free.
            reuse_port: let other processes listen on the same port; the kernel deals out the connections.
            ssl: None for plain HTTP.

        Raises:
            OSError: the address cannot be had.
            RuntimeError: it was started before.
        """
        if self._server is not None:
            raise RuntimeError("this listener was started before; make another one")
        shared = self._shared
        shared.loop = loop = asyncio.get_running_loop()
        shared.tls = ssl is not None
        shared.read_clock()
        sock = await _listening_socket(host, port, reuse_port)
        self._port = sock.getsockname()[1]
        limits = shared.limits
        self._server = await loop.create_server(
            lambda: _Connection(shared),
            sock=sock,
            ssl=ssl,
            backlog=_BACKLOG,
            ssl_handshake_timeout=limits.header_timeout_s if ssl else None,
            ssl_shutdown_timeout=limits.linger_s if ssl else None,
        )
        self._timer = loop.call_later(shared.sweep_s, self._sweep)

    async def stop(self, grace_s: float) -> None:
        """Accept no more, answer within `grace_s` seconds what has begun to arrive, then cut off the rest."""
        if self._server is None or self._timer is None:
            return
        shared = self._shared
        await asyncio.sleep(0)  # connections that wait to be accepted would be reset
        self._server.close()
        for _ in range(2):  # the loop looks for bytes once; what has reached this machine is to be answered
            await asyncio.sleep(0)
        shared.stopping = True
        for connection in list(shared.connections):
            connection.wind_up()
        await shared.wait_until_gone(grace_s)
        for connection in list(shared.connections):
            connection.cut_off()
        for task in list(shared.tasks):
            task.cancel()
        await shared.wait_until_gone(1.0)
        self._timer.cancel()
        self._timer = None

    def _sweep(self) -> None:
        shared = self._shared
        self._timer = shared.loop.call_later(shared.sweep_s, self._sweep)
        now = shared.read_clock()
        late = [one for one in shared.connections if one.deadline < now or one.write_deadline < now]
        for connection in late:
            connection.expire(now)


class _Shared:
    """What the connections of a listener have in common."""

    loop: asyncio.AbstractEventLoop

    def __init__(
        self, handler: Handler, limits: ListenerLimits, on_refused: Callable[[int], None], sweep_s: float
    ) -> None:
        self.handler = handler
        self.limits = limits
        self.on_refused = on_refused
        self.sweep_s = sweep_s
        self.tls = False
        self.stopping = False
        self.gone = asyncio.Event()
        self.connections: set[_Connection] = set()
        self.admitted = 0
        self.tasks: set[asyncio.Task[Reply]] = set()
        self.bodies_bytes = 0
        self.clock = 0.0
        self.read_at = -math.inf
        self.header_at = self.body_at = self.idle_at = self.write_at = self.linger_at = 0.0
        self.date = b""

    def read_clock(self) -> float:
        """Work out, once for all requests until the next time, their deadlines and the Date header.

        While the loop was held up it did not read what clients sent; that time is not held against them.
        """
        now = self.loop.time()
        self.clock += min(now - self.read_at, 2 * self.sweep_s)
        self.read_at = now
        limits = self.limits
        latest = self.clock + self.sweep_s  # when something that uses these deadlines may begin
        self.header_at = latest + limits.header_timeout_s
        self.body_at = latest + limits.body_timeout_s
        self.idle_at = latest + limits.idle_timeout_s
        self.write_at = latest + limits.write_timeout_s
        self.linger_at = latest + limits.linger_s
        self.date = b"\r\ndate: " + formatdate(usegmt=True).encode() + _END
        return self.clock

    def check_gone(self) -> None:
        if self.stopping and not self.connections and not self.tasks:
            self.gone.set()

    async def wait_until_gone(self, seconds: float) -> None:
        self.check_gone()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.gone.wait(), seconds)


class _Refusal(ServingError):
    """A request that the handler will not see."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Connection(asyncio.Protocol):
    """One client.

    Attributes:
        doing: one of the constants at the top of this module.
        deadline: when `expire` is due, unless something else happens first.
        write_deadline: the same while the client does not read.
        rest: bytes that came and are not taken yet.
        waiting: what comes now goes into `rest`: a coroutine runs, the client does not read, or others have their turn.
        full: the transport's buffer is.
        complete: the parser has seen the end of the request.
        old: the client speaks HTTP/1.0.
        bare: the reply goes without its body (HEAD).
        left: bytes of the body still to come; -1 when it is chunked.
        silent: bytes of a chunked body since the last that was content.
        held: bytes of the body as counted in `_Shared.bodies_bytes`.
        dropped: bytes read after the connection was given up.
    """

    transport: asyncio.Transport

    def __init__(self, shared: _Shared) -> None:
        self.shared = shared
        self.parser = httptools.HttpRequestParser(self)
        self.doing = _NEW
        self.deadline = math.inf
        self.write_deadline = math.inf
        self.rest = self.url = b""
        self.path = ""
        self.headers: dict[bytes, bytes] = {}
        self.request_headers = self.headers
        self.body: bytes | bytearray = b""
        self.surplus = self.waiting = self.full = self.paused = self.eof = False
        self.complete = self.keep_alive = self.old = self.bare = self.repeated = False
        self.left = self.silent = self.held = self.dropped = 0

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        shared = self.shared
        most = shared.limits.max_connections
        shared.connections.add(self)
        if shared.admitted < most:
            shared.admitted += 1
            self.deadline = shared.header_at
            if shared.stopping:
                self.close()
            return
        self.surplus = True
        if len(shared.connections) > 2 * most:
            self.cut_off()
        else:  # answered once it sends something: clients may take a reply to nothing for noise
            self.doing = _SURPLUS
            self.deadline = shared.linger_at

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        shared = self.shared
        shared.connections.discard(self)
        if not self.surplus:
            shared.admitted -= 1
        if self.doing != _ANSWERING:
            self.release()
        self.doing = _CLOSING
        self.rest = b""
        del self.parser  # it refers back to this object
        shared.check_gone()

    def data_received(self, data: bytes) -> None:
        if self.waiting or self.doing >= _ANSWERING:
            self.set_aside(data)
        elif self.rest:
            data = self.rest + data
            self.rest = b""
            self.advance(data)
        else:
            self.advance(data)

    def eof_received(self) -> bool:
        self.eof = True
        if self.doing == _ANSWERING:
            return not self.shared.tls  # the client may still read; a TLS connection cannot be half closed
        self.close()
        return False

    def pause_writing(self) -> None:
        self.full = self.waiting = True
        self.write_deadline = self.shared.write_at

    def resume_writing(self) -> None:
        self.full = False
        self.write_deadline = math.inf
        self.go_on()

    # What the parser calls.

    def on_url(self, url: bytes) -> None:
        if self.complete:
            raise ValueError("a second request where only one was looked for")
        self.url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        headers = self.headers
        if name in headers and name in _NOT_TWICE:
            self.repeated = True
        headers[name] = value

    def on_body(self, piece: bytes) -> None:
        body = self.body
        if not body:
            self.body = piece
        elif isinstance(body, bytearray):
            body += piece
        else:
            self.body = bytearray(body)
            self.body += piece

    def on_message_complete(self) -> None:
        self.complete = True
        self.keep_alive = self.parser.should_keep_alive()

    # What the listener calls.

    def expire(self, now: float) -> None:
        """A deadline has passed."""
        limits = self.shared.limits
        if self.write_deadline < now or self.doing == _CLOSING:
            self.cut_off()
        elif self.waiting:
            pass  # the client may have sent everything; it is this side that does not read
        elif self.doing == _IDLE:
            self.close()
        elif self.doing == _SURPLUS:
            self.refuse(Unavailable("too many connections; try again"))
        elif self.doing == _BODY:
            self.refuse(_Refusal(408, f"the body did not arrive within {limits.body_timeout_s:g} s"))
        else:
            self.refuse(_Refusal(408, f"the headers did not arrive within {limits.header_timeout_s:g} s"))

    def wind_up(self) -> None:
        """Close if there is no request; otherwise its reply will say that it is the last."""
        if self.doing == _SURPLUS:
            self.refuse(Unavailable("this worker is stopping; try again"))
        elif self.doing in (_NEW, _IDLE) and not self.rest:
            self.close()

    def cut_off(self) -> None:
        """Close without sending what was not sent."""
        if self.doing != _ANSWERING:
            self.doing = _CLOSING
        self.deadline = self.write_deadline = math.inf
        self.transport.abort()

    # Bytes in.

    def set_aside(self, data: bytes) -> None:
        """Bytes came while no request can be taken: keep or drop them."""
        if self.doing == _CLOSING:
            self.dropped += len(data)
            if self.dropped > self.shared.limits.linger_bytes:
                self.cut_off()
        elif self.doing == _SURPLUS:
            self.refuse(Unavailable("too many connections; try again"))
        else:
            self.keep(self.rest + data)

    def keep(self, rest: bytes) -> None:
        """Take these bytes up later, and read no more until then."""
        self.rest = rest
        self.waiting = True
        if not self.paused:
            self.paused = True
            self.transport.pause_reading()

    def go_on(self) -> None:
        """Take up what was kept, if nothing is in the way of it any more."""
        if self.doing >= _ANSWERING or self.full:
            return
        self.waiting = False
        data = self.rest
        if data:
            self.rest = b""
            self.advance(data)
            if self.waiting or self.doing >= _ANSWERING:
                return
        if self.eof:
            self.close()
        elif self.paused:
            self.paused = False
            self.transport.resume_reading()

    def advance(self, data: bytes) -> None:
        """Answer the requests in `data`, in order, as far as they go, and keep the rest."""
        position = 0
        size = len(data)
        turn = _TURN
        while position < size:
            try:
                take = self.take_body if self.doing == _BODY else self.take_head
                position = take(data, position)
            except ServingError as error:
                self.refuse(error)
                return
            except httptools.HttpParserError as error:
                self.refuse(BadRequest(f"malformed request: {error}"))
                return
            except httptools.HttpParserUpgrade:
                self.refuse(_Refusal(501, "CONNECT and upgrades are not served here"))
                return
            if self.complete:
                self.answer(position < size)
            turn -= 1
            if turn and self.doing < _ANSWERING and not self.full:
                continue
            if self.doing <= _ANSWERING and position < size:
                self.keep(data[position:])
                if not turn:
                    self.shared.loop.call_soon(self.go_on)
            return

    def take_head(self, data: bytes, position: int) -> int:
        """Parse the request line and headers at `position`, and return where they end."""
        end = data.find(_END, position) + 4
        if end < 4 or not 65 <= data[position] <= 90:
            return self.take_part_of_head(data, position)
        most = self.shared.limits.max_header_bytes
        if end - position > most:
            raise _Refusal(431, f"the request line and headers are larger than {most} bytes")
        head = data[position:end]
        if b"h2c" in head:
            # Java's own client offers HTTP/2 with its first request; a server may take no notice (RFC 9110, 7.8).
            head = _H2C.sub(b"", head)
        self.parser.feed_data(head)
        headers = self.request_headers = self.headers
        self.headers = {}
        line_end = head.find(b"\r\n")
        version = head[line_end - 8 : line_end]
        self.old = version == b"HTTP/1.0"
        if version != b"HTTP/1.1" and not self.old:
            raise _Refusal(505, "speak HTTP/1.1 or HTTP/1.0")
        if self.repeated or not (self.old or b"host" in headers):
            raise BadRequest("send one Host header, and Transfer-Encoding at most once")
        self.path = _path(self.url)
        if not self.complete:
            self.expect_body(headers, end == len(data))
        return end

    def take_part_of_head(self, data: bytes, position: int) -> int:
        """The same where there is no whole head, or no head."""
        part = data[position:]
        request = part.lstrip(b"\r\n")  # some old clients send a blank line after a body
        if len(request) < len(part):
            return len(data) - len(request)
        if not part[:1].isupper():
            raise BadRequest("this is not HTTP/1.1; speak TLS only where the server was given a certificate")
        most = self.shared.limits.max_header_bytes
        if len(part) > most:
            raise _Refusal(431, f"the request line and headers are larger than {most} bytes")
        if self.doing == _IDLE:
            self.deadline = self.shared.header_at
        self.doing = _HEAD
        self.rest = part
        return len(data)

    def expect_body(self, headers: dict[bytes, bytes], nothing_yet: bool) -> None:
        """Prepare for the body that these headers announce."""
        shared = self.shared
        limits = shared.limits
        length = headers.get(b"content-length")
        if length is not None:
            if len(length) > 32:
                raise BadRequest("Content-Length has too many digits")
            self.left = int(length)
            if self.left > limits.max_body_bytes:
                raise _Refusal(413, f"the body is larger than {limits.max_body_bytes} bytes")
        else:
            if self.old:
                raise BadRequest("HTTP/1.0 has no chunked bodies; send Content-Length")
            if headers.get(b"transfer-encoding", b"").strip().lower() != b"chunked":
                raise _Refusal(501, "the only Transfer-Encoding understood is chunked")
            self.left = -1
            self.silent = 0
        if shared.bodies_bytes + self.left > limits.max_bodies_bytes:
            raise Unavailable("too many large requests are arriving; try again")
        self.doing = _BODY
        self.deadline = shared.body_at
        if nothing_yet and not self.old and headers.get(b"expect", b"").strip().lower() == b"100-continue":
            self.transport.write(_CONTINUE)

    def take_body(self, data: bytes, position: int) -> int:
        """Parse a piece of the body at `position`, and return where the piece ends."""
        if self.left < 0:
            return self.take_chunked(data, position)
        piece = data[position : position + self.left]
        self.left -= len(piece)
        self.parser.feed_data(piece)
        if not self.complete:
            self.hold()
        return position + len(piece)

    def take_chunked(self, data: bytes, position: int) -> int:
        """The same for a chunked body. Only an empty line ends one, so a piece goes no further than the next."""
        end = data.find(_END, position) + 4
        if end < 4:
            end = len(data) - _begun(data[max(position, len(data) - 3) :])
            self.rest = data[end:]
        if end == position:
            return len(data)
        before = len(self.body)
        self.parser.feed_data(data[position:end])
        size = len(self.body)
        limits = self.shared.limits
        if size > limits.max_body_bytes:
            raise _Refusal(413, f"the body is larger than {limits.max_body_bytes} bytes")
        self.silent = 0 if size > before else self.silent + end - position
        if self.silent > limits.max_header_bytes:
            raise _Refusal(431, f"more than {limits.max_header_bytes} bytes without content")
        if self.complete:
            self.headers = {}  # the trailers: not part of any request
            self.repeated = False
            return end
        self.hold()
        return end + len(self.rest)

    def hold(self) -> None:
        """Count the part of the body that is there."""
        shared = self.shared
        size = len(self.body)
        shared.bodies_bytes += size - self.held
        self.held = size
        if shared.bodies_bytes > shared.limits.max_bodies_bytes:
            raise Unavailable("too many large requests are arriving; try again")

    def release(self) -> None:
        self.shared.bodies_bytes -= self.held
        self.held = 0

    # Replies out.

    def answer(self, more: bool) -> None:
        """Hand the request over, and write the reply if that is what comes back."""
        shared = self.shared
        self.complete = False
        method = self.parser.get_method().decode()
        self.bare = method == "HEAD"
        request = Request(method, self.path, self.request_headers, bytes(self.body))
        self.body = b""
        try:
            result = shared.handler(request)
        except Exception as error:  # noqa: BLE001  # it should raise nothing; what it does is answered all the same
            result = _failed(error)
        if isinstance(result, Reply):
            if self.held:
                self.release()
            self.reply(result, more)
        elif not asyncio.iscoroutine(result):
            self.release()
            self.reply(_failed(TypeError(f"it returned {type(result).__name__}, not a Reply")), more)
        elif len(shared.tasks) >= shared.limits.max_in_flight:
            result.close()
            self.release()
            _call(shared.on_refused, _BUSY.status)
            self.reply(_BUSY, more)
        else:
            self.doing = _ANSWERING
            self.deadline = math.inf
            shared.bodies_bytes += len(request.body) - self.held
            self.held = len(request.body)
            task = shared.loop.create_task(result)
            shared.tasks.add(task)
            task.add_done_callback(self.answered)

    def answered(self, task: asyncio.Task[Reply]) -> None:
        """The coroutine of this request has ended."""
        shared = self.shared
        shared.tasks.discard(task)
        self.release()
        gone = self.doing != _ANSWERING or self.transport.is_closing()
        if task.cancelled():
            reply = _STOPPED if gone else _failed(RuntimeError("the handler's coroutine was cancelled"))
        else:
            error = task.exception()
            reply = task.result() if error is None else _failed(error)
            if not isinstance(reply, Reply):
                reply = _failed(TypeError(f"its coroutine returned {type(reply).__name__}, not a Reply"))
        if not gone:
            self.reply(reply, bool(self.rest))
            self.go_on()
            return
        if reply.after is not None:
            shared.loop.call_soon(_call, reply.after)
        shared.check_gone()

    def reply(self, reply: Reply, more: bool) -> None:
        """Write it; then wait for the next request, or close. `more` says that the client has sent more already."""
        shared = self.shared
        status = reply.status
        body = reply.body
        extra = b"".join([b"\r\n%b: %b" % header for header in reply.headers]) if reply.headers else b""
        keep_alive = self.keep_alive and not shared.stopping
        if not keep_alive:
            extra += b"\r\nconnection: close"
        elif self.old:
            extra += b"\r\nconnection: keep-alive"
        line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d " % status
        if status in _WITHOUT_BODY:
            self.transport.write(line + extra + shared.date)
        else:
            length = b"\r\ncontent-length: %d" % len(body)
            body = b"" if self.bare else body
            parts = (line, b"\r\ncontent-type: ", reply.content_type, length, extra, shared.date, body)
            self.transport.write(b"".join(parts))
        if reply.after is not None:
            # uvloop sends at the end of its turn what is written in it, so what nobody waits for is done in the next.
            shared.loop.call_soon(_call, reply.after)
        if keep_alive and not (more and self.transport.is_closing()):
            self.doing = _IDLE
            self.deadline = shared.idle_at
        else:
            self.close(linger=more)

    def refuse(self, error: ServingError) -> None:
        """Reply in the handler's place, and close."""
        _call(self.shared.on_refused, error.status)
        self.keep_alive = self.bare = False
        if not self.transport.is_closing():
            self.reply(error_reply(error), more=True)

    def close(self, linger: bool = False) -> None:
        """Close when everything is sent, and, with `linger`, when the client has seen it and closed, or time is up."""
        shared = self.shared
        self.doing = _CLOSING
        self.rest = self.body = b""
        self.release()
        if not linger:
            self.deadline = shared.write_at
            self.transport.close()
            return
        self.deadline = shared.write_at if self.full else shared.linger_at
        if self.transport.can_write_eof():
            with contextlib.suppress(OSError):  # the client has gone; `connection_lost` is on its way
                self.transport.write_eof()
        if self.paused:
            self.paused = False
            self.transport.resume_reading()


def _path(target: bytes) -> str:
    """The path of a request target, percent-decoded, without the query."""
    if target[0] != 47 and target != b"*":
        try:
            target = httptools.parse_url(target).path or b"/"
        except httptools.HttpParserInvalidURLError:
            raise BadRequest("the request target is neither a path nor a URL") from None
    if b"?" in target:
        target = target[: target.index(b"?")]
    if b"%" in target:
        target = unquote_to_bytes(target)
    return target.decode("utf-8", "replace")


def _begun(data: bytes) -> int:
    """How many bytes at the end of `data` may be the beginning of an empty line."""
    return next((size for size in (3, 2, 1) if data.endswith(_END[:size])), 0)


def _failed(error: BaseException) -> Reply:
    log.error("the handler failed: %r", error, exc_info=error)
    return Reply(500, b'{"error": "internal error"}')


def _call(function: Callable[..., object], *arguments: Any) -> None:
    """Call something of the handler's whose failure must not become a connection's."""
    try:
        function(*arguments)
    except Exception as error:  # noqa: BLE001
        _failed(error)


async def _listening_socket(host: str, port: int, reuse_port: bool) -> socket.socket:
    loop = asyncio.get_running_loop()
    sock = None
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise OSError(
            error.errno,
            f"cannot listen on {host} port {port} ({error.strerror}); choose another address or port",
        ) from error
    return sock
