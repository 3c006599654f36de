"""Signatures: requests checked against one, halves of a pair against each other, answers against what was promised."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.arrays import DTYPES
from splitserve.errors import InvalidInput, PairMismatch, SplitserveError
from splitserve.signature import (
    InputCheck,
    OutputBytes,
    TensorSpec,
    accepts,
    bound_sizes,
    check_inputs,
    check_outputs,
    choose_outputs,
    empty,
    fits,
)
from splitserve.tensors import DATATYPES, Tensor, encode_bytes
from tests.strategies import ALL, FLOATS, INTEGERS

AGE = TensorSpec("age", "FP64", ("batch", 1))
ISLAND = TensorSpec("island", "BYTES", ("batch", 1))
IMAGE = TensorSpec("image", "UINT8", ("batch", 2, 3))
SPECS = (AGE, IMAGE)

NUMBERS = tuple(name for name in (*INTEGERS, *FLOATS) if name != "BF16")


def zeros(name: str, datatype: str, shape: tuple[int, ...]) -> Tensor:
    """A valid tensor."""
    count = math.prod(shape)
    return Tensor(
        name, datatype, shape, encode_bytes([b""] * count) if datatype == "BYTES" else bytes(count * DATATYPES[datatype].itemsize)
    )


def age(n_rows: int = 2) -> Tensor:
    return zeros("age", "FP64", (n_rows, 1))


def image(n_rows: int = 2) -> Tensor:
    return zeros("image", "UINT8", (n_rows, 2, 3))


@pytest.mark.parametrize("widen", [True, False])
@pytest.mark.parametrize("n_rows", [0, 1, 7])
def test_inputs_of_the_signature_are_accepted_in_any_order(widen, n_rows):
    """The order of inputs means nothing; a batch may have any number of rows, none included."""
    check_inputs(SPECS, [age(n_rows), image(n_rows)], widen=widen)
    check_inputs(SPECS, [image(n_rows), age(n_rows)], widen=widen)


@pytest.mark.parametrize("widen", [True, False])
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([age()], 'missing input "image"'),
        ([], 'missing input "age", "image"'),
        ([age(), image(), zeros("size", "FP32", (2, 1))], 'unknown input "size", expected "age", "image"'),
        ([age(), image(), age()], 'input "age" is given twice'),
        ([zeros("age", "BYTES", (2, 1)), image()], 'input "age": expected datatype FP64, got BYTES'),
        ([zeros("age", "BOOL", (2, 1)), image()], 'input "age": expected datatype FP64, got BOOL'),
        ([Tensor("age", "fp64", (2, 1), bytes(16)), image()], 'input "age": expected datatype FP64, got fp64'),
        ([age(), zeros("image", "INT8", (2, 2, 3))], 'input "image": expected datatype UINT8, got INT8'),
        ([zeros("age", "FP64", (2, 2)), image()], 'input "age": expected shape [-1, 1], got [2, 2]'),
        ([zeros("age", "FP64", (2, 1, 1)), image()], 'input "age": expected shape [-1, 1], got [2, 1, 1]'),
        ([zeros("age", "FP64", ()), image()], 'input "age": expected shape [-1, 1], got []'),
        ([Tensor("age", "FP64", (-1, 1), bytes(8)), image()], 'input "age": expected shape [-1, 1], got [-1, 1]'),
        ([age(), zeros("image", "UINT8", (2, 3, 2))], 'input "image": expected shape [-1, 2, 3], got [2, 3, 2]'),
        ([age(), zeros("image", "UINT8", (12,))], 'input "image": expected shape [-1, 2, 3], got [12]'),
        ([age(), image(3)], 'input "image" has 3 rows, but input "age" has 2'),
        ([image(3), age()], 'input "image" has 3 rows, but input "age" has 2'),
        ([Tensor("age", "FP64", (2, 1), bytes(15)), image()], 'input "age": FP64 of shape [2, 1] needs 16 bytes, got 15'),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(inputs, message, widen):
    """The message names the input, what was expected and what was received (I-09, I-19)."""
    with pytest.raises(InvalidInput) as caught:
        check_inputs(SPECS, inputs, widen=widen)

    assert caught.value.message == message


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("n" * 10_000, "FP64", (1, 1), bytes(8)),
        Tensor("age", "d" * 10_000, (1, 1), b""),
        Tensor("age", "FP64", (1,) * 9_000, b""),
    ],
    ids=["name", "datatype", "shape"],
)
def test_an_error_message_is_short(tensor):
    """A message is sent in trailing metadata, which is small, so it quotes received values only in part."""
    with pytest.raises(InvalidInput) as caught:
        check_inputs([AGE], [tensor], widen=True)

    assert len(caught.value.message) < 200


def test_only_some_of_many_missing_inputs_are_listed():
    """Twenty names help, a thousand do not."""
    specs = [TensorSpec(f"x{number}", "FP32", ("batch", 1)) for number in range(1000)]

    with pytest.raises(InvalidInput) as caught:
        check_inputs(specs, [], widen=False)

    shown = ", ".join(f'"x{number}"' for number in range(20))
    assert caught.value.message == f"missing input {shown} and 980 more"


def test_too_many_rows_are_too_large():
    """More elements than a tensor may have is a matter of size, not of form."""
    with pytest.raises(InvalidInput):
        check_inputs([AGE], [Tensor("age", "FP64", (2**31 + 1, 1), b"")], widen=False)


def test_only_free_leading_dimensions_are_a_batch():
    """Inputs with a fixed leading dimension, and scalars, have no rows that could differ."""
    specs = [AGE, TensorSpec("weights", "FP32", (3, 2)), TensorSpec("scale", "FP32", ())]

    check_inputs(specs, [age(5), zeros("weights", "FP32", (3, 2)), zeros("scale", "FP32", ())], widen=False)


@pytest.mark.parametrize("free", ["length", -1])
def test_a_free_dimension_accepts_any_size(free):
    """By name in our manifests, as -1 in other servers' metadata."""
    spec = TensorSpec("x", "FP32", ("batch", free))

    for size in (0, 1, 9):
        check_inputs([spec], [zeros("x", "FP32", (2, size))], widen=False)


