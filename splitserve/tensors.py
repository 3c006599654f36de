"""Tensors as on the wire: name, datatype, shape and raw bytes; and the table of datatypes.

Row-major little-endian bytes can be checked, joined and sliced without numerics, so neither this module nor the proxy imports
numpy. `splitserve.arrays` converts tensors to numpy arrays and back.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from splitserve.errors import InvalidInput

MAX_RANK = 16
MAX_ELEMENTS = 2**31


class Datatype(msgspec.Struct, frozen=True):
    """One datatype of the protocol.

    ``itemsize`` is in bytes, 0 for elements of variable length (BYTES). ``format`` is the format character of `struct` and
    `memoryview`, "" where Python has none. ``low`` and ``high`` are the range of integers.
    """

    name: str
    itemsize: int
    format: str
    low: int = 0
    high: int = 0

    @property
    def is_integer(self) -> bool:
        return self.high > 0 and self.name != "BOOL"

    @property
    def is_float(self) -> bool:
        return self.name in ("FP16", "BF16", "FP32", "FP64")


DATATYPES: dict[str, Datatype] = {
    datatype.name: datatype
    for datatype in (
        Datatype("BOOL", 1, "?", 0, 1),
        Datatype("INT8", 1, "b", -(2**7), 2**7 - 1),
        Datatype("INT16", 2, "h", -(2**15), 2**15 - 1),
        Datatype("INT32", 4, "i", -(2**31), 2**31 - 1),
        Datatype("INT64", 8, "q", -(2**63), 2**63 - 1),
        Datatype("UINT8", 1, "B", 0, 2**8 - 1),
        Datatype("UINT16", 2, "H", 0, 2**16 - 1),
        Datatype("UINT32", 4, "I", 0, 2**32 - 1),
        Datatype("UINT64", 8, "Q", 0, 2**64 - 1),
        Datatype("FP16", 2, "e"),
        Datatype("BF16", 2, ""),
        Datatype("FP32", 4, "f"),
        Datatype("FP64", 8, "d"),
        Datatype("BYTES", 0, ""),
    )
}
"""Source: Open Inference Protocol, "Tensor Data Types"."""


class Tensor(msgspec.Struct, frozen=True):
    """A named tensor.

    ``raw`` holds the elements row-major and little-endian, without padding; an element of a BYTES tensor is preceded by its
    length, four bytes. Source: Open Inference Protocol gRPC, "Raw Tensor Contents".
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes

    @property
    def n_rows(self) -> int:
        """The size of the leading dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1


def datatype_of(what: str, name: str) -> Datatype:
    """The datatype called ``name``.

    Args:
        what: e.g. ``input "features"``, for the error.
        name: as in the protocol, e.g. ``"FP32"``.

    Raises:
        InvalidInput: the protocol has none of that name.
    """
    found = DATATYPES.get(name)
    if found is None:
        raise InvalidInput(f'{what}: unknown datatype "{name[:32]}", expected one of {", ".join(DATATYPES)}')
    return found


def n_elements(what: str, shape: Sequence[int]) -> int:
    """The number of elements of a tensor of this shape.

    Raises:
        InvalidInput: a dimension is negative, there are more than ``MAX_RANK``, or more than ``MAX_ELEMENTS`` elements.
    """
    if len(shape) > MAX_RANK:
        raise InvalidInput(f"{what}: expected at most {MAX_RANK} dimensions, got {len(shape)}")
    for size in shape:
        if size < 0:
            raise InvalidInput(f"{what}: shape {list(shape)} has a negative dimension")
        if size >= 2**63:
            raise InvalidInput(f"{what}: shape {list(shape)} has a dimension that exceeds int64")
    count = math.prod(shape)
    if count > MAX_ELEMENTS:
        raise InvalidInput(f"{what}: shape {list(shape)} has more than {MAX_ELEMENTS} elements")
    return count


def validate(what: str, tensor: Tensor) -> None:
    """Check that a tensor's bytes match its datatype and shape.

    Raises:
        InvalidInput: unknown datatype, negative dimension, wrong number of bytes or elements, a BOOL that is not 0 or 1.
    """
    datatype = datatype_of(what, tensor.datatype)
    count = n_elements(what, tensor.shape)
    if datatype.name == "BYTES":
        found = sum(1 for _ in _elements(what, tensor.raw))
        if found != count:
            raise InvalidInput(f"{what}: shape {list(tensor.shape)} needs {count} BYTES elements, got {found}")
    elif len(tensor.raw) != count * datatype.itemsize:
        raise InvalidInput(
            f"{what}: {tensor.datatype} of shape {list(tensor.shape)} needs {count * datatype.itemsize} bytes, "
            f"got {len(tensor.raw)}"
        )
    elif datatype.name == "BOOL" and tensor.raw.translate(None, b"\x00\x01"):
        raise InvalidInput(f"{what}: a BOOL element is one byte, 0 or 1")


def encode_bytes(elements: Iterable[bytes]) -> bytes:
    """The raw form of a BYTES tensor with these elements."""
    return b"".join([part for element in elements for part in (_length(len(element)), element)])


def decode_bytes(tensor: Tensor) -> list[bytes]:
    """The elements of a BYTES tensor, row-major.

    Raises:
        InvalidInput: a length points beyond the end.
    """
    raw, offset, end = tensor.raw, 0, len(tensor.raw)
    elements = []
    while offset + 4 <= end:
        start = offset + 4
        offset = start + _length_at(raw, offset)[0]
        elements.append(raw[start:offset])
    return elements if offset == end else list(_elements(f'tensor "{tensor.name}"', raw))  # raises, and says what is wrong


def bytes_offsets(tensor: Tensor) -> list[int]:
    """Offsets of the elements of a valid BYTES tensor, including their length prefixes, and of its end."""
    raw, offset, end = tensor.raw, 0, len(tensor.raw)
    offsets = [0]
    while offset < end:
        offset += 4 + _length_at(raw, offset)[0]
        offsets.append(offset)
    return offsets


_length = struct.Struct("<I").pack
_length_at = struct.Struct("<I").unpack_from


def holds_elements(raw: bytes, count: int) -> bool:
    """Whether this is the raw form of a BYTES tensor with ``count`` elements."""
    offset, last = 0, len(raw) - 4
    for _ in range(count):
        if offset > last:
            return False
        offset += 4 + _length_at(raw, offset)[0]
    return offset == last + 4


def _elements(what: str, raw: bytes) -> Iterable[bytes]:
    offset, end = 0, len(raw)
    while offset < end:
        start = offset + 4
        if start > end:
            raise InvalidInput(f"{what}: the length of a BYTES element is truncated at byte {offset} of {end}")
        offset = start + _length_at(raw, offset)[0]
        if offset > end:
            raise InvalidInput(f"{what}: the BYTES element at byte {start} exceeds the {end} bytes of the tensor")
        yield raw[start:offset]


def pack(what: str, datatype: Datatype, values: Sequence[Any]) -> bytes:
    """The raw form of Python numbers, booleans or bytes. No conversion changes a value.

    Raises:
        InvalidInput: a value is not of the datatype, or does not fit it.
    """
    if not set(map(type, values)) <= _PYTHON_TYPES[datatype.name]:
        raise _misfit(what, datatype, values)
    if datatype.name == "BYTES":
        return encode_bytes(values)
    try:
        raw = numbers(len(values), datatype.format).pack(*values)
    except (OverflowError, struct.error):
        raise _misfit(what, datatype, values) from None
    if datatype.name == "BOOL" and not set(values) <= {0, 1}:
        raise _misfit(what, datatype, values)
    return raw


_PYTHON_TYPES: dict[str, set[type]] = {
    name: {bytes} if name == "BYTES" else {float, int} if datatype.is_float else {bool, int} if name == "BOOL" else {int}
    for name, datatype in DATATYPES.items()
}


def _misfit(what: str, datatype: Datatype, values: Sequence[Any]) -> InvalidInput:
    """The error for the first value that does not fit, searched only after packing has failed."""
    index = next((index for index, value in enumerate(values) if not _fits(datatype, value)), None)
    bounds = f" ({datatype.low} to {datatype.high})" if datatype.is_integer else ""
    return InvalidInput(f"{what}: element {index} is not a {datatype.name}{bounds}")


def _fits(datatype: Datatype, value: Any) -> bool:
    if type(value) not in _PYTHON_TYPES[datatype.name]:
        return False
    if datatype.name in ("BYTES", "BOOL"):
        return datatype.name == "BYTES" or value in (0, 1)
    try:
        struct.pack(f"<{datatype.format}", value)
    except (OverflowError, struct.error):
        return False
    return True


def unpack(tensor: Tensor) -> list[Any]:
    """The elements of a valid tensor as Python numbers, booleans or bytes, row-major.

    Raises:
        InvalidInput: BF16, which Python does not support.
    """
    format = _MEMORY_FORMATS.get(tensor.datatype)
    if format is not None:
        elements: list[Any] = memoryview(tensor.raw).cast(format).tolist()  # type: ignore[call-overload]
        return elements
    if tensor.datatype == "BYTES":
        return decode_bytes(tensor)
    if tensor.datatype == "FP16":
        return list(numbers(len(tensor.raw) // 2, "e").unpack(tensor.raw))
    raise InvalidInput(f'"{tensor.name}": {tensor.datatype} is supported as raw bytes only')


_MEMORY_FORMATS = {
    datatype.name: datatype.format for datatype in DATATYPES.values() if datatype.format and datatype.name != "FP16"
}
"""Of the datatypes that `memoryview` can cast."""


@lru_cache(512)
def numbers(count: int, format: str) -> struct.Struct:
    """Packs and unpacks ``count`` elements with this `Datatype.format`."""
    return struct.Struct(f"<{count}{format}")
