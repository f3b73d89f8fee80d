"""Tensors of the Open Inference Protocol v2 on the wire: JSON, the binary extension, and both in one request.

A pure codec. What a request says is checked against the model's signature before anything is allocated for it, so that
a decoded request needs no further look. Every fault is a `BadRequest` of one line that names the tensor.

Numbers are exact about their kind: a float is no integer, a boolean no number, and a value outside the datatype's range
is refused, as are NaN and infinity, which JSON cannot carry and which full precision would answer with garbage.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import orjson

from services.errors import BadRequest
from services.signature import Signature, TensorSpec

__all__ = ["InferRequest", "encode_reply", "parse_request"]

# Codes of the struct module. It checks kind and range of every number on the way, at two thirds of NumPy's price.
_CODES = {
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
}
_LENGTH = struct.Struct("<I")
_R, _L = ord("r"), ord("l")
_MAX_LENGTH_DIGITS = 18
_JSON_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    type(None): "null",
}


@dataclass(slots=True)
class InferRequest:
    """An infer request that fits the model.

    Attributes:
        inputs: every input of the model; arrays may be read-only views of the body. BYTES are objects of `str`.
        rows: records in each of them, at least 1.
        id: the client's name for the request.
        parameters: the request's own, as they came.
        outputs: which of the model's outputs to answer with, by index, and whether as binary data.
    """

    inputs: dict[str, np.ndarray]
    rows: int
    id: str | None
    parameters: Mapping[str, Any]
    outputs: tuple[tuple[int, bool], ...]


def parse_request(
    content: bytes, header_length: bytes | None, signature: Signature, max_rows: int
) -> InferRequest:
    """Decode an infer request.

    Args:
        content: the whole body, decompressed.
        header_length: the value of `Inference-Header-Content-Length`, which says where binary data begins.
        signature: the inputs and outputs of the model that is asked.
        max_rows: the most records that one request may hold.

    Raises:
        BadRequest: in one line, what does not fit.
    """
    text = content if header_length is None else content[: _length(header_length, len(content))]
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the request is not JSON: {error}") from None
    if type(document) is not dict:
        raise BadRequest(f"the request is {_kind(document)}, not a JSON object")
    request_id = document.get("id")
    if request_id is not None and type(request_id) is not str:
        raise BadRequest(f'"id" is {_kind(request_id)}, not a string')
    parameters = _parameters(document, "the request")
    inputs, rows = _inputs(document.get("inputs"), content, text, signature.inputs, max_rows)
    outputs = _outputs(document.get("outputs"), parameters, signature.outputs)
    return InferRequest(inputs, rows, request_id, parameters, outputs)


def encode_reply(
    model_name: str,
    model_version: str,
    request_id: str,
    specs: Sequence[TensorSpec],
    arrays: Sequence[np.ndarray],
    outputs: Sequence[tuple[int, bool]],
    parameters: Mapping[str, str] | None = None,
) -> tuple[bytes, int | None]:
    """The body of an infer reply, and the length of its JSON part if binary data follows.

    Args:
        specs: the model's outputs.
        arrays: their values, in the same order.
        outputs: as in `InferRequest`.
        parameters: of the reply, if any.
    """
    described: list[dict[str, Any]] = []
    parts: list[bytes] = [b""]
    for index, binary in outputs:
        spec, array = specs[index], arrays[index]
        output: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": array.shape}
        if binary:
            raw = _packed_strings(array) if spec.datatype == "BYTES" else array.tobytes()
            output["parameters"] = {"binary_data_size": len(raw)}
            parts.append(raw)
        else:
            output["data"] = array.ravel().tolist() if spec.datatype == "BYTES" else array.ravel()
        described.append(output)
    reply: dict[str, Any] = {"model_name": model_name, "model_version": model_version, "id": request_id}
    if parameters:
        reply["parameters"] = parameters
    reply["outputs"] = described
    parts[0] = orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)
    if len(parts) == 1:
        return parts[0], None
    return b"".join(parts), len(parts[0])


# -- the request's parts -------------------------------------------------------------------------------------


def _length(header: bytes, limit: int) -> int:
    if not header.isdigit() or len(header) > _MAX_LENGTH_DIGITS or int(header) > limit:
        raise BadRequest(
            f"Inference-Header-Content-Length is {_quoted(header.decode('latin-1'))}, "
            f"not a number of bytes up to the body's {limit}"
        )
    return int(header)


def _inputs(
    tensors: Any, content: bytes, text: bytes, specs: tuple[TensorSpec, ...], max_rows: int
) -> tuple[dict[str, np.ndarray], int]:
    if type(tensors) is not list:
        raise BadRequest(f'"inputs" is {_kind(tensors)}, not a list of tensors')
    if len(tensors) != len(specs):
        raise _misnamed(tensors, specs)
    booleans: bool | None = None
    offset = len(text)  # of the binary data that is not read yet
    inputs: dict[str, np.ndarray] = {}
    rows = -1
    for index, tensor in enumerate(tensors):
        spec = specs[index]
        if type(tensor) is not dict or tensor.get("name") != spec.name:  # in an order of the client's own
            spec = _named(tensor, specs)
        name = spec.name
        if name in inputs:
            raise BadRequest(f"input {name!r} is given twice")
        if tensor.get("datatype") != spec.datatype:
            raise _wrong_datatype(spec, tensor.get("datatype"))
        shape = tensor.get("shape")
        count = _count(spec, shape)
        if shape[0] != rows:
            rows = _rows(shape[0], rows, name, max_rows)
        size = _binary_size(spec, tensor, len(content) - offset)
        if size is None:
            if booleans is None:
                booleans = _may_hold_booleans(text)
            inputs[name] = _from_json(spec, tensor.get("data"), shape, count, booleans)
        else:
            inputs[name] = _from_binary(spec, content, offset, size, shape, count)
            offset += size
    if offset != len(content):
        extra = len(content) - offset
        raise BadRequest(f"{extra} bytes after the inputs' data: their binary_data_size does not add up")
    return inputs, rows


def _may_hold_booleans(text: bytes) -> bool:
    """Whether there is a `true` or `false` anywhere in JSON. Where there is none, no number needs a look at its type.

    Few requests have one. A search for a letter costs a twentieth of a search for the word.
    """
    return (_R in text and b"true" in text) or (_L in text and b"false" in text)


def _count(spec: TensorSpec, shape: Any) -> int:
    """The number of elements of a shape that fits the model; Python's integers do not overflow."""
    count = 1
    if type(shape) is not list or len(shape) != len(spec.shape):
        raise _wrong_shape(spec, shape)
    for axis, want in enumerate(spec.shape):
        size = shape[axis]
        if type(size) is not int or size < (axis > 0) or (size != want and want >= 0):
            raise _wrong_shape(spec, shape)
        count *= size
    if not shape:
        raise BadRequest(f"input {spec.name!r} has no axis that counts records")
    return count


