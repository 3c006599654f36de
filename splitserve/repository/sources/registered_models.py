"""Versions of MLflow's model registry as a model repository: a `BundleSource` that follows their aliases.

Each version's artifacts are a model repository with an ``index.json``, whose digest is a tag of the version: what is loaded is
what was registered, whoever can write to the artifact store. At each poll the registry is asked which version is meant; its files
are looked at only if that is another one than before, since those of a version never change.

Version 7 is served as the pair 7.7, whatever its halves are called in its own repository: so two builds in empty folders have
different names here, and a moved alias loses no request. The pair of the version that is meant is the model's route; that of the
version before it stays in the repository, so that it serves until the other one is loaded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.defaults import default_release
from splitserve.repository.manifest import BundleError, Kind, NotFetched
from splitserve.repository.release import Release, ReleaseKey
from splitserve.repository.releases import ReleaseFolder, ReleaseReader
from splitserve.repository.routes import Route, RoutedPair, StoredRoute
from splitserve.repository.source import backoff_s
from splitserve.repository.sources import check, remote_folder
from splitserve.repository.sources.cache import Cache
from splitserve.repository.sources.mlflow_server import MlflowServer, NamedVersion, ProxiedArtifacts, RegisteredVersion
from splitserve.repository.sources.remote_folder import RemoteFolder
from splitserve.repository.sources.remote_repository import Files, RemoteRepository
from splitserve.versions import Pair

PROXIED = "mlflow-artifacts"


class VersionFiles:
    """The files of a registered version: of each of its models the release that serves, under the version's number.

    Args:
        version: as the registry has it.
        files: of the version.
        cache: for fetched files; shared with other versions.
        serves: whether a model is selected; others are ignored.

    Raises:
        BundleError: they cannot be read, or a model has no release.
    """

    def __init__(self, version: RegisteredVersion, files: Files, cache: Cache, *, serves: Callable[[str], bool]) -> None:
        self.version = version
        self.number = int(version.version)
        self._files = files
        self._repository = repository = RemoteRepository(
            files, cache, serves=serves, is_indexed=True, index_sha256=version.index_sha256
        )
        repository.bundles()
        reader = ReleaseReader(repository)
        self.served: Mapping[str, Release] = {model: _served(repository, reader, model) for model in repository.released_models()}
        if not self.served:
            raise BundleError("its repository has no release; the build step of a training pipeline makes one")

    def pair(self, model: str) -> Pair:
        """The name of a model's release here; a third-party server's model keeps its own number."""
        release = self.served[model]
        return Pair(self.number, self.number if release.manifest.predictor else release.pair.predictor)

    def bundles(self) -> list[BundleKey]:
        """Halves of releases, under the version's number."""
        kinds: tuple[Kind, ...] = ("preprocess", "predict")
        return [
            BundleKey(model, kind, self.number)
            for model, release in self.served.items()
            for kind in kinds
            if kind == "preprocess" or release.manifest.predictor
        ]

    def release_key(self, model: str) -> ReleaseKey:
        """The record of a model's release, under the version's number."""
        return ReleaseKey(model, self.number, self.pair(model))

    def open(self, key: BundleKey) -> Bundle:
        """A half of a release."""
        bundle = self._repository.open(self._own(key))
        return bundle.renamed(key, msgspec.structs.replace(bundle.manifest, version=self.number))

    def open_release(self, key: ReleaseKey) -> ReleaseFolder:
        """The record of a release."""
        record = self._repository.open_release(self.served[key.model].key)
        manifest = msgspec.structs.replace(record.manifest, sequence=self.number, pair=str(key.pair), rolls_back=0)
        return record.renamed(key, manifest)

    def stamp(self, key: BundleKey | ReleaseKey) -> str:
        """As `RemoteRepository.stamp`."""
        return self._repository.stamp(self.served[key.model].key if isinstance(key, ReleaseKey) else self._own(key))

    def _own(self, key: BundleKey) -> BundleKey:
        """The half's key in the version's repository."""
        pair = self.served[key.model].pair
        return BundleKey(key.model, key.kind, pair.preprocessor if key.kind == "preprocess" else pair.predictor)

    def close(self) -> None:
        """Cancel fetches in progress."""
        self._files.close()


