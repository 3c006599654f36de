"""The model repository: a folder of bundles, each a folder with a manifest, written whole or not at all.

<repository>/<model>/{preprocess,predict}/<version>/{manifest.json, …}

Whoever can write to the repository may have put anything there. Folders may be symbolic links, as in mounted volumes; files
must be regular ones, and are checked and read through the same open file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from splitserve.repository import manifest as manifests
from splitserve.repository import routes
from splitserve.repository.manifest import (
    MANIFEST_FILE,
    SIGNATURE_FILE,
    BundleError,
    FileDigest,
    Kind,
    Manifest,
    NotFetched,
)
from splitserve.repository.routes import ROUTE_FILE, Route
from splitserve.versions import MODEL_NAME

T = TypeVar("T")

KINDS: tuple[Kind, ...] = ("preprocess", "predict")

MAX_SMALL_FILE_BYTES = 16 * 1024**2
"""Largest manifest, route or index that is read. A manifest with ten thousand columns has about 2 MiB."""

MAX_BUNDLE_BYTES = 4 * 1024**3
"""Largest sum of a bundle's files. ONNX models without external data end at 2 GiB, protobuf's limit."""

_FILE_NAME = MODEL_NAME
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(rf"({MODEL_NAME.pattern})/({'|'.join(KINDS)})/([1-9][0-9]{{0,8}})")

_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
"""No link is followed, and opening a pipe does not wait for its writer."""

_KINDS_OF_FILE = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class BundleKey(msgspec.Struct, frozen=True, order=True):
    """Which bundle: ``penguins/preprocess/1``."""

    model: str
    kind: Kind
    version: int

    def __str__(self) -> str:
        return f"{self.model}/{self.kind}/{self.version}"


def parse_key(text: str) -> BundleKey | None:
    """The bundle that is written so; None if that is none."""
    match = _KEY.fullmatch(text)
    return match and BundleKey(match[1], "preprocess" if match[2] == "preprocess" else "predict", int(match[3]))


class Bundle:
    """A bundle whose manifest has been read; its other files are checked against it as they are read.

    Args:
        key: which bundle.
        folder: where its files are.
        manifest: what was read.
        manifest_sha256: of the bytes that it was read from.
    """

    def __init__(self, key: BundleKey, folder: Path, manifest: Manifest, manifest_sha256: str) -> None:
        self.key = key
        self.folder = folder
        self.manifest = manifest
        self.manifest_sha256 = manifest_sha256

    def fetch(self) -> None:
        """See that all files are at hand, so that reading takes no time.

        Raises:
            BundleError: one cannot be had, or is not what the manifest says.
        """

    def read(self, name: str) -> bytes:
        """A file's bytes, the ones that were checked.

        Raises:
            BundleError: the manifest does not list it, it is missing, or its size or digest is not the manifest's.
        """
        return read_checked(self.folder / name, name, self.expected(name))

    def expected(self, name: str) -> FileDigest:
        """What the manifest says of a file.

        Raises:
            BundleError: it does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{MANIFEST_FILE} lists no {name}")
        return self.manifest.files[name]

    def signature(self) -> bytes | None:
        """The bytes of its signature, about which nothing is known yet; None if it has none.

        Raises:
            BundleError: it cannot be read, is no regular file, or is too large.
        """
        path = self.folder / SIGNATURE_FILE
        return read_small(path) if os.path.lexists(path) else None


class BundleSource(Protocol):
    """Where services get bundles from: a folder (`Repository`), or something far away with a cache in front."""

    def bundles(self) -> Iterable[BundleKey]:
        """All that are published now, by model, kind and version.

        Raises:
            BundleError: the source cannot be looked at; the message says why.
        """
        ...

    def route(self, model: str) -> Route | None:
        """The route of a model, if it has one.

        Raises:
            NotFetched: it cannot be had now; another try may help.
            BundleError: it is broken. The message names the model.
        """
        ...

    def open(self, key: BundleKey) -> Bundle:
        """A bundle, its manifest read.

        Raises:
            NotFetched: it cannot be had now, or not all of it is there; another try may help.
            BundleError: it is broken.
        """
        ...

    def stamp(self, key: BundleKey) -> str:
        """What changes when a bundle's files do, as far as that can be told without reading them; "" if there is none.

        After `bundles` it costs next to nothing, and what it tells is not newer than that.
        """
        ...

    def close(self) -> None:
        """End what is under way; whoever waits for it gets a `NotFetched`."""
        ...


def fetch_bundle(source: BundleSource, key: BundleKey) -> Bundle:
    """A bundle with its files at hand.

    Raises:
        BundleError: as the source raises it, with the bundle named.
    """
    with _naming(key):
        bundle = source.open(key)
        bundle.fetch()
    return bundle


def make_of(bundle: Bundle, how: Callable[[Bundle], T]) -> T:
    """What ``how`` makes of a bundle.

    Raises:
        BundleError: as ``how`` raises it, with the bundle named.
    """
    with _naming(bundle.key):
        return how(bundle)


def load_bundle(source: BundleSource, key: BundleKey, how: Callable[[Bundle], T]) -> T:
    """What ``how`` makes of a bundle, fetched before.

    Raises:
        BundleError: as the source and ``how`` raise it, with the bundle named.
    """
    return make_of(fetch_bundle(source, key), how)


