"""``splitserve health``: which models of a running system are ready."""

from __future__ import annotations

import asyncio
import sys

from splitserve.cli.connection import connect
from splitserve.cli.tables import print_table
from splitserve.errors import SplitserveError
from splitserve.oip import READY, ModelState


def run(url: str) -> int:
    """Print a row for each version; 1 if none is ready."""
    try:
        states = asyncio.run(_index(url))
    except SplitserveError as error:
        print(f"{url}: {error.message}", file=sys.stderr)
        return 1
    print_table(("model", "version", "state", "reason"), [(s.name, s.version, s.state, s.reason) for s in states])
    return int(not any(state.state == READY for state in states))


async def _index(url: str) -> list[ModelState]:
    async with connect(url) as remote:
        return await remote.index()