def _served(repository: RemoteRepository, reader: ReleaseReader, model: str) -> Release:
    """The release that serves by default.

    Raises:
        BundleError: there is none, or it cannot be read.
    """
    release = default_release(repository, model, reader.history(model))
    if release is None:
        reasons = "; ".join(reader.problems.get(model, ())) or f"{model} has no release that is not withdrawn"
        raise BundleError(reasons)
    return release


class _Refused(msgspec.Struct, frozen=True):
    """A version whose files could not be read: the error and its message, how often, and when they are read again."""

    version: RegisteredVersion
    error: type[BundleError]
    message: str
    n_times: int
    retry_at: float


class _Followed:
    """A version that is followed: the one that is meant now with the one before it, and why nothing newer is known."""

    def __init__(self, named: NamedVersion) -> None:
        self.named = named
        self.held: tuple[VersionFiles, ...] = ()
        self.problem = ""
        self.refused: _Refused | None = None

    @property
    def present(self) -> VersionFiles | None:
        return self.held[0] if self.held else None

    def models(self) -> set[str]:
        """Names of the models in it; its own name as long as nothing is known of it."""
        return {model for files in self.held for model in files.served} or {self.named.model}

    def add(self, files: VersionFiles) -> None:
        """Hold a version, and the one before it unless that has the same number; close the others."""
        before, self.held = self.held, (files, *(each for each in self.held[:1] if each.number != files.number))
        for dropped in before:
            if dropped not in self.held:
                dropped.close()

    def having(self, model: str, number: int) -> VersionFiles | None:
        """The version with this number, if it is held and has the model."""
        return next((each for each in self.held if each.number == number and model in each.served), None)


