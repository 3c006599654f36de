"""The jobs service: durable asynchronous inference. Stores jobs and runs them through the proxy."""

from jobs_service.building import build

__all__ = ["build"]
