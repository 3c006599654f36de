"""Ends what several threads have under way. Knows no transport."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from splitserve.errors import Cancelled


class Stop:
    """Set once; wakes who waits, and cancels calls under way that can be cancelled."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._cancels: dict[int, Callable[[], object]] = {}

    def set(self) -> None:
        """Stop everything."""
        with self._lock:
            self._event.set()
            cancels = list(self._cancels.values())
        for cancel in cancels:
            cancel()

    def check(self) -> None:
        """Raises:
        Cancelled: it is set.
        """
        if self._event.is_set():
            raise Cancelled("given up, another request failed")

    def wait(self, seconds: float) -> None:
        """Let so many seconds pass.

        Raises:
            Cancelled: it was set meanwhile.
        """
        self._event.wait(seconds)
        self.check()

    @contextmanager
    def calling(self, cancel: Callable[[], object]) -> Iterator[None]:
        """``cancel`` is called if it is set before the ``with`` is left, or was before."""
        with self._lock:
            self._cancels[id(cancel)] = cancel
            is_set = self._event.is_set()
        try:
            if is_set:
                cancel()
            yield
        finally:
            with self._lock:
                del self._cancels[id(cancel)]
