"""The routes of the data plane, `/predict` and `/v2`, and their door on BentoML's port.

Both doors, this one and `services/listener.py`, lead to `DataPlane.handle`: same code, same answers, same metrics.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from compression.workload import InvalidRecord
from services.control.auth import bears
from services.errors import BadRequest, MethodNotAllowed, NotFound, ServingError, Unauthorized
from services.http import Reply, Request, answer_headers, error_reply

if TYPE_CHECKING:
    from services.engine import Engine, Served
    from services.protocol import OpenInference

log = logging.getLogger("trimtab.gateway")

__all__ = ["DataPlane", "Door"]

_PREDICT = "/predict"
_ROOTS = (_PREDICT, "/v2")
# The body's fault, whichever part of it: counted as requests that were not valid.
_NOT_VALID = (400, 413, 415)
_OPEN_TO_ALL = ("/v2/health/live", "/v2/health/ready")


class DataPlane:
    """Finds the handler of a request.

    Args:
        api_key: what clients must show to get predictions; None for everybody.
    """

    def __init__(self, engine: Engine, inference: OpenInference, api_key: str | None = None) -> None:
        self._engine = engine
        self._workload = engine.workload
        self._inference = inference
        self._api_key = api_key

    @staticmethod
    def has(path: str) -> bool:
        """Whether a path belongs to the data plane."""
        return path in _ROOTS or path.startswith("/v2/")

    def handle(self, request: Request) -> Reply | Coroutine[Any, Any, Reply]:
        """Answer a request; neither this nor a coroutine it returns raises anything."""
        self._engine.arrived = time.perf_counter()
        try:
            reply = self._route(request)
        except Exception as error:  # noqa: BLE001  # whatever it is, somebody waits for an answer
            return self._refusal(request, error)
        return self._later(request, reply) if isinstance(reply, Coroutine) else reply

    async def _later(self, request: Request, reply: Coroutine[Any, Any, Reply]) -> Reply:
        try:
            return await reply
        except Exception as error:  # noqa: BLE001  # the same
            return self._refusal(request, error)

    def _route(self, request: Request) -> Reply | Coroutine[Any, Any, Reply]:
        path = request.path
        if self._api_key is not None and path not in _OPEN_TO_ALL:
            given = request.headers.get(b"authorization", b"").decode("latin-1")
            if not bears(given, self._api_key):
                raise Unauthorized("send 'Authorization: Bearer KEY' with the key in TRIMTAB_API_KEY")
        if path == _PREDICT:
            return self._predict(request)
        if self.has(path):
            return self._inference.handle(request)
        raise NotFound(
            "no such route here: this port has /predict and /v2; everything else is on the server's other port, 3000 "
            "unless it was started with --port"
        )

    def _refusal(self, request: Request, error: Exception) -> Reply:
        if not isinstance(error, ServingError):
            log.error("a request failed", exc_info=error)
            return error_reply(ServingError("the server failed; its log says why"))
        if error.status in _NOT_VALID and request.path.endswith((_PREDICT, "/infer")):
            self._engine.reject()
        return error_reply(error)

    # -- /predict -------------------------------------------------------------------------------------------

    def _predict(self, request: Request) -> Reply | Coroutine[Any, Any, Reply]:
        if request.method != "POST":
            raise MethodNotAllowed(request.method, ("POST",))
        records = _records(request.body)
        served = self._engine.answer(request.headers, self._encoded(records), len(records), records=records)
        return self._predict_later(served) if isinstance(served, Coroutine) else self._prediction(served)

    async def _predict_later(self, served: Coroutine[Any, Any, Served]) -> Reply:
        return self._prediction(await served)

    def _encoded(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not records:
            raise BadRequest("'records' is empty: send at least one record")
        if len(records) > self._workload.max_records:
            raise BadRequest(
                f"{len(records)} records in one request; the limit of this workload is "
                f"{self._workload.max_records}"
            )
        try:
            return self._workload.encode(records)
        except InvalidRecord as error:
            raise BadRequest(str(error)) from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # A workload that checks less than it could: what it was given is still the client's.
            raise BadRequest(
                f"the records do not fit the workload: {type(error).__name__}: {error}"
            ) from error

    def _prediction(self, served: Served) -> Reply:
        predictions, labels = served.predictions, self._workload.classes
        assert predictions is not None  # records were given
        body = {
            "request_id": served.request_id,
            "variant": served.model.name,
            "arm": served.arm,
            "predictions": [
                {"class": index, "label": labels[index], "confidence": confidence}
                for index, confidence in zip(
                    predictions.classes.tolist(), predictions.confidences.tolist(), strict=True
                )
            ],
        }
        headers = answer_headers(served.request_id, served.model.name, served.arm)
        return Reply(200, orjson.dumps(body), headers=headers, after=self._engine.mirror_after(served))


def _records(body: bytes) -> list[Mapping[str, Any]]:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("records"), list):
        raise BadRequest('the body must be {"records": [{...}, ...]}')
    records = content["records"]
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise BadRequest(f"record {index} is not an object with the workload's fields")
    return records


class Door:
    """ASGI middleware that hands the data plane's routes to it, past BentoML's typed layer.

    Args:
        plane: the data plane, once the service has started.
    """

    def __init__(self, app: ASGIApp, plane: Callable[[], DataPlane]) -> None:
        self._app = app
        self._plane = plane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not DataPlane.has(scope["path"]):
            await self._app(scope, receive, send)
            return
        # `services.limits.Limits` stands before this and hands the body on whole.
        message = await receive()
        request = Request(scope["method"], scope["path"], dict(scope["headers"]), message.get("body", b""))
        reply = self._plane().handle(request)
        if isinstance(reply, Coroutine):
            reply = await reply
        headers = [
            (b"content-type", reply.content_type),
            (b"content-length", str(len(reply.body)).encode()),
            *reply.headers,
        ]
        body = b"" if scope["method"] == "HEAD" else reply.body
        try:
            await send({"type": "http.response.start", "status": reply.status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        except RuntimeError as error:
            # uvicorn forgets that a client who sent several requests at once has hung up, and writes to nobody.
            log.debug("a client was gone before its reply: %s", error)
        if reply.after is not None:
            reply.after()
