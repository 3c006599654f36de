"""numpy arrays <-> wire tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from splitserve.errors import InvalidInput
from splitserve.tensors import Tensor, decode_bytes, encode_bytes

Array = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(np.object_),
}
"""The dtype of each datatype. BF16 has none: it is read as float32, which represents every BF16 exactly."""

_DATATYPE_NAMES = {(dtype.kind, dtype.itemsize): name for name, dtype in DTYPES.items() if name != "BYTES"}


def to_array(tensor: Tensor) -> Array:
    """The elements as an array of the tensor's shape: read-only and without a copy, except for BYTES and BF16.

    BYTES become an object array of ``bytes``, BF16 a float32 array.

    Raises:
        InvalidInput: the tensor's bytes do not match its datatype and shape.
    """
    try:
        if tensor.datatype == "BYTES":
            return objects(decode_bytes(tensor), tensor.shape)
        if tensor.datatype == "BF16":
            halves = np.frombuffer(tensor.raw, dtype="<u2").astype("<u4")
            return (halves << np.uint32(16)).view("<f4").reshape(tensor.shape)
        return np.frombuffer(tensor.raw, DTYPES[tensor.datatype]).reshape(tensor.shape)
    except KeyError:
        raise InvalidInput(f'"{tensor.name}": unknown datatype "{tensor.datatype[:32]}"') from None
    except ValueError as error:
        raise InvalidInput(
            f'"{tensor.name}": {len(tensor.raw)} bytes are not {tensor.datatype} of shape {list(tensor.shape)}'
        ) from error


def objects(elements: Sequence[Any], shape: tuple[int, ...]) -> Array:
    """An object array of these elements, row-major.

    Raises:
        ValueError: their number does not match the shape.
    """
    array = np.empty(len(elements), dtype=np.object_)
    array[:] = elements
    return array.reshape(shape)


def datatype_of(dtype: np.dtype[Any]) -> str | None:
    """The datatype of a dtype of any byte order; BYTES for text, bytes and objects; None if there is none."""
    if dtype.kind in "OSU":
        return "BYTES"
    return _DATATYPE_NAMES.get((dtype.kind, dtype.itemsize))


def from_array(name: str, array: Array, datatype: str | None = None) -> Tensor:
    """Encode an array as a wire tensor.

    Args:
        name: of the tensor in the signature.
        array: of any shape and byte order. Objects must be ``bytes`` or ``str``; text is encoded as UTF-8.
        datatype: if not the dtype's own: ``"BF16"`` accepts float32 and rounds to nearest.

    Raises:
        InvalidInput: the dtype has no datatype in the protocol, or an object is neither ``bytes`` nor ``str``.
    """
    datatype = datatype or datatype_of(array.dtype)
    if datatype is None:
        raise InvalidInput(f'"{name}": dtype {array.dtype} has no datatype in the Open Inference Protocol')
    if datatype == "BYTES":
        raw = _encoded(name, array.ravel().tolist())
    elif datatype == "BF16":
        raw = _to_bf16(np.ascontiguousarray(array, dtype="<f4")).tobytes()
    else:
        raw = array.astype(DTYPES[datatype], copy=False).tobytes()
    return Tensor(name, datatype, array.shape, raw)


_SAMPLE, _FEW = 256, 32


def _encoded(name: str, elements: list[Any]) -> bytes:
    """The raw form. Text that repeats, as labels do, is encoded once."""
    if len(elements) > _SAMPLE:
        try:
            if len(set(elements[:_SAMPLE])) <= _FEW:
                table = {element: encode_bytes([_as_bytes(name, element)]) for element in set(elements)}
                return b"".join(map(table.__getitem__, elements))
        except TypeError:  # an element that cannot be in a set, which is refused below
            pass
    return encode_bytes(_as_bytes(name, element) for element in elements)


def _as_bytes(name: str, element: object) -> bytes:
    if isinstance(element, bytes):
        return element
    if isinstance(element, str):
        try:
            return element.encode()
        except UnicodeEncodeError:
            raise InvalidInput(f'"{name}": an element cannot be encoded as UTF-8') from None
    raise InvalidInput(f'"{name}": expected bytes or text as BYTES elements, got {type(element).__name__}')


def _to_bf16(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to the upper 16 bits, half to even; NaN stays NaN."""
    bits = array.view("<u4")
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(array), np.uint32(0x7FC0), rounded).astype("<u2")
