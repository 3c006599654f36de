"""The client's transport over gRPC, blocking and async."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from splitserve.api.inference import inference_pb2 as pb
from splitserve.api.splitserve.jobs.v1 import jobs_pb2
from splitserve.client.connection import TLS, AsyncToken, ConnectionOptions, Token, request_headers, request_headers_async
from splitserve.client.forks import keep_for_ever
from splitserve.client.retries import Failed
from splitserve.client.steps import Ask, JobAsk, Send, Verb
from splitserve.client.stop import Stop
from splitserve.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    PairMismatch,
    SplitserveError,
    Unavailable,
    Unsupported,
)
from splitserve.jobs import protobuf as jobs
from splitserve.oip import protobuf
from splitserve.oip.messages import ServerMetadata
from splitserve.remote.channel import TO_ANY_SERVER, channel_options
from splitserve.remote.inference import translate

if TYPE_CHECKING:
    from splitserve.client.over_own_grpc import AsyncOwnGrpcTransport, OwnGrpcTransport

_STAGE = "server"


class Method(NamedTuple):
    name: str
    decode: Callable[[Any], Any]
    service: str = protobuf.SERVICE

    @property
    def request(self) -> Any:
        return getattr(pb if self.service == protobuf.SERVICE else jobs_pb2, f"{self.name}Request")

    @property
    def response(self) -> Any:
        return getattr(pb if self.service == protobuf.SERVICE else jobs_pb2, f"{self.name}Response")


METHODS: dict[Verb, Method] = {
    "live": Method("ServerLive", lambda answer: answer.live),
    "ready": Method("ServerReady", lambda answer: answer.ready),
    "model_ready": Method("ModelReady", lambda answer: answer.ready),
    "server_metadata": Method(
        "ServerMetadata", lambda answer: ServerMetadata(answer.name, answer.version, tuple(answer.extensions))
    ),
    "model_metadata": Method("ModelMetadata", protobuf.decode_metadata),
    "index": Method("RepositoryIndex", protobuf.decode_index),
    "load": Method("RepositoryModelLoad", lambda _: None),
    "infer": Method("ModelInfer", protobuf.decode_response),
    "submit": Method("SubmitJob", lambda answer: jobs.decode_job(answer.job), jobs.SERVICE),
    "job": Method("GetJob", lambda answer: jobs.decode_job(answer.job), jobs.SERVICE),
    "job_result": Method("GetJobResult", lambda answer: protobuf.decode_response(answer.answer), jobs.SERVICE),
    "job_delete": Method("DeleteJob", lambda answer: jobs.decode_job(answer.job), jobs.SERVICE),
    "jobs": Method("ListJobs", lambda answer: [jobs.decode_job(job) for job in answer.jobs], jobs.SERVICE),
}


_used_in: int | None = None
"""The process that has used grpcio first. In its forked children grpcio has no threads: its calls hang, or end the process."""


def blocking_transport(connection: ConnectionOptions, token: Token) -> GrpcTransport | OwnGrpcTransport:
    """Without grpcio, which costs more, unless it is needed: for the caller's channel, a proxy, names, Windows."""
    from splitserve.client.over_own_grpc import OwnGrpcTransport, has_one_address

    needs_grpcio = connection.channel is not None or connection.proxy or not has_one_address(connection)
    if (needs_grpcio or sys.platform == "win32") and not is_unusable():
        return GrpcTransport(connection, token)
    return OwnGrpcTransport(connection, token)


def async_transport(connection: ConnectionOptions, token: AsyncToken) -> AsyncGrpcTransport | AsyncOwnGrpcTransport:
    """Without grpcio, which costs more on an event loop, unless it is needed: for the caller's channel, a proxy, its names."""
    from splitserve.client.over_own_grpc import AsyncOwnGrpcTransport, has_endpoint

    needs_grpcio = connection.channel is not None or connection.proxy or not has_endpoint(connection)
    if (needs_grpcio or sys.platform == "win32") and not is_unusable():
        return AsyncGrpcTransport(connection, token)
    return AsyncOwnGrpcTransport(connection, token)


def is_unusable() -> bool:
    """Whether grpcio was used before this process was forked; if not, this process uses it from now on."""
    global _used_in
    if _used_in is None:
        _used_in = os.getpid()
    return _used_in != os.getpid()


