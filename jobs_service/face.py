"""The gRPC face of the jobs service: ``splitserve.jobs.v1``, with grpc.health.v1 and reflection."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from grpc_health.v1 import health_pb2

from splitserve.api.inference import inference_pb2
from splitserve.api.splitserve.jobs.v1 import jobs_pb2 as pb
from splitserve.jobs import protobuf
from splitserve.jobs.service import JobQueue, Submission
from splitserve.oip.protobuf import parse
from splitserve.server import failures, health, reflection
from splitserve.server.grpc_config import GrpcConfig
from splitserve.server.grpc_engine import bound_server
from splitserve.server.grpc_status import call_error
from splitserve.wire.byte_budget import ByteBudget
from splitserve.wire.grpc.call import MethodHandler, ServerCall, UnaryHandler
from splitserve.wire.grpc.messages import CallError


class JobsFace:
    """Listens while entered. Callers are whom the metadata says: it must be reachable for the proxy only.

    Args:
        queue: to serve.
        config: how.
        budget: of the bytes that calls hold.
    """

    def __init__(self, queue: JobQueue, config: GrpcConfig, budget: ByteBudget) -> None:
        self._queue = queue
        self._config = config
        self._health = health.Health()
        self._readiness = health.Readiness(self._health, protobuf.SERVICE, queue.not_ready_reason)
        self._server, self.port = bound_server(self._methods(), config, status_of=self._status_of, budget=budget)

    @property
    def ports(self) -> dict[str, int]:
        """Where it listens, by name."""
        return {"grpc_port": self.port}

    async def __aenter__(self) -> JobsFace:
        await self._server.start()
        self._readiness.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._readiness.stop()
        await self._server.stop()

    async def drain(self) -> None:
        """Report "not ready", stop claims, let jobs in flight finish, then refuse new calls."""
        await self._readiness.drain()
        await self._queue.drain(self._config.grace_s)
        await asyncio.sleep(self._config.drain_delay_s)
        self._health.end()
        await self._server.stop(self._config.grace_s)

    def _methods(self) -> Mapping[str, MethodHandler]:
        handlers: dict[str, UnaryHandler] = {
            "SubmitJob": self._submit,
            "GetJob": self._get,
            "GetJobResult": self._result,
            "DeleteJob": self._delete,
            "ListJobs": self._list,
        }
        return {
            **{f"/{protobuf.SERVICE}/{name}": MethodHandler(unary=handler) for name, handler in handlers.items()},
            **self._health.methods,
            **reflection.methods(
                (protobuf.SERVICE, health.SERVICE), (inference_pb2.DESCRIPTOR, pb.DESCRIPTOR, health_pb2.DESCRIPTOR)
            ),
        }

    def _status_of(self, error: Exception) -> CallError:
        return call_error(failures.named(error, self._config.stage), stage=self._config.stage)

    async def _submit(self, data: bytes, call: ServerCall) -> bytes:
        message = parse(pb.SubmitJobRequest, data)
        caller = protobuf.decode_caller(call.metadata)
        if message.only_known:
            job = await self._queue.job_of_key(caller, message.idempotency_key, message.fingerprint)
            return _bytes(pb.SubmitJobResponse(job=None if job is None else protobuf.encode_job(job)))
        submission = Submission(
            model=message.request.model_name,
            version=message.request.model_version,
            request=message.request.SerializeToString(),
            rendering=message.rendering,
            options=protobuf.decode_options(message),
        )
        submitted = await self._queue.submit(caller, submission)
        return _bytes(pb.SubmitJobResponse(job=protobuf.encode_job(submitted.job), is_new=submitted.is_new))

    async def _get(self, data: bytes, call: ServerCall) -> bytes:
        message = parse(pb.GetJobRequest, data)
        job = await self._queue.get(protobuf.decode_caller(call.metadata), message.id, message.wait_s)
        return _bytes(pb.GetJobResponse(job=protobuf.encode_job(job)))

    async def _result(self, data: bytes, call: ServerCall) -> bytes:
        message = parse(pb.GetJobResultRequest, data)
        result = await self._queue.result(protobuf.decode_caller(call.metadata), message.id)
        answer = pb.GetJobResultResponse(job=protobuf.encode_job(result.job), rendering=result.rendering)
        answer.answer.ParseFromString(result.answer)
        return _bytes(answer)

    async def _delete(self, data: bytes, call: ServerCall) -> bytes:
        message = parse(pb.DeleteJobRequest, data)
        job = await self._queue.delete(protobuf.decode_caller(call.metadata), message.id, keep_ended=message.keep_ended)
        return _bytes(pb.DeleteJobResponse(job=protobuf.encode_job(job)))

    async def _list(self, data: bytes, call: ServerCall) -> bytes:
        message = parse(pb.ListJobsRequest, data)
        jobs = await self._queue.list_jobs(
            protobuf.decode_caller(call.metadata),
            model=message.model,
            status=protobuf.decode_status(message.status),
            limit=message.limit,
            after=message.after,
        )
        return _bytes(pb.ListJobsResponse(jobs=[protobuf.encode_job(job) for job in jobs]))


def _bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data
