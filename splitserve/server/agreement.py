"""Which of several candidates to use while replicas differ: they poll out of phase, or their images are replaced one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

PATIENCE_S = 60.0
"""A candidate that half of the replicas have had for this time is used although the others do not have it."""


class Agreement(Generic[T]):
    """Remembers since when half of the replicas have a candidate.

    Args:
        patience_s: how long to wait for the other replicas.
        clock: seconds that never go back.
    """

    def __init__(self, *, patience_s: float = PATIENCE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._on_half_since: dict[str, dict[T, float]] = {}

    def choose(self, model: str, candidates: Sequence[T], replicas: Sequence[Collection[T]]) -> T | None:
        """The newest candidate that all replicas have, or half of them for a while; else the one that most have.

        Args:
            model: whose candidates these are.
            candidates: oldest first.
            replicas: what each has, of those that can be seen.

        Returns:
            None if no replica has one of the candidates. Of those that equally many have, the newest.
        """
        now = self._clock()
        counts = {candidate: sum(candidate in has for has in replicas) for candidate in candidates}
        on_half = {candidate for candidate, count in counts.items() if count and 2 * count >= len(replicas)}
        before = self._on_half_since.get(model, {})
        since = {candidate: before.get(candidate, now) for candidate in on_half}
        self._on_half_since[model] = since
        for candidate in reversed(candidates):
            is_everywhere = 0 < counts[candidate] == len(replicas)
            if is_everywhere or (candidate in since and now - since[candidate] >= self._patience_s):
                return candidate
        most = max(counts.values(), default=0)
        return next((candidate for candidate in reversed(candidates) if counts[candidate] == most), None) if most else None
