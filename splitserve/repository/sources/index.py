"""``index.json`` at the root of a model repository: its listing, for web servers, which cannot list.

It has the digest of every manifest, route and signature, so every fetched file is checked against a digest.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import msgspec

from splitserve.repository.bundle import BundleKey, decode_manifest, parse_key
from splitserve.repository.files import MAX_SMALL_FILE_BYTES, check_digest, read_small
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import MANIFEST_FILE, SIGNATURE_FILE, BundleError, FileDigest
from splitserve.versions import MODEL_NAME

SCHEMA_VERSION = 1
INDEX_FILE = "index.json"


class Index(msgspec.Struct, frozen=True):
    """``index.json``: digests of manifests and signatures by the bundle's path, and of routes by the model's name."""

    schema_version: int
    bundles: dict[str, FileDigest]
    routes: dict[str, FileDigest] = {}
    signatures: dict[str, FileDigest] = {}

    def keys(self) -> dict[BundleKey, FileDigest]:
        """The bundles, by key."""
        return {key: digest for path, digest in self.bundles.items() if (key := parse_key(path))}


_decoder = msgspec.json.Decoder(Index)


def decode(data: bytes) -> Index:
    """Decode an index.

    Raises:
        BundleError: not JSON, of another schema version, or an entry is invalid.
    """
    try:
        index = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{INDEX_FILE}: {error}") from None
    if index.schema_version != SCHEMA_VERSION:
        raise BundleError(f"{INDEX_FILE}: expected schema version {SCHEMA_VERSION}, got {index.schema_version}")
    for path in (*index.bundles, *index.signatures):
        if parse_key(path) is None:
            raise BundleError(f"{INDEX_FILE}: expected a bundle as MODEL/predict/1 or MODEL/preprocess/1, got {path[:128]!r}")
    for model in index.routes:
        if not MODEL_NAME.fullmatch(model):
            raise BundleError(f"{INDEX_FILE}: {model[:128]!r} cannot be the name of a model")
    for name, digest in [*index.bundles.items(), *index.routes.items(), *index.signatures.items()]:
        check_digest(digest, f"{INDEX_FILE}: {name}")
        if digest.size > MAX_SMALL_FILE_BYTES:
            raise BundleError(f"{INDEX_FILE}: {name} has {digest.size} bytes; the limit is {MAX_SMALL_FILE_BYTES}")
    return index


def build(repository: Repository) -> tuple[Index, list[str]]:
    """The index of a repository, and the problems of the bundles and routes that are omitted from it.

    Raises:
        BundleError: the repository cannot be listed.
    """
    bundles, routes, signatures, problems = {}, {}, {}, []
    for key in repository.bundles():
        try:
            data = read_small(repository.folder(key) / MANIFEST_FILE)
            decode_manifest(data, key)
            bundles[str(key)] = _digest(data)
            if (repository.folder(key) / SIGNATURE_FILE).exists():
                signatures[str(key)] = _digest(read_small(repository.folder(key) / SIGNATURE_FILE))
        except BundleError as error:
            problems.append(f"{key}: {error}")
    for model in repository.models():
        try:
            if repository.route(model):
                routes[model] = _digest(read_small(repository.route_file(model)))
        except BundleError as error:
            problems.append(str(error))
    return Index(SCHEMA_VERSION, bundles, routes, signatures), problems


def write(root: Path, index: Index) -> Path:
    """Write the index at the root, atomically.

    Raises:
        OSError: it cannot be written.
    """
    data = msgspec.json.format(msgspec.json.encode(index, order="sorted"), indent=2)
    number, scratch = tempfile.mkstemp(prefix=f".{INDEX_FILE}-", dir=root)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
        Path(scratch).chmod(0o644)
        Path(scratch).replace(root / INDEX_FILE)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return root / INDEX_FILE


def _digest(data: bytes) -> FileDigest:
    return FileDigest(hashlib.sha256(data).hexdigest(), len(data))
