"""The files below a URL, through fsspec: listed, read by byte ranges and created, each with a timeout.

fsspec has one interface for all kinds of storage; the package behind each finds its credentials. Every piece is a range request
of its own, so that a download can be resumed and the pieces of a file are fetched in parallel. Every failure is a `NotFetched`
with a readable reason.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from splitserve.repository.files import MAX_SMALL_FILE_BYTES
from splitserve.repository.manifest import BundleError, NotFetched
from splitserve.repository.sources.cache import Download

PIECE_BYTES = 4 * 1024**2
"""Bytes in one range request. A link must transfer this much within the timeout."""

MAX_REQUESTS = 8
"""Requests to one repository at a time."""

_PIECES_AHEAD = 4

_VALIDATORS = ("ETag", "etag", "generation", "LastModified", "last_modified", "mtime", "created")
"""Keys under which fsspec's packages report what changes with a file's content, most reliable first."""

CANCELLED = "cancelled, since it is no longer needed or the service is stopping"
"""Why what was closed is not fetched."""

Connect = Callable[[str], tuple[Any, str]]
"""A filesystem of fsspec, and the path of a URL in it."""


def connect(url: str, **options: str) -> tuple[Any, str]:
    """Connect with the environment's credentials; an instance of its own, without a listings cache."""
    import fsspec.core

    found: tuple[Any, str] = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **options)
    return found


