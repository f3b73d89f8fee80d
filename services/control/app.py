"""The gateway's control routes: feedback, rollouts and alerts from outside. Everything here may wait for the
ledger, so it runs in threads, away from the predictions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import bentoml
import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from compression.errors import CompressionError
from monitoring.errors import LedgerUnavailable, TrimtabError
from monitoring.rows import LabelRow, RewardRow
from services.control import labels as label_routes
from services.control import rollouts
from services.control.auth import check_token
from services.errors import BadRequest, ServingError, Unavailable

__all__ = ["make_app"]

MAX_FEEDBACK_ITEMS = 1000
Handler = Callable[[Any, Request], Awaitable[tuple[int, Any]]]
M = TypeVar("M", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FeedbackItem(_Strict):
    """The true class of one record of one request, by name or index; or what the whole request was worth to its user.

    Which of the two it is follows from what was given: `label` or `reward`.
    """

    request_id: StrictStr = Field(min_length=1, max_length=200)
    index: StrictInt = Field(default=0, ge=0)
    label: StrictStr | StrictInt = 0
    correction: StrictBool = False
    reward: float = Field(default=0.0, ge=0, le=1, strict=True, allow_inf_nan=False)

    @field_validator("label", mode="before")
    @classmethod
    def _name_or_index(cls, label: object) -> object:
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            raise ValueError("give a class name or index")
        return label

    @model_validator(mode="after")
    def _one_of_both(self) -> FeedbackItem:
        given = self.model_fields_set
        if ("label" in given) == ("reward" in given):
            raise ValueError("give either a label or a reward")
        if self.rewards and not given <= {"request_id", "reward"}:
            raise ValueError("a reward is for a whole request: leave index and correction out")
        return self

    @property
    def rewards(self) -> bool:
        """Whether it is a reward."""
        return "reward" in self.model_fields_set


class Feedback(_Strict):
    feedback: list[FeedbackItem] = Field(min_length=1, max_length=MAX_FEEDBACK_ITEMS)


class Start(_Strict):
    """Ask for a rollout. `override` is the reason for starting although the gate refused the variant."""

    variant: StrictStr = Field(min_length=1, max_length=200)
    override: StrictStr | None = Field(default=None, min_length=1, max_length=500)
    policy: dict[str, Any] = Field(default_factory=dict)
    actor: StrictStr = Field(default="operator", min_length=1, max_length=100)


class Verb(_Strict):
    reason: StrictStr = Field(default="", max_length=500)
    actor: StrictStr = Field(default="operator", min_length=1, max_length=100)
    full: bool = False


def make_app() -> Starlette:
    """The Starlette app that BentoML mounts beside `/predict`."""
    return Starlette(
        routes=[
            Route("/feedback", _handled(_feedback), methods=["POST"]),
            Route("/rollouts", _handled(_start), methods=["POST"]),
            Route("/rollouts", _handled(_list), methods=["GET"]),
            Route("/rollouts/verify", _handled(_verify), methods=["GET"]),  # no rollout has this id
            Route("/rollouts/{rollout_id}", _handled(_status), methods=["GET"]),
            Route("/rollouts/{rollout_id}/decisions", _handled(_decisions), methods=["GET"]),
            Route("/rollouts/{rollout_id}/label-queue", _handled(label_routes.label_queue), methods=["GET"]),
            Route("/rollouts/{rollout_id}/{verb}", _handled(_verb), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _refused},
    )


async def _refused(_: Request, error: Exception) -> Response:
    """What Starlette refuses by itself, such as a method that a route does not have, in the form of other errors."""
    assert isinstance(error, HTTPException)
    content = orjson.dumps({"error": error.detail})
    return Response(content, error.status_code, error.headers, media_type="application/json")


async def _feedback(gateway: Any, request: Request) -> tuple[int, Any]:
    try:
        body = await _body(request, Feedback)
        labels, rewards = _rows(gateway, body.feedback, time.time())
    except ServingError:
        gateway.count_rejected_feedback()
        raise
    result = await asyncio.to_thread(lambda: gateway.state.ledger.record_feedback(labels, rewards))
    gateway.count_feedback(result)
    return 200, asdict(result)


def _rows(gateway: Any, items: Sequence[FeedbackItem], now: float) -> tuple[list[LabelRow], list[RewardRow]]:
    """Feedback as the ledger stores it; raises a ServingError where any of it is wrong."""
    labels: list[LabelRow] = []
    rewards: list[RewardRow] = []
    for item in items:
        gateway.request_ids.check(item.request_id)
        if item.rewards:
            rewards.append(RewardRow(item.request_id, item.reward, now))
        else:
            row = rollouts.label_row(gateway.workload, item.request_id, item.index, item.label, now)
            labels.append(replace(row, correction=item.correction))
    return labels, rewards


async def _start(gateway: Any, request: Request) -> tuple[int, Any]:
    check_token(request.headers.get("authorization"), gateway.token)
    body = await _body(request, Start)
    return 201, await asyncio.to_thread(
        rollouts.start,
        gateway.state.ledger,
        gateway.workload,
        body.variant,
        policy=body.policy,
        override=body.override,
        actor=body.actor,
        now=time.time(),
    )


async def _list(gateway: Any, _: Request) -> tuple[int, Any]:
    return 200, {"rollouts": await asyncio.to_thread(rollouts.listing, gateway.state.ledger)}


async def _verify(gateway: Any, request: Request) -> tuple[int, Any]:
    expect = request.query_params.get("expect")
    return 200, await asyncio.to_thread(rollouts.verify, gateway.state.ledger, expect)


async def _status(gateway: Any, request: Request) -> tuple[int, Any]:
    rollout_id = request.path_params["rollout_id"]
    return 200, await asyncio.to_thread(rollouts.status, gateway.state.ledger, rollout_id, time.time())


async def _decisions(gateway: Any, request: Request) -> tuple[int, Any]:
    rollout_id = request.path_params["rollout_id"]
    return 200, {"decisions": await asyncio.to_thread(rollouts.history, gateway.state.ledger, rollout_id)}


async def _verb(gateway: Any, request: Request) -> tuple[int, Any]:
    check_token(request.headers.get("authorization"), gateway.token)
    body = await _body(request, Verb)
    return 200, await asyncio.to_thread(
        rollouts.command,
        gateway.state.ledger,
        request.path_params["rollout_id"],
        request.path_params["verb"],
        full=body.full,
        actor=body.actor,
        reason=body.reason,
        now=time.time(),
    )


async def _body(request: Request, model: type[M]) -> M:
    content = await request.body()
    try:
        return model.model_validate(orjson.loads(content or b"{}"))
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        told = first["msg"].removeprefix("Value error, ").replace(" after validation", "")
        if first["type"] == "model_type":
            told = "must be an object"
        raise BadRequest(f"{where or 'body'}: {told}") from error


def _handled(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """Turn a handler's result into JSON, and the errors of every layer into a status and one line."""

    async def endpoint(request: Request) -> Response:
        try:
            status, content = await handler(bentoml.get_current_service(), request)
        except LedgerUnavailable as error:
            return _error(Unavailable(f"the ledger is not available, nothing was stored: {error}"))
        except ServingError as error:
            return _error(error)
        except (CompressionError, TrimtabError) as error:
            return _error(BadRequest(str(error)))
        return Response(orjson.dumps(content, default=str), status, media_type="application/json")

    return endpoint


def _error(error: ServingError) -> Response:
    return Response(
        orjson.dumps({"error": str(error)}), error.status, error.headers, media_type="application/json"
    )
