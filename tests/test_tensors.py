"""Wire tensors: the table of datatypes, what makes a tensor valid, Python values packed and unpacked."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.errors import InvalidInput, SplitserveError
from splitserve.tensors import DATATYPES, Tensor, datatype_of, decode_bytes, encode_bytes, n_elements, pack, unpack, validate
from tests.strategies import ALL, INTEGERS, MAX_ELEMENTS, python_values, tensors

PYTHON_HAS = tuple(name for name in ALL if name != "BF16")
FIXED_SIZE = tuple(name for name in ALL if name != "BYTES")

WHAT = 'input "age"'


def test_the_datatypes_are_those_of_the_protocol():
    """Name and bytes per element. Source: Open Inference Protocol, "Tensor Data Types"."""
    assert {name: datatype.itemsize for name, datatype in DATATYPES.items()} == {
        "BOOL": 1,
        "INT8": 1,
        "INT16": 2,
        "INT32": 4,
        "INT64": 8,
        "UINT8": 1,
        "UINT16": 2,
        "UINT32": 4,
        "UINT64": 8,
        "FP16": 2,
        "BF16": 2,
        "FP32": 4,
        "FP64": 8,
        "BYTES": 0,
    }


@pytest.mark.parametrize("name", ALL)
def test_datatypes_have_these_properties(name):
    """Integers, floats and others are distinguished by the table, not by their names."""
    found = datatype_of(WHAT, name)

    assert found.is_integer == (name in INTEGERS)
    assert found.is_float == (name in ("FP16", "BF16", "FP32", "FP64"))


@pytest.mark.parametrize("name", ["fp32", "STRING", "", "FLOAT"])
def test_an_unknown_datatype_is_refused_with_the_known_ones(name):
    """Names are exact; what Triton's configuration calls STRING is BYTES on the wire (I-08)."""
    with pytest.raises(InvalidInput) as caught:
        datatype_of(WHAT, name)

    assert caught.value.message == f'input "age": unknown datatype "{name}", expected one of {", ".join(ALL)}'


def test_an_error_message_truncates_long_names():
    """A message quotes only a part of what the caller sent."""
    with pytest.raises(InvalidInput) as caught:
        datatype_of(WHAT, "x" * 100_000)

    assert len(caught.value.message) < 300


@pytest.mark.parametrize(("shape", "rows"), [((), 1), ((0, 3), 0), ((5,), 5), ((2, 3, 4), 2)])
def test_rows_are_the_leading_dimension(shape, rows):
    """A scalar is one row."""
    assert Tensor("x", "INT8", shape, b"").n_rows == rows


@pytest.mark.parametrize(
    ("shape", "count"),
    [((), 1), ((0,), 0), ((3, 0, 2**63 - 1), 0), ((2, 3, 4), 24), ((1,) * 16, 1), ((2**31,), 2**31)],
)
def test_elements_are_the_product_of_the_shape(shape, count):
    """Up to 16 dimensions and 2**31 elements."""
    assert n_elements(WHAT, shape) == count


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((2, -1), InvalidInput, 'input "age": shape [2, -1] has a negative dimension'),
        ((-2, -3), InvalidInput, 'input "age": shape [-2, -3] has a negative dimension'),
        ((1,) * 17, InvalidInput, 'input "age": expected at most 16 dimensions, got 17'),
        ((2**31 + 1,), InvalidInput, 'input "age": shape [2147483649] has more than 2147483648 elements'),
        ((0, 2**63), InvalidInput, f'input "age": shape [0, {2**63}] has a dimension that exceeds int64'),
        # In 64 bits this product is 32 (I-07).
        ((16, 2**60 + 2), InvalidInput, f'input "age": shape [16, {2**60 + 2}] has more than 2147483648 elements'),
    ],
)
def test_an_impossible_shape_is_refused(shape, kind, message):
    """Before anything is allocated, and without arithmetic that wraps."""
    with pytest.raises(SplitserveError) as caught:
        n_elements(WHAT, shape)

    assert type(caught.value) is kind
    assert caught.value.message == message


