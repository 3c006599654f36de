"""Our .proto against the descriptors that an independent client of the protocol, tritonclient, registers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from tritonclient.grpc import model_config_pb2, service_pb2

from splitserve.api.inference import inference_pb2 as ours
from splitserve.oip import protobuf

NOT_IN_TRITONCLIENT = {
    # Field 6 of the protocol's newer text; a client that does not know it skips it.
    ".inference.ModelMetadataResponse.properties",
    ".inference.ModelMetadataResponse.PropertiesEntry.key",
    ".inference.ModelMetadataResponse.PropertiesEntry.value",
    # Ours, with a number that the protocol is far from: releases, which our services send to each other; other servers ignore it.
    ".inference.RepositoryIndexResponse.ModelIndex.properties",
    ".inference.RepositoryIndexResponse.ModelIndex.PropertiesEntry.key",
    ".inference.RepositoryIndexResponse.ModelIndex.PropertiesEntry.value",
    # Likewise: predictors that preprocess needs.
    ".inference.RepositoryIndexRequest.needed",
    ".inference.RepositoryIndexRequest.ModelVersion.name",
    ".inference.RepositoryIndexRequest.ModelVersion.version",
}


def file_of(*modules: Any) -> FileDescriptorProto:
    """What the modules register, as if it were one file."""
    file = FileDescriptorProto()
    for module in modules:
        file.MergeFromString(module.DESCRIPTOR.serialized_pb)
    return file


THEIRS = file_of(service_pb2, model_config_pb2)


def fields(file: FileDescriptorProto) -> dict[str, tuple[Any, ...]]:
    """By full name: number, type, label, the message that it holds, the oneof that it is part of."""
    return {name: facts for message in file.message_type for name, facts in _fields(message, f".{file.package}")}


def _fields(message: DescriptorProto, scope: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    scope = f"{scope}.{message.name}"
    for field in message.field:
        oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
        kind = FieldDescriptorProto.Type.Name(field.type), FieldDescriptorProto.Label.Name(field.label)
        yield f"{scope}.{field.name}", (field.number, *kind, field.type_name, oneof)
    for nested in message.nested_type:
        yield from _fields(nested, scope)


def methods(file: FileDescriptorProto) -> dict[str, tuple[str, str, bool, bool]]:
    """By path: request, answer, and which of them are streams."""
    return {
        f"/{file.package}.{service.name}/{method.name}": (
            method.input_type,
            method.output_type,
            method.client_streaming,
            method.server_streaming,
        )
        for service in file.service
        for method in service.method
    }


def messages(file: FileDescriptorProto) -> set[str]:
    return {f"{file.package}.{message.name}" for message in file.message_type}


def test_every_message_is_one_of_the_protocols():
    """Also those without fields."""
    assert messages(file_of(ours)) <= messages(THEIRS)


def test_every_field_is_where_other_clients_have_it():
    """Number, type, label, message and oneof of each field: one that differs would be read as another or not at all."""
    mine, theirs = fields(file_of(ours)), fields(THEIRS)

    different = {name for name, facts in mine.items() if theirs.get(name) != facts}

    assert different == NOT_IN_TRITONCLIENT


@pytest.mark.line("D19")
def test_the_number_of_the_newer_field_is_unused_elsewhere():
    """Where we have `properties`, tritonclient has nothing: what it does not know it skips."""
    theirs = {facts[0] for name, facts in fields(THEIRS).items() if name.startswith(".inference.ModelMetadataResponse.")}

    assert fields(file_of(ours))[".inference.ModelMetadataResponse.properties"][0] == 6
    assert 6 not in theirs


def test_every_method_is_where_other_clients_call_it():
    """Path, request, answer and streams of each method."""
    mine, theirs = methods(file_of(ours)), methods(THEIRS)

    assert mine == {path: theirs.get(path) for path in mine}


def test_the_protocols_own_methods_are_all_there():
    """The six of the standard; Triton's further ones are optional."""
    core = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")

    assert methods(file_of(ours)).keys() >= {f"/{protobuf.SERVICE}/{name}" for name in core}


def test_every_datatype_of_a_configuration_has_the_number_that_other_clients_read():
    """An enum travels as its number."""
    mine, theirs = (
        {value.name: value.number for enum in file.enum_type if enum.name == "DataType" for value in enum.value}
        for file in (file_of(ours), THEIRS)
    )

    assert mine == theirs


@pytest.mark.line("2 proto clash")
def test_our_messages_are_in_a_pool_of_their_own():
    """Other clients register the same names in protobuf's default pool, where a second registration is an error."""
    assert ours.DESCRIPTOR.pool is not service_pb2.DESCRIPTOR.pool
