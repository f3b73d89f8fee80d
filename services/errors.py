"""Errors of the serving side. Each carries the HTTP status a client sees and a message with the fix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

__all__ = ["ArmFailed", "BadRequest", "Conflict", "NotFound", "ServingError", "Unauthorized", "Unavailable"]


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


class NotFound(ServingError):
    """The id is not one this installation gave out."""

    status = 404


class Conflict(ServingError):
    """The request is valid, but not in the present state."""

    status = 409


class Unavailable(ServingError):
    """A part that this route needs is down; the client may try again."""

    status = 503
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}


class ArmFailed(ServingError):
    """An arm raised, took too long, or answered with something that is not a prediction.

    `kind` is one of `error`, `refused` (ONNX Runtime says that the input does not fit the model), `timeout`, `invalid`,
    `breaker`, `overloaded`: it becomes a metric label.
    """

    status = 503
    headers: ClassVar[Mapping[str, str]] = {"Retry-After": "1"}

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
