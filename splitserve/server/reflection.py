"""gRPC server reflection, for tools without .proto files."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection, reflection_pb2

from splitserve.wire.grpc.call import MethodHandler, ServerCall
from splitserve.wire.grpc.messages import CallError

NAMES = (reflection.SERVICE_NAME, "grpc.reflection.v1.ServerReflection")
"""v1alpha, and v1, which has the same messages. Source: grpc/reflection/v1/reflection.proto."""


def methods(services: Sequence[str], files: Sequence[Any]) -> Mapping[str, MethodHandler]:
    """Handlers of reflection for these services, by path.

    Args:
        services: their full names.
        files: descriptors of the files that they and their messages are in. Ours live in a pool of their own; reflection has to
            find them and the others in one.
    """
    pool = descriptor_pool.DescriptorPool()
    for file in (*files, reflection_pb2.DESCRIPTOR):
        copy = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(copy)
        pool.Add(copy)
    servicer = reflection.aio.ReflectionServicer((*services, *NAMES[:1]), pool)

    async def serve(call: ServerCall) -> None:
        async for answer in servicer.ServerReflectionInfo(_requests(call), None):
            await call.write(answer.SerializeToString())

    return {f"/{name}/ServerReflectionInfo": MethodHandler(streaming=serve) for name in NAMES}


async def _requests(call: ServerCall) -> AsyncIterator[Any]:
    while (data := await call.read()) is not None:
        try:
            yield reflection_pb2.ServerReflectionRequest.FromString(data)
        except DecodeError:
            raise CallError("INVALID_ARGUMENT", "the request is not a ServerReflectionRequest") from None
