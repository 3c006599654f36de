"""Work in progress on behalf of a peer."""

from __future__ import annotations

from typing import Protocol


class Cancellable(Protocol):
    """Work that a request waits for. An `asyncio.Task` is one."""

    def cancel(self) -> object:
        """The peer has left: its result is not wanted any more. No effect once the work has ended."""
