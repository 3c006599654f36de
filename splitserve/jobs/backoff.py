"""Pauses between attempts, at jobs and at webhooks."""

from __future__ import annotations

import random

MOST_DOUBLINGS = 30
"""More would not be a float in the end: an attempt's number may be any."""


def doubled_s(attempt: int, first_s: float, most_s: float) -> float:
    """The pause after an attempt, by its number from 1 on: doubled each time, up to a limit, with jitter of a quarter."""
    pause_s: float = first_s * 2 ** min(attempt - 1, MOST_DOUBLINGS)
    return min(most_s, pause_s) * random.uniform(0.75, 1.25)  # noqa: S311
