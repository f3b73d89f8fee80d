"""The codec of the Open Inference Protocol: what goes in comes out, and what does not fit is refused in one line."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from services.errors import BadRequest
from services.protocol.tensors import InferRequest, encode_reply, parse_request
from services.signature import Signature, TensorSpec

MAX_ROWS = 16
DTYPES: dict[str, Any] = {
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "BOOL": np.bool_,
    "BYTES": np.object_,
}
NUMBERS = [name for name in DTYPES if name not in ("BOOL", "BYTES")]
FUZZ = hypothesis_settings(max_examples=200, deadline=None)


def spec(name: str, datatype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, datatype, np.dtype(DTYPES[datatype]), shape)


def signature(*specs: TensorSpec) -> Signature:
    outputs = tuple(TensorSpec(f"{s.name}_out", s.datatype, s.dtype, s.shape) for s in specs)
    return Signature(specs, outputs)


def one(datatype: str, *shape: int) -> Signature:
    return signature(spec("x", datatype, *(shape or (-1, 3))))


def tensor(datatype: str, shape: Any, name: str = "x", **fields: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, **fields}


def parse(document: Any, model: Signature, binary: bytes | None = None) -> InferRequest:
    text = orjson.dumps(document)
    if binary is None:
        return parse_request(text, None, model, MAX_ROWS)
    return parse_request(text + binary, str(len(text)).encode(), model, MAX_ROWS)


def parse_one(datatype: str, shape: Any, data: Any) -> np.ndarray:
    return parse({"inputs": [tensor(datatype, shape, data=data)]}, one(datatype)).inputs["x"]


def parsed_or_refused(datatype: str, shape: Any, data: Any) -> Any:
    """The array, or why there is none."""
    try:
        return parse_one(datatype, shape, data)
    except BadRequest as error:
        return str(error)


def parse_raw(datatype: str, shape: list[int], raw: bytes) -> np.ndarray:
    described = tensor(datatype, shape, parameters={"binary_data_size": len(raw)})
    return parse({"inputs": [described]}, one(datatype), raw).inputs["x"]


def refusal(document: Any, model: Signature, binary: bytes | None = None) -> str:
    with pytest.raises(BadRequest) as caught:
        parse(document, model, binary)
    message = str(caught.value)
    assert "\n" not in message
    return message


def arrays(datatype: str) -> st.SearchStrategy[np.ndarray]:
    """Arrays of two rows of three, of every value that a request may hold."""
    dtype = np.dtype(DTYPES[datatype])
    if datatype == "BYTES":
        text = st.text(max_size=8)
        return st.lists(text, min_size=6, max_size=6).map(lambda v: np.array(v, object).reshape(2, 3))
    elements = st_numpy.from_dtype(dtype, allow_nan=False, allow_infinity=False)
    return st_numpy.arrays(dtype, (2, 3), elements=elements)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    """Equal to the last bit."""
    if left.dtype == object:
        return right.dtype == object and left.tolist() == right.tolist()
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


# -- what goes in comes out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
@pytest.mark.parametrize("datatype", DTYPES)
def test_what_a_reply_says_a_request_can_say_to_the_last_bit(datatype: str, binary: bool) -> None:
    model = one(datatype)

    @given(arrays(datatype))
    @hypothesis_settings(max_examples=50, deadline=None)
    def round_trip(array: np.ndarray) -> None:
        body, header_length = encode_reply("m", "full", "id", model.inputs, [array], ((0, binary),))
        reply = orjson.loads(body[:header_length])
        assert reply["outputs"][0]["shape"] == [2, 3]
        request = {"inputs": reply["outputs"]}
        again = parse(request, model, body[header_length:] if header_length else None)
        assert same(again.inputs["x"], array)
        assert again.rows == 2

    round_trip()


@pytest.mark.parametrize("datatype", NUMBERS)
def test_flat_and_nested_data_are_the_same(datatype: str) -> None:
    flat = parse_one(datatype, [2, 3], [1, 2, 3, 4, 5, 6])
    nested = parse_one(datatype, [2, 3], [[1, 2, 3], [4, 5, 6]])
    assert flat.tolist() == nested.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert flat.dtype == nested.dtype == DTYPES[datatype]


def test_deeper_nesting_is_read_in_row_major_order() -> None:
    model = one("INT8", -1, 2, 3)
    data = [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]]
    got = parse({"inputs": [tensor("INT8", [2, 2, 3], data=data)]}, model)
    assert got.inputs["x"].tolist() == data


def test_whole_numbers_are_good_for_floats() -> None:
    assert parse_one("FP32", [1, 3], [1, -2, 3.5]).tolist() == [[1.0, -2.0, 3.5]]


@given(
    st.lists(
        st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**64 - 1),
        min_size=3,
        max_size=3,
    )
)
@FUZZ
def test_numbers_are_rounded_as_numpy_rounds_them_or_are_out_of_range(values: list[float]) -> None:
    for datatype in ("FP16", "FP32", "FP64"):
        with np.errstate(over="ignore"):
            want = np.array([values], np.float64).astype(DTYPES[datatype])
        got = parsed_or_refused(datatype, [1, 3], values)
        if np.isfinite(want).all():
            assert same(got, want)
        else:
            assert f"out of {datatype}'s range" in got


@given(st.lists(st.integers(-(2**63), 2**64 - 1), min_size=3, max_size=3), st.sampled_from(NUMBERS[3:]))
@FUZZ
def test_integers_are_exact_or_out_of_range(values: list[int], datatype: str) -> None:
    limits = np.iinfo(DTYPES[datatype])
    fits = all(limits.min <= value <= limits.max for value in values)
    got = parsed_or_refused(datatype, [1, 3], values)
    if fits:
        assert got.tolist() == [values]
    else:
        assert f"out of {datatype}'s range" in got


def test_json_and_binary_inputs_share_a_request_in_any_order() -> None:
    model = signature(
        spec("a", "FP32", -1, 2), spec("b", "INT16", -1, 1), spec("c", "BYTES", -1), spec("d", "BOOL", -1)
    )
    text, numbers = b"\2\0\0\0\xc3\xa9", np.array([[300]], np.int16).tobytes()
    inputs = [
        tensor("BYTES", [1], "c", parameters={"binary_data_size": len(text)}),
        tensor("FP32", [1, 2], "a", data=[0.5, 1]),
        tensor("INT16", [1, 1], "b", parameters={"binary_data_size": 2}),
        tensor("BOOL", [1], "d", data=[True]),
    ]
    got = parse({"inputs": inputs}, model, text + numbers).inputs
    assert {name: value.tolist() for name, value in got.items()} == {
        "a": [[0.5, 1.0]],
        "b": [[300]],
        "c": ["é"],
        "d": [True],
    }


def test_binary_data_at_an_odd_place_becomes_an_aligned_array() -> None:
    model = signature(spec("a", "BOOL", -1, 1), spec("b", "FP64", -1, 1))
    inputs = [
        tensor("BOOL", [1, 1], "a", parameters={"binary_data_size": 1}),
        tensor("FP64", [1, 1], "b", parameters={"binary_data_size": 8}),
    ]
    for padding in range(8):
        document = {"inputs": inputs, "id": "x" * padding}
        got = parse(document, model, b"\1" + struct.pack("<d", 0.1)).inputs["b"]
        assert got.flags.aligned
        assert got.tolist() == [[0.1]]


def test_an_axis_of_any_size_may_not_be_empty_for_models_fail_on_that() -> None:
    model = one("FP32", -1, -1)
    for data in ([], [[], []]):
        with pytest.raises(BadRequest, match=r"has shape \[2, 0\]"):
            parse({"inputs": [tensor("FP32", [2, 0], data=data)]}, model)


def test_what_is_not_asked_for_has_defaults() -> None:
    got = parse({"inputs": [tensor("FP32", [1, 3], data=[1, 2, 3])]}, one("FP32"))
    assert (got.id, got.parameters, got.outputs) == (None, {}, ((0, False),))


MANY = signature(spec("a", "FP32", -1), spec("b", "FP32", -1), spec("c", "FP32", -1))
MANY_INPUTS = [tensor("FP32", [1], name, data=[1]) for name in "abc"]


@pytest.mark.parametrize(
    ("fields", "outputs"),
    [
        ({}, ((0, False), (1, False), (2, False))),
        ({"outputs": []}, ((0, False), (1, False), (2, False))),
        ({"outputs": None, "parameters": None}, ((0, False), (1, False), (2, False))),
        ({"parameters": {"binary_data_output": True}}, ((0, True), (1, True), (2, True))),
        ({"outputs": [{"name": "c_out"}, {"name": "a_out"}]}, ((2, False), (0, False))),
        (
            {"outputs": [{"name": "a_out"}, {"name": "b_out", "parameters": {"binary_data": True}}]},
            ((0, False), (1, True)),
        ),
        (
            {
                "parameters": {"binary_data_output": True},
                "outputs": [{"name": "a_out", "parameters": {"binary_data": False}}, {"name": "b_out"}],
            },
            ((0, False), (1, True)),
        ),
    ],
)
def test_outputs_are_those_asked_for_in_the_form_asked_for(fields: dict[str, Any], outputs: Any) -> None:
    assert parse({"inputs": MANY_INPUTS, **fields}, MANY).outputs == outputs


def test_a_reply_holds_json_and_binary_outputs_in_the_order_asked_for() -> None:
    specs = (spec("a", "FP32", -1, 2), spec("b", "INT8", -1), spec("c", "BYTES", -1))
    values = [np.array([[0.1, 2]], np.float32), np.array([7], np.int8), np.array(["é"], object)]
    body, header_length = encode_reply("m", "full", "id", specs, values, ((2, True), (0, False), (1, True)))
    assert header_length is not None
    assert orjson.loads(body[:header_length]) == {
        "model_name": "m",
        "model_version": "full",
        "id": "id",
        "outputs": [
            {"name": "c", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 6}},
            {"name": "a", "datatype": "FP32", "shape": [1, 2], "data": [0.1, 2.0]},
            {"name": "b", "datatype": "INT8", "shape": [1], "parameters": {"binary_data_size": 1}},
        ],
    }
    assert body[header_length:] == b"\2\0\0\0\xc3\xa9\7"


def test_a_reply_is_in_row_major_order_whatever_the_memory_looks_like() -> None:
    turned = np.arange(6, dtype=np.int32).reshape(3, 2).T
    for binary in (False, True):
        body, at = encode_reply("m", "full", "id", [spec("a", "INT32", -1, 3)], [turned], ((0, binary),))
        if at is None:
            assert orjson.loads(body)["outputs"][0]["data"] == [0, 2, 4, 1, 3, 5]
        else:
            assert np.frombuffer(body, np.int32, offset=len(body) - 24).tolist() == [0, 2, 4, 1, 3, 5]


# -- what does not fit ---------------------------------------------------------------------------------------

GOOD = tensor("FP32", [1, 3], data=[1, 2, 3])


def changed(**fields: Any) -> dict[str, Any]:
    return {"inputs": [{**GOOD, **fields}]}


def without(name: str) -> dict[str, Any]:
    return {"inputs": [{key: value for key, value in GOOD.items() if key != name}]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "the request is null, not a JSON object"),
        ([], "the request is a list, not a JSON object"),
        (7, "the request is 7, not a JSON object"),
        ({}, '"inputs" is null, not a list of tensors'),
        ({"inputs": {}}, '"inputs" is an object, not a list of tensors'),
        ({"inputs": []}, "input 'x' is missing"),
        ({"inputs": [None]}, 'every one of "inputs" is an object with a "name"'),
        ({"inputs": [GOOD, None]}, 'every one of "inputs" is an object with a "name"'),
        ({"inputs": [GOOD, GOOD]}, "input 'x' is given twice"),
        ({"inputs": [GOOD, {**GOOD, "name": "y"}]}, "no such input: 'y'; the model has 'x'"),
        (without("name"), 'every one of "inputs" is an object with a "name"'),
        (changed(name=["x"]), 'every one of "inputs" is an object with a "name"'),
        (changed(name="y\n"), r"no such input: 'y\n'; the model has 'x'"),
        (changed(name="y" * 10_000), f"no such input: '{'y' * 77}...'; the model has 'x'"),
        (without("datatype"), "input 'x' is null, not FP32"),
        (changed(datatype="FP64"), "input 'x' is 'FP64', not FP32"),
        (changed(datatype="BF16"), "input 'x' is 'BF16', not FP32: BF16 is not supported"),
        (changed(datatype=["FP32"]), "input 'x' is a list, not FP32"),
        (without("shape"), "input 'x' has shape null, not [any, 3]"),
        (changed(shape={}), "input 'x' has shape an object, not [any, 3]"),
        (changed(shape=[3]), "input 'x' has shape [3], not [any, 3]"),
        (changed(shape=[1, 4]), "input 'x' has shape [1, 4], not [any, 3]"),
        (changed(shape=[1, -3]), "input 'x' has shape [1, -3], not [any, 3]"),
        (changed(shape=[-1, 3]), "input 'x' has shape [-1, 3], not [any, 3]"),
        (changed(shape=[1.0, 3]), "input 'x' has shape [1.0, 3], not [any, 3]"),
        (changed(shape=[True, 3]), "input 'x' has shape [a boolean, 3], not [any, 3]"),
        (changed(shape=[None, "3"]), "input 'x' has shape [null, a string], not [any, 3]"),
        (changed(shape=[1] * 1000), "input 'x' has shape a list, not [any, 3]"),
        (changed(shape=[0, 3], data=[]), "the inputs hold no record"),
        (
            changed(shape=[17, 3], data=[1] * 51),
            "17 records in one request; the limit of this workload is 16",
        ),
        (changed(shape=[2**63, 3]), f"{2**63} records in one request; the limit of this workload is 16"),
        (without("data"), "input 'x' has no data"),
        (changed(data=None), "input 'x' has no data"),
        (changed(data="1,2,3"), "input 'x' has a string as data, not a list"),
        (changed(data={"0": 1}), "input 'x' has an object as data, not a list"),
        (changed(data=7), "input 'x' has 7 as data, not a list"),
        (changed(data=[1, 2]), "input 'x': shape [1, 3] takes 3 elements, data has 2"),
        (changed(data=[]), "input 'x': shape [1, 3] takes 3 elements, data has 0"),
        (changed(data=[1, 2, 3, 4]), "input 'x': shape [1, 3] takes 3 elements, data has 4"),
        (changed(data=[[1, 2]]), "input 'x': data is neither flat nor nested as its shape [1, 3]"),
        (changed(data=[[1, 2, 3], [4]]), "input 'x': data is neither flat nor nested as its shape [1, 3]"),
        (changed(data=[[1, 2, 3], 4]), "input 'x': data is neither flat nor nested as its shape [1, 3]"),
        (changed(data=[[[1, 2, 3]]]), "input 'x': data is neither flat nor nested as its shape [1, 3]"),
        (changed(data=[1, [2], 3]), "input 'x': element 1 is a list, not FP32"),
        (changed(data=[1, 2, "3"]), "input 'x': element 2 is a string, not FP32"),
        (changed(data=[1, 2, None]), "input 'x': element 2 is null, not FP32"),
        (changed(data=[True, 2, 3]), "input 'x': element 0 is a boolean, not FP32"),
        (changed(data=[1, False, 3.5]), "input 'x': element 1 is a boolean, not FP32"),
        (changed(data=[1, {}, 3]), "input 'x': element 1 is an object, not FP32"),
        (changed(data=[1, 1e39, 3]), "input 'x': element 1, 1e+39, is out of FP32's range"),
        (changed(parameters=[]), "parameters of input 'x' are a list, not an object"),
        (
            changed(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 12}),
            "input 'x': shared memory is not supported: send data, or binary data",
        ),
        ({"inputs": [GOOD], "id": 7}, '"id" is 7, not a string'),
        ({"inputs": [GOOD], "parameters": []}, "parameters of the request are a list, not an object"),
        (
            {"inputs": [GOOD], "parameters": {"binary_data_output": 1}},
            "binary_data_output is 1, not true or false",
        ),
        ({"inputs": [GOOD], "outputs": {}}, '"outputs" is an object, not a list'),
        ({"inputs": [GOOD], "outputs": 0}, '"outputs" is 0, not a list'),
        ({"inputs": [GOOD], "outputs": ["x_out"]}, 'every one of "outputs" is an object with a "name"'),
        ({"inputs": [GOOD], "outputs": [{}]}, 'every one of "outputs" is an object with a "name"'),
        ({"inputs": [GOOD], "outputs": [{"name": "y"}]}, "no such output: 'y'; the model has 'x_out'"),
        ({"inputs": [GOOD], "outputs": [{"name": "x_out"}] * 2}, "output 'x_out' is asked for twice"),
        (
            {"inputs": [GOOD], "outputs": [{"name": "x_out", "parameters": 1}]},
            "parameters of output 'x_out' are 1, not an object",
        ),
        (
            {"inputs": [GOOD], "outputs": [{"name": "x_out", "parameters": {"binary_data": "yes"}}]},
            "binary_data is a string, not true or false",
        ),
        (
            {"inputs": [GOOD], "outputs": [{"name": "x_out", "parameters": {"classification": 3}}]},
            "output 'x_out': classification is not supported: ask for the tensor",
        ),
        (
            {"inputs": [GOOD], "outputs": [{"name": "x_out", "parameters": {"shared_memory_region": "r"}}]},
            "output 'x_out': shared memory is not supported: send data, or binary data",
        ),
    ],
)
def test_a_request_is_refused_with_the_reason(document: Any, message: str) -> None:
    assert refusal(document, one("FP32")) == message


@pytest.mark.parametrize(
    ("datatype", "data", "message"),
    [
        ("INT8", [1, 2, 3.0], "element 2 is 3.0, not INT8"),
        ("INT8", [1, 2, 128], "element 2, 128, is out of INT8's range"),
        ("INT8", [True, 2, 3], "element 0 is a boolean, not INT8"),
        ("UINT64", [1, -1, 3], "element 1, -1, is out of UINT64's range"),
        ("INT64", [1, 2**63, 3], f"element 1, {2**63}, is out of INT64's range"),
        ("FP16", [1, 65520, 3], "element 1, 65520, is out of FP16's range"),
        ("BOOL", [True, False, 1], "element 2 is 1, not BOOL"),
        ("BOOL", [True, False, "true"], "element 2 is a string, not BOOL"),
        ("BYTES", ["a", "b", 3], "element 2 is 3, not BYTES"),
        ("BYTES", ["a", None, "c"], "element 1 is null, not BYTES"),
    ],
)
def test_elements_are_exactly_of_the_datatype(datatype: str, data: Any, message: str) -> None:
    assert (
        refusal({"inputs": [tensor(datatype, [1, 3], data=data)]}, one(datatype)) == f"input 'x': {message}"
    )


@pytest.mark.parametrize("value", [b"1e999", b"NaN", b"Infinity", b"-Infinity"])
def test_json_has_no_infinity_and_no_nan(value: bytes) -> None:
    text = b'{"inputs": [{"name": "x", "datatype": "FP64", "shape": [1, 1], "data": [' + value + b"]}]}"
    with pytest.raises(BadRequest, match="the request is not JSON"):
        parse_request(text, None, one("FP64", -1, 1), MAX_ROWS)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff",
        b"records=1",
        b'{"id": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 5_000,
        b"{} {}",
        b"{}\0",
    ],
)
def test_what_is_not_json_is_refused(text: bytes) -> None:
    with pytest.raises(BadRequest, match=r"^the request is not JSON: [^\n]+$"):
        parse_request(text, None, one("FP32"), MAX_ROWS)


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_binary_data_with_nan_or_infinity_is_refused(datatype: str, value: float) -> None:
    raw = np.array([1, value, 2], DTYPES[datatype]).tobytes()
    with pytest.raises(BadRequest, match=r"^input 'x' has NaN or infinite values$"):
        parse_raw(datatype, [1, 3], raw)


@pytest.mark.parametrize(
    ("datatype", "raw", "message"),
    [
        ("FP32", b"\0" * 11, "input 'x': shape [1, 3] of FP32 takes 12 bytes, binary_data_size is 11"),
        ("FP32", b"", "input 'x': shape [1, 3] of FP32 takes 12 bytes, binary_data_size is 0"),
        ("FP32", b"\0" * 13, "input 'x': shape [1, 3] of FP32 takes 12 bytes, binary_data_size is 13"),
        ("BOOL", b"\0\1\2", "input 'x': a BOOL is a byte of value 0 or 1"),
        ("BYTES", b"", "input 'x': shape [1, 3] takes 3 elements, binary data has 0"),
        ("BYTES", b"\0\0\0\0" * 2, "input 'x': shape [1, 3] takes 3 elements, binary data has 2"),
        ("BYTES", b"\0\0\0\0" * 4, "input 'x': shape [1, 3] takes 3 elements, binary data has more"),
        ("BYTES", b"\0\0\0\0\1\0\0", "input 'x': element 1 is longer than the binary data"),
        ("BYTES", b"\0\0\0\0\5\0\0\0abcd", "input 'x': element 1 is longer than the binary data"),
        ("BYTES", b"\xff\xff\xff\xff", "input 'x': element 0 is longer than the binary data"),
        ("BYTES", b"\0\0\0\0\1\0\0\0\xff\0\0\0\0", "input 'x': element 1 is not UTF-8"),
        ("BYTES", b"\3\0\0\0\xed\xa0\x80" * 3, "input 'x': element 0 is not UTF-8"),
    ],
)
def test_binary_data_that_does_not_add_up_is_refused(datatype: str, raw: bytes, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_raw(datatype, [1, 3], raw)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("size", "left"), [(13, 12), (-1, 12), (12.0, 12), (True, 12), ("12", 12), (10**18, 12), ([], 12)]
)
def test_a_binary_data_size_that_is_not_there_is_refused(size: Any, left: int) -> None:
    message = refusal(without_data(size), one("FP32"), b"\0" * 12)
    assert message.startswith("input 'x': binary_data_size is ")
    assert f"but {left} bytes of binary data are left" in message


def without_data(size: Any) -> dict[str, Any]:
    return {"inputs": [tensor("FP32", [1, 3], parameters={"binary_data_size": size})]}


def test_binary_data_without_its_header_is_refused() -> None:
    assert "Inference-Header-Content-Length" in refusal(without_data(12), one("FP32"))


def test_binary_data_that_no_input_takes_is_refused() -> None:
    assert refusal({"inputs": [GOOD]}, one("FP32"), b"\0").startswith("1 bytes after the inputs' data")
    assert refusal(without_data(12), one("FP32"), b"\0" * 16).startswith("4 bytes after the inputs' data")


def test_an_input_has_one_kind_of_data() -> None:
    both = changed(parameters={"binary_data_size": 12})
    assert refusal(both, one("FP32"), b"\0" * 12) == (
        "input 'x' has both data and binary_data_size: send one of them"
    )


@pytest.mark.parametrize("header", [b"", b"-1", b"+1", b"1e1", b"999", b"9" * 5000, b"\xb2", b"0x1", b"1_0"])
def test_a_header_length_that_is_none_is_refused(header: bytes) -> None:
    text = orjson.dumps({"inputs": [GOOD]})
    with pytest.raises(
        BadRequest, match=r"^Inference-Header-Content-Length is [^\n]{0,100}, not a number of bytes"
    ):
        parse_request(text, header, one("FP32"), MAX_ROWS)


def test_inputs_have_the_same_number_of_records() -> None:
    inputs = [*MANY_INPUTS[:2], tensor("FP32", [2], "c", data=[1, 2])]
    assert refusal({"inputs": inputs}, MANY) == "input 'c' has 2 records, others 1"


def test_the_missing_unknown_or_repeated_one_of_many_inputs_is_named() -> None:
    a, b, c = MANY_INPUTS
    assert refusal({"inputs": [a, c]}, MANY) == "input 'b' is missing"
    assert refusal({"inputs": [a, b, a]}, MANY) == "input 'a' is given twice"
    assert refusal({"inputs": [a, b, {**c, "name": "d"}]}, MANY) == (
        "no such input: 'd'; the model has 'a', 'b', 'c'"
    )


@pytest.mark.parametrize("datatype", ["FP32", "BOOL", "BYTES"])
def test_a_shape_of_nothing_that_no_memory_could_hold_is_refused(datatype: str) -> None:
    model = one(datatype, -1, -1, -1, -1)
    for shape in ([1, 0, 2**62, 2**62], [1, 0, 2**64 - 1, 1]):
        assert "has shape" in refusal({"inputs": [tensor(datatype, shape, data=[])]}, model)
        described = tensor(datatype, shape, parameters={"binary_data_size": 0})
        assert "has shape" in refusal({"inputs": [described]}, model, b"")


def test_sizes_that_multiply_to_more_than_a_machine_word_do_not_wrap_round() -> None:
    model = one("FP32", -1, -1, -1)
    shape = [4, 2**31, 2**31]  # 2**64 elements: nothing at all, for whoever counts in 64 bits
    assert "takes 18446744073709551616 elements, data has 0" in refusal(
        {"inputs": [tensor("FP32", shape, data=[])]}, model
    )
    described = tensor("FP32", shape, parameters={"binary_data_size": 0})
    assert "takes 73786976294838206464 bytes" in refusal({"inputs": [described]}, model, b"")


def test_an_input_without_records_is_refused() -> None:
    scalar = signature(TensorSpec("x", "FP32", np.dtype(np.float32), ()))
    assert "no axis that counts records" in refusal({"inputs": [tensor("FP32", [], data=[1])]}, scalar)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["x", "x_out", "FP32", "BYTES", "BF16", ""]) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
hostile_input = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("x") | anything,
        "datatype": st.just("FP32") | anything,
        "shape": st.just([1, 3]) | st.lists(st.integers(-1, 4), max_size=3) | anything,
        "data": st.lists(st.integers(0, 3), min_size=3, max_size=3) | anything,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.just(12) | anything})
        | anything,
    },
)
hostile = st.fixed_dictionaries(
    {"inputs": st.lists(hostile_input, max_size=2) | anything},
    optional={
        "id": anything,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_output": anything}) | anything,
        "outputs": st.lists(st.fixed_dictionaries({"name": anything, "parameters": anything}), max_size=2)
        | anything,
    },
)


@given(
    hostile | anything, st.none() | st.binary(max_size=16), st.sampled_from(["FP32", "BYTES", "BOOL", "INT8"])
)
@FUZZ
def test_whatever_is_sent_it_fits_or_is_refused_in_one_line(
    document: Any, binary: bytes | None, datatype: str
) -> None:
    try:
        got = parse(document, one(datatype), binary)
    except BadRequest as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 600
    else:
        array = got.inputs["x"]
        assert array.shape == (got.rows, 3)
        assert array.dtype == DTYPES[datatype]
        assert got.outputs in (((0, False),), ((0, True),))


@given(
    st.binary(max_size=100), st.none() | st.binary(max_size=3) | st.integers(0, 120).map(lambda n: b"%d" % n)
)
@FUZZ
def test_whatever_bytes_are_sent_they_are_refused(content: bytes, header: bytes | None) -> None:
    with pytest.raises(BadRequest):
        parse_request(content, header, one("FP32"), MAX_ROWS)
