"""A model repository in a folder that can be written: bundles appear whole or not at all.

<repository>/<model>/{preprocess,predict}/<version>/{manifest.json, …}
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from splitserve.repository import manifest as manifests
from splitserve.repository import release_log, routes
from splitserve.repository.bundle import KINDS, Bundle, BundleKey, decode_manifest
from splitserve.repository.files import read_small, subfolders
from splitserve.repository.manifest import MANIFEST_FILE, BundleError, FileDigest, Kind, Manifest
from splitserve.repository.manifest_folder import check_unlisted
from splitserve.repository.release import RELEASES_FOLDER, Release, ReleaseKey
from splitserve.repository.release_log import MakeRecord
from splitserve.repository.releases import ReleaseFolder, decode_release
from splitserve.repository.routes import ROUTE_FILE, ROUTE_SIGNATURE_FILE, Route, StoredRoute
from splitserve.versions import MAX_VERSION, MODEL_NAME, is_number


class AlreadyPublished(BundleError):
    """A version number that is already published: a published version never changes."""


class Repository:
    """A model repository in a folder: a `WritableRepository`.

    Folders whose names are not a model's, a kind's or a version's are ignored.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def models(self) -> list[str]:
        """Names of the models that have a bundle or a record of a release, sorted."""
        return sorted({*(key.model for key in self.bundles()), *self.released_models()})

    def bundles(self) -> Iterator[BundleKey]:
        """All bundles, ordered by model, kind and version."""
        for model in self._model_folders():
            for kind in KINDS:
                yield from (BundleKey(model, kind, version) for version in self.versions(model, kind))

    def versions(self, model: str, kind: Kind) -> list[int]:
        """Version numbers of one half of a model, ascending."""
        return sorted(int(name) for name in subfolders(self.root / model / kind) if is_number(name))

    def open(self, key: BundleKey) -> Bundle:
        """A bundle with its manifest read.

        Raises:
            NotFetched: it has no manifest (yet).
            BundleError: its manifest is invalid or another bundle's, or it has files that the manifest does not list.
        """
        folder = self.folder(key)
        data = read_small(folder / MANIFEST_FILE)
        manifest = decode_manifest(data, key)
        check_unlisted(folder, manifest.files)
        return Bundle(key, folder, manifest, hashlib.sha256(data).hexdigest())

    def released_models(self) -> list[str]:
        """Names of the models that have a record of a release, sorted.

        Raises:
            BundleError: they cannot be listed.
        """
        return [model for model in self._model_folders() if release_log.has_records(self.root / model / RELEASES_FOLDER, model)]

    def _model_folders(self) -> list[str]:
        return [name for name in subfolders(self.root) if MODEL_NAME.fullmatch(name)]

    def releases(self, model: str) -> list[ReleaseKey]:
        """Keys of a model's records, by sequence.

        Raises:
            BundleError: they cannot be listed.
        """
        return release_log.listing(self.root, model)

    def open_release(self, key: ReleaseKey) -> ReleaseFolder:
        """A record with its manifest read.

        Raises:
            NotFetched: it has no manifest (yet).
            BundleError: its manifest is invalid or another record's, or it has files that the manifest does not list.
        """
        folder = self.folder(key)
        data = read_small(folder / MANIFEST_FILE)
        manifest = decode_release(data, key)
        check_unlisted(folder, manifest.files)
        return ReleaseFolder(key, folder, manifest, hashlib.sha256(data).hexdigest())

    def route(self, model: str) -> Route | None:
        """The route of a model, if it has one.

        Raises:
            BundleError: it is invalid; the message names the model.
        """
        return routes.decode_for(model, self.read_route(model))

    def read_route(self, model: str) -> StoredRoute | None:
        """The route of a model as it is stored, if it has one.

        Raises:
            BundleError: it cannot be read; the message names the model.
        """
        file = self.route_file(model)
        signature = file.with_name(ROUTE_SIGNATURE_FILE)
        try:
            if not file.exists():
                return None
            return StoredRoute(read_small(file), read_small(signature) if signature.exists() else None)
        except OSError as error:
            raise BundleError(f"{model}: {ROUTE_FILE} cannot be read: {error.strerror}") from error
        except BundleError as error:
            raise type(error)(f"{model}: {error}") from error

    def route_file(self, model: str) -> Path:
        """The path of a model's route, whether or not it exists."""
        return self.root / model / ROUTE_FILE

    def stamp(self, key: BundleKey | ReleaseKey, /) -> str:
        """Inodes, sizes and modification times of the files in the folder of a bundle or release."""
        found = []
        with contextlib.suppress(OSError), os.scandir(self.folder(key)) as entries:
            for entry in entries:
                facts = entry.stat(follow_symlinks=False)
                found.append(f"{entry.name} {facts.st_ino} {facts.st_size} {facts.st_mtime_ns}")
        return "\n".join(sorted(found))

    def close(self) -> None:
        """Nothing is fetched from a folder."""

    def folder(self, key: BundleKey | ReleaseKey) -> Path:
        """The path of a bundle or release, whether or not it exists."""
        return self.root / str(key)

    def next_version(self, model: str, kind: Kind) -> int:
        """The number after the highest one published.

        Raises:
            BundleError: there is none: versions end at `MAX_VERSION`.
        """
        number = max(self.versions(model, kind), default=0) + 1
        check_version(number)
        return number

    def write(self, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
        """Publish a bundle: under a temporary name, then renamed, so that a reader never sees a part of one.

        Args:
            manifest: its ``files`` are filled in here.
            files: contents by name.

        Raises:
            BundleError: the version exists or is no version number, or the repository cannot be written.
        """
        check_version(manifest.version)
        key = BundleKey(manifest.name, manifest.kind, manifest.version)
        digests = {name: FileDigest(hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()}
        manifest = msgspec.structs.replace(manifest, files=digests)
        encoded = manifests.encode(manifest)
        folder = self.folder(key)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{key.version}-", dir=folder.parent))
            try:
                for name, data in {**files, MANIFEST_FILE: encoded}.items():
                    (scratch / name).write_bytes(data)
                scratch.chmod(0o755)
                if folder.exists():
                    raise AlreadyPublished(f"{key}: already published, and a published version never changes; publish a new one")
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        except OSError as error:
            raise BundleError(f"{key}: cannot be written: {error.strerror}") from error
        return Bundle(key, folder, manifest, hashlib.sha256(encoded).hexdigest())

    def remove(self, key: BundleKey) -> None:
        """Undo `write`. Only for a bundle that has not been served."""
        shutil.rmtree(self.folder(key), ignore_errors=True)

    def publishing(self, model: str) -> AbstractContextManager[None]:
        """Held while a model is published to; leftovers of killed publishers are removed.

        Raises:
            BundleError: the repository cannot be written.
        """
        return release_log.publishing(self.root, model)

    def append(self, model: str, make: MakeRecord) -> Release:
        """Add a record to the releases of a model.

        Raises:
            BundleError: the repository cannot be written.
        """
        return release_log.append(self.root, model, make)

    def add_signature(self, key: BundleKey | ReleaseKey, file: Path) -> Path:
        """Nothing to do: it is in its place."""
        return file

    def add_route_signature(self, model: str, sign: Callable[[Path], Path]) -> Path:
        """Written in its place."""
        return sign(self.route_file(model))

    def place(self, key: BundleKey | ReleaseKey) -> Path:
        """The place of a bundle or release, for messages."""
        return self.folder(key)

    def route_place(self, model: str) -> Path:
        """The place of a model's route, for messages."""
        return self.route_file(model)


def check_version(number: int) -> None:
    """Raises:
    BundleError: it cannot be the number of a version.
    """
    if not 1 <= number <= MAX_VERSION:
        raise BundleError(f"version {number}: expected a number from 1 to {MAX_VERSION}")
