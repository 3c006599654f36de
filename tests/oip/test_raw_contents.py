"""Raw contents beside the library: the same bytes mean the same, and what is no message is refused as before."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from splitserve.api.inference import inference_pb2 as pb
from splitserve.errors import InvalidInput
from splitserve.oip import protobuf
from splitserve.oip.messages import InferRequest, InferResponse
from splitserve.oip.raw_contents import LARGE_BYTES, field, with_raw, without_raw
from splitserve.tensors import Tensor

RAW = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER

UNKNOWN = (b"\x50\x01", b"\x59" + bytes(8), b"\x5d" + bytes(4), b"\x5b\x5c")
"""Fields that the message does not have: a varint, eight and four bytes, a group."""

SIZES = (LARGE_BYTES // 16, LARGE_BYTES // 8, 3 * LARGE_BYTES)
"""Of FP64 elements: messages that the library writes, and larger ones."""


def message(*raws: bytes) -> pb.ModelInferRequest:
    inputs = [pb.ModelInferRequest.InferInputTensor(name=f"x{n}", datatype="FP64", shape=[1]) for n in range(len(raws))]
    return pb.ModelInferRequest(model_name="m", id="7", inputs=inputs, raw_input_contents=raws)


@given(st.lists(st.binary(max_size=300), max_size=4))
def test_what_is_written_by_hand_is_the_message(raws: list[bytes]) -> None:
    """Lengths of one and two bytes, and contents that are empty."""
    whole, envelope = message(*raws), message(*raws)
    del envelope.raw_input_contents[:]

    written = b"".join(with_raw(envelope.SerializeToString(), RAW, raws))

    assert pb.ModelInferRequest.FromString(written) == whole
    assert len(written) == len(whole.SerializeToString())


@given(st.data())
@example(None)
def test_what_is_read_by_hand_is_what_the_library_reads(data: st.DataObject | None) -> None:
    """For any bytes: fields in any order, unknown ones, groups, cut off, or changed."""
    if data is None:
        text = b"\x3a\x05abc"
    else:
        parts = data.draw(
            st.lists(
                st.one_of(
                    st.binary(max_size=20).map(lambda raw: b"".join(field(RAW, raw))),
                    st.sampled_from(
                        [message().SerializeToString(), b"\x50\x01", b"\x59" + bytes(8), b"\x5d" + bytes(4), b"\x5b\x5c"]
                    ),
                    st.binary(max_size=6),
                ),
                max_size=5,
            )
        )
        text = b"".join(parts)[: data.draw(st.integers(0, 200))]
    found = without_raw(memoryview(text), RAW)
    try:
        whole = pb.ModelInferRequest.FromString(text)
    except DecodeError:
        if found is not None:
            with pytest.raises(DecodeError):
                pb.ModelInferRequest.FromString(found[0])
        return
    if found is None:
        return
    envelope = pb.ModelInferRequest.FromString(found[0])
    assert not envelope.raw_input_contents
    envelope.raw_input_contents.extend([bytes(raw) for raw in found[1]])
    assert envelope.SerializeToString() == whole.SerializeToString()


@pytest.mark.parametrize("n_elements", SIZES)
def test_a_request_of_any_size_is_received_as_it_was_sent(n_elements: int) -> None:
    tensors = (Tensor("a", "FP64", (n_elements,), bytes(range(8)) * n_elements), Tensor("b", "BYTES", (0,), b""))
    request = InferRequest("m", tensors, version="1.2", parameters={"p": "q"})

    received, raws = protobuf.parse_request(protobuf.encode_stream_request(request, "7"))

    assert (raws is not None) == (n_elements > SIZES[0])
    assert protobuf.decode_request(received, raws=raws).inputs == tensors
    assert pb.ModelInferRequest.FromString(protobuf.encode_stream_request(request, "7")).raw_input_contents[0] == tensors[0].raw


@pytest.mark.parametrize("n_elements", SIZES)
def test_a_response_of_any_size_is_received_as_it_was_sent(n_elements: int) -> None:
    tensors = (Tensor("a", "FP64", (n_elements,), bytes(range(8)) * n_elements), Tensor("b", "BYTES", (0,), b""))
    response = InferResponse("m", "1.2", tensors, id="7")

    received, raws = protobuf.parse_stream_response(protobuf.encode_stream_response(response, "7"))

    assert protobuf.decode_response(received.infer_response, raws) == response
    assert protobuf.decode_response(pb.ModelInferResponse.FromString(protobuf.response_bytes(response))) == response


def test_large_typed_contents_are_read_too() -> None:
    asked = pb.ModelInferRequest(model_name="m")
    asked.inputs.add(name="x", datatype="FP64", shape=[LARGE_BYTES]).contents.fp64_contents.extend([1.5] * LARGE_BYTES)

    found, raws = protobuf.parse_request(asked.SerializeToString())

    (tensor,) = protobuf.decode_request(found, raws=raws).inputs
    assert tensor.raw[:8] == tensor.raw[-8:] == b"\x00\x00\x00\x00\x00\x00\xf8\x3f"


@pytest.mark.parametrize(
    "damaged", [bytes(LARGE_BYTES), b"\xff" * LARGE_BYTES, message(bytes(LARGE_BYTES)).SerializeToString()[:-1]]
)
def test_large_bytes_that_are_no_message_are_refused(damaged: bytes) -> None:
    with pytest.raises(InvalidInput, match=r"the request is not a inference\.ModelInferRequest"):
        protobuf.parse_request(damaged)
    with pytest.raises(DecodeError):
        protobuf.parse_stream_response(damaged)


def test_large_raw_contents_of_another_number_are_refused() -> None:
    asked = message(bytes(LARGE_BYTES))
    asked.raw_input_contents.append(b"more")

    found, raws = protobuf.parse_request(asked.SerializeToString())

    with pytest.raises(InvalidInput, match="expected one raw_input_contents for each of 1 inputs, got 2"):
        protobuf.decode_request(found, raws=raws)
