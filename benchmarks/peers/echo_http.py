"""The lower bound of REST: our proxy's HTTP server with an echo handler.

python -m benchmarks.peers.echo_http 9000
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

from splitserve.wire.http1.connection import Http1Connection
from splitserve.wire.http1.listener import HttpLimits, HttpListener
from splitserve.wire.http1.messages import Handled, HttpRequest, HttpResponse, Respond


def answer(request: HttpRequest, respond: Respond) -> Handled:
    return HttpResponse(200, request.body.content()) if request.body.is_complete else _answer_when_complete(request)


async def _answer_when_complete(request: HttpRequest) -> HttpResponse:
    return HttpResponse(200, await request.body.read())


async def serve(port: str) -> None:
    listener = HttpListener(answer, HttpLimits(), max_body_bytes=2**26)
    server = await asyncio.get_running_loop().create_server(lambda: Http1Connection(listener), "127.0.0.1", int(port))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
