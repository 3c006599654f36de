"""How a service refreshes its dependencies."""

from __future__ import annotations

import asyncio

from splitserve.server.lifecycle import WAITING_INTERVAL_S, background, keep_refreshing
from tests.virtual_time import run


class Followed:
    """Is ready from its third refresh on; records when it was refreshed."""

    def __init__(self) -> None:
        self.looked_at: list[float] = []

    async def refresh(self) -> None:
        self.looked_at.append(round(asyncio.get_running_loop().time(), 3))
        if len(self.looked_at) == 4:
            raise RuntimeError("a look that fails")

    async def why_waiting(self) -> str:
        return "not yet" if len(self.looked_at) < 3 else ""


def test_a_service_that_is_not_ready_refreshes_more_often() -> None:
    """Once it is ready, refreshes follow their interval, whether they succeed or not."""

    async def main() -> None:
        what = Followed()

        async with background(keep_refreshing(what, interval_s=5.0, why_waiting=what.why_waiting)):
            await asyncio.sleep(11)

        gaps = [later - earlier for earlier, later in zip(what.looked_at, what.looked_at[1:], strict=False)]
        assert [round(gap, 3) for gap in gaps] == [WAITING_INTERVAL_S, WAITING_INTERVAL_S, 5.0, 5.0]

    run(main())
