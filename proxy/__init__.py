"""The proxy: the one address for clients, REST and gRPC. Binds each request to a pair; has no numerics."""

import splitserve.server.lean_logging  # noqa: F401, first
