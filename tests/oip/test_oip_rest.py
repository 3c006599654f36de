"""Bodies of the REST form: JSON, flat or nested, with binary tensors behind it. Names like I-11 are rows of CONFORMANCE.md."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from splitserve.arrays import DTYPES, to_array
from splitserve.errors import InvalidInput, SplitserveError
from splitserve.oip import rest
from splitserve.oip.messages import NO_DEADLINE, InferRequest, InferResponse, ModelMetadata, RequestedOutput
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor, encode_bytes, unpack
from tests.strategies import ALL, INTEGERS, JSON_ABLE, tensors

DEEP = 100_000

VALUES: dict[str, list[Any]] = {
    "BOOL": [True, False, False, True, True, False],
    "INT8": [-128, 127, 0, 1, 2, 3],
    "INT16": [-(2**15), 2**15 - 1, 0, 1, 2, 3],
    "INT32": [-(2**31), 2**31 - 1, 0, 1, 2, 3],
    "INT64": [-(2**63), 2**63 - 1, 2**53 + 1, 1, 2, 3],
    "UINT8": [0, 255, 1, 2, 3, 4],
    "UINT16": [0, 2**16 - 1, 1, 2, 3, 4],
    "UINT32": [0, 2**32 - 1, 1, 2, 3, 4],
    "UINT64": [0, 2**64 - 1, 2**53 + 1, 2, 3, 4],
    "FP32": [0.5, -1.0, 2, 3.4e38, 1e-45, -0.0],
    "FP64": [0.1, -1.0, 2, 1.7e308, 5e-324, -0.0],
    "BYTES": ["a", "", "é", "\u0000", "\N{GRINNING FACE}", '"\\'],
}


def entry(datatype: str = "FP32", shape: list[int] | None = None, name: str = "x", **fields: Any) -> dict[str, Any]:
    """One input of a request."""
    return {"name": name, "datatype": datatype, "shape": [1] if shape is None else shape, **fields}


def body(*inputs: Any, **fields: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **fields}).encode()


def decode(data: bytes, header_length: int | None = None) -> InferRequest:
    return rest.decode_request("penguins", "1.2", data, header_length=header_length)


def decode_binary(head: bytes, tail: bytes) -> InferRequest:
    return decode(head + tail, len(head))


def only_input(data: bytes) -> Tensor:
    (tensor,) = decode(data).inputs
    return tensor


def raw_of(datatype: str, values: list[Any]) -> bytes:
    """The bytes, encoded by numpy."""
    return (
        encode_bytes([value.encode() for value in values])
        if datatype == "BYTES"
        else np.array(values, dtype=DTYPES[datatype]).tobytes()
    )


def refusal(data: bytes, header_length: int | None = None) -> str:
    """The message of the refusal."""
    with pytest.raises(InvalidInput) as caught:
        decode(data, header_length)
    return caught.value.message


# --- requests: JSON

ODD_VALUES: list[Any] = [
    True,
    None,
    "a",
    "\ud800",
    1,
    1.0,
    1.5,
    -1,
    300,
    2**53 + 1,
    2**64,
    10**40,
    10**400,
    -(2**63) - 1,
    {},
    [1],
    "NaN",
]


@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
@pytest.mark.parametrize("datatype", [*VALUES, "FP16", "BF16", "NONE"])
def test_the_fast_path_decides_like_the_general_one(datatype, value, monkeypatch):
    """Also on text, and on values that are not of the datatype."""
    data = body(entry(datatype, [2], data=[*VALUES.get(datatype, [1])[:1], value]))

    def outcome() -> Any:
        try:
            return decode(data).inputs
        except InvalidInput as error:
            return error.message

    fast = outcome()
    monkeypatch.setattr(rest, "_decode_plain", lambda head: None)

    assert fast == outcome()


@pytest.mark.parametrize("datatype", sorted(set(VALUES) - {"BOOL"}))
def test_flat_lists_take_the_fast_path(datatype):
    found = rest._decode_plain(body(entry(datatype, [6], data=VALUES[datatype])))

    assert found is not None
    assert found[1] == [Tensor("x", datatype, (6,), raw_of(datatype, VALUES[datatype]))]


def test_the_tested_values_cover_every_datatype_with_a_json_form():
    """A new datatype must have a test value."""
    assert set(VALUES) == set(JSON_ABLE)


@pytest.mark.parametrize("datatype", VALUES)
def test_flat_and_nested_data_are_the_same_tensor(datatype):
    """Row-major either way (I-01), to the limits of the datatype (I-28)."""
    flat, nested = VALUES[datatype], [VALUES[datatype][:3], VALUES[datatype][3:]]

    found = [only_input(body(entry(datatype, [2, 3], data=data))) for data in (flat, nested)]

    assert found == [Tensor("x", datatype, (2, 3), raw_of(datatype, flat))] * 2


@pytest.mark.parametrize(
    ("shape", "data"),
    [([], [5]), ([0], []), ([0, 4], []), ([2, 0], []), ([2, 0], [[], []]), ([1, 1, 1], [[[5]]]), ([1, 1, 1], [5])],
)
def test_scalars_and_empty_tensors_have_data_too(shape, data):
    """One element without dimensions, no elements with one of size 0 (I-05, I-06)."""
    tensor = only_input(body(entry("INT32", shape, data=data)))

    assert tensor.shape == tuple(shape)
    assert unpack(tensor) == [5] * math.prod(shape)


def test_a_request_has_outputs_id_and_parameters():
    """Model and version from the path, the rest from the body."""
    data = body(
        entry(data=[1]),
        id="r1",
        parameters={"priority": 5, "rate": 0.5, "name": "a", "fast": True},
        outputs=[{"name": "label"}, {"name": "probabilities", "parameters": {"binary_data": True}}],
    )

    request = rest.decode_request("penguins", "1.2", data, deadline=12.5)

    assert (request.model, request.version, request.id, request.deadline) == ("penguins", "1.2", "r1", 12.5)
    assert request.parameters == {"priority": 5, "rate": 0.5, "name": "a", "fast": True}
    assert request.outputs == (RequestedOutput("label"), RequestedOutput("probabilities", {"binary_data": True}))


@pytest.mark.parametrize(
    "fields", [{}, {"id": None, "parameters": None, "outputs": None}, {"id": "", "parameters": {}, "outputs": []}]
)
def test_absent_null_and_empty_mean_the_same(fields):
    """No id (I-23, D6), no parameters, all outputs."""
    request = decode(body(entry(data=[1], parameters=fields.get("parameters")), **fields))

    assert (request.id, request.parameters, request.outputs, request.deadline) == ("", {}, (), NO_DEADLINE)


def test_unknown_json_fields_are_ignored():
    """Unknown fields at every level (I-30), unknown parameters (D15)."""
    known = entry(data=[1])
    data = body({**known, "layout": "NCHW"}, model_name="other", outputs=[{"name": "y", "x": 1}], parameters={"triton_x": True})

    assert decode(data).inputs == decode(body(known)).inputs


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_nan_and_infinity_may_be_bare_or_strings(datatype, number):
    """Python's and RapidJSON's writers put the bare token, careful clients the same as text (D12)."""
    expected = raw_of(datatype, [1.5, float(number)])

    for written in (number, f'"{number}"'):
        text = f'{{"inputs": [{{"name": "x", "datatype": "{datatype}", "shape": [2], "data": [1.5, {written}]}}]}}'
        assert only_input(text.encode()).raw == expected


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_null_is_nan_for_floats(datatype):
    """pandas writes missing numbers like this (D12)."""
    assert list(map(repr, unpack(only_input(body(entry(datatype, [2], data=[None, 1])))))) == ["nan", "1.0"]


def test_null_is_empty_for_bytes():
    """A preprocessor treats it as missing where the column allows missing values."""
    assert only_input(body(entry("BYTES", [2], data=[None, "a"]))).raw == encode_bytes([b"", b"a"])


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        *((datatype, None) for datatype in (*INTEGERS, "BOOL")),
        *((datatype, "NaN") for datatype in (*INTEGERS, "BOOL")),
        *((datatype, 1.5) for datatype in INTEGERS),  # I-12
        *((datatype, True) for datatype in (*INTEGERS, "FP32", "FP64")),  # I-13
        *((datatype, "1") for datatype in (*INTEGERS, "FP32", "FP64", "BOOL")),  # I-14
        *((datatype, {"a": 1}) for datatype in VALUES),
        ("INT8", 128),  # I-11
        ("INT8", -129),
        ("UINT8", 256),
        ("UINT8", -1),
        ("INT32", 2**31),
        ("INT64", 2**63),
        ("UINT64", 2**64),
        ("UINT64", -1),
        ("FP32", 1e39),
        ("FP64", 10**400),
        ("FP32", "nan"),
        ("FP32", "inf"),
        ("FP32", ""),
        ("BOOL", 2),
        ("BOOL", "true"),
        ("BOOL", "false"),
        ("BOOL", 1.0),
        ("BYTES", 1),  # I-16
        ("BYTES", True),
        ("BYTES", 1.5),
    ],
)
def test_a_value_of_another_type_is_refused(datatype, value):
    """Nothing is truncated, wrapped or guessed; the message names the input, the element and the datatype."""
    message = refusal(body(entry(datatype, [3], data=[VALUES[datatype][0], value, VALUES[datatype][1]])))

    assert message.startswith(f'input "x": element 1 is not a {datatype}')


def test_a_number_beyond_doubles_is_refused():
    """Also when another number in the body makes it no strict JSON."""
    for data in ("[1, 1e999]", "[NaN, 1e999]"):
        refusal(f'{{"inputs": [{{"name": "x", "datatype": "FP64", "shape": [2], "data": {data}}}]}}'.encode())


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_have_no_json_form(datatype):
    """The message says what to do (I-10)."""
    assert refusal(body(entry(datatype, data=[1.0]))) == f'input "x": {datatype} has no JSON form, send it as binary data'


@pytest.mark.parametrize("datatype", ["fp32", "STRING", "", "FLOAT"])
def test_an_unknown_datatype_is_refused(datatype):
    """Names are exact (I-08)."""
    assert refusal(body(entry(datatype, data=[1.0]))).startswith(f'input "x": unknown datatype "{datatype}"')


@pytest.mark.parametrize(
    ("shape", "data", "message"),
    [
        ([2, 2], [1, 2, 3], "shape [2, 2] needs 4 elements, got 3"),
        ([2, 2], [1, 2, 3, 4, 5], "shape [2, 2] needs 4 elements, got 5"),
        ([], [], "shape [] needs 1 elements, got 0"),
        ([], [1, 2], "shape [] needs 1 elements, got 2"),
        ([2, 2], [[1, 2], [3]], "the nested lists do not match shape [2, 2]"),
        ([2, 2], [[1, 2], 3], "the nested lists do not match shape [2, 2]"),
        ([2, 2], [[1, 2, 3, 4]], "the nested lists do not match shape [2, 2]"),
        ([2, 2], [[1], [2], [3], [4]], "the nested lists do not match shape [2, 2]"),
        ([4], [[1, 2], [3, 4]], "the nested lists do not match shape [4]"),
        ([2, 3], [[1, 2], [3, 4], [5, 6]], "the nested lists do not match shape [2, 3]"),
        ([2, 2, 1], [[1, 2], [3, 4]], "the nested lists do not match shape [2, 2, 1]"),
        ([2], [[1], [2]], "element 0 is not a FP32"),
        ([], [[1]], "element 0 is not a FP32"),
        ([2], {"0": 1}, "expected data to be a list, got an object"),
        ([2], "12", "expected data to be a list, got a string"),
        ([2], 12, "expected data to be a list, got a number"),
        ([2], None, "expected data to be a list, got null"),
        ([2], True, "expected data to be a list, got a boolean"),
    ],
)
def test_data_that_contradicts_the_shape_is_refused(shape, data, message):
    """Ragged, too few, too many (I-02), nested otherwise than the shape says though the count is right (I-03)."""
    assert refusal(body(entry("FP32", shape, data=data))) == f'input "x": {message}'


@pytest.mark.parametrize("size", [-1, 1.5, 2.0, "1", None, True, [1]])
def test_a_dimension_is_a_non_negative_integer(size):
    """Not negative, no fraction, no text (I-04)."""
    refusal(body(entry("FP32", [size], data=[1.0])))


@pytest.mark.parametrize(
    "shape", [[16, 2**60 + 2], [2**31 + 1], [2**70], [1] * 17], ids=["wraps", "large", "beyond int64", "rank"]
)
@pytest.mark.parametrize("fields", [{"data": [1] * 32}, {"parameters": {"binary_data_size": 0}}], ids=["data", "binary"])
def test_an_impossible_shape_is_refused(shape, fields):
    """Before any allocation, by arithmetic that does not wrap (I-07), for every form of the elements."""
    with pytest.raises(InvalidInput, match='input "x"'):
        decode(body(entry("FP32", shape, **fields)))


def test_a_dimension_beyond_int64_is_refused():
    """A shape with a 0 has no elements, and still each dimension must be an int64 for the next stage."""
    with pytest.raises(SplitserveError):
        decode(body(entry("FP32", [0, 2**70], data=[])))


@pytest.mark.parametrize("fields", [{}, {"parameters": {"other": 1}}])
def test_an_input_without_elements_is_refused(fields):
    """Neither `data` nor binary data."""
    assert refusal(body(entry(**fields))) == 'input "x": expected data or binary_data_size, got neither'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b"{}",
        b"5",
        b"{",
        b'{"inputs": [',
        b"{'inputs': []}",
        b'{"inputs": null}',
        b'{"inputs": {}}',
        b'{"inputs": [null]}',
        b'{"inputs": [{}]}',
        b'{"inputs": [[]]}',
        b'{"inputs": [{"shape": [1], "datatype": "FP32", "data": [1]}]}',
        b'{"inputs": [{"name": "x", "datatype": "FP32", "data": [1]}]}',
        b'{"inputs": [{"name": "x", "shape": [1], "data": [1]}]}',
        b'{"inputs": [{"name": 5, "shape": [1], "datatype": "FP32", "data": [1]}]}',
        b'{"inputs": [], "outputs": {}}',
        b'{"inputs": [], "outputs": [{}]}',
        b'{"inputs": [], "outputs": ["label"]}',
        b'{"inputs": [], "id": 5}',
        b'{"inputs": [], "id": ["a"]}',
        b'{"inputs": []} trailing',
        b'{"inputs": []}{"inputs": []}',
        b'{"inputs": [], "x": 01}',
        '{"inputs": []}'.encode("utf-16"),
        b'\xef\xbb\xbf{"inputs": []}',
        b'{"inputs": [], "id": "\xff"}',
        # The same once more where the bare token makes the body no strict JSON.
        b"NaN",
        b"[NaN]",
        b'{"x": NaN}',
        b'{"inputs": [NaN]}',
        b'{"inputs": NaN}',
        b'{"inputs": [], "id": NaN}',
        b'{"inputs": [], "x": NaN} trailing',
        b'{"inputs": [], "x": NaN',
        b'{"inputs": [], "x": Nan}',
        b'{"inputs": [], "x": [-NaN]}',
        '{"inputs": [], "x": NaN}'.encode("utf-16"),
        b'\xef\xbb\xbf{"inputs": [], "x": NaN}',
        b'{"inputs": [], "id": "\xff", "x": NaN}',
    ],
)
def test_a_body_that_is_not_a_request_is_refused(data):
    """Always as the caller's mistake (I-23, I-25), with a message about the body."""
    assert refusal(data).startswith(("the request body", "Inference-Header-Content-Length"))


