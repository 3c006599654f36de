"""Child processes that end with their parent, however that ends."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def ending_with_parent() -> Callable[[], object]:
    """A function that a new child process calls to get SIGTERM if its parent is killed. Linux only; does nothing elsewhere.

    It is made before the fork: a child of a process with threads must not load libraries. Source: prctl(2), PR_SET_PDEATHSIG.
    """
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return lambda: None
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
