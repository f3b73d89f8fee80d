"""The OpenAPI 3.1 description of the data plane, made for the workload that is served and its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from services.signature import Signature, TensorSpec

__all__ = ["describe_api"]

_Schema = dict[str, Any]

_REASONS = {
    400: "The request can never be answered; the error says why.",
    401: "The server has an API key (TRIMTAB_API_KEY), and the request does not show it.",
    404: "No such model, or no such variant is loaded.",
    413: "The body is over the limit, as it came or once decompressed.",
    415: "The body's type or compression cannot be read.",
    503: "No model can answer now; Retry-After says when to try again.",
    504: "The request's deadline passed.",
}
_STRING: _Schema = {"type": "string"}
_COUNT: _Schema = {"type": "integer", "minimum": 0}
_ID: _Schema = {"type": "string", "pattern": "^[A-Za-z0-9_.:/@+=~-]{1,200}$"}
_ERROR: _Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string", "pattern": "^[^\\n\\r]+$"}},
    "additionalProperties": False,
}
_DURATION = {
    "type": "object",
    "required": ["count", "ns"],
    "properties": {"count": _COUNT, "ns": _COUNT},
    "additionalProperties": False,
}
_ABOUT = (
    "Predictions from a model and, while a rollout is under way, from its compressed variant. "
    "The model of /v2 is the workload, its versions are the loaded variants: without a version, the rollout decides "
    "which of them answers. Tensors are JSON or binary (the binary tensor data extension). NaN and infinity are "
    "refused in either. GET routes answer HEAD too; any other method gets 405 with Allow."
)


def describe_api(
    name: str, variants: Sequence[str], signature: Signature, max_records: int, version: str
) -> dict[str, Any]:
    """The description of `/predict` and of every route under /v2.

    Args:
        name: the workload's.
        variants: those that are loaded.
        signature: the tensors of its model.
        max_records: of one request.
        version: the server's.
    """
    return {
        "openapi": "3.1.0",
        "info": {"title": "Trimtab", "version": version, "description": _ABOUT},
        "security": [{}, {"key": []}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "parameters": _parameters(name, variants),
            "schemas": _schemas(name, signature, max_records),
        },
    }


# -- routes --------------------------------------------------------------------------------------------------


def _paths() -> dict[str, Any]:
    model, versions = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
    paths: dict[str, Any] = {
        "/predict": {"post": _predict()},
        "/v2": {"get": _get("What this server is", "ServerMetadata")},
        "/v2/openapi.json": {"get": _get("This description", None)},
        "/v2/health/live": {"get": _health("Whether the server runs")},
        "/v2/health/ready": {"get": _health("Whether the server takes requests", 400)},
        "/v2/models/stats": {"get": _get("What the loaded variants have done in one worker", "Statistics")},
        "/v2/repository/index": {"post": _index()},
        f"{model}/infer": {"post": _infer("Infer with the variant that the rollout chooses")},
        f"{versions}/infer": {"post": _infer("Infer with one variant; the rollout learns nothing from it")},
    }
    for base, of in ((model, "the workload"), (versions, "a variant")):
        paths |= {
            base: {"get": _get(f"The tensors of {of}", "ModelMetadata", 404)},
            f"{base}/ready": {"get": _health(f"Whether {of} can be asked", 400, 404)},
            f"{base}/config": {"get": _get(f"The configuration of {of}", "ModelConfig", 404)},
            f"{base}/stats": {"get": _get(f"What {of} has done in one worker", "Statistics", 404)},
        }
    for verb in ("load", "unload"):
        paths[f"/v2/repository/models/{{model}}/{verb}"] = {
            "post": {
                "summary": "Refused: rollouts do this",
                "responses": _errors(400, 401, 404, 413, 415, 503),
            }
        }
    for path, operations in paths.items():
        used = [part for part in ("model", "version") if f"{{{part}}}" in path]
        if used:
            operations["parameters"] = [_ref("parameters", part) for part in used]
    return paths


def _get(summary: str, schema: str | None, *errors: int) -> dict[str, Any]:
    content = {"type": "object"} if schema is None else _ref("schemas", schema)
    return {"summary": summary, "responses": _answer(content) | _errors(*errors, 401, 503)}


def _health(summary: str, *errors: int) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": "Yes."}} | _errors(*errors, 401, 503)}


def _index() -> dict[str, Any]:
    return {
        "summary": "The loaded variants",
        "requestBody": {"required": False, "content": _json({"type": "object"})},
        "responses": _answer(_ref("schemas", "RepositoryIndex")) | _errors(401, 413, 415, 503),
    }


def _infer(summary: str) -> dict[str, Any]:
    binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    replied = _answer(_ref("schemas", "InferReply"))
    replied["200"]["content"] |= binary
    names = ("requestId", "assignmentKey", "contentEncoding", "headerLength")
    return {
        "summary": summary,
        "parameters": [_ref("parameters", name) for name in names],
        "requestBody": {
            "required": True,
            "description": "JSON, and after it the binary data of its inputs, in their order.",
            "content": _json(_ref("schemas", "InferRequest")) | binary,
        },
        "responses": replied | _errors(400, 401, 404, 413, 415, 503, 504),
    }


def _predict() -> dict[str, Any]:
    return {
        "summary": "Predict one class for each record",
        "parameters": [_ref("parameters", name) for name in ("requestId", "assignmentKey")],
        "requestBody": {"required": True, "content": _json(_ref("schemas", "PredictRequest"))},
        "responses": _answer(_ref("schemas", "PredictReply")) | _errors(400, 401, 413, 415, 503, 504),
    }


def _answer(schema: _Schema) -> dict[str, Any]:
    return {"200": {"description": "The answer.", "content": _json(schema)}}


def _errors(*statuses: int) -> dict[str, Any]:
    content = _json(_ref("schemas", "Error"))
    return {str(status): {"description": _REASONS[status], "content": content} for status in sorted(statuses)}


def _json(schema: _Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(section: str, name: str) -> _Schema:
    return {"$ref": f"#/components/{section}/{name}"}


def _parameters(name: str, variants: Sequence[str]) -> dict[str, Any]:
    def header(name: str, schema: _Schema, description: str) -> dict[str, Any]:
        return {"name": name, "in": "header", "schema": schema, "description": description}

    def part(name: str, values: Iterable[str]) -> dict[str, Any]:
        return {"name": name, "in": "path", "required": True, "schema": _string(*values)}

    return {
        "model": part("model", [name]),
        "version": part("version", variants),
        "requestId": header("X-Request-Id", _ID, "Kept, and comes back signed; feedback needs it so."),
        "assignmentKey": header(
            "X-Assignment-Key",
            {"type": "string", "maxLength": 256},
            "Keeps whoever it stands for on one arm of a rollout.",
        ),
        "contentEncoding": header(
            "Content-Encoding", _string("gzip", "deflate", "identity"), "How the body is compressed."
        ),
        "headerLength": header(
            "Inference-Header-Content-Length", _COUNT, "Bytes of the JSON part, where binary data follows it."
        ),
    }


# -- schemas -------------------------------------------------------------------------------------------------


def _schemas(name: str, signature: Signature, max_records: int) -> dict[str, Any]:
    return {
        "Error": _ERROR,
        **_inference_schemas(name, signature, max_records),
        **_model_schemas(name, signature),
        "PredictRequest": _object(
            records={"type": "array", "minItems": 1, "maxItems": max_records, "items": {"type": "object"}}
        ),
        "PredictReply": _object(
            request_id=_ID,
            variant=_STRING,
            arm=_string("control", "treatment"),
            predictions=_list_of(
                _object(
                    **{"class": _COUNT},
                    label=_STRING,
                    confidence={"type": "number", "minimum": 0, "maximum": 1},
                )
            ),
        ),
    }


def _inference_schemas(name: str, signature: Signature, max_records: int) -> dict[str, Any]:
    count = len(signature.inputs)
    parameters = {
        "type": "object",
        "properties": {
            "timeout": {**_COUNT, "description": "Microseconds that the client will wait; 0 for no wish."},
            "groups": {
                "type": "string",
                "description": "Groups of the records, for the rollout's evidence, such as SEX=1,AGE=40-49; "
                "one entry for all records, or one for each, separated by semicolons.",
            },
            "binary_data_output": {"type": "boolean"},
        },
        "additionalProperties": {"type": ["string", "number", "boolean"]},
    }
    wanted = {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": _string(*(spec.name for spec in signature.outputs)),
            "parameters": {"type": "object", "properties": {"binary_data": {"type": "boolean"}}},
        },
    }
    request = {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": _ID,
            "parameters": parameters,
            "inputs": {
                "type": "array",
                "minItems": count,
                "maxItems": count,
                "description": "Each input once, in any order.",
                "items": {"oneOf": [_input(spec, max_records) for spec in signature.inputs]},
            },
            "outputs": {"type": "array", "maxItems": len(signature.outputs), "items": wanted},
        },
    }
    reply = _object(
        model_name=_string(name),
        model_version=_STRING,
        id=_ID,
        parameters=_object(request_id=_ID),
        outputs=_list_of({"oneOf": [_output(spec) for spec in signature.outputs]}),
    )
    return {"InferRequest": request, "InferReply": reply}


def _input(spec: TensorSpec, max_records: int) -> _Schema:
    element = _element(spec)
    return {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": _string(spec.name),
            "datatype": _string(spec.datatype),
            "shape": _shape(spec, max_records),
            "data": {
                "type": "array",
                "items": {"anyOf": [element, {"type": "array"}]},
                "description": "All elements in row-major order, or nested as the shape says. Not beside "
                "binary_data_size.",
            },
            "parameters": {"type": "object", "properties": {"binary_data_size": _COUNT}},
        },
    }


def _output(spec: TensorSpec) -> _Schema:
    return {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": _string(spec.name),
            "datatype": _string(spec.datatype),
            "shape": _list_of(_COUNT),
            "data": _list_of(_element(spec)),
            "parameters": _object(binary_data_size=_COUNT),
        },
        "additionalProperties": False,
    }


def _shape(spec: TensorSpec, max_records: int) -> _Schema:
    sizes: list[_Schema] = [_COUNT if size < 0 else {"type": "integer", "const": size} for size in spec.shape]
    if spec.shape and spec.shape[0] < 0:
        sizes[0] = {"type": "integer", "minimum": 1, "maximum": max_records}
    return {
        "type": "array",
        "prefixItems": sizes,
        "items": False,
        "minItems": len(sizes),
        "maxItems": len(sizes),
    }


def _element(spec: TensorSpec) -> _Schema:
    if spec.dtype.kind in "iu":
        limits = np.iinfo(spec.dtype)
        return {"type": "integer", "minimum": int(limits.min), "maximum": int(limits.max)}
    if spec.dtype.kind == "f":
        largest = float(np.finfo(spec.dtype).max)
        return {"type": "number", "minimum": -largest, "maximum": largest}
    return {"type": "boolean"} if spec.dtype.kind == "b" else _STRING


def _model_schemas(name: str, signature: Signature) -> dict[str, Any]:
    tensor = _object(
        name=_STRING,
        datatype=_string(*sorted({spec.datatype for spec in (*signature.inputs, *signature.outputs)})),
        shape=_list_of({"type": "integer", "minimum": -1}),
    )
    configured = _object(name=_STRING, data_type=_STRING, dims=_list_of({"type": "integer", "minimum": -1}))
    kinds = (
        "success",
        "fail",
        "queue",
        "compute_input",
        "compute_infer",
        "compute_output",
        "cache_hit",
        "cache_miss",
    )
    computed = {kind: _DURATION for kind in kinds if kind.startswith("compute")}
    return {
        "ServerMetadata": _object(name=_string("trimtab"), version=_STRING, extensions=_list_of(_STRING)),
        "ModelMetadata": _object(
            name=_string(name),
            versions=_list_of(_STRING),
            platform=_STRING,
            inputs=_list_of(tensor),
            outputs=_list_of(tensor),
        ),
        "ModelConfig": _object(
            name=_string(name),
            platform=_STRING,
            backend=_STRING,
            max_batch_size=_COUNT,
            input=_list_of(configured),
            output=_list_of(configured),
        ),
        "Statistics": _object(
            model_stats=_list_of(
                _object(
                    name=_string(name),
                    version=_STRING,
                    last_inference={**_COUNT, "description": "Milliseconds since 1970."},
                    inference_count=_COUNT,
                    execution_count=_COUNT,
                    inference_stats=_object(**dict.fromkeys(kinds, _DURATION)),
                    batch_stats=_list_of(_object(batch_size=_COUNT, **computed)),
                )
            )
        ),
        "RepositoryIndex": _list_of(
            _object(name=_string(name), version=_STRING, state=_string("READY"), reason=_STRING)
        ),
    }


def _string(*values: str) -> _Schema:
    return {"type": "string", "enum": list(values)}


def _list_of(items: _Schema) -> _Schema:
    return {"type": "array", "items": items}


def _object(**properties: _Schema) -> _Schema:
    """An object that has just these properties, all of them."""
    return {
        "type": "object",
        "required": list(properties),
        "properties": properties,
        "additionalProperties": False,
    }
