"""Fitted scikit-learn transforms on disk, as skops files: reading one runs no code, and unknown types are refused."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Sequence
from typing import Any

import skops.io
from skops.io.exceptions import UntrustedTypesFoundException

from splitserve.manifest import PIPELINE_FILE, BundleError

_TRUSTED_PACKAGES = ("numpy", "scipy", "sklearn")
_OWN_MODULE = "splitserve.transformers"
_SCORES = "sklearn.feature_selection._univariate_selection"
_TRUSTED_FUNCTIONS = {
    "numpy.mean",
    *(f"{_SCORES}.{name}" for name in ("chi2", "f_classif", "f_oneway", "f_regression", "r_regression")),
    "sklearn.feature_selection._mutual_info.mutual_info_classif",
    "sklearn.feature_selection._mutual_info.mutual_info_regression",
}
"""Functions that scikit-learn's own transformers hold: what they compute is all that they do."""


def dump(transformer: Any) -> bytes:
    """The contents of ``pipeline.skops``."""
    data: bytes = skops.io.dumps(transformer)
    return data


def load(data: bytes, trusted_modules: Sequence[str] = ()) -> Any:
    """The transformer in ``pipeline.skops``.

    Besides what skops itself trusts, classes of numpy, scipy and scikit-learn and the transformers of splitserve are allowed.

    Args:
        data: the file's bytes.
        trusted_modules: further modules whose types may be loaded, with the modules below them.

    Raises:
        BundleError: not a skops file, or it holds types that are not allowed.
    """
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise BundleError(f"{PIPELINE_FILE}: not a skops file")
    try:
        unknown = skops.io.get_untrusted_types(data=data)
        refused = [name for name in unknown if not _is_trusted(name, trusted_modules)]
        if refused:
            raise BundleError(
                f"{PIPELINE_FILE}: holds types that are not allowed: {', '.join(sorted(refused))}; "
                "name their modules in PREPROCESS_TRUSTED_MODULES if you trust them"
            )
        return skops.io.loads(data, trusted=unknown)
    except BundleError:
        raise
    except UntrustedTypesFoundException as error:
        raise BundleError(f"{PIPELINE_FILE}: {error}") from None
    except Exception as error:
        raise BundleError(f"{PIPELINE_FILE}: can not be loaded: {type(error).__name__}: {error}") from error


def untrusted_modules(data: bytes) -> list[str]:
    """Modules that an operator would have to trust before this file loads."""
    unknown = skops.io.get_untrusted_types(data=data)
    return sorted({name.rpartition(".")[0] for name in unknown if not _is_trusted(name, ())})


def _is_trusted(type_name: str, trusted_modules: Sequence[str]) -> bool:
    """Functions are trusted only from named modules: numpy alone has some that run text as code."""
    module, _, attribute = type_name.rpartition(".")
    if any(module == allowed or module.startswith(f"{allowed}.") for allowed in (_OWN_MODULE, *trusted_modules)):
        return True
    if type_name in _TRUSTED_FUNCTIONS:
        return True
    if module.partition(".")[0] not in _TRUSTED_PACKAGES:
        return False
    loaded = sys.modules.get(module)  # a file does not choose what is imported; skops has imported all of scikit-learn
    return isinstance(getattr(loaded, attribute, None), type)
