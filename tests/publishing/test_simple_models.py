"""ONNX models without transforms, and the simple ones that are published for trying clients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from splitserve.arrays import from_array, to_array
from splitserve.errors import InvalidInput
from splitserve.publishing.simple_models import ONNX_TYPES, publish_all
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.runtimes import predictor, preprocessor

NUMBERS = np.arange(16, dtype=np.int32).reshape(1, 16)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder: Path = tmp_path_factory.mktemp("simple")
    assert len(list(publish_all(folder))) == 4 + len(ONNX_TYPES)
    assert list(publish_all(folder)) == []  # what is there stays
    return Repository(folder)


def load_preprocessor(repository: Repository, name: str) -> preprocessor.Preprocessor:
    return preprocessor.load(repository.open(BundleKey(name, "preprocess", 1)))


def test_tensors_are_passed_on_unchanged(repository: Repository) -> None:
    """In the order of the signature, untouched."""
    loaded = load_preprocessor(repository, "simple")
    inputs = [from_array(name, NUMBERS) for name in ("INPUT1", "INPUT0")]

    assert loaded.transform(inputs) == (inputs[1], inputs[0])


def test_narrower_numbers_are_widened(repository: Repository) -> None:
    """As with transforms: what the proxy lets through is what the predictor takes."""
    loaded = load_preprocessor(repository, "custom_identity_int32")

    (tensor,) = loaded.transform([from_array("INPUT0", NUMBERS.astype(np.int8))])

    assert tensor == from_array("INPUT0", NUMBERS)


def test_what_does_not_fit_the_signature_is_refused(repository: Repository) -> None:
    """There are no transforms to do it."""
    loaded = load_preprocessor(repository, "simple")

    with pytest.raises(InvalidInput, match="missing input"):
        loaded.transform([from_array("INPUT0", NUMBERS)])


def test_text_is_added_and_subtracted(repository: Repository) -> None:
    """simple_string: numbers as text."""
    loaded = predictor.load(repository.open(BundleKey("simple_string", "predict", 1)))
    inputs = [from_array(name, NUMBERS.astype(str).astype(object)) for name in ("INPUT0", "INPUT1")]

    total, difference = loaded.infer(inputs)

    assert [int(value) for value in to_array(total).ravel()] == (NUMBERS * 2).ravel().tolist()
    assert set(to_array(difference).ravel()) == {b"0"}
