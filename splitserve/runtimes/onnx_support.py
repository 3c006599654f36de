"""Which ONNX versions the installed ONNX Runtime supports, found by loading a minimal model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import onnxruntime as ort

_SMALL_IR, _SMALL_OPSET = 8, 17
_IDENTITY = b"Identity"


def problems(ir_version: int, opsets: Mapping[str, int]) -> list[str]:
    """The versions of a model that the installed runtime does not support; empty if it supports all.

    Args:
        ir_version: of the model file.
        opsets: version by domain, ``""`` being ONNX's own.
    """
    found = []
    if not _is_supported(ir_version, {"": _SMALL_OPSET}):
        best = _highest(ir_version, lambda version: _is_supported(version, {"": _SMALL_OPSET}))
        found.append(f"ONNX IR version {ir_version}, ONNX Runtime {ort.__version__} here supports up to {best}")
    for domain, opset in opsets.items():
        if not _supports_opset(domain, opset):
            best = _highest(opset, partial(_supports_opset, domain))
            name = domain or "ai.onnx"
            found.append(f"opset {opset} of {name}, ONNX Runtime {ort.__version__} here supports up to {best}")
    return found


def _supports_opset(domain: str, opset: int) -> bool:
    return _is_supported(_SMALL_IR, {"": opset} if not domain else {"": _SMALL_OPSET, domain: opset})


def _highest(beyond: int, is_supported: Callable[[int], bool]) -> int:
    """The highest supported version below ``beyond``."""
    low, high = 0, beyond
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_supported(middle) else (low, middle)
    return low


def _is_supported(ir_version: int, opsets: Mapping[str, int]) -> bool:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(_identity_model(ir_version, opsets), options, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True


def _identity_model(ir_version: int, opsets: Mapping[str, int]) -> bytes:
    """``y = Identity(x)`` over a float, as protobuf bytes. Source: onnx.proto3, the numbers of its fields."""
    one_float = _field(1, _field(1, 1) + _field(2, _field(1, _field(1, 1))))  # TypeProto.tensor_type: elem_type, shape
    value_infos = [_field(1, name) + _field(2, one_float) for name in (b"x", b"y")]
    node = _field(1, b"x") + _field(2, b"y") + _field(4, _IDENTITY)
    graph = _field(1, node) + _field(2, b"g") + _field(11, value_infos[0]) + _field(12, value_infos[1])
    imports = b"".join(_field(8, _field(1, domain.encode()) + _field(2, opset)) for domain, opset in opsets.items())
    return _field(1, ir_version) + _field(7, graph) + imports


def _field(number: int, value: bytes | int) -> bytes:
    """One protobuf field: length-delimited bytes, or a varint."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
