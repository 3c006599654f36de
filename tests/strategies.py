"""Hypothesis strategies for what crosses the wire: shapes, tensors and values of every datatype of the protocol."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from splitserve.tensors import DATATYPES, Tensor, encode_bytes

INTEGERS = ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
FLOATS = ("FP16", "BF16", "FP32", "FP64")
ALL = ("BOOL", *INTEGERS, *FLOATS, "BYTES")
JSON_ABLE = tuple(name for name in ALL if name not in ("FP16", "BF16"))

MAX_ELEMENTS = 40

_FLOAT_BITS = {"FP16": (5, 10), "BF16": (8, 7), "FP32": (8, 23), "FP64": (11, 52)}
"""Bits of the exponent and of the mantissa. Source: IEEE 754; BF16 is the upper half of FP32."""


def names() -> st.SearchStrategy[str]:
    """What a tensor, a column or a model may be called: any text without control characters."""
    return st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=8)


@st.composite
def shapes(draw: st.DrawFn, min_rank: int = 0, max_rank: int = 5) -> tuple[int, ...]:
    """Shapes with at most ``MAX_ELEMENTS`` elements; any dimension may be 0."""
    room, shape = MAX_ELEMENTS, []
    for _ in range(draw(st.integers(min_rank, max_rank))):
        shape.append(draw(st.integers(0, room)))
        room //= max(shape[-1], 1)
    return tuple(shape)


@st.composite
def tensors(draw: st.DrawFn, datatypes: Sequence[str] = ALL, *, text_only: bool = False) -> Tensor:
    """Valid tensors, every bit pattern among their elements; BYTES hold UTF-8 only if ``text_only``."""
    datatype, shape = draw(st.sampled_from(datatypes)), draw(shapes())
    count = math.prod(shape)
    elements = draw(st.lists(raw_elements(datatype, text_only=text_only), min_size=count, max_size=count))
    return Tensor(draw(names()), datatype, shape, encode_bytes(elements) if datatype == "BYTES" else b"".join(elements))


def raw_elements(datatype: str, *, text_only: bool = False) -> st.SearchStrategy[bytes]:
    """The bytes of one element, without the length that precedes it in a BYTES tensor."""
    if datatype == "BYTES":
        text = st.text(max_size=4).map(str.encode)
        return text if text_only else st.one_of(text, st.binary(max_size=4), st.just(b"\xff\xfe"))
    if datatype == "BOOL":
        return st.sampled_from([b"\x00", b"\x01"])
    size = DATATYPES[datatype].itemsize
    anything = st.binary(min_size=size, max_size=size)
    return st.one_of(st.sampled_from(_special_floats(datatype)), anything) if datatype in FLOATS else anything


def _special_floats(datatype: str) -> list[bytes]:
    """The zeros, the infinities, a quiet and a signalling NaN, the smallest and the largest number."""
    exponent, mantissa = _FLOAT_BITS[datatype]
    sign, infinity = 1 << exponent + mantissa, (2**exponent - 1) << mantissa
    patterns = (0, sign, infinity, infinity | sign, infinity | 1 << mantissa - 1, infinity | 1, 1, infinity - 1)
    return [pattern.to_bytes(DATATYPES[datatype].itemsize, "little") for pattern in patterns]


def python_values(datatype: str) -> st.SearchStrategy[Any]:
    """One element as Python has it; not for BF16, which Python has no number for."""
    if datatype == "BYTES":
        return st.binary(max_size=4)
    if datatype == "BOOL":
        return st.booleans()
    if datatype in FLOATS:
        return st.floats(width={"FP16": 16, "FP32": 32, "FP64": 64}[datatype])
    return st.integers(DATATYPES[datatype].low, DATATYPES[datatype].high)
