"""``plan.json`` and ``plan.npz`` are untrusted: whatever is wrong with them is said when they are read, never a crash."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    KBinsDiscretizer,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    PowerTransformer,
    StandardScaler,
)

from splitserve.repository.manifest import BundleError, Rows
from splitserve.runtimes.plans import files, layouts, operations
from splitserve.runtimes.plans.files import OPERATIONS, Plan, decode, encode
from splitserve.runtimes.plans.layouts import PlanError, RefusedValue
from splitserve.runtimes.plans.planner import make_plan
from splitserve.runtimes.preprocessor import to_dense
from splitserve.runtimes.rows import observe, to_tensors
from splitserve.signature import TensorSpec
from tests.budgets import examples

FRAME = pd.DataFrame(
    {
        "length": [39.1, 46.5, 41.0, 50.0],
        "year": [2007, 2008, 2009, 2007],
        "island": ["Torgersen", "Biscoe", "Dream", "Biscoe"],
        "note": ["a bird", "it flew", "a bird flew", "gone"],
    }
)


class Written(msgspec.Struct):
    """A plan's files, what they are read with, and rows to run them on."""

    text: bytes
    arrays: bytes
    rows: Rows
    specs: tuple[TensorSpec, ...]
    output: TensorSpec
    tensors: Any
    features: Any

    def read(self, text: bytes | None = None, arrays: bytes | None = None) -> Plan:
        return decode(text or self.text, arrays or self.arrays, self.rows, self.specs, self.output)


@cache
def written() -> Written:
    """A plan with operations of all kinds."""
    transformer = make_column_transformer(
        (
            make_pipeline(StandardScaler(), PolynomialFeatures(2, include_bias=False), KBinsDiscretizer(2, strategy="uniform")),
            ["length", "year"],
        ),
        (OneHotEncoder(handle_unknown="ignore"), ["island"]),
        (OrdinalEncoder(), ["year"]),
        (TfidfVectorizer(), "note"),
    ).fit(FRAME)
    rows, specs = observe(FRAME, "x")
    planned = make_plan(transformer, rows, specs)
    text, arrays = encode(planned.steps)
    features = to_dense(transformer.transform(FRAME))
    return Written(
        text, arrays, rows, specs, TensorSpec("f", "FP64", ("batch", features.shape[1])), to_tensors(rows, specs, FRAME), features
    )


def changed(change: Callable[[dict[str, Any]], None]) -> bytes:
    plan = msgspec.json.decode(written().text)
    change(plan)
    return msgspec.json.encode(plan)


def with_arrays(**arrays: Any) -> bytes:
    """The arrays, with some replaced, or removed if None; "." in a name is "__"."""
    with np.load(io.BytesIO(written().arrays)) as members:
        found = {name: members[name] for name in members.files}
    found |= {name.replace("__", ".").lstrip("_").lstrip("n"): array for name, array in arrays.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **{name: array for name, array in found.items() if array is not None})
    return buffer.getvalue()


def array_of(operation: str, name: str) -> str:
    steps = msgspec.json.decode(written().text)["steps"]
    number = next(number for number, step in enumerate(steps, 1) if step["operation"] == operation)
    return f"n{number}__{name}"


def test_a_plan_is_written_the_same_each_time():
    """So that its digest says whether it is another."""
    planned = make_plan(PowerTransformer().fit(FRAME[["length"]]), *observe(FRAME[["length"]], "x"))

    assert encode(planned.steps) == encode(planned.steps)


def test_the_plan_of_other_features_is_refused():
    with pytest.raises(
        BundleError, match=r"plan.json: fingerprint of the features: expected sha256:01 as in manifest.json, got "
    ):
        decode(written().text, written().arrays, written().rows, written().specs, written().output, "sha256:01")


def test_what_was_written_gives_the_same_bits():
    found = written().read()(written().tensors)

    assert found.tobytes() == written().features.tobytes()


