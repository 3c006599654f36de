"""Concurrent calls, without threads."""

import asyncio
import sys

import numpy as np

from splitserve import AsyncClient

url = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"


async def main() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 30))
    async with AsyncClient(url) as client:
        answers = await asyncio.gather(*(client.infer("breast-cancer", {"features": [row]}) for row in rows))
    print(len(answers), "answers, the first:", answers[0]["label"], answers[0]["probabilities"])


asyncio.run(main())
