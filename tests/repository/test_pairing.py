"""The conditions of a pair: shapes that fit, and features with the same meaning."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, StandardScaler

from splitserve import publish, publish_predictor, publish_preprocessor
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import BundleError, Manifest
from splitserve.repository.pairing import (
    FEATURE_NAMES,
    MAX_NAMES,
    meaning_from_properties,
    meaning_properties,
    misfits,
    other_meaning,
    sent_specs,
)
from splitserve.repository.source import load_bundle
from splitserve.runtimes import predictor, preprocessor, sklearn_pipeline
from splitserve.runtimes.meaning import NO_MEANING, meaning_of
from splitserve.signature import TensorSpec
from tests.system.models import softmax_model

FRAME = pd.DataFrame({"colour": ["red", "green", "blue"] * 4, "size": np.arange(12.0)})


def one_hot(*order: str) -> Any:
    """The same columns, the categories in this order."""
    return make_column_transformer(
        (OneHotEncoder(categories=[list(order)], sparse_output=False), ["colour"]), (StandardScaler(), ["size"])
    ).fit(FRAME)


def nameless() -> FunctionTransformer:
    """A transformer without output names."""
    return FunctionTransformer(np.log1p)


def test_a_reordered_category_changes_the_meaning_and_no_shape() -> None:
    """The case that every check of shapes passes."""
    one, other = one_hot("red", "green", "blue"), one_hot("green", "red", "blue")

    assert one.transform(FRAME).shape == other.transform(FRAME).shape
    assert meaning_of(one).fingerprint != meaning_of(other).fingerprint
    assert meaning_of(one).fingerprint == meaning_of(one_hot("red", "green", "blue")).fingerprint


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (OrdinalEncoder(categories=[["a", "b"]]), OrdinalEncoder(categories=[["b", "a"]])),
        (CountVectorizer(vocabulary=["a", "b"]), CountVectorizer(vocabulary=["b", "a"])),
        (
            FeatureUnion([("x", OrdinalEncoder(categories=[["a", "b"]]))]),
            FeatureUnion([("x", OrdinalEncoder(categories=[["b", "a"]]))]),
        ),
        (make_pipeline(OrdinalEncoder(categories=[["a", "b"]])), make_pipeline(OrdinalEncoder(categories=[["b", "a"]]))),
    ],
)
def test_vocabularies_count_where_names_do_not_show_them(one: Any, other: Any) -> None:
    """The mapping of numbers to categories, from any transform that learnt one."""
    rows = ["a", "b"] if isinstance(one, CountVectorizer) else [["a"], ["b"]]

    fingerprints = {meaning_of(each.fit(rows)).fingerprint for each in (one, other)}

    assert len(fingerprints) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            make_column_transformer((nameless(), ["size"]), (StandardScaler(), ["weight"])),
            make_column_transformer((StandardScaler(), ["weight"]), (nameless(), ["size"])),
        ),
        (
            make_pipeline(make_column_transformer((nameless(), [0, 1])), nameless()),
            make_pipeline(make_column_transformer((nameless(), [1, 0])), nameless()),
        ),
        (
            FeatureUnion([("a", nameless()), ("b", StandardScaler())]),
            FeatureUnion([("b", StandardScaler()), ("a", nameless())]),
        ),
        (
            make_column_transformer((nameless(), slice(0, 1)), remainder="passthrough"),
            make_column_transformer((nameless(), slice(1, 2)), remainder="passthrough"),
        ),
    ],
    ids=["parts", "columns", "union", "slice"],
)
def test_without_names_the_order_of_inputs_counts(one: Any, other: Any) -> None:
    """A function has no output names, but its input columns have. The result is the same after it was written and read."""
    frame = pd.DataFrame({"size": [1.0, 2.0], "weight": [3.0, 5.0]})
    first, second = (meaning_of(clone(each).fit(frame)) for each in (one, other))
    fitted = clone(one).fit(frame)

    assert first.feature_names == second.feature_names == ()
    assert first.fingerprint != second.fingerprint
    assert meaning_of(sklearn_pipeline.load(sklearn_pipeline.dump(fitted))) == first


def test_learnt_numbers_do_not_count() -> None:
    """A scaler that was fitted again on newer data fits the same predictor."""
    rows = np.arange(6.0).reshape(3, 2)

    assert meaning_of(StandardScaler().fit(rows)) == meaning_of(StandardScaler().fit(rows * 2))


def test_transforms_without_known_features_have_no_fingerprint() -> None:
    """Nothing is compared then."""
    assert meaning_of(FunctionTransformer()) == NO_MEANING
    assert NO_MEANING.fingerprint == ""


def manifest(**fields: Any) -> Manifest:
    features = TensorSpec("features", "FP32", ("batch", 2))
    defaults: dict[str, Any] = {
        "schema_version": 1, "name": "m", "kind": "preprocess", "version": 1, "created": "", "files": {}, "environment": {},
        "inputs": (features,), "outputs": (features,),
    }  # fmt: skip
    return Manifest(**{**defaults, **fields})


@pytest.mark.parametrize(
    ("mine", "fingerprint", "names", "message"),
    [
        ({"fingerprint": "sha256:a"}, "sha256:a", (), ""),
        ({"fingerprint": "sha256:a"}, "", (), ""),
        ({}, "sha256:a", (), ""),
        (
            {"fingerprint": "sha256:a"},
            "sha256:b",
            (),
            "fingerprint of the features: expected b, which the predictor was trained on, got a",
        ),
        (
            {"fingerprint": "sha256:a", "feature_names": ("x", "y")},
            "sha256:b",
            ("x", "z"),
            'feature 1: expected "z", which the predictor was trained on, got "y"',
        ),
    ],
)
def test_another_meaning_is_named_if_both_halves_declare_one(
    mine: dict[str, Any], fingerprint: str, names: tuple[str, ...], message: str
) -> None:
    """The first feature that differs, where the names are known."""
    import re

    found = other_meaning(manifest(**mine), fingerprint, names)

    assert re.fullmatch(message, found)


@pytest.mark.parametrize(
    ("names", "heard"),
    [(("x", "y"), ("x", "y")), ((), ()), (tuple(map(str, range(MAX_NAMES + 1))), ())],
    ids=["some", "none", "too many"],
)
def test_what_a_predictor_was_trained_on_crosses_the_wire(names: tuple[str, ...], heard: tuple[str, ...]) -> None:
    """As properties of its metadata; the fingerprint always, the names where they are not too many."""
    told = meaning_properties(manifest(fingerprint="sha256:a", feature_names=names))

    assert all(isinstance(value, str) for value in told.values())
    assert meaning_from_properties(told) == ("sha256:a", heard)


@pytest.mark.parametrize("nonsense", ["", "x", "{}", "[1]"])
def test_properties_of_other_servers_are_not_misread(nonsense: str) -> None:
    """A value that is not a list of names is ignored."""
    assert meaning_from_properties({FEATURE_NAMES: nonsense}) == ("", ())


def test_a_manifest_may_map_names() -> None:
    """Names count unless the preprocessor maps them to the predictor's."""
    wanted = [TensorSpec("input_1", "FP32", ("batch", 2))]

    assert misfits(manifest(), wanted, []) == [
        '"input_1" is an input of the predictor but no output of the preprocessor',
        '"features" is an output of the preprocessor but no input of the predictor',
    ]
    assert misfits(manifest(names={"features": "input_1"}), wanted, []) == []
    assert sent_specs(manifest(names={"features": "input_1"}))[0].name == "input_1"


