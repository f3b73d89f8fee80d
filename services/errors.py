"""Errors of the serving side. Each carries the HTTP status a client sees and a message with the fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

__all__ = [
    "ArmFailed",
    "BadRequest",
    "Conflict",
    "MethodNotAllowed",
    "NotFound",
    "ServingError",
    "Unauthorized",
    "Unavailable",
]


class ServingError(Exception):
    """Base of the errors that become an HTTP reply."""

    status = 500
    headers: ClassVar[Mapping[str, str]] = {}


class BadRequest(ServingError):
    """The client sent something that can never be answered."""

    status = 400


class Unauthorized(ServingError):
    """A verb that changes a rollout came without the operators' token."""

    status = 401
    headers: ClassVar[Mapping[str, str]] = {"WWW-Authenticate": 'Bearer realm="trimtab"'}


class MethodNotAllowed(ServingError):
    """The path is known, the method is not for it."""

    status = 405

    def __init__(self, method: str, allowed: Sequence[str]) -> None:
        names = ", ".join(allowed)
        super().__init__(f"{method[:20]!r} is not for this path: use {names}")
        self.headers = {"Allow": names}  # type: ignore[misc]  # the base says what a class of errors carries


class NotFound(ServingError):
    """The id is not one this installation gave out."""

    status = 404


class Conflict(ServingError):
    """The request is valid, but not in the present state."""

    status = 409


class Unavailable(ServingError):
    """A part that this route needs is down or has too much to do; the client may try again."""

    status = 503
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}

    def __init__(self, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        if headers is not None:
            self.headers = headers  # type: ignore[misc]  # the base says what a class of errors carries


class ArmFailed(ServingError):
    """An arm raised, took too long, or answered with something that is not a prediction.

    `kind` becomes a metric label: `error`, `refused` (the input does not fit the model), `timeout`, `hurried` (the
    client's own time-out left too little time), `invalid` (its output), `breaker`, `overloaded`, `deadline`.
    """

    status = 503
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}

    def __init__(self, kind: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        if headers is not None:
            self.headers = headers  # type: ignore[misc]  # the base says what a class of errors carries
