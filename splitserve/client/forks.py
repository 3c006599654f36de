"""Processes that were forked: a client used before ``fork()`` shares no connection and no lock with its children."""

from __future__ import annotations

import os
import sys
import weakref
from typing import Any, Protocol


class Forkable(Protocol):
    """What has connections or locks of this process."""

    def forked(self) -> None:
        """Called in a child, on the only thread that it has, before any other code: replace them."""


_known: weakref.WeakSet[Any] = weakref.WeakSet()
_is_registered = False


def watch(client: Forkable) -> None:
    """Call its `forked` in each child of this process."""
    global _is_registered
    if not _is_registered and hasattr(os, "register_at_fork"):
        _is_registered = True
        os.register_at_fork(after_in_child=_forked)
    _known.add(client)


def _forked() -> None:
    for client in list(_known):
        client.forked()


def leave_to_us() -> None:
    """Turn off grpcio's own handling of forks, before its first channel, unless the environment asks for it.

    It is skipped where a thread is in a call, and then ends each child; and it would close channels that we leave alone.
    """
    if "GRPC_ENABLE_FORK_SUPPORT" in os.environ:
        return
    if (cygrpc := sys.modules.get("grpc._cython.cygrpc")) is not None:  # it has read the environment already
        cygrpc._GRPC_ENABLE_FORK_SUPPORT = False  # type: ignore[attr-defined]
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"


def keep_for_ever(thing: object) -> None:
    """Never free this object, not even when the process ends.

    For what grpcio made in the parent: its threads are not in the child, and freeing it waits for them.
    """
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
