"""Halves that were published apart -> a release: proven together, compared with what serves now, and recorded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

from splitserve.arrays import from_array, to_array
from splitserve.errors import NotFound, SplitserveError
from splitserve.publishing import meaning
from splitserve.publishing.errors import PublishError
from splitserve.publishing.halves import check_row_wise, repository_at
from splitserve.publishing.meaning import FeatureDifference
from splitserve.publishing.proof import BATCH_SIZES
from splitserve.publishing.releasing import bounds_of_pair, labels_of, proven_golden, record, rollback_record, withdraw_record
from splitserve.publishing.training_data import as_rows
from splitserve.repository import golden as goldens
from splitserve.repository import pairing
from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.defaults import default_release
from splitserve.repository.golden import Golden
from splitserve.repository.manifest import (
    GOLDEN_FILE,
    PIPELINE_FILE,
    PLAN_ARRAYS_FILE,
    PLAN_FILE,
    BundleError,
    GoldenRows,
    Manifest,
)
from splitserve.repository.release import Compared, History, Release
from splitserve.repository.releases import ReleaseReader
from splitserve.repository.sources import missing
from splitserve.repository.writable import WritableRepository
from splitserve.runtimes import predictor as predictors
from splitserve.runtimes import preprocessor as preprocessors
from splitserve.runtimes.preprocessor import Preprocessor
from splitserve.runtimes.release import RunsTensors, WholeRelease, golden_of
from splitserve.runtimes.rows import to_tensors
from splitserve.tensors import Tensor
from splitserve.versions import Pair, parse_pair

CHANGED, UNKNOWN = "changed features", "unknown features"
"""What an operator can accept; a release that needed it says so in its metadata from then on."""


class ServedModel(RunsTensors, Protocol):
    """A model of a running server, such as `splitserve.remote.running_model.RunningModel`."""

    @property
    def properties(self) -> Mapping[str, str]:
        """Of its metadata."""
        ...


class Comparison(msgspec.Struct, frozen=True):
    """What a pair answers to the golden rows of the release that serves now. ``changes``: the largest by output, in its unit."""

    release: Release
    n_rows: int
    n_labels_changed: int
    changes: dict[str, float]


class Proposal(msgspec.Struct, frozen=True):
    """A pair that was proven and can be released.

    ``features`` are those that differ from the ones that the predictor was trained on; None: these are unknown.
    ``needs`` is what has to be accepted before it can be released.
    """

    model: str
    pair: Pair
    n_rows: int
    features: tuple[FeatureDifference, ...] | None
    current: Comparison | None
    _repository: WritableRepository
    _whole: WholeRelease
    _bundles: tuple[Bundle, Bundle | None]
    _golden: Golden
    _golden_rows: GoldenRows

    @property
    def needs(self) -> str:
        if self.features is None:
            return UNKNOWN
        return CHANGED if self.features else ""

    def record(self, accepted: Sequence[str] = ()) -> Release:
        """Append the release: from then on the pair serves.

        Args:
            accepted: what the operator accepts, of `CHANGED` and `UNKNOWN`.

        Raises:
            PublishError: something has to be accepted, a route pins another pair, or the repository cannot be written.
        """
        if self.needs and self.needs not in accepted:
            raise PublishError(_unaccepted(self))
        try:
            refuse_pinned(self._repository, self.model, self.pair)
            with self._repository.publishing(self.model):
                return record(
                    self._repository,
                    self._whole,
                    *self._bundles,
                    self._golden,
                    proven="halves" if self._bundles[1] else "server",
                    compared=Compared(self.n_rows, batch_sizes=BATCH_SIZES),
                    golden_rows=self._golden_rows,
                    accepted=[self.needs] if self.needs else [],
                    server_version=self.pair.predictor,
                )
        except BundleError as error:
            raise PublishError(str(error)) from error


def _unaccepted(proposal: Proposal) -> str:
    if proposal.features is None:
        return (
            f"{proposal.model} {proposal.pair}: it is unknown what the predictor was trained on, so nothing shows that the "
            "features mean the same; publish it with trained_on and rows (--trained-on and --rows), or accept it with "
            "--accept-unknown-features"
        )
    return (
        f"{proposal.model} {proposal.pair}: {len(proposal.features)} features differ from those that the predictor was trained "
        f"on: {meaning.listed(proposal.features)}; train the predictor on these features, or accept the change with "
        "--accept-changed-features"
    )


def propose(
    model: str,
    pair: str,
    *,
    repository: str | os.PathLike[str],
    rows: Any = None,
    trusted_modules: Sequence[str] = (),
    allow_environment_mismatch: bool = False,
    allow_unsafe_pickle: bool = False,
    server: ServedModel | None = None,
) -> Proposal:
    """Prove a pair of halves that were made apart, and compare it with the release that serves now. Writes nothing.

    Args:
        model: its name.
        pair: ``"K.M"``.
        repository: folder or URL of the model repository.
        rows: more rows to prove it on, as for `publish`.
        trusted_modules: modules of your own transformers.
        allow_environment_mismatch: as the service's setting.
        allow_unsafe_pickle: as the service's setting.
        server: the predictor in a running third-party server; by default its bundle in the repository. M is 0 where the
            server does not number its versions.

    Raises:
        PublishError: a half is not there or does not load, the halves do not fit, or the pair cannot be proven.
    """
    source = _listed(repository)
    numbers = _parse(model, pair)
    try:
        first = _opened(source, BundleKey(model, "preprocess", numbers.preprocessor))
        second = None if server is not None else _opened(source, BundleKey(model, "predict", numbers.predictor))
        preprocessor = preprocessors.load(
            first,
            trusted_modules=trusted_modules,
            allow_environment_mismatch=allow_environment_mismatch,
            allow_unsafe_pickle=allow_unsafe_pickle,
        )
        whole = _whole(preprocessor, second, server)
        inputs = _golden(first).inputs
        if rows is not None:
            inputs = _joined(inputs, _raw(preprocessor, rows))
        if whole.is_row_wise:
            check_row_wise(whole.infer, inputs, bounds_of_pair(whole))
        golden = proven_golden(whole, inputs)
        history = ReleaseReader(source).history(model)
        features = _features(source, history, numbers, preprocessor, second) if second else _served_features(preprocessor, server)
        current = default_release(source, model, history)
        compared = _compare(source, whole, current) if current is not None else None
    except BundleError as error:
        raise PublishError(str(error)) from error
    except SplitserveError as error:
        raise PublishError(f"{model} {pair}: {error.message}") from error
    n_rows = inputs[0].n_rows
    known = first.manifest.golden
    golden_rows: GoldenRows = "own" if rows is not None and known == "synthetic" else known
    return Proposal(model, numbers, n_rows, features, compared, source, whole, (first, second), golden, golden_rows)


def release(
    model: str,
    pair: str,
    *,
    repository: str | os.PathLike[str],
    rows: Any = None,
    accept_changed_features: bool = False,
    accept_unknown_features: bool = False,
    trusted_modules: Sequence[str] = (),
) -> Release:
    """Release a pair of halves that were published apart: prove it as a whole, then record it. From then on it serves.

    Args:
        model: its name.
        pair: ``"K.M"``, preprocessor version K with predictor version M.
        repository: folder or URL of the model repository.
        rows: more rows to prove it on, as for `publish`.
        accept_changed_features: release it although features differ from those that the predictor was trained on.
        accept_unknown_features: release it although it is unknown what the predictor was trained on.
        trusted_modules: modules of your own transformers.

    Raises:
        PublishError: the pair cannot be proven, something has to be accepted, or the repository cannot be written.
    """
    proposal = propose(model, pair, repository=repository, rows=rows, trusted_modules=trusted_modules)
    accepted = [CHANGED] * accept_changed_features + [UNKNOWN] * accept_unknown_features
    return proposal.record(accepted)


def releases(model: str, *, repository: str | os.PathLike[str]) -> History:
    """All records of a model.

    Raises:
        PublishError: they cannot be read.
    """
    try:
        return ReleaseReader(_listed(repository)).history(model)
    except BundleError as error:
        raise PublishError(str(error)) from error


def rollback(model: str, *, repository: str | os.PathLike[str]) -> Release:
    """Release again what served before the current release, and record that this one was rolled away from.

    Args:
        model: its name.
        repository: folder or URL of the model repository.

    Raises:
        PublishError: there is no earlier release, a route pins a pair, the releases have changed meanwhile, or the repository
            cannot be written.
    """
    source = _listed(repository)
    try:
        history = ReleaseReader(source).history(model)
        current, target = history.current(), history.rollback_target()
        if current is None:
            raise PublishError(f"{model}: has no release; splitserve releases {model} lists them")
        if target is None:
            raise PublishError(f"{model}: no release before {current.sequence} ({current.pair}) can be rolled back to")
        refuse_pinned(source, model, None)
        with source.publishing(model):
            return rollback_record(source, target, source.open_release(target.key).read(GOLDEN_FILE), current=current)
    except BundleError as error:
        raise PublishError(str(error)) from error


def withdraw(model: str, sequence: int, *, repository: str | os.PathLike[str]) -> Release:
    """Take a release back: it leaves the model's versions at the next poll, and stays callable for a grace.

    Args:
        model: its name.
        sequence: number of the release.
        repository: folder or URL of the model repository.

    Raises:
        PublishError: there is no such release, it is withdrawn already, a route pins it, or the repository cannot be written.
    """
    source = _listed(repository)
    try:
        history = ReleaseReader(source).history(model)
        if not isinstance(sequence, int):
            raise PublishError(
                f"{model}: release {sequence!r}: expected a sequence number; splitserve releases {model} lists them"
            )
        found = next((each for each in history.active() if each.sequence == sequence), None)
        if found is None:
            is_withdrawn = sequence in history.withdrawn
            raise PublishError(f"{model}: release {sequence} {'is withdrawn already' if is_withdrawn else 'does not exist'}")
        route = source.route(model)
        if route is not None and found.pair in route.named():
            raise PublishError(f"{model}: {source.route_place(model)} pins {found.pair}; change or remove the route first")
        with source.publishing(model):
            return withdraw_record(source, found)
    except BundleError as error:
        raise PublishError(str(error)) from error


def refuse_pinned(repository: WritableRepository, model: str, pair: Pair | None) -> None:
    """Raises:
    PublishError: the model's route pins another pair, so what is recorded would not serve.
    """
    route = repository.route(model)
    if route is not None and pair not in route.named():
        pinned = ", ".join(map(str, route.named()))
        raise PublishError(f"{model}: {repository.route_place(model)} pins {pinned}; change or remove the route first")


def _listed(where: str | os.PathLike[str]) -> WritableRepository:
    """The repository, as it is now.

    Raises:
        PublishError: there is no such folder, or it cannot be written, or listed.
    """
    repository = repository_at(where)
    if missing(os.fspath(where)):
        raise PublishError(f"{os.fspath(where)}: no such folder")
    try:
        list(repository.bundles())
    except BundleError as error:
        raise PublishError(str(error)) from error
    return repository


def _parse(model: str, pair: str) -> Pair:
    try:
        numbers = parse_pair(model, pair) if isinstance(pair, str) else None
    except NotFound:
        numbers = None
    if numbers is None:
        raise PublishError(f'pair {pair!r}: expected the text K.M, preprocessor version K with predictor version M, e.g. "2.1"')
    return numbers


def _opened(source: WritableRepository, key: BundleKey) -> Bundle:
    try:
        return source.open(key)
    except BundleError as error:
        raise BundleError(f"{key}: {error}") from error


def _golden(bundle: Bundle) -> Golden:
    manifest = bundle.manifest
    return goldens.decode(bundle.read(GOLDEN_FILE), manifest.inputs, manifest.outputs, manifest.trained_on)


def _raw(preprocessor: Preprocessor, rows: Any) -> tuple[Tensor, ...]:
    if preprocessor.manifest.rows is None:  # which loading has refused
        raise PublishError("manifest.json: a preprocessor needs rows")
    return tuple(to_tensors(preprocessor.manifest.rows, preprocessor.inputs, as_rows(rows)))


def _whole(preprocessor: Preprocessor, predictor: Bundle | None, server: ServedModel | None) -> WholeRelease:
    """Both halves together.

    Raises:
        BundleError: the predictor does not load, or the halves do not fit.
    """
    first = preprocessor.manifest
    if predictor is None:
        if server is None or not server.inputs or not server.outputs:
            raise BundleError("the server does not say what its model's inputs and outputs are, so nothing can be compared")
        return WholeRelease(preprocessor, server, is_row_wise=first.is_row_wise)
    second = predictor.manifest
    labels_of(first, second)
    return WholeRelease(
        preprocessor,
        predictors.load(predictor),
        is_row_wise=first.is_row_wise and second.is_row_wise,
        is_quantised=second.is_quantised,
    )


def _served_features(preprocessor: Preprocessor, server: ServedModel | None) -> tuple[FeatureDifference, ...] | None:
    """Features that differ from those that a server says its model was trained on; None if it says nothing."""
    if preprocessor.passes_on:
        return ()
    fingerprint, names = pairing.meaning_from_properties(server.properties if server else {})
    if not fingerprint or not preprocessor.manifest.fingerprint:
        return None
    if other := pairing.other_meaning(preprocessor.manifest, fingerprint, names):
        return (FeatureDifference("the features", 0, "as the server says", other),)
    return ()


def _joined(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, ...]:
    by_name = {tensor.name: tensor for tensor in second}
    return tuple(
        from_array(tensor.name, np.concatenate([to_array(tensor), to_array(by_name[tensor.name])]), tensor.datatype)
        for tensor in first
    )


def _features(
    source: WritableRepository, history: History, pair: Pair, preprocessor: Preprocessor, predictor: Bundle
) -> tuple[FeatureDifference, ...] | None:
    """Features that differ from those of training; None if they are unknown."""
    if preprocessor.passes_on:
        return ()
    if not predictor.manifest.trained_on:
        return None
    golden = _golden(predictor)
    if differences := meaning.feature_differences(preprocessor, predictor.manifest, golden):
        return tuple(differences)
    proven = (each for each in history.records if each.manifest.proven == "pipeline")
    trained = next((each for each in proven if each.pair.predictor == pair.predictor), None)
    if trained is None or trained.pair.preprocessor == pair.preprocessor:
        return ()
    other = _opened(source, BundleKey(predictor.key.model, "preprocess", trained.pair.preprocessor))
    if _fitted(other) == _fitted_of(preprocessor):
        return ()
    rows = _joined(golden.rows, _golden(other).inputs)
    return tuple(meaning.differences_between(preprocessors.load(other), preprocessor, rows))


def _fitted(bundle: Bundle) -> str:
    """A digest of fitted parameters: equal ones need no rows to show that they are."""
    return _digests(bundle.manifest)


def _fitted_of(preprocessor: Preprocessor) -> str:
    return _digests(preprocessor.manifest) or "unknown"


def _digests(manifest: Manifest) -> str:
    """Of the transforms and their plan; "" if there are no transforms."""
    if PIPELINE_FILE not in manifest.files:
        return ""
    files = (PIPELINE_FILE, PLAN_FILE, PLAN_ARRAYS_FILE)
    return " ".join(manifest.files[name].sha256 for name in files if name in manifest.files)


def _compare(source: WritableRepository, whole: WholeRelease, current: Release) -> Comparison | None:
    """What the pair answers to the golden rows of the current release; None if it takes other rows."""
    golden = golden_of(current.manifest, source.open_release(current.key).read(GOLDEN_FILE))
    try:
        answer = {tensor.name: to_array(tensor) for tensor in whole.infer(golden.inputs)}
    except SplitserveError:
        return None
    n_changed, changes = 0, {}
    for tensor in golden.outputs:
        want, have = to_array(tensor), answer.get(tensor.name)
        if have is None or have.shape != want.shape:
            continue
        if want.dtype.kind == "f":
            with np.errstate(invalid="ignore"):
                change = np.nan_to_num(np.abs(want.astype(float) - have.astype(float)), nan=0.0)
            changes[tensor.name] = float(change.max(initial=0.0))
        else:
            n_changed = max(n_changed, int((want != have).reshape(len(want), -1).any(axis=1).sum()))
    return Comparison(current, golden.inputs[0].n_rows, n_changed, changes)