@pytest.mark.parametrize("level", ["request", "input", "output"])
@pytest.mark.parametrize("parameters", [[], "a", 5, {"a": None}, {"a": [1]}, {"a": {"b": 1}}])
def test_parameters_are_text_numbers_and_booleans(level, parameters):
    """By name, at every level (I-24, D15)."""
    data = {
        "request": body(entry(data=[1]), parameters=parameters),
        "input": body(entry(data=[1], parameters=parameters)),
        "output": body(entry(data=[1]), outputs=[{"name": "y", "parameters": parameters}]),
    }[level]

    assert "parameters" in refusal(data)


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1])
@pytest.mark.parametrize("level", ["request", "output"])
def test_a_parameter_beyond_int64_is_refused(level, number):
    """The next stage gets it as int64 or uint64 (D16): a larger number is the caller's mistake, not an accident there."""
    wanted = [{"name": "y", "parameters": {"a": number} if level == "output" else {}}]

    refusal(body(entry(data=[1]), outputs=wanted, parameters={"a": number} if level == "request" else {}))


@pytest.mark.parametrize(
    "data",
    [
        b"[" * DEEP,
        b'{"x": ' + b"[" * DEEP,
        b'{"x": ' * DEEP,
        b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": ' + b"[" * DEEP + b"]" * DEEP + b"}]}",
        b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [NaN, ' + b"[" * DEEP + b"]" * DEEP + b"]}]}",
        b'{"inputs": [], "x": [NaN, ' + b"[" * DEEP,
        b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": ' + b"[" * 200 + b"1" + b"]" * 200 + b"}]}",
    ],
    ids=["lists", "unknown", "objects", "data", "data with NaN", "unknown with NaN", "200 deep"],
)
def test_deep_nesting_is_an_error_not_a_crash(data):
    """At any depth and place (I-27)."""
    refusal(data)


