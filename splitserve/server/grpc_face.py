"""The gRPC face: serves any `InferenceService` as the Open Inference Protocol, with grpc.health.v1 and reflection.

Methods get and give bytes, so that a message that does not parse is answered like any other bad input.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any

import grpc
import structlog
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from splitserve import classification, oip_grpc
from splitserve.api.inference import inference_pb2 as pb
from splitserve.errors import DOMAIN, Internal, InvalidInput, PermissionDenied, SplitserveError, Unsupported, at_stage
from splitserve.limits import Limits, check_model_name
from splitserve.model_config import config_of
from splitserve.oip import (
    CONTROL_PARAMETERS,
    NO_DEADLINE,
    READY,
    InferenceService,
    InferRequest,
    InferResponse,
    ServerMetadata,
    deadline_after,
)
from splitserve.server import reflection
from splitserve.server.byte_budget import ByteBudget
from splitserve.server.callers import Authenticator
from splitserve.server.infer_stream import InferStreams
from splitserve.server.logs import RequestLine
from splitserve.server.tls import HANDSHAKE_TIMEOUT_S, ServerTls, add_port
from splitserve.statistics import Statistics

DETAILS_KEY = "grpc-status-details-bin"
"""Source: gRPC, "Richer error model": a ``google.rpc.Status`` in the trailing metadata."""

PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Source: gRPC proposal A6: how long a client waits before its next attempt."""

HEALTH_INTERVAL_S = 0.2

SILENT_S = 5.0
"""A connection that has been silent for so long is asked for a sign of life, and closed if none comes in as long again."""

_MAX_REASON_LENGTH = 1000

_OPEN = ("ServerLive", "ServerReady", "ServerMetadata")
"""What anyone may ask; grpc.health.v1 and reflection are open too."""

Context = grpc.aio.ServicerContext[bytes, bytes]
Call = Callable[[bytes, Context], Awaitable[bytes]]


