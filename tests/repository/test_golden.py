"""Golden samples: kept in one file, and compared within tolerances."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.arrays import DTYPES, from_array
from splitserve.repository.golden import Difference, Golden, decode, encode, error_ratio, replay, worst_difference
from splitserve.repository.manifest import BundleError, Manifest, Tolerance
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor, encode_bytes
from tests.budgets import examples
from tests.strategies import tensors

EXACT: dict[str, Tolerance] = {}


def spec_of(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tensor.name, tensor.datatype, tensor.shape)


def floats(values: object, name: str = "y", datatype: str = "FP64") -> Tensor:
    return from_array(name, np.array(values, dtype=DTYPES[datatype]), datatype)


def unique_tensors() -> st.SearchStrategy[list[Tensor]]:
    return st.lists(tensors(), max_size=3, unique_by=lambda tensor: tensor.name)


@settings(max_examples=examples(40))
@given(unique_tensors(), unique_tensors())
def test_samples_are_the_same_after_the_file(inputs, outputs):
    """Every datatype bit for bit; an input and an output may have the same name."""
    golden = Golden(tuple(inputs), tuple(outputs))

    assert decode(encode(golden), list(map(spec_of, inputs)), list(map(spec_of, outputs))) == golden


GOLDEN = Golden((floats([[1.5], [2.5]], "age"),), (floats([1.0, 2.0]),))
INPUTS, OUTPUTS = [spec_of(GOLDEN.inputs[0])], [spec_of(GOLDEN.outputs[0])]


def test_samples_are_in_the_order_of_the_signature():
    """The file has names, not places."""
    first, second = floats([1.0], "a"), floats([2.0], "b")

    found = decode(encode(Golden((first, second), ())), [spec_of(second), spec_of(first)], [])

    assert found.inputs == (second, first)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [([*INPUTS, TensorSpec("size", "FP32", ("batch", 1))], []), ([], [TensorSpec("age", "FP64", ("batch", 1))])],
)
def test_a_missing_tensor_is_named(inputs, outputs):
    """Inputs are not looked for among outputs."""
    missing = "inputs/size" if inputs else "outputs/age"

    with pytest.raises(BundleError, match=f"^golden.npz: {missing} is not a file in the archive$"):
        decode(encode(GOLDEN), inputs, outputs)


def a_zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def an_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        encode(GOLDEN)[:-1],
        encode(GOLDEN)[: len(encode(GOLDEN)) // 2],
        pickle.dumps([1, 2]),
        an_npy(np.arange(3)),
        a_zip({}),
        a_zip({"inputs/age": b"junk", "outputs/y": b"junk"}),
        a_zip({"inputs/age.npy": b"junk", "outputs/y.npy": b"junk"}),
        a_zip({"inputs/age.npy": an_npy(np.array([{}], dtype=object)), "outputs/y.npy": b""}),
    ],
    ids=["empty", "junk", "cut", "half", "pickle", "npy", "empty zip", "no arrays", "no npy", "objects"],
)
def test_an_invalid_golden_file_is_refused(data):
    """Any defect of the file is an error of the bundle."""
    with pytest.raises(BundleError, match=r"^golden\.npz: "):
        decode(data, INPUTS, OUTPUTS)


def test_no_samples_have_no_difference():
    """A bundle without samples would agree with any model."""
    spec = TensorSpec("x", "FP64", ("batch",))
    empty = from_array("x", np.empty((0,)))

    with pytest.raises(BundleError, match=r"^golden\.npz: expected at least one sample, got none"):
        replay(encode(Golden((empty,), ())), manifest_with((spec,)), lambda inputs: ())


def manifest_with(inputs):
    return Manifest(
        schema_version=1, name="m", kind="predict", version=1, created="", files={}, inputs=inputs, outputs=(), environment={}
    )


class Canary:
    """Records that it was unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_no_object_in_the_file_is_unpickled(tmp_path):
    """Reading samples runs no code: the canary stays silent."""
    canary = tmp_path / "sang"
    npy = an_npy(np.array([Canary(canary)], dtype=object))

    with pytest.raises(BundleError):
        decode(a_zip({"inputs/age.npy": npy}), INPUTS, [])
    assert not canary.exists()

    np.load(io.BytesIO(npy), allow_pickle=True)  # it would have sung
    assert canary.exists()