@pytest.mark.parametrize("text", ["\\ud800", "\\udc00", "a\\ud83dz"])
@pytest.mark.parametrize(
    "template",
    [
        '{"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["%s"]}]}',
        '{"inputs": [{"name": "%s", "shape": [1], "datatype": "FP32", "data": [1]}]}',
        '{"inputs": [], "id": "%s"}',
        '{"inputs": [], "parameters": {"a": "%s"}}',
        # The bare token makes these no strict JSON.
        '{"x": NaN, "inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["%s"]}]}',
        '{"x": NaN, "inputs": [{"name": "%s", "shape": [1], "datatype": "FP32", "data": [1]}]}',
        '{"x": NaN, "inputs": [], "id": "%s"}',
        '{"x": NaN, "inputs": [], "parameters": {"%s": 1}}',
        '{"x": NaN, "inputs": [], "outputs": [{"name": "%s"}]}',
    ],
)
def test_a_lone_surrogate_is_refused(template, text):
    """UTF-8 cannot encode it (I-18): accepted, it would break the next stage's message or our answer."""
    message = refusal((template % text).encode())

    message.encode()


def test_a_surrogate_written_as_bytes_is_refused():
    """It is not valid UTF-8, in any part of the body."""
    for tail in (b"", b', "x": NaN'):
        refusal(b'{"inputs": [], "id": "\xed\xa0\x80"' + tail + b"}")


