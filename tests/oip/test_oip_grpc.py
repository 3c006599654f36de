"""Requests and answers over gRPC: protobuf messages <-> our objects, byte for byte what other clients send and read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as triton

from splitserve.api.inference import inference_pb2 as pb
from splitserve.arrays import DTYPES
from splitserve.errors import InvalidInput
from splitserve.oip import protobuf
from splitserve.oip.messages import (
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelState,
    RequestedOutput,
    ServerMetadata,
)
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor, encode_bytes, validate
from tests.strategies import MAX_ELEMENTS, names, python_values, tensors

FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Source: Open Inference Protocol gRPC, ``InferTensorContents``."""

REQUEST = InferRequest(
    model="penguins",
    version="1.2",
    id="r1",
    parameters={"priority": 5},
    inputs=(
        Tensor("age", "FP32", (2, 1), np.array([1.5, -2.0], dtype="<f4").tobytes()),
        Tensor("island", "BYTES", (2, 1), encode_bytes([b"Dream", b""])),
    ),
    outputs=(RequestedOutput("label", {"binary_data": True}),),
)
REQUEST_BYTES = bytes.fromhex(
    "0a0870656e6775696e73 1203312e32 1a027231"  # model_name, model_version, id
    "220e0a087072696f7269747912021005"  # parameters: priority, int64_param 5
    "2a0f0a03616765120446503332 1a020201"  # inputs: age FP32 [2, 1]
    "2a130a0669736c616e6412054259544553 1a020201"  # island BYTES [2, 1]
    "321a0a056c6162656c12110a0b62696e6172795f6461746112020801"  # outputs: label, binary_data, bool_param true
    "3a080000c03f000000c0"  # raw_input_contents: 1.5, -2
    "3a0d05000000447265616d00000000"  # "Dream", ""
)

RESPONSE = InferResponse(
    model="penguins",
    version="1.2",
    id="r1",
    parameters={"cost": 0.5},
    outputs=(
        Tensor("probabilities", "FP32", (2, 2), np.array([0.25, 0.75, 1, 0], dtype="<f4").tobytes()),
        Tensor("label", "BYTES", (2,), encode_bytes([b"Gentoo", b"Adelie"])),
    ),
)
RESPONSE_BYTES = bytes.fromhex(
    "0a0870656e6775696e73 1203312e32 1a027231"  # model_name, model_version, id
    "22110a04636f7374120921000000000000e03f"  # parameters: cost, double_param 0.5
    "2a190a0d70726f626162696c6974696573120446503332 1a020202"  # outputs: probabilities FP32 [2, 2]
    "2a110a056c6162656c12054259544553 1a0102"  # label BYTES [2]
    "32100000803e0000403f0000803f00000000"  # raw_output_contents: 0.25, 0.75, 1, 0
    "32140600000047656e746f6f060000004164656c6965"  # "Gentoo", "Adelie"
)

PARAMETERS = [
    (True, "bool_param"),
    (False, "bool_param"),
    (0, "int64_param"),
    (-(2**63), "int64_param"),
    (2**63 - 1, "int64_param"),
    (2**63, "uint64_param"),
    (2**64 - 1, "uint64_param"),
    (0.5, "double_param"),
    (1.0, "double_param"),
    ("text", "string_param"),
    ("", "string_param"),
]


def parameters() -> st.SearchStrategy[dict[str, object]]:
    value = st.one_of(st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text(max_size=5))
    return st.dictionaries(st.text(max_size=5), value, max_size=3)


def requests() -> st.SearchStrategy[InferRequest]:
    return st.builds(
        InferRequest,
        model=st.text(max_size=5),
        inputs=st.lists(tensors(), max_size=3).map(tuple),
        version=st.text(max_size=5),
        outputs=st.lists(st.builds(RequestedOutput, names(), parameters()), max_size=2).map(tuple),
        id=st.text(max_size=5),
        parameters=parameters(),
        deadline=st.just(12.5),
    )


def typed_request(datatype: str, shape: tuple[int, ...] = (1,), **contents: list[object]) -> pb.ModelInferRequest:
    """A request with one input, "age", as typed contents."""
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="age", datatype=datatype, shape=shape, contents=pb.InferTensorContents(**contents)
    )
    return pb.ModelInferRequest(model_name="penguins", inputs=[tensor])


