"""grpclib, as one of the peers of tests/clients/test_grpc_peers.py: knows bytes, no messages."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from grpclib import GRPCError, Status
from grpclib.client import Channel, StreamStreamMethod, UnaryUnaryMethod
from grpclib.config import Configuration
from grpclib.encoding.base import CodecBase

address, folder, scenario = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
INFER, STREAM = "/inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelStreamInfer"


class Bytes(CodecBase):
    __content_subtype__ = "proto"

    def encode(self, message: bytes, message_type: object) -> bytes:
        return message

    def decode(self, data: bytes, message_type: object) -> bytes:
        return data


def message(name: str) -> bytes:
    return (folder / name).read_bytes()


async def unary(channel: Channel, name: str) -> bytes:
    return await UnaryUnaryMethod(channel, INFER, bytes, bytes)(message(f"{name}.request"), timeout=60)


async def main() -> None:
    host, _, port = address.rpartition(":")
    config = Configuration(
        _keepalive_time=1, _keepalive_timeout=1, _keepalive_permit_without_calls=True, _http2_max_pings_without_data=0
    )
    async with Channel(host, int(port), codec=Bytes(), config=config if scenario == "keepalive" else None) as channel:
        if scenario == "unary":
            for _ in range(100):
                assert await unary(channel, "small") == message("small.answer")
        elif scenario == "error":
            try:
                await unary(channel, "missing")
            except GRPCError as error:
                assert error.status == Status.NOT_FOUND
            else:
                raise AssertionError("no error")
        elif scenario == "stream":
            async with StreamStreamMethod(channel, STREAM, bytes, bytes).open() as stream:
                for _ in range(200):
                    await stream.send_message(message("small.request"))
                    assert await stream.recv_message() == message("small.streamed")
                await stream.end()
                assert await stream.recv_message() is None
        elif scenario == "large":
            assert await unary(channel, "large") == message("large.answer")
        elif scenario == "thousand":
            answers = await asyncio.gather(*(unary(channel, "small") for _ in range(1000)))
            assert answers == [message("small.answer")] * 1000
        elif scenario == "busy":
            call = asyncio.ensure_future(unary(channel, "held"))
            await asyncio.sleep(0.5)
            time.sleep(12)  # noqa: ASYNC251  # a client whose event loop is busy
            assert await call == message("held.answer")
            assert await unary(channel, "small") == message("small.answer")
        elif scenario == "keepalive":
            assert await unary(channel, "held") == message("held.answer")
            assert await unary(channel, "small") == message("small.answer")
    print("passed")


asyncio.run(main())
