"""What is fuzzed: untrusted bytes into each decoder and each connection.

Whatever they are, a decoder gives a request or one of our errors, and a connection is closed or waits for more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from splitserve.api.inference import inference_pb2 as pb
from splitserve.errors import SplitserveError
from splitserve.oip import protobuf, rest, v1
from splitserve.oip.limits import RequestLimits
from splitserve.oip.messages import InferRequest
from splitserve.signature import TensorSpec, check_inputs
from splitserve.testing import signature
from tests.fuzz import wire

MODEL = signature("m", [TensorSpec("x", "FP32", ("batch", 2)), TensorSpec("t", "BYTES", ("batch",))], version="1.1")


def _checked(request: InferRequest) -> None:
    RequestLimits().check(request)
    check_inputs(MODEL.inputs, request.inputs, widen=True)


def json(data: bytes) -> None:
    """A V2 body, and the same as a V1 body."""
    for decode in (lambda: rest.decode_request("m", "", data), lambda: v1.decode_request(data, MODEL, "1.1").request):
        with contextlib.suppress(SplitserveError):
            _checked(decode())


def binary(data: bytes) -> None:
    """A V2 body with binary tensors: the first two bytes say how much of it is JSON."""
    with contextlib.suppress(SplitserveError):
        _checked(rest.decode_request("m", "", data[2:], header_length=int.from_bytes(data[:2], "little")))


def grpc(data: bytes) -> None:
    """A ModelInferRequest."""
    with contextlib.suppress(SplitserveError):
        _checked(protobuf.decode_request(protobuf.parse(pb.ModelInferRequest, data)))
    with contextlib.suppress(SplitserveError):  # as messages of this size are read
        message, raws = protobuf.parse_request(data, is_large=True)
        _checked(protobuf.decode_request(message, raws=raws))


DECODERS: dict[str, Callable[[bytes], None]] = {
    "json": json,
    "binary": binary,
    "grpc": grpc,
    "frames": wire.frames,
    "client": wire.client,
    "headers": wire.headers,
    "http1": wire.http1,
}