@given(requests())
def test_a_request_is_the_same_after_the_wire(request_):
    """Every tensor bit for bit, every parameter; the deadline travels in the transport."""
    data = protobuf.encode_request(request_).SerializeToString()

    assert protobuf.decode_request(protobuf.parse(pb.ModelInferRequest, data), 12.5) == request_


@given(
    st.builds(
        InferResponse,
        model=st.text(max_size=5),
        version=st.text(max_size=5),
        outputs=st.lists(tensors(), max_size=3).map(tuple),
        id=st.text(max_size=5),
        parameters=parameters(),
    )
)
def test_a_response_is_the_same_after_the_wire(response):
    """Every tensor bit for bit, every parameter."""
    data = protobuf.encode_response(response).SerializeToString()

    assert protobuf.decode_response(protobuf.parse(pb.ModelInferResponse, data)) == response


@pytest.mark.parametrize(
    ("found", "golden", "message_type"),
    [
        (protobuf.encode_request(REQUEST), REQUEST_BYTES, triton.ModelInferRequest),
        (protobuf.encode_response(RESPONSE), RESPONSE_BYTES, triton.ModelInferResponse),
    ],
    ids=["request", "response"],
)
def test_the_bytes_on_the_wire_are_these(found, golden, message_type):
    """They were made from tritonclient's messages, which still read and write them."""
    assert found.SerializeToString() == golden
    assert message_type.FromString(golden).SerializeToString() == golden


def test_tritonclients_requests_are_read():
    """A request as tritonclient builds it means the same here."""
    message = triton.ModelInferRequest(
        model_name="penguins",
        model_version="1.2",
        id="r1",
        inputs=[
            triton.ModelInferRequest.InferInputTensor(name="age", datatype="FP32", shape=[2, 1]),
            triton.ModelInferRequest.InferInputTensor(name="island", datatype="BYTES", shape=[2, 1]),
        ],
        outputs=[triton.ModelInferRequest.InferRequestedOutputTensor(name="label")],
        raw_input_contents=[tensor.raw for tensor in REQUEST.inputs],
    )
    message.parameters["priority"].int64_param = 5
    message.outputs[0].parameters["binary_data"].bool_param = True

    assert message.SerializeToString() == REQUEST_BYTES
    assert protobuf.decode_request(protobuf.parse(pb.ModelInferRequest, REQUEST_BYTES)) == REQUEST


def test_tritonclient_reads_our_responses():
    """Names, shapes and raw contents are where it expects them."""
    message = triton.ModelInferResponse.FromString(protobuf.encode_response(RESPONSE).SerializeToString())

    assert (message.model_name, message.model_version, message.id) == ("penguins", "1.2", "r1")
    assert message.parameters["cost"].double_param == 0.5
    assert [(output.name, output.datatype, list(output.shape)) for output in message.outputs] == [
        ("probabilities", "FP32", [2, 2]),
        ("label", "BYTES", [2]),
    ]
    assert list(message.raw_output_contents) == [tensor.raw for tensor in RESPONSE.outputs]
    assert not any(output.HasField("contents") for output in message.outputs)
    assert protobuf.decode_response(protobuf.parse(pb.ModelInferResponse, RESPONSE_BYTES)) == RESPONSE


@pytest.mark.parametrize("datatype", FIELDS)
@given(data=st.data())
def test_typed_contents_mean_what_raw_contents_mean(datatype, data):
    """The bytes equal numpy's for the same values; behind the face typed and raw contents cannot be distinguished."""
    values = data.draw(st.lists(python_values(datatype), max_size=MAX_ELEMENTS))
    raw = encode_bytes(values) if datatype == "BYTES" else np.array(values, dtype=DTYPES[datatype]).tobytes()
    shape = (len(values),)

    request = protobuf.decode_request(typed_request(datatype, shape, **{FIELDS[datatype]: values}))
    output = pb.ModelInferResponse.InferOutputTensor(
        name="age", datatype=datatype, shape=shape, contents=pb.InferTensorContents(**{FIELDS[datatype]: values})
    )
    response = protobuf.decode_response(pb.ModelInferResponse(outputs=[output]))

    assert request.inputs == response.outputs == (Tensor("age", datatype, shape, raw),)


