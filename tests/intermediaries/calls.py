"""Calls of the gRPC API by grpcio, and what their answers must be."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from splitserve.api.inference import inference_pb2 as pb
from splitserve.oip.protobuf import SERVICE
from tests.certificates import Files

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

_numbers = itertools.count(1)


def echo_request(content: bytes, id: str = "") -> pb.ModelInferRequest:
    """A row of bytes, to come back as it is."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="INPUT0", datatype="UINT8", shape=[1, len(content)])
    return pb.ModelInferRequest(model_name="echo", id=id, inputs=[tensor], raw_input_contents=[content])


def hold_request(ms: int) -> pb.ModelInferRequest:
    """A call that takes so many milliseconds."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="MS", datatype="INT32", shape=[1, 1])
    return pb.ModelInferRequest(model_name="hold", inputs=[tensor], raw_input_contents=[struct.pack("<i", ms)])


def long_ms() -> int:
    """More than a minute; no other call of this process takes as long."""
    return 60_000 + next(_numbers)


def new_id() -> str:
    """An id that no other request of this process has."""
    return f"request-{next(_numbers)}"


class Caller:
    """The methods of a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.infer = channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        self.stream = channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )

    async def echo(self, content: bytes) -> None:
        """One call; fails unless its own content came back under its own id."""
        id = new_id()
        answer = await self.infer(echo_request(content, id))
        assert answer.id == id
        assert answer.raw_output_contents[0] == content

    async def echo_many(self, n_calls: int, n_at_once: int, n_bytes: int = 64) -> None:
        """So many calls, each with content of its own."""
        numbers = iter(range(n_calls))

        async def one_after_another() -> None:
            for number in numbers:
                await self.echo(number.to_bytes(4, "little") * (n_bytes // 4))

        async with asyncio.TaskGroup() as group:
            for _ in range(n_at_once):
                group.create_task(one_after_another())


@asynccontextmanager
async def calling(address: str, tls: Files | None = None, *options: tuple[str, int]) -> AsyncIterator[Caller]:
    """A channel of its own, over TLS where files are given."""
    settings = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1), *options]
    if tls:
        credentials = grpc.ssl_channel_credentials(Path(tls.ca).read_bytes())  # noqa: ASYNC240  # a small file
        channel = grpc.aio.secure_channel(address, credentials, settings)
    else:
        channel = grpc.aio.insecure_channel(address, settings)
    async with channel:
        yield Caller(channel)
