"""``splitserve health``: which models of a running system are ready."""

from __future__ import annotations

import asyncio
import sys

from splitserve.cli.connection import client, connect
from splitserve.cli.tables import print_table
from splitserve.errors import SplitserveError
from splitserve.oip.messages import DEFAULT, READY, RELEASE_SEQUENCE, ModelState

TIMEOUT_S = 30.0


def run(url: str) -> int:
    """Print a row for each version, or the reason if there are none; 1 if none is ready."""
    try:
        is_rest = url.startswith(("http://", "https://"))
        states, reason = _look_over_rest(url) if is_rest else asyncio.run(_look(url))
    except SplitserveError as error:
        print(f"{url}: {error.message}", file=sys.stderr)
        return 1
    if not states:
        print(f"{url}: {reason}", file=sys.stderr)
        return 1
    print_table(("model", "version", "release", "state", "reason"), map(_row, states))
    return int(not any(state.state == READY for state in states))


def _row(state: ModelState) -> tuple[str, ...]:
    """A version, with the sequence number of its release and whether requests that name no version get it."""
    release = state.properties.get(RELEASE_SEQUENCE, "-")
    if state.properties.get(DEFAULT) == "true":
        release += ", default"
    return state.name, state.version, release, state.state, state.reason


def _look_over_rest(url: str) -> tuple[list[ModelState], str]:
    with client(url, timeout_s=TIMEOUT_S) as connection:
        states = connection.models()
        return states, "" if states else "no model is ready"


async def _look(url: str) -> tuple[list[ModelState], str]:
    """The index, and the system's reason if it is empty."""
    async with connect(url) as remote:
        states = await remote.index()
        return states, "" if states else await remote.not_ready_reason()