class GrpcTransport:
    """Sends on its own channel, or on the caller's. Thread-safe."""

    def __init__(self, connection: ConnectionOptions, token: Token) -> None:
        self._connection = connection
        self._token = token
        self._channel: Any = connection.channel
        if self._channel is not None:
            if not isinstance(self._channel, grpc.Channel):
                raise ValueError(f"channel: expected a grpc.Channel, got {type(self._channel).__name__}")
        elif connection.tls is None:
            self._channel = grpc.insecure_channel(connection.target, **_arguments(connection))
        else:
            self._channel = grpc.secure_channel(connection.target, _credentials(connection.tls), **_arguments(connection))
        self._calls = _calls(self._channel)

    def send(self, step: Send, stop: Stop | None) -> Any:
        """Make one attempt; setting ``stop`` cancels it.

        Raises:
            Failed: the error, and whether it can be retried.
        """
        call = self._calls[step.ask.verb]
        sent = metadata(request_headers(self._connection.headers, self._token, step.ask.headers))
        request = encode(step.ask)
        timeout = None if step.timeout_s == float("inf") else step.timeout_s
        try:
            if stop is None:
                answer = call(request, timeout=timeout, metadata=sent)
            else:
                future = call.future(request, timeout=timeout, metadata=sent)
                with stop.calling(future.cancel):
                    answer = future.result()
        except grpc.FutureCancelledError as error:
            raise Failed(Cancelled("cancelled because another request failed")) from error
        except grpc.RpcError as error:
            return _failed(step.ask, error, self._connection)
        return decode(step.ask, answer)

    def close(self) -> None:
        """Close the channel, unless it is the caller's."""
        if self._connection.channel is None:
            self._channel.close()

    def abandon(self) -> None:
        """In a forked child: leave the parent's channel as it is."""
        keep_for_ever(self)


class AsyncGrpcTransport:
    """Sends on its own channel, or on the caller's, on the event loop that is running when it is created."""

    def __init__(self, connection: ConnectionOptions, token: AsyncToken) -> None:
        self._connection = connection
        self._token = token
        self._pid = os.getpid()
        self._channel: Any = connection.channel
        if self._channel is not None:
            if not isinstance(self._channel, grpc.aio.Channel):
                raise ValueError(f"channel: expected a grpc.aio.Channel, got {type(self._channel).__name__}")
        elif connection.tls is None:
            self._channel = grpc.aio.insecure_channel(connection.target, **_arguments(connection))
        else:
            self._channel = grpc.aio.secure_channel(connection.target, _credentials(connection.tls), **_arguments(connection))
        self._calls = _calls(self._channel)

    async def send(self, step: Send) -> Any:
        """Make one attempt.

        Raises:
            Failed: the error, and whether it can be retried.
        """
        call = self._calls[step.ask.verb]
        sent = metadata(await request_headers_async(self._connection.headers, self._token, step.ask.headers))
        timeout = None if step.timeout_s == float("inf") else step.timeout_s
        try:
            answer = await call(encode(step.ask), timeout=timeout, metadata=sent)
        except grpc.aio.AioRpcError as error:
            return _failed(step.ask, error, self._connection)
        return decode(step.ask, answer)

    async def close(self) -> None:
        """Close the channel, unless it is the caller's."""
        if self._connection.channel is None:
            await self._channel.close()

    def abandon(self) -> None:
        """After its event loop has ended: nothing. In a forked child: leave the parent's channel as it is."""
        if self._pid != os.getpid():
            keep_for_ever(self)


def _arguments(connection: ConnectionOptions) -> dict[str, Any]:
    return {
        # In a dict: of an option that is given twice, grpcio takes the first.
        "options": list(dict([*channel_options(connection.max_message_bytes, TO_ANY_SERVER), *_own_options(connection)]).items()),
        "compression": grpc.Compression.Gzip if connection.compression else None,
    }


def _own_options(connection: ConnectionOptions) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [("grpc.primary_user_agent", connection.user_agent)]
    if connection.proxy:
        options += [("grpc.enable_http_proxy", 1), ("grpc.http_proxy", connection.proxy)]
    return options


def _credentials(tls: TLS) -> grpc.ChannelCredentials:
    files = (tls.ca_file, tls.key_file, tls.cert_file)
    return grpc.ssl_channel_credentials(*(Path(file).read_bytes() if file else None for file in files))


