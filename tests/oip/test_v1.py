"""The V1 form: instances in, predictions out; the signature says what their values are."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given

from splitserve.arrays import DTYPES, to_array
from splitserve.errors import InvalidInput
from splitserve.oip import v1
from splitserve.oip.messages import NO_DEADLINE, InferResponse, ModelMetadata
from splitserve.signature import TensorSpec, check_inputs
from splitserve.tensors import Tensor, encode_bytes, unpack
from tests.strategies import INTEGERS, JSON_ABLE, tensors


def model(*specs: TensorSpec) -> ModelMetadata:
    return ModelMetadata("penguins", ("1.2",), "splitserve_pair", specs, ())


def column(name: str, datatype: str) -> TensorSpec:
    return TensorSpec(name, datatype, ("batch", 1))


PENGUINS = model(column("year", "INT64"), column("bill", "FP64"), column("island", "BYTES"))
PAIRS = model(TensorSpec("features", "FP32", ("batch", 2)))
IMAGES = model(TensorSpec("image", "UINT8", ("batch", 2, 3)))
FILES = model(column("file", "BYTES"))


def decode(instances: Any, metadata: ModelMetadata) -> tuple[Tensor, ...]:
    """The tensors of a request, which fit the signature that they were made for."""
    inputs = v1.decode_request(json.dumps({"instances": instances}).encode(), metadata, "1.2").request.inputs
    check_inputs(metadata.inputs, inputs, widen=False)
    return inputs


def refusal(instances: Any, metadata: ModelMetadata) -> str:
    with pytest.raises(InvalidInput) as caught:
        decode(instances, metadata)
    return caught.value.message


def test_a_request_is_bound_to_the_version_and_deadline_given():
    """Model from the metadata; fields other than `instances` are ignored."""
    body = b'{"instances": [[1.0, 2.0]], "signature_name": "serving_default", "more": 5}'

    request = v1.decode_request(body, PAIRS, "1.2", deadline=12.5).request

    assert (request.model, request.version, request.deadline) == ("penguins", "1.2", 12.5)
    assert (request.outputs, request.parameters, request.id) == ((), {}, "")
    assert v1.decode_request(body, PAIRS, "1.2").request.deadline == NO_DEADLINE


@pytest.mark.parametrize(
    "instances",
    [
        [{"year": 2007, "bill": 39.1, "island": "Biscoe"}, {"island": "Dream", "bill": 40, "year": 2008}],
        [{"year": [2007], "bill": [39.1], "island": ["Biscoe"]}, {"island": ["Dream"], "bill": [40], "year": [2008]}],
        [[2007, 39.1, "Biscoe"], [2008, 40, "Dream"]],
        [[[2007], [39.1], ["Biscoe"]], [[2008], [40], ["Dream"]]],
    ],
    ids=["records", "records of lists", "rows", "rows of lists"],
)
def test_records_and_rows_are_the_same_request(instances):
    """By name in any order, or by position in the signature; a single value bare or in a list."""
    assert decode(instances, PENGUINS) == (
        Tensor("year", "INT64", (2, 1), np.array([2007, 2008], dtype="<i8").tobytes()),
        Tensor("bill", "FP64", (2, 1), np.array([39.1, 40.0], dtype="<f8").tobytes()),
        Tensor("island", "BYTES", (2, 1), encode_bytes([b"Biscoe", b"Dream"])),
    )


@pytest.mark.parametrize(
    "instances", [["a", "b"], [["a"], ["b"]], [{"file": "a"}, {"file": "b"}], [{"file": ["a"]}, {"file": ["b"]}]]
)
def test_a_model_with_one_column_accepts_bare_values(instances):
    """The values of its only input need no list and no name."""
    assert decode(instances, FILES) == (Tensor("file", "BYTES", (2, 1), encode_bytes([b"a", b"b"])),)


@pytest.mark.parametrize("instances", [[1.5, 2.5], [{"x": 1.5}, {"x": 2.5}]])
def test_an_input_without_inner_dimensions_accepts_bare_values(instances):
    """A row of (batch,) is one value."""
    raw = np.array([1.5, 2.5], dtype="<f4").tobytes()

    assert decode(instances, model(TensorSpec("x", "FP32", ("batch",)))) == (Tensor("x", "FP32", (2,), raw),)


@pytest.mark.parametrize(
    "instances",
    [[[1, 2], [3, 4]], [{"features": [1, 2]}, {"features": [3, 4]}], [[1.0, 2.0], {"features": [3, 4]}]],
)
def test_a_row_is_the_list_of_its_values(instances):
    """With a name or without; integers may stand for floats."""
    assert decode(instances, PAIRS) == (Tensor("features", "FP32", (2, 2), np.array([1, 2, 3, 4], dtype="<f4").tobytes()),)


@pytest.mark.parametrize("image", [[[1, 2, 3], [4, 5, 6]], [1, 2, 3, 4, 5, 6]])
@pytest.mark.parametrize("name", [None, "image"])
def test_an_image_is_nested_or_flat(image, name):
    """Row-major either way."""
    instance = image if name is None else {name: image}

    assert decode([instance, instance], IMAGES) == (Tensor("image", "UINT8", (2, 2, 3), bytes([1, 2, 3, 4, 5, 6] * 2)),)


@pytest.mark.parametrize(
    ("metadata", "shapes"),
    [
        (PENGUINS, [(0, 1), (0, 1), (0, 1)]),
        (PAIRS, [(0, 2)]),
        (IMAGES, [(0, 2, 3)]),
        (model(TensorSpec("text", "INT64", ("batch", "length"))), [(0, 0)]),
        (model(TensorSpec("image", "UINT8", ("batch", "height", "width", 3))), [(0, 0, 0, 3)]),
    ],
)
def test_no_instances_are_no_rows(metadata, shapes):
    """An empty batch is valid for every signature."""
    assert [tensor.shape for tensor in decode([], metadata)] == shapes


def test_a_free_dimension_is_that_of_the_first_instance():
    """The others have to agree."""
    metadata = model(TensorSpec("x", "UINT8", ("batch", "height", "width")))

    assert decode([[[1, 2], [3, 4], [5, 6]]], metadata) == (Tensor("x", "UINT8", (1, 3, 2), bytes([1, 2, 3, 4, 5, 6])),)
    assert decode([[], []], model(TensorSpec("x", "UINT8", ("batch", "length")))) == (Tensor("x", "UINT8", (2, 0), b""),)
    assert refusal([[[1, 2]], [[1], [2]]], metadata) == 'instance 1, input "x": the nested lists do not match shape [1, 2]'


@pytest.mark.parametrize("file", [{"b64": "/wA="}, {"file": {"b64": "/wA="}}, {"file": [{"b64": "/wA="}]}, [{"b64": "/wA="}]])
def test_b64_encodes_bytes_that_are_not_utf_8(file):
    """As TensorFlow Serving writes them, named or not."""
    assert decode([file], FILES) == (Tensor("file", "BYTES", (1, 1), encode_bytes([b"\xff\x00"])),)


@pytest.mark.parametrize("value", [{"b64": "!"}, {"b64": "YQ"}, {"b64": 5}, {"b64": None}, {"b64": "\N{EURO SIGN}"}])
def test_invalid_base64_is_refused(value):
    """Nothing is skipped or padded."""
    assert refusal([value], FILES) == 'input "file": expected text or {"b64": "base64 text"}'


@pytest.mark.parametrize("value", [{"other": "YQ=="}, {}])
def test_an_object_without_b64_is_refused(value):
    """Inside a record, where it cannot be a record itself."""
    assert refusal([{"file": value}], FILES) == 'input "file": expected text or {"b64": "base64 text"}'


def test_inputs_that_the_model_ignores_are_left_out():
    """By row and by column, whatever they hold. What it neither uses nor ignores is an error."""
    metadata = msgspec.structs.replace(PENGUINS, properties={"ignored_inputs": '["id"]'})
    row = {"year": 2007, "bill": 39.1, "island": "Biscoe"}
    columns = {**{name: [value] for name, value in row.items()}, "id": {}}

    by_column = v1.decode_request(json.dumps({"inputs": columns}).encode(), metadata, "").request.inputs

    assert decode([{**row, "id": [None]}], metadata) == by_column == decode([row], PENGUINS)
    assert 'unknown "size", expected "year"' in refusal([{**row, "id": 1, "size": 2}], metadata)


def test_null_means_the_same_as_in_v2():
    """NaN for floats, an empty string for text, an error for integers."""
    bill, island = decode([{"year": 2007, "bill": None, "island": None}], PENGUINS)[1:]

    assert np.isnan(to_array(bill)).all()
    assert unpack(island) == [b""]
    assert refusal([{"year": None, "bill": 1, "island": ""}], PENGUINS).startswith('input "year": element 0 is not a INT64')


@pytest.mark.parametrize("datatype", INTEGERS)
def test_an_integer_may_be_written_with_a_decimal_point(datatype):
    """pandas writes a column of integers so where one was missing; a fraction is refused."""
    (tensor,) = decode([100.0, 7], model(column("year", datatype)))

    assert unpack(tensor) == [100, 7]
    assert refusal([100.5], model(column("year", datatype))).startswith(f'input "year": element 0 is not a {datatype}')


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("INT8", 128),
        ("INT8", 128.0),
        ("INT64", 1e300),
        ("INT64", True),
        ("INT64", "1"),
        ("FP32", True),
        ("FP32", "1.5"),
        ("BOOL", "true"),
        ("BOOL", 2),
        ("BYTES", 5),
        ("INT64", {"b64": "YQ=="}),
    ],
)
def test_a_value_that_contradicts_the_signature_is_refused(datatype, value):
    """Named by input and element, as in the V2 form."""
    assert refusal([{"x": value}], model(column("x", datatype))).startswith(f'input "x": element 0 is not a {datatype}')


@pytest.mark.parametrize(
    ("instances", "metadata", "message"),
    [
        ([{"year": 1, "bill": 2}], PENGUINS, 'instance 0: missing "island"'),
        ([{}], PENGUINS, 'instance 0: missing "year", "bill", "island"'),
        (
            [[1, 2, "a"], {"year": 1, "bill": 2, "island": "a", "size": 3, "body": 4}],
            PENGUINS,
            'instance 1: unknown "body", "size", expected "year", "bill", "island"',
        ),
        ([{"b64": "YQ=="}], PENGUINS, "instance 0: expected an object or a list of 3 values, one for each input"),
        ([[1, 2]], PENGUINS, "instance 0: expected an object or a list of 3 values, one for each input"),
        ([[1, 2, "a", 4]], PENGUINS, "instance 0: expected an object or a list of 3 values, one for each input"),
        ([5], PENGUINS, "instance 0: expected an object or a list of 3 values, one for each input"),
        ([None], PENGUINS, "instance 0: expected an object or a list of 3 values, one for each input"),
        ([{"image": [[1, 2, 3]]}], IMAGES, 'instance 0, input "image": the nested lists do not match shape [2, 3]'),
        ([[[1, 2, 3], [4, 5]]], IMAGES, 'instance 0, input "image": the nested lists do not match shape [2, 3]'),
        ([[1, 2, 3, 4, 5]], IMAGES, 'instance 0: input "image": expected shape [2, 3], got 5 values'),
        ([[1, 2], [3]], PAIRS, 'instance 1: input "features": expected shape [2], got 1 values'),
        ([[1, 2], 3], PAIRS, 'instance 1, input "features": expected data to be a list, got a number'),
        ([{"features": None}], PAIRS, 'instance 0, input "features": expected data to be a list, got null'),
        ([[[1, 2], [3, 4]]], PAIRS, 'input "features": element 0 is not a FP32'),
    ],
)
def test_an_instance_that_does_not_fit_is_named(instances, metadata, message):
    """By its number, and what was expected of it."""
    assert refusal(instances, metadata) == message


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b"[[1, 2]]", b'{"instances": 5}', b'{"instances": null}', b'{"instances": {}}', b"{"]
)
def test_a_body_without_instances_is_refused(body):
    """Always as the caller's mistake."""
    with pytest.raises(InvalidInput, match=r"^the request body"):
        v1.decode_request(body, PAIRS, "1.2")