class GrpcFace:
    """A gRPC server in front of a service; entered, it listens; left, it is gone.

    Health: ``""`` is SERVING while something can be inferred, ``inference.GRPCInferenceService`` while calls are taken: from the
    end of the first loading until draining begins.

    Args:
        service: what is served.
        stage: the name that errors carry, e.g. ``"predict"``.
        address: ``host:port``; port 0 takes a free one, see `port`.
        metadata: what ServerMetadata answers.
        max_message_bytes: the largest message taken or given.
        default_timeout_s: the deadline of callers that set none; 0: none.
        retry_after_s: at the edge, how long clients are told to wait before they retry. 0 between stages: there a caller may try
            another replica at once, but not for what went wrong further on, which has been retried there.
        max_timeout_s: the longest that callers may ask for.
        allow_control: take requests to load and unload models.
        statistics: what the service counts, if it does.
        tls: files of the listener; None: plain text.
        limits: of requests.
        authenticator: learns who calls; None: nobody is asked.
        budget: of the bytes that requests hold; None: each is bounded by itself only.
        options: of the gRPC server, besides those that it always has.
        shares_port: with other processes of the service.
    """

    def __init__(
        self,
        service: InferenceService,
        *,
        stage: str,
        address: str,
        metadata: ServerMetadata,
        max_message_bytes: int,
        default_timeout_s: float = 0.0,
        retry_after_s: float = 0.0,
        max_timeout_s: float = NO_DEADLINE,
        allow_control: bool = False,
        statistics: Statistics | None = None,
        tls: ServerTls | None = None,
        limits: Limits | None = None,
        authenticator: Authenticator | None = None,
        budget: ByteBudget | None = None,
        options: Sequence[tuple[str, Any]] = (),
        shares_port: bool = False,
    ) -> None:
        self._service = service
        self._stage = stage
        self._metadata = metadata
        self._default_timeout_s = default_timeout_s
        self._max_timeout_s = max_timeout_s
        self._statistics = statistics
        self._retry_after_s = retry_after_s
        self._allow_control = allow_control
        self._limits = limits or Limits()
        self._authenticator = authenticator
        self._budget = budget or ByteBudget(sys.maxsize)
        self._log = structlog.get_logger()
        self._health = health.aio.HealthServicer()
        self._is_draining = False
        self._reported_reason: str | None = None
        self._watching: asyncio.Task[None] | None = None
        self._streams = InferStreams(self._answer_on_stream)
        self._server = grpc.aio.server(options=[*_server_options(max_message_bytes, shares_port), *options])
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(oip_grpc.SERVICE, self._handlers()),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.add_to(self._server, (oip_grpc.SERVICE, health.SERVICE_NAME), (pb.DESCRIPTOR, health_pb2.DESCRIPTOR))
        try:
            self.port = add_port(self._server, address, tls)
        except RuntimeError:
            raise SystemExit(f"can not listen on {address}: is another process there?") from None

    async def __aenter__(self) -> GrpcFace:
        await self._server.start()
        self._watching = asyncio.create_task(self._watch_health())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._watching is not None:
            self._watching.cancel()
        await self._server.stop(None)

    async def drain(self, *, delay_s: float, grace_s: float) -> None:
        """Say "not ready", serve on for ``delay_s``, then refuse new calls and give those in flight ``grace_s`` to finish."""
        self._is_draining = True
        await self._set_health()
        await asyncio.sleep(delay_s)
        self._streams.stop()
        await self._server.stop(grace_s)

    async def _watch_health(self) -> None:
        while True:
            await self._set_health()
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def _set_health(self) -> None:
        reason = "draining" if self._is_draining else await self._service.not_ready_reason()
        self._report(reason)
        takes_calls = not self._is_draining and self._service.is_loaded
        for name, serving in (("", not reason), (oip_grpc.SERVICE, takes_calls)):
            status = health_pb2.HealthCheckResponse
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    def _report(self, reason: str) -> None:
        """A line when readiness changes, or why it is missing does."""
        if reason != self._reported_reason:
            self._reported_reason = reason
            if reason:
                self._log.info("not ready", reason=reason)
            else:
                self._log.info("ready")

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler[bytes, bytes]]:
        methods: dict[str, Call] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._model_infer,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._repository_model_load,
            "RepositoryModelUnload": self._repository_model_unload,
        }
        return {
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._streams.serve),
            **{name: grpc.unary_unary_rpc_method_handler(self._answering(call, name in _OPEN)) for name, call in methods.items()},
        }

    def _answering(self, call: Call, is_open: bool) -> Call:
        """Errors become statuses here and nowhere else."""

        async def answer(data: bytes, context: Context) -> bytes:
            try:
                with at_stage(self._stage):
                    if self._authenticator is not None:
                        await self._authenticator.authenticate(_credentials(context), is_open=is_open)
                    return await call(data, context)
            except SplitserveError as error:
                failure = error
            self._note(failure)
            return await context.abort(grpc.StatusCode[failure.grpc_code], failure.message, self._trailing_metadata(failure))

        return answer

    def _note(self, failure: SplitserveError) -> None:
        """The caller does not learn what went wrong inside; the log does."""
        if isinstance(failure, Internal):
            self._log.error("internal error", stage=failure.stage, exc_info=failure)

    async def _answer_on_stream(self, data: bytes, context: Context) -> bytes:
        """The same on a stream, where an error is an answer."""
        identity = ""
        try:
            with at_stage(self._stage):
                if self._authenticator is not None:
                    await self._authenticator.authenticate(_credentials(context), is_open=False)
                message = oip_grpc.parse(pb.ModelInferRequest, data)
                identity = message.id
                with self._budget.share() as share:
                    share.take(len(data))
                    request = oip_grpc.decode_request(message, self._deadline(None), context.peer())
                    return oip_grpc.encode_stream_response(await self._infer(request), identity)
        except SplitserveError as failure:
            self._note(failure)
            return oip_grpc.encode_stream_error(identity, failure)

    def _trailing_metadata(self, error: SplitserveError) -> tuple[tuple[str, str | bytes], ...]:
        metadata: tuple[tuple[str, str | bytes], ...] = ((DETAILS_KEY, _rich_status(error)),)
        if error.is_retryable and self._retry_after_s:
            metadata += ((PUSHBACK_KEY, str(round(self._retry_after_s * 1000))),)
        elif error.is_retryable and error.stage != self._stage:
            metadata += ((PUSHBACK_KEY, "-1"),)
        return metadata

    async def _server_live(self, data: bytes, context: Context) -> bytes:
        return pb.ServerLiveResponse(live=True).SerializeToString()

    async def _server_ready(self, data: bytes, context: Context) -> bytes:
        reason = "draining" if self._is_draining else await self._service.not_ready_reason()
        if reason:
            context.set_trailing_metadata(((oip_grpc.REASON_KEY, reason[:_MAX_REASON_LENGTH].encode()),))
        return pb.ServerReadyResponse(ready=not reason).SerializeToString()

    async def _model_ready(self, data: bytes, context: Context) -> bytes:
        request = oip_grpc.parse(pb.ModelReadyRequest, data)
        is_ready = not self._is_draining and any(
            state.state == READY and state.name == request.name and request.version in ("", state.version)
            for state in await self._service.index()
        )
        return pb.ModelReadyResponse(ready=is_ready).SerializeToString()

    async def _server_metadata(self, data: bytes, context: Context) -> bytes:
        return oip_grpc.encode_server_metadata(self._metadata).SerializeToString()

    async def _model_metadata(self, data: bytes, context: Context) -> bytes:
        request = oip_grpc.parse(pb.ModelMetadataRequest, data)
        metadata = await self._service.metadata(request.name, request.version)
        return oip_grpc.encode_metadata(metadata).SerializeToString()

    async def _model_config(self, data: bytes, context: Context) -> bytes:
        request = oip_grpc.parse(pb.ModelConfigRequest, data)
        return oip_grpc.encode_config(config_of(await self._service.metadata(request.name, request.version))).SerializeToString()

    async def _model_statistics(self, data: bytes, context: Context) -> bytes:
        request = oip_grpc.parse(pb.ModelStatisticsRequest, data)
        if self._statistics is None:
            raise Unsupported("nothing is counted here")
        entries = self._statistics.report(await self._service.index(), request.name, request.version)
        return oip_grpc.encode_statistics(entries).SerializeToString()

    async def _repository_index(self, data: bytes, context: Context) -> bytes:
        request = oip_grpc.parse(pb.RepositoryIndexRequest, data)
        states = await self._service.index()
        return oip_grpc.encode_index(state for state in states if state.state == READY or not request.ready).SerializeToString()

    async def _repository_model_load(self, data: bytes, context: Context) -> bytes:
        request = oip_grpc.parse(pb.RepositoryModelLoadRequest, data)
        await self._service.load(self._controlled(request))
        return pb.RepositoryModelLoadResponse().SerializeToString()

    async def _repository_model_unload(self, data: bytes, context: Context) -> bytes:
        request = oip_grpc.parse(pb.RepositoryModelUnloadRequest, data)
        await self._service.unload(self._controlled(request))
        return pb.RepositoryModelUnloadResponse().SerializeToString()

    def _controlled(self, request: Any) -> str:
        """The model that a control request names. KServe's clients have its name where others have the repository's.

        Raises:
            PermissionDenied: this face takes no such requests.
            NotFound: no model can have this name.
            InvalidInput: it brings parameters: what is loaded is decided by the repository, not by callers.
        """
        if not self._allow_control:
            raise PermissionDenied("loading and unloading is not allowed here; ALLOW_REPOSITORY_CONTROL=true allows it")
        if set(request.parameters) - CONTROL_PARAMETERS:
            raise InvalidInput("parameters are not taken: the model repository says what is loaded")
        name: str = request.model_name or request.repository_name
        check_model_name(name)
        return name

    async def _model_infer(self, data: bytes, context: Context) -> bytes:
        with self._budget.share() as share:
            share.take(len(data))
            message = oip_grpc.parse(pb.ModelInferRequest, data)
            request = oip_grpc.decode_request(message, self._deadline(context.time_remaining()), context.peer())
            return oip_grpc.encode_response(await self._infer(request)).SerializeToString()

    async def _infer(self, request: InferRequest) -> InferResponse:
        self._limits.check(request)
        with RequestLine("infer", request.model, request.version) as line:
            response = await classification.infer(self._service, request)
            line.version = response.version
            return response

    def _deadline(self, remaining_s: float | None) -> float:
        if remaining_s is not None:
            return deadline_after(min(remaining_s, self._max_timeout_s))
        return deadline_after(self._default_timeout_s) if self._default_timeout_s else NO_DEADLINE