class RegisteredModels:
    """The models of registered versions. One that cannot be read keeps what it had, and the others are not affected.

    Args:
        named: the versions.
        registry: says which they are.
        tracking: proxies artifacts.
        cache: for fetched files.
        serves: whether a model is selected; others are ignored.
        timeout_s: of one step of a fetch from an artifact store.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        named: Sequence[NamedVersion],
        registry: MlflowServer,
        tracking: MlflowServer,
        cache: Cache,
        *,
        serves: Callable[[str], bool],
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._followed = [_Followed(each) for each in named]
        self._registry, self._tracking = registry, tracking
        self._cache = cache
        self._serves = serves
        self._timeout_s = timeout_s
        self._clock = clock
        self._by_model: dict[str, _Followed] = {}
        self._is_polled = False

    def bundles(self) -> Iterable[BundleKey]:
        """Poll: all in the versions that are held now, ordered by model, kind and version.

        Raises:
            NotFetched: no version can be read.
        """
        by_model: dict[str, _Followed] = {}
        for followed in self._followed:
            try:
                self._poll(followed)
                followed.problem = ""
            except BundleError as error:
                followed.problem = f"{followed.named}: {error}"
            for model in followed.models():
                if (other := by_model.setdefault(model, followed)) is not followed:
                    other.problem = other.problem or f"{followed.named} has a model {model}, as {other.named}; serve one of them"
        if all(each.problem for each in self._followed):
            raise NotFetched("; ".join(each.problem for each in self._followed))
        self._by_model, self._is_polled = by_model, True
        found = {key for each in self._followed for files in each.held for key in files.bundles() if by_model[key.model] is each}
        return sorted(found)

    def _poll(self, followed: _Followed) -> None:
        """Find which version is meant; if it is another one, read its index and the records of its releases.

        Raises:
            BundleError: they cannot be read. They are read again after a while, which is doubled each time.
        """
        found = self._registry.resolve(followed.named)
        if followed.present is not None and found == followed.present.version:
            return
        refused = followed.refused if followed.refused is not None and followed.refused.version == found else None
        if refused is not None and self._clock() < refused.retry_at:
            raise refused.error(refused.message)
        try:
            followed.add(VersionFiles(found, self._files(found.artifacts), self._cache, serves=self._serves))
        except BundleError as error:
            message = f"version {found.version}: {error}"
            n_before = refused.n_times if refused is not None else 0
            followed.refused = _Refused(found, type(error), message, n_before + 1, self._clock() + backoff_s(n_before))
            raise type(error)(message) from error
        followed.refused = None

    def _files(self, uri: str) -> Files:
        """The files below an artifact URI.

        Raises:
            BundleError: it cannot be read by this installation.
        """
        scheme, path = urlsplit(uri).scheme, uri.partition(":")[2]
        if scheme == PROXIED:
            return ProxiedArtifacts(self._tracking, uri)
        if scheme in ("", "file"):
            return RemoteFolder(uri if scheme else f"file://{uri}", timeout_s=self._timeout_s)
        try:
            check(f"{scheme}://{path.removeprefix('//')}")
        except ValueError as error:
            raise BundleError(f"artifacts at {uri}: {error}") from error
        return RemoteFolder(uri, timeout_s=self._timeout_s, connect=_connect)

    def route(self, model: str) -> Route | None:
        """The pair of the version that is meant."""
        present = self._of(model).present if self._has(model) else None
        return Route((RoutedPair(str(present.pair(model))),)) if present is not None and model in present.served else None

    def read_route(self, model: str) -> StoredRoute | None:
        """None: an alias is no file."""
        return None

    def released_models(self) -> list[str]:
        """Names of the models, and of those that cannot be read: `releases` says why."""
        self._polled()
        return sorted(model for model in self._by_model if self._serves(model))

    def releases(self, model: str) -> list[ReleaseKey]:
        """Keys of the records of a model in the versions that are held.

        Raises:
            NotFetched: the version that is meant cannot be read now.
        """
        if not self._has(model):
            return []
        followed = self._of(model)
        if followed.problem:
            raise NotFetched(followed.problem)
        return sorted(files.release_key(model) for files in followed.held if model in files.served)

    def open_release(self, key: ReleaseKey) -> ReleaseFolder:
        """As `RemoteRepository.open_release`."""
        return self._having(key.model, key.sequence).open_release(key)

    def open(self, key: BundleKey) -> Bundle:
        """As `RemoteRepository.open`."""
        return self._having(key.model, key.version).open(key)

    def stamp(self, key: BundleKey | ReleaseKey, /) -> str:
        """As `RemoteRepository.stamp`."""
        number = key.sequence if isinstance(key, ReleaseKey) else key.version
        files = self._of(key.model).having(key.model, number) if self._has(key.model) else None
        return files.stamp(key) if files is not None else ""

    def close(self) -> None:
        """Cancel fetches in progress."""
        for followed in self._followed:
            for files in followed.held:
                files.close()
        self._registry.close()
        self._tracking.close()
        self._cache.close()

    def _polled(self) -> None:
        if not self._is_polled:
            self.bundles()

    def _has(self, model: str) -> bool:
        self._polled()
        return model in self._by_model

    def _of(self, model: str) -> _Followed:
        return self._by_model[model]

    def _having(self, model: str, number: int) -> VersionFiles:
        """The version with this number.

        Raises:
            NotFetched: it is not held now.
        """
        files = self._of(model).having(model, number) if self._has(model) else None
        if files is None:
            raise NotFetched(f"no registered version {number} of {model} is followed now")
        return files


def _connect(url: str) -> tuple[Any, str]:
    """As `remote_folder.connect`, and to the S3 server that MLflow's variable names."""
    endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL", "")
    return remote_folder.connect(url, **({"endpoint_url": endpoint} if endpoint and url.startswith("s3://") else {}))


def connect(
    named: Sequence[NamedVersion],
    uris: tuple[str, str],
    cache: Cache,
    *,
    serves: Callable[[str], bool],
    timeout_s: float,
) -> RegisteredModels:
    """A source of registered models, by the servers and credentials that MLflow's own variables name.

    Raises:
        ValueError: a certificate cannot be read.
    """
    registry = MlflowServer(uris[0], os.environ, timeout_s=timeout_s)
    tracking = registry if uris[0] == uris[1] else MlflowServer(uris[1], os.environ, timeout_s=timeout_s)
    return RegisteredModels(named, registry, tracking, cache, serves=serves, timeout_s=timeout_s)
