"""The client for asyncio: `Client`, awaited. Documents only what differs from it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

from splitserve.client import jobs
from splitserve.client.answer import Answer
from splitserve.client.blocking import CONCURRENCY
from splitserve.client.connection import TLS, AsyncToken, Compression, ConnectionOptions, connection_options
from splitserve.client.inference import Core, InferCall, Outputs
from splitserve.client.jobs import AsyncJob
from splitserve.client.progress import Progress, ReportProgress, reporting
from splitserve.client.steps import Ask, Send, Steps, run_async
from splitserve.oip.limits import MAX_MESSAGE_BYTES
from splitserve.oip.messages import ModelMetadata, ModelState, Parameter, ServerMetadata

T = TypeVar("T")


class _AsyncTransport(Protocol):
    async def send(self, step: Send) -> Any: ...

    async def close(self) -> None: ...


def _transport(connection: ConnectionOptions, token: AsyncToken) -> _AsyncTransport:
    """Imports only what the connection needs."""
    if connection.is_rest:
        from splitserve.client.over_rest import AsyncRestTransport

        return AsyncRestTransport(connection, token)
    from splitserve.client.over_grpc import AsyncGrpcTransport

    return AsyncGrpcTransport(connection, token)


class AsyncClient:
    """`splitserve.Client` for asyncio: the same arguments, methods and errors, awaited. For one event loop.

    A function given as ``token`` may be async.
    """

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        *,
        timeout_s: float = 30.0,
        token: AsyncToken = None,
        tls: TLS | None = None,
        compression: Compression = None,
        max_attempts: int = 5,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._core = Core(timeout_s, max_attempts)
        self._connection = connection_options(
            url, tls=tls, compression=compression, max_message_bytes=max_message_bytes, headers=headers
        )
        self._token = token
        self._transport: _AsyncTransport | None = None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            await self._transport.close()

    async def infer(
        self,
        model: str,
        inputs: Any,
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        parameters: Mapping[str, Parameter] | None = None,
        timeout_s: float | None = None,
        chunk_rows: int | None = None,
        concurrency: int = CONCURRENCY,
        progress: Progress = False,
    ) -> Answer:
        """As `splitserve.Client.infer`. Cancelling it cancels all its requests in flight."""
        inference = InferCall(
            self._core,
            model,
            inputs,
            version=version,
            outputs=outputs,
            parameters=parameters,
            chunk_rows=chunk_rows,
            timeout_s=timeout_s,
        )
        if concurrency < 1:
            raise ValueError(f"concurrency: expected at least 1, got {concurrency}")
        with reporting(progress, model) as report:
            first = await self._run(inference.begin())
            report(inference.n_rows - sum(map(len, inference.rest)), inference.n_rows)
            rest = await self._run_chunks(inference, concurrency, report) if inference.rest else []
        return inference.answer([first, *rest])

    async def _run_chunks(self, inference: InferCall, concurrency: int, report: ReportProgress) -> list[Outputs]:
        """The outputs of each chunk, in order. When one fails, no further one is sent, and those in flight are cancelled."""
        parts: dict[range, Outputs] = {}
        queue = iter(inference.rest)
        n_done = inference.n_rows - sum(map(len, inference.rest))

        async def work() -> None:
            nonlocal n_done
            for rows in queue:
                parts[rows] = await self._run(inference.chunk(rows))
                n_done += len(rows)
                report(n_done, inference.n_rows)

        workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(inference.rest)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [parts[rows] for rows in inference.rest]

    async def submit(
        self,
        model: str,
        inputs: Any,
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        parameters: Mapping[str, Parameter] | None = None,
        idempotency_key: str = "",
        priority: int = 0,
        job_timeout_s: float = 0.0,
        expires_s: float = 0.0,
        webhook: str = "",
        webhook_events: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> AsyncJob:
        """As `splitserve.Client.submit`."""
        steps = jobs.submit(
            self._core,
            model,
            inputs,
            version=version,
            outputs=outputs,
            parameters=parameters,
            idempotency_key=idempotency_key,
            priority=priority,
            job_timeout_s=job_timeout_s,
            expires_s=expires_s,
            webhook=webhook,
            webhook_events=webhook_events,
            timeout_s=timeout_s,
        )
        return AsyncJob(self._core, await self._run(steps), self._run)

    async def job(self, job_id: str) -> AsyncJob:
        """As `splitserve.Client.job`."""
        return AsyncJob(self._core, await self._run(jobs.get(self._core, job_id)), self._run)

    async def jobs(self, *, model: str = "", status: str = "", limit: int = 100, after: str = "") -> list[AsyncJob]:
        """As `splitserve.Client.jobs`."""
        found = await self._run(jobs.list_jobs(self._core, model=model, status=status, limit=limit, after=after))
        return [AsyncJob(self._core, info, self._run) for info in found]

    async def is_live(self) -> bool:
        """As `splitserve.Client.is_live`."""
        return bool(await self._ask("live"))

    async def is_ready(self) -> bool:
        """As `splitserve.Client.is_ready`."""
        return bool(await self._ask("ready"))

    async def is_model_ready(self, model: str, version: str = "") -> bool:
        """As `splitserve.Client.is_model_ready`."""
        return bool(await self._ask("model_ready", model, version))

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """As `splitserve.Client.metadata`."""
        metadata: ModelMetadata = await self._ask("model_metadata", model, version)
        return metadata

    async def server_metadata(self) -> ServerMetadata:
        """As `splitserve.Client.server_metadata`."""
        metadata: ServerMetadata = await self._ask("server_metadata")
        return metadata

    async def models(self) -> list[ModelState]:
        """As `splitserve.Client.models`."""
        index: list[ModelState] = await self._ask("index")
        return index

    async def _ask(self, *ask: Any) -> Any:
        return await self._run(self._core.ask(Ask(*ask), self._core.deadline_after(None)))

    async def _run(self, steps: Steps[T]) -> T:
        if self._transport is None:  # on the loop that will run it
            self._transport = _transport(self._connection, self._token)
        return await run_async(steps, self._transport.send, asyncio.sleep)