@pytest.mark.parametrize(
    ("datatype", "contents", "message"),
    [
        ("INT32", {"fp32_contents": [1]}, "the contents of INT32 belong in int_contents, got fp32_contents"),
        ("INT64", {"int_contents": [1]}, "the contents of INT64 belong in int64_contents, got int_contents"),
        ("UINT8", {"int_contents": [1]}, "the contents of UINT8 belong in uint_contents, got int_contents"),
        ("BYTES", {"bool_contents": [True]}, "the contents of BYTES belong in bytes_contents, got bool_contents"),
        (
            "FP32",
            {"fp32_contents": [1], "fp64_contents": [1]},
            "the contents of FP32 belong in fp32_contents, got fp32_contents, fp64_contents",
        ),
        ("INT8", {"int_contents": [300]}, "element 0 is not a INT8 (-128 to 127)"),
        ("INT16", {"int_contents": [0, -32769]}, "element 1 is not a INT16 (-32768 to 32767)"),
        ("UINT8", {"uint_contents": [255, 256]}, "element 1 is not a UINT8 (0 to 255)"),
        ("UINT16", {"uint_contents": [65536]}, "element 0 is not a UINT16 (0 to 65535)"),
        ("FP16", {"fp32_contents": [1]}, "FP16 is supported in raw contents only"),
        ("BF16", {"fp32_contents": [1]}, "BF16 is supported in raw contents only"),
    ],
)
def test_typed_contents_that_do_not_fit_are_refused(datatype, contents, message):
    """The wrong field, two fields (G-06), a value that does not fit (G-07), a datatype that has no field (G-08)."""
    with pytest.raises(InvalidInput) as caught:
        protobuf.decode_request(typed_request(datatype, **contents))

    assert caught.value.message == f'input "age": {message}'


@pytest.mark.parametrize("values", [[1], [1, 2, 3]])
def test_a_count_of_typed_contents_that_contradicts_the_shape_is_refused(values):
    """Packed, the contents have another size than the shape says (G-06)."""
    request = protobuf.decode_request(typed_request("INT32", (2,), int_contents=values))

    with pytest.raises(InvalidInput, match=f"needs 8 bytes, got {4 * len(values)}"):
        validate('input "age"', request.inputs[0])


def test_absent_contents_are_zero_elements():
    """An empty tensor has no contents in any field; FP16 has no field at all."""
    for datatype in (*FIELDS, "FP16", "BF16"):
        request = protobuf.decode_request(typed_request(datatype, (0,)))

        assert request.inputs == (Tensor("age", datatype, (0,), b""),)


def test_an_unknown_datatype_of_typed_contents_is_refused():
    """No field of the message can hold it."""
    with pytest.raises(InvalidInput, match='input "age": unknown datatype "STRING"'):
        protobuf.decode_request(typed_request("STRING", bytes_contents=[b"a"]))


def test_raw_and_typed_contents_do_not_mix():
    """Not even an empty `contents` next to raw ones (G-03), with the message that clients know from Triton."""
    message = typed_request("INT32", int_contents=[1])
    message.raw_input_contents.append(bytes(4))

    with pytest.raises(InvalidInput, match="the contents field must not be specified when using raw_input_contents"):
        protobuf.decode_request(message)

    message.inputs[0].contents.ClearField("int_contents")
    with pytest.raises(InvalidInput, match="the contents field must not be specified when using raw_input_contents"):
        protobuf.decode_request(message)


@pytest.mark.parametrize("n_raw", [1, 3])
def test_every_input_has_one_raw_content(n_raw):
    """One too few would assign the others to the wrong names (G-04)."""
    message = protobuf.encode_request(REQUEST)
    message.raw_input_contents[:] = [b"a"] * n_raw

    with pytest.raises(InvalidInput, match=f"expected one raw_input_contents for each of 2 inputs, got {n_raw}"):
        protobuf.decode_request(message)


