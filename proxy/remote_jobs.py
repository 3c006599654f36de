"""The jobs service, called over gRPC."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

import grpc

from splitserve.api.splitserve.jobs.v1 import jobs_pb2 as pb
from splitserve.jobs import protobuf
from splitserve.jobs.records import Job, JobCaller, Submitted
from splitserve.jobs.service import JobAnswer, Submission
from splitserve.oip.limits import MAX_MESSAGE_BYTES
from splitserve.remote.channel import BETWEEN_SERVICES, channel_options, unary_methods
from splitserve.remote.inference import translate
from splitserve.tls import ClientTls
from splitserve.watched import Watched

STAGE = "jobs"
CALL_TIMEOUT_S = 15.0
"""Of a call, beside the time that it waits for the end of a job: longer than a call to the database may take."""

MAX_WAIT_S = 300.0

_METHODS: dict[str, tuple[Any, Any]] = {
    "SubmitJob": (pb.SubmitJobRequest, pb.SubmitJobResponse),
    "GetJob": (pb.GetJobRequest, pb.GetJobResponse),
    "GetJobResult": (pb.GetJobResultRequest, pb.GetJobResultResponse),
    "DeleteJob": (pb.DeleteJobRequest, pb.DeleteJobResponse),
    "ListJobs": (pb.ListJobsRequest, pb.ListJobsResponse),
}


class RemoteJobs:
    """Implements `splitserve.jobs.service.Jobs`. Call it inside its ``async with``.

    Calls are not retried: a submit might be stored twice. Channels reconnect by themselves.

    Args:
        target: host and port of the jobs service.
        max_message_bytes: the largest request or answer of an inference.
        tls: of the calls; None: plain text.
    """

    def __init__(self, target: str, *, max_message_bytes: int = MAX_MESSAGE_BYTES, tls: ClientTls | None = None) -> None:
        self._target = target
        self._tls = tls
        self._closing: set[asyncio.Task[None]] = set()
        self._files = Watched(self._tls.files, self._tls.credentials) if self._tls else None
        self._options: list[tuple[str, Any]] = [
            *channel_options(protobuf.max_wrapped_bytes(max_message_bytes), BETWEEN_SERVICES, health_service=""),
            *(self._tls.options() if self._tls else []),
        ]

    async def __aenter__(self) -> RemoteJobs:
        self._connect()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for closing in self._closing:
            closing.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._channel.close()

    def _connect(self) -> None:
        if self._files is None:
            self._channel = grpc.aio.insecure_channel(self._target, self._options)
        else:
            self._channel = grpc.aio.secure_channel(self._target, self._files.value, self._options)
        self._methods = unary_methods(self._channel, protobuf.SERVICE, _METHODS)

    async def _call(self, name: str, caller: JobCaller, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        if self._files is not None and self._files.has_changed():
            closing = asyncio.create_task(self._channel.close(MAX_WAIT_S))  # once its calls have ended
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            self._connect()
        try:
            return await self._methods[name](request, timeout=timeout_s, metadata=protobuf.encode_caller(caller))
        except grpc.aio.AioRpcError as error:
            raise translate(error, STAGE) from error

    async def submit(self, caller: JobCaller, submission: Submission) -> Submitted:
        request = protobuf.encode_options(submission.options)
        request.rendering = submission.rendering
        request.request.ParseFromString(submission.request)
        answer = await self._call("SubmitJob", caller, request)
        return Submitted(protobuf.decode_job(answer.job), answer.is_new)

    async def job_of_key(self, caller: JobCaller, key: str, fingerprint: bytes) -> Job | None:
        request = pb.SubmitJobRequest(idempotency_key=key, fingerprint=fingerprint, only_known=True)
        answer = await self._call("SubmitJob", caller, request)
        return protobuf.decode_job(answer.job) if answer.HasField("job") else None

    async def get(self, caller: JobCaller, job_id: str, wait_s: float = 0.0) -> Job:
        wait_s = min(max(0.0, wait_s), MAX_WAIT_S)
        answer = await self._call("GetJob", caller, pb.GetJobRequest(id=job_id, wait_s=wait_s), wait_s + CALL_TIMEOUT_S)
        return protobuf.decode_job(answer.job)

    async def result(self, caller: JobCaller, job_id: str) -> JobAnswer:
        answer = await self._call("GetJobResult", caller, pb.GetJobResultRequest(id=job_id))
        return JobAnswer(protobuf.decode_job(answer.job), answer.answer.SerializeToString(), answer.rendering)

    async def delete(self, caller: JobCaller, job_id: str, *, keep_ended: bool = False) -> Job:
        request = pb.DeleteJobRequest(id=job_id, keep_ended=keep_ended)
        return protobuf.decode_job((await self._call("DeleteJob", caller, request)).job)

    async def list_jobs(
        self, caller: JobCaller, *, model: str = "", status: str = "", limit: int = 0, after: str = ""
    ) -> list[Job]:
        request = pb.ListJobsRequest(model=model, status=protobuf.encode_status(status), limit=limit, after=after)
        return [protobuf.decode_job(job) for job in (await self._call("ListJobs", caller, request)).jobs]
