"""Library versions: those a bundle was made with, and whether this process can run it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from splitserve.manifest import BundleError


def observe(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of the packages that are installed, by name."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def check_sklearn(made_with: Mapping[str, str]) -> None:
    """A fitted scikit-learn object is bound to the minor version that made it.

    Raises:
        BundleError: names both versions and the ways out.

    Source: scikit-learn, "Model persistence": loading in another version is not supported and may change results.
    """
    trained, here = made_with.get("scikit-learn", ""), version("scikit-learn")
    if trained.split(".")[:2] != here.split(".")[:2]:
        raise BundleError(
            f"published with scikit-learn {trained or '(unknown)'}, this service runs {here}; serve it with a matching "
            "scikit-learn, publish it again with this one, or set PREPROCESS_ALLOW_ENVIRONMENT_MISMATCH=true and rely on the "
            "golden samples"
        )
