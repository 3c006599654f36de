"""The Python client: numpy arrays, lists or DataFrames in, numpy arrays or a DataFrame out, over REST or gRPC.

`Client` blocks, `AsyncClient` is for asyncio; both run the same steps (`steps`, `inference`) over a transport: `over_grpc`,
`over_rest`, `over_httpx` (the caller's own httpx client), `over_own_grpc` (without grpcio: to single addresses, and in forked
children). Transports and pandas are imported on first use; until then numpy is the only dependency.
"""

from __future__ import annotations

from splitserve.client.answer import Answer
from splitserve.client.awaiting import AsyncClient
from splitserve.client.base import ClientClosed
from splitserve.client.blocking import Client
from splitserve.client.connection import TLS
from splitserve.client.jobs import AsyncJob, Job

__all__ = ["TLS", "Answer", "AsyncClient", "AsyncJob", "Client", "ClientClosed", "Job"]
