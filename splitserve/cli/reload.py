"""``splitserve reload``: make a running system poll its model repository now."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from splitserve.cli.connection import client, connect, is_client_url
from splitserve.errors import SplitserveError
from splitserve.remote.inference import CONTROL_TIMEOUT_S


def run(models: Sequence[str], url: str) -> int:
    """Reload each model, by default all in the system's index; 1 and the reason if that fails."""
    try:
        asked = _reload_by_client(models, url) if is_client_url(url) else asyncio.run(_reload(models, url))
    except SplitserveError as error:
        print(f"{url}: {error.message}", file=sys.stderr)
        return 1
    if not asked:
        print(f"{url}: no models yet; name the new model", file=sys.stderr)
        return 1
    print(f"reloaded {', '.join(asked)}")
    return 0


def _reload_by_client(models: Sequence[str], url: str) -> list[str]:
    with client(url, timeout_s=CONTROL_TIMEOUT_S) as proxy:
        asked = list(models) or sorted({state.name for state in proxy.models()})
        for model in asked:
            proxy.load(model)
        return asked


async def _reload(models: Sequence[str], url: str) -> list[str]:
    async with connect(url) as proxy:
        asked = list(models) or sorted({state.name for state in await proxy.index()})
        for model in asked:
            await proxy.load(model)
        return asked
