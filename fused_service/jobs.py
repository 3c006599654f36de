"""Jobs in the fused service.

With SQLite and several processes, one of them owns the folder of jobs:

1. Who has the folder's lock opens the store, runs jobs, and serves the other processes on JOBS_GRPC_PORT of the loopback.
2. The others forward their callers' verbs to that port.
3. They keep trying to get the lock. The kernel releases it when its owner ends, however that happens: then another process is the
   owner, and claims the jobs that were running. Until it listens, jobs are unavailable (503).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Protocol

import msgspec
import structlog

from jobs_service import build
from jobs_service.building import CANNOT_OPEN, folder_store, queue_on
from jobs_service.face import JobsFace
from jobs_service.settings import JobsSettings
from proxy.remote_jobs import RemoteJobs
from splitserve.jobs.folder import FolderInUse
from splitserve.jobs.payloads import Payloads
from splitserve.jobs.records import Job, JobCaller, Submitted
from splitserve.jobs.service import JobAnswer, JobCounters, JobQueue, Jobs, Submission
from splitserve.oip.messages import InferenceService

LOOPBACK = "127.0.0.1"
LOCK_INTERVAL_S = 0.2
"""How often a process tries to become the owner."""


class DrainingJobs(Jobs, Protocol):
    """Jobs that run in this process."""

    async def drain(self, grace_s: float) -> None:
        """As `JobQueue.drain`."""
        ...

    def counters(self) -> JobCounters:
        """As `JobQueue.counters`."""
        ...

    async def not_ready_reason(self) -> str:
        """As `JobQueue.not_ready_reason`."""
        ...


def jobs_in(
    inference: InferenceService, config: JobsSettings, n_workers: int
) -> contextlib.AbstractAsyncContextManager[DrainingJobs]:
    """The jobs of one of ``n_workers`` processes."""
    if n_workers == 1 or config.database_url:
        return build(inference, config)
    return SharedFolderJobs(inference, config)


class SharedFolderJobs:
    """Implements `Jobs` in a process that shares a folder with others. Call it inside its ``async with``.

    Args:
        inference: what answers jobs, in the process that owns the folder.
        config: the settings.
    """

    def __init__(self, inference: InferenceService, config: JobsSettings) -> None:
        self._inference = inference
        self._config = config
        self._log = structlog.get_logger()
        self._owner = RemoteJobs(f"{LOOPBACK}:{config.grpc_port}", max_message_bytes=config.max_message_bytes)
        self._queue: JobQueue | None = None
        """None: another process is the owner."""
        self._stack = AsyncExitStack()
        self._is_stopping = asyncio.Event()
        self._problem = ""
        self._is_forwarding = False

    async def __aenter__(self) -> SharedFolderJobs:
        await self._stack.enter_async_context(self._owner)
        await self._try_to_own()
        self._trying = asyncio.create_task(self._keep_trying())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stop_trying()
        await self._stack.aclose()

    async def drain(self, grace_s: float) -> None:
        """As `JobQueue.drain`, in the owner; the others only do not become it any more."""
        await self._stop_trying()
        if self._queue is not None:
            await self._queue.drain(grace_s)

    async def _stop_trying(self) -> None:
        self._is_stopping.set()
        await self._trying

    async def _keep_trying(self) -> None:
        while self._queue is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOCK_INTERVAL_S):
                    await self._is_stopping.wait()
            if self._is_stopping.is_set():
                return
            await self._try_to_own()

    async def _try_to_own(self) -> None:
        try:
            self._queue = await self._stack.enter_async_context(self._owned())
        except FolderInUse as error:
            self._is_forwarding = True
            if str(error) != self._problem:
                self._problem = str(error)
                # Another process owns the folder of jobs; this one forwards its callers to it.
                self._log.info("jobs forwarded", reason=self._problem, to=f"{LOOPBACK}:{self._config.grpc_port}")
        except (*CANNOT_OPEN, SystemExit) as error:
            self._is_forwarding = False
            if str(error) != self._problem:
                self._problem = str(error)
                # This process cannot open the folder of jobs, or listen on JOBS_GRPC_PORT; it goes on trying.
                self._log.error("jobs not opened", reason=self._problem)

    @contextlib.asynccontextmanager
    async def _owned(self) -> AsyncIterator[JobQueue]:
        store = folder_store(self._config)
        await asyncio.to_thread(store.open)
        try:
            payloads = Payloads(self._config.payloads_place, inline_bytes=self._config.inline_bytes)
            async with queue_on(store, payloads, self._inference, self._config) as queue:
                config = msgspec.structs.replace(self._config.grpc_config, host=LOOPBACK, tls=None, shares_port=False)
                async with JobsFace(queue, config, self._config.byte_budget()) as face:
                    try:
                        yield queue
                    finally:
                        await face.drain()
        finally:
            await store.close()

    def counters(self) -> JobCounters:
        """As `JobQueue.counters`, in the owner; zeros in the others."""
        return self._queue.counters() if self._queue is not None else JobCounters()

    async def not_ready_reason(self) -> str:
        """As `JobQueue.not_ready_reason`, in the owner; one that forwards is ready."""
        if self._queue is not None:
            return await self._queue.not_ready_reason()
        return "" if self._is_forwarding else self._problem

    @property
    def _jobs(self) -> Jobs:
        return self._queue or self._owner

    async def submit(self, caller: JobCaller, submission: Submission) -> Submitted:
        return await self._jobs.submit(caller, submission)

    async def job_of_key(self, caller: JobCaller, key: str, fingerprint: bytes) -> Job | None:
        return await self._jobs.job_of_key(caller, key, fingerprint)

    async def get(self, caller: JobCaller, job_id: str, wait_s: float = 0.0) -> Job:
        return await self._jobs.get(caller, job_id, wait_s)

    async def result(self, caller: JobCaller, job_id: str) -> JobAnswer:
        return await self._jobs.result(caller, job_id)

    async def delete(self, caller: JobCaller, job_id: str, *, keep_ended: bool = False) -> Job:
        return await self._jobs.delete(caller, job_id, keep_ended=keep_ended)

    async def list_jobs(
        self, caller: JobCaller, *, model: str = "", status: str = "", limit: int = 0, after: str = ""
    ) -> list[Job]:
        return await self._jobs.list_jobs(caller, model=model, status=status, limit=limit, after=after)