def test_bare_nan_is_accepted():
    """Python's json module writes it (D12)."""
    request = v1.decode_request(b'{"instances": [[NaN, 1]]}', PAIRS, "1.2").request

    assert list(map(repr, unpack(request.inputs[0]))) == ["nan", "1.0"]


def test_python_objects_are_accepted_as_instances():
    """The command line has them without a body."""
    request = v1.from_instances([[1, 2]], PAIRS)

    assert (request.version, request.inputs) == ("", decode([[1, 2]], PAIRS))


def predictions(*outputs: Tensor) -> Any:
    return json.loads(v1.encode_response(InferResponse("penguins", "1.2", outputs)))


PROBABILITIES = Tensor("probabilities", "FP32", (2, 2), np.array([0.25, 0.75, 1, 0], dtype="<f4").tobytes())
LABELS = Tensor("label", "BYTES", (2,), encode_bytes([b"Gentoo", b"Adelie"]))


def test_one_output_is_the_prediction():
    """A row's value, as nested as the shape says."""
    assert predictions(LABELS) == {"predictions": ["Gentoo", "Adelie"]}
    assert predictions(PROBABILITIES) == {"predictions": [[0.25, 0.75], [1.0, 0.0]]}


def test_several_outputs_are_one_object_per_row():
    """By output name, in the model's order."""
    answer = predictions(PROBABILITIES, LABELS)

    assert answer == {
        "predictions": [{"probabilities": [0.25, 0.75], "label": "Gentoo"}, {"probabilities": [1.0, 0.0], "label": "Adelie"}]
    }
    assert list(answer["predictions"][0]) == ["probabilities", "label"]


