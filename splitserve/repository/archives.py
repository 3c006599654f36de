"""Zip archives in bundles: their unpacked size is checked from the central directory before anything is unpacked.

A small file can unpack to many gigabytes. The directory need not be true: a member that is read as an array, block by block,
yields at most the size in the directory, and uncompressed members unpack to no more bytes than the file has.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

from splitserve.repository.manifest import BundleError

MAX_UNPACKED_BYTES = 1024**3
"""Largest sum of the arrays in an npz file: 64 golden samples may have 16 MiB each."""

_NPY, _ZIP = b"\x93NUMPY", b"PK"
"""The first bytes by which numpy decides how to read a file. Source: ``numpy.load``."""

_SCHEMA = "schema.json"


def check_npz(data: bytes, what: str) -> None:
    """Check that an npz file can be read without exhausting memory.

    Raises:
        BundleError: its arrays are larger than `MAX_UNPACKED_BYTES`, or a member is not an array.
        Exception: not a zip archive; zipfile, zlib and struct each raise their own.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        check_unpacked(sum(member.file_size for member in members), what)
        for member in members:
            if _beginning(archive, member) != _NPY:  # numpy would read it at once, with no limit on its size
                raise BundleError(f"{what}: {member.filename[:64]!r} is not an array")


def check_unpacked(n_bytes: int, what: str) -> None:
    """Raises:
    BundleError: more than `MAX_UNPACKED_BYTES`.
    """
    if n_bytes > MAX_UNPACKED_BYTES:
        raise BundleError(f"{what}: has {n_bytes} bytes unpacked; the limit is {MAX_UNPACKED_BYTES}")


def check_skops(data: bytes, what: str) -> None:
    """Check that a skops file can be read without exhausting memory.

    Its members must be uncompressed and each read once; sparse matrices, which are npz files, are checked as such.

    Raises:
        BundleError: a member is compressed, the members have more bytes than the file, or a sparse matrix is too large.
        Exception: not a skops file; zipfile and json each raise their own.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED:
                raise BundleError(
                    f"{what}: {member.filename[:64]!r} is compressed; write the file with skops.io.dumps without compression"
                )
        sizes = {member.filename: member.file_size for member in members}
        n_read = sum(sizes[name] for name in _references(json.loads(archive.read(_SCHEMA))))
        if max(n_read, sum(member.file_size for member in members)) > len(data):
            raise BundleError(f"{what}: its members unpack to more bytes than the file has")
        for member in members:
            if _beginning(archive, member).startswith(_ZIP):
                check_npz(archive.read(member), f"{what}: {member.filename[:64]}")


def _references(schema: Any) -> Iterator[str]:
    """Names of the members that skops reads, once for each object built from one. Iterative, so that depth does not matter."""
    seen, rest = set(), [schema]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            rest.extend(node.values())
            place = (node.get("__id__"), node.get("file"))
            if isinstance(place[1], str) and "__loader__" in node and (place[0] is None or place not in seen):
                seen.add(place)
                yield place[1]
        elif isinstance(node, list):
            rest.extend(node)


def _beginning(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    with archive.open(member) as file:
        return file.read(len(_NPY))