@given(tensors())
def test_a_valid_tensor_passes(tensor):
    """Any rank, any size, any bit pattern."""
    validate(WHAT, tensor)


@given(tensors(FIXED_SIZE), st.sampled_from([-1, 1]))
def test_a_byte_more_or_less_is_refused(tensor, difference):
    """The bytes are exactly the shape's elements times the datatype's size (G-05)."""
    raw = tensor.raw + b"\x00" if difference > 0 or not tensor.raw else tensor.raw[:-1]
    needed = math.prod(tensor.shape) * DATATYPES[tensor.datatype].itemsize

    with pytest.raises(InvalidInput) as caught:
        validate(WHAT, Tensor(tensor.name, tensor.datatype, tensor.shape, raw))

    shape = list(tensor.shape)
    assert caught.value.message == f'input "age": {tensor.datatype} of shape {shape} needs {needed} bytes, got {len(raw)}'


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x02\x00\x00", "the length of a BYTES element is truncated at byte 0 of 3"),
        (b"\x00\x00\x00\x00\x01\x00", "the length of a BYTES element is truncated at byte 4 of 6"),
        (b"\x03\x00\x00\x00ab", "the BYTES element at byte 4 exceeds the 6 bytes of the tensor"),
        (b"\xff\xff\xff\xffab", "the BYTES element at byte 4 exceeds the 6 bytes of the tensor"),
        (b"\x01\x00\x00\x00a", "shape [2] needs 2 BYTES elements, got 1"),
        (b"\x00\x00\x00\x00" * 3, "shape [2] needs 2 BYTES elements, got 3"),
        (b"", "shape [2] needs 2 BYTES elements, got 0"),
    ],
)
def test_bytes_with_wrong_length_prefixes_are_refused(raw, message):
    """A length that is cut off, points beyond the end, or leaves another number of elements than the shape has (G-10)."""
    with pytest.raises(InvalidInput) as caught:
        validate(WHAT, Tensor("age", "BYTES", (2,), raw))

    assert caught.value.message == f'input "age": {message}'


@given(st.binary(max_size=40), st.integers(0, 4))
def test_arbitrary_bytes_never_crash_the_check(raw, count):
    """Whatever the bytes are, they are either the shape's elements or refused as input."""
    tensor = Tensor("age", "BYTES", (count,), raw)

    try:
        validate(WHAT, tensor)
    except InvalidInput:
        return

    assert encode_bytes(decode_bytes(tensor)) == raw
    assert len(decode_bytes(tensor)) == count


@pytest.mark.parametrize("byte", [2, 0x80, 0xFF])
def test_a_bool_is_0_or_1(byte):
    """Another byte would be true here and false there."""
    validate(WHAT, Tensor("age", "BOOL", (2,), b"\x00\x01"))

    with pytest.raises(InvalidInput, match='input "age": a BOOL element is one byte, 0 or 1'):
        validate(WHAT, Tensor("age", "BOOL", (3,), bytes([0, 1, byte])))


@given(st.lists(st.binary(max_size=5)))
def test_bytes_keep_their_elements(elements):
    """Empty ones and those that are no text included."""
    assert decode_bytes(Tensor("x", "BYTES", (len(elements),), encode_bytes(elements))) == elements


def test_an_element_of_bytes_follows_its_length():
    """Four bytes, little-endian, no terminator."""
    assert encode_bytes([b"ab", b""]) == b"\x02\x00\x00\x00ab\x00\x00\x00\x00"


def test_a_wrong_length_prefix_is_found_while_decoding():
    """The error names the tensor."""
    with pytest.raises(InvalidInput, match='tensor "age": the BYTES element at byte 4 exceeds the 5 bytes of the tensor'):
        decode_bytes(Tensor("age", "BYTES", (1,), b"\x09\x00\x00\x00a"))


