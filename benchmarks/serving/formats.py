"""What goes over the wire: each format's requests, and whether a reply to one says what the model says."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from benchmarks.serving.processes import BenchmarkError

__all__ = ["FORMATS", "Format", "Inputs", "Target", "check"]

Inputs = Mapping[str, np.ndarray]
"""One record's tensors by name, first axis 1."""
_JSON = "application/json"
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Format:
    """A way to ask.

    Attributes:
        encode: one record to (headers, body).
        read: a reply's (headers, body) to what it says of the model's two logits: themselves, or as `winner` puts it.
        winner: the reply gives (class, confidence) instead of logits.
    """

    encode: Callable[[Inputs], tuple[dict[str, str], bytes]]
    read: Callable[[Mapping[str, str], bytes], Sequence[float]]
    winner: bool = False


@dataclass(frozen=True)
class Target:
    """An address, how to ask there, and a pool of records with the model's logits for each."""

    port: int
    path: str
    format: Format
    records: Sequence[Inputs]
    logits: np.ndarray

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    @cached_property
    def requests(self) -> list[bytes]:
        """The pool as bytes of HTTP/1.1."""
        found = []
        for record in self.records:
            headers, body = self.format.encode(record)
            lines = [
                f"POST {self.path} HTTP/1.1",
                f"Host: 127.0.0.1:{self.port}",
                *(f"{name}: {value}" for name, value in headers.items()),
                f"Content-Length: {len(body)}",
            ]
            found.append("\r\n".join([*lines, "", ""]).encode() + body)
        return found


def check(target: Target) -> None:
    """Ask for the first records of the pool and compare with what the model says.

    Raises:
        BenchmarkError: another status than 200, or another answer.
    """
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=10)
    try:
        for record, logits in zip(target.records[:8], target.logits, strict=False):
            headers, body = target.format.encode(record)
            connection.request("POST", target.path, body, headers)
            reply = connection.getresponse()
            content = reply.read()
            if reply.status != 200:
                raise BenchmarkError(f"{target.path} answers {reply.status}: {content[:200]!r}")
            said = target.format.read({name.lower(): value for name, value in reply.getheaders()}, content)
            wanted = _winner(logits) if target.format.winner else logits
            if not np.allclose(said, wanted, atol=_TOLERANCE):
                raise BenchmarkError(f"{target.path} answers {list(said)}, the model {list(wanted)}")
    except (OSError, http.client.HTTPException, LookupError, ValueError, TypeError) as error:
        raise BenchmarkError(f"{target.path} does not answer as it should: {error!r}") from None
    finally:
        connection.close()


def _winner(logits: np.ndarray) -> tuple[float, float]:
    return float(logits.argmax()), float(1.0 / np.exp(logits - logits.max()).sum())


_DATATYPES = {"float32": "FP32", "int64": "INT64"}


def _tensors(inputs: Inputs) -> list[dict[str, object]]:
    return [
        {"name": name, "shape": value.shape, "datatype": _DATATYPES[value.dtype.name]}
        for name, value in inputs.items()
    ]


def _listed(value: np.ndarray) -> list[float]:
    """Numbers as a client would write them: six decimals, not what float32 looks like in float64."""
    return [round(number, 6) for number in value.ravel().tolist()]


def _v2_json(inputs: Inputs) -> tuple[dict[str, str], bytes]:
    tensors = _tensors(inputs)
    for tensor, value in zip(tensors, inputs.values(), strict=True):
        tensor["data"] = _listed(value)
    return {"Content-Type": _JSON}, _dumps({"inputs": tensors})


def _v2_binary(inputs: Inputs) -> tuple[dict[str, str], bytes]:
    tensors = _tensors(inputs)
    for tensor, value in zip(tensors, inputs.values(), strict=True):
        tensor["parameters"] = {"binary_data_size": value.nbytes}
    header = _dumps({"inputs": tensors, "parameters": {"binary_data_output": True}})
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(header)),
    }
    return headers, header + b"".join(value.tobytes() for value in inputs.values())


def _read_v2_json(_headers: Mapping[str, str], body: bytes) -> Sequence[float]:
    return list(json.loads(body)["outputs"][0]["data"])


def _read_v2_binary(headers: Mapping[str, str], body: bytes) -> Sequence[float]:
    end = int(headers["inference-header-content-length"])
    output = json.loads(body[:end])["outputs"][0]
    if output["parameters"]["binary_data_size"] != len(body) - end:
        raise ValueError("the reply's binary_data_size is not what came")
    return list(np.frombuffer(body, "<f4", offset=end).tolist())


def _data(inputs: Inputs) -> tuple[dict[str, str], bytes]:
    (value,) = inputs.values()
    return {"Content-Type": _JSON}, _dumps({"data": _listed(value)})


def _records(inputs: Inputs) -> tuple[dict[str, str], bytes]:
    record = {name: _listed(value) for name, value in inputs.items()}
    return {"Content-Type": _JSON}, _dumps({"records": [record]})


def _read_records(_headers: Mapping[str, str], body: bytes) -> Sequence[float]:
    (prediction,) = json.loads(body)["predictions"]
    return prediction["class"], prediction["confidence"]


def _dumps(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


FORMATS = {
    "v2-json": Format(_v2_json, _read_v2_json),
    "v2-binary": Format(_v2_binary, _read_v2_binary),
    "data": Format(_data, lambda _headers, body: json.loads(body)["logits"]),
    "records": Format(_records, _read_records, winner=True),
}
