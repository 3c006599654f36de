"""The proxy's real faces on free ports, over a service that answers without any model behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc
import httpx

from proxy.faces import Faces
from proxy.service import ProxyService
from proxy.settings import ProxySettings
from splitserve.api.inference import inference_pb2 as pb
from splitserve.oip.messages import InferRequest, InferResponse, ModelMetadata
from splitserve.oip.protobuf import SERVICE
from splitserve.signature import TensorSpec
from splitserve.tensors import DATATYPES, Tensor, pack, unpack
from splitserve.testing import FakeInference, signature

LIMIT = 1_000_000
"""Largest body and message, in bytes."""


def vector(name: str, datatype: str, size: int) -> TensorSpec:
    return TensorSpec(name, datatype, ("batch", size))


SIMPLE = signature(
    "simple",
    [vector("INPUT0", "INT32", 4), vector("INPUT1", "INT32", 4)],
    [vector("OUTPUT0", "INT32", 4), vector("OUTPUT1", "INT32", 4)],
    version="1.1",
)
"""Sum and difference."""


def identity(datatype: str) -> ModelMetadata:
    """The model ``identity_fp32``, ``identity_bytes`` …: x (batch, 2) is returned as x."""
    return signature(f"identity_{datatype.lower()}", [vector("x", datatype, 2)], version="1.1")


MODELS = (
    SIMPLE,
    *map(identity, DATATYPES),
    signature("echo", [vector("x", "FP32", 2)], version="1.1"),
    signature("echo", [vector("x", "FP32", 2)], version="2.1"),
    signature("text", [vector("x", "BYTES", 1)], version="1.1"),
    signature("wave", [TensorSpec("x", "FP32", ("batch", "length"))], version="1.1"),
    signature("image", [TensorSpec("x", "FP32", ("batch", "height", "width"))], version="1.1"),
    signature("weird", [vector("x", "FP32", 2)], [vector("y", "BYTES", 1)], version="1.1"),
)


def answer(request: InferRequest) -> InferResponse:
    """The outputs of the models above; only requested ones, in the requested order."""
    outputs = {tensor.name: tensor for tensor in _outputs(request)}
    wanted = [output.name for output in request.outputs] or list(outputs)
    return InferResponse(request.model, request.version, tuple(outputs[name] for name in wanted), request.id)


def _outputs(request: InferRequest) -> tuple[Tensor, ...]:
    if request.model == "weird":  # text that is none
        return (Tensor("y", "BYTES", (1, 1), b"\x01\x00\x00\x00\xff"),)
    if request.model != "simple":
        return request.inputs
    by_name = {tensor.name: tensor for tensor in request.inputs}
    rows = list(zip(unpack(by_name["INPUT0"]), unpack(by_name["INPUT1"]), strict=True))
    shape = by_name["INPUT0"].shape
    results = ("OUTPUT0", [a + b for a, b in rows]), ("OUTPUT1", [a - b for a, b in rows])
    return tuple(Tensor(name, "INT32", shape, pack(name, DATATYPES["INT32"], values)) for name, values in results)


class Served(NamedTuple):
    """Running faces: a client for each, and what is behind them."""

    rest: httpx.AsyncClient
    channel: grpc.aio.Channel
    backend: FakeInference
    service: ProxyService
    faces: Faces

    async def call(self, method: str, request: Any = b"", **options: Any) -> Any:
        """A unary gRPC method with a message, or with bytes that need not be one; the answer, parsed."""
        raw = request if isinstance(request, bytes) else request.SerializeToString()
        message_type = getattr(pb, f"{method}Response")
        return message_type.FromString(await self.channel.unary_unary(f"/{SERVICE}/{method}")(raw, **options))


@asynccontextmanager
async def served(
    *, backend: FakeInference | None = None, service: ProxyService | None = None, **settings: Any
) -> AsyncIterator[Served]:
    """Serve `MODELS`, or what is given, on free ports."""
    backend = backend or FakeInference(*MODELS, answer=answer)
    service = service or ProxyService(backend)
    await service.refresh()
    config = ProxySettings(**{"http_port": 0, "grpc_port": 0, "max_message_bytes": LIMIT, "grace_s": 1.0, **settings})
    async with (
        Faces(service, config) as faces,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{faces.http.port}", verify=False) as rest,
        grpc.aio.insecure_channel(f"127.0.0.1:{faces.grpc.port}") as channel,
    ):
        yield Served(rest, channel, backend, service, faces)
