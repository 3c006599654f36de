"""The manifest of a bundle: everything that is known about an artefact without loading it.

Its JSON schema is docs/manifest.schema.json, generated from these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from splitserve.signature import TensorSpec

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
GOLDEN_FILE = "golden.npz"
PIPELINE_FILE = "pipeline.skops"
MODEL_FILE = "model.onnx"
COMPILED_FILE = "pipeline.onnx"
PLAN_FILE = "plan.json"
PLAN_ARRAYS_FILE = "plan.npz"
SIGNATURE_FILE = "model.sig"

Kind = Literal["preprocess", "predict"]

GoldenRows = Literal["rows", "own", "synthetic"]
"""Where golden rows come from: the training data, rows that the publisher chose, or generated ones."""


class BundleError(Exception):
    """A bundle cannot be read, trusted or run here; the message says which, what is wrong and what to do."""


class NotFetched(BundleError):
    """A bundle cannot be fetched now; a retry may help."""


class NotSigned(NotFetched):
    """A bundle, a release or a route has no signature; it may get one."""


class FileDigest(msgspec.Struct, frozen=True):
    """Digest and size, in bytes, of a file in a bundle."""

    sha256: str
    size: int


class Tolerance(msgspec.Struct, frozen=True):
    """How far a number may be from the golden one: ``atol + rtol * abs(golden)``. Integers, booleans and text are exact."""

    rtol: float = 0.0
    atol: float = 0.0


BOUNDS: Mapping[str, float] = {"FP64": 1e-12, "FP32": 1e-5, "FP16": 1e-2, "BF16": 1e-2}
"""Largest tolerance by datatype, relative to the output's scale. Loaders refuse larger ones."""

QUANTISED_BOUND = 1e-2
"""The bound of a model that computes with quantised (8 bit) integers, for every datatype of its outputs."""


class Column(msgspec.Struct, frozen=True, omit_defaults=True):
    """One column of the training DataFrame.

    ``dtype`` is pandas' name for it, ``category[int64]`` and the like if its categories are numbers. ``missing`` is the missing
    value in training, ``""`` if the column accepts none: an empty string on the wire becomes that value. ``categories`` are those
    of a categorical column.
    """

    name: str
    dtype: str
    missing: Literal["", "nan", "none"] = ""
    categories: tuple[str, ...] = ()
    ordered: bool = False


class Rows(msgspec.Struct, frozen=True):
    """The kind of data that the transforms were fitted on, from which a request's rows are rebuilt.

    ``form`` "frame": a DataFrame with these columns, each an input of the signature. "array": one array of ``n_dims``
    dimensions, the only input; ``element`` is a numpy dtype, "str" or "bytes". "tensors": there are no transforms, the inputs
    are passed to the predictor unchanged, and the outputs of the signature are its inputs.
    """

    form: Literal["frame", "array", "tensors"]
    columns: tuple[Column, ...] = ()
    element: str = ""
    n_dims: int = 2


class Postprocess(msgspec.Struct, frozen=True):
    """Turns a predictor's scores (batch, n_labels) into ``probabilities`` and the best ``label``.

    ``scores`` names the predictor's output, ``activation`` the function from scores to probabilities.
    """

    scores: str
    activation: Literal["softmax", "none"] = "softmax"


class Compiled(msgspec.Struct, frozen=True, omit_defaults=True):
    """The result of compiling a preprocessor's transforms to ONNX.

    ``is_equal``: ``pipeline.onnx`` is in the bundle and agreed with the transforms, within the tolerances and including rejected
    rows, on ``n_checked`` golden and generated rows; ``worst_difference`` is the largest one between finite numbers. Otherwise
    ``reason`` says why there is no compiled form.
    """

    is_equal: bool = False
    n_checked: int = 0
    worst_difference: float = 0.0
    reason: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """``manifest.json`` of a bundle.

    ``files`` lists every other file except ``model.sig``. ``inputs`` and ``outputs`` are the signature: of a preprocessor, what
    clients send and what the predictor receives. ``labels`` name the classes in the order of the scores; where there are several
    targets, ``output_labels`` name the columns of each output: the classes of a target, or the targets. The rest is for
    preprocessors only: ``rows``, ``postprocess``, ``compiled``; ``columns`` names the columns of an only input that is an array;
    ``names`` maps an output to the predictor's input where the names differ; ``refuses`` is what the features must not contain
    because the estimator behind the predictor would have rejected it: "inf" infinities, "nan" infinities and NaN; ``ignored``
    names columns of the training data that no transform selects: a client may send them; ``portable`` says whether ``plan.json``
    and ``plan.npz`` compute the features without scikit-learn (docs/plan-format.md), ``not_portable`` which step is the reason if
    not; both are missing in bundles that were published before there were plans.

    ``is_row_wise``: the result for a row does not depend on the other rows of the call. ``is_quantised``: the model computes with
    8 bit integers, so `QUANTISED_BOUND` bounds its tolerances. ``trained_on`` is the signature of the raw rows that the golden
    samples of a predictor were made from; empty if unknown. ``golden`` is where the golden samples come from, ``origin`` where
    the model does: a version in a registry, ``models:/NAME/VERSION`` of MLflow.

    ``fingerprint`` and ``feature_names`` describe the meaning of the features (`splitserve.runtimes.meaning`): those that a
    preprocessor makes, those that a predictor was trained on. Empty if unknown.
    """

    schema_version: int
    name: str
    kind: Kind
    version: int
    created: str
    files: dict[str, FileDigest]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    environment: dict[str, str]
    tolerances: dict[str, Tolerance] = {}
    labels: tuple[str, ...] = ()
    output_labels: dict[str, tuple[str, ...]] = {}
    rows: Rows | None = None
    postprocess: Postprocess | None = None
    refuses: Literal["", "inf", "nan"] = ""
    names: dict[str, str] = {}
    ignored: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    fingerprint: str = ""
    feature_names: tuple[str, ...] = ()
    compiled: Compiled | None = None
    portable: bool | None = None
    not_portable: str = ""
    is_row_wise: bool = True
    is_quantised: bool = False
    trained_on: tuple[TensorSpec, ...] = ()
    golden: GoldenRows = "rows"
    origin: str = ""


class _ManifestVersion(msgspec.Struct):
    schema_version: int


# Created at import: msgspec inspects a type when its first decoder is created, models load in parallel, and two threads that
# create the first decoder at the same time crash the process.
_version_decoder = msgspec.json.Decoder(_ManifestVersion)
_decoder = msgspec.json.Decoder(Manifest)


def decode(data: bytes) -> Manifest:
    """Decode a manifest.

    Raises:
        BundleError: not JSON, of another schema version, or a field is missing, unknown or of the wrong type.
    """
    try:
        found = _version_decoder.decode(data).schema_version
        if found != SCHEMA_VERSION:
            raise BundleError(f"{MANIFEST_FILE}: expected schema version {SCHEMA_VERSION}, got {found}")
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{MANIFEST_FILE}: {error}") from None


def encode(manifest: Manifest) -> bytes:
    """The file's bytes, indented for readers."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2)
