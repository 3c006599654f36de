"""An `InferenceService` that calls its replicas over gRPC: streams or unary calls, retries, hedges, deadlines."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import grpc
import msgspec
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from splitserve.api.inference import inference_pb2 as pb
from splitserve.catalogue import merged_index
from splitserve.errors import (
    DOMAIN,
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    PairMismatch,
    SplitserveError,
    TooLarge,
    Unavailable,
    Unsupported,
    from_wire,
)
from splitserve.oip import protobuf
from splitserve.oip.limits import MAX_MESSAGE_BYTES
from splitserve.oip.messages import (
    EXPECTED_MANIFEST,
    MANIFEST_SHA256,
    NO_DEADLINE,
    READY,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelState,
    Needed,
    OnAnswer,
    remaining_s,
)
from splitserve.oip.pending import Pending, begin_task
from splitserve.remote.channel import BETWEEN_SERVICES, channel_options, unary_methods
from splitserve.remote.replicas import Replica, Replicas
from splitserve.remote.retry_budget import RetryBudget
from splitserve.remote.stream import StreamKeeper, StreamTarget
from splitserve.telemetry.traces import TraceContext, Tracing
from splitserve.tls import ClientTls, bearer
from splitserve.watched import Watched

MAX_ATTEMPTS = 3
RETRY_BACKOFF_S = 0.02
"""Upper bound of the random pause before another attempt; doubled with each."""

HEDGE_AFTER_S = 1.0
"""A replica that has not answered after this may hang: the request is sent to another one too, and the first answer counts.

