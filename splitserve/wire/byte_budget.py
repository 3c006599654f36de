"""A process-wide limit on the bytes of requests in flight: what would exceed it is refused, so memory stays bounded."""

from __future__ import annotations

from types import TracebackType


class BudgetExceeded(Exception):
    """The bytes in flight would exceed the limit."""


class ByteBudget:
    """The bytes that requests may hold at a time.

    Args:
        max_bytes: over all requests.
    """

    __slots__ = ("max_bytes", "used")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used = 0

    def reserve(self, n_bytes: int) -> None:
        """Count ``n_bytes`` as in flight until `release`.

        Raises:
            BudgetExceeded: the limit would be exceeded; nothing is reserved.
        """
        if self.used + n_bytes > self.max_bytes:
            raise BudgetExceeded(f"in-flight bytes {self.used + n_bytes} exceed the limit {self.max_bytes}")
        self.used += n_bytes

    def release(self, n_bytes: int) -> None:
        """Return reserved bytes."""
        self.used -= n_bytes

    def reservation(self) -> Reservation:
        """An empty reservation for one request."""
        return Reservation(self)


class Reservation:
    """The bytes that one request has reserved. A context manager: leaving it releases them."""

    __slots__ = ("_budget", "_n_bytes")

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._n_bytes = 0

    def reserve(self, n_bytes: int) -> None:
        """Reserve more. Raises `BudgetExceeded` as `ByteBudget.reserve`."""
        self._budget.reserve(n_bytes)
        self._n_bytes += n_bytes

    def release(self) -> None:
        """Release everything reserved so far."""
        self._budget.release(self._n_bytes)
        self._n_bytes = 0

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()
