"""A bundle: one artefact of a model, a folder with a manifest that lists every other file with its digest."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from splitserve.repository import manifest as manifests
from splitserve.repository.files import check_digest
from splitserve.repository.manifest import MANIFEST_FILE, SIGNATURE_FILE, BundleError, Kind, Manifest
from splitserve.repository.manifest_folder import ManifestFolder, RemoteFiles
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


class Bundle(ManifestFolder):
    """A bundle whose manifest has been read; each other file is checked against it when it is read.

    Args:
        key: names it.
        folder: where its files are.
        manifest: as decoded.
        manifest_sha256: of the bytes that the manifest was decoded from.
        remote: its files, where the folder does not have them.
    """

    def __init__(
        self, key: BundleKey, folder: Path, manifest: Manifest, manifest_sha256: str, remote: RemoteFiles | None = None
    ) -> None:
        super().__init__(folder, manifest.files, manifest_sha256, remote)
        self.key = key
        self.manifest = manifest


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