Source: gRPC proposal A6, "Hedging policy"."""

RESERVE_SHARE, MAX_RESERVE_S = 0.05, 0.02
"""What each hop keeps of the remaining time, to return the response or the error: this share, up to a maximum in seconds."""

MIN_TIME_S = 0.001
"""With less time left no stage can do anything, and no call is made."""

REASON_TIMEOUT_S = 0.5
"""Timeout of the question why a replica is not ready."""

CONTROL_TIMEOUT_S = 300.0
"""Loading a model may involve downloading it."""

METHODS: dict[str, tuple[Any, Any]] = {
    "ServerReady": (pb.ServerReadyRequest, pb.ServerReadyResponse),
    "ModelReady": (pb.ModelReadyRequest, pb.ModelReadyResponse),
    "ModelMetadata": (pb.ModelMetadataRequest, pb.ModelMetadataResponse),
    "ModelInfer": (pb.ModelInferRequest, pb.ModelInferResponse),
    "RepositoryIndex": (pb.RepositoryIndexRequest, pb.RepositoryIndexResponse),
    "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, pb.RepositoryModelLoadResponse),
    "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest, pb.RepositoryModelUnloadResponse),
}


class InferenceReplica(Replica):
    """A replica with the methods of the protocol, and a stream if it supports one."""

    def __init__(
        self,
        target: str,
        channel: grpc.aio.Channel,
        stream_target: StreamTarget,
        on_change: Callable[[], None],
        metadata: Sequence[tuple[str, str]],
        on_stream: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(target, channel, on_change)
        self.metadata = metadata
        self.offers: dict[tuple[str, str], str] | None = None
        """The digest of each version that was ready in its last index, "" if it has none; None while unknown."""
        self.keeper = StreamKeeper(channel, stream_target, on_stream)
        self.methods = unary_methods(channel, protobuf.SERVICE, METHODS)

    @property
    def worker(self) -> tuple[int, int] | None:
        """Index and count of the process, among those that share the address; None until a stream is open."""
        return self.keeper.worker if self.keeper.stream is not None else None

    def has(self, model: str, version: str, manifest_sha256: str = "") -> bool:
        """Whether it can be expected to serve a version, by its last index."""
        if self.offers is None or not version:
            return True
        digest = self.offers.get((model, version))
        return digest is not None and (not manifest_sha256 or not digest or digest == manifest_sha256)

    async def close(self) -> None:
        await self.keeper.close()
        await super().close()


class RemoteInference:
    """A service reached over gRPC. Call it inside its ``async with``.

    A call goes to the replica with the fewest calls in flight, on its stream if there is one. Calls that fail because a replica
    is gone are retried on another one, within a retry budget.

    Args:
        target: as for `Replicas`, e.g. ``dns:///predict:8021``.
        stage: of the peer, for errors that it did not raise itself.
        max_message_bytes: the largest message sent or received.
        poll_timeout_s: timeout of calls other than inference.
        tls: files of the channels, read again when they change; None: plain text.
        token: sent with every call.
        hedge_after_s: after how long without a response another replica is called too.
        replicas: as for `Replicas`: how and how often names are resolved, and how long a call waits for a replica.
    """

    def __init__(
        self,
        target: str,
        *,
        stage: str,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        poll_timeout_s: float = 5.0,
        tls: ClientTls | None = None,
        token: str = "",
        hedge_after_s: float = HEDGE_AFTER_S,
        **replicas: Any,
    ) -> None:
        self.target = target
        self._stage = stage
        self._max_message_bytes = max_message_bytes
        self._options = channel_options(max_message_bytes, BETWEEN_SERVICES)
        self._poll_timeout_s = poll_timeout_s
        self._tls = tls
        self._files = Watched(tls.files, lambda: (tls.credentials(), tls.ssl_context())) if tls else None
        self._metadata = (*bearer(token), (protobuf.CALLER_KEY, "1"))
        self._budget = RetryBudget()
        self.n_streams_opened = 0
        """Since the start, to all replicas."""
        self._hedge_after_s = hedge_after_s
        self._replicas = Replicas(target, stage=stage, connect=self._connect, is_stale=self._has_new_files, **replicas)
        self.is_loaded = True

    def _connect(self, target: str, authority: str, on_change: Callable[[], None]) -> InferenceReplica:
        channel = self._channel(target, authority, self._options)
        stream_target = StreamTarget(
            target,
            stage=self._stage,
            authority=authority,
            metadata=self._metadata,
            max_message_bytes=self._max_message_bytes,
            context=self._files.value[1] if self._files else None,
            server_name=self._tls.server_name if self._tls else "",
        )
        return InferenceReplica(target, channel, stream_target, on_change, self._metadata, self._stream_opened)

    def _stream_opened(self) -> None:
        self.n_streams_opened += 1

    def _channel(self, target: str, authority: str, options: list[tuple[str, Any]]) -> grpc.aio.Channel:
        authority = (self._tls.server_name if self._tls else "") or authority
        options = options + ([("grpc.default_authority", authority)] if authority else [])
        if self._files is None or self._tls is None:
            return grpc.aio.insecure_channel(target, options)
        return grpc.aio.secure_channel(target, self._files.value[0], [*options, *self._tls.options()])

    def _has_new_files(self) -> bool:
        """Whether the credentials of open channels are outdated: a channel keeps those that it was created with."""
        return self._files is not None and self._files.has_changed()

    async def __aenter__(self) -> RemoteInference:
        await self._replicas.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._replicas.close()

    @property
    def stage(self) -> str:
        """The stage that it calls."""
        return self._stage

    @property
    def retries(self) -> Mapping[str, int]:
        """Further attempts of calls, by kind: "retry", "hedge", and those that the budget "refused"."""
        return self._budget.counts

    @property
    def n_channels(self) -> int:
        """Replicas behind the name, ready or not, each process of one that has several."""
        return self._replicas.n_channels

    @property
    def n_replicas(self) -> int:
        """Replicas that accept calls at present."""
        return len(self._replicas.usable())

    @property
    def n_streams(self) -> int:
        """Those of them with an open stream; the others get unary calls."""
        return sum(replica.keeper.stream is not None for replica in self._replicas.usable())

    def begin(self, request: InferRequest, on_answer: OnAnswer) -> Pending:
        """As `infer`, in a task."""
        return begin_task(partial(self.infer, request), on_answer)

    async def infer(self, request: InferRequest) -> InferResponse:
        """Call ModelInfer, or send it on a stream, with the remaining time less a reserve.

        Raises:
            DeadlineExceeded: the deadline has passed, before the call or during it.
            Unavailable: no replica can be reached, or `MAX_ATTEMPTS` or the retry budget are exhausted.
            SplitserveError: raised by the peer.
        """
        timeout_s = remaining_s(request.deadline)
        if timeout_s < MIN_TIME_S:
            raise DeadlineExceeded(f"deadline exceeded before {self._stage} was called")
        if request.deadline != NO_DEADLINE:
            reserve_s = min(MAX_RESERVE_S, RESERVE_SHARE * timeout_s)
            request = msgspec.structs.replace(request, deadline=request.deadline - reserve_s)
            timeout_s -= reserve_s
        try:  # deadlines are on the clock of the event loop, asyncio's and uvloop's
            async with asyncio.timeout_at(None if request.deadline == NO_DEADLINE else request.deadline):
                return await self._infer_with_retries(request, timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"the {self._stage} service did not answer in time", stage=self._stage) from None

    async def _infer_with_retries(self, request: InferRequest, timeout_s: float) -> InferResponse:
        tried: list[InferenceReplica] = []
        expected = str(request.parameters.get(EXPECTED_MANIFEST, "")) if request.parameters else ""

        def suits(replica: InferenceReplica) -> bool:
            return replica.has(request.model, request.version, expected)

        while True:
            replica = await self._replicas.pick(but=tried, wait_s=timeout_s, suits=suits)
            tried.append(replica)
            try:
                response = await self._infer_hedged(request, replica, suits)
            except NotFound:
                # Replicas poll out of phase, and are replaced one by one: another one may have the version.
                if replica.offers is not None:
                    replica.offers.pop((request.model, request.version), None)
                others = [each for each in self._replicas.usable() if each not in tried]
                if len(tried) == MAX_ATTEMPTS or not others or not self._budget.take():
                    raise
            except Unavailable as error:
                if error.stage != self._stage or len(tried) == MAX_ATTEMPTS or not self._budget.take():
                    raise
                self._replicas.avoid(replica)
                if self.n_replicas < 2:
                    await asyncio.sleep(random.uniform(0, RETRY_BACKOFF_S * 2 ** len(tried)))  # noqa: S311
            else:
                self._budget.give()
                return response

    async def _infer_hedged(
        self, request: InferRequest, replica: InferenceReplica, suits: Callable[[InferenceReplica], bool]
    ) -> InferResponse:
        """On this replica; if it does not answer for long, on another one too."""
        if self.n_replicas < 2:
            return await self._infer_on(request, replica)
        calls = [asyncio.ensure_future(self._infer_on(request, replica))]
        try:
            await asyncio.wait(calls, timeout=self._hedge_after_s)
            if not calls[0].done() and self.n_replicas > 1 and self._budget.take("hedge"):
                self._replicas.avoid(replica)
                other = await self._replicas.pick(but=[replica], suits=suits)
                calls.append(asyncio.ensure_future(self._infer_on(request, other)))
            return await _first_answer(calls)
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    async def _infer_on(self, request: InferRequest, replica: InferenceReplica) -> InferResponse:
        if request.trace is not None and request.trace.span is not None:
            return await self._infer_traced(request, request.trace, replica)
        raws = None
        replica.call_started()
        try:
            if (stream := replica.keeper.stream) is not None:
                message, raws = await stream.infer(request)
            else:
                timeout_s = None if request.deadline == NO_DEADLINE else remaining_s(request.deadline)
                metadata = replica.metadata if request.trace is None else (*replica.metadata, *request.trace.items())
                message = await replica.methods["ModelInfer"](
                    protobuf.encode_request(request), timeout=timeout_s, metadata=metadata
                )
        except grpc.aio.AioRpcError as error:
            raise translate(error, self._stage) from error
        finally:
            replica.call_ended()
        message = _parsed(message, self._stage)
        message.id = request.id
        try:
            return protobuf.decode_response(message, raws)
        except InvalidInput as error:  # not the caller's fault
            raise PairMismatch(error.message, stage=self._stage) from error

    async def _infer_traced(self, request: InferRequest, trace: TraceContext, replica: InferenceReplica) -> InferResponse:
        """As `_infer_on`, with a span for this attempt."""
        if (tracer := Tracing.tracer) is None:
            return await self._infer_on(
                msgspec.structs.replace(request, trace=msgspec.structs.replace(trace, span=None)), replica
            )
        method = f"{protobuf.SERVICE}/{'ModelInfer' if replica.keeper.stream is None else 'ModelStreamInfer'}"
        call = tracer.child(
            trace,
            "client",
            method,
            {
                "rpc.system.name": "grpc",
                "rpc.method": method,
                **server_of(replica.target),
                "splitserve.model": request.model,
                "splitserve.release": request.version,
                "splitserve.rows": request.n_rows,
            },
        )
        with tracer.ending(call):
            return await self._infer_on(msgspec.structs.replace(request, trace=msgspec.structs.replace(call, span=None)), replica)

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """Call ModelMetadata of a replica that has the version, if that is known."""
        request = pb.ModelMetadataRequest(name=model, version=version)
        suits = partial(InferenceReplica.has, model=model, version=version)
        return protobuf.decode_metadata(await self._call_any("ModelMetadata", request, suits=suits))

    async def is_ready(self, model: str, version: str = "") -> bool:
        """Call ModelReady."""
        return bool((await self._call_any("ModelReady", pb.ModelReadyRequest(name=model, version=version))).ready)

    async def index(self) -> list[ModelState]:
        """Call RepositoryIndex of every replica: a version is ready if it is on one of them."""
        return merged_index(await self.indexes())

    async def indexes(self, needed: Needed = ()) -> list[list[ModelState]]:
        """The index of each replica that answers. Calls for a version go to those that have it from then on.

        Args:
            needed: versions that each replica is asked to hold.

        Raises:
            Unavailable: none answers.
            SplitserveError: all refuse; one of their errors.
        """
        await self._ready()
        replicas = self._replicas.usable()
        request = protobuf.encode_index_request(needed)
        calls = [self._call(each, "RepositoryIndex", request, self._poll_timeout_s) for each in replicas]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        found = []
        for replica, answer in zip(replicas, answers, strict=True):
            if not isinstance(answer, BaseException):
                states = protobuf.decode_index(answer)
                replica.offers = {
                    (state.name, state.version): state.properties.get(MANIFEST_SHA256, "")
                    for state in states
                    if state.state == READY
                }
                found.append(states)
            elif not isinstance(answer, SplitserveError):
                raise answer
        if not found:
            raise next(answer for answer in answers if isinstance(answer, BaseException))
        return found

    async def _ready(self) -> None:
        """Wait for a replica that accepts calls.

        Raises:
            Unavailable: there is none; it says why.
        """
        try:
            await self._replicas.pick()
        except Unavailable:
            raise Unavailable(await self._unavailable_reason(), stage=self._stage) from None

    async def load(self, model: str) -> None:
        """Call RepositoryModelLoad of every replica."""
        await self._call_all("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=model))

    async def unload(self, model: str) -> None:
        """Call RepositoryModelUnload of every replica."""
        await self._call_all("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=model))

    async def not_ready_reason(self) -> str:
        """Call ServerReady."""
        try:
            response = await self._call_any("ServerReady", pb.ServerReadyRequest())
        except Unsupported:  # a third-party server may not have it
            return ""
        except SplitserveError as error:
            return error.message
        return "" if response.ready else await self._unavailable_reason()

    async def _unavailable_reason(self) -> str:
        """Why no replica accepts calls, by what one of them says on a channel without health checks."""
        targets = self._replicas.targets()
        reasons = [reason for target in targets if (reason := await self._not_ready_reason_of(*target))]
        if not reasons:
            return f"the {self._stage} service cannot be reached"
        return f"the {self._stage} service is not ready: {reasons[0]}"

    async def _not_ready_reason_of(self, target: str, authority: str) -> str:
        async with self._channel(target, authority, [("grpc.service_config", "{}")]) as channel:
            ask: Any = channel.unary_unary(f"/{protobuf.SERVICE}/ServerReady")
            call = ask(b"", timeout=REASON_TIMEOUT_S, metadata=self._metadata)
            try:
                await call
            except grpc.aio.AioRpcError:
                return ""
            reason = {str(key): value for key, value in await call.trailing_metadata() or ()}.get(protobuf.REASON_KEY, b"")
            return reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)

    async def _call_any(self, method: str, request: Any, *, suits: Callable[[InferenceReplica], bool] | None = None) -> Any:
        """The answer of one replica; another one is called if it is unreachable, or does not know the model or version."""
        tried: list[InferenceReplica] = []
        while True:
            try:
                replica = await self._replicas.pick(but=tried, suits=suits)
            except Unavailable:
                raise Unavailable(await self._unavailable_reason(), stage=self._stage) from None
            tried.append(replica)
            try:
                return await self._call(replica, method, request, self._poll_timeout_s)
            except NotFound:
                if len(tried) == MAX_ATTEMPTS or all(each in tried for each in self._replicas.usable()):
                    raise
            except Unavailable:
                if len(tried) == MAX_ATTEMPTS:
                    raise

    async def _call_all(self, method: str, request: Any) -> None:
        await self._replicas.pick()
        calls = [self._call(replica, method, request, CONTROL_TIMEOUT_S) for replica in self._replicas.usable()]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def _call(self, replica: InferenceReplica, method: str, request: Any, timeout_s: float) -> Any:
        try:
            answer = await replica.methods[method](request, timeout=timeout_s, metadata=replica.metadata)
        except grpc.aio.AioRpcError as error:
            raise translate(error, self._stage) from error
        return _parsed(answer, self._stage)


def server_of(target: str) -> dict[str, str | int]:
    """The attributes of a span that name a replica, e.g. ``ipv4:10.0.0.7:8011``. Source: OpenTelemetry, "Server attributes"."""
    host, _, port = target.rpartition(":")
    if not port.isdecimal():
        return {"server.address": target}
    return {"server.address": re.sub(r"^(ipv[46]:|dns:(//[^/]*/)?)", "", host).strip("[]"), "server.port": int(port)}


def _parsed(answer: Any, stage: str) -> Any:
    """The response; grpc.aio returns None if it cannot parse it."""
    if answer is None:
        raise PairMismatch(f"the {stage} service returned a malformed message", stage=stage)
    return answer


async def _first_answer(calls: Iterable[asyncio.Future[InferResponse]]) -> InferResponse:
    """The first result that is not `Unavailable`; `Unavailable` if all are."""
    pending = set(calls)
    while True:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for call in done:
            if not pending or not isinstance(call.exception(), Unavailable):
                return call.result()


def translate(error: grpc.RpcError, stage: str) -> SplitserveError:
    """The error that the peer raised, or one for a call that did not reach it.

    Args:
        error: of a failed call.
        stage: of the peer.
    """
    reason, metadata = _error_info(error.trailing_metadata())
    message = error.details() or ""
    if reason:
        return from_wire(error.code().name, message, reason, metadata)
    # CANCELLED that the peer did not raise: it stopped when the call arrived. The texts of both contain addresses.
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return Unavailable(f"the {stage} service cannot be reached", stage=stage)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"the {stage} service did not answer in time", stage=stage)
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:  # gRPC's own limit
        return TooLarge(f"the message to or from {stage} is larger than its limit", stage=stage)
    return from_wire(error.code().name, message, metadata={"stage": stage})


def _error_info(metadata: Iterable[Any] | None) -> tuple[str, dict[str, str]]:
    """Reason and metadata of a response's ErrorInfo, if it is one of ours."""
    for key, value in metadata or ():
        if key == protobuf.DETAILS_KEY and isinstance(value, bytes):
            try:
                details = status_pb2.Status.FromString(value).details
            except DecodeError:
                continue
            for detail in details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info) and info.domain == DOMAIN:
                    return info.reason, dict(info.metadata)
    return "", {}