def _rows(rows: int, others: int, name: str, max_rows: int) -> int:
    if others >= 0:
        raise BadRequest(f"input {name!r} has {rows} records, others {others}")
    if rows < 1:
        raise BadRequest("the inputs hold no record")
    if rows > max_rows:
        raise BadRequest(f"{rows} records in one request; the limit of this workload is {max_rows}")
    return rows


def _binary_size(spec: TensorSpec, tensor: dict[str, Any], left: int) -> int | None:
    """Bytes of binary data that are this input's, or None where its data is in the JSON part."""
    parameters = tensor.get("parameters")
    if parameters is None:
        return None
    if type(parameters) is not dict:
        raise _wrong_parameters(parameters, f"input {spec.name!r}")
    size = parameters.get("binary_data_size")
    if size is None:
        _refuse_shared_memory(parameters, f"input {spec.name!r}")
        return None
    if "data" in tensor:
        raise BadRequest(f"input {spec.name!r} has both data and binary_data_size: send one of them")
    if type(size) is not int or not 0 <= size <= left:
        raise BadRequest(
            f"input {spec.name!r}: binary_data_size is {_kind(size)}, but {left} bytes of binary data are left "
            "after the JSON part (its length goes into Inference-Header-Content-Length)"
        )
    return size


def _outputs(
    wanted: Any, parameters: Mapping[str, Any], specs: tuple[TensorSpec, ...]
) -> tuple[tuple[int, bool], ...]:
    binary = bool(parameters and _boolean(parameters, "binary_data_output"))
    if not wanted and (wanted is None or type(wanted) is list):
        return _all_outputs(len(specs), binary)
    if type(wanted) is not list:
        raise BadRequest(f'"outputs" is {_kind(wanted)}, not a list')
    indices = {spec.name: index for index, spec in enumerate(specs)}
    found: dict[int, bool] = {}
    for output in wanted:
        name = output.get("name") if type(output) is dict else None
        if type(name) is not str:
            raise BadRequest('every one of "outputs" is an object with a "name"')
        if name not in indices:
            raise BadRequest(f"no such output: {_quoted(name)}; the model has {_names(specs)}")
        if indices[name] in found:
            raise BadRequest(f"output {name!r} is asked for twice")
        found[indices[name]] = _asked_binary(output, name, binary)
    return tuple(found.items())


