"""Which library versions a bundle may be served with."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from splitserve.repository.environment import mismatches, observe
from splitserve.runtimes import onnx_support

HERE = {
    "scikit-learn": "1.9.1",
    "numpy": "2.4.6",
    "skops": "0.16.0",
    "pandas": "3.1.1",
    "scipy": "1.17.1",
    "pillow": "13.0.0",
    "python": "3.11.7",
}


@pytest.mark.parametrize(
    ("package", "made_with", "is_required"),
    [
        ("scikit-learn", "1.9.0", None),
        ("scikit-learn", "1.9.1rc2", None),
        ("scikit-learn", "1.8.3", True),
        ("scikit-learn", "1.90.1", True),
        ("scikit-learn", "2.9.1", True),
        ("numpy", "2.0.0", None),
        ("numpy", "1.26.4", True),
        ("skops", "0.13.0", None),
        ("skops", "0.17.0", True),
        ("pandas", "3.0.0", None),
        ("pandas", "2.3.0", False),
        ("python", "3.11.0", None),
        ("python", "3.12.1", False),
        ("splitserve", "0.0.1", None),
    ],
)
def test_each_package_has_its_rule(package: str, made_with: str, is_required: bool | None) -> None:
    """None: it fits. True: the bundle is refused. False: a warning."""
    found = mismatches("preprocess", {**HERE, package: made_with}, HERE)

    assert [(each.package, each.is_required) for each in found] == ([] if is_required is None else [(package, is_required)])


@pytest.mark.parametrize("made_with", [{}, {"numpy": "2.4.6"}, {"scikit-learn": "nightly"}])
def test_a_bundle_that_does_not_name_its_scikit_learn_is_refused(made_with: dict[str, str]) -> None:
    """What cannot be compared cannot be trusted."""
    found = mismatches("preprocess", made_with, HERE)

    assert [each.package for each in found if each.is_required] == ["scikit-learn"]


def test_a_mismatch_names_both_versions_and_the_rule() -> None:
    """So that the way out is plain."""
    (found,) = mismatches("preprocess", {**HERE, "scikit-learn": "1.8.0"}, HERE)

    assert str(found) == "published with scikit-learn 1.8.0, this service runs 1.9.1 (required: the same minor version)"


def test_a_predictor_needs_only_the_libraries_of_its_model() -> None:
    """What was used to make an ONNX file does not matter to running it."""
    assert mismatches("predict", {"onnxruntime": "0.1", "numpy": "1.0"}) == []


def test_observed_versions_are_the_installed_ones() -> None:
    """Packages that are not there are left out."""
    found = observe(["numpy", "no-such-package"])

    assert found.keys() == {"python", "numpy"}
    assert found["numpy"] == version("numpy")


@pytest.mark.parametrize(
    ("ir_version", "opsets", "n_problems"),
    [
        (8, {"": 17}, 0),
        (10, {"": 21, "ai.onnx.ml": 3}, 0),
        (99, {"": 17}, 1),
        (8, {"": 999}, 1),
        (99, {"": 999, "ai.onnx.ml": 99}, 3),
    ],
)
def test_onnx_versions_are_those_of_the_runtime(ir_version: int, opsets: dict[str, int], n_problems: int) -> None:
    """Each one that it does not take is named."""
    assert len(onnx_support.problems(ir_version, opsets)) == n_problems


def test_the_highest_accepted_version_is_named() -> None:
    """It is taken itself, and the next one is not."""
    (problem,) = onnx_support.problems(8, {"": 999})

    best = int(problem.rsplit(" ", 1)[1])
    assert onnx_support.problems(8, {"": best}) == []
    assert len(onnx_support.problems(8, {"": best + 1})) == 1
