"""The floor of REST: our proxy's HTTP server, and behind it nothing but to give the body back.

python -m benchmarks.peers.echo_http 9000
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

from splitserve.wire.http1.connection import HttpConnection
from splitserve.wire.http1.listener import HttpLimits, Listener
from splitserve.wire.http1.messages import Answer, Incoming, Reply, Response


def answer(incoming: Incoming, reply: Reply) -> Answer:
    return Response(200, incoming.whole_body()) if incoming.is_complete else _answer_when_whole(incoming)


async def _answer_when_whole(incoming: Incoming) -> Response:
    return Response(200, await incoming.body())


async def serve(port: str) -> None:
    listener = Listener(answer, HttpLimits(), max_body_bytes=2**26)
    server = await asyncio.get_running_loop().create_server(lambda: HttpConnection(listener), "127.0.0.1", int(port))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
