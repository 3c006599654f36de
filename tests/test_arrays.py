"""numpy arrays <-> wire tensors."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from splitserve.arrays import DTYPES, datatype_of, from_array, objects, to_array
from splitserve.errors import InvalidInput
from splitserve.tensors import Tensor, unpack
from tests.strategies import ALL, tensors

OWN_DTYPE = tuple(name for name in ALL if name not in ("BF16", "BYTES"))
FLOAT32_BITS = st.integers(0, 2**32 - 1)


def bits(number: float) -> int:
    """Of a float32."""
    return struct.unpack("<I", struct.pack("<f", number))[0]


def as_float(pattern: int) -> float:
    """The float32 with these bits, as a double."""
    return struct.unpack("<f", struct.pack("<I", pattern))[0]


@given(tensors([name for name in ALL if name != "BF16"]))
def test_a_tensor_is_the_same_after_it_was_an_array(tensor):
    """Bit for bit, NaN payloads and empty dimensions included."""
    array = to_array(tensor)

    assert array.shape == tensor.shape
    assert array.dtype == DTYPES[tensor.datatype]
    assert from_array(tensor.name, array) == tensor


@given(tensors(["BF16"]))
def test_bf16_is_the_same_after_it_was_an_array(tensor):
    """Float32 holds every BF16 exactly; a NaN stays one, of whatever bits."""
    array = to_array(tensor)
    back = from_array(tensor.name, array, "BF16")

    assert array.dtype == np.float32
    assert (back.name, back.datatype, back.shape) == (tensor.name, "BF16", tensor.shape)
    before, after = (np.frombuffer(raw, dtype="<u2") for raw in (tensor.raw, back.raw))
    is_nan = np.isnan(array).ravel()
    np.testing.assert_array_equal(after[~is_nan], before[~is_nan])
    assert np.isnan(to_array(back).ravel()[is_nan]).all()


@given(tensors([name for name in ALL if name != "BF16"]))
def test_an_array_has_the_elements_that_python_reads(tensor):
    """Two readings of the same bytes, by numpy and by `struct`, agree."""
    assert list(map(repr, to_array(tensor).ravel().tolist())) == list(map(repr, unpack(tensor)))


@given(tensors(OWN_DTYPE))
def test_an_array_is_a_read_only_view(tensor):
    """Nothing is copied, so nothing may be changed: the bytes may be another reader's too."""
    array = to_array(tensor)

    assert not array.flags.writeable
    assert not array.flags.owndata


@pytest.mark.parametrize("datatype", ["INT16", "INT32", "INT64", "UINT16", "UINT32", "UINT64", "FP16", "FP32", "FP64"])
def test_big_endian_arrays_are_encoded_little_endian(datatype):
    """The wire has one byte order, numpy two."""
    values = [[1, 2, 3], [100, 0, 7]]
    little = np.array(values, dtype=DTYPES[datatype])
    big = little.astype(little.dtype.newbyteorder(">"))

    tensor = from_array("x", big)

    assert big.tobytes() != little.tobytes()
    assert tensor == from_array("x", little)
    assert tensor.raw == little.tobytes()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.int32).reshape(3, 4).T,
        np.arange(12, dtype=np.int32)[::2],
        np.arange(12, dtype=np.int32)[::-1],
        np.asfortranarray(np.arange(12, dtype=np.int32).reshape(3, 4)),
        np.broadcast_to(np.arange(3, dtype=np.int32), (2, 3)),
        np.array([["a", "bb"], ["ccc", ""]]).T,
        np.array(5, dtype=np.int32),
    ],
    ids=["transposed", "strided", "reversed", "fortran", "broadcast", "text", "scalar"],
)
def test_elements_are_encoded_row_major_whatever_their_memory_layout(array):
    """The wire has C order without gaps."""
    tensor = from_array("x", array)

    assert tensor.shape == array.shape
    assert to_array(tensor).astype(array.dtype).tolist() == array.tolist()


@pytest.mark.parametrize(
    "array",
    [
        np.array(["é", "", "a"]),
        np.array(["é", "", "a"], dtype=np.object_),
        np.array(["é".encode(), b"", b"a"]),
        np.array(["é".encode(), b"", "a"], dtype=np.object_),
        np.array(["é", "", "a"], dtype=np.dtypes.StringDType()).astype(np.object_),
    ],
    ids=["U", "objects", "S", "mixed", "StringDType"],
)
def test_text_and_bytes_are_encoded_as_bytes(array):
    """Text is UTF-8; elements are returned as bytes."""
    tensor = from_array("x", array)

    assert tensor == Tensor("x", "BYTES", (3,), b"\x02\x00\x00\x00\xc3\xa9\x00\x00\x00\x00\x01\x00\x00\x00a")
    assert to_array(tensor).tolist() == ["é".encode(), b"", b"a"]


@pytest.mark.parametrize("element", [1, None, 1.5, ["a"]])
def test_an_object_that_is_not_text_is_refused_by_its_type(element):
    """Encoding its text would be a guess."""
    with pytest.raises(InvalidInput) as caught:
        from_array("age", objects(["a", element], (2,)))

    assert caught.value.message == f'"age": expected bytes or text as BYTES elements, got {type(element).__name__}'