def test_plain_json_accepts_bare_nan_and_infinity():
    """The V1 form decodes without a type."""
    assert rest.decode_json(b'{"a": [1, "b"]}') == {"a": [1, "b"]}
    assert repr(rest.decode_json(b"[NaN, Infinity, -Infinity]")) == "[nan, inf, -inf]"


# --- requests: binary data

NUMBERS = np.array([1.5, -2.0], dtype="<f4").tobytes()
WORDS = encode_bytes([b"\xff", b""])


def binary(datatype: str, shape: list[int], size: Any, name: str = "x", **fields: Any) -> dict[str, Any]:
    return entry(datatype, shape, name, parameters={"binary_data_size": size}, **fields)


def test_binary_tensors_follow_the_json_in_order():
    """Each takes its size of the tail, between them may be inputs in JSON (B-01, B-02)."""
    head = body(binary("FP32", [2], 8, "a"), entry("INT8", [2], "b", data=[1, 2]), binary("BYTES", [2], 9, "c"))

    request = decode_binary(head, NUMBERS + WORDS)

    assert request.inputs == (
        Tensor("a", "FP32", (2,), NUMBERS),
        Tensor("b", "INT8", (2,), b"\x01\x02"),
        Tensor("c", "BYTES", (2,), WORDS),
    )