@pytest.mark.parametrize("declared", NUMBERS)
def test_numbers_widen_by_numpys_safe_casting(declared):
    """A preprocessor takes a narrower datatype where numpy casts it under the rule "safe", and no other."""
    taken = {sent for sent in ALL if accepts(declared, sent) and sent != "BF16"}

    assert taken == {sent for sent in NUMBERS if np.can_cast(DTYPES[sent], DTYPES[declared], "safe")}


def test_bf16_widens_to_fp32_and_fp64():
    """numpy has no such dtype: float32 has BF16's exponent and more digits, float16 has neither enough."""
    assert [declared for declared in ALL if accepts(declared, "BF16")] == ["BF16", "FP32", "FP64"]
    assert [sent for sent in ALL if accepts("BF16", sent)] == ["BF16"]


@pytest.mark.parametrize("declared", ["BOOL", "BYTES"])
def test_datatypes_other_than_numbers_are_not_converted(declared):
    """Neither text nor truth is a narrow number."""
    assert [sent for sent in ALL if accepts(declared, sent)] == [declared]


@pytest.mark.parametrize("sent", ["INT32", "FP32", "BF16", "UINT8"])
def test_only_preprocessors_widen(sent):
    """A predictor gets what its signature says and nothing else."""
    check_inputs([AGE], [zeros("age", sent, (2, 1))], widen=True)

    with pytest.raises(InvalidInput, match=f'input "age": expected datatype FP64, got {sent}'):
        check_inputs([AGE], [zeros("age", sent, (2, 1))], widen=False)


@pytest.mark.parametrize("spec", [AGE, ISLAND], ids=lambda spec: spec.name)
def test_one_value_per_row_may_be_sent_without_its_inner_dimension(spec):
    """(batch,) is taken for (batch, 1) by a preprocessor, and counts as the batch."""
    tensor = zeros(spec.name, spec.datatype, (3,))

    check_inputs([spec, IMAGE], [tensor, image(3)], widen=True)

    with pytest.raises(InvalidInput, match=r"expected shape \[-1, 1\], got \[3\]"):
        check_inputs([spec, IMAGE], [tensor, image(3)], widen=False)
    with pytest.raises(InvalidInput, match='input "image" has 2 rows'):
        check_inputs([spec, IMAGE], [tensor, image(2)], widen=True)