def _credentials(context: Context) -> list[str]:
    return [str(value) for key, value in context.invocation_metadata() or () if key == "authorization"]


def _server_options(max_message_bytes: int, shares_port: bool) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.so_reuseport", int(shares_port)),
        ("grpc.server_handshake_timeout_ms", round(HANDSHAKE_TIMEOUT_S * 1000)),
        # Past 1000 calls that wait to be accepted grpcio kills them with CANCELLED, which looks like the caller's doing.
        ("grpc.server.max_pending_requests", 100_000),
        ("grpc.server.max_pending_requests_hard_limit", 100_000),
        # A client that keeps its connections never learns of new replicas: each is ended now and then, calls on it first.
        ("grpc.max_connection_age_ms", 60_000),
        ("grpc.max_connection_age_grace_ms", 120_000),
        # Clients may ask whether we are still there as often as ours do, calls under way or not.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
        # A client whose machine or network is gone says nothing more; to wait for it at the end of a drain takes 20 s.
        # keepalive_timeout_ms alone does not end a connection that is silent; ping_timeout_ms does.
        ("grpc.keepalive_time_ms", round(SILENT_S * 1000)),
        ("grpc.keepalive_timeout_ms", round(SILENT_S * 1000)),
        ("grpc.http2.ping_timeout_ms", round(SILENT_S * 1000)),
    ]


def _rich_status(error: SplitserveError) -> bytes:
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    detail = any_pb2.Any()
    detail.Pack(info)
    code = code_pb2.Code.Value(error.grpc_code)
    status: bytes = status_pb2.Status(code=code, message=error.message, details=[detail]).SerializeToString()
    return status
