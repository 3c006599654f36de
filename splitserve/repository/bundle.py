"""A bundle: one artefact of a model, a folder with a manifest that lists every other file with its digest."""

from __future__ import annotations

import re

import msgspec

from splitserve.repository import manifest as manifests
from splitserve.repository.files import check_file_list
from splitserve.repository.manifest import MANIFEST_FILE, SIGNATURE_FILE, BundleError, Kind, Manifest
from splitserve.repository.manifest_folder import ManifestFolder
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


class Bundle(ManifestFolder[BundleKey, Manifest]):
    """A bundle whose manifest has been read; each other file is checked against it when it is read."""


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
    check_file_list(
        manifest.files,
        MANIFEST_FILE,
        is_name=lambda name: bool(_FILE_NAME.fullmatch(name)) and name not in (MANIFEST_FILE, SIGNATURE_FILE),
        expected=f"a plain file name other than {MANIFEST_FILE} and {SIGNATURE_FILE}",
        max_bytes=MAX_BUNDLE_BYTES,
    )
    return manifest
