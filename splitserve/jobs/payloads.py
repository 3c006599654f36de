"""Large requests and answers of jobs: files in a folder, or objects in a bucket, with their names in the database.

A file is written, synced and renamed before the row that names it is committed, and removed after the row is gone: a crash in
between leaves a file without a row, which a sweep removes once it is old. Files are never changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import structlog

from splitserve.durable import sync_folder
from splitserve.errors import StorageFull, Unavailable
from splitserve.jobs.records import Payload

STRAY_AGE_S = 3600.0
"""Files without a row that are younger may belong to a submit in progress."""


class Payloads:
    """Payloads over a threshold in a place of their own.

    Args:
        where: a folder, or an fsspec URL.
        inline_bytes: up to this size they stay in the database.
    """

    def __init__(self, where: str, *, inline_bytes: int) -> None:
        self._files: _Folder | _Bucket = _Bucket(where) if "://" in where else _Folder(Path(where))
        self._inline_bytes = inline_bytes

    def is_inline(self, data: bytes) -> bool:
        """Whether it stays in the database."""
        return len(data) <= self._inline_bytes

    async def store(self, data: bytes) -> Payload:
        """The payload as it goes into a row.

        Raises:
            StorageFull: the disk is full.
            Unavailable: it cannot be written.
        """
        if self.is_inline(data):
            return Payload(data)
        ref = secrets.token_hex(16)
        try:
            await asyncio.to_thread(self._files.write, ref, data)
        except OSError as error:
            raise _payload_error(error) from error
        return Payload(ref=ref)

    async def read(self, payload: Payload) -> bytes:
        """The bytes of a payload.

        Raises:
            FileNotFoundError: its job was removed.
            Unavailable: it cannot be read.
        """
        if not payload.ref:
            return payload.data
        try:
            return await asyncio.to_thread(self._files.read, payload.ref)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _payload_error(error) from error

    async def remove(self, refs: Iterable[str]) -> None:
        """Remove files whose rows are gone. One that is there no longer, or cannot be removed now, is left to the sweep."""
        if found := [ref for ref in refs if ref]:
            await asyncio.to_thread(self._files.remove, found)

    async def remove_strays(self, known: Callable[[Sequence[str]], Awaitable[Sequence[str]]]) -> int:
        """Remove old files that no row names. ``known`` returns which of them are named by one."""
        old = await asyncio.to_thread(self._files.older_than, STRAY_AGE_S)
        strays = set(old) - set(await known(old)) if old else set()
        await self.remove(strays)
        return len(strays)


def _payload_error(error: OSError) -> StorageFull | Unavailable:
    # What the file system says of payloads of jobs that cannot be read or written. Callers get a 503, or 507 if it is full.
    structlog.get_logger().error("job payloads failed", reason=str(error))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull("the disk for payloads of jobs is full", stage="jobs")
    return Unavailable("payloads of jobs cannot be read or written", stage="jobs")


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write(self, ref: str, data: bytes) -> None:
        scratch = self._folder / f"{ref}.tmp"
        try:
            with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            scratch.rename(self._folder / ref)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        sync_folder(self._folder)

    def read(self, ref: str) -> bytes:
        return (self._folder / ref).read_bytes()

    def remove(self, refs: Iterable[str]) -> None:
        for ref in refs:
            with contextlib.suppress(OSError):
                (self._folder / ref).unlink()

    def older_than(self, age_s: float) -> list[str]:
        before = time.time() - age_s
        return [entry.name for entry in os.scandir(self._folder) if entry.stat().st_mtime < before]


class _Bucket:
    """An object is visible only once its upload is complete. The bucket has to exist; it may be unreachable at the start."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._files: Any
        self._files, self._root = fsspec.core.url_to_fs(url, **({"auto_mkdir": True} if url.startswith("file:") else {}))

    def write(self, ref: str, data: bytes) -> None:
        with _os_errors():
            self._files.pipe_file(self._path(ref), data)

    def read(self, ref: str) -> bytes:
        with _os_errors():
            data: bytes = self._files.cat_file(self._path(ref))
        return data

    def remove(self, refs: Iterable[str]) -> None:
        for ref in refs:
            with contextlib.suppress(OSError), _os_errors():
                self._files.rm_file(self._path(ref))

    def older_than(self, age_s: float) -> list[str]:
        before = time.time() - age_s
        with _os_errors():
            self._files.invalidate_cache()
            try:
                names = [entry["name"] for entry in self._files.ls(self._root, detail=True)]
            except FileNotFoundError:  # nothing was ever stored
                return []
            return [name.rpartition("/")[2] for name in names if self._files.modified(name).timestamp() < before]

    def _path(self, ref: str) -> str:
        return f"{self._root}/{ref}"


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Clients of buckets raise errors of their own where the bucket is unreachable: they leave the block as `OSError`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