@pytest.mark.parametrize("shape", [("batch", 2), ("batch", 1, 1), ("batch",), (1, 1)])
def test_only_a_column_may_omit_its_inner_dimension(shape):
    """Where a row has more than one value, or rows are not free, a missing dimension is a mistake."""
    sent = (3, 1) if shape == ("batch",) else (3,)

    with pytest.raises(InvalidInput, match="expected shape"):
        check_inputs([TensorSpec("x", "FP32", shape)], [zeros("x", "FP32", sent)], widen=True)


def test_free_dimensions_are_minus_one_on_the_wire():
    """Names are ours, -1 is the protocol's."""
    assert TensorSpec("x", "FP32", ("batch", 3, "width", -1)).wire_shape == (-1, 3, -1, -1)


@pytest.mark.parametrize("shape", [("batch",), ("batch", 3), ("batch", "width", 2)])
def test_an_empty_tensor_has_no_rows(shape):
    """It passes its own signature."""
    spec = TensorSpec("x", "FP32", shape)

    tensor = empty(spec)

    assert (tensor.n_rows, tensor.raw) == (0, b"")
    check_inputs([spec], [tensor], widen=False)


def test_an_empty_tensor_takes_its_sizes_from_the_request():
    """A name that inputs and outputs share stands for one size; what no input gives is 0."""
    sizes = bound_sizes([TensorSpec("x", "FP32", ("batch", "width"))], [zeros("x", "FP32", (0, 16))])

    assert empty(TensorSpec("y", "FP32", ("batch", 2, "width", "other")), sizes).shape == (0, 2, 16, 0)


@pytest.mark.parametrize(
    ("shape", "datatype", "n_bytes"),
    [
        (("batch", 200_000), "FP32", 3 * 200_000 * 4),
        (("batch",), "BYTES", 3 * 4),
        (("batch", "width"), "INT64", 3 * 5 * 8),
        (("batch", "unknown"), "INT64", 0),
        ((2, 7), "INT8", 14),
        ((), "FP64", 8),
    ],
)
def test_the_size_of_outputs_is_known_from_the_inputs(shape, datatype, n_bytes):
    """At least so many bytes, before anything is computed."""
    inputs = [TensorSpec("x", "FP32", ("batch", "width"))]
    size = OutputBytes(inputs, [TensorSpec("y", datatype, shape), TensorSpec("z", "INT8", ("batch",))])

    assert size.at_least(3, [zeros("x", "FP32", (3, 5))]) == n_bytes + 3
    assert size.at_least(3, [zeros("x", "FP32", (3, 5))], ["y"]) == n_bytes


def test_without_requested_outputs_all_are_returned():
    """In the signature's order."""
    assert choose_outputs(SPECS, []) == ["age", "image"]


def test_outputs_are_in_the_requested_order():
    """And only those (I-22)."""
    assert choose_outputs((*SPECS, ISLAND), ["island", "age"]) == ["island", "age"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["age", "size"], 'unknown output "size", expected one of "age", "image"'),
        (["age", "image", "age"], 'output "age" is requested twice'),
        (["n" * 1000], f'unknown output "{"n" * 64}", expected one of "age", "image"'),
    ],
)
def test_an_unknown_output_is_refused(wanted, message):
    """Unknown (I-20), or requested twice (I-21)."""
    with pytest.raises(InvalidInput) as caught:
        choose_outputs(SPECS, wanted)

    assert caught.value.message == message


FEATURES = TensorSpec("features", "FP32", ("batch", 4))


@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [
        ([FEATURES], [FEATURES]),
        ([AGE, FEATURES], [FEATURES, AGE]),
        ([FEATURES], [TensorSpec("features", "FP32", ("n", 4))]),
        ([FEATURES], [TensorSpec("features", "FP32", (-1, 4))]),
        ([FEATURES], [TensorSpec("features", "FP32", ("batch", "n_features"))]),
        ([TensorSpec("features", "FP32", ("batch", "n"))], [TensorSpec("features", "FP32", (-1, -1))]),
        ([], []),
    ],
)
def test_halves_that_fit_have_no_differences(outputs, inputs):
    """Order and the names of dimensions do not matter; a fixed size fits where any is taken."""
    assert fits(outputs, inputs) == []


