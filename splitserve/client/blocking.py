"""The blocking client. `splitserve.client.awaiting` is the same for asyncio."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from splitserve.client import forks, jobs
from splitserve.client.answer import Answer, Text
from splitserve.client.base import MAX_CONCURRENCY, ClientBase, version_name
from splitserve.client.connection import TLS, Compression, ConnectionOptions, Headers, Token
from splitserve.client.encoding import Extra
from splitserve.client.inference import InferCall, Outputs, RequestOptions
from splitserve.client.jobs import Job
from splitserve.client.progress import Progress, ReportProgress, reporting
from splitserve.client.retries import RETRY_ON
from splitserve.client.steps import Ask, Once, Send, Steps, Verb, run
from splitserve.client.stop import Stop
from splitserve.errors import SplitserveError
from splitserve.oip.limits import MAX_MESSAGE_BYTES
from splitserve.oip.messages import ModelMetadata, ModelState, Parameter, ServerMetadata

if TYPE_CHECKING:
    import grpc
    import httpx

T = TypeVar("T")

CONCURRENCY = 4
"""Requests of one ``infer`` in flight at once."""


class _BlockingTransport(Protocol):
    def send(self, step: Send, stop: Stop | None) -> Any: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...


def _transport(connection: ConnectionOptions, token: Token) -> _BlockingTransport:
    """Imports only what the connection needs."""
    if connection.http_client is not None or (connection.is_rest and connection.proxy):
        from splitserve.client.over_httpx import HttpxTransport

        return HttpxTransport(connection, token)
    if connection.is_rest:
        from splitserve.client.over_rest import RestTransport

        return RestTransport(connection, token)
    forks.leave_to_us()
    from splitserve.client.over_grpc import blocking_transport

    return blocking_transport(connection, token)


class Client(ClientBase):
    """A connection to a proxy, or to any server of the Open Inference Protocol. Thread-safe.

    Requests that did not reach a model (UNAVAILABLE, 503, no connection) are retried with exponential backoff, within their
    deadline and the client's retry budget; those that an overloaded server refused (429), until their deadline. A client that is
    pickled or copied is made again from its arguments; a forked child has connections of its own.

    Example::

        with Client("http://127.0.0.1:8000") as client:
            print(client.infer("penguins", frame)["label"])

    Args:
        url: ``http://…`` or ``https://…`` for REST; ``grpc://…``, ``grpcs://…`` or a gRPC name, e.g. ``127.0.0.1:8001``.
        timeout_s: of a request, including its retries; it begins when the request may be sent (``max_concurrency``). None or
            infinity: no limit.
        token: a bearer token, or a function that returns one for each request.
        tls: certificates, if the server's is not signed by a well-known authority, or if it requires one of the client.
        compression: ``"gzip"`` compresses requests and accepts compressed responses.
        max_attempts: of one request; 1: no retries.
        max_message_bytes: the largest message sent or received.
        headers: sent with every request, or a function that returns them; over gRPC as metadata.
        proxy: URL of an HTTP proxy between here and the server.
        http_client: an ``httpx.Client`` of your own to send with; it stays open. For REST.
        channel: a ``grpc.Channel`` of your own to send on; it stays open. For gRPC.
        max_concurrency: requests in flight at once, others wait here; None: no limit.
        retry_on: the errors after which a request is retried.
        text: ``bytes``: text outputs are not decoded.

    Raises:
        ValueError: an option is invalid; the message names it.
    """

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        *,
        timeout_s: float | None = 30.0,
        token: Token = None,
        tls: TLS | None = None,
        compression: Compression = None,
        max_attempts: int = 5,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        headers: Headers = None,
        proxy: str | None = None,
        http_client: httpx.Client | None = None,
        channel: grpc.Channel | None = None,
        max_concurrency: int | None = MAX_CONCURRENCY,
        retry_on: Collection[type[SplitserveError]] = RETRY_ON,
        text: Text = str,
    ) -> None:
        super().__init__({name: value for name, value in locals().items() if name not in ("self", "__class__")})
        self._max_concurrency = max_concurrency
        self._renew()
        self._transport: _BlockingTransport | None = _transport(self._connection, self._token)

    def _renew(self) -> None:
        """Locks that no other thread holds."""
        self._lock = threading.Lock()
        limit = self._max_concurrency
        self._slots: contextlib.AbstractContextManager[Any] = threading.Semaphore(limit) if limit else contextlib.nullcontext()
        self._locks: dict[Hashable, threading.Lock] = defaultdict(threading.Lock)

    def forked(self) -> None:
        """In a forked child: share nothing with the parent."""
        super().forked()
        self._renew()
        if self._transport is not None:
            self._transport.abandon()
            self._transport = None  # the first call makes another one

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Later calls raise `ClientClosed`.

        Example::

            client.close()
        """
        self._is_closed = True
        if self._transport is not None:
            self._transport.close()

    def infer(
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
        """Infer.

        The inputs are converted to the datatypes of the model's signature, which is fetched once. A table of many rows is sent in
        several requests, all to the version that answers the first; the first that fails ends the others.

        Example::

            answer = client.infer("penguins", pandas.read_csv("penguins.csv"))
            answer["label"], answer.to_frame()

        Args:
            model: its name.
            inputs: a DataFrame (pandas, polars), a Table or RecordBatch of pyarrow, a dict of columns, a list of dicts: each
                column an input, or together the rows of a model's only input. Or one row of those: a Series, a dict of values. Or
                rows without names: an array, a list of rows, a sparse matrix, one row, images (arrays, PIL, paths, bytes).
                None, NaN, NA and masked values are missing values.
            version: a pair, ``"K.M"``, or another server's version; by default the server chooses.
            outputs: names of the requested outputs; all by default.
            parameters: of the request.
            request_id: of the request, and its header ``X-Request-Id``: what logs of servers show.
            headers: of this call, beside those of the client.
            extra: ``"drop"`` leaves out columns that the model does not have; by default they are an error.
            timeout_s: of each request, in place of the client's; infinity: no limit.
            chunk_rows: rows of a request at most; 0: no limit. By default about 1 MiB of rows, if the rows are independent: for a
                DataFrame, or according to the signature.
            concurrency: requests in flight at once.
            progress: True shows a progress bar (requires rich); a function is called with the rows done and the total.

        Returns:
            Arrays by output name, see `Answer`; ``.to_frame()`` converts them to a DataFrame.

        Raises:
            SplitserveError: a subclass, see `splitserve.errors`; the message names the rows if it concerns some of them.
            ValueError: an option is invalid; the message names it.
            ClientClosed: the client was closed.
        """
        options = RequestOptions(version_name(version), outputs, parameters, request_id, headers, extra, timeout_s)
        inference = InferCall(self._core, model, inputs, options, chunk_rows=chunk_rows)
        if concurrency < 1:
            raise ValueError(f"concurrency: expected at least 1, got {concurrency}")
        with reporting(progress, model) as report:
            with self._slots:
                first = self._run(inference.begin())
            report(inference.n_rows - sum(map(len, inference.rest)), inference.n_rows)
            rest = self._run_chunks(inference, concurrency, report) if inference.rest else []
        return inference.answer([first, *rest])

    def _run_chunks(self, inference: InferCall, concurrency: int, report: ReportProgress) -> list[Outputs]:
        """The outputs of each chunk, in order.

        When one fails, no further one is sent; those in flight are cancelled over gRPC and awaited over REST, so that none is in
        flight when this returns.
        """
        stop = Stop()
        with ThreadPoolExecutor(min(concurrency, len(inference.rest)), "splitserve-infer") as pool:
            try:
                futures = {pool.submit(self._run_chunk, inference, rows, stop): len(rows) for rows in inference.rest}
                n_done = inference.n_rows - sum(futures.values())
                for future in as_completed(futures):
                    future.result()
                    n_done += futures[future]
                    report(n_done, inference.n_rows)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                stop.set()
                if stop.cause is not None:  # not the `Cancelled` of another chunk
                    raise stop.cause from stop.cause.__cause__
                raise
        return [future.result() for future in futures]

    def _run_chunk(self, inference: InferCall, rows: range, stop: Stop) -> Outputs:
        stop.check()
        try:
            with self._slots:
                return self._run(inference.chunk(rows), stop)
        except Exception as error:
            stop.set(error)  # at once: this thread may take the next chunk before the caller's thread runs
            raise

    def submit(
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
    ) -> Job:
        """Submit a job: an inference whose answer is fetched later. It is on disk when this returns.

        Inputs are encoded as by `infer`, and sent in one request.

        Args:
            model: its name.
            inputs: as for `infer`.
            version: a pair; by default the one that serves now, also if the job runs later.
            outputs: names of the requested outputs; all by default.
            parameters: of the request.
            idempotency_key: the same key with the same request gives the same job; made up by default.
            priority: among jobs: 1, the highest, to 9.
            job_timeout_s: how long an attempt may take; 0: the service's default.
            expires_s: how long the job may be queued; 0: any time.
            webhook: https URL that is told when the job has ended.
            webhook_events: some of job.succeeded, job.failed, job.cancelled; all by default.
            timeout_s: of the submit, in place of the client's. It does not bound the job.

        Raises:
            SplitserveError: as `infer`; `Unsupported` if the server has no jobs.

        Example::

            job = client.submit("penguins", frame)
            answer = job.result()
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
        return Job(self._core, self._run(steps), self._run)

    def job(self, job_id: str) -> Job:
        """A job, by its id.

        Example::

            client.job(job.id).status

        Raises:
            NotFound: there is none of the caller's.
        """
        return Job(self._core, self._run(jobs.get(self._core, job_id)), self._run)

    def jobs(self, *, model: str = "", status: str = "", limit: int = 100, after: str = "") -> list[Job]:
        """The caller's jobs, the newest first.

        Args:
            model: only those for this model.
            status: only those in this state.
            limit: how many.
            after: those that follow the job with this id.

        Example::

            [job.id for job in client.jobs(status="failed")]
        """
        found = self._run(jobs.list_jobs(self._core, model=model, status=status, limit=limit, after=after))
        return [Job(self._core, info, self._run) for info in found]

    def is_live(self) -> bool:
        """Whether the server is live.

        Example::

            client.is_live()  # True

        Raises:
            SplitserveError: the server cannot be reached.
        """
        return bool(self._ask("live"))

    def is_ready(self) -> bool:
        """Whether at least one model is ready.

        Example::

            while not client.is_ready():
                time.sleep(1)

        Raises:
            SplitserveError: the server cannot be reached.
        """
        return bool(self._ask("ready"))

    def is_model_ready(self, model: str, version: str | int | None = "") -> bool:
        """Whether this model, or this version of it, is ready; False if there is none of the name.

        Example::

            client.is_model_ready("penguins", "1.1")

        Raises:
            SplitserveError: the server cannot be reached.
        """
        return bool(self._ask("model_ready", model, version))

    def metadata(self, model: str, version: str | int | None = "") -> ModelMetadata:
        """Signature of a model.

        Example::

            [spec.name for spec in client.metadata("penguins").inputs]

        Raises:
            SplitserveError: as `infer`.
        """
        metadata: ModelMetadata = self._ask("model_metadata", model, version)
        return metadata

    def server_metadata(self) -> ServerMetadata:
        """Name, version and extensions of the server.

        Example::

            client.server_metadata().version

        Raises:
            SplitserveError: as `infer`.
        """
        metadata: ServerMetadata = self._ask("server_metadata")
        return metadata

    def load(self, model: str) -> None:
        """Have the server poll its model repository now, and serve the model again if it was unloaded.

        Raises:
            PermissionDenied: the server does not permit it (``ALLOW_REPOSITORY_CONTROL``).

        Example::

            client.load("penguins")
        """
        self._ask("load", model)

    def models(self) -> list[ModelState]:
        """Every version of every model that the server knows, with its state.

        Example::

            {state.name for state in client.models() if state.state == "READY"}

        Raises:
            SplitserveError: as `infer`.
        """
        index: list[ModelState] = self._ask("index")
        return index

    def _ask(self, verb: Verb, model: str = "", version: str | int | None = "") -> Any:
        return self._run(self._core.ask(Ask(verb, model, version_name(version)), self._core.deadline_after(None)))

    def _run(self, steps: Steps[T], stop: Stop | None = None) -> T:
        self._check_open()
        send = (self._transport or self._connected()).send

        def once(step: Once) -> Any:
            with self._locks[step.key]:
                return self._run(step.steps(), stop)

        if stop:
            return run(steps, lambda step: send(step, stop), stop.wait, once)
        return run(steps, lambda step: send(step, None), once=once)

    def _connected(self) -> _BlockingTransport:
        with self._lock:
            if self._transport is None:
                self._transport = _transport(self._connection, self._token)
            return self._transport
