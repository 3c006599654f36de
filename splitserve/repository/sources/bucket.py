"""A model repository in a bucket that can be written: every file by a conditional put, each manifest last.

A bucket has no rename. A bundle or release exists once its manifest does, so readers never see a partial one. Two publishers that
choose the same number meet at its first file, which only one of them can create; the other takes the next. Stores that ignore the
condition of a put need one publisher at a time. What a killed publisher leaves behind has no manifest, so it is never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from splitserve.repository import manifest as manifests
from splitserve.repository import release_log
from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.folder import AlreadyPublished, check_version
from splitserve.repository.manifest import MANIFEST_FILE, SIGNATURE_FILE, BundleError, Kind, Manifest, NotFetched
from splitserve.repository.release import RELEASES_FOLDER, Release, ReleaseKey, decode, encode
from splitserve.repository.release_log import MakeRecord, marked, marker_name
from splitserve.repository.routes import ROUTE_FILE, ROUTE_SIGNATURE_FILE
from splitserve.repository.sources import FETCH_TIMEOUT_S
from splitserve.repository.sources.cache import Cache
from splitserve.repository.sources.remote_folder import RemoteFolder
from splitserve.repository.sources.remote_repository import RemoteRepository


class Bucket(RemoteRepository):
    """A `WritableRepository` below a URL.

    Args:
        folder: the files below the URL.
        cache: for what is read.
    """

    _folder: RemoteFolder

    def __init__(self, folder: RemoteFolder, cache: Cache) -> None:
        super().__init__(folder, cache, serves=lambda _: True)

    @classmethod
    def at(cls, url: str, *, cache: str = "", timeout_s: float = FETCH_TIMEOUT_S) -> Bucket:
        """The bucket at a URL, with a cache in this folder, or in the user's cache folder if it is empty."""
        return cls(RemoteFolder(url, timeout_s=timeout_s), Cache(Path(cache) if cache else None, patience_s=2 * timeout_s))

    def next_version(self, model: str, kind: Kind) -> int:
        """The number after the highest one that has a file, with or without a manifest."""
        self.bundles()
        taken = [key.version for key in self.keys() if isinstance(key, BundleKey) and (key.model, key.kind) == (model, kind)]
        number = max(taken, default=0) + 1
        check_version(number)
        return number

    def write(self, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
        check_version(manifest.version)
        key = BundleKey(manifest.name, manifest.kind, manifest.version)
        encoded = manifests.encode(msgspec.structs.replace(manifest, files=release_log.digests(files)))
        try:
            self._create(str(key), {**files, MANIFEST_FILE: encoded})
        except FileExistsError:
            raise AlreadyPublished(
                f"{key}: already published, and a published version never changes; publish a new one"
            ) from None
        self.bundles()
        return self.open(key)

    def remove(self, key: BundleKey) -> None:
        """Undo `write`, the manifest first. Only for a bundle that has not been served."""
        for name in self.files(key):
            with contextlib.suppress(BundleError):
                self._folder.delete(f"{key}/{name}")

    @contextlib.contextmanager
    def publishing(self, model: str) -> Iterator[None]:
        """Nothing is held: numbers are allocated by conditional puts."""
        self.bundles()
        yield

    def append(self, model: str, make: MakeRecord) -> Release:
        parent = f"{model}/{RELEASES_FOLDER}"

        def following() -> int:
            self.bundles()
            numbers = (key.sequence for key in self.keys() if isinstance(key, ReleaseKey) and key.model == model)
            return max(numbers, default=0) + 1

        def claim(sequence: int) -> bool:
            try:
                self._folder.create(f"{parent}/{marker_name(sequence)}", b"")
            except FileExistsError:
                return False
            return True

        def unclaim(sequence: int) -> None:
            with contextlib.suppress(NotFetched):  # the number stays unused: gaps do no harm
                self._folder.delete(f"{parent}/{marker_name(sequence)}")

        try:
            markers, recorded = self._markers(parent), following() - 1
            for sequence in markers:
                if sequence <= recorded:  # left by a killed publisher; such a number is not used again
                    unclaim(sequence)
            with release_log.allocated(following, claim, unclaim, first=max(markers, default=0) + 1) as sequence:
                manifest, files = make(sequence)
                data = encode(manifest)
                self._create(str(manifest.key), {**files, MANIFEST_FILE: data})
        except (FileExistsError, NotFetched) as error:
            raise BundleError(f"{self._folder}/{parent}: cannot be written: {error}") from error
        return Release(decode(data, manifest.key), hashlib.sha256(data).hexdigest())

    def _markers(self, parent: str) -> list[int]:
        """Sequence numbers that are being allocated, or were when their publisher was killed."""
        names = (path.removeprefix(f"{parent}/") for path in self._folder.list() if path.startswith(f"{parent}/"))
        return [sequence for name in names if (sequence := marked(name))]

    def add_signature(self, key: BundleKey | ReleaseKey, file: Path) -> str:
        """Put it next to the manifest."""
        return self._put(f"{key}/{SIGNATURE_FILE}", file.read_bytes())

    def add_route_signature(self, model: str, sign: Callable[[Path], Path]) -> str:
        """Put it next to the route."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, model)  # a signature names the folder of what it signs
            folder.mkdir()
            return self._put(f"{model}/{ROUTE_SIGNATURE_FILE}", sign(folder / ROUTE_FILE).read_bytes())

    def _put(self, path: str, data: bytes) -> str:
        try:
            self._folder.put(path, data)
        except NotFetched as error:
            raise BundleError(f"{self._folder}/{path}: cannot be written: {error}") from error
        return f"{self._folder}/{path}"

    def place(self, key: BundleKey | ReleaseKey) -> str:
        """Its URL."""
        return f"{self._folder}/{key}"

    def route_place(self, model: str) -> str:
        """Its URL."""
        return f"{self._folder}/{model}/{ROUTE_FILE}"

    def _create(self, parent: str, files: Mapping[str, bytes]) -> None:
        """Write files that do not exist yet, in alphabetical order with the manifest last: publishers meet at the first.

        Raises:
            FileExistsError: one exists already.
            BundleError: one cannot be written.
        """
        for name in sorted(files, key=lambda each: (each == MANIFEST_FILE, each)):
            try:
                self._folder.create(f"{parent}/{name}", files[name])
            except NotFetched as error:
                raise BundleError(f"{parent}: cannot be written: {error}") from error
