"""Whether and when a request is retried. Knows no transport."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection

from splitserve.backoff import Backoff
from splitserve.errors import Overloaded, SplitserveError, Unavailable
from splitserve.remote.retry_budget import RetryBudget

BACKOFF = Backoff(0.1, 2.0)

RETRY_ON: tuple[type[SplitserveError], ...] = (Unavailable, Overloaded)
"""The errors after which another attempt can help, by default."""


class Failed(Exception):
    """One attempt failed.

    Args:
        error: raised if there is no further attempt.
        can_retry: the request did not reach a model, and another attempt may.
        retry_after_s: pause requested by the server.
    """

    def __init__(self, error: SplitserveError, *, can_retry: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.can_retry = can_retry
        self.retry_after_s = retry_after_s


class Retries:
    """Backoff with jitter, within a retry budget that all calls of a client share. Thread-safe.

    A server that says that it is overloaded works: such a retry is bounded by the request's deadline alone, not by
    ``max_attempts`` (unless that is 1) nor by the budget, which is for servers that fail.

    Args:
        max_attempts: of one request; 1: no retries.
        retry_on: the errors after which a request is retried, if it reached no model.
        uniform: a random number between two.
    """

    def __init__(
        self,
        max_attempts: int,
        retry_on: Collection[type[SplitserveError]] = RETRY_ON,
        *,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        if max_attempts < 1:
            raise ValueError(f"max_attempts: expected at least 1, got {max_attempts}")
        for kind in retry_on:
            if not (isinstance(kind, type) and issubclass(kind, SplitserveError)):
                raise ValueError(f"retry_on: expected classes of splitserve.errors, got {kind!r}")
        self._max_attempts = max_attempts
        self._retry_on = tuple(retry_on)
        self._uniform = uniform
        self._budget = RetryBudget()
        self._lock = threading.Lock()

    def forked(self) -> None:
        """In a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()

    def succeeded(self) -> None:
        """Count an attempt that was answered."""
        with self._lock:
            self._budget.give()

    def delay_s(self, failure: Failed, n_failures: int) -> float | None:
        """The pause before the next attempt; None: no further attempt.

        Args:
            failure: of the latest attempt.
            n_failures: of this request so far.
        """
        if not failure.can_retry or not isinstance(failure.error, self._retry_on) or self._max_attempts == 1:
            return None
        if not isinstance(failure.error, Overloaded):
            if n_failures >= self._max_attempts:
                return None
            with self._lock:
                if not self._budget.take():
                    return None
        if failure.retry_after_s is not None:
            return failure.retry_after_s * self._uniform(1, 1.2)
        return BACKOFF.pause_s(n_failures, self._uniform)
