"""A model repository below a URL: a `BundleSource` whose files go through a cache.

Buckets are listed; a web server, which cannot list, has an ``index.json``. Manifests and routes are fetched when the listing
shows that they changed, a bundle's other files when the bundle is fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from splitserve.repository import routes
from splitserve.repository.bundle import Bundle, BundleKey, decode_manifest, parse_key
from splitserve.repository.manifest import MANIFEST_FILE, SIGNATURE_FILE, BundleError, FileDigest, Manifest, NotFetched
from splitserve.repository.routes import ROUTE_FILE, Route
from splitserve.repository.sources import index
from splitserve.repository.sources.cache import Cache, WrongContent
from splitserve.repository.sources.index import INDEX_FILE
from splitserve.repository.sources.remote_folder import RemoteFolder

_FILES_AT_A_TIME = 4


class _Small(msgspec.Struct, frozen=True):
    """A manifest, a route or a signature in a listing: with its digest from an index, or with a validator from a bucket."""

    path: str
    validator: str = ""
    digest: FileDigest | None = None


class _Listing(msgspec.Struct, frozen=True):
    """One poll's result. ``stamps`` has the validators or digests of each bundle's files."""

    manifests: dict[BundleKey, _Small]
    routes: dict[str, _Small]
    signatures: dict[BundleKey, _Small]
    stamps: dict[BundleKey, list[str]]


class RemoteRepository:
    """A model repository below a URL.

    Args:
        folder: the files below the URL.
        cache: for fetched files.
        serves: whether a model is selected; others are ignored.
    """

    def __init__(self, folder: RemoteFolder, cache: Cache, *, serves: Callable[[str], bool]) -> None:
        self._folder = folder
        self._cache = cache
        self._serves = serves
        self._listing: _Listing | None = None

    def bundles(self) -> Iterable[BundleKey]:
        """Poll: all that are published now, ordered by model, kind and version."""
        if self._listing is None:
            self._cache.sweep()
        self._listing = self._list() if self._folder.can_list else self._read_index()
        return sorted(self._listing.manifests)

    def route(self, model: str) -> Route | None:
        """The route of a model, if it has one, as of the last poll."""
        listed = self._polled().routes.get(model)
        try:
            return None if listed is None else routes.decode(self._read_small(ROUTE_FILE, listed))
        except BundleError as error:
            raise type(error)(f"{model}: {error}") from error

    def open(self, key: BundleKey) -> Bundle:
        """A bundle, its manifest read. `Bundle.fetch` gets its files."""
        listing = self._polled()
        if key not in listing.manifests:
            raise NotFetched(f"{self._folder} does not list it")
        data = self._read_small(MANIFEST_FILE, listing.manifests[key])
        manifest = decode_manifest(data, key)
        signature = listing.signatures.get(key)
        folder = f"{hashlib.sha256(self._folder.url.encode()).hexdigest()[:16]}/{key}"
        self._cache.place(f"{folder}/{SIGNATURE_FILE}", self._read_small(SIGNATURE_FILE, signature) if signature else None)
        place = self._cache.place(f"{folder}/{MANIFEST_FILE}", data).parent
        return _RemoteBundle(key, place, manifest, hashlib.sha256(data).hexdigest(), self._fetch, self._read)

    def stamp(self, key: BundleKey) -> str:
        """Validators of its files as of the last poll; with an index, digests of manifest and signature only."""
        return "\n".join(sorted(self._polled().stamps.get(key, ())))

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
        """The listing of a bucket."""
        listing = _Listing({}, {}, {}, {})
        for path, validator in self._folder.list().items():
            parent, _, name = path.rpartition("/")
            key = parse_key(parent)
            if not self._serves(parent.partition("/")[0]):
                continue
            if key:
                listing.stamps.setdefault(key, []).append(f"{name} {validator}")
            if name == ROUTE_FILE and "/" not in parent:
                listing.routes[parent] = _Small(path, validator)
            elif name == MANIFEST_FILE and key:
                listing.manifests[key] = _Small(path, validator)
            elif name == SIGNATURE_FILE and key:
                listing.signatures[key] = _Small(path, validator)
        return listing

    def _read_index(self) -> _Listing:
        """The listing of an index."""
        where = f"{self._folder}/{INDEX_FILE}"
        try:
            found = index.decode(self._folder.read(INDEX_FILE))
        except NotFetched as error:
            hint = '; "splitserve index" writes it' if isinstance(error.__cause__, FileNotFoundError) else ""
            raise NotFetched(f"{self._folder}: {error}{hint}") from error
        except BundleError as error:
            raise BundleError(f"{where}: {error}") from error
        served = {key: digest for key, digest in found.keys().items() if self._serves(key.model)}
        return _Listing(
            {key: _Small(f"{key}/{MANIFEST_FILE}", digest=digest) for key, digest in served.items()},
            {
                model: _Small(f"{model}/{ROUTE_FILE}", digest=digest)
                for model, digest in found.routes.items()
                if self._serves(model)
            },
            {
                key: _Small(f"{key}/{SIGNATURE_FILE}", digest=found.signatures[str(key)])
                for key in served
                if str(key) in found.signatures
            },
            {
                key: [digest.sha256, found.signatures[str(key)].sha256 if str(key) in found.signatures else ""]
                for key, digest in served.items()
            },
        )

    def _read_small(self, name: str, small: _Small) -> bytes:
        """A small file's bytes; from the cache if its validator or digest is unchanged."""
        if small.digest is not None:
            return self._read(name, small.path, small.digest)
        where = f"{self._folder}/{small.path}"
        if small.validator and (known := self._cache.recall(where, small.validator)):
            with contextlib.suppress(BundleError):
                return self._cache.read(name, known)
        data = self._folder.read(small.path)
        digest = self._cache.add(data)
        if small.validator:
            self._cache.remember(where, small.validator, digest)
        return data

    def _read(self, name: str, path: str, digest: FileDigest) -> bytes:
        """A file's bytes from the cache, fetched again if the cached file is damaged."""
        self._fetch(name, path, digest)
        try:
            return self._cache.read(name, digest)
        except BundleError:
            self._cache.discard(digest)
        self._fetch(name, path, digest)
        return self._cache.read(name, digest)

    def _fetch(self, name: str, path: str, digest: FileDigest) -> None:
        """Fetch a file into the cache; once more if its digest differs."""
        download = self._folder.download(path, digest.size)
        try:
            self._cache.fetch(name, digest, download)
        except WrongContent:
            try:
                self._cache.fetch(name, digest, download)
            except WrongContent as error:
                raise WrongContent(f"{error}, twice in a row from {self._folder}") from error


class _RemoteBundle(Bundle):
    """A bundle whose files are in the cache after `fetch`. Its folder has only the manifest and the signature, if any."""

    def __init__(
        self,
        key: BundleKey,
        folder: Path,
        manifest: Manifest,
        manifest_sha256: str,
        fetch: Callable[[str, str, FileDigest], None],
        read: Callable[[str, str, FileDigest], bytes],
    ) -> None:
        super().__init__(key, folder, manifest, manifest_sha256)
        self._fetch = fetch
        self._read = read

    def fetch(self) -> None:
        with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
            names = list(self.manifest.files)
            list(pool.map(self._fetch, names, map(self._path, names), map(self.expected, names)))

    def read(self, name: str) -> bytes:
        return self._read(name, self._path(name), self.expected(name))

    def _path(self, name: str) -> str:
        return f"{self.key}/{name}"