def _calls(channel: Any) -> dict[Verb, Any]:
    return {
        verb: channel.unary_unary(
            f"/{method.service}/{method.name}",
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        for verb, method in METHODS.items()
    }


def metadata(headers: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Headers as metadata.

    Raises:
        InvalidInput: a value is not ASCII, as gRPC requires.
    """
    for name, value in headers.items():
        if not value.isascii():
            raise InvalidInput(f'header "{name}": over gRPC expected ASCII, or bytes and a name that ends with "-bin"')
    headers.pop("content-type", None)
    return tuple(headers.items())


def encode(ask: Ask) -> Any:
    if ask.job is not None:
        return _encode_job_verb(ask, ask.job)
    if ask.request is not None:
        return protobuf.encode_request(ask.request)
    request = METHODS[ask.verb].request
    if ask.verb == "load":
        return request(model_name=ask.model)
    return request(name=ask.model, version=ask.version) if ask.model else request()


def _encode_job_verb(ask: Ask, job: JobAsk) -> Any:
    request = METHODS[ask.verb].request
    if ask.verb == "jobs":
        return request(model=ask.model, status=jobs.encode_status(job.status), limit=job.limit, after=job.after)
    if ask.verb == "job":
        return request(id=job.id, wait_s=job.wait_s)
    if ask.verb == "job_delete":
        return request(id=job.id, keep_ended=job.keep_ended)
    if ask.request is None:
        return request(id=job.id)
    message = jobs.encode_options(job.options)
    message.request.CopyFrom(protobuf.encode_request(ask.request))
    return message


def decode(ask: Ask, answer: Any) -> Any:
    try:
        return METHODS[ask.verb].decode(answer)
    except InvalidInput as error:  # not the caller's fault
        raise Failed(PairMismatch(f"malformed response: {error.message}", stage=_STAGE)) from error


def _failed(ask: Ask, error: Any, connection: ConnectionOptions) -> bool:
    """False for an unknown model in a readiness check.

    Raises:
        Failed: otherwise.
    """
    if ask.verb == "model_ready" and error.code() is grpc.StatusCode.NOT_FOUND:
        return False
    details = error.details() or ""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        message = f"the server's certificate is not trusted: {connection.url}: {_cause(details)}"
        raise Failed(Unavailable(message, stage=_STAGE)) from error
    raise as_failed(ask, translate(error, _STAGE), details, error.trailing_metadata(), connection) from error


def as_failed(ask: Ask, error: SplitserveError, details: str, trailing: Any, connection: ConnectionOptions) -> Failed:
    """The failure of an attempt; errors that no service raised name the address and the cause.

    Args:
        ask: what was asked.
        error: as the services between each other name it.
        details: the status message.
        trailing: metadata.
        connection: of the client.
    """
    url = connection.url
    if error.message == f"the {_STAGE} service cannot be reached":
        if "http1" in details.lower() or "http/1" in details.lower():
            hint = f"it answers in HTTP/1.1; is it the REST port? Use http://{connection.target}"
            return Failed(Unavailable(f"the server cannot be reached: {url}: {hint}", stage=_STAGE))
        error = Unavailable(f"the server cannot be reached: {url}: {_cause(details)}", stage=_STAGE)
    elif error.message == f"the {_STAGE} service did not answer in time":
        error = DeadlineExceeded(f"the server did not answer in time: {url}", stage=_STAGE)
    elif isinstance(error, Unsupported) and not error.model and "http" not in error.message.lower():
        method = METHODS[ask.verb]
        message = f"{url} does not offer {method.service}/{method.name}: {error.message or 'unimplemented'}"
        error = Unsupported(message, stage=error.stage)
    elif "http status" in details.lower() or "http2 header" in details.lower() or "content-type" in details.lower():
        error = Unavailable(f"{url} is no gRPC server, or a proxy in front of it refuses gRPC: {details[:256]}", stage=_STAGE)
        return Failed(error)
    pushback_ms = dict(trailing or ()).get(protobuf.PUSHBACK_KEY)
    is_refused = pushback_ms is not None and not str(pushback_ms).isdecimal()
    return Failed(
        error,
        can_retry=isinstance(error, Unavailable | Overloaded) and not is_refused,
        retry_after_s=None if pushback_ms is None or is_refused else int(pushback_ms) / 1000,
    )


def _cause(details: str) -> str:
    """The last and most precise part of grpcio's chain of causes."""
    return details.rpartition("last error: ")[2].rpartition(": ")[2].strip()[:256] or "no connection"
