"""Work in progress on behalf of a peer."""

from __future__ import annotations

from typing import Protocol


class Cancellable(Protocol):
    """Work that a request waits for. An `asyncio.Task` is one."""

    def cancel(self) -> object:
        """Cancel the work: the peer has disconnected. No effect once the work has ended."""
