"""Zip archives in bundles: what they unpack to is told from their directories, before anything of it is unpacked.

A small file can unpack to many gigabytes. Nothing here trusts that a directory is right: who reads a member as an array, piece
by piece, gets at most what the directory says, and members that are stored as they are unpack to no more than the file has.
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
"""What numpy goes by when it decides how to read a file. Source: ``numpy.load``."""

_SCHEMA = "schema.json"


def check_npz(data: bytes, what: str) -> None:
    """Check that an npz file can be read without filling the memory.

    Raises:
        BundleError: its arrays are larger than `MAX_UNPACKED_BYTES`, or something in it is no array.
        Exception: no zip archive; zipfile, zlib and struct each raise their own.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        check_unpacked(sum(member.file_size for member in members), what)
        for member in members:
            if _beginning(archive, member) != _NPY:  # numpy would read all of it at once, whatever the directory says
                raise BundleError(f"{what}: {member.filename[:64]!r} is not an array")


def check_unpacked(n_bytes: int, what: str) -> None:
    """Raises:
    BundleError: more than `MAX_UNPACKED_BYTES`.
    """
    if n_bytes > MAX_UNPACKED_BYTES:
        raise BundleError(f"{what}: has {n_bytes} bytes unpacked; the limit is {MAX_UNPACKED_BYTES}")


def check_skops(data: bytes, what: str) -> None:
    """Check that a skops file can be read without filling the memory.

    Its members are stored as they are, each is read once, and sparse matrices, which are npz files, are checked as such.

    Raises:
        BundleError: a member is compressed, they have more bytes than the file, or a sparse matrix is too large.
        Exception: no such file; zipfile and json each raise their own.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED:
                raise BundleError(f"{what}: {member.filename[:64]!r} is compressed; write it with skops.io.dumps as it is")
        sizes = {member.filename: member.file_size for member in members}
        n_read = sum(sizes[name] for name in _references(json.loads(archive.read(_SCHEMA))))
        if max(n_read, sum(member.file_size for member in members)) > len(data):
            raise BundleError(f"{what}: its members unpack to more bytes than the file has")
        for member in members:
            if _beginning(archive, member).startswith(_ZIP):
                check_npz(archive.read(member), f"{what}: {member.filename[:64]}")


def _references(schema: Any) -> Iterator[str]:
    """Names of the members that are read, once for each object that is made of one. Nothing here recurses."""
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
