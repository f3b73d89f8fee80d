"""One HTTP request and its reply, as the data plane sees them, whichever door they came through."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from services.errors import ServingError

__all__ = ["JSON", "Handler", "Reply", "Request", "answer_headers", "error_reply"]

JSON = b"application/json"


@dataclass(slots=True)
class Request:
    """A request whose body has arrived whole.

    Attributes:
        method: upper case.
        path: percent-decoded, without the query.
        headers: lower-case names; of a repeated header the last one.
        body: at most the limit of the door it came through.
    """

    method: str
    path: str
    headers: Mapping[bytes, bytes]
    body: bytes


@dataclass(slots=True)
class Reply:
    """What goes back.

    Attributes:
        headers: besides Content-Type and Content-Length.
        after: called once the reply is on its way; what it takes nobody waits for.
    """

    status: int
    body: bytes
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()
    after: Callable[[], None] | None = None


Handler = Callable[[Request], "Reply | Coroutine[Any, Any, Reply]"]
"""Answers at once where it can; a coroutine is for what has to wait. It raises nothing."""


def answer_headers(request_id: str, variant: str, arm: str) -> tuple[tuple[bytes, bytes], ...]:
    """What every reply with an answer says of it."""
    return (
        (b"x-request-id", request_id.encode()),
        (b"x-trimtab-variant", variant.encode()),
        (b"x-trimtab-arm", arm.encode()),
    )


def error_reply(error: ServingError) -> Reply:
    """`{"error": "one line"}` with the error's status and headers."""
    headers = tuple((name.lower().encode(), value.encode()) for name, value in error.headers.items())
    return Reply(error.status, orjson.dumps({"error": str(error)}), headers=headers)
