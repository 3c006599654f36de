"""grpcio of any age, as one of the peers of tests/clients/test_grpc_peers.py: knows bytes, no messages."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import grpc

address, folder, scenario = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
INFER, STREAM = "/inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelStreamInfer"


def message(name: str) -> bytes:
    return (folder / name).read_bytes()


def unary(channel: grpc.aio.Channel, name: str) -> grpc.aio.UnaryUnaryCall:
    return channel.unary_unary(INFER)(message(f"{name}.request"), timeout=60)


async def main() -> None:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    if scenario == "keepalive":
        options += [
            ("grpc.keepalive_time_ms", 1000), ("grpc.keepalive_timeout_ms", 1000), ("grpc.http2.max_pings_without_data", 0),
        ]  # fmt: skip
    async with grpc.aio.insecure_channel(address, options) as channel:
        if scenario == "unary":
            for _ in range(100):
                assert await unary(channel, "small") == message("small.answer")
        elif scenario == "error":
            try:
                await unary(channel, "missing")
            except grpc.aio.AioRpcError as error:
                assert error.code() == grpc.StatusCode.NOT_FOUND
                assert any(name == "grpc-status-details-bin" and value for name, value in error.trailing_metadata())
            else:
                raise AssertionError("no error")
        elif scenario == "stream":
            stream = channel.stream_stream(STREAM)()
            for _ in range(200):
                await stream.write(message("small.request"))
                assert await stream.read() == message("small.streamed")
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
            assert await stream.code() == grpc.StatusCode.OK
        elif scenario == "large":
            assert await unary(channel, "large") == message("large.answer")
        elif scenario == "thousand":
            answers = await asyncio.gather(*(unary(channel, "small") for _ in range(1000)))
            assert answers == [message("small.answer")] * 1000
        elif scenario == "busy":
            call = asyncio.ensure_future(_awaited(unary(channel, "held")))
            await asyncio.sleep(0.5)
            time.sleep(12)  # noqa: ASYNC251  # a client whose event loop is busy
            assert await call == message("held.answer")
            assert await unary(channel, "small") == message("small.answer")
        elif scenario == "keepalive":
            assert await unary(channel, "held") == message("held.answer")
            assert await unary(channel, "small") == message("small.answer")
    print("passed")


async def _awaited(call: grpc.aio.UnaryUnaryCall) -> bytes:
    return await call


asyncio.run(main())
