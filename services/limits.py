"""ASGI middleware that keeps one client from hurting the others: body size, body type and requests in flight."""

from __future__ import annotations

from contextlib import suppress

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Limits"]

# Health and metrics must answer when everything else is refused.
_EXEMPT = frozenset({"/healthz", "/livez", "/readyz", "/metrics"})
# BentoML has parsers of its own for these, which answer a broken body with 500. Whatever else a body claims to be
# is read as JSON, so that a forgotten header does no harm.
_NOT_JSON = (b"multipart/", b"application/vnd.bentoml")
_MAX_LENGTH_DIGITS = 18


class _TooLarge(Exception):
    pass


class Limits:
    """Refuse a body over `max_body_bytes` (413), one that is not JSON (415), and more than `max_in_flight` requests
    at once (503).

    A body without a Content-Length is counted as it arrives; at most the limit is ever held.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_in_flight: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_in_flight = max_in_flight
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _EXEMPT:
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            await _reply(send, 400, "Content-Length is not a number of bytes")
            return
        if len(length) > _MAX_LENGTH_DIGITS or int(length) > self.max_body_bytes:
            await self._too_large(send)
            return
        if headers.get(b"content-type", b"").strip().lower().startswith(_NOT_JSON):
            await _reply(send, 415, "send JSON, with Content-Type: application/json")
            return
        if self._in_flight >= self.max_in_flight:
            message = f"more than {self.max_in_flight} requests in flight in this worker; try again"
            await _reply(send, 503, message, retry_after=True)
            return
        self._in_flight += 1
        try:
            await self._limited(scope, receive, send)
        finally:
            self._in_flight -= 1

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0
        started = overflow = False

        async def counted_receive() -> Message:
            nonlocal received, overflow
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                overflow = True
                raise _TooLarge
            return message

        async def watched_send(message: Message) -> None:
            nonlocal started
            if overflow:
                return  # whatever the application says about the error we raised, the reply is ours
            started = True
            await send(message)

        with suppress(_TooLarge):
            await self.app(scope, counted_receive, watched_send)
        if overflow and not started:
            await self._too_large(send)

    async def _too_large(self, send: Send) -> None:
        await _reply(send, 413, f"the body is over the limit of {self.max_body_bytes} bytes")


async def _reply(send: Send, status: int, message: str, *, retry_after: bool = False) -> None:
    body = orjson.dumps({"error": message})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if retry_after:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
