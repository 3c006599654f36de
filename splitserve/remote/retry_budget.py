"""The retry budget that all calls to one service share, so that retries do not multiply the load of a failing service.

After gRPC proposal A6, "Throttling Retry Attempts and Hedged RPCs". One difference: a retry that is refused costs nothing, so
retries resume as soon as calls succeed again. Knows no transport and no clock.
"""

from __future__ import annotations

from typing import Literal

MAX_TOKENS = 100.0
"""A budget begins full; retries are allowed while more than half of it is left."""

TOKEN_RATIO = 0.125
"""Tokens that an answered call returns: in the long run one retry for every eight answers."""


class RetryBudget:
    """Not thread-safe."""

    __slots__ = ("_tokens", "counts")

    def __init__(self) -> None:
        self._tokens = MAX_TOKENS
        self.counts = {"retry": 0, "hedge": 0, "refused": 0}
        """Attempts that were made, and those that the budget refused."""

    def take(self, kind: Literal["retry", "hedge"] = "retry") -> bool:
        """Take the token of one retry or hedge. False: there is none, and the retry must not be made."""
        if self._tokens <= MAX_TOKENS / 2:
            self.counts["refused"] += 1
            return False
        self.counts[kind] += 1
        self._tokens -= 1
        return True

    def give(self) -> None:
        """Return part of a token: a call was answered."""
        self._tokens = min(MAX_TOKENS, self._tokens + TOKEN_RATIO)