@pytest.mark.parametrize("name", PYTHON_HAS)
@given(data=st.data())
def test_packing_then_unpacking_gives_the_same_values(name, data):
    """The same values of the same types, NaN, infinities and -0.0 included."""
    values = data.draw(st.lists(python_values(name), max_size=MAX_ELEMENTS))

    raw = pack(WHAT, DATATYPES[name], values)
    tensor = Tensor("x", name, (len(values),), raw)

    validate(WHAT, tensor)
    assert list(map(repr, unpack(tensor))) == list(map(repr, values))


@given(tensors([name for name in PYTHON_HAS if name not in ("FP16", "FP32", "FP64")]))
def test_unpacking_then_packing_gives_the_same_bytes(tensor):
    """Every bit pattern of a datatype is one value; of floats only the bits of a NaN may change."""
    assert pack(WHAT, DATATYPES[tensor.datatype], unpack(tensor)) == tensor.raw


@pytest.mark.parametrize(
    ("name", "letter"),
    [
        ("INT8", "b"),
        ("INT16", "h"),
        ("INT32", "i"),
        ("INT64", "q"),
        ("UINT8", "B"),
        ("UINT16", "H"),
        ("UINT32", "I"),
        ("UINT64", "Q"),
        ("FP16", "e"),
        ("FP32", "f"),
        ("FP64", "d"),
    ],
)
def test_numbers_are_little_endian(name, letter):
    """The lowest byte comes first, on every machine."""
    assert pack(WHAT, DATATYPES[name], [1, 100]) == struct.pack(f"<2{letter}", 1, 100)


@pytest.mark.parametrize(("name"), INTEGERS)
def test_integers_are_accepted_exactly_within_their_range(name):
    """Nothing wraps (I-11). The message says which element, and what would have fitted."""
    datatype = DATATYPES[name]
    bits = 8 * datatype.itemsize
    low, high = (0, 2**bits - 1) if name.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    assert unpack(Tensor("x", name, (2,), pack(WHAT, datatype, [low, high]))) == [low, high]

    for beyond in (low - 1, high + 1, 10**400):
        with pytest.raises(InvalidInput) as caught:
            pack(WHAT, datatype, [low, high, beyond])
        assert caught.value.message == f'input "age": element 2 is not a {name} ({low} to {high})'


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INT32", True),
        ("INT32", 1.0),
        ("INT32", 1.5),
        ("INT32", "1"),
        ("INT32", None),
        ("UINT8", -1),
        ("BOOL", 2),
        ("BOOL", -1),
        ("BOOL", 1.0),
        ("BOOL", "true"),
        ("BOOL", None),
        ("FP32", True),
        ("FP32", "1"),
        ("FP32", None),
        ("FP32", 1e39),
        ("FP32", 10**400),
        ("FP64", 10**400),
        ("FP16", 65520.0),
        ("BYTES", "text"),
        ("BYTES", 1),
        ("BYTES", None),
        ("BYTES", bytearray(b"a")),
        ("FP64", [1.0]),
    ],
)
def test_a_value_of_another_type_is_refused_not_converted(name, value):
    """A conversion would change what the caller meant; the first element that does not fit is named."""
    good = {"BOOL": True, "BYTES": b"", "FP16": 1.0, "FP32": 1.0, "FP64": 1.0}.get(name, 1)

    with pytest.raises(InvalidInput, match=f'input "age": element 2 is not a {name}'):
        pack(WHAT, DATATYPES[name], [good, good, value, value])


def test_booleans_may_be_written_as_0_and_1():
    """Clients without booleans send these (I-13)."""
    assert pack(WHAT, DATATYPES["BOOL"], [0, 1, False, True]) == b"\x00\x01\x00\x01"


def test_integers_are_accepted_for_floats():
    """JSON writers drop the point of a whole number."""
    assert pack(WHAT, DATATYPES["FP32"], [2, -1]) == struct.pack("<2f", 2.0, -1.0)


def test_bf16_cannot_be_packed_from_python_numbers():
    """It travels as raw bytes only."""
    with pytest.raises(InvalidInput, match='"age": BF16 is supported as raw bytes only'):
        unpack(Tensor("age", "BF16", (1,), b"\x80\x3f"))