def test_every_damage_raises_the_documented_error():
    """A byte that is wrong is unnoticed or the bundle's fault, wherever it is in the file."""
    good = encode(GOLDEN)

    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 0xFF
        try:
            decode(bytes(damaged), INPUTS, OUTPUTS)
        except BundleError:
            continue


@given(tensors())
def test_equal_answers_have_no_difference(tensor):
    """NaN equals NaN, every infinity itself, and nothing is needed of a tensor without elements."""
    assert worst_difference([tensor], [tensor], EXACT) is None


def test_the_worst_element_is_found():
    """Its sample, its index, the expected and the found value."""
    want = floats([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "probabilities")
    have = floats([[1.1, 2.0], [3.0, 4.5], [5.2, 6.0]], "probabilities")

    worst = worst_difference([want], [have], EXACT)

    assert worst == Difference("probabilities", 1, (1, 1), "4.0", "4.5")
    assert str(worst) == 'output "probabilities" of golden sample 1 at [1, 1]: expected 4.0, got 4.5'


@pytest.mark.parametrize("order", [1, -1])
def test_the_worst_of_several_outputs_is_found(order):
    """Whichever comes first, in the signature or in the answer."""
    want = [floats([1.0], "a"), floats([1.0], "b"), floats([1.0], "c")][::order]
    have = [floats([1.1], "a"), floats([1.3], "b"), floats([1.2], "c")]

    worst = worst_difference(want, have, EXACT)

    assert worst is not None
    assert worst.tensor == "b"


def test_the_worst_element_exceeds_its_tolerance_the_most():
    """Not the one that differs most."""
    tolerances = {"rough": Tolerance(atol=1.0)}

    worst = worst_difference(
        [floats([1.0], "rough"), floats([1.0], "exact")], [floats([1.9], "rough"), floats([1.1], "exact")], tolerances
    )

    assert worst is not None
    assert worst.tensor == "exact"


@pytest.mark.parametrize(
    ("tolerance", "expected", "got"),
    [
        (Tolerance(), 1.0, 1.0),
        (Tolerance(atol=0.5), 1.0, 1.5),
        (Tolerance(atol=0.5), 1.0, 0.5),
        (Tolerance(rtol=0.5), 2.0, 3.0),
        (Tolerance(rtol=0.5), -2.0, -3.0),
        (Tolerance(rtol=0.5, atol=0.25), 1.0, 1.75),
        (Tolerance(atol=np.inf), 1.0, 1e300),
        (Tolerance(), -0.0, 0.0),
        (Tolerance(rtol=1.0), np.inf, np.inf),
    ],
)
def test_a_difference_equal_to_the_tolerance_passes(tolerance, expected, got):
    """``atol + rtol * abs(expected)``, on either side."""
    assert worst_difference([floats([expected])], [floats([got])], {"y": tolerance}) is None
    assert error_ratio([floats([expected])], [floats([got])], {"y": tolerance}) <= 1


@pytest.mark.parametrize(
    ("tolerance", "expected", "got"),
    [
        (Tolerance(), 1.0, np.nextafter(1.0, 2)),
        (Tolerance(atol=0.5), 1.0, np.nextafter(1.5, 2)),
        (Tolerance(atol=0.5), 1.0, 0.4999),
        (Tolerance(rtol=0.5), 2.0, np.nextafter(3.0, 4)),
        (Tolerance(rtol=0.5), 2.0, 4.0),  # half of what came would be enough
        (Tolerance(rtol=0.5), 0.0, 1e-300),
        (Tolerance(rtol=1.0, atol=1.0), np.nan, 1.0),
        (Tolerance(rtol=1.0, atol=1.0), 1.0, np.nan),
        (Tolerance(rtol=1.0, atol=1.0), np.inf, 1.0),
        (Tolerance(rtol=1.0, atol=1.0), 1.0, np.inf),
        (Tolerance(rtol=1.0, atol=1.0), np.inf, -np.inf),
        (Tolerance(rtol=1.0, atol=1.0), np.inf, np.nan),
        (Tolerance(rtol=0.1), 1e308, -1.7e308),
    ],
)
def test_a_difference_beyond_the_tolerance_is_found(tolerance, expected, got):
    """By however little, and where numbers cannot be subtracted too."""
    worst = worst_difference([floats([0.0, expected])], [floats([0.0, got])], {"y": tolerance})
    assert error_ratio([floats([0.0, expected])], [floats([0.0, got])], {"y": tolerance}) > 1

    assert worst == Difference("y", 1, (1,), str(np.float64(expected)), str(np.float64(got)))


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
def test_all_floats_have_tolerances(datatype):
    """Of any width."""
    want = floats([1.0, 2.0], datatype="FP32")
    have = floats([1.0, 2.5], datatype="FP32")
    want, have = (
        from_array("y", np.frombuffer(each.raw, dtype="<f4").astype(DTYPES.get(datatype, "<f4")), datatype)
        for each in (want, have)
    )

    assert worst_difference([want], [have], {"y": Tolerance(atol=0.5)}) is None
    assert worst_difference([want], [have], {"y": Tolerance(atol=0.4)}) is not None


@pytest.mark.parametrize(
    ("want", "have"),
    [
        (Tensor("y", "INT64", (1,), bytes(8)), Tensor("y", "INT64", (1,), bytes(7) + b"\x01")),
        (Tensor("y", "UINT8", (1,), b"\x01"), Tensor("y", "UINT8", (1,), b"\x02")),
        (Tensor("y", "BOOL", (1,), b"\x01"), Tensor("y", "BOOL", (1,), b"\x00")),
        (Tensor("y", "BYTES", (1,), encode_bytes([b"a"])), Tensor("y", "BYTES", (1,), encode_bytes([b"b"]))),
    ],
)
def test_other_datatypes_than_floats_are_compared_exactly(want, have):
    """A tolerance in the manifest has no effect on them."""
    worst = worst_difference([want], [have], {"y": Tolerance(rtol=1e6, atol=1e6)})

    assert worst is not None
    assert (worst.tensor, worst.sample, worst.index) == ("y", 0, (0,))


@pytest.mark.parametrize(
    ("have", "got"),
    [
        ([], "nothing"),
        ([floats([1.0, 2.0], "other")], "nothing"),
        ([floats([1.0, 2.0], datatype="FP32")], "FP32 [2]"),
        ([floats([[1.0], [2.0]])], "FP64 [2, 1]"),
        ([floats([1.0])], "FP64 [1]"),
    ],
)
def test_an_answer_of_another_shape_is_the_worst_difference(have, got):
    """A tensor that is missing, of another datatype or of another shape, even if its numbers agree."""
    worst = worst_difference([floats([9.0], "z"), floats([1.0, 2.0])], [floats([0.0], "z"), *have], {"y": Tolerance(atol=9)})

    assert worst == Difference("y", 0, (), "FP64 [2]", got)


def test_scalars_are_compared():
    """It has no index."""
    assert worst_difference([floats(1.0)], [floats(2.0)], EXACT) == Difference("y", 0, (), "1.0", "2.0")


def test_the_error_ratio_is_that_of_the_worst_output():
    """Relative to its own tolerance; what has none, or another shape, is infinitely far."""
    tolerances = {"rough": Tolerance(atol=1.0), "y": Tolerance(rtol=0.1)}

    close = error_ratio(
        [floats([1.0], "rough"), floats([10.0, 20.0])], [floats([1.5], "rough"), floats([10.25, 20.0])], tolerances
    )

    assert close == 0.5
    assert error_ratio([floats([1.0])], [floats([1.0, 1.0])], tolerances) == np.inf
    assert error_ratio([floats([1.0], "exact")], [floats([1.1], "exact")], tolerances) == np.inf
    assert error_ratio([floats([1.0])], [], tolerances) == np.inf
    assert error_ratio([floats([])], [floats([])], tolerances) == 0
