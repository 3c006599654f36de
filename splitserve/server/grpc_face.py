"""The gRPC face: serves any `InferenceService` as the Open Inference Protocol, with grpc.health.v1 and reflection.

Handlers take and return bytes, so that a message that does not parse is answered like any other invalid input.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import msgspec
from grpc_health.v1 import health_pb2

from splitserve.api.inference import inference_pb2 as pb
from splitserve.catalogue import why_model_not_ready
from splitserve.errors import InvalidInput, PermissionDenied, SplitserveError, Unsupported
from splitserve.oip import protobuf
from splitserve.oip.limits import check_model_name
from splitserve.oip.messages import (
    CONTROL_PARAMETERS,
    NO_DEADLINE,
    READY,
    InferenceService,
    Needed,
    deadline_after,
)
from splitserve.oip.model_config import config_of
from splitserve.oip.statistics import Statistics
from splitserve.server import callers, failures, health, reflection
from splitserve.server.audited_calls import recorded
from splitserve.server.callers import Authenticator
from splitserve.server.grpc_config import GrpcConfig
from splitserve.server.grpc_engine import bound_server
from splitserve.server.grpc_inference import GrpcInferences, credentials
from splitserve.server.grpc_status import call_error
from splitserve.server.infer_stream import InferStreams
from splitserve.server.inference import InferenceRules
from splitserve.telemetry.requests import RequestRecorder
from splitserve.wire.byte_budget import ByteBudget
from splitserve.wire.grpc.call import MethodHandler, ServerCall, UnaryHandler
from splitserve.wire.grpc.messages import CallError

_MAX_REASON_LENGTH = 1000

EDGE = "proxy"
"""The stage that gives ids to requests without one."""

_OPEN = ("ServerLive", "ServerReady", "ServerMetadata")
"""Methods that need no credentials; grpc.health.v1 and reflection need none either."""


_CONTROL: Mapping[str, tuple[str, type[Any]]] = {
    "RepositoryModelLoad": ("load", pb.RepositoryModelLoadRequest),
    "RepositoryModelUnload": ("unload", pb.RepositoryModelUnloadRequest),
}
"""Methods that change what is served: their verb and their message."""


class MoreMethods(msgspec.Struct, frozen=True):
    """Another gRPC service of a face: its name, its handlers by method, and the file that declares it."""

    service: str
    handlers: Mapping[str, UnaryHandler]
    file: Any


class GrpcFace:
    """A gRPC server in front of a service; an async context manager that listens while it is entered.

    Health: ``""`` is SERVING while at least one model can be inferred, ``inference.GRPCInferenceService`` while calls are
    accepted: from the end of the first load until draining begins.

    Args:
        service: to serve.
        config: how to serve it.
        statistics: of the service, if it has any.
        authenticator: None: calls are not authenticated.
        budget: of the bytes that requests hold; None: unlimited.
        on_needed: called with the versions that callers of the index need.
        more: another service that it serves.
        recorder: counts its inferences.
    """

    def __init__(
        self,
        service: InferenceService,
        config: GrpcConfig,
        *,
        statistics: Statistics | None = None,
        authenticator: Authenticator | None = None,
        budget: ByteBudget | None = None,
        on_needed: Callable[[Needed], None] | None = None,
        more: MoreMethods | None = None,
        recorder: RequestRecorder | None = None,
    ) -> None:
        self._service = service
        self._on_needed = on_needed
        self._config = config
        self._statistics = statistics
        self._authenticator = authenticator
        budget = budget or ByteBudget(sys.maxsize)
        self._health = health.Health()
        self._readiness = health.Readiness(
            self._health, protobuf.SERVICE, service.not_ready_reason, accepts_calls=lambda: service.is_loaded
        )
        rules = InferenceRules(service, config.request_limits, authenticator, recorder, makes_ids=config.stage == EDGE)
        self._inferences = GrpcInferences(
            rules, deadline=self._deadline, named=self._named, budget=budget, max_message_bytes=config.max_message_bytes
        )
        self._streams = InferStreams(self._inferences.begin_on_stream)
        self._more = more
        self._server, self.port = bound_server(self._methods(), config, status_of=self._status_of, budget=budget)

    @property
    def ports(self) -> dict[str, int]:
        """Where it listens, by name."""
        return {"grpc_port": self.port}

    async def __aenter__(self) -> GrpcFace:
        await self._server.start()
        self._readiness.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._readiness.stop()
        await self._server.stop()

    async def drain(self) -> None:
        """Report "not ready", keep serving for the delay, then refuse new calls and let those in flight finish."""
        await self._readiness.drain()
        await asyncio.sleep(self._config.drain_delay_s)
        self._streams.stop()
        self._health.end()
        await self._server.stop(self._config.grace_s)

    def _methods(self) -> dict[str, MethodHandler]:
        handlers: dict[str, UnaryHandler] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._repository_model_load,
            "RepositoryModelUnload": self._repository_model_unload,
        }
        return {
            f"/{protobuf.SERVICE}/ModelInfer": MethodHandler(begin=self._inferences.begin),
            f"/{protobuf.SERVICE}/ModelStreamInfer": MethodHandler(streaming=self._streams.serve),
            **{
                f"/{protobuf.SERVICE}/{name}": MethodHandler(unary=_audited(name, self._authenticated(handler, name in _OPEN)))
                for name, handler in handlers.items()
            },
            **self._more_methods(),
            **self._health.methods,
            **reflection.methods(
                (protobuf.SERVICE, health.SERVICE, *([self._more.service] if self._more else [])),
                (pb.DESCRIPTOR, health_pb2.DESCRIPTOR, *([self._more.file] if self._more else [])),
            ),
        }

    def _more_methods(self) -> dict[str, MethodHandler]:
        if self._more is None:
            return {}
        return {
            f"/{self._more.service}/{name}": MethodHandler(unary=self._authenticated(handler, is_open=False))
            for name, handler in self._more.handlers.items()
        }

    def _authenticated(self, handler: UnaryHandler, is_open: bool) -> UnaryHandler:
        """The handler, preceded by the identification of the caller if there is an authenticator."""
        authenticator = self._authenticator
        if authenticator is None:
            return handler

        async def serve(data: bytes, call: ServerCall) -> bytes:
            await callers.identify(authenticator, credentials(call), is_open=is_open)
            return await handler(data, call)

        return serve

    def _status_of(self, error: Exception) -> CallError:
        """The status of an error; the only place that renders one."""
        return call_error(self._named(error), stage=self._config.stage, retry_after_s=self._config.retry_after_s)

    def _named(self, error: Exception) -> SplitserveError:
        return failures.named(error, self._config.stage)

    async def _server_live(self, data: bytes, call: ServerCall) -> bytes:
        return pb.ServerLiveResponse(live=True).SerializeToString()

    async def _server_ready(self, data: bytes, call: ServerCall) -> bytes:
        reason = await self._readiness.reason()
        _set_reason(call, reason)
        return pb.ServerReadyResponse(ready=not reason).SerializeToString()

    async def _model_ready(self, data: bytes, call: ServerCall) -> bytes:
        request = protobuf.parse(pb.ModelReadyRequest, data)
        states = await self._service.index()
        reason = "draining" if self._readiness.is_draining else why_model_not_ready(states, request.name, request.version)
        _set_reason(call, reason)
        return pb.ModelReadyResponse(ready=not reason).SerializeToString()

    async def _server_metadata(self, data: bytes, call: ServerCall) -> bytes:
        return protobuf.encode_server_metadata(self._config.metadata).SerializeToString()

    async def _model_metadata(self, data: bytes, call: ServerCall) -> bytes:
        request = protobuf.parse(pb.ModelMetadataRequest, data)
        metadata = await self._service.metadata(request.name, request.version)
        return protobuf.encode_metadata(metadata).SerializeToString()

    async def _model_config(self, data: bytes, call: ServerCall) -> bytes:
        request = protobuf.parse(pb.ModelConfigRequest, data)
        return protobuf.encode_config(config_of(await self._service.metadata(request.name, request.version))).SerializeToString()

    async def _model_statistics(self, data: bytes, call: ServerCall) -> bytes:
        request = protobuf.parse(pb.ModelStatisticsRequest, data)
        if self._statistics is None:
            raise Unsupported("statistics are not supported")
        entries = self._statistics.report(await self._service.index(), request.name, request.version)
        return protobuf.encode_statistics(entries).SerializeToString()

    async def _repository_index(self, data: bytes, call: ServerCall) -> bytes:
        request = protobuf.parse(pb.RepositoryIndexRequest, data)
        if self._on_needed is not None and request.needed:
            self._on_needed(protobuf.decode_needed(request))
        states = await self._service.index()
        return protobuf.encode_index(state for state in states if state.state == READY or not request.ready).SerializeToString()

    async def _repository_model_load(self, data: bytes, call: ServerCall) -> bytes:
        request = protobuf.parse(pb.RepositoryModelLoadRequest, data)
        await self._service.load(self._controlled(request))
        return pb.RepositoryModelLoadResponse().SerializeToString()

    async def _repository_model_unload(self, data: bytes, call: ServerCall) -> bytes:
        request = protobuf.parse(pb.RepositoryModelUnloadRequest, data)
        await self._service.unload(self._controlled(request))
        return pb.RepositoryModelUnloadResponse().SerializeToString()

    def _controlled(self, request: Any) -> str:
        """The model that a control request names. KServe's clients send its name in the field of the repository's.

        Raises:
            PermissionDenied: they are disabled.
            NotFound: no model can have this name.
            InvalidInput: it has parameters: the repository determines what is loaded.
        """
        if not self._config.allow_control:
            raise PermissionDenied("loading and unloading is disabled; ALLOW_REPOSITORY_CONTROL=true enables it")
        if set(request.parameters) - CONTROL_PARAMETERS:
            raise InvalidInput("parameters are not supported: the model repository determines what is loaded")
        name = _named_model(request)
        check_model_name(name)
        return name

    def _deadline(self, remaining_s: float | None) -> float:
        if remaining_s is not None:
            return deadline_after(min(remaining_s, self._config.max_timeout_s))
        default_s = self._config.default_timeout_s
        return deadline_after(default_s) if default_s else NO_DEADLINE


def _named_model(request: Any) -> str:
    name: str = request.model_name or request.repository_name
    return name


def _audited(name: str, handler: UnaryHandler) -> UnaryHandler:
    """The handler, with a line for auditors if it changes what is served."""
    if name not in _CONTROL:
        return handler
    verb, message = _CONTROL[name]

    async def serve(data: bytes, call: ServerCall) -> bytes:
        with recorded(verb, source=call.address, model=lambda: _model_in(message, data), protocol="grpc"):
            return await handler(data, call)

    return serve


def _model_in(message: type[Any], data: bytes) -> str:
    """The model of a control request; "" if it does not parse, or its caller is unknown, from whom nothing is decoded."""
    if callers.current.get() is callers.NOBODY:
        return ""
    try:
        return _named_model(protobuf.parse(message, data))
    except InvalidInput:
        return ""


def _set_reason(call: ServerCall, reason: str) -> None:
    """Send the reason of "not ready" as trailing metadata: the protocol's message has no field for it."""
    if reason:
        call.trailing_metadata = ((protobuf.REASON_KEY, reason[:_MAX_REASON_LENGTH].encode()),)
