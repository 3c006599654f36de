"""Fitted transforms on disk: what is loaded is what was saved, and a file runs no code by being read."""

from __future__ import annotations

import functools
import importlib
import io
import json
import math
import operator
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_equal
from scipy.sparse import csr_matrix
from sklearn.compose import make_column_transformer
from sklearn.ensemble import RandomTreesEmbedding
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

from splitserve.repository.manifest import BundleError
from splitserve.runtimes.sklearn_pipeline import dump, load, untrusted_modules
from splitserve.transformers import Flatten

NUMBERS = np.array([[1.0, 2.0], [3.0, np.nan], [5.0, 6.0]])

OWN_MODULE = """
from sklearn.base import BaseEstimator, TransformerMixin

class Doubler(TransformerMixin, BaseEstimator):
    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return X * 2

def double(X):
    return X * 2
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> Iterator[ModuleType]:
    """A user's own module, ``acme.steps``, which is not trusted by default."""
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "__init__.py").write_text("")
    (tmp_path / "acme" / "steps.py").write_text(OWN_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("acme.steps")
    for name in ("acme.steps", "acme"):
        del sys.modules[name]


class Canary:
    """Records that it was unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def forged(data: bytes, **changes: str) -> bytes:
    """A skops file whose outermost object says that it is something else."""
    source = zipfile.ZipFile(io.BytesIO(data))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, json.dumps({**json.loads(content), **changes}) if name == "schema.json" else content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "transformer",
    [
        make_pipeline(SimpleImputer(), StandardScaler()),
        make_column_transformer((StandardScaler(), [0]), (make_pipeline(SimpleImputer(), OneHotEncoder()), [1])),
        make_pipeline(Flatten()),
        make_pipeline(SimpleImputer(), RandomTreesEmbedding(n_estimators=2, sparse_output=False, random_state=0)),
        FunctionTransformer(inv_kw_args={"matrix": csr_matrix(np.eye(2))}),
        FunctionTransformer(np.log1p),
        FunctionTransformer(),
    ],
    ids=["numpy", "columns", "ours", "sklearn", "scipy", "ufunc", "identity"],
)
def test_transforms_are_the_same_after_the_file(transformer):
    """Those of scikit-learn and our own are trusted by default."""
    transformer.fit(NUMBERS)

    data = dump(transformer)

    np.testing.assert_array_equal(load(data).transform(NUMBERS), transformer.transform(NUMBERS))
    assert untrusted_modules(data) == []


@pytest.mark.parametrize(
    "function",
    [
        assert_equal,
        np.load,
        np.fromfile,
        np.frompyfunc,
        os.system,
        eval,
        lambda X: X,
        forged,
        math.sqrt,
        functools.partial(math.sqrt),
        operator.methodcaller("tofile", "/tmp/x"),
        np.vectorize(math.sqrt),
        StandardScaler().fit(NUMBERS).transform,
    ],
    ids=[
        "numpy.testing",
        "numpy.load",
        "numpy.fromfile",
        "numpy.frompyfunc",
        "os.system",
        "eval",
        "lambda",
        "own function",
        "math",
        "partial",
        "methodcaller",
        "vectorize",
        "method",
    ],
)
def test_a_function_is_not_trusted_by_its_module(function):
    """numpy alone has functions that run text as code or read any file; only ufuncs compute and nothing else."""
    data = dump(FunctionTransformer(function))

    with pytest.raises(BundleError, match=r"^pipeline\.skops: holds types that are not allowed: .*PREPROCESS_TRUSTED_MODULES"):
        load(data)
    assert untrusted_modules(data) != []


def test_an_unknown_type_is_refused_by_its_name(own):
    """And the setting that would allow it."""
    data = dump(make_pipeline(StandardScaler(), own.Doubler(), FunctionTransformer(own.double)).fit(NUMBERS))

    with pytest.raises(BundleError) as caught:
        load(data)

    assert str(caught.value) == (
        "pipeline.skops: holds types that are not allowed: acme.steps.Doubler, acme.steps.double; "
        "name their modules in PREPROCESS_TRUSTED_MODULES if you trust them"
    )
    assert untrusted_modules(data) == ["acme.steps"]


@pytest.mark.parametrize("trusted", ["acme.steps", "acme"])
def test_a_named_module_is_trusted(own, trusted):
    """Itself or a package above it, with all that is in it."""
    data = dump(make_pipeline(own.Doubler(), FunctionTransformer(own.double)).fit(NUMBERS))

    np.testing.assert_array_equal(load(data, ["other", trusted]).transform(NUMBERS), NUMBERS * 4)


@pytest.mark.parametrize(
    "trusted", ["", "acm", "acme.", "acme.step", "acme.steps.Doubler", "acme.steps.more", "steps", "other", "*"]
)
def test_a_name_that_only_resembles_a_trusted_module_is_not_trusted(own, trusted):
    """Neither a beginning of it nor something below it."""
    with pytest.raises(BundleError, match=r"acme\.steps\.Doubler"):
        load(dump(own.Doubler()), [trusted])


@pytest.mark.parametrize("module", ["numpyx", "sklearn_extra", "scipy2.sub", "splitserve.transformersx", "splitserve"])
def test_a_package_is_trusted_by_its_whole_name(module):
    """A package whose name merely begins like a trusted one's is not trusted."""
    data = forged(dump(StandardScaler().fit(NUMBERS)), __module__=module, __class__="StandardScaler")

    with pytest.raises(BundleError, match=rf"not allowed: {module}\.StandardScaler"):
        load(data)


@pytest.mark.parametrize(
    ("module", "name"),
    [("numpy.no_such_module", "X"), ("numpy", "no_such_type"), ("numpy..x", "X"), ("sklearn.", "X"), ("os", "system")],
)
def test_a_type_that_does_not_exist_is_refused(module, name):
    """A trusted package's name is not enough."""
    with pytest.raises(BundleError, match=r"^pipeline\.skops: "):
        load(forged(dump(StandardScaler().fit(NUMBERS)), __module__=module, __class__=name))


@pytest.mark.parametrize("module", ["numpy.f2py.__main__", "numpy._core.tests.examples.limited_api.setup"])
def test_reading_runs_no_program_of_a_trusted_package(monkeypatch, module):
    """numpy has modules that do their work when they are imported, and end the process then: a file must not choose which are."""
    monkeypatch.setattr(sys, "argv", ["serve"])
    data = forged(dump(StandardScaler().fit(NUMBERS)), __module__=module, __class__="X")

    with pytest.raises(BundleError, match="not allowed"):
        load(data)

    assert module not in sys.modules


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_unread(tmp_path, protocol):
    """Its canary stays silent."""
    canary = tmp_path / "sang"
    data = pickle.dumps(Canary(canary), protocol=protocol)

    with pytest.raises(BundleError, match=r"^pipeline\.skops: not a skops file$"):
        load(data)
    assert not canary.exists()

    pickle.loads(data)  # it would have sung
    assert canary.exists()


def a_zip(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "."), content)
    return buffer.getvalue()


@pytest.mark.parametrize("data", [b"", b"junk", dump(Flatten())[:-30]], ids=["empty", "junk", "cut"])
def test_a_file_that_is_not_a_zip_is_refused(data):
    """Before its content is read."""
    with pytest.raises(BundleError, match=r"^pipeline\.skops: not a skops file$"):
        load(data)


@pytest.mark.parametrize(
    "data",
    [
        a_zip(),
        a_zip(other_txt=b""),
        a_zip(schema_json=b"{"),
        a_zip(schema_json=b"{}"),
        a_zip(schema_json=b"[]"),
        a_zip(schema_json=b"[" * 100_000),
        forged(dump(StandardScaler().fit(NUMBERS)), __loader__="NoSuchNode"),
        forged(dump(StandardScaler().fit(NUMBERS)), __module__="numpy", __class__="ndarray"),
    ],
    ids=["empty", "no schema", "no JSON", "no object", "list", "deep", "loader", "wrong type"],
)
def test_a_zip_that_is_not_a_skops_file_is_refused(data):
    """For every exception of skops."""
    with pytest.raises(BundleError, match=r"^pipeline\.skops: "):
        load(data)
