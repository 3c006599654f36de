"""Files that are read again when they change: certificates, tokens, keys. What is broken never replaces what was read before."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

_Stamp = tuple[tuple[int, int, int], ...]


class Watched(Generic[T]):
    """What some files say, together.

    Args:
        paths: the files; links are followed, so that a mounted secret that is swapped by its link counts as changed.
        read: gives their meaning; raises OSError or ValueError for files that cannot be used.

    Raises:
        OSError: a file is not there or cannot be read.
        ValueError: they cannot be used.
    """

    def __init__(self, paths: Sequence[str], read: Callable[[], T]) -> None:
        self._paths = paths
        self._read = read
        self._stamp = self._look()
        self.value = read()

    def has_changed(self) -> bool:
        """Look at the files; True if `value` is new since the last look.

        Files that do not fit each other, as when only one of two has been replaced yet, are said once and left for later.
        """
        try:
            stamp = self._look()
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

    def _look(self) -> _Stamp:
        stats = [os.stat(path) for path in self._paths]  # noqa: PTH116 - called for every handshake
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)