@pytest.mark.parametrize(
    "outputs", [(), (Tensor("a", "FP32", (0, 3), b""),), (Tensor("a", "FP32", (0, 3), b""), Tensor("b", "BYTES", (0,), b""))]
)
def test_no_rows_are_no_predictions(outputs):
    """An empty list, however many outputs there are."""
    assert predictions(*outputs) == {"predictions": []}


@given(tensors(JSON_ABLE, text_only=True).filter(lambda tensor: tensor.shape))
def test_predictions_are_nested_as_numpy_nests_them(tensor):
    """For any shape, sizes of 0 included; numbers that JSON lacks are null."""
    nested = np.array(unpack(tensor), dtype=DTYPES[tensor.datatype]).reshape(tensor.shape).tolist()

    def written(value: Any) -> Any:
        if isinstance(value, list):
            return [written(each) for each in value]
        if isinstance(value, bytes):
            return value.decode()
        return None if isinstance(value, float) and not np.isfinite(value) else value

    assert predictions(tensor) == {"predictions": written(nested)}


def test_rows_without_values_stay_rows():
    """Next to another output, each row has an empty list."""
    empty = Tensor("features", "FP32", (2, 0), b"")

    assert predictions(empty, LABELS) == {
        "predictions": [{"features": [], "label": "Gentoo"}, {"features": [], "label": "Adelie"}]
    }


def test_an_output_that_is_not_utf_8_is_refused_with_a_hint():
    """V1 has no form for it."""
    with pytest.raises(InvalidInput, match='output "label": an element is not UTF-8 text'):
        predictions(Tensor("label", "BYTES", (1,), encode_bytes([b"\xff"])))


@pytest.mark.parametrize("text", ["9007199254740992.0", "9007199254740993.0", "1234567890123456789.0"])
def test_a_float_beyond_exact_integers_is_refused(text: str) -> None:
    """As in V2: the integer that was meant is lost."""
    for instances in (b"[%b]", b'[{"year": %b}]', b"[[%b]]"):
        data = b'{"instances": %b}' % (instances % text.encode())

        with pytest.raises(InvalidInput, match='input "year": element 0 is not a INT64'):
            v1.decode_request(data, model(column("year", "INT64")), "1.2")


def test_an_integral_float_is_accepted_as_an_integer() -> None:
    """Up to 2^53 - 1 no other integer is rounded to it."""
    asked = v1.decode_request(b'{"instances": [9007199254740991.0]}', model(column("year", "INT64")), "1.2")

    assert unpack(asked.request.inputs[0]) == [2**53 - 1]