@pytest.mark.parametrize("datatype", ALL)
def test_every_datatype_may_be_binary(datatype):
    """FP16 and BF16 only so."""
    tail = encode_bytes([b"a"]) if datatype == "BYTES" else bytes(8)

    assert decode_binary(body(binary(datatype, [1], len(tail))), tail).inputs == (Tensor("x", datatype, (1,), tail),)


def test_a_header_length_that_is_the_whole_body_is_plain_json():
    """perf_analyzer sends it so (B-05)."""
    data = body(entry(data=[1]))

    assert decode(data, len(data)) == decode(data)


def test_an_empty_tensor_may_be_binary():
    """Nothing follows (B-10), with the header or without."""
    data = body(binary("FP32", [0, 4], 0))

    assert decode(data) == decode(data, len(data))
    assert only_input(data) == Tensor("x", "FP32", (0, 4), b"")


@pytest.mark.parametrize("difference", [-10_000, -1, 1, 10_000])
def test_a_header_length_that_does_not_end_the_json_is_refused(difference):
    """Before the body, beyond it, in the middle of the JSON (B-07)."""
    data = body(entry(data=[1]))

    refusal(data, len(data) + difference)


@pytest.mark.parametrize("length", [0, -1, 10**12])
def test_a_header_length_outside_the_body_is_named(length):
    """The message has both numbers."""
    assert refusal(b"{}", length) == f"Inference-Header-Content-Length is {length}, the body has 2 bytes"


