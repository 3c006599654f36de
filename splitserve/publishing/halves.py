"""What both halves share: the manifest's common fields, tolerances, golden samples, and writing all bundles or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np

from splitserve.arrays import Array, from_array, to_array
from splitserve.publishing import samples
from splitserve.publishing.errors import PublishError
from splitserve.repository import environment
from splitserve.repository import golden as goldens
from splitserve.repository.bundle import Bundle
from splitserve.repository.folder import Repository
from splitserve.repository.golden import Golden
from splitserve.repository.manifest import SCHEMA_VERSION, BundleError, Kind, Manifest, Rows, Tolerance
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor
from splitserve.versions import MODEL_NAME

RTOL = 1e-4
MARGIN = 10
LEAST_ATOL = 1e-6
"""The tolerance of a floating-point output: ``RTOL``, and ``MARGIN`` times the largest difference measured at publication
between rows computed one by one and together, and between what was computed and what crossed the wire; at least ``LEAST_ATOL``.
"""

N_FEATURE_NAMES = 10_000


class PreprocessorHalf(msgspec.Struct, frozen=True):
    """A preprocessor's bundle: what its manifest will say, its files, its golden samples, and it loaded."""

    manifest: Manifest
    files: dict[str, bytes]
    golden: Golden
    rows: Rows
    runtime: Any


class PredictorHalf(msgspec.Struct, frozen=True):
    """A predictor's bundle: what its manifest will say, its files, and it loaded."""

    manifest: Manifest
    files: dict[str, bytes]
    runtime: Any


def new_manifest(
    name: str,
    kind: Kind,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    packages: Sequence[str],
    made_with: Mapping[str, str] | None = None,
    **fields: Any,
) -> Manifest:
    if not MODEL_NAME.fullmatch(name):
        raise PublishError(f'name "{name}": expected letters, digits, ".", "_" and "-", a letter or digit first, at most 128')
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        kind=kind,
        version=0,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files={},
        inputs=inputs,
        outputs=outputs,
        environment={**environment.observe(packages), **(made_with or {})},
        **fields,
    )


def encode_golden(golden: Golden) -> bytes:
    try:
        return goldens.encode(golden)
    except BundleError as error:
        raise PublishError(f"the golden samples are too large: {error}") from error


def with_tolerances(manifest: Manifest, golden: Golden, run: Callable[[Any], Sequence[Tensor]], *others: Tensor) -> Manifest:
    """The manifest with the tolerances of its floating-point outputs."""
    alone = [output for sample in _single_samples(golden) for output in run(sample)]
    tolerances = {}
    for output in golden.outputs:
        array = to_array(output)
        if array.dtype.kind == "f":
            rows = [to_array(tensor) for tensor in alone if tensor.name == output.name]
            together = [np.concatenate(rows), *(to_array(other) for other in others if other.name == output.name)]
            seen = max(_largest_difference(array[: len(other)], other) for other in together)
            tolerances[output.name] = Tolerance(RTOL, max(MARGIN * seen, LEAST_ATOL))
    return msgspec.structs.replace(manifest, tolerances=tolerances)


def _single_samples(golden: Golden) -> list[tuple[Tensor, ...]]:
    """The first golden samples, each as a request of its own."""
    arrays = [(tensor, to_array(tensor)) for tensor in golden.inputs]
    n_rows = min(golden.inputs[0].n_rows, samples.N_GOLDEN)
    return [
        tuple(from_array(tensor.name, array[row : row + 1], tensor.datatype) for tensor, array in arrays) for row in range(n_rows)
    ]


def _largest_difference(one: Array, other: Array) -> float:
    with np.errstate(invalid="ignore"):
        differences = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return float(np.nan_to_num(differences, nan=0.0, posinf=0.0).max(initial=0.0))


def write(repository: Repository, *halves: PreprocessorHalf | PredictorHalf, version: int | None) -> list[Bundle]:
    """Write all bundles or none.

    Args:
        repository: where to.
        halves: what.
        version: of each; the next free number by default.

    Raises:
        PublishError: a version exists, or the repository cannot be written.
    """
    written: list[Bundle] = []
    try:
        for half in halves:
            manifest = half.manifest
            number = version or repository.next_version(manifest.name, manifest.kind)
            written.append(repository.write(msgspec.structs.replace(manifest, version=number), half.files))
    except BundleError as error:
        for bundle in written:
            repository.remove(bundle.key)
        raise PublishError(str(error)) from error
    return written