@pytest.mark.parametrize("n_raw", [1, 3])
def test_every_output_has_one_raw_content(n_raw):
    """A third-party server may be wrong too."""
    message = protobuf.encode_response(RESPONSE)
    message.raw_output_contents[:] = [b"a"] * n_raw

    with pytest.raises(InvalidInput, match=f"expected one raw_output_contents for each of 2 outputs, got {n_raw}"):
        protobuf.decode_response(message)


@pytest.mark.parametrize(("value", "field"), PARAMETERS)
def test_a_parameter_is_encoded_in_the_field_of_its_type(value, field):
    """A boolean is no integer, a whole number that came as a float stays one, what int64 cannot hold is uint64 (D16)."""
    message = protobuf.encode_request(InferRequest("m", (), parameters={"key": value}))

    assert message.parameters["key"].WhichOneof("parameter_choice") == field
    found = protobuf.decode_request(message).parameters["key"]
    assert (type(found), found) == (type(value), value)


def test_a_parameter_without_a_value_is_ignored():
    """At every level; none set means none given (D16)."""
    message = protobuf.encode_request(REQUEST)
    message.parameters["empty"].SetInParent()
    message.outputs[0].parameters["empty"].SetInParent()

    assert protobuf.decode_request(message) == REQUEST


def test_unknown_fields_are_skipped():
    """Fields of a newer client's request that are unknown are skipped (G-17)."""
    unknown = b"\xf2\x3e\x03abc"  # field 1006, three bytes

    assert protobuf.decode_request(protobuf.parse(pb.ModelInferRequest, REQUEST_BYTES + unknown)) == REQUEST


@pytest.mark.parametrize("data", [b"\xff\xff\xff", REQUEST_BYTES[:-1], b"\x0a\x02\xff\xfe"], ids=["junk", "cut", "not UTF-8"])
def test_bytes_that_are_not_a_message_are_invalid_input(data):
    """A fault of the caller, without names of Python classes (G-14)."""
    with pytest.raises(InvalidInput, match=r"^the request is not a inference\.ModelInferRequest$"):
        protobuf.parse(pb.ModelInferRequest, data)


def test_metadata_is_the_same_after_the_wire():
    """Varying dimensions lose their names, but for the batch, and keep their places."""
    inputs = (TensorSpec("age", "FP32", ("batch", 1)), TensorSpec("image", "UINT8", ("batch", 3, "height", "width")))
    outputs = (TensorSpec("label", "BYTES", ("batch",)), TensorSpec("scale", "FP32", ()))
    metadata = ModelMetadata("penguins", ("1.1", "1.2"), "splitserve_pair", inputs, outputs, {"trained": "today"})

    message = protobuf.encode_metadata(metadata)
    found = protobuf.decode_metadata(pb.ModelMetadataResponse.FromString(message.SerializeToString()))

    assert [list(tensor.shape) for tensor in (*message.inputs, *message.outputs)] == [[-1, 1], [-1, 3, -1, -1], [-1], []]
    assert (found.name, found.versions, found.platform, found.properties) == (
        "penguins",
        ("1.1", "1.2"),
        "splitserve_pair",
        {"trained": "today"},
    )
    assert found.inputs == (inputs[0], TensorSpec("image", "UINT8", ("batch", 3, "image_2", "image_3")))
    assert found.outputs == outputs


def test_the_index_is_the_same_after_the_wire():
    """Names, versions, states and reasons."""
    states = [ModelState("penguins", "1.2", "READY"), ModelState("digits", "", "UNAVAILABLE", "no predictor")]

    message = protobuf.encode_index(states)

    assert protobuf.decode_index(pb.RepositoryIndexResponse.FromString(message.SerializeToString())) == states


def test_server_metadata_has_name_and_version():
    """Name, version, extensions."""
    message = protobuf.encode_server_metadata(ServerMetadata("splitserve", "1.0", ("binary_tensor_data",)))

    assert (message.name, message.version, list(message.extensions)) == ("splitserve", "1.0", ["binary_tensor_data"])


def test_the_service_has_the_protocols_name():
    """Clients call it by this path."""
    assert protobuf.SERVICE == "inference.GRPCInferenceService"