def test_text_that_utf_8_cannot_encode_is_refused():
    """A lone surrogate is legal in a Python string and in no UTF-8."""
    with pytest.raises(InvalidInput, match='"age"'):
        from_array("age", np.array(["\ud800"]))


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "datetime64[s]", "timedelta64[s]", "V4", "i4,f4", "longdouble"])
def test_a_dtype_without_a_datatype_is_refused(dtype):
    """The message names the tensor and the dtype."""
    array = np.zeros(2, dtype=dtype)

    with pytest.raises(InvalidInput) as caught:
        from_array("age", array)

    assert caught.value.message == f'"age": dtype {array.dtype} has no datatype in the Open Inference Protocol'
    assert datatype_of(array.dtype) is None


@pytest.mark.parametrize("datatype", OWN_DTYPE)
def test_a_dtype_and_its_datatype_name_each_other(datatype):
    """In either byte order."""
    assert datatype_of(DTYPES[datatype]) == datatype
    assert datatype_of(DTYPES[datatype].newbyteorder(">")) == datatype


@pytest.mark.parametrize("dtype", ["O", "S3", "U3"])
def test_text_bytes_and_objects_are_bytes(dtype):
    """Which of their elements can travel is seen when they are encoded."""
    assert datatype_of(np.dtype(dtype)) == "BYTES"


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("age", "FP32", (2,), bytes(7)),
        Tensor("age", "FP32", (2,), bytes(12)),
        Tensor("age", "BF16", (2,), bytes(3)),
        Tensor("age", "BF16", (2,), bytes(6)),
        Tensor("age", "BYTES", (2,), bytes(4)),
        Tensor("age", "FP32", (0, 2**62), b""),
        Tensor("age", "FP32", (0, 2**70), b""),
    ],
)
def test_bytes_that_contradict_the_shape_are_refused(tensor):
    """The message names the tensor, what was expected and what was received."""
    with pytest.raises(InvalidInput) as caught:
        to_array(tensor)

    shape = list(tensor.shape)
    assert caught.value.message == f'"age": {len(tensor.raw)} bytes are not {tensor.datatype} of shape {shape}'


def test_lists_and_bytes_stay_elements_of_an_object_array():
    """numpy would unpack lists of one length into a further dimension."""
    array = objects([[1, 2], [3, 4]], (2, 1))

    assert array.shape == (2, 1)
    assert array[0, 0] == [1, 2]


@given(FLOAT32_BITS)
@example(bits(3.4028234663852886e38))
@example(bits(1e-45))
def test_bf16_is_the_nearest_one(pattern):
    """Rounding is to the nearest, half to even; beyond the largest it is infinite. Source: IEEE 754, roundTiesToEven."""
    number = as_float(pattern)
    sent = np.array([number], dtype=np.float32)

    (got,) = np.frombuffer(from_array("x", sent, "BF16").raw, dtype="<u2").tolist()

    if np.isnan(number):
        assert np.isnan(as_float(got << 16))
    elif np.isinf(number):
        assert got << 16 == pattern
    else:
        lower = pattern & 0x7FFF0000  # of the magnitude
        upper = lower + 0x10000
        beyond = 2.0**128 if upper == 0x7F800000 else as_float(upper)
        below, above = abs(number) - as_float(lower), beyond - abs(number)  # exact in doubles
        even = lower if lower & 0x10000 == 0 else upper
        nearest = lower if below < above else upper if above < below else even
        assert got << 16 == nearest | (pattern & 0x80000000)


@pytest.mark.parametrize(
    ("number", "pattern"),
    [
        (1.0, 0x3F80),
        (1.00390625, 0x3F80),  # half way, the lower one is even
        (1.01171875, 0x3F82),  # half way, the upper one is even
        (1.0039063692092896, 0x3F81),  # just above half way
        (-2.5, 0xC020),
        (3.4e38, 0x7F80),
        (float("-inf"), 0xFF80),
        (0.0, 0x0000),
        (-0.0, 0x8000),
    ],
)
def test_bf16_of_known_numbers(number, pattern):
    """The same rule in literals."""
    assert from_array("x", np.array([number], dtype=np.float32), "BF16").raw == pattern.to_bytes(2, "little")


def test_bf16_keeps_the_shape_of_any_array():
    """Strided and of other floats too."""
    array = np.arange(6, dtype=np.float64).reshape(2, 3).T

    tensor = from_array("x", array, "BF16")

    assert tensor.shape == (3, 2)
    assert to_array(tensor).tolist() == array.tolist()


@pytest.mark.parametrize("words", [3, 1000], ids=["repeated", "distinct"])
def test_many_texts_are_encoded_as_each_alone(words):
    """Text that repeats is encoded once."""
    elements = [f"wört {number % words}" if number % 2 else f"{number % words}".encode() for number in range(1000)]

    tensor = from_array("x", objects(elements, (1000,)))

    assert tensor.raw == b"".join(from_array("x", objects([element], (1,))).raw for element in elements)


@pytest.mark.parametrize("odd", [7, ["a"], "\ud800"], ids=["number", "list", "surrogate"])
@pytest.mark.parametrize("place", [0, 999])
def test_one_that_is_no_text_among_many_is_refused(odd, place):
    """Also one that has no hash."""
    elements = ["a"] * 1000
    elements[place] = odd

    with pytest.raises(InvalidInput, match="expected bytes or text as BYTES elements|cannot be encoded as UTF-8"):
        from_array("x", objects(elements, (1000,)))
