"""The jobs service around any `InferenceService`: its store, its worker, its queue. The process and the fused service use it."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import structlog

from jobs_service.settings import JobsSettings
from splitserve.jobs.folder import FolderInUse, NetworkFileSystem
from splitserve.jobs.payloads import Payloads
from splitserve.jobs.service import JobQueue
from splitserve.jobs.sqlite import SqliteStore
from splitserve.jobs.store import JobStore
from splitserve.jobs.webhooks import WebhookSender
from splitserve.jobs.worker import Worker
from splitserve.oip.messages import InferenceService
from splitserve.server.lifecycle import background


@contextlib.asynccontextmanager
async def build(inference: InferenceService, config: JobsSettings) -> AsyncIterator[JobQueue]:
    """The queue of jobs, which are run while the block runs. Leaving it drains the worker.

    Args:
        inference: what answers jobs: the proxy, or a client of it.
        config: the settings.
    """
    async with opened_store(config) as store:
        try:
            payloads = Payloads(config.payloads_place, inline_bytes=config.inline_bytes)
        except OSError as error:
            print(f"JOBS_PAYLOADS: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        async with queue_on(store, payloads, inference, config) as queue:
            yield queue


@contextlib.asynccontextmanager
async def queue_on(
    store: JobStore, payloads: Payloads, inference: InferenceService, config: JobsSettings
) -> AsyncIterator[JobQueue]:
    """As `build`, on a store that is open."""
    async with contextlib.AsyncExitStack() as stack:
        policy = config.webhook_policy
        queue = JobQueue(store, payloads, config.job_rules, check_webhook=policy.check)
        sender = WebhookSender(store, policy)
        queue.on_webhook = sender.wake
        queue.worker = Worker(store, inference, payloads, config.worker_rules, on_ended=queue.ended)
        # How long jobs and results are kept, and where.
        structlog.get_logger().info("jobs open", store=_place(config), ttl_s=config.ttl_s, key_ttl_s=config.key_ttl_s)
        await stack.enter_async_context(background(queue.run(), queue.worker.run(), sender.run()))
        try:
            yield queue
        finally:
            await queue.drain(config.grace_s)


CANNOT_OPEN = (FolderInUse, NetworkFileSystem, OSError, sqlite3.Error)
"""What opening a store in a folder may raise."""


def folder_store(config: JobsSettings) -> SqliteStore:
    """The store in the folder that is configured, not open yet."""
    return SqliteStore(Path(config.dir), config.store_rules, reserve_bytes=config.reserve_bytes)


def _place(config: JobsSettings) -> str:
    return "postgresql" if config.database_url else config.dir


@contextlib.asynccontextmanager
async def opened_store(config: JobsSettings) -> AsyncIterator[JobStore]:
    """The store that is configured. A folder that cannot be used ends the process with the reason."""
    if config.database_url:
        from splitserve.jobs.postgres import PostgresStore  # needs the extra jobs-postgres

        async with PostgresStore(
            config.database_url,
            config.store_rules,
            direct_url=config.database_direct_url,
            max_connections=config.max_database_connections,
        ) as postgres:
            yield postgres
        return
    store = folder_store(config)
    try:
        store.open(wait_s=config.lock_wait_s)
    except CANNOT_OPEN as error:
        way_out = "; stop it, or set JOBS_DIR to another folder" if isinstance(error, FolderInUse) else ""
        print(f"JOBS_DIR: {error}{way_out}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        yield store
    finally:
        await store.close()
