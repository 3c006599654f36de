"""The floor of REST: our proxy's HTTP server, and behind it nothing but to give the body back.

python -m benchmarks.peers.echo_http 9000
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

from proxy.http_messages import Incoming, Response
from proxy.http_protocol import HttpConnection, HttpLimits, Listener


async def answer(incoming: Incoming) -> Response:
    return Response(200, await incoming.body())


async def serve(port: str) -> None:
    listener = Listener(answer, HttpLimits(), max_body_bytes=2**26)
    server = await asyncio.get_running_loop().create_server(lambda: HttpConnection(listener), "127.0.0.1", int(port))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
