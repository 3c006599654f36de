"""Fitted scikit-learn transforms on disk, as skops files: reading one runs no code, and unknown types are refused.

Transforms that skops does not support may be a pickle instead, written with joblib. Loading a pickle runs any code in it, so it
has to be allowed explicitly.
"""

from __future__ import annotations

import importlib
import io
import sys
import zipfile
import zlib
from collections.abc import Collection, Sequence
from typing import Any

import joblib
import sklearn
import skops.io
from skops.io.exceptions import UntrustedTypesFoundException

from splitserve.repository.archives import check_skops, check_unpacked
from splitserve.repository.bundle import Bundle
from splitserve.repository.manifest import PIPELINE_FILE, BundleError

PICKLE_FILE = "pipeline.joblib"
_TRUSTED_PACKAGES = ("numpy", "scipy", "sklearn")
_OWN_MODULE = "splitserve.transformers"
_SCORES = "sklearn.feature_selection._univariate_selection"
_TRUSTED_FUNCTIONS = {
    "numpy.mean",
    *(f"{_SCORES}.{name}" for name in ("chi2", "f_classif", "f_oneway", "f_regression", "r_regression")),
    "scipy._lib.array_api_compat.numpy._aliases.asarray",
    "sklearn.cluster._kmeans._kmeans_single_elkan",
    "sklearn.cluster._kmeans._kmeans_single_lloyd",
    "sklearn.feature_selection._mutual_info.mutual_info_classif",
    "sklearn.feature_selection._mutual_info.mutual_info_regression",
}
"""Functions that scikit-learn's own transformers refer to (the first, a spline of scipy); they are free of side effects."""

_EXPERIMENTAL = ("sklearn.impute._iterative",)
"""Modules of transformers that scikit-learn imports only for those who ask for its experimental features."""


def is_pickle(bundle: Bundle) -> bool:
    """Whether a preprocessor's transforms are a pickle; if a bundle has both, the skops file is used."""
    return PICKLE_FILE in bundle.manifest.files and PIPELINE_FILE not in bundle.manifest.files


def read(bundle: Bundle, trusted_modules: Sequence[str] = (), *, allow_unsafe_pickle: bool = False) -> Any:
    """A bundle's transformer.

    Args:
        bundle: of a preprocessor.
        trusted_modules: as for `load`.
        allow_unsafe_pickle: load a pickle, and so run the code in it.

    Raises:
        BundleError: a file is damaged, its types are not allowed, or it is a pickle and none is allowed.
    """
    if not is_pickle(bundle):
        return load(bundle.read(PIPELINE_FILE), trusted_modules)
    if not allow_unsafe_pickle:
        raise BundleError(
            f"{PICKLE_FILE}: a pickle, and loading one runs any code that is in it; publish the transforms as skops, or set "
            "PREPROCESS_ALLOW_UNSAFE_PICKLE=true if you trust everyone who can write to the model repository"
        )
    return load_pickle(bundle.read(PICKLE_FILE))


def transform(transformer: Any, rows: Any) -> Any:
    """Call fitted transforms, without validating their parameters again: that was done when they were fitted."""
    with sklearn.config_context(skip_parameter_validation=True):
        return transformer.transform(rows)


def dump(transformer: Any) -> bytes:
    """The contents of ``pipeline.skops``.

    Raises:
        BundleError: skops does not support a type in it.
    """
    try:
        data: bytes = skops.io.dumps(transformer)
    except Exception as error:  # its parts raise arbitrary exceptions
        raise BundleError(f"skops cannot hold the transforms: {type(error).__name__}: {error}") from error
    return data


def dump_pickle(transformer: Any) -> bytes:
    """The contents of ``pipeline.joblib``.

    Raises:
        BundleError: it cannot be pickled.
    """
    buffer = io.BytesIO()
    try:
        joblib.dump(transformer, buffer)
    except Exception as error:
        raise BundleError(f"the transforms cannot be pickled: {type(error).__name__}: {error}") from error
    return buffer.getvalue()


def load_pickle(data: bytes) -> Any:
    """The transformer in ``pipeline.joblib``. Runs any code in it.

    Raises:
        BundleError: it cannot be loaded.
    """
    try:
        return joblib.load(io.BytesIO(data))
    except Exception as error:
        raise BundleError(f"{PICKLE_FILE}: cannot be loaded: {type(error).__name__}: {error}") from error


_WAY_OUT = "name their modules in PREPROCESS_TRUSTED_MODULES if you trust them"


def load(
    data: bytes, trusted_modules: Sequence[str] = (), *, trusted_types: Collection[str] = (), way_out: str = _WAY_OUT
) -> Any:
    """The transformer in ``pipeline.skops``.

    Trusted are skops' own defaults, the classes of numpy, scipy and scikit-learn, and `splitserve.transformers`.

    Args:
        data: the file's bytes.
        trusted_modules: further modules whose types may be loaded, with the modules below them.
        trusted_types: further types, by name.
        way_out: what to do about types that are not allowed.

    Raises:
        BundleError: not a skops file, it is too large unpacked, or it holds types that are not allowed.
    """
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise BundleError(f"{PIPELINE_FILE}: not a skops file")
    try:
        check_skops(data, PIPELINE_FILE)
        unknown = skops.io.get_untrusted_types(data=data)
        refused = [name for name in unknown if name not in trusted_types and not _is_trusted(name, trusted_modules)]
        if refused:
            raise BundleError(f"{PIPELINE_FILE}: holds types that are not allowed: {', '.join(sorted(refused))}; {way_out}")
        return skops.io.loads(data, trusted=unknown)
    except BundleError:
        raise
    except UntrustedTypesFoundException as error:
        raise BundleError(f"{PIPELINE_FILE}: {error}") from None
    except Exception as error:
        raise BundleError(f"{PIPELINE_FILE}: cannot be loaded: {type(error).__name__}: {error}") from error


def uncompressed(data: bytes) -> bytes:
    """A skops file with its members as they are, which skops can also compress. A bundle's never are.

    Raises:
        BundleError: not a skops file, or too large unpacked.
    """
    buffer = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w") as target:
            check_unpacked(sum(member.file_size for member in source.infolist()), PIPELINE_FILE)
            for name in source.namelist():
                target.writestr(name, source.read(name))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise BundleError(f"not a skops file: {error}") from error
    return buffer.getvalue()


def untrusted_modules(data: bytes, trusted_modules: Sequence[str] = ()) -> list[str]:
    """Modules that an operator would have to trust in addition to load this file."""
    return sorted({name.rpartition(".")[0] for name in untrusted_types(data, trusted_modules)})


def untrusted_types(data: bytes, trusted_modules: Sequence[str] = ()) -> list[str]:
    """Types and functions in the file that are refused."""
    return sorted(name for name in skops.io.get_untrusted_types(data=data) if not _is_trusted(name, trusted_modules))


def _is_trusted(type_name: str, trusted_modules: Sequence[str]) -> bool:
    """Functions are trusted only by name or module: numpy has some that execute text as code."""
    module, _, attribute = type_name.rpartition(".")
    if any(module == allowed or module.startswith(f"{allowed}.") for allowed in (_OWN_MODULE, *trusted_modules)):
        return True
    if type_name in _TRUSTED_FUNCTIONS:
        return True
    if module.partition(".")[0] not in _TRUSTED_PACKAGES:
        return False
    if module in _EXPERIMENTAL:
        importlib.import_module(module)
    loaded = sys.modules.get(module)  # a file must not choose what is imported; skops has imported scikit-learn
    return isinstance(getattr(loaded, attribute, None), type)