@contextlib.contextmanager
def _naming(key: BundleKey) -> Iterator[None]:
    try:
        yield
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
            NotFetched: its manifest is not there, or not yet.
            BundleError: its manifest is broken or another bundle's, or it has files that are not listed.
        """
        folder = self.folder(key)
        data = read_small(folder / MANIFEST_FILE)
        manifest = decode_manifest(data, key)
        try:
            present = {path.name for path in folder.iterdir()} - {MANIFEST_FILE, SIGNATURE_FILE}
        except OSError as error:
            raise BundleError(f"the folder cannot be read: {error.strerror}") from None
        if unlisted := sorted(present - manifest.files.keys()):
            raise BundleError(f"{MANIFEST_FILE} does not list {', '.join(unlisted)}")
        return Bundle(key, folder, manifest, hashlib.sha256(data).hexdigest())

    def route(self, model: str) -> Route | None:
        """The route of a model, if it has one.

        Raises:
            BundleError: it is broken; the message names the model.
        """
        file = self.route_file(model)
        try:
            return routes.decode(read_small(file)) if file.exists() else None
        except (OSError, BundleError) as error:
            raise BundleError(f"{model}: {error}") from error

    def route_file(self, model: str) -> Path:
        """Where a model's route is, or would be."""
        return self.root / model / ROUTE_FILE

    def stamp(self, key: BundleKey) -> str:
        """Sizes and times of the files in a bundle's folder."""
        found = []
        with contextlib.suppress(OSError), os.scandir(self.folder(key)) as entries:
            for entry in entries:
                facts = entry.stat(follow_symlinks=False)
                found.append(f"{entry.name} {facts.st_ino} {facts.st_size} {facts.st_mtime_ns}")
        return "\n".join(sorted(found))

    def close(self) -> None:
        """Nothing is ever under way."""

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
            BundleError: the version exists, or the repository cannot be written.
        """
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
                    raise BundleError(f"{key}: already published, and a published version never changes; publish a new one")
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        except OSError as error:
            raise BundleError(f"{key}: cannot be written: {error.strerror}") from error
        return Bundle(key, folder, manifest, hashlib.sha256(encoded).hexdigest())

    def remove(self, key: BundleKey) -> None:
        """Take a bundle back, as if it had never been published."""
        shutil.rmtree(self.folder(key), ignore_errors=True)


def decode_manifest(data: bytes, key: BundleKey) -> Manifest:
    """A bundle's manifest, fit to be relied on: the names in it are plain names, and its sizes are within limits.

    Raises:
        BundleError: it is not, or it is another bundle's.
    """
    manifest = manifests.decode(data)
    named = BundleKey(manifest.name, manifest.kind, manifest.version)
    if named != key:
        raise BundleError(f"{MANIFEST_FILE} is that of {named}")
    for specs in (manifest.inputs, manifest.outputs):
        if len({spec.name for spec in specs}) < len(specs):
            raise BundleError(f"{MANIFEST_FILE}: two tensors of the signature have the same name")
    for name, digest in manifest.files.items():
        if not _FILE_NAME.fullmatch(name) or name in (MANIFEST_FILE, SIGNATURE_FILE):
            raise BundleError(f"{MANIFEST_FILE}: {name[:128]!r} cannot be the name of a file")
        check_digest(digest, f"{MANIFEST_FILE}: {name}")
    if (n_bytes := sum(digest.size for digest in manifest.files.values())) > MAX_BUNDLE_BYTES:
        raise BundleError(f"{MANIFEST_FILE} lists {n_bytes} bytes; the limit is {MAX_BUNDLE_BYTES}")
    return manifest


def check_digest(digest: FileDigest, what: str) -> None:
    """A digest becomes the name of a file in caches.

    Raises:
        BundleError: it is none.
    """
    if not _SHA256.fullmatch(digest.sha256) or digest.size < 0:
        raise BundleError(f"{what}: expected a sha256 of 64 hex digits and a size, got {digest.sha256[:80]!r}, {digest.size}")


def read_small(path: Path) -> bytes:
    """All of a manifest or a route.

    Raises:
        NotFetched: it is not there.
        BundleError: it cannot be read, is no regular file, or is too large.
    """

    def check_size(size: int) -> None:
        if size > MAX_SMALL_FILE_BYTES:
            raise BundleError(f"{path.name} has {size} bytes; the limit is {MAX_SMALL_FILE_BYTES}")

    return _read(path, path.name, check_size)


def read_checked(path: Path, name: str, expected: FileDigest) -> bytes:
    """All of a file, the bytes that were checked. Of one whose size is wrong nothing is read.

    Raises:
        NotFetched: it is not there.
        BundleError: it cannot be read, is no regular file, or its size or digest is not what was expected.
    """

    def check_size(size: int) -> None:
        if size != expected.size:
            raise BundleError(f"{name} has {size} bytes, {MANIFEST_FILE} says {expected.size}")

    data = _read(path, name, check_size)
    if (found := hashlib.sha256(data).hexdigest()) != expected.sha256:
        raise BundleError(f"{name} has sha256 {found}, {MANIFEST_FILE} says {expected.sha256}")
    return data


def _read(path: Path, name: str, check_size: Callable[[int], None]) -> bytes:
    try:
        with open(path, "rb", opener=_open_without_following) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                what = _KINDS_OF_FILE.get(stat.S_IFMT(facts.st_mode), "something else")
                raise BundleError(f"{name} is {what}; expected a regular file")
            check_size(facts.st_size)
            data = file.read(facts.st_size + 1)  # one more, to see whether it has grown
    except FileNotFoundError as error:  # whoever copies file by file has not come to it yet
        raise NotFetched(f"{name} cannot be read: {error.strerror}") from None
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise BundleError(f"{name} cannot be read: {reason}") from None
    if len(data) != facts.st_size:
        raise BundleError(f"{name} changed while it was read")
    return data


def _open_without_following(path: str, _: int) -> int:
    return os.open(path, _OPEN_FLAGS)


def _folders(parent: Path) -> list[Path]:
    """Visible folders below ``parent``; none when it is missing.

    Raises:
        BundleError: it is there and cannot be read.
    """
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BundleError(f"{parent.name}: cannot be read: {error.strerror}") from error