@pytest.mark.parametrize("size", [-1, 9, 10**30, 8.0, "8", True])
def test_a_binary_size_that_the_body_does_not_have_is_refused(size):
    """Negative, more than is left, no whole number (B-08)."""
    head = body(binary("FP32", [2], size))

    assert refusal(head + NUMBERS, len(head)) == f'input "x": binary_data_size is {size}, 8 bytes remain of the body'


def test_bytes_after_the_last_tensor_are_refused():
    """The sizes account for the whole tail (B-08)."""
    head = body(binary("FP32", [2], 8))

    assert refusal(head + NUMBERS + b"abc", len(head)) == "3 bytes of the body remain after the binary tensors"


def test_binary_data_that_belongs_to_no_tensor_is_refused():
    """With inputs in JSON only, no tensor can claim it."""
    head = body(entry(data=[1]))

    assert refusal(head + b"abc", len(head)) == "3 bytes of the body remain after the binary tensors"


def test_data_and_binary_data_exclude_each_other():
    """Otherwise one of them would be ignored (B-09)."""
    head = body(binary("FP32", [2], 8, data=[1.0, 2.0]))

    assert refusal(head + NUMBERS, len(head)) == 'input "x": expected data or binary_data_size, got both'


def test_an_empty_body_is_refused():
    """There is no request in it."""
    assert refusal(b"") == "the request body is empty, expected JSON"


# --- responses

ASKED = InferRequest("penguins", ())


def encode(*outputs: Tensor, asked: InferRequest = ASKED, **fields: Any) -> dict[str, Any]:
    """The JSON of an answer that has no binary tensors."""
    data, header_length = rest.encode_response(InferResponse("penguins", "1.2", outputs, **fields), asked)
    assert header_length is None
    return json.loads(data)


def as_json(tensor: Tensor) -> list[Any]:
    """The elements as numpy has them, text decoded."""
    elements = to_array(tensor).ravel().tolist()
    return [element.decode() if isinstance(element, bytes) else element for element in elements]


@given(tensors(JSON_ABLE, text_only=True))
def test_a_json_request_gets_a_json_answer(tensor):
    """Each value is the same after JSON -> tensor -> JSON, but for numbers that JSON lacks."""
    sent = as_json(tensor)
    data = body(entry(tensor.datatype, list(tensor.shape), tensor.name, data=sent))

    request = decode(data)
    (output,) = encode(*request.inputs)["outputs"]

    assert (output["name"], output["datatype"], output["shape"]) == (tensor.name, tensor.datatype, list(tensor.shape))
    is_lost = [isinstance(value, float) and not math.isfinite(value) for value in sent]
    assert list(map(repr, output["data"])) == [repr(None if lost else value) for value, lost in zip(sent, is_lost, strict=True)]
    assert output.get("parameters", {}).get("nonfinite_values", 0) == sum(is_lost)


