"""Pauses between attempts: of jobs and webhooks, of the client, of batch scoring."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

MOST_DOUBLINGS = 30
"""More would not be a float in the end: an attempt's number may be any."""


class Backoff(NamedTuple):
    """The pause after the first attempt, doubled after each further one up to a limit, times a random number between two."""

    first_s: float
    most_s: float
    jitter: tuple[float, float] = (0.5, 1.0)

    def longest_s(self, attempt: int) -> float:
        """The pause after an attempt, by its number from 1 on, without jitter."""
        pause_s: float = self.first_s * 2 ** min(attempt - 1, MOST_DOUBLINGS)
        return min(self.most_s, pause_s)

    def pause_s(self, attempt: int, uniform: Callable[[float, float], float] = random.uniform) -> float:
        """The pause after an attempt, by its number from 1 on."""
        return self.longest_s(attempt) * uniform(*self.jitter)
