"""The routes under /v2: the Open Inference Protocol over HTTP.

The protocol's model is the workload; its versions are the loaded variants. A request that names no version goes where
the rollout sends it, and one that names a variant is answered by that, without evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from services.errors import BadRequest, MethodNotAllowed, NotFound
from services.http import Reply, Request, answer_headers
from services.protocol.content import decompressed
from services.protocol.describe import (
    model_config,
    model_metadata,
    model_statistics,
    repository_index,
    server_metadata,
    server_version,
)
from services.protocol.openapi import describe_api
from services.protocol.parameters import read_groups, read_timeout, refuse_sequences
from services.protocol.tensors import InferRequest, encode_reply, parse_request

if TYPE_CHECKING:
    from services.arms import Model
    from services.counters import Statistics
    from services.engine import Engine, Served
    from services.signature import Signature

__all__ = ["OpenInference"]

_BINARY = b"application/octet-stream"
_READS = ("GET", "HEAD")
_WRITES = ("POST",)
_UNSUPPORTED = {
    "trace": "trace settings",
    "logging": "log settings",
    "systemsharedmemory": "shared memory",
    "cudasharedmemory": "shared memory",
    "generate": "generate extension",
    "generate_stream": "generate extension",
}


class OpenInference:
    """Answers everything under /v2.

    Args:
        engine: answers what was decoded.
        max_body_bytes: of a body once it is decompressed.
        ready: whether this worker takes requests.
        statistics: what the loaded variant of that name has done.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_body_bytes: int,
        ready: Callable[[], bool],
        statistics: Callable[[str], Statistics],
    ) -> None:
        self._engine = engine
        self._name = engine.workload.name
        self._max_records = engine.workload.max_records
        self._sensitive = engine.workload.sensitive
        self._max_body_bytes = max_body_bytes
        self._ready = ready
        self._statistics = statistics
        self._described: tuple[tuple[list[str], Signature], bytes] | None = None
        self._infer_path = f"/v2/models/{self._name}/infer"

    def handle(self, request: Request) -> Reply | Coroutine[Any, Any, Reply]:
        """Answer a request whose path is /v2 or begins with /v2/.

        Raises:
            ServingError: what the client is to be told; from a returned coroutine too.
        """
        if request.path == self._infer_path and request.method == "POST":
            return self._infer(request, None)
        return self._route(request)

    # -- routes ---------------------------------------------------------------------------------------------

    def _route(self, request: Request) -> Reply | Coroutine[Any, Any, Reply]:
        content: Any
        match request.path.split("/")[2:]:
            case [] | [""]:
                content = server_metadata()
            case ["openapi.json"]:
                _allow(request, _READS)
                return Reply(200, self._description())
            case ["health", "live" | "ready" as what]:
                return _healthy(request, what == "live" or self._ready())
            case ["models", "stats"]:
                content = self._stats(self._engine.models())
            case ["models", name, *rest]:
                return self._model_route(request, name, rest)
            case ["repository", *rest]:
                return self._repository_route(request, rest)
            case rest:
                raise _unknown(request, rest)
        return _json(request, content)

    def _model_route(
        self, request: Request, name: str, rest: list[str]
    ) -> Reply | Coroutine[Any, Any, Reply]:
        self._check_name(name)
        models = self._engine.models()
        pinned = None
        if len(rest) > 1 and rest[0] == "versions":
            loaded = ", ".join(model.name for model in models)
            models = [model for model in models if model.name == rest[1]]
            if not models:
                raise NotFound(f"no variant {rest[1][:100]!r} of {name!r} is loaded; there are: {loaded}")
            pinned, rest = models[0], rest[2:]
        match rest:
            case []:
                content = model_metadata(name, models)
            case ["config"]:
                content = model_config(name, models[0], self._max_records)
            case ["stats"]:
                content = self._stats(models)
            case ["ready"]:
                return _healthy(request, self._ready())
            case ["infer"]:
                _allow(request, _WRITES)
                return self._infer(request, pinned)
            case _:
                raise _unknown(request, rest)
        return _json(request, content)

    def _repository_route(self, request: Request, rest: list[str]) -> Reply:
        match rest:
            case ["index"]:
                _allow(request, _WRITES)
                return Reply(200, orjson.dumps(repository_index(self._name, self._engine.models())))
            case ["models", name, "load" | "unload"]:
                _allow(request, _WRITES)
                self._check_name(name)
                raise BadRequest("rollouts load and unload variants here: see 'trimtab rollout --help'")
            case _:
                raise _unknown(request, rest)

    def _check_name(self, name: str) -> None:
        if name != self._name:
            raise NotFound(f"no such model: {name[:100]!r}; this server has {self._name!r}")

    def _stats(self, models: Sequence[Model]) -> dict[str, Any]:
        return {
            "model_stats": [
                model_statistics(self._name, model.name, self._statistics(model.name)) for model in models
            ]
        }

    def _description(self) -> bytes:
        models = self._engine.models()
        names = [model.name for model in models]
        if self._described is None or self._described[0] != (
            names,
            models[0].signature,
        ):  # it takes milliseconds to make
            description = describe_api(
                self._name,
                names,
                models[0].signature,
                self._max_records,
                server_version(),
            )
            self._described = (names, models[0].signature), orjson.dumps(description)
        return self._described[1]

    # -- inference ------------------------------------------------------------------------------------------

    def _infer(self, request: Request, pinned: Model | None) -> Reply | Coroutine[Any, Any, Reply]:
        engine, headers, body = self._engine, request.headers, request.body
        encoding = headers.get(b"content-encoding")
        if encoding is not None:
            body = decompressed(body, encoding, self._max_body_bytes)
        asked = parse_request(
            body,
            headers.get(b"inference-header-content-length"),
            (pinned or engine.live.control).signature,
            self._max_records,
        )
        timeout = groups = None
        if asked.parameters:
            refuse_sequences(asked.parameters)
            timeout = read_timeout(asked.parameters)
            groups = read_groups(asked.parameters, self._sensitive, asked.rows)
        served = engine.answer(
            headers,
            asked.inputs,
            asked.rows,
            supplied_id=asked.id or None,
            version=None if pinned is None else pinned.name,
            groups=groups,
            timeout=timeout,
        )
        return (
            self._infer_later(served, asked) if isinstance(served, Coroutine) else self._reply(served, asked)
        )

    async def _infer_later(self, served: Coroutine[Any, Any, Served], asked: InferRequest) -> Reply:
        return self._reply(await served, asked)

    def _reply(self, served: Served, asked: InferRequest) -> Reply:
        variant = served.model.name
        body, header_length = encode_reply(
            self._name,
            variant,
            # The protocol wants the client's own id back; the one that feedback takes stands beside it.
            asked.id or served.request_id,
            served.model.signature.outputs,
            served.outputs,
            asked.outputs,
            {"request_id": served.request_id},
        )
        headers = answer_headers(served.request_id, variant, served.arm)
        after = self._engine.mirror_after(served)
        if header_length is None:
            return Reply(200, body, headers=headers, after=after)
        length = (b"inference-header-content-length", str(header_length).encode())
        return Reply(200, body, _BINARY, (*headers, length), after)


def _unknown(request: Request, parts: Sequence[str]) -> NotFound:
    if parts and parts[0] in _UNSUPPORTED:
        return NotFound(f"this server has no {_UNSUPPORTED[parts[0]]}")
    return NotFound(f"no such route: {request.path[:200]!r}; /v2/openapi.json lists all")


def _allow(request: Request, methods: Sequence[str]) -> None:
    if request.method not in methods:
        raise MethodNotAllowed(request.method, methods)


def _json(request: Request, content: Any) -> Reply:
    _allow(request, _READS)
    return Reply(200, orjson.dumps(content))


def _healthy(request: Request, yes: bool) -> Reply:
    """The protocol wants a 4xx, not a 503, from a server that takes no requests."""
    _allow(request, _READS)
    if not yes:
        raise BadRequest("this server takes no requests now")
    return Reply(200, b"", b"text/plain")