@pytest.mark.parametrize(
    ("outputs", "inputs", "differences"),
    [
        ([], [FEATURES], ['"features" is an input of the predictor but no output of the preprocessor']),
        ([FEATURES], [], ['"features" is an output of the preprocessor but no input of the predictor']),
        (
            [FEATURES],
            [TensorSpec("input", "FP32", ("batch", 4))],
            [
                '"input" is an input of the predictor but no output of the preprocessor',
                '"features" is an output of the preprocessor but no input of the predictor',
            ],
        ),
        (
            [FEATURES],
            [TensorSpec("features", "FP64", ("batch", 4))],
            ['"features": expected datatype FP64, the preprocessor produces FP32'],
        ),
        (
            [FEATURES],
            [TensorSpec("features", "FP32", ("batch", 4, 1))],
            ["\"features\": expected shape ['batch', 4, 1], the preprocessor produces ['batch', 4]"],
        ),
        (
            [FEATURES],
            [TensorSpec("features", "FP32", ("batch", 5))],
            ['"features": expected 5 in dimension 1, the preprocessor produces 4'],
        ),
        (
            [TensorSpec("features", "FP32", ("batch", "n"))],
            [FEATURES],
            ['"features": expected 4 in dimension 1, the preprocessor produces n'],
        ),
        (
            [FEATURES],
            [TensorSpec("features", "FP32", (1, 4))],
            ['"features": expected 1 in dimension 0, the preprocessor produces batch'],
        ),
        (
            [TensorSpec("features", "FP32", ("batch", 3, 8))],
            [TensorSpec("features", "FP32", ("batch", 8, 3))],
            [
                '"features": expected 8 in dimension 1, the preprocessor produces 3',
                '"features": expected 3 in dimension 2, the preprocessor produces 8',
            ],
        ),
    ],
)
def test_every_difference_between_halves_is_named(outputs, inputs, differences):
    """Tensor, what is expected and what is produced; a datatype is never widened between halves."""
    assert fits(outputs, inputs) == differences


@given(st.lists(st.sampled_from([AGE, IMAGE, ISLAND, FEATURES]), unique=True))
def test_a_signature_fits_itself(specs):
    """In any order."""
    assert fits(specs, specs[::-1]) == []


DIMENSIONS = st.sampled_from([2, 3, "n", "m"])
SIZES = {"n": 11, "m": 13}
"""Sizes that differ from all others: whatever holds with them holds with any."""


@st.composite
def sides(draw: st.DrawFn) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """What is given and what is wanted: the same names and ranks, whatever dimensions."""
    ranks = {name: draw(st.integers(0, 3)) for name in draw(st.sets(st.sampled_from("abc"), min_size=1))}
    outputs, inputs = (
        [TensorSpec(name, "FP32", tuple(draw(DIMENSIONS) for _ in range(rank))) for name, rank in ranks.items()] for _ in range(2)
    )
    return outputs, draw(st.permutations(inputs))


