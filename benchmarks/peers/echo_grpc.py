"""The lower bound of gRPC calls: grpcio's asyncio server on uvloop with an echo method.

python -m benchmarks.peers.echo_grpc 9001
"""

from __future__ import annotations

import sys
from typing import Any

import grpc
import uvloop


async def infer(data: bytes, context: Any) -> bytes:
    return data


async def serve(port: str) -> None:
    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"ModelInfer": grpc.unary_unary_rpc_method_handler(infer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
