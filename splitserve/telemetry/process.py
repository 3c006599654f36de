"""What a process says of itself: CPU, memory, files, garbage collection, and how late its event loop wakes up."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import platform
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from splitserve import __version__
from splitserve.telemetry.families import BUILD, CPU, GC, LOOP_LAG, OPEN_FILES, RSS, STARTED
from splitserve.telemetry.recorders import Histogram
from splitserve.telemetry.registry import Sample

BEAT_S = 0.1
"""Between two intended wake-ups of the event loop."""

_STATM = Path("/proc/self/statm")
_FILES = Path("/proc/self/fd")


class Beats:
    """When an event loop has last woken up, in a file, so that another process sees that it has not.

    Args:
        path: the file; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[], None]]:
        """What is called at each beat."""
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            yield lambda: _write(file)
        finally:
            os.close(file)

    def age_s(self) -> float | None:
        """Seconds since the last beat; None: there was none."""
        try:
            return max(0.0, time.monotonic() - float(_BEAT.unpack(self._path.read_bytes())[0]))
        except (OSError, struct.error):
            return None


_BEAT = struct.Struct("d")
"""Seconds of the monotonic clock, which the processes of a machine share."""


def _write(file: int) -> None:
    os.pwrite(file, _BEAT.pack(time.monotonic()), 0)


class ProcessMetrics:
    """The metrics of this process. `measure_lag` runs in the background."""

    def __init__(self) -> None:
        self.lag = Histogram()
        self._started_at = time.time()

    async def measure_lag(self, beats: Beats | None = None) -> None:
        """Compare when the event loop wakes up with when it was to, until cancelled.

        Args:
            beats: is told, too.
        """
        loop = asyncio.get_running_loop()
        with contextlib.nullcontext(_nothing) if beats is None else beats.writing() as beat:
            while True:
                beat()
                due = loop.time() + BEAT_S
                await asyncio.sleep(BEAT_S)
                self.lag.observe(max(0.0, loop.time() - due))

    def collect(self) -> Iterator[Sample]:
        """All of them; memory and files only where /proc has them."""
        yield Sample(BUILD, (__version__, platform.python_version()), 1)
        yield Sample(LOOP_LAG, (), self.lag.read())
        yield Sample(CPU, (), time.process_time())
        yield Sample(STARTED, (), self._started_at)
        for generation, statistics in enumerate(gc.get_stats()):
            yield Sample(GC, (str(generation),), statistics["collections"])
        with contextlib.suppress(OSError):
            yield Sample(RSS, (), int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            yield Sample(OPEN_FILES, (), sum(1 for _ in _FILES.iterdir()))


def _nothing() -> None:
    pass