def takes(wanted: list[TensorSpec], shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether tensors of these shapes are what is wanted, each name standing for one size."""
    sizes: dict[str, int] = {}
    return all(
        size == need if isinstance(need, int) else sizes.setdefault(need, size) == size
        for spec in wanted
        for need, size in zip(spec.shape, shapes[spec.name], strict=True)
    )


@given(sides())
def test_halves_fit_if_every_possible_output_is_accepted(both):
    """Named dimensions are sizes that vary, and one name is one size."""
    outputs, inputs = both
    shapes = {spec.name: tuple(SIZES.get(size, size) for size in spec.shape) for spec in outputs}

    assert (fits(outputs, inputs) == []) == takes(inputs, shapes)


def test_a_named_dimension_has_one_size():
    """The one that is not equal is named, with what it is elsewhere."""
    outputs = [TensorSpec("a", "FP32", ("batch", 3)), TensorSpec("b", "FP32", ("batch", "n"))]
    inputs = [TensorSpec("a", "FP32", ("batch", "k")), TensorSpec("b", "FP32", ("batch", "k"))]

    assert fits(outputs, inputs) == ['"b": expected "k" (3 elsewhere) in dimension 1, the preprocessor produces n']


def test_an_answer_that_fits_the_signature_passes():
    """In any order; outputs that were not requested do not matter."""
    check_outputs(SPECS, [image(3), age(3), zeros("more", "FP32", (1,))], 3)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([age(3)], 'output "image" is missing'),
        ([age(2), image(3)], 'output "age": expected FP64 [3, 1], got FP64 [2, 1]'),
        ([age(4), image(4)], 'output "age": expected FP64 [3, 1], got FP64 [4, 1]'),
        ([age(3), zeros("image", "INT8", (3, 2, 3))], 'output "image": expected UINT8 [3, 2, 3], got INT8 [3, 2, 3]'),
        ([age(3), zeros("image", "UINT8", (3, 3, 2))], 'output "image": expected UINT8 [3, 2, 3], got UINT8 [3, 3, 2]'),
        ([zeros("age", "FP64", (3,)), image(3)], 'output "age": expected FP64 [3, 1], got FP64 [3]'),
        ([zeros("age", "FP32", (3, 1)), image(3)], 'output "age": expected FP64 [3, 1], got FP32 [3, 1]'),
    ],
)
def test_an_answer_that_contradicts_the_signature_is_a_mismatch(outputs, message):
    """Never the caller's fault, who would otherwise get another's rows, too few, or other numbers."""
    with pytest.raises(PairMismatch) as caught:
        check_outputs(SPECS, outputs, 3)

    assert caught.value.message == message


@pytest.mark.parametrize(
    "tensor",
    [Tensor("age", "FP64", (3, 1), bytes(23)), Tensor("age", "FP64", (3, 1), bytes(32)), Tensor("age", "FP64", (3, 1), b"")],
)
def test_an_answer_whose_bytes_contradict_its_shape_is_a_mismatch(tensor):
    """A stage that sends other bytes than it says breaks its promise as well; unchecked, the caller would be blamed for it."""
    with pytest.raises(PairMismatch, match='output "age"'):
        check_outputs([AGE], [tensor], 3)


@pytest.mark.parametrize("spec", [TensorSpec("x", "FP32", ("batch", "n")), TensorSpec("x", "FP32", ("batch", -1))])
def test_free_dimensions_of_an_answer_accept_any_size(spec):
    """All but the batch."""
    check_outputs([spec], [zeros("x", "FP32", (2, 9))], 2)

    with pytest.raises(SplitserveError):
        check_outputs([spec], [zeros("x", "FP32", (9, 2))], 2)


@pytest.mark.parametrize(("datatype", "value"), [("INT64", 2**53 + 1), ("INT64", -(2**53) - 1), ("UINT64", 2**64 - 1)])
@pytest.mark.parametrize("shape", [("batch", 2), ("batch", "length")])
def test_an_integer_that_a_double_would_round_is_refused(datatype, value, shape):
    """numpy calls this cast safe, and rounds."""
    spec = TensorSpec("x", "FP64", shape)
    tensor = Tensor("x", datatype, (1, 2), np.array([1, value], dtype=DTYPES[datatype]).tobytes())

    with pytest.raises(InvalidInput, match=f'input "x": element 1: expected an integer that FP64 holds exactly, got {value}'):
        InputCheck([spec], widen=True)([tensor])


@given(data=st.data(), n_rows=st.integers(0, 3), width=st.integers(1, 2))
def test_the_fast_path_checks_the_elements_of_text(data, n_rows, width):
    """As many as the shape says, and none that ends elsewhere than the tensor."""
    elements = data.draw(st.lists(st.binary(max_size=3), min_size=max(0, n_rows * width - 1), max_size=n_rows * width + 1))
    raw = encode_bytes(elements)
    raw = data.draw(st.sampled_from([raw, raw[:-1], raw + b"\x00", raw + b"\x00\x00\x00\x00", b"\xff\xff\xff\xff" + raw[4:]]))
    specs = [TensorSpec("island", "BYTES", ("batch", width))]
    tensor = Tensor("island", "BYTES", (n_rows, width), raw)

    def outcome(check: Callable[[], object]) -> str:
        try:
            check()
        except InvalidInput as error:
            return error.message
        return ""

    assert outcome(lambda: InputCheck(specs, widen=True)([tensor])) == outcome(lambda: check_inputs(specs, [tensor], widen=True))


@pytest.mark.parametrize("value", [2**53, 2**53 - 1, 2**60, 0])
def test_an_integer_that_is_exact_in_a_double_is_widened(value):
    """Large ones too, where they are multiples of a power of two."""
    tensor = Tensor("x", "INT64", (1, 1), np.array([value], dtype="<i8").tobytes())

    assert list(InputCheck([TensorSpec("x", "FP64", ("batch", 1))], widen=True)([tensor])) == [tensor]
