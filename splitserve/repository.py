"""The model repository: a folder of bundles, each a folder with a manifest, written whole or not at all.

<repository>/<model>/{preprocess,predict}/<version>/{manifest.json, …}
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from splitserve import manifest as manifests
from splitserve import routes
from splitserve.manifest import MANIFEST_FILE, MODEL_NAME, BundleError, FileDigest, Kind, Manifest
from splitserve.routes import ROUTE_FILE, Route

T = TypeVar("T")

KINDS: tuple[Kind, ...] = ("preprocess", "predict")


class BundleKey(msgspec.Struct, frozen=True, order=True):
    """Which bundle: ``penguins/preprocess/1``."""

    model: str
    kind: Kind
    version: int

    def __str__(self) -> str:
        return f"{self.model}/{self.kind}/{self.version}"


class Bundle:
    """A bundle whose manifest has been read; its other files are checked against it as they are read."""

    def __init__(self, key: BundleKey, folder: Path, manifest: Manifest) -> None:
        self.key = key
        self.folder = folder
        self.manifest = manifest

    def read(self, name: str) -> bytes:
        """A file's bytes, the ones that were checked.

        Raises:
            BundleError: the manifest does not list it, it is missing, or its size or digest is not the manifest's.
        """
        expected = self.manifest.files.get(name)
        if expected is None:
            raise BundleError(f"{MANIFEST_FILE} lists no {name}")
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise BundleError(f"{name} can not be read: {error.strerror}") from None
        if len(data) != expected.size:
            raise BundleError(f"{name} has {len(data)} bytes, {MANIFEST_FILE} says {expected.size}")
        if (found := hashlib.sha256(data).hexdigest()) != expected.sha256:
            raise BundleError(f"{name} has sha256 {found}, {MANIFEST_FILE} says {expected.sha256}")
        return data


class BundleSource(Protocol):
    """Where services get bundles from: a folder (`Repository`), or something far away with a cache in front."""

    def bundles(self) -> Iterable[BundleKey]:
        """All that are published now, by model, kind and version.

        Raises:
            BundleError: the source can not be looked at; the message says why.
        """
        ...

    def routes(self) -> dict[str, Route]:
        """The routes of the models that have one.

        Raises:
            BundleError: one is broken, or the source can not be looked at.
        """
        ...

    def open(self, key: BundleKey) -> Bundle:
        """A bundle, its manifest read and its files at hand.

        Raises:
            NotFetched: it can not be had now; another try may help.
            BundleError: it is broken.
        """
        ...


def load_bundle(source: BundleSource, key: BundleKey, how: Callable[[Bundle], T]) -> T:
    """What ``how`` makes of a bundle.

    Raises:
        BundleError: as the source and ``how`` raise it, with the bundle named.
    """
    try:
        return how(source.open(key))
    except BundleError as error:
        raise type(error)(f"{key}: {error}") from error


class Repository:
    """A model repository in a folder: a `BundleSource` that can be written.

    Folders whose names are not a model's, a kind's or a version's are passed over.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def models(self) -> list[str]:
        """Names of the models that have at least one bundle, sorted."""
        return sorted({key.model for key in self.bundles()})

    def bundles(self) -> Iterator[BundleKey]:
        """All bundles, by model, kind and version."""
        for model in _folders(self.root):
            if MODEL_NAME.fullmatch(model.name):
                for kind in KINDS:
                    yield from (BundleKey(model.name, kind, version) for version in self.versions(model.name, kind))

    def versions(self, model: str, kind: Kind) -> list[int]:
        """Version numbers of one half of a model, ascending."""
        names = (folder.name for folder in _folders(self.root / model / kind))
        return sorted(int(name) for name in names if name.isascii() and name.isdecimal() and not name.startswith("0"))

    def open(self, key: BundleKey) -> Bundle:
        """A bundle, its manifest read.

        Raises:
            BundleError: there is none, its manifest is broken or another bundle's, or it has files that are not listed.
        """
        folder = self.folder(key)
        try:
            manifest = manifests.decode((folder / MANIFEST_FILE).read_bytes())
            present = {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
        except OSError as error:
            raise BundleError(f"{MANIFEST_FILE} can not be read: {error.strerror}") from None
        named = BundleKey(manifest.name, manifest.kind, manifest.version)
        if named != key:
            raise BundleError(f"{MANIFEST_FILE} is that of {named}")
        if unlisted := sorted(present - manifest.files.keys()):
            raise BundleError(f"{MANIFEST_FILE} does not list {', '.join(unlisted)}")
        return Bundle(key, folder, manifest)

    def routes(self) -> dict[str, Route]:
        """The routes of the models that have one.

        Raises:
            BundleError: one is broken; the message names its model.
        """
        found = {}
        for model in self.models():
            try:
                found[model] = routes.decode((self.root / model / ROUTE_FILE).read_bytes())
            except FileNotFoundError:
                continue
            except (OSError, BundleError) as error:
                raise BundleError(f"{model}: {error}") from error
        return found

    def folder(self, key: BundleKey) -> Path:
        """Where a bundle is, or would be."""
        return self.root / key.model / key.kind / str(key.version)

    def next_version(self, model: str, kind: Kind) -> int:
        """The number after the highest one published."""
        return max(self.versions(model, kind), default=0) + 1

    def write(self, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
        """Publish a bundle: under a temporary name, then renamed, so that a reader never sees half of one.

        Args:
            manifest: its ``files`` are filled in here.
            files: contents by name.

        Raises:
            BundleError: the version exists, or the repository can not be written.
        """
        key = BundleKey(manifest.name, manifest.kind, manifest.version)
        digests = {name: FileDigest(hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()}
        manifest = msgspec.structs.replace(manifest, files=digests)
        folder = self.folder(key)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{key.version}-", dir=folder.parent))
            try:
                for name, data in {**files, MANIFEST_FILE: manifests.encode(manifest)}.items():
                    (scratch / name).write_bytes(data)
                scratch.chmod(0o755)
                if folder.exists():
                    raise BundleError(f"{key}: already published, and a published version never changes; publish a new one")
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        except OSError as error:
            raise BundleError(f"{key}: can not be written: {error.strerror}") from error
        return Bundle(key, folder, manifest)

    def remove(self, key: BundleKey) -> None:
        """Take a bundle back, as if it had never been published."""
        shutil.rmtree(self.folder(key), ignore_errors=True)


def _folders(parent: Path) -> list[Path]:
    """Visible folders below ``parent``; none when it is missing.

    Raises:
        BundleError: it is there and can not be read.
    """
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BundleError(f"{parent.name}: can not be read: {error.strerror}") from error
