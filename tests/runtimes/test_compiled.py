"""Compiled transforms: used only where they were proven to give what the transforms give."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, RobustScaler, StandardScaler

from splitserve.arrays import to_array
from splitserve.errors import InvalidInput
from splitserve.publishing import publish_preprocessor
from splitserve.publishing.compile import odd_rows
from splitserve.repository.manifest import COMPILED_FILE, BundleError
from splitserve.runtimes import preprocessor
from splitserve.runtimes.plans import planner
from splitserve.runtimes.rows import to_tensors

pytestmark = pytest.mark.heavy  # they publish

FRAME = pd.DataFrame(
    {"length": [39.1, np.nan, 46.5, 50.0], "year": [2007, 2008, 2009, 2007], "sex": ["male", "female", None, "male"]}
)


def mixed(handle_unknown="ignore"):
    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    words = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown=handle_unknown))
    return make_column_transformer((numbers, ["length", "year"]), (words, ["sex"])).fit(FRAME)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return publish_preprocessor(mixed(), FRAME, name="mixed", repository=tmp_path_factory.mktemp("models"))


def test_mixed_columns_with_gaps_are_compiled(bundle):
    """Including imputers of text, which skl2onnx alone does not convert."""
    assert bundle.manifest.compiled.is_equal
    assert bundle.manifest.compiled.n_checked > 200
    assert COMPILED_FILE in bundle.manifest.files


@pytest.mark.parametrize(("choice", "runtime"), [("auto", "plan"), ("onnx", "onnx"), ("sklearn", "plan")])
def test_the_runtime_setting_decides(bundle, choice, runtime):
    """``auto`` takes what costs least: a plan, else the compiled form where ONNX Runtime is installed."""
    assert preprocessor.load(bundle, runtime=choice).runtime == runtime


def test_the_compiled_form_equals_scikit_learn(bundle):
    """Missing values, an unseen category."""
    rows = pd.DataFrame({"length": [np.nan, 1.0], "year": [1, 2], "sex": ["", "never seen"]})
    inputs = to_tensors(bundle.manifest.rows, bundle.manifest.inputs, rows)

    one, other = (to_array(preprocessor.load(bundle, runtime=choice).transform(inputs)[0]) for choice in ("onnx", "sklearn"))

    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("choice", ["onnx", "sklearn"])
def test_infinite_numbers_are_refused_by_both_forms(bundle, choice):
    """As scikit-learn refuses them."""
    inputs = to_tensors(bundle.manifest.rows, bundle.manifest.inputs, FRAME[:1].assign(length=np.inf))

    with pytest.raises(InvalidInput, match="infini"):
        preprocessor.load(bundle, runtime=choice).transform(inputs)


@pytest.mark.parametrize(("is_installed", "runtime"), [(True, "onnx"), (False, "sklearn")])
def test_without_a_plan_auto_uses_the_compiled_form_if_possible(is_installed, runtime, tmp_path, monkeypatch):
    """ONNX Runtime is an optional part of preprocess."""
    monkeypatch.delitem(planner._MAKERS, RobustScaler)  # most that has a compiled form has a plan
    rows = np.random.default_rng(0).normal(size=(20, 3))
    found = publish_preprocessor(RobustScaler().fit(rows), rows, name="robust", repository=tmp_path)
    monkeypatch.setattr(preprocessor, "find_spec", lambda name: is_installed or None)

    assert found.manifest.compiled.is_equal
    assert preprocessor.load(found).runtime == runtime


@pytest.mark.parametrize(
    ("transformer", "reason"),
    [
        (FunctionTransformer(np.abs).fit(FRAME[["length"]]), "cannot convert"),
        (make_column_transformer((OneHotEncoder(), ["sex"]), ("passthrough", ["length"])).fit(FRAME), "reject a row that the"),
    ],
)
def test_an_unverified_compiled_form_is_not_published(transformer, reason, tmp_path):
    """With the reason in its manifest: `PREPROCESS_RUNTIME=onnx` refuses the bundle, otherwise scikit-learn serves it."""
    frame = (
        FRAME if "columns" in type(transformer).__name__.lower() or hasattr(transformer, "transformers_") else FRAME[["length"]]
    )
    found = publish_preprocessor(transformer, frame, name="other", repository=tmp_path, trusted_modules=["numpy"])

    assert reason in found.manifest.compiled.reason
    assert COMPILED_FILE not in found.manifest.files
    assert preprocessor.load(found, trusted_modules=["numpy"]).runtime != "onnx"
    with pytest.raises(BundleError, match=reason):
        preprocessor.load(found, runtime="onnx")


def test_generated_rows_are_the_same_in_every_run(bundle):
    """So that a proof can be repeated."""
    golden = preprocessor.goldens.decode(bundle.read("golden.npz"), bundle.manifest.inputs, bundle.manifest.outputs)

    assert odd_rows(bundle.manifest.inputs, golden) == odd_rows(bundle.manifest.inputs, golden)
