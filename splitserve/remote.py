"""An `InferenceService` at the far end of a gRPC channel."""

from __future__ import annotations

import json
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from splitserve import oip_grpc
from splitserve.api.inference import inference_pb2 as pb
from splitserve.errors import (
    DOMAIN,
    DeadlineExceeded,
    InvalidInput,
    PairMismatch,
    SplitserveError,
    TooLarge,
    Unavailable,
    from_wire,
)
from splitserve.oip import (
    NO_DEADLINE,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelState,
    deadline_after,
    remaining_s,
)
from splitserve.tls import ClientTls, open_channel

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""The largest message, in bytes, that is sent or taken unless settings say otherwise."""

_DETAILS_KEY = "grpc-status-details-bin"

_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": oip_grpc.SERVICE},
    "methodConfig": [
        {
            "name": [{"service": oip_grpc.SERVICE}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.01s",
                "maxBackoff": "0.1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
}
"""Every replica of a name in turn, those that drain or load left out, and another try elsewhere when one is gone."""


CONTROL_TIMEOUT_S = 300.0
"""Loading may have to fetch."""

METHODS: dict[str, tuple[Any, Any]] = {
    "ServerReady": (pb.ServerReadyRequest, pb.ServerReadyResponse),
    "ModelMetadata": (pb.ModelMetadataRequest, pb.ModelMetadataResponse),
    "ModelInfer": (pb.ModelInferRequest, pb.ModelInferResponse),
    "RepositoryIndex": (pb.RepositoryIndexRequest, pb.RepositoryIndexResponse),
    "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, pb.RepositoryModelLoadResponse),
    "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest, pb.RepositoryModelUnloadResponse),
}


class RemoteInference:
    """A service that is reached over gRPC.

    Args:
        target: gRPC name, e.g. ``dns:///predict:8021``; all addresses that it resolves to are used in turn.
        stage: what the far end is, for errors that it can not name itself.
        max_message_bytes: the largest message sent or taken.
        poll_timeout_s: how long questions other than inference may take.
        tls: files of the channel; None: plain text.
        token: shown with every call.
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
    ) -> None:
        self.target = target
        self._stage = stage
        self._poll_timeout_s = poll_timeout_s
        self._channel = open_channel(target, channel_options(max_message_bytes), tls, token)
        self._methods = {
            name: self._channel.unary_unary(
                f"/{oip_grpc.SERVICE}/{name}",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )
            for name, (request, response) in METHODS.items()
        }
        self.is_loaded = True

    async def __aenter__(self) -> RemoteInference:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._channel.close()

    async def infer(self, request: InferRequest) -> InferResponse:
        """Call ModelInfer with what remains of the request's deadline."""
        response = await self._call("ModelInfer", oip_grpc.encode_request(request), request.deadline)
        try:
            return oip_grpc.decode_response(response)
        except InvalidInput as error:
            raise PairMismatch(error.message, stage=self._stage) from error

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """Call ModelMetadata."""
        request = pb.ModelMetadataRequest(name=model, version=version)
        return oip_grpc.decode_metadata(await self._call("ModelMetadata", request))

    async def index(self) -> list[ModelState]:
        """Call RepositoryIndex."""
        return oip_grpc.decode_index(await self._call("RepositoryIndex", pb.RepositoryIndexRequest()))

    async def load(self, model: str) -> None:
        """Call RepositoryModelLoad."""
        request = pb.RepositoryModelLoadRequest(model_name=model)
        await self._call("RepositoryModelLoad", request, deadline_after(CONTROL_TIMEOUT_S))

    async def unload(self, model: str) -> None:
        """Call RepositoryModelUnload."""
        request = pb.RepositoryModelUnloadRequest(model_name=model)
        await self._call("RepositoryModelUnload", request, deadline_after(CONTROL_TIMEOUT_S))

    async def not_ready_reason(self) -> str:
        """Call ServerReady."""
        try:
            response = await self._call("ServerReady", pb.ServerReadyRequest())
        except SplitserveError as error:
            return error.message
        return "" if response.ready else f"the {self._stage} service is not ready"

    async def _call(self, method: str, request: Any, deadline: float | None = None) -> Any:
        if deadline is None:
            deadline = deadline_after(self._poll_timeout_s)
        timeout_s = remaining_s(deadline)
        if timeout_s <= 0:
            raise DeadlineExceeded(f"out of time before {self._stage} was called")
        try:
            return await self._methods[method](request, timeout=None if deadline == NO_DEADLINE else timeout_s)
        except grpc.aio.AioRpcError as error:
            raise translate(error, self._stage) from error


def translate(error: grpc.RpcError, stage: str) -> SplitserveError:
    """The error that the far end raised, or one of our own where it did not get to raise any.

    Args:
        error: of a call that failed.
        stage: what the far end is.
    """
    reason, metadata = _error_info(error.trailing_metadata())
    message = error.details() or ""
    if reason:
        return from_wire(error.code().name, message, reason, metadata)
    # CANCELLED that the far end did not raise: it stopped as the call arrived. The texts of both name addresses.
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return Unavailable(f"the {stage} service can not be reached", stage=stage)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"the {stage} service did not answer in time", stage=stage)
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:  # grpc's own limit
        return TooLarge(f"the message to or from {stage} is larger than its limit", stage=stage)
    return from_wire(error.code().name, message, metadata={"stage": stage})


def _error_info(metadata: Iterable[Any] | None) -> tuple[str, dict[str, str]]:
    """Reason and facts of an answer's ErrorInfo, if it is one of ours."""
    for key, value in metadata or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                details = status_pb2.Status.FromString(value).details
            except DecodeError:
                continue
            for detail in details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info) and info.domain == DOMAIN:
                    return info.reason, dict(info.metadata)
    return "", {}


def channel_options(max_message_bytes: int) -> list[tuple[str, Any]]:
    """Options of a channel that outlives its servers: all replicas used, dead ones noticed, retries of what is safe to retry."""
    return [
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # Without it, requests above 256 KiB are silently not retried.
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        # keepalive_timeout_ms alone does not end a connection that is silent; ping_timeout_ms does.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.use_local_subchannel_pool", 1),
        # A proxy in the environment is for what leaves the cluster.
        ("grpc.enable_http_proxy", 0),
    ]