@pytest.mark.heavy
def test_published_halves_declare_their_meaning(tmp_path: Path) -> None:
    """Both halves of a pipeline have the same one; a separate predictor has one if `trained_on` is given."""
    pipeline = make_pipeline(one_hot("red", "green", "blue"), LogisticRegression()).fit(FRAME, [0, 1] * 6)
    publish(pipeline, FRAME, name="m", repository=tmp_path)
    sample = np.zeros((2, 4), np.float32)
    untold = publish_predictor(softmax_model(4), sample, name="m", repository=tmp_path)
    told = publish_predictor(softmax_model(4), sample, name="m", repository=tmp_path, trained_on=pipeline[:-1])

    manifests = [Repository(tmp_path).open(key).manifest for key in Repository(tmp_path).bundles()]

    assert [bool(each.fingerprint) for each in manifests] == [True, True, False, True]
    assert len({each.fingerprint for each in manifests if each.fingerprint}) == 1
    assert manifests[0].feature_names[0] == "onehotencoder__colour_red"
    assert load_bundle(Repository(tmp_path), told.key, predictor.load).properties["fingerprint"] == manifests[0].fingerprint
    assert "fingerprint" not in load_bundle(Repository(tmp_path), untold.key, predictor.load).properties


@pytest.mark.heavy
def test_transforms_that_are_not_the_manifests_are_refused(tmp_path: Path) -> None:
    """A manifest with other features than the file has."""
    bundle = publish_preprocessor(one_hot("red", "green", "blue"), FRAME, name="m", repository=tmp_path)
    path = bundle.folder / "manifest.json"
    path.write_text(path.read_text().replace(bundle.manifest.fingerprint, "sha256:" + "0" * 64))

    for runtime in ("auto", "sklearn"):
        with pytest.raises(
            BundleError, match="fingerprint of the features: expected sha256:000.* as in manifest.json, got sha256:"
        ):
            load_bundle(Repository(tmp_path), bundle.key, partial(preprocessor.load, runtime=runtime))