def _asked_binary(output: dict[str, Any], name: str, default: bool) -> bool:
    parameters = _parameters(output, f"output {name!r}")
    _refuse_shared_memory(parameters, f"output {name!r}")
    if parameters.get("classification"):
        raise BadRequest(f"output {name!r}: classification is not supported: ask for the tensor")
    asked = _boolean(parameters, "binary_data")
    return default if asked is None else asked


@lru_cache(maxsize=64)
def _all_outputs(number: int, binary: bool) -> tuple[tuple[int, bool], ...]:
    return tuple((index, binary) for index in range(number))


def _parameters(holder: dict[str, Any], whose: str) -> Mapping[str, Any]:
    parameters = holder.get("parameters")
    if parameters is None:
        return {}
    if type(parameters) is not dict:
        raise _wrong_parameters(parameters, whose)
    return parameters


def _boolean(parameters: Mapping[str, Any], key: str) -> bool | None:
    value = parameters.get(key)
    if value is not None and type(value) is not bool:
        raise BadRequest(f"{key} is {_kind(value)}, not true or false")
    return value


def _refuse_shared_memory(parameters: Mapping[str, Any], whose: str) -> None:
    if "shared_memory_region" in parameters:
        raise BadRequest(f"{whose}: shared memory is not supported: send data, or binary data")


# -- elements from JSON --------------------------------------------------------------------------------------


def _from_json(spec: TensorSpec, data: Any, shape: list[int], count: int, booleans: bool) -> np.ndarray:
    if type(data) is not list:
        what = "no data" if data is None else f"{_kind(data)} as data, not a list"
        raise BadRequest(f"input {spec.name!r} has {what}")
    if data and type(data[0]) is list:
        data = _flattened(spec, data, shape)
    if len(data) != count:
        raise BadRequest(f"input {spec.name!r}: shape {shape} takes {count} elements, data has {len(data)}")
    code = _CODES.get(spec.datatype)
    if code is None:
        return _from_json_objects(spec, data, shape)
    try:
        packed = _packer(count, code)(*data)
    except (struct.error, OverflowError):
        raise _misfit(spec, data) from None
    if booleans and bool in set(map(type, data)):  # which struct takes for numbers
        raise _misfit(spec, data)
    return _view(spec, shape, packed)


@lru_cache(maxsize=256)
def _packer(count: int, code: str) -> Callable[..., bytes]:
    return struct.Struct(f"={count}{code}").pack


def _from_json_objects(spec: TensorSpec, data: list[Any], shape: list[int]) -> np.ndarray:
    """Booleans and strings."""
    wanted = bool if spec.datatype == "BOOL" else str
    if not set(map(type, data)) <= {wanted}:
        raise _misfit(spec, data)
    if wanted is bool:
        return _view(spec, shape, bytes(data))
    return _strings(spec, shape, data)


def _flattened(spec: TensorSpec, data: list[Any], shape: list[int]) -> list[Any]:
    """The elements of data that is nested just as its shape says."""
    expected = shape[0]
    for size in shape[1:]:
        if len(data) != expected or any(type(part) is not list or len(part) != size for part in data):
            raise BadRequest(f"input {spec.name!r}: data is neither flat nor nested as its shape {shape}")
        data = list(chain.from_iterable(data))
        expected *= size
    return data


def _misfit(spec: TensorSpec, data: list[Any]) -> BadRequest:
    """Says which of the elements is not of the datatype, found by a look at each."""
    code = _CODES.get(spec.datatype, "")
    kinds: tuple[type, ...] = (bool,) if spec.datatype == "BOOL" else (str,)
    if code:
        kinds = (int, float) if spec.dtype.kind == "f" else (int,)
    for index, value in enumerate(data):
        if type(value) not in kinds:
            return BadRequest(f"input {spec.name!r}: element {index} is {_kind(value)}, not {spec.datatype}")
        try:
            struct.pack(f"={code}", *([value] if code else []))
        except (struct.error, OverflowError):
            return BadRequest(
                f"input {spec.name!r}: element {index}, {value}, is out of {spec.datatype}'s range"
            )
    return BadRequest(f"input {spec.name!r}: data is not {spec.datatype}")


# -- elements from binary data -------------------------------------------------------------------------------


