"""Files that are read again when they change: certificates, tokens, keys. Invalid files never replace what was read before."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

_Stamp = tuple[tuple[int, int, int], ...]


class Watched(Generic[T]):
    """A value read from several files together.

    Args:
        paths: of the files; symbolic links are followed, so that replacing the link of a mounted secret counts as a change.
        read: returns the value; raises OSError or ValueError for unusable files.

    Raises:
        OSError: a file does not exist or cannot be read.
        ValueError: the files are invalid.
    """

    def __init__(self, paths: Sequence[str], read: Callable[[], T]) -> None:
        self._paths = paths
        self._read = read
        self._stamp = self._stat()
        self.value = read()

    def has_changed(self) -> bool:
        """Check the files, and read them again if they have changed. True if `value` is new since the last check.

        Files that do not match, e.g. because only one of two has been replaced yet, are logged once and tried at the next change.
        """
        try:
            stamp = self._stat()
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            self.value = self._read()
        except (OSError, ValueError) as error:
            # What was read before stays in use; the files are read again when they change.
            logging.getLogger(__name__).warning(
                "changed files rejected: %(files)s: %(reason)s", {"files": ", ".join(self._paths), "reason": str(error)}
            )
            return False
        return True

    def _stat(self) -> _Stamp:
        stats = [os.stat(path) for path in self._paths]  # noqa: PTH116 - called for every handshake
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)
