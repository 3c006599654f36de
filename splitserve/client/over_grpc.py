"""The client's transport over gRPC, blocking and async."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from splitserve.api.inference import inference_pb2 as pb
from splitserve.api.splitserve.jobs.v1 import jobs_pb2
from splitserve.client.connection import TLS, AsyncToken, ConnectionOptions, Token, request_headers, request_headers_async
from splitserve.client.retries import Failed
from splitserve.client.steps import Ask, JobAsk, Send, Verb
from splitserve.client.stop import Stop
from splitserve.errors import Cancelled, InvalidInput, PairMismatch, Unavailable
from splitserve.jobs import protobuf as jobs
from splitserve.oip import protobuf
from splitserve.oip.messages import ServerMetadata
from splitserve.remote.channel import TO_ANY_SERVER, channel_options
from splitserve.remote.inference import translate

_STAGE = "server"


class _Method(NamedTuple):
    name: str
    decode: Callable[[Any], Any]
    service: str = protobuf.SERVICE

    @property
    def request(self) -> Any:
        return getattr(pb if self.service == protobuf.SERVICE else jobs_pb2, f"{self.name}Request")

    @property
    def response(self) -> Any:
        return getattr(pb if self.service == protobuf.SERVICE else jobs_pb2, f"{self.name}Response")


_METHODS: dict[Verb, _Method] = {
    "live": _Method("ServerLive", lambda answer: answer.live),
    "ready": _Method("ServerReady", lambda answer: answer.ready),
    "model_ready": _Method("ModelReady", lambda answer: answer.ready),
    "server_metadata": _Method(
        "ServerMetadata", lambda answer: ServerMetadata(answer.name, answer.version, tuple(answer.extensions))
    ),
    "model_metadata": _Method("ModelMetadata", protobuf.decode_metadata),
    "index": _Method("RepositoryIndex", protobuf.decode_index),
    "infer": _Method("ModelInfer", protobuf.decode_response),
    "submit": _Method("SubmitJob", lambda answer: jobs.decode_job(answer.job), jobs.SERVICE),
    "job": _Method("GetJob", lambda answer: jobs.decode_job(answer.job), jobs.SERVICE),
    "job_result": _Method("GetJobResult", lambda answer: protobuf.decode_response(answer.answer), jobs.SERVICE),
    "job_delete": _Method("DeleteJob", lambda answer: jobs.decode_job(answer.job), jobs.SERVICE),
    "jobs": _Method("ListJobs", lambda answer: [jobs.decode_job(job) for job in answer.jobs], jobs.SERVICE),
}


class GrpcTransport:
    """Sends on its own channel. Thread-safe."""

    def __init__(self, connection: ConnectionOptions, token: Token) -> None:
        self._connection = connection
        self._token = token
        if connection.tls is None:
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
        metadata = tuple(request_headers(self._connection.headers, self._token).items())
        request = _encode(step.ask)
        try:
            if stop is None:
                answer = call(request, timeout=step.timeout_s, metadata=metadata)
            else:
                future = call.future(request, timeout=step.timeout_s, metadata=metadata)
                with stop.calling(future.cancel):
                    answer = future.result()
        except grpc.FutureCancelledError as error:
            raise Failed(Cancelled("cancelled because another request failed")) from error
        except grpc.RpcError as error:
            return _failed(step.ask, error)
        return _decode(step.ask, answer)

    def close(self) -> None:
        self._channel.close()


class AsyncGrpcTransport:
    """Sends on its own channel, on the event loop that is running when it is created."""

    def __init__(self, connection: ConnectionOptions, token: AsyncToken) -> None:
        self._connection = connection
        self._token = token
        if connection.tls is None:
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
        metadata = tuple((await request_headers_async(self._connection.headers, self._token)).items())
        try:
            answer = await call(_encode(step.ask), timeout=step.timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return _failed(step.ask, error)
        return _decode(step.ask, answer)

    async def close(self) -> None:
        await self._channel.close()


def _arguments(connection: ConnectionOptions) -> dict[str, Any]:
    return {
        "options": channel_options(connection.max_message_bytes, TO_ANY_SERVER),
        "compression": grpc.Compression.Gzip if connection.compression else None,
    }


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
        for verb, method in _METHODS.items()
    }


def _encode(ask: Ask) -> Any:
    if ask.job is not None:
        return _encode_job_verb(ask, ask.job)
    if ask.request is not None:
        return protobuf.encode_request(ask.request)
    request = _METHODS[ask.verb].request
    return request(name=ask.model, version=ask.version) if ask.model else request()


def _encode_job_verb(ask: Ask, job: JobAsk) -> Any:
    request = _METHODS[ask.verb].request
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


def _decode(ask: Ask, answer: Any) -> Any:
    try:
        return _METHODS[ask.verb].decode(answer)
    except InvalidInput as error:  # not the caller's fault
        raise Failed(PairMismatch(f"malformed response: {error.message}", stage=_STAGE)) from error


def _failed(ask: Ask, error: Any) -> bool:
    """False for an unknown model in a readiness check.

    Raises:
        Failed: otherwise.
    """
    if ask.verb == "model_ready" and error.code() is grpc.StatusCode.NOT_FOUND:
        return False
    if "CERTIFICATE_VERIFY_FAILED" in (error.details() or ""):
        raise Failed(Unavailable("the server's certificate is not trusted", stage=_STAGE)) from error
    translated = translate(error, _STAGE)
    pushback_ms = dict(error.trailing_metadata() or ()).get(protobuf.PUSHBACK_KEY)
    is_refused = pushback_ms is not None and not str(pushback_ms).isdecimal()
    raise Failed(
        translated,
        can_retry=isinstance(translated, Unavailable) and not is_refused,
        retry_after_s=None if pushback_ms is None or is_refused else int(pushback_ms) / 1000,
    ) from error