def _from_binary(
    spec: TensorSpec, content: bytes, start: int, size: int, shape: list[int], count: int
) -> np.ndarray:
    if spec.datatype == "BYTES":
        return _strings(spec, shape, _unpacked_strings(spec, content[start : start + size], shape, count))
    if size != count * spec.dtype.itemsize:
        raise BadRequest(
            f"input {spec.name!r}: shape {shape} of {spec.datatype} takes {count * spec.dtype.itemsize} bytes, "
            f"binary_data_size is {size}"
        )
    array = _view(spec, shape, content, start)
    if spec.dtype.kind == "f":
        if b"\0" in np.isfinite(array).tobytes():  # a third of the time that .all() takes
            raise BadRequest(f"input {spec.name!r} has NaN or infinite values")
    elif spec.dtype.kind == "b" and content[start : start + size].translate(None, b"\0\1"):
        raise BadRequest(f"input {spec.name!r}: a BOOL is a byte of value 0 or 1")
    return array if array.flags.aligned else array.copy()


def _unpacked_strings(spec: TensorSpec, raw: bytes, shape: list[int], count: int) -> list[str]:
    found: list[str] = []
    offset = 0
    while offset < len(raw):
        start = offset + _LENGTH.size
        offset = start + _LENGTH.unpack_from(raw, offset)[0] if start <= len(raw) else start
        if offset > len(raw):
            raise BadRequest(f"input {spec.name!r}: element {len(found)} is longer than the binary data")
        if len(found) == count:
            raise BadRequest(
                f"input {spec.name!r}: shape {shape} takes {count} elements, binary data has more"
            )
        try:
            found.append(raw[start:offset].decode())
        except UnicodeDecodeError:
            raise BadRequest(f"input {spec.name!r}: element {len(found)} is not UTF-8") from None
    if len(found) != count:
        raise BadRequest(
            f"input {spec.name!r}: shape {shape} takes {count} elements, binary data has {len(found)}"
        )
    return found


def _packed_strings(array: np.ndarray) -> bytes:
    parts = []
    for text in array.ravel().tolist():
        encoded = text.encode()
        parts += [_LENGTH.pack(len(encoded)), encoded]
    return b"".join(parts)


def _view(spec: TensorSpec, shape: list[int], buffer: bytes, offset: int = 0) -> np.ndarray:
    try:
        return np.ndarray(shape, spec.dtype, buffer, offset)
    except (
        ValueError,
        OverflowError,
    ):  # no elements, but axes that multiply to more than there are addresses
        raise _wrong_shape(spec, shape) from None


def _strings(spec: TensorSpec, shape: list[int], values: list[str]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError):
        raise _wrong_shape(spec, shape) from None


# -- what is said of faults ----------------------------------------------------------------------------------


def _kind(value: Any) -> str:
    """A value in few words: no client's data goes into a message at length."""
    return _JSON_NAMES.get(type(value)) or str(value)


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(repr(spec.name) for spec in specs)


def _named(tensor: Any, specs: tuple[TensorSpec, ...]) -> TensorSpec:
    name = tensor.get("name") if type(tensor) is dict else None
    if type(name) is not str:
        raise BadRequest('every one of "inputs" is an object with a "name"')
    for spec in specs:
        if spec.name == name:
            return spec
    raise BadRequest(f"no such input: {_quoted(name)}; the model has {_names(specs)}")


def _misnamed(tensors: list[Any], specs: tuple[TensorSpec, ...]) -> BadRequest:
    """Says which input is missing, unknown or given twice, where their number is wrong."""
    missing = {spec.name: spec for spec in specs}
    for tensor in tensors:
        if missing.pop(_named(tensor, specs).name, None) is None:
            return BadRequest(f"input {tensor['name']!r} is given twice")
    return BadRequest(f"input {next(iter(missing))!r} is missing")


def _wrong_parameters(parameters: Any, whose: str) -> BadRequest:
    return BadRequest(f"parameters of {whose} are {_kind(parameters)}, not an object")


def _wrong_datatype(spec: TensorSpec, given: Any) -> BadRequest:
    said = _quoted(given) if type(given) is str else _kind(given)
    hint = ": BF16 is not supported" if given == "BF16" else ""
    return BadRequest(f"input {spec.name!r} is {said}, not {spec.datatype}{hint}")


def _wrong_shape(spec: TensorSpec, shape: Any) -> BadRequest:
    said = _kind(shape)
    if type(shape) is list and len(shape) <= 16:
        said = f"[{', '.join(_kind(size) for size in shape)}]"
    wanted = ", ".join("any" if size < 0 else str(size) for size in spec.shape)
    return BadRequest(f"input {spec.name!r} has shape {said}, not [{wanted}]")
