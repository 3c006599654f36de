"""A bundle: one artefact of a model, a folder with a manifest that lists every other file with its digest."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from splitserve.repository import manifest as manifests
from splitserve.repository.files import check_digest, read_checked, read_small
from splitserve.repository.manifest import MANIFEST_FILE, SIGNATURE_FILE, BundleError, FileDigest, Kind, Manifest
from splitserve.versions import MODEL_NAME

KINDS: tuple[Kind, ...] = ("preprocess", "predict")

MAX_BUNDLE_BYTES = 4 * 1024**3
"""Largest sum of a bundle's files. ONNX models without external data end at 2 GiB, protobuf's limit."""

_FILE_NAME = MODEL_NAME
_KEY = re.compile(rf"({MODEL_NAME.pattern})/({'|'.join(KINDS)})/([1-9][0-9]{{0,8}})")


class BundleKey(msgspec.Struct, frozen=True, order=True):
    """Names a bundle: ``penguins/preprocess/1``."""

    model: str
    kind: Kind
    version: int

    def __str__(self) -> str:
        return f"{self.model}/{self.kind}/{self.version}"


def parse_key(text: str) -> BundleKey | None:
    """The inverse of ``str(key)``; None if the text is not a key."""
    match = _KEY.fullmatch(text)
    return match and BundleKey(match[1], "preprocess" if match[2] == "preprocess" else "predict", int(match[3]))


class Bundle:
    """A bundle whose manifest has been read; each other file is checked against it when it is read.

    Args:
        key: names it.
        folder: where its files are.
        manifest: as decoded.
        manifest_sha256: of the bytes that the manifest was decoded from.
    """

    def __init__(self, key: BundleKey, folder: Path, manifest: Manifest, manifest_sha256: str) -> None:
        self.key = key
        self.folder = folder
        self.manifest = manifest
        self.manifest_sha256 = manifest_sha256

    def fetch(self) -> None:
        """Make all files local, so that reading needs no network. Nothing to do for a folder.

        Raises:
            BundleError: a file cannot be fetched, or is not what the manifest says.
        """

    def read(self, name: str) -> bytes:
        """The bytes of a file, checked.

        Raises:
            BundleError: the manifest does not list it, it is missing, or its size or digest is not the manifest's.
        """
        return read_checked(self.folder / name, name, self.expected(name))

    def expected(self, name: str) -> FileDigest:
        """Size and digest of a file in the manifest.

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{MANIFEST_FILE} lists no {name}")
        return self.manifest.files[name]

    def signature(self) -> bytes | None:
        """The bytes of its signature, unverified; None if it has none.

        Raises:
            BundleError: it cannot be read, is not a regular file, or is too large.
        """
        path = self.folder / SIGNATURE_FILE
        return read_small(path) if os.path.lexists(path) else None


def decode_manifest(data: bytes, key: BundleKey) -> Manifest:
    """A bundle's manifest, validated: its file names are plain names, its digests and sizes within limits.

    Raises:
        BundleError: invalid, or the manifest of another bundle.
    """
    manifest = manifests.decode(data)
    named = BundleKey(manifest.name, manifest.kind, manifest.version)
    if named != key:
        raise BundleError(f"{MANIFEST_FILE}: expected that of {key}, got that of {named}")
    for specs in (manifest.inputs, manifest.outputs):
        if len({spec.name for spec in specs}) < len(specs):
            raise BundleError(f"{MANIFEST_FILE}: two tensors of the signature have the same name")
    for name, digest in manifest.files.items():
        if not _FILE_NAME.fullmatch(name) or name in (MANIFEST_FILE, SIGNATURE_FILE):
            raise BundleError(f"{MANIFEST_FILE}: {name[:128]!r} cannot be the name of a file")
        check_digest(digest, f"{MANIFEST_FILE}: {name}")
    if (n_bytes := sum(digest.size for digest in manifest.files.values())) > MAX_BUNDLE_BYTES:
        raise BundleError(f"{MANIFEST_FILE}: its files have {n_bytes} bytes; the limit is {MAX_BUNDLE_BYTES}")
    return manifest
