"""The client for asyncio: `Client`, awaited. Documents only what differs from it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from splitserve.client import forks, jobs
from splitserve.client.answer import Answer, Text
from splitserve.client.base import MAX_CONCURRENCY, ClientBase, version_name
from splitserve.client.blocking import CONCURRENCY
from splitserve.client.connection import TLS, AsyncToken, Compression, ConnectionOptions, Headers
from splitserve.client.encoding import Extra
from splitserve.client.inference import InferCall, Outputs, RequestOptions
from splitserve.client.jobs import AsyncJob
from splitserve.client.progress import Progress, ReportProgress, reporting
from splitserve.client.retries import RETRY_ON
from splitserve.client.steps import Ask, Once, Send, Steps, Verb, run_async
from splitserve.errors import SplitserveError
from splitserve.oip.limits import MAX_MESSAGE_BYTES
from splitserve.oip.messages import ModelMetadata, ModelState, Parameter, ServerMetadata

if TYPE_CHECKING:
    import grpc.aio
    import httpx

T = TypeVar("T")


class _AsyncTransport(Protocol):
    async def send(self, step: Send) -> Any: ...

    async def close(self) -> None: ...

    def abandon(self) -> None: ...


def _transport(connection: ConnectionOptions, token: AsyncToken) -> _AsyncTransport:
    """Imports only what the connection needs."""
    if connection.http_client is not None or (connection.is_rest and connection.proxy):
        from splitserve.client.over_httpx import AsyncHttpxTransport

        return AsyncHttpxTransport(connection, token)
    if connection.is_rest:
        from splitserve.client.over_rest import AsyncRestTransport

        return AsyncRestTransport(connection, token)
    forks.leave_to_us()
    from splitserve.client.over_grpc import async_transport

    return async_transport(connection, token)


class _OnLoop:
    """What belongs to one event loop."""

    def __init__(self, connection: ConnectionOptions, token: AsyncToken, max_concurrency: int | None) -> None:
        self.transport = _transport(connection, token)
        self.slots: contextlib.AbstractAsyncContextManager[Any] = (
            asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
        )
        self.locks: dict[Hashable, asyncio.Lock] = defaultdict(asyncio.Lock)


class AsyncClient(ClientBase):
    """`splitserve.Client` for asyncio: the same arguments, methods and errors, awaited.

    A function given as ``token`` may be async; ``http_client`` is an ``httpx.AsyncClient``, ``channel`` a ``grpc.aio.Channel``.
    Each event loop that it is used in has connections of its own.

    Example::

        async with AsyncClient("http://127.0.0.1:8000") as client:
            answers = await asyncio.gather(*(client.infer("penguins", row) for row in rows))
    """

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        *,
        timeout_s: float | None = 30.0,
        token: AsyncToken = None,
        tls: TLS | None = None,
        compression: Compression = None,
        max_attempts: int = 5,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        headers: Headers = None,
        proxy: str | None = None,
        http_client: httpx.AsyncClient | None = None,
        channel: grpc.aio.Channel | None = None,
        max_concurrency: int | None = MAX_CONCURRENCY,
        retry_on: Collection[type[SplitserveError]] = RETRY_ON,
        text: Text = str,
    ) -> None:
        super().__init__({name: value for name, value in locals().items() if name not in ("self", "__class__")})
        self._max_concurrency = max_concurrency
        self._on_loops: dict[asyncio.AbstractEventLoop, _OnLoop] = {}

    def forked(self) -> None:
        """In a forked child: share nothing with the parent."""
        super().forked()
        for each in self._on_loops.values():
            each.transport.abandon()
        self._on_loops = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. Later calls raise `ClientClosed`.

        Example::

            await client.close()
        """
        self._is_closed = True
        for loop, each in list(self._on_loops.items()):
            if loop is asyncio.get_running_loop():
                await each.transport.close()
            else:
                each.transport.abandon()
        self._on_loops = {}

    async def infer(
        self,
        model: str,
        inputs: Any,
        *,
        version: str | int | None = "",
        outputs: Sequence[str] = (),
        parameters: Mapping[str, Parameter] | None = None,
        request_id: str = "",
        headers: Mapping[str, str] | None = None,
        extra: Extra = "error",
        timeout_s: float | None = None,
        chunk_rows: int | None = None,
        concurrency: int = CONCURRENCY,
        progress: Progress = False,
    ) -> Answer:
        """As `splitserve.Client.infer`. Cancelling it cancels all its requests in flight.

        Example::

            answer = await client.infer("penguins", frame)
        """
        options = RequestOptions(version_name(version), outputs, parameters, request_id, headers, extra, timeout_s)
        inference = InferCall(self._core, model, inputs, options, chunk_rows=chunk_rows)
        if concurrency < 1:
            raise ValueError(f"concurrency: expected at least 1, got {concurrency}")
        with reporting(progress, model) as report:
            async with self._here().slots:
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
                async with self._here().slots:
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
        version: str | int | None = "",
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
        """As `splitserve.Client.submit`.

        Example::

            job = await client.submit("penguins", frame, idempotency_key="2026-12-01")
        """
        steps = jobs.submit(
            self._core,
            model,
            inputs,
            version=version_name(version),
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
        """As `splitserve.Client.job`.

        Example::

            job = await client.job("61ba1554c610b511bc8ae00c6c7c3bf2")
        """
        return AsyncJob(self._core, await self._run(jobs.get(self._core, job_id)), self._run)

    async def jobs(self, *, model: str = "", status: str = "", limit: int = 100, after: str = "") -> list[AsyncJob]:
        """As `splitserve.Client.jobs`.

        Example::

            for job in await client.jobs(status="failed"):
                print(job.id, job.error)
        """
        found = await self._run(jobs.list_jobs(self._core, model=model, status=status, limit=limit, after=after))
        return [AsyncJob(self._core, info, self._run) for info in found]

    async def is_live(self) -> bool:
        """As `splitserve.Client.is_live`.

        Example::

            assert await client.is_live()
        """
        return bool(await self._ask("live"))

    async def is_ready(self) -> bool:
        """As `splitserve.Client.is_ready`.

        Example::

            assert await client.is_ready()
        """
        return bool(await self._ask("ready"))

    async def is_model_ready(self, model: str, version: str | int | None = "") -> bool:
        """As `splitserve.Client.is_model_ready`.

        Example::

            assert await client.is_model_ready("penguins")
        """
        return bool(await self._ask("model_ready", model, version))

    async def metadata(self, model: str, version: str | int | None = "") -> ModelMetadata:
        """As `splitserve.Client.metadata`.

        Example::

            print([tensor.name for tensor in (await client.metadata("penguins")).inputs])
        """
        metadata: ModelMetadata = await self._ask("model_metadata", model, version)
        return metadata

    async def server_metadata(self) -> ServerMetadata:
        """As `splitserve.Client.server_metadata`.

        Example::

            print((await client.server_metadata()).extensions)
        """
        metadata: ServerMetadata = await self._ask("server_metadata")
        return metadata

    async def load(self, model: str) -> None:
        """As `splitserve.Client.load`.

        Example::

            await client.load("penguins")
        """
        await self._ask("load", model)

    async def models(self) -> list[ModelState]:
        """As `splitserve.Client.models`.

        Example::

            print({state.name: state.state for state in await client.models()})
        """
        index: list[ModelState] = await self._ask("index")
        return index

    async def _ask(self, verb: Verb, model: str = "", version: str | int | None = "") -> Any:
        return await self._run(self._core.ask(Ask(verb, model, version_name(version)), self._core.deadline_after(None)))

    async def _run(self, steps: Steps[T]) -> T:
        here = self._here()

        async def once(step: Once) -> Any:
            async with here.locks[step.key]:
                return await self._run(step.steps())

        return await run_async(steps, here.transport.send, asyncio.sleep, once)

    def _here(self) -> _OnLoop:
        """The connections of the running event loop; those of loops that have ended are closed."""
        self._check_open()
        loop = asyncio.get_running_loop()
        here = self._on_loops.get(loop)
        if here is None:
            for ended in [each for each in self._on_loops if each.is_closed()]:
                self._on_loops.pop(ended).transport.abandon()
            here = self._on_loops[loop] = _OnLoop(self._connection, self._token, self._max_concurrency)
        return here
