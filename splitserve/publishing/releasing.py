"""A pair of bundles -> a release: the record that the two were proven as a whole, which is what makes them serve."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from splitserve.errors import SplitserveError
from splitserve.publishing.errors import PublishError
from splitserve.publishing.halves import PredictorHalf, PreprocessorHalf, encode_golden, kept_rows, take_rows, write
from splitserve.publishing.progress import Progress
from splitserve.publishing.proof import stable_rows, tolerances_of
from splitserve.repository import release_log
from splitserve.repository.bundle import Bundle
from splitserve.repository.golden import Golden, not_finite_reason
from splitserve.repository.manifest import BOUNDS, GOLDEN_FILE, QUANTISED_BOUND, BundleError, GoldenRows, Manifest
from splitserve.repository.release import SCHEMA_VERSION, Compared, Proof, Release, ReleaseManifest
from splitserve.repository.releases import ReleaseReader
from splitserve.repository.writable import WritableRepository
from splitserve.runtimes.release import WholeRelease
from splitserve.tensors import Tensor
from splitserve.versions import UNNAMED

PRINCIPAL_VARIABLE = "SPLITSERVE_PRINCIPAL"
"""Who records releases, for auditors; "" leaves it out."""


def principal() -> str:
    """Who records releases: as the environment says, or the user and the machine."""
    named = os.environ.get(PRINCIPAL_VARIABLE)
    if named is not None:
        return named[:128]
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"[:128]


def proven_golden(whole: WholeRelease, rows: Sequence[Tensor]) -> Golden:
    """The golden samples of a release: raw rows with the answers of the whole, those that hold on other machines.

    Args:
        whole: both halves, loaded as services load them.
        rows: raw rows (n_rows, …) by the inputs of the signature.

    Raises:
        PublishError: a row cannot be answered, or no answer is finite.
    """
    try:
        answers = whole.infer(rows)
        if reason := not_finite_reason(answers):
            raise PublishError(f"the whole cannot be proven: {reason}")
        golden = Golden(tuple(rows), answers)
        tolerances = tolerances_of(answers, bounds_of_pair(whole))
        features = whole.features(rows)
    except SplitserveError as error:
        raise PublishError(f"the halves cannot answer a golden row: {error.message}") from error
    if stable := stable_rows(whole.answer, features, tolerances):
        golden = Golden(*(take_rows(side, stable) for side in (golden.inputs, golden.outputs)))
    return kept_rows(whole.infer, golden, tolerances)


def bounds_of_pair(whole: WholeRelease) -> Mapping[str, float]:
    """The bounds of the tolerances of an answer, by datatype."""
    return dict.fromkeys(BOUNDS, QUANTISED_BOUND) if whole.is_quantised else BOUNDS


def record(
    repository: WritableRepository,
    whole: WholeRelease,
    preprocessor: Bundle,
    predictor: Bundle | None,
    golden: Golden,
    *,
    proven: Proof,
    compared: Compared,
    golden_rows: GoldenRows,
    accepted: Sequence[str] = (),
    server_version: int = UNNAMED,
) -> Release:
    """Append the release of a pair to a model's releases: from then on it serves.

    Args:
        repository: where the bundles are.
        whole: both halves, loaded.
        preprocessor: its bundle as it is in the repository.
        predictor: its bundle as it is in the repository; None: a running third-party server.
        golden: as `proven_golden` gives it.
        proven: how the pair was proven.
        compared: what was compared.
        golden_rows: where the golden rows come from.
        accepted: what the operator accepted explicitly.
        server_version: of the model at that server.

    Raises:
        BundleError: the repository cannot be written.
    """
    files = {GOLDEN_FILE: encode_golden(golden)}
    labels = preprocessor.manifest.labels if predictor is None else labels_of(preprocessor.manifest, predictor.manifest)
    version = server_version if predictor is None else predictor.key.version

    def make(sequence: int) -> tuple[ReleaseManifest, Mapping[str, bytes]]:
        manifest = ReleaseManifest(
            schema_version=SCHEMA_VERSION,
            model=preprocessor.key.model,
            sequence=sequence,
            pair=f"{preprocessor.key.version}.{version}",
            created=now(),
            recorded_by=principal(),
            preprocessor=preprocessor.manifest_sha256,
            predictor=predictor.manifest_sha256 if predictor else "",
            proven=proven,
            compared=compared,
            inputs=whole.inputs,
            outputs=whole.outputs,
            server_inputs=() if predictor else tuple(whole.predictor.inputs),
            server_outputs=() if predictor else tuple(whole.predictor.outputs),
            tolerances=tolerances_of(golden.outputs, bounds_of_pair(whole)),
            labels=labels,
            output_labels=preprocessor.manifest.output_labels or (predictor.manifest.output_labels if predictor else {}),
            is_row_wise=whole.is_row_wise,
            golden=golden_rows,
            accepted=tuple(accepted),
            files=release_log.digests(files),
        )
        return manifest, files

    return repository.append(preprocessor.key.model, make)


def write_released(
    repository: WritableRepository,
    preprocessor: PreprocessorHalf,
    predictor: PredictorHalf,
    *,
    version: int | None,
    proven: Proof,
    compared: Compared,
    progress: Progress | None = None,
) -> Release:
    """Write both bundles, then the release that makes the pair serve. Killed at any point, nothing serves in part.

    Args:
        repository: where to.
        preprocessor: the one half.
        predictor: the other.
        version: of both; the next free number of each by default.
        proven: how the pair was proven.
        compared: what was compared.
        progress: ends before the record, which is not interrupted.

    Raises:
        PublishError: the halves do not fit, a version exists, or the repository cannot be written.
    """
    manifests = (preprocessor.manifest, predictor.manifest)
    try:
        whole = WholeRelease(
            preprocessor.runtime,
            predictor.runtime,
            is_row_wise=all(manifest.is_row_wise for manifest in manifests),
            is_quantised=predictor.manifest.is_quantised,
        )
        labels_of(*manifests)
        golden = proven_golden(whole, preprocessor.golden.inputs)
        with repository.publishing(preprocessor.manifest.name):
            first, second = write(repository, preprocessor, predictor, version=version, progress=progress)
            try:
                source = preprocessor.manifest.golden
                return record(repository, whole, first, second, golden, proven=proven, compared=compared, golden_rows=source)
            except BundleError:
                # A store may have written the release and not said so.
                if not _is_recorded(repository, first.key.model, first.manifest_sha256):
                    for bundle in (first, second):
                        repository.remove(bundle.key)
                raise
    except BundleError as error:
        raise PublishError(str(error)) from error


def _is_recorded(repository: WritableRepository, model: str, preprocessor_sha256: str) -> bool:
    """Whether a release names this preprocessor, or may do: it cannot be read."""
    try:
        list(repository.bundles())
        history = ReleaseReader(repository).history(model)
    except BundleError:
        return True
    return any(each.manifest.preprocessor == preprocessor_sha256 for each in history.records)


def labels_of(preprocessor: Manifest, predictor: Manifest) -> tuple[str, ...]:
    """The classes that an answer names, in the order of its scores.

    Raises:
        BundleError: the halves name different ones, or name them in another order.
    """
    if preprocessor.labels and predictor.labels and preprocessor.labels != predictor.labels:
        raise BundleError(
            f"the halves do not fit: the preprocessor has the labels {_listed(preprocessor.labels)}, the predictor "
            f"{_listed(predictor.labels)}; publish both from the same training"
        )
    return preprocessor.labels or predictor.labels


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(labels[:10])
    return f"{shown} and {len(labels) - 10} more" if len(labels) > 10 else shown


def now() -> str:
    """The time of a record, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def rollback_record(repository: WritableRepository, target: Release, golden: bytes, *, current: Release) -> Release:
    """Append a release of an earlier release's pair, with its proof.

    Args:
        repository: where to.
        target: the earlier release.
        golden: the bytes of its golden samples.
        current: the release to move away from.

    Raises:
        BundleError: the repository cannot be written, or another record has been added since these two were chosen.
    """

    def make(sequence: int) -> tuple[ReleaseManifest, Mapping[str, bytes]]:
        _check_unchanged(repository, target, current)
        again = msgspec.structs.replace(
            target.manifest, sequence=sequence, created=now(), recorded_by=principal(), rolls_back=current.sequence
        )
        return again, {GOLDEN_FILE: golden}

    return repository.append(target.key.model, make)


def _check_unchanged(repository: WritableRepository, target: Release, current: Release) -> None:
    """Raises:
    BundleError: the one is not the target of a rollback any more, or the other not current.
    """
    list(repository.bundles())
    history = ReleaseReader(repository).history(target.key.model)
    if (history.rollback_target(), history.current()) != (target, current):
        raise BundleError(
            f"{target.key.model}: its releases have changed since release {current.sequence} was to be rolled back to "
            f"{target.sequence} ({target.pair}); splitserve releases {target.key.model} lists them"
        )


def withdraw_record(repository: WritableRepository, release: Release) -> Release:
    """Append a record that takes a release back.

    Raises:
        BundleError: the repository cannot be written.
    """

    def make(sequence: int) -> tuple[ReleaseManifest, Mapping[str, bytes]]:
        manifest = ReleaseManifest(
            schema_version=SCHEMA_VERSION,
            model=release.key.model,
            sequence=sequence,
            pair=str(release.pair),
            created=now(),
            recorded_by=principal(),
            withdraws=release.sequence,
        )
        return manifest, {}

    return repository.append(release.key.model, make)