class RemoteFolder:
    """The files below a URL.

    Args:
        url: with a scheme that fsspec supports.
        timeout_s: of a listing, and of a range request.
        piece_bytes: of a range request.
        connect: creates the filesystem at the first use.
    """

    def __init__(self, url: str, *, timeout_s: float = 60.0, piece_bytes: int = PIECE_BYTES, connect: Connect = connect) -> None:
        parts = urlsplit(url)
        self.can_list = parts.scheme not in ("http", "https")
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
        """Without user and password."""
        self._secret_url = url
        self._timeout_s = timeout_s
        self._piece_bytes = piece_bytes
        self._connect = connect
        self._connected: tuple[Any, str] | None = None
        self._connecting = threading.Lock()
        self._turns = threading.BoundedSemaphore(MAX_REQUESTS)
        self._under_way: set[Future[Any]] = set()
        self._is_closed = False

    def __str__(self) -> str:
        return self.url

    def list(self) -> dict[str, str]:
        """All files at any depth: path -> a validator that changes with the content, or "".

        Raises:
            NotFetched: the bucket does not exist or cannot be listed. A missing folder is empty.
        """
        found = self._call(self.url, "find", "", detail=True)
        if not found and self.url.startswith("az://"):  # a missing container is reported as empty, too
            self._call(self.url, "ls", None)
        root = self._connection()[1].rstrip("/")
        return {path[len(root) :].lstrip("/"): _validator(info) for path, info in found.items()}

    def read(self, path: str) -> bytes:
        """All of a manifest, a route or an index.

        Raises:
            NotFetched: it cannot be fetched.
            BundleError: it is too large.
        """
        data = self._piece(path, 0, MAX_SMALL_FILE_BYTES + 1)
        if len(data) > MAX_SMALL_FILE_BYTES:
            raise BundleError(f"{path.rpartition('/')[2]} is too large; the limit is {MAX_SMALL_FILE_BYTES} bytes")
        return data

    def download(self, path: str, size: int) -> Download:
        """A file of this expected size; the actual size may differ."""
        return lambda offset: self._pieces(path, size, offset)

    def create(self, path: str, data: bytes) -> None:
        """Write a file that does not exist yet, whole, by a conditional request. A store without these may overwrite a file.

        Raises:
            FileExistsError: it exists.
            NotFetched: it cannot be written.
        """
        try:
            self._write(path, data, "create")
        except NotFetched as error:
            if _is_conflict(error.__cause__):
                raise FileExistsError(f"{self}/{path} exists") from error
            raise

    def put(self, path: str, data: bytes) -> None:
        """Write a file whole, whether it exists or not.

        Raises:
            NotFetched: it cannot be written.
        """
        self._write(path, data, "overwrite")

    def _write(self, path: str, data: bytes, mode: str) -> None:
        timeout_s = self._timeout_s * (1 + len(data) // self._piece_bytes)
        self._call(path.rpartition("/")[2], "pipe_file", path, data, mode=mode, timeout_s=timeout_s)

    def delete(self, path: str) -> None:
        """Delete a file.

        Raises:
            NotFetched: it cannot be deleted.
        """
        self._call(path.rpartition("/")[2], "rm_file", path)

    def close(self) -> None:
        """Cancel requests in progress and refuse new ones."""
        self._is_closed = True
        for future in list(self._under_way):
            future.cancel()

    def _pieces(self, path: str, size: int, offset: int) -> Iterator[bytes]:
        """A file's bytes from an offset on, in order; `_PIECES_AHEAD` pieces are prefetched."""
        end = min(offset + self._piece_bytes, size)
        first = self._piece(path, offset, end)
        if len(first) > end - offset:  # the server ignores ranges: this is the whole file
            yield first[offset:]
            return
        yield first
        if len(first) < self._piece_bytes:
            return
        pool = ThreadPoolExecutor(_PIECES_AHEAD)
        ahead: deque[Future[bytes]] = deque()
        try:
            for start in range(offset + self._piece_bytes, size, self._piece_bytes):
                ahead.append(pool.submit(self._piece, path, start, min(start + self._piece_bytes, size)))
                if len(ahead) == _PIECES_AHEAD:
                    yield (piece := ahead.popleft().result())
                    if len(piece) != self._piece_bytes:  # the file ends here
                        return
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _piece(self, path: str, start: int, end: int) -> bytes:
        """Bytes of a file; fewer if it ends before."""
        if start >= end:
            return b""
        try:
            piece: bytes = self._call(path.rpartition("/")[2], "cat_file", path, start=start, end=end)
        except NotFetched as error:
            if _is_beyond_the_end(error.__cause__):
                return b""
            raise
        return piece

    def _connection(self) -> tuple[Any, str]:
        with self._connecting:
            if self._connected is None:
                self._connected = self._connect(self._secret_url)
            return self._connected

    def _call(
        self, what: str, method: str, path: str | None, *values: Any, timeout_s: float | None = None, **arguments: Any
    ) -> Any:
        """Call a method of the filesystem, which runs on its own loop, for a path below the URL, or for the bucket if None.

        Raises:
            NotFetched: the message starts with ``what``.
        """
        with self._turns:
            try:
                if self._is_closed:
                    raise CancelledError
                filesystem, root = self._connection()
                place = root.split("/")[0] if path is None else f"{root.rstrip('/')}/{path}".rstrip("/")
                if not self.can_list:  # or a range would be one of the compressed file
                    arguments["headers"] = {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
                if not filesystem.async_impl:
                    return getattr(filesystem, method)(place, *values, **arguments)
                call = asyncio.wait_for(
                    getattr(filesystem, f"_{method}")(place, *values, **arguments), timeout_s or self._timeout_s
                )
                return self._wait(asyncio.run_coroutine_threadsafe(call, filesystem.loop))
            except Exception as error:  # each package has classes of its own
                raise NotFetched(f"{what}: {self._reason(error)}") from error

    def _wait(self, future: Future[Any]) -> Any:
        self._under_way.add(future)
        if self._is_closed:
            future.cancel()
        try:
            return future.result()
        finally:
            self._under_way.discard(future)

    def _reason(self, error: Exception) -> str:
        """The reason in one line."""
        if isinstance(error, CancelledError):
            return CANCELLED
        if isinstance(error, TimeoutError):
            return f"no answer within {self._timeout_s:g} s"
        if (status := _status(error)) is not None:
            said = f"HTTP status {status} {getattr(error, 'message', None) or getattr(error, 'strerror', None) or ''}".strip()
        else:
            said = " ".join(str(error).split())[:300]
        if isinstance(error, FileNotFoundError):
            is_plain = error.errno is not None or not said or "://" in said or said.startswith("/")
            return "not found" if is_plain else f"not found: {said}"
        if isinstance(error, PermissionError) or status in (401, 403):
            return f"access denied: {said}"
        return said if status is not None else f"{type(error).__name__}: {said}"


def _status(error: Exception) -> int | None:
    """The HTTP status behind an error: aiohttp's, or botocore's behind a plain OSError of s3fs; else None."""
    if type(error) is OSError:
        answer = getattr(error.__cause__, "response", None) or {}
        found: int | None = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found
    return getattr(error, "status", None)


def _validator(info: dict[str, Any]) -> str:
    name = next((name for name in _VALIDATORS if info.get(name)), "")
    return name and f"{name} {info[name]} {info.get('size')}"


def _is_conflict(error: BaseException | None) -> bool:
    """Whether this is HTTP's 412 (Precondition Failed) or 409 (Conflict): another process has created the file."""
    if isinstance(error, FileExistsError):
        return True
    status = _status(error) if isinstance(error, Exception) else None
    return status in (409, 412) or getattr(error, "code", None) in (409, 412, "409", "412")


def _is_beyond_the_end(error: BaseException | None) -> bool:
    """Whether this is HTTP's 416 (Range Not Satisfiable): the range begins after the last byte."""
    status = next((getattr(error, name) for name in ("status", "status_code", "code") if hasattr(error, name)), None)
    return status == 416 or "InvalidRange" in repr(getattr(error, "__cause__", None))
