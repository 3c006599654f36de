"""What both halves share: the manifest's common fields, tolerances, golden samples, and writing all bundles or none."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from splitserve.arrays import from_array, to_array
from splitserve.publishing import samples
from splitserve.publishing.errors import PublishError
from splitserve.publishing.progress import Progress
from splitserve.publishing.proof import Run, row_wise_difference, stable_rows, tolerances_of
from splitserve.publishing.training_data import INPUT_NAME
from splitserve.repository import environment
from splitserve.repository import golden as goldens
from splitserve.repository.bundle import Bundle
from splitserve.repository.folder import AlreadyPublished
from splitserve.repository.golden import Golden
from splitserve.repository.manifest import BOUNDS, SCHEMA_VERSION, BundleError, GoldenRows, Kind, Manifest, Rows, Tolerance
from splitserve.repository.releases import MAX_GOLDEN_BYTES
from splitserve.repository.writable import WritableRepository, writable
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor
from splitserve.versions import MODEL_NAME

N_PROBED = 128
"""At most so many rows are run alone, together, permuted and repeated to prove that each answer depends on its own row alone."""

N_FEATURE_NAMES = 10_000
"""Names of features that a manifest has at most."""


class PublishOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `publish` and its siblings are asked for beside the model itself, as they describe it."""

    name: str
    input_name: str = INPUT_NAME
    trusted_modules: Sequence[str] = ()
    allow_pickle: bool = False
    row_wise: bool = True
    golden: Any = "rows"
    origin: str = ""


class PreprocessorHalf(msgspec.Struct, frozen=True):
    """A preprocessor's bundle before it is written: manifest, files, golden samples, and the loaded `Preprocessor`.

    ``notes``: what who publishes should know about the columns.
    """

    manifest: Manifest
    files: dict[str, bytes]
    golden: Golden
    rows: Rows
    runtime: Any
    notes: tuple[str, ...] = ()


class PredictorHalf(msgspec.Struct, frozen=True):
    """A predictor's bundle: what its manifest will say, its files, it loaded, and its golden samples."""

    manifest: Manifest
    files: dict[str, bytes]
    runtime: Any
    golden: Golden


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
    """The contents of ``golden.npz``.

    Raises:
        PublishError: larger than `MAX_GOLDEN_BYTES`, which `kept_rows` sees to unless a single row is.
    """
    try:
        data = goldens.encode(golden)
    except BundleError as error:
        raise PublishError(f"the golden samples are too large: {error}") from error
    if len(data) > MAX_GOLDEN_BYTES:
        n_rows = golden.inputs[0].n_rows
        raise PublishError(f"{n_rows} golden rows have {len(data)} bytes, compressed; the limit is {MAX_GOLDEN_BYTES}")
    return data


def check_row_wise(run: Run, inputs: Sequence[Tensor], bounds: Mapping[str, float] = BOUNDS) -> None:
    """Prove that each answer depends on its own row alone.

    Raises:
        PublishError: it does not; the message shows a row and the way out.
    """
    if difference := row_wise_difference(run, first_rows(inputs, N_PROBED), bounds):
        raise PublishError(
            f"an answer depends on the other rows of its call, or on chance: {difference}. Correct the model, or publish it with "
            "row_wise=False: then its requests are never merged with those of others"
        )


def settled(run: Run, golden: Golden, bounds: Mapping[str, float] = BOUNDS) -> tuple[Golden, dict[str, Tolerance]]:
    """The golden samples that are kept, and the tolerances of their outputs, which a service measures by the scale of those.

    Args:
        run: what gives the outputs.
        golden: all samples.
        bounds: of tolerances by datatype, relative to the output's scale.
    """
    tolerances = tolerances_of(golden.outputs, bounds)
    while True:  # fewer rows have a smaller scale, and so smaller tolerances, which may be too small for some of them
        kept = kept_rows(run, golden, tolerances)
        of_kept = tolerances_of(kept.outputs, bounds)
        if of_kept == tolerances or kept.inputs[0].n_rows == golden.inputs[0].n_rows:
            return kept, of_kept
        golden, tolerances = kept, of_kept


def kept_rows(run: Run, golden: Golden, tolerances: Mapping[str, Tolerance]) -> Golden:
    """The golden samples that hold on other machines, no more than fit into `MAX_GOLDEN_BYTES`; all if none holds."""
    n_bytes = sum(len(tensor.raw) for tensor in (*golden.rows, *golden.inputs, *golden.outputs))
    n_rows = golden.inputs[0].n_rows
    rows = stable_rows(run, golden.inputs, tolerances) or list(range(n_rows))
    fitting = max(1, MAX_GOLDEN_BYTES * n_rows // max(n_bytes, 1))
    rows = [rows[index] for index in samples.spread(len(rows), min(fitting, len(rows)))]
    return Golden(*(take_rows(side, rows) for side in (golden.inputs, golden.outputs, golden.rows)))


def take_rows(tensors: Sequence[Tensor], rows: Sequence[int]) -> tuple[Tensor, ...]:
    """These rows of each tensor (n_rows, …)."""
    return tuple(from_array(tensor.name, to_array(tensor)[list(rows)], tensor.datatype) for tensor in tensors)


def first_rows(tensors: Sequence[Tensor], n_rows: int) -> tuple[Tensor, ...]:
    """At most so many rows, spread evenly."""
    return take_rows(tensors, samples.spread(tensors[0].n_rows, n_rows))


def write(
    repository: WritableRepository,
    *halves: PreprocessorHalf | PredictorHalf,
    version: int | None,
    progress: Progress | None = None,
) -> list[Bundle]:
    """Write all bundles or none.

    Args:
        repository: to write to.
        halves: in this order.
        version: of each half; the next free number by default.
        progress: ends once all are written; if its time is over before, they are removed.

    Raises:
        PublishError: a version exists, or the repository cannot be written.
    """
    written: list[Bundle] = []
    try:
        for half in halves:
            written.append(_write(repository, half, version))
        if progress is not None:
            progress.end()
    except BaseException as error:
        for bundle in written:
            repository.remove(bundle.key)
        if isinstance(error, BundleError):
            raise PublishError(str(error)) from error
        raise
    return written


def _write(repository: WritableRepository, half: PreprocessorHalf | PredictorHalf, version: int | None) -> Bundle:
    """Write a bundle; if its number is a free one and somebody takes it first, under the next."""
    while True:
        number = version or repository.next_version(half.manifest.name, half.manifest.kind)
        try:
            return repository.write(msgspec.structs.replace(half.manifest, version=number), half.files)
        except AlreadyPublished:
            if version or repository.next_version(half.manifest.name, half.manifest.kind) <= number:
                raise


def said_of_golden(source: GoldenRows, n_rows: int) -> str:
    """The message about the golden rows that were stored."""
    what = {
        "rows": f'{n_rows} rows of X are stored as golden samples (golden="synthetic" stores none)',
        "own": f"{n_rows} rows of your own are stored as golden samples",
        "synthetic": f"{n_rows} generated rows are stored as golden samples",
    }
    return what[source]


def repository_at(where: str | os.PathLike[str]) -> WritableRepository:
    """The repository in a folder or at a URL.

    Raises:
        PublishError: it cannot be written.
    """
    try:
        return writable(where)
    except ValueError as error:
        raise PublishError(str(error)) from error