@given(tensors(JSON_ABLE, text_only=True))
def test_nested_data_is_the_flat_data(tensor):
    """Nested as numpy nests them, the elements are the same tensor."""
    flat = body(entry(tensor.datatype, list(tensor.shape), tensor.name, data=as_json(tensor)))
    array = to_array(tensor)
    nested = np.vectorize(bytes.decode, otypes=[object])(array) if tensor.datatype == "BYTES" else array

    data = nested.tolist() if tensor.shape else [nested.tolist()]

    assert decode(body(entry(tensor.datatype, list(tensor.shape), tensor.name, data=data))) == decode(flat)


def test_an_answer_names_the_model_and_version():
    """Model, the version that was really used (D8), the caller's id, parameters."""
    answer = encode(Tensor("y", "INT8", (2,), b"\x01\x02"), id="r1", parameters={"cost": 0.5})

    assert answer == {
        "model_name": "penguins",
        "model_version": "1.2",
        "id": "r1",
        "parameters": {"cost": 0.5},
        "outputs": [{"name": "y", "datatype": "INT8", "shape": [2], "data": [1, 2]}],
    }


def test_absent_fields_of_an_answer_are_omitted():
    """No null, no empty id, no empty parameters (D6, D7)."""
    assert encode(Tensor("y", "INT8", (2,), b"\x01\x02")).keys() == {"model_name", "model_version", "outputs"}


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_nan_and_infinity_are_null_and_counted(datatype):
    """Strict parsers cannot read the bare tokens (D11)."""
    tensor = Tensor("y", datatype, (4,), np.array([np.nan, 1.5, np.inf, -np.inf], dtype=DTYPES[datatype]).tobytes())

    (output,) = encode(tensor)["outputs"]

    assert output["data"] == [None, 1.5, None, None]
    assert output["parameters"] == {"nonfinite_values": 3}


def test_the_largest_integers_are_exact():
    """They are not converted to doubles (I-28)."""
    tensors_ = [Tensor("u", "UINT64", (1,), b"\xff" * 8), Tensor("i", "INT64", (1,), b"\x00" * 7 + b"\x80")]

    data, _ = rest.encode_response(InferResponse("m", "1", tuple(tensors_)), ASKED)

    assert b"[18446744073709551615]" in data
    assert b"[-9223372036854775808]" in data


FLOATS = Tensor("floats", "FP32", (2,), NUMBERS)
TEXT = Tensor("text", "BYTES", (2,), WORDS)


@pytest.mark.parametrize(
    ("parameters", "outputs", "is_binary"),
    [
        ({}, {}, []),
        ({"binary_data_output": True}, {}, ["floats", "text"]),
        ({"binary_data_output": False}, {}, []),
        ({"binary_data_output": 1}, {}, []),
        ({}, {"floats": {"binary_data": True}, "text": {}}, ["floats"]),
        ({}, {"floats": {}, "text": {"binary_data": True}}, ["text"]),
        ({}, {"floats": {"binary_data": 1}, "text": {"binary_data": "true"}}, []),
        ({"binary_data_output": True}, {"floats": {"binary_data": False}, "text": {}}, ["text"]),
        ({"binary_data_output": False}, {"floats": {"binary_data": True}, "text": {}}, ["floats"]),
        ({"binary_data_output": True}, {"floats": {"other": False}, "text": {}}, ["floats", "text"]),
    ],
)
def test_an_output_is_binary_on_request(parameters, outputs, is_binary):
    """By its own parameter, or else by the request's (B-03, B-04)."""
    asked = InferRequest(
        "m", (), parameters=parameters, outputs=tuple(RequestedOutput(name, facts) for name, facts in outputs.items())
    )

    assert [name for name in ("floats", "text") if rest.is_binary_requested(asked, name)] == is_binary


