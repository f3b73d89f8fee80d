"""ASGI middleware that keeps one client from hurting the others: body size, body type and requests in flight."""

from __future__ import annotations

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Limits"]

# Health and metrics must answer when everything else is refused.
_EXEMPT = frozenset({"/healthz", "/livez", "/readyz", "/metrics"})
# BentoML has parsers of its own for these, which answer a broken body with 500. Whatever else a body claims to be
# is read as JSON, so that a forgotten header does no harm.
_NOT_JSON = (b"multipart/", b"application/vnd.bentoml")
_MAX_LENGTH_DIGITS = 18


class Limits:
    """Refuse a body over `max_body_bytes` (413), one that is not JSON (415), and more than `max_in_flight` requests
    at once (503).

    The body is read here and handed on whole: at most the limit is ever held, and an application never sees a body
    that is too large or was cut off. Bodies that come in pieces have a limit of their own, of the same number: a
    client that sends them slowly can keep out others like it, but not requests that come at once.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_in_flight: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_in_flight = max_in_flight
        self._in_flight = 0
        self._in_pieces = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _EXEMPT:
            await self.app(scope, receive, send)
            return
        headers = scope["headers"]
        length = next((value for name, value in headers if name == b"content-length"), b"0")
        if not length.isdigit():
            await _reply(send, 400, "Content-Length is not a number of bytes")
            return
        if len(length) > _MAX_LENGTH_DIGITS or int(length) > self.max_body_bytes:
            await self._too_large(send)
            return
        if any(
            name == b"content-type" and value.strip().lower().startswith(_NOT_JSON) for name, value in headers
        ):
            await _reply(send, 415, "send JSON, with Content-Type: application/json")
            return
        message = await receive()
        if message.get("more_body", False) and self._in_pieces >= self.max_in_flight:
            await self._too_many(send)
            return
        body = await self._rest(message, receive)
        if body is None:
            await _reply(send, 400, "the connection was closed before the body was complete")
        elif len(body) > self.max_body_bytes:
            await self._too_large(send)
        elif self._in_flight >= self.max_in_flight:
            await self._too_many(send)
        else:
            self._in_flight += 1
            try:
                await self.app(_as_json(scope), _replayed(body, receive), send)
            finally:
                self._in_flight -= 1

    async def _rest(self, message: Message, receive: Receive) -> bytes | None:
        """The body that begins with `message`; its beginning when it is too large, None when the client hung up."""
        chunks: list[bytes] = []
        length = 0
        self._in_pieces += 1
        try:
            while message["type"] == "http.request":
                chunks.append(message.get("body", b""))
                length += len(chunks[-1])
                if not message.get("more_body", False) or length > self.max_body_bytes:
                    return b"".join(chunks)
                message = await receive()
            return None
        finally:
            self._in_pieces -= 1

    async def _too_many(self, send: Send) -> None:
        message = f"more than {self.max_in_flight} requests in flight in this worker; try again"
        await _reply(send, 503, message, retry_after=True)

    async def _too_large(self, send: Send) -> None:
        await _reply(send, 413, f"the body is over the limit of {self.max_body_bytes} bytes")


def _as_json(scope: Scope) -> Scope:
    """The request with the one content type that is read here; curl, for one, says that JSON is a form."""
    others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    return {**scope, "headers": [*others, (b"content-type", b"application/json")]}


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body in one piece, and after that what really comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


async def _reply(send: Send, status: int, message: str, *, retry_after: bool = False) -> None:
    body = orjson.dumps({"error": message})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if retry_after:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
