"""The manifest of a bundle: everything that is known of an artefact without loading it.

Its JSON schema is docs/manifest.schema.json, written from these classes.
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
SIGNATURE_FILE = "model.sig"

Kind = Literal["preprocess", "predict"]


class BundleError(Exception):
    """A bundle cannot be read, trusted or run here; the message says which, what is wrong and what to do."""


class NotFetched(BundleError):
    """A bundle cannot be had at the moment; another try may help."""


class FileDigest(msgspec.Struct, frozen=True):
    """What a file of the bundle must be."""

    sha256: str
    size: int


class Tolerance(msgspec.Struct, frozen=True):
    """How far a number may be from the golden one: ``atol + rtol * abs(golden)``. Integers, booleans and text are exact."""

    rtol: float = 0.0
    atol: float = 0.0


BOUNDS: Mapping[str, float] = {"FP64": 1e-12, "FP32": 1e-5, "FP16": 1e-2, "BF16": 1e-2}
"""Largest tolerance by datatype, relative to the output's scale. Loaders refuse larger ones."""

QUANTISED_BOUND = 1e-2
"""The bound of a model that computes with quantised (8 bit) integers, whatever the datatype of its outputs."""


class Column(msgspec.Struct, frozen=True, omit_defaults=True):
    """One column of the training DataFrame.

    ``dtype`` is pandas' name for it. ``missing`` says what stood for a missing value in training, ``""`` when the column
    takes none: an empty string on the wire becomes that. ``categories`` are those of a categorical column.
    """

    name: str
    dtype: str
    missing: Literal["", "nan", "none"] = ""
    categories: tuple[str, ...] = ()
    ordered: bool = False


class Rows(msgspec.Struct, frozen=True):
    """What the transforms were fitted on, so that a request's tensors can be made into the same.

    ``form`` "frame": a DataFrame with these columns, each an input of the signature. ``form`` "array": one array of ``n_dims``
    dimensions, the only input; ``element`` is a numpy dtype, "str" or "bytes". "tensors": there are no transforms, the inputs go
    on to the predictor as they came, and the outputs of the signature are its inputs.
    """

    form: Literal["frame", "array", "tensors"]
    columns: tuple[Column, ...] = ()
    element: str = ""
    n_dims: int = 2


class Postprocess(msgspec.Struct, frozen=True):
    """Turns a predictor's scores (batch, n_labels) into ``probabilities`` and the best ``label``.

    ``scores`` names the predictor's output, ``activation`` what makes probabilities of it.
    """

    scores: str
    activation: Literal["softmax", "none"] = "softmax"


class Compiled(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of compiling a preprocessor's transforms to ONNX.

    ``is_equal``: ``pipeline.onnx`` is in the bundle and gave the same as the transforms, within the tolerances and refusals
    included, on ``n_checked`` golden and generated rows; ``worst_difference`` is the largest one between finite numbers.
    Otherwise ``reason`` says why there is none.
    """

    is_equal: bool = False
    n_checked: int = 0
    worst_difference: float = 0.0
    reason: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """``manifest.json`` of a bundle.

    ``files`` lists every other file but ``model.sig``. ``inputs`` and ``outputs`` are the signature: of a preprocessor, what
    clients send and what the predictor gets. ``labels`` name the classes in the order of the scores. The rest belongs to a
    preprocessor only: ``rows``, ``postprocess``, ``compiled``; ``names``, the predictor's name for an output where it has
    another; and ``refuses``: what must not be among its results because the estimator that the predictor was made of would not
    have taken it, "inf" infinities, "nan" these and NaN.

    ``fingerprint`` and ``feature_names`` say what the features mean (`splitserve.runtimes.meaning`): those that a preprocessor
    makes, those that a predictor was trained on. Empty where nobody can tell.
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
    rows: Rows | None = None
    postprocess: Postprocess | None = None
    refuses: Literal["", "inf", "nan"] = ""
    names: dict[str, str] = {}
    fingerprint: str = ""
    feature_names: tuple[str, ...] = ()
    compiled: Compiled | None = None


class _Versioned(msgspec.Struct):
    schema_version: int


# Made here, not as they are used: msgspec learns a type's fields as the first decoder for it is made, models load side by side,
# and two threads that are the first to ask crash the process.
_version_decoder = msgspec.json.Decoder(_Versioned)
_decoder = msgspec.json.Decoder(Manifest)


def decode(data: bytes) -> Manifest:
    """The manifest in a file's bytes.

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
    """The file's bytes, indented for people."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2)
