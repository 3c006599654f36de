"""The client for people: numpy arrays, lists or DataFrames in, numpy arrays or a DataFrame out, over REST or gRPC.

`Client` blocks, `AsyncClient` awaits; both are thin, and run the same steps (`steps`, `inference`) over one of two transports
(`over_grpc`, `over_rest`). What a transport or a table needs is imported when one is used: numpy is all that is needed before.
"""

from __future__ import annotations

from splitserve.client.answer import Answer
from splitserve.client.awaiting import AsyncClient
from splitserve.client.blocking import Client
from splitserve.client.connection import TLS

__all__ = ["TLS", "Answer", "AsyncClient", "Client"]
