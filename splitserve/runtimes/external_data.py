"""Detects external data (weights in other files) in an ONNX model's bytes, without the ``onnx`` package, which predict lacks.

ONNX Runtime would read such files relative to the working directory, unchecked, so models with external data are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from splitserve.repository.manifest import MODEL_FILE, BundleError

_MARK = b"location"
"""The key of a tensor's external location: without these bytes, a model has no external data."""

_SHOWN_LENGTH = 64
_SCALARS = {"bytes": descriptor_pb2.FieldDescriptorProto.TYPE_BYTES, "int64": descriptor_pb2.FieldDescriptorProto.TYPE_INT64}
_ENTRIES, _LOCATION = 13, 14
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {_ENTRIES: "Entry", _LOCATION: "int64"},
    "Entry": {1: "bytes", 2: "bytes"},
}
"""The fields through which a tensor can be reached, by message and number. Source: onnx.proto3.

All are declared as repeated, so that every occurrence in the file is checked, whichever a parser would use.
"""


def refuse_external_data(model: bytes) -> None:
    """Raises:
    BundleError: the model has external data, or is not an ONNX model.
    """
    if _MARK not in model:
        return
    message = _message_class("Model")()
    try:
        message.ParseFromString(model)
    except DecodeError:
        raise BundleError(f"{MODEL_FILE}: not an ONNX model") from None
    for tensor in _tensors(message):
        if getattr(tensor, f"f{_ENTRIES}") or any(getattr(tensor, f"f{_LOCATION}")):
            raise BundleError(
                f"{MODEL_FILE}: expected all weights in this file, got external data in {_place(tensor)}; put them into it: "
                'onnx.save(onnx.load("model.onnx"), "whole.onnx")'
            )


def _tensors(message: Message) -> Iterator[Any]:
    """Every tensor in a message: initializers, attributes, those of branches, loops and functions. protobuf bounds the depth."""
    if message.DESCRIPTOR.name == "Tensor":
        yield message
        return
    for field, values in message.ListFields():
        if field.message_type is not None:
            for value in values:
                yield from _tensors(value)


def _place(tensor: Any) -> str:
    entries = {key: value for entry in getattr(tensor, f"f{_ENTRIES}") for key in entry.f1 for value in entry.f2}
    return ascii(entries.get(_MARK, b"").decode("utf-8", "replace")[:_SHOWN_LENGTH])


@cache
def _message_class(name: str) -> type[Message]:
    """A protobuf class with `_FIELDS` only; other fields are ignored."""
    file = descriptor_pb2.FileDescriptorProto(name="external_data.proto", package="external_data", syntax="proto2")
    for message, fields in _FIELDS.items():
        added = file.message_type.add(name=message)
        for number, kind in fields.items():
            field = added.field.add(name=f"f{number}", number=number, label=descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED)
            if kind in _SCALARS:
                field.type = _SCALARS[kind]
            else:
                field.type, field.type_name = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE, f".external_data.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"external_data.{name}"))
