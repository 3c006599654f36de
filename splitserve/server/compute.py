"""Runs blocking work in the event loop if it is short, in a thread if it is long.

A switch to a thread and back costs more than a small transform or model. Long work would keep the loop from answering health
checks and other calls. The duration is estimated from earlier calls with about as many rows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Executor
from typing import TypeVar, TypeVarTuple
from weakref import WeakKeyDictionary

T = TypeVar("T")
A = TypeVarTuple("A")

INLINE_S = 0.003
"""Work that is expected to take less runs in the event loop."""

_WEIGHT = 0.3


class Compute:
    """Runs work for owners, e.g. loaded models, and measures its duration for each.

    Args:
        executor: threads for work that is long or not measured yet.
        inline_s: shorter work runs in the event loop.
        clock: monotonic, in seconds.
    """

    def __init__(self, executor: Executor, *, inline_s: float = INLINE_S, clock: Callable[[], float] = time.perf_counter) -> None:
        self._executor = executor
        self._inline_s = inline_s
        self._clock = clock
        self._seconds: WeakKeyDictionary[Hashable, dict[int, float]] = WeakKeyDictionary()

    def run_inline(self, owner: Hashable, n_rows: int, work: Callable[[*A], T], *arguments: *A) -> T | None:
        """Return ``work(*arguments)`` if that is expected to be short; None: use `run`. Arguments as for `run`."""
        seen, size = self._measured(owner), n_rows.bit_length()
        return self._timed(seen, size, work, *arguments) if seen.get(size, self._inline_s) < self._inline_s else None

    async def run(self, owner: Hashable, n_rows: int, work: Callable[[*A], T], *arguments: *A) -> T:
        """Return ``work(*arguments)``.

        Args:
            owner: work of the same owner and size is expected to take as long.
            n_rows: the size of the work.
            work: blocking; may be called in a thread.
            arguments: of ``work``.
        """
        seen, size = self._measured(owner), n_rows.bit_length()
        if seen.get(size, self._inline_s) < self._inline_s:
            return self._timed(seen, size, work, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._timed, seen, size, work, *arguments)

    def _measured(self, owner: Hashable) -> dict[int, float]:
        """Seconds by the bit length of the number of rows."""
        seen = self._seconds.get(owner)
        if seen is None:
            seen = self._seconds[owner] = {}
        return seen

    def _timed(self, seen: dict[int, float], size: int, work: Callable[[*A], T], *arguments: *A) -> T:
        began = self._clock()
        try:
            return work(*arguments)
        finally:
            took_s = self._clock() - began
            seen[size] = took_s + (seen.get(size, took_s) - took_s) * (1 - _WEIGHT)
