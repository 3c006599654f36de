"""Ids for requests that come without one: a number of this process, and a count."""

from __future__ import annotations

import itertools
import os
import secrets

_prefix, _count = secrets.token_hex(8), itertools.count(1)


def new_request_id() -> str:
    """The next id, of at most 32 letters and digits: cheap, since every request gets one, and unlike those of other processes."""
    return f"{_prefix}{next(_count):x}"


def _restart() -> None:
    """Begin with another number: this is another process."""
    global _prefix, _count
    _prefix, _count = secrets.token_hex(8), itertools.count(1)


os.register_at_fork(after_in_child=_restart)
