"""``python -m tests.intermediaries.stage``: the stage behind the proxies, whose calls cost almost nothing.

Models: ``echo`` returns its bytes; ``hold`` answers after as many milliseconds as its rows say. Logs which rows it holds.
"""

from __future__ import annotations

import asyncio
import json
import struct

from splitserve.oip.messages import InferRequest, InferResponse
from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, serving, signature

ECHO = signature("echo", [TensorSpec("INPUT0", "UINT8", ("batch", "size"))], version="1.1")
HOLD = signature("hold", [TensorSpec("MS", "INT32", ("batch", 1))], version="1.1")


def log(event: str, **facts: object) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


class Stage(FakeInference):
    async def infer(self, request: InferRequest) -> InferResponse:
        if request.model == "hold":
            await self._hold(request)
        return InferResponse(request.model, request.version, request.inputs, request.id)

    async def _hold(self, request: InferRequest) -> None:
        data = bytes(request.inputs[0].raw)
        rows = struct.unpack(f"<{len(data) // 4}i", data)
        log("held", rows=rows)
        await asyncio.sleep(max(rows) / 1000)


async def main() -> None:
    async with serving(Stage(ECHO, HOLD), stage="preprocess") as address:
        log("listening", grpc=address)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
