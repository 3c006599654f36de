"""Cancellation shared by several threads. Knows no transport."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from splitserve.errors import Cancelled


class Stop:
    """Set once: ends the waits of all threads, and cancels their calls in flight where the transport can."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._cancels: dict[int, Callable[[], object]] = {}
        self.cause: Exception | None = None
        """The error because of which it was set first, if any."""

    def set(self, cause: Exception | None = None) -> None:
        """Cancel everything."""
        with self._lock:
            if not self._event.is_set():
                self.cause = cause
            self._event.set()
            cancels = list(self._cancels.values())
        for cancel in cancels:
            cancel()

    def check(self) -> None:
        """Raises:
        Cancelled: it is set.
        """
        if self._event.is_set():
            raise Cancelled("cancelled because another request failed")

    def wait(self, seconds: float) -> None:
        """Sleep.

        Raises:
            Cancelled: it was set meanwhile.
        """
        self._event.wait(seconds)
        self.check()

    @contextmanager
    def calling(self, cancel: Callable[[], object]) -> Iterator[None]:
        """``cancel`` is called if this is set before the ``with`` is left, or was set before."""
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


@contextmanager
def cancelling(stop: Stop | None, cancel: Callable[[], object]) -> Iterator[None]:
    """As `Stop.calling`. What fails once ``stop`` was set has failed because of that.

    Raises:
        Cancelled: it was set.
    """
    if stop is None:
        yield
        return
    try:
        with stop.calling(cancel):
            yield
    except Exception:
        stop.check()
        raise
