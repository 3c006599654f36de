"""The jobs service: durable asynchronous inference. Stores jobs and runs them through the proxy."""

import splitserve.server.lean_logging  # noqa: F401, first
from jobs_service.building import build

__all__ = ["build"]
