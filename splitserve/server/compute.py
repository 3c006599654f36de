"""Where blocking work runs: in the event loop while it is short, in a thread once it is long.

A hop to a thread and back costs more than a small transform or model takes. But what takes long must not keep the loop from
answering health checks and other calls. How long it takes is seen from the calls before, by the number of rows.
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
"""Work that is expected to take less runs in the loop."""

_WEIGHT = 0.3


class Compute:
    """Runs work for owners, e.g. loaded models, and remembers how long it takes for each.

    Args:
        executor: threads for what is long or not known yet.
        inline_s: below this, work runs in the loop.
        clock: seconds that never go back.
    """

    def __init__(self, executor: Executor, *, inline_s: float = INLINE_S, clock: Callable[[], float] = time.perf_counter) -> None:
        self._executor = executor
        self._inline_s = inline_s
        self._clock = clock
        self._seconds: WeakKeyDictionary[Hashable, dict[int, float]] = WeakKeyDictionary()

    async def run(self, owner: Hashable, n_rows: int, work: Callable[[*A], T], *arguments: *A) -> T:
        """The result of ``work(*arguments)`` on so many rows.

        Args:
            owner: whose work it is; one of the same owner and size is expected to take as long.
            n_rows: its size.
            work: blocks; may be called in a thread.
            arguments: of ``work``.
        """
        seen = self._seconds.get(owner)
        if seen is None:
            seen = self._seconds[owner] = {}
        size = n_rows.bit_length()
        if seen.get(size, self._inline_s) < self._inline_s:
            return self._timed(seen, size, work, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._timed, seen, size, work, *arguments)

    def _timed(self, seen: dict[int, float], size: int, work: Callable[[*A], T], *arguments: *A) -> T:
        began = self._clock()
        try:
            return work(*arguments)
        finally:
            took_s = self._clock() - began
            seen[size] = took_s + (seen.get(size, took_s) - took_s) * (1 - _WEIGHT)
