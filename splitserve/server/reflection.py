"""gRPC server reflection: tools without .proto files learn the methods and messages from the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

NAMES = (reflection.SERVICE_NAME, "grpc.reflection.v1.ServerReflection")
"""The service's name, and the newer one that it has with the same messages. Source: grpc/reflection/v1/reflection.proto"""


def add_to(server: grpc.aio.Server, services: Sequence[str], files: Sequence[Any]) -> None:
    """Let a server tell of these services.

    Args:
        server: not started yet.
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
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler}) for name in NAMES)
    )
