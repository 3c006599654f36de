"""How many bytes of requests a process holds at a time, whoever sent them: what is beyond is refused, and memory is bounded."""

from __future__ import annotations

from types import TracebackType

from splitserve.errors import Overloaded


class ByteBudget:
    """The bytes that may be held.

    Args:
        max_bytes: in all.
    """

    __slots__ = ("max_bytes", "used")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used = 0

    def share(self) -> Share:
        """Of one request, from its first byte to its answer."""
        return Share(self)


class Share:
    """What one request holds; a context manager, which gives it back."""

    __slots__ = ("_budget", "_held")

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._held = 0

    def take(self, n_bytes: int) -> None:
        """Raises:
        Overloaded: so many more cannot be held now.
        """
        budget = self._budget
        if budget.used + n_bytes > budget.max_bytes:
            raise Overloaded(f"requests of {budget.used} bytes are here already, {budget.max_bytes} may be")
        budget.used += n_bytes
        self._held += n_bytes

    def give_back(self) -> None:
        """The request is answered."""
        self._budget.used -= self._held
        self._held = 0

    def __enter__(self) -> Share:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.give_back()
