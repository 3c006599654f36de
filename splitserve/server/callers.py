"""What a face asks before it answers: who calls. Faces show credentials here and know nothing of what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Authenticator(Protocol):
    """Learns who calls, for what is behind the face; see `proxy.guard`."""

    async def authenticate(self, credentials: Sequence[str], *, is_open: bool) -> None:
        """Called in the task that serves the call, before anything of it is decoded.

        Args:
            credentials: the values of the call's ``authorization`` headers.
            is_open: whether anyone may make this call, so that wrong credentials do no harm.

        Raises:
            Unauthenticated: there are none that hold, and ``is_open`` is false.
        """
        ...
