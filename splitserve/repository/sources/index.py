"""``index.json`` at the root of a model repository: what a listing would say, for servers that cannot list.

It holds the digest of every manifest and route, so what is fetched is checked from the index down.
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
    """``index.json``: the manifest of each bundle by the bundle's path, the route of each model that has one by its name, and the
    signature of each bundle that has one by the bundle's path.
    """

    schema_version: int
    bundles: dict[str, FileDigest]
    routes: dict[str, FileDigest] = {}
    signatures: dict[str, FileDigest] = {}

    def keys(self) -> dict[BundleKey, FileDigest]:
        """The bundles, by key."""
        return {key: digest for path, digest in self.bundles.items() if (key := parse_key(path))}


_decoder = msgspec.json.Decoder(Index)


def decode(data: bytes) -> Index:
    """The index in a file's bytes.

    Raises:
        BundleError: not JSON, of another schema version, or something in it is not what it should be.
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
    """The index of a repository, and what is wrong with the bundles and routes that were left out of it.

    Raises:
        BundleError: the repository cannot be looked at.
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
    """Put it at the root, in one step.

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
