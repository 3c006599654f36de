"""A model repository below a URL: a `BundleSource` whose files go through a cache.

Buckets are listed; a web server, which cannot list, has an ``index.json``. Manifests and routes are fetched when the listing
shows that they changed, a bundle's other files when the bundle is fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Protocol

import msgspec

from splitserve.repository import release, routes
from splitserve.repository.bundle import Bundle, BundleKey, decode_manifest, parse_key
from splitserve.repository.manifest import MANIFEST_FILE, SIGNATURE_FILE, BundleError, FileDigest, NotFetched
from splitserve.repository.release import ReleaseKey
from splitserve.repository.releases import ReleaseFolder, decode_release
from splitserve.repository.routes import ROUTE_FILE, ROUTE_SIGNATURE_FILE, Route, StoredRoute
from splitserve.repository.sources import index
from splitserve.repository.sources.cache import Cache, Download, WrongContent
from splitserve.repository.sources.index import INDEX_FILE

_FILES_AT_A_TIME = 4


class _Small(msgspec.Struct, frozen=True):
    """A manifest, a route or a signature in a listing: with its digest from an index, or with a validator from a bucket."""

    path: str
    validator: str = ""
    digest: FileDigest | None = None


_Key = BundleKey | ReleaseKey


class _Listing(msgspec.Struct, frozen=True):
    """What there is: manifests, signatures and what is known of the files of each bundle and release; routes with signatures;
    the records of releases by model.
    """

    manifests: dict[_Key, _Small] = {}
    signatures: dict[_Key, _Small] = {}
    stamps: dict[_Key, list[str]] = {}
    routes: dict[str, _Small] = {}
    route_signatures: dict[str, _Small] = {}
    records: dict[str, list[ReleaseKey]] = {}

    def add(self, key: _Key, manifest: _Small) -> None:
        """Add a bundle or release by its manifest."""
        self.manifests[key] = manifest
        if isinstance(key, ReleaseKey):
            self.records.setdefault(key.model, []).append(key)

    def bundles(self) -> list[BundleKey]:
        """By model, kind and version."""
        return sorted(key for key in self.manifests if isinstance(key, BundleKey))

    def releases(self, model: str) -> list[ReleaseKey]:
        """By sequence."""
        return sorted(self.records.get(model, ()))


class Files(Protocol):
    """The files below a URL that are read: a `RemoteFolder`, or what a server proxies. ``url`` is without credentials."""

    @property
    def url(self) -> str: ...

    @property
    def can_list(self) -> bool: ...

    def list(self) -> dict[str, str]:
        """As `RemoteFolder.list`."""
        ...

    def read(self, path: str) -> bytes:
        """As `RemoteFolder.read`."""
        ...

    def download(self, path: str, size: int) -> Download:
        """As `RemoteFolder.download`."""
        ...

    def close(self) -> None:
        """Cancel requests in progress and refuse new ones."""
        ...


class RemoteRepository:
    """A model repository below a URL.

    Args:
        folder: the files below the URL.
        cache: for fetched files.
        serves: whether a model is selected; others are ignored.
        is_indexed: it has an index; otherwise one is read only if the files cannot be listed.
        index_sha256: of the index; "" if it is not known.
    """

    def __init__(
        self, folder: Files, cache: Cache, *, serves: Callable[[str], bool], is_indexed: bool = False, index_sha256: str = ""
    ) -> None:
        self._folder = folder
        self._cache = cache
        self._serves = serves
        self._is_indexed = is_indexed or not folder.can_list
        self._index_sha256 = index_sha256
        self._listing: _Listing | None = None

    def bundles(self) -> Iterable[BundleKey]:
        """Poll: all that are published now, ordered by model, kind and version."""
        if self._listing is None:
            self._cache.sweep()
        self._listing = self._read_index() if self._is_indexed else self._list()
        return self._listing.bundles()

    def route(self, model: str) -> Route | None:
        """The route of a model, if it has one, as of the last call of `bundles`."""
        return routes.decode_for(model, self.read_route(model))

    def read_route(self, model: str) -> StoredRoute | None:
        """The route of a model as it is stored, if it has one, as of the last call of `bundles`."""
        listing = self._polled()
        listed, signature = listing.routes.get(model), listing.route_signatures.get(model)
        try:
            if listed is None:
                return None
            data = self._read_small(ROUTE_FILE, listed)
            return StoredRoute(data, self._read_small(ROUTE_SIGNATURE_FILE, signature) if signature else None)
        except BundleError as error:
            raise type(error)(f"{model}: {error}") from error

    def released_models(self) -> list[str]:
        """Names of the models that have a record of a release, sorted, as of the last call of `bundles`."""
        return sorted(self._polled().records)

    def releases(self, model: str) -> list[ReleaseKey]:
        """Keys of a model's records, by sequence, as of the last call of `bundles`."""
        return self._polled().releases(model)

    def open_release(self, key: ReleaseKey) -> ReleaseFolder:
        """A record with its manifest read. `ReleaseFolder.fetch` gets its golden samples."""
        data, place = self._open(key)
        manifest = decode_release(data, key)
        return ReleaseFolder(key, place, manifest, hashlib.sha256(data).hexdigest(), _CachedFiles(self, str(key)))

    def open(self, key: BundleKey) -> Bundle:
        """A bundle, its manifest read. `Bundle.fetch` gets its files."""
        data, place = self._open(key)
        manifest = decode_manifest(data, key)
        return Bundle(key, place, manifest, hashlib.sha256(data).hexdigest(), _CachedFiles(self, str(key)))

    def _open(self, key: _Key) -> tuple[bytes, Path]:
        """The bytes of a manifest, and the folder in the cache that has it with its signature."""
        listing = self._polled()
        if key not in listing.manifests:
            raise NotFetched(f"{self._folder} does not list it")
        data = self._read_small(MANIFEST_FILE, listing.manifests[key])
        signature = listing.signatures.get(key)
        folder = f"{hashlib.sha256(self._folder.url.encode()).hexdigest()[:16]}/{key}"
        self._cache.place(f"{folder}/{SIGNATURE_FILE}", self._read_small(SIGNATURE_FILE, signature) if signature else None)
        return data, self._cache.place(f"{folder}/{MANIFEST_FILE}", data).parent

    def stamp(self, key: _Key, /) -> str:
        """What the last poll says about its files: a bucket has the change time of each, an index only digests of manifest
        and signature.
        """
        return "\n".join(sorted(self._polled().stamps.get(key, ())))

    def keys(self) -> list[BundleKey | ReleaseKey]:
        """All that have a file, as of the last call of `bundles`: some may be without a manifest."""
        return list(self._polled().stamps)

    def files(self, key: _Key) -> list[str]:
        """Names of the files of a bundle or release, as of the last call of `bundles`, its manifest first."""
        names = [stamp.partition(" ")[0] for stamp in self._polled().stamps.get(key, ())]
        return sorted(names, key=lambda name: (name != MANIFEST_FILE, name))

    def close(self) -> None:
        """Cancel fetches in progress."""
        self._folder.close()
        self._cache.close()

    def _polled(self) -> _Listing:
        if self._listing is None:
            self.bundles()
        assert self._listing is not None, "bundles() sets it"
        return self._listing

    def _list(self) -> _Listing:
        """What a bucket's listing says."""
        listing = _Listing()
        for path, validator in self._folder.list().items():
            parent, _, name = path.rpartition("/")
            key = parse_key(parent) or release.parse_key(parent)
            if not self._serves(parent.partition("/")[0]):
                continue
            if key:
                listing.stamps.setdefault(key, []).append(f"{name} {validator}")
            if name == ROUTE_FILE and "/" not in parent:
                listing.routes[parent] = _Small(path, validator)
            elif name == ROUTE_SIGNATURE_FILE and "/" not in parent:
                listing.route_signatures[parent] = _Small(path, validator)
            elif name == MANIFEST_FILE and key:
                listing.add(key, _Small(path, validator))
            elif name == SIGNATURE_FILE and key:
                listing.signatures[key] = _Small(path, validator)
        return listing

    def _read_index(self) -> _Listing:
        """The listing of an index."""
        where = f"{self._folder}/{INDEX_FILE}"
        try:
            data = self._folder.read(INDEX_FILE)
            got = hashlib.sha256(data).hexdigest()
            if self._index_sha256 and got != self._index_sha256:
                raise BundleError(f"expected sha256 {self._index_sha256} as it was registered, got {got}")
            found = index.decode(data)
        except NotFetched as error:
            hint = '; "splitserve index" writes it' if isinstance(error.__cause__, FileNotFoundError) else ""
            raise NotFetched(f"{self._folder}: {error}{hint}") from error
        except BundleError as error:
            raise BundleError(f"{where}: {error}") from error
        listing = _Listing()
        for key, digest in chain[tuple[_Key, FileDigest]](found.keys().items(), found.release_keys().items()):
            if not self._serves(key.model):
                continue
            listing.add(key, _Small(f"{key}/{MANIFEST_FILE}", digest=digest))
            listing.stamps[key] = [f"{MANIFEST_FILE} {digest.sha256}"]
            if signature := found.signatures.get(str(key)):
                listing.signatures[key] = _Small(f"{key}/{SIGNATURE_FILE}", digest=signature)
                listing.stamps[key].append(f"{SIGNATURE_FILE} {signature.sha256}")
        for model, digest in found.routes.items():
            if self._serves(model):
                listing.routes[model] = _Small(f"{model}/{ROUTE_FILE}", digest=digest)
                if signature := found.signatures.get(model):
                    listing.route_signatures[model] = _Small(f"{model}/{ROUTE_SIGNATURE_FILE}", digest=signature)
        return listing

    def _read_small(self, name: str, small: _Small) -> bytes:
        """A small file's bytes; from the cache if its validator or digest is unchanged."""
        if small.digest is not None:
            return self.read(name, small.path, small.digest)
        where = f"{self._folder}/{small.path}"
        if small.validator and (known := self._cache.recall(where, small.validator)):
            with contextlib.suppress(BundleError):
                return self._cache.read(name, known)
        data = self._folder.read(small.path)
        digest = self._cache.add(data)
        if small.validator:
            self._cache.remember(where, small.validator, digest)
        return data

    def read(self, name: str, path: str, digest: FileDigest) -> bytes:
        """A file's bytes out of the cache. One that is damaged there is fetched again."""
        self.fetch(name, path, digest)
        try:
            return self._cache.read(name, digest)
        except BundleError:
            self._cache.discard(digest)
        self.fetch(name, path, digest)
        return self._cache.read(name, digest)

    def fetch(self, name: str, path: str, digest: FileDigest) -> None:
        """Fetch a file into the cache if it is missing. A file with a wrong digest is fetched once more."""
        download = self._folder.download(path, digest.size)
        try:
            self._cache.fetch(name, digest, download)
        except WrongContent:
            try:
                self._cache.fetch(name, digest, download)
            except WrongContent as error:
                raise WrongContent(f"{error}, twice in a row from {self._folder}") from error


class _CachedFiles:
    """The files of a bundle or release, in the cache once they were fetched."""

    def __init__(self, repository: RemoteRepository, path: str) -> None:
        self._repository = repository
        self._path = path

    def fetch(self, listed: Mapping[str, FileDigest]) -> None:
        with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
            paths = [f"{self._path}/{name}" for name in listed]
            list(pool.map(self._repository.fetch, listed, paths, listed.values()))

    def read(self, name: str, digest: FileDigest) -> bytes:
        return self._repository.read(name, f"{self._path}/{name}", digest)