def first(plan: dict[str, Any], operation: str) -> dict[str, Any]:
    return next(step for step in plan["steps"] if step["operation"] == operation)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "an unknown operation": (lambda plan: first(plan, "divide").update(operation="run"), 'step 4: unknown operation "run"'),
    "another version of an operation": (
        lambda plan: first(plan, "divide").update(version=2),
        'operation "divide": expected version 1, got 2',
    ),
    "another format": (lambda plan: plan.update(format=2), "expected format 1, got 2"),
    "an unknown field of a step": (lambda plan: first(plan, "divide").update(code="1"), "unknown field `code`"),
    "an unknown field": (lambda plan: plan.update(code="1"), "unknown field `code`"),
    "no steps": (lambda plan: plan.update(steps=[]), "expected 1 to 10000 steps, got 0"),
    "a step of a later value": (lambda plan: first(plan, "divide").update(of=[99]), "expected numbers of values before it"),
    "a step of no value": (lambda plan: first(plan, "divide").update(of=[]), "expected numbers of values before it"),
    "a negative value": (lambda plan: first(plan, "divide").update(of=[-1]), "expected numbers of values before it"),
    "a step of text": (lambda plan: first(plan, "one_hot").update(of=[1]), "expected one value of text"),
    "a column that is not there": (lambda plan: first(plan, "columns").update(names=["other"]), "expected names of columns"),
    "a dtype that is not there": (lambda plan: first(plan, "columns").update(dtype="object"), 'unknown dtype "object"'),
    "text as numbers": (lambda plan: first(plan, "columns").update(names=["island"]), "has no plain numbers"),
    "a width beyond all memory": (lambda plan: first(plan, "one_hot_numbers").update(width=2**40), "expected 1 to"),
    "a category twice": (
        lambda plan: first(plan, "one_hot")["tables"][0].update(words=["a", "a", "b"]),
        "expected categories, each once",
    ),
    "fewer categories": (lambda plan: first(plan, "one_hot")["tables"][0].update(words=["a"]), 'array "places": expected shape'),
    "a pattern of one's own": (lambda plan: first(plan, "count_words").update(token_pattern="(a+)+$"), "unknown token_pattern"),
    "a norm of one's own": (lambda plan: first(plan, "normalise_rows").update(norm="l3"), "step "),
    "features of another width": (lambda plan: plan["steps"].pop(), "as in manifest.json, the last step makes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plan_is_refused_with_the_place(name):
    """Before a row is computed."""
    change, message = BROKEN[name]

    with pytest.raises(BundleError) as caught:
        written().read(changed(change))

    assert str(caught.value).startswith("plan.json: ")
    assert message in str(caught.value)


BROKEN_ARRAYS: dict[str, tuple[Callable[[], bytes], str]] = {
    "no archive": (lambda: b"PK no", "plan.npz: not an npz file"),
    "a pickle": (
        lambda: with_arrays(**{array_of("divide", "by"): np.array([{}, {}], object)}),
        "plan.npz: not an npz file of plain arrays",
    ),
    "a missing array": (lambda: with_arrays(**{array_of("divide", "by"): None}), 'its array "by" is missing'),
    "another shape": (lambda: with_arrays(**{array_of("divide", "by"): np.ones(3)}), 'array "by": expected shape [2], got [3]'),
    "another dtype": (lambda: with_arrays(**{array_of("divide", "by"): np.ones(2, "c16")}), "dtype complex128 is not allowed"),
    "text for numbers": (lambda: with_arrays(**{array_of("divide", "by"): np.array(["a", "b"])}), "dtype <U1 is not allowed"),
    "an array too many": (lambda: with_arrays(**{array_of("divide", "code"): np.ones(2)}), 'it has no array "code"'),
    "arrays of no step": (lambda: with_arrays(n99__by=np.ones(2)), "plan.npz: has arrays of a step 99"),
    "a name of no step": (lambda: with_arrays(by=np.ones(2)), "plan.npz: 'by' is not the name"),
    "a place beyond the width": (
        lambda: with_arrays(**{array_of("one_hot", "places"): np.array([0, 1, 2, 99])}),
        'array "places": expected numbers from -1',
    ),
}


@pytest.mark.parametrize("name", BROKEN_ARRAYS)
def test_broken_arrays_are_refused_with_the_place(name):
    make, message = BROKEN_ARRAYS[name]

    with pytest.raises(BundleError) as caught:
        written().read(arrays=make())

    assert message in str(caught.value)


def test_arrays_that_unpack_to_gigabytes_are_refused():
    """Their size is read before they are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("1.by.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (2**28,)})
        for _ in range(17):
            member.write(bytes(2**26))

    with pytest.raises(BundleError, match=r"plan.npz: has \d+ bytes unpacked; the limit is"):
        written().read(arrays=buffer.getvalue())


def test_a_short_plan_cannot_ask_for_endless_products():
    """Their number is computed before they are."""
    products = operations.Products(of=(0,), degree=10)

    with pytest.raises(PlanError, match="more than 16777216 products"):
        products.bind([layouts.numbers("float64", 100)], layouts.StepArrays({}))


def test_a_plan_larger_than_its_limit_is_refused(monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 10)

    with pytest.raises(BundleError, match=r"plan.json: has \d+ bytes; the limit is 10"):
        written().read()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | st.sampled_from(["", "text", "float64", "é"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["words", "n_known", "x"]), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=examples(300))
@given(data=st.data())
def test_any_change_of_a_field_is_refused_or_harmless(data):
    """A plan that is read can be run: it gives features of the promised shape, or refuses a value."""
    plan = msgspec.json.decode(written().text)
    for _ in range(data.draw(st.integers(1, 3))):
        step = data.draw(st.sampled_from(plan["steps"]))
        field = data.draw(st.sampled_from(sorted(step)))
        if field == "operation":
            step[field] = data.draw(st.sampled_from(sorted(OPERATIONS)))
        elif field == "of":
            step[field] = data.draw(st.lists(st.integers(0, len(plan["steps"])), min_size=1, max_size=2))
        else:
            step[field] = data.draw(JSON)

    runs_or_is_refused(msgspec.json.encode(plan), written().arrays)


@settings(max_examples=examples(200))
@given(data=st.data())
def test_any_change_of_an_array_is_refused_or_harmless(data):
    with np.load(io.BytesIO(written().arrays)) as members:
        arrays = {name: members[name] for name in members.files}
    name = data.draw(st.sampled_from(sorted(arrays)))
    shape = data.draw(st.sampled_from([arrays[name].shape, (), (0,), (1,), (2, 2), (arrays[name].size, 1)]))
    dtype = data.draw(st.sampled_from(["f8", "f4", "i8", "?", "u1", "S2", arrays[name].dtype.str]))
    value = data.draw(st.sampled_from([0, -1, 1, 2**31, -(2**40), 1e300, np.nan, np.inf]))
    with np.errstate(all="ignore"):
        arrays[name] = np.full(shape, value).astype(dtype)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)

    runs_or_is_refused(written().text, buffer.getvalue())


@settings(max_examples=examples(200))
@given(data=st.data())
def test_damaged_files_are_refused_or_harmless(data):
    text, arrays = bytearray(written().text), bytearray(written().arrays)
    damaged = data.draw(st.sampled_from([text, arrays]))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))

    runs_or_is_refused(bytes(text), bytes(arrays))


def runs_or_is_refused(text: bytes, arrays: bytes) -> None:
    try:
        plan = written().read(text, arrays)
    except BundleError:
        return
    try:
        found = plan(written().tensors)
    except RefusedValue:
        return
    assert found.shape == written().features.shape


def test_every_operation_is_described():
    """Its docstring is the format's documentation; its name is unique."""
    assert len(OPERATIONS) == len({operation.__name__ for operation in OPERATIONS.values()})
    assert all(operation.__doc__ and operation.VERSION >= 1 for operation in OPERATIONS.values())


def test_a_word_that_cannot_be_written_has_no_plan():
    """Half of a surrogate pair is not text that JSON, or a request, can hold."""
    with pytest.raises(PlanError, match="not text that can be written"):
        encode([(operations.Columns(of=(0,), names=("\ud800",), dtype="text"), {})])
