"""The client's bodies against the server's codec."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.client import rest_bodies
from splitserve.client.retries import Failed
from splitserve.client.steps import Ask, JobAsk
from splitserve.errors import (
    IdempotencyKeyReused,
    Internal,
    InvalidInput,
    NotFound,
    Overloaded,
    PairMismatch,
    Unavailable,
    Unsupported,
)
from splitserve.jobs.records import JobOptions
from splitserve.oip import rest
from splitserve.oip.messages import InferRequest, InferResponse, RequestedOutput
from splitserve.tensors import Tensor
from tests.strategies import tensors

INFER = Ask("infer", "m", "1", InferRequest("m", ()))


@given(st.lists(tensors(), max_size=3), st.lists(st.sampled_from("abc"), unique=True))
def test_the_server_reads_what_the_client_writes(inputs: list[Tensor], outputs: list[str]) -> None:
    """Every datatype, shape and bit pattern; and that the answer is wanted as binary data."""
    request = InferRequest("m", tuple(inputs), version="1", id="7", outputs=tuple(map(RequestedOutput, outputs)))

    body, header_length = rest_bodies.encode_request(request)
    read = rest.decode_request("m", "1", body, header_length=header_length)

    assert (read.inputs, read.id) == (request.inputs, "7")
    assert [output.name for output in read.outputs] == outputs
    assert all(rest.is_binary_requested(read, name) for name in outputs or ["any"])


@given(st.lists(tensors(), max_size=3), st.sampled_from(["m", ""]))
def test_the_client_reads_what_the_server_writes(outputs: list[Tensor], identity: str) -> None:
    """As binary data, bit for bit."""
    response = InferResponse("m", "1", tuple(outputs), identity)
    body, header_length = rest.encode_response(response, InferRequest("m", (), parameters={"binary_data_output": True}))

    assert rest_bodies.decode_response(body, len(body) if header_length is None else header_length) == response


@given(st.lists(tensors(["INT64", "UINT64", "BOOL", "BYTES"], text_only=True), max_size=3))
def test_answers_in_json_are_read_too(outputs: list[Tensor]) -> None:
    """From servers that have no binary data."""
    response = InferResponse("m", "1", tuple(outputs))
    body, _ = rest.encode_response(response, InferRequest("m", ()))

    assert rest_bodies.decode_response(body, len(body)) == response


def test_fields_that_other_servers_omit_or_set_to_null_are_accepted() -> None:
    """The protocol asks for outputs only."""
    body = b'{"model_name":"m","model_version":null,"id":null,"parameters":null,"outputs":[],"more":1}'

    assert rest_bodies.decode(INFER, 200, {}, body) == InferResponse("m", "", ())


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"<html>", {}),
        (b"{}", {}),
        (b'{"outputs":[{"name":"y","datatype":"FP32","shape":[2],"data":[1]}]}', {}),
        (b'{"outputs":[{"name":"y","datatype":"FP9","shape":[1],"data":[1]}]}', {}),
        (b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1]}]}', {}),
        (b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1],"parameters":{"binary_data_size":4}}]}', {}),
        (b'{"outputs":[]}', {"inference-header-content-length": "99"}),
        (b'{"outputs":[]}', {"inference-header-content-length": "x"}),
    ],
)
def test_a_body_that_is_not_an_answer_is_a_mismatch(body: bytes, headers: dict[str, str]) -> None:
    """Never the caller's bad input, and never a retry."""
    with pytest.raises(Failed) as raised:
        rest_bodies.decode(INFER, 200, headers, body)

    assert type(raised.value.error) is PairMismatch
    assert not raised.value.can_retry


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (400, {"error": "no"}, InvalidInput, "no"),
        (422, {"detail": []}, InvalidInput, "the server answered with HTTP status 422"),
        (422, {"error": "used", "reason": "IDEMPOTENCY_KEY_REUSED"}, IdempotencyKeyReused, "used"),
        (404, {"detail": "Not Found"}, NotFound, "HTTP status 404"),
        (415, {"error": "no gzip"}, Unsupported, "no gzip"),
        (429, {"error": "full"}, Overloaded, "full"),
        (500, {"error": "internal"}, Internal, "internal"),
        (500, {"error": "misfit", "reason": "PAIR_MISMATCH"}, PairMismatch, "misfit"),
        (500, {"error": "new", "reason": "INVENTED_LATER"}, Internal, "new"),
        (502, None, Unavailable, "HTTP status 502"),
        (503, {"error": 7}, Unavailable, "HTTP status 503"),
        (301, None, Internal, "HTTP status 301"),
    ],
)
def test_errors_of_other_servers_are_classified_by_status(status: int, body: Any, kind: type[Exception], message: str) -> None:
    """A reason, where there is one, decides."""
    with pytest.raises(Failed, match=message) as raised:
        rest_bodies.decode(INFER, status, {}, msgspec.json.encode(body))

    assert type(raised.value.error) is kind
    assert raised.value.can_retry == (kind in (Unavailable, Overloaded))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *[(None, None), ("7", 7), ("soon", None), ("-1", None), ("", None), ("\xff\x00", None)],
        *[("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Fri, 99 Dec 99999 23:59:59 GMT", None)],
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    """Other values are ignored."""
    headers = {} if value is None else {"retry-after": value}

    with pytest.raises(Failed) as raised:
        rest_bodies.decode(INFER, 503, headers, b"{}")

    assert raised.value.retry_after_s == seconds


def test_short_periods_of_a_job_are_not_rounded_to_none() -> None:
    """None would be the service's default, and no end to waiting in the queue."""
    options = JobOptions(key="k", timeout_s=0.0004, expires_s=0.0001)
    asked = rest_bodies.encode(Ask("submit", "m", "", InferRequest("m", ()), JobAsk(options=options)))

    assert asked.path == "/v2/models/m/jobs?timeout=0.000400000&expires=0.000100000"


def test_names_are_quoted_in_paths() -> None:
    """A model's name is one part of the path, whatever is in it."""
    asked = rest_bodies.encode(Ask("model_metadata", "a/../b c", "1.1"))

    assert asked.path == "/v2/models/a%2F..%2Fb%20c/versions/1.1"