def test_binary_outputs_follow_the_json_in_order():
    """With their sizes in it and no data (B-03); an empty one has size 0 (B-10)."""
    asked = InferRequest(
        "m", (), parameters={"binary_data_output": True}, outputs=(RequestedOutput("json", {"binary_data": False}),)
    )
    outputs = (FLOATS, Tensor("json", "INT8", (1,), b"\x07"), Tensor("empty", "FP16", (0,), b""), TEXT)

    data, header_length = rest.encode_response(InferResponse("penguins", "1.2", outputs), asked)

    assert header_length is not None
    assert data[header_length:] == NUMBERS + WORDS
    assert json.loads(data[:header_length])["outputs"] == [
        {"name": "floats", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}},
        {"name": "json", "datatype": "INT8", "shape": [1], "data": [7]},
        {"name": "empty", "datatype": "FP16", "shape": [0], "parameters": {"binary_data_size": 0}},
        {"name": "text", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": 9}},
    ]


@given(tensors())
def test_a_binary_answer_is_a_binary_request(tensor):
    """The same form in both directions, for every datatype and bit pattern."""
    asked = InferRequest("m", (), parameters={"binary_data_output": True})

    data, header_length = rest.encode_response(InferResponse("m", "1", (tensor,)), asked)
    message = json.loads(data[:header_length])
    head = json.dumps({"inputs": message["outputs"]}).encode()

    assert decode_binary(head, data[header_length:]).inputs == (tensor,)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (TEXT, 'output "text": an element is not UTF-8 text, request binary_data for it'),
        (Tensor("y", "FP16", (1,), bytes(2)), 'output "y": FP16 has no JSON form, request binary_data for it'),
        (Tensor("y", "BF16", (1,), bytes(2)), 'output "y": BF16 has no JSON form, request binary_data for it'),
    ],
)
def test_an_output_without_a_json_form_is_refused_with_a_hint(tensor, message):
    """The hint is the way out (I-10, I-17)."""
    with pytest.raises(InvalidInput) as caught:
        encode(tensor)

    assert caught.value.message == message


def test_metadata_has_the_protocols_shapes():
    """-1 where a size varies, the batch included; properties only if there are any."""
    spec = TensorSpec("age", "FP64", ("batch", 1))
    metadata = ModelMetadata("penguins", ("1.1",), "splitserve_pair", (spec,), (TensorSpec("label", "BYTES", ("batch",)),))
    document = {
        "name": "penguins",
        "versions": ["1.1"],
        "platform": "splitserve_pair",
        "inputs": [{"name": "age", "datatype": "FP64", "shape": [-1, 1]}],
        "outputs": [{"name": "label", "datatype": "BYTES", "shape": [-1]}],
    }

    found = json.loads(json.dumps(rest.encode_metadata(metadata)))
    with_properties = ModelMetadata("penguins", (), "p", (), (), {"trained": "today"})

    assert found == document
    assert rest.encode_metadata(with_properties)["properties"] == {"trained": "today"}


@pytest.mark.parametrize("text", ["9007199254740992.0", "9007199254740993.0", "1234567890123456789.0", "-9007199254740993.0"])
def test_a_float_beyond_exact_integers_is_refused(text):
    """2^53 + 1 and 2^53 are the same double, so the integer that was meant is unknown."""
    data = b'{"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [%b]}]}' % text.encode()

    assert refusal(data).startswith('input "x": element 0 is not a INT64')


@pytest.mark.parametrize("number", [2**53 - 1, 1 - 2**53])
def test_an_integral_float_is_accepted_as_an_integer(number):
    """JSON has one kind of number; 1.0 is the integer 1."""
    data = b'{"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [%d.0]}]}' % number

    assert unpack(only_input(data)) == [number]


@pytest.mark.parametrize("value", [1, 0, "true", 1.0])
def test_a_parameter_of_the_binary_data_extension_is_a_boolean(value):
    """If another type were ignored, the form of the answer would change silently."""
    shown = json.dumps(value)

    whole = refusal(body(entry(data=[1.0]), parameters={"binary_data_output": value}))
    one = refusal(body(entry(data=[1.0]), outputs=[{"name": "y", "parameters": {"binary_data": value}}]))

    assert whole == f'parameter "binary_data_output": expected a boolean, got {shown}'
    assert one == f'output "y": parameter "binary_data": expected a boolean, got {shown}'
