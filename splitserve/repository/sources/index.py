"""``index.json`` at the root of a model repository: its listing, for web servers, which cannot list.

It holds the digest of every manifest, of bundles and releases, and of every route, so what is fetched is checked from the index
down.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

import msgspec

from splitserve.repository import release, routes
from splitserve.repository.bundle import BundleKey, decode_manifest, parse_key
from splitserve.repository.files import MAX_SMALL_FILE_BYTES, check_digest, read_small
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import MANIFEST_FILE, SIGNATURE_FILE, BundleError, FileDigest
from splitserve.repository.release import ReleaseKey
from splitserve.repository.releases import decode_release
from splitserve.versions import MODEL_NAME

SCHEMA_VERSION = 2
INDEX_FILE = "index.json"


class Index(msgspec.Struct, frozen=True):
    """``index.json``: the manifest of each bundle and release by its path, the route of each model that has one by its name, and
    the signature of each bundle, release and route that has one: by the path, or by the model's name.
    """

    schema_version: int
    bundles: dict[str, FileDigest]
    releases: dict[str, FileDigest] = {}
    routes: dict[str, FileDigest] = {}
    signatures: dict[str, FileDigest] = {}

    def keys(self) -> dict[BundleKey, FileDigest]:
        """The bundles, by key."""
        return {key: digest for path, digest in self.bundles.items() if (key := parse_key(path))}

    def release_keys(self) -> dict[ReleaseKey, FileDigest]:
        """The releases, by key."""
        return {key: digest for path, digest in self.releases.items() if (key := release.parse_key(path))}


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
    for path in index.bundles:
        if parse_key(path) is None:
            raise BundleError(f"{INDEX_FILE}: expected a bundle as MODEL/predict/1 or MODEL/preprocess/1, got {path[:128]!r}")
    for path in index.releases:
        if release.parse_key(path) is None:
            raise BundleError(f"{INDEX_FILE}: expected a release as MODEL/releases/0001-1.1, got {path[:128]!r}")
    for path in index.signatures:
        if path not in index.bundles.keys() | index.releases.keys() | index.routes.keys():
            raise BundleError(f"{INDEX_FILE}: a signature of {path[:128]!r}, which is not in it")
    for model in index.routes:
        if not MODEL_NAME.fullmatch(model):
            raise BundleError(f"{INDEX_FILE}: {model[:128]!r} cannot be the name of a model")
    for name, digest in chain.from_iterable(
        part.items() for part in (index.bundles, index.releases, index.routes, index.signatures)
    ):
        check_digest(digest, f"{INDEX_FILE}: {name}")
        if digest.size > MAX_SMALL_FILE_BYTES:
            raise BundleError(f"{INDEX_FILE}: {name} has {digest.size} bytes; the limit is {MAX_SMALL_FILE_BYTES}")
    return index


def build(repository: Repository) -> tuple[Index, list[str]]:
    """The index of a repository, and what is wrong with the bundles, releases and routes that were left out of it.

    Raises:
        BundleError: the repository cannot be listed.
    """
    found, problems = Index(SCHEMA_VERSION, {}, {}, {}, {}), []
    for key in repository.bundles():
        try:
            _add(found, found.bundles, key, repository.folder(key), partial(decode_manifest, key=key))
        except BundleError as error:
            problems.append(f"{key}: {error}")
    for model in repository.models():
        for record in repository.releases(model):
            try:
                _add(found, found.releases, record, repository.folder(record), partial(decode_release, key=record))
            except BundleError as error:
                problems.append(str(error) if str(error).startswith(str(record)) else f"{record}: {error}")
        try:
            if stored := repository.read_route(model):
                routes.decode_for(model, stored)
                found.routes[model] = _digest(stored.data)
                if stored.signature is not None:
                    found.signatures[model] = _digest(stored.signature)
        except BundleError as error:
            problems.append(str(error))
    return found, problems


def _add(
    index: Index, part: dict[str, FileDigest], key: BundleKey | ReleaseKey, folder: Path, check: Callable[[bytes], object]
) -> None:
    """Add a folder with a manifest, and its signature if it has one."""
    data = read_small(folder / MANIFEST_FILE)
    check(data)
    signature = read_small(folder / SIGNATURE_FILE) if (folder / SIGNATURE_FILE).exists() else None
    part[str(key)] = _digest(data)
    if signature is not None:
        index.signatures[str(key)] = _digest(signature)


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
