"""Ids for requests that come without one: a number of this process, and a count."""

from __future__ import annotations

import itertools
import os
import secrets
from typing import ClassVar


class RequestIds:
    """Makes ids: cheap, since every request gets one, and unlike those of other processes."""

    _prefix: ClassVar[str]
    _count: ClassVar[itertools.count[int]]

    @classmethod
    def new(cls) -> str:
        """The next id, of at most 32 letters and digits."""
        return f"{cls._prefix}{next(cls._count):x}"

    @classmethod
    def restart(cls) -> None:
        """Begin with another number: this is another process."""
        cls._prefix, cls._count = secrets.token_hex(8), itertools.count(1)


RequestIds.restart()
os.register_at_fork(after_in_child=RequestIds.restart)
