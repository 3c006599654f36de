"""Jobs at the proxy: requests are bound to a release and checked, callers are named, and the jobs service does the rest.

Both faces use it: REST through `proxy.rest.jobs`, gRPC through `ProxyJobs.methods`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec

from proxy.guard import NO_CREDENTIALS, Guard, check_model
from proxy.service import ProxyService
from splitserve.api.splitserve.jobs.v1 import jobs_pb2 as pb
from splitserve.errors import (
    InvalidInput,
    NotFound,
    PermissionDenied,
    SplitserveError,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from splitserve.jobs import protobuf
from splitserve.jobs.records import Job, JobCaller, JobOptions, Submitted
from splitserve.jobs.service import JobAnswer, Jobs, Submission, known_job
from splitserve.oip import protobuf as oip
from splitserve.oip.limits import RequestLimits
from splitserve.oip.messages import NO_DEADLINE, PRIORITY, InferRequest, Parameter, RequestedOutput
from splitserve.server.callers import NOBODY, current
from splitserve.server.grpc_face import MoreMethods
from splitserve.telemetry.traces import FIELDS, received_in, submitting
from splitserve.wire.grpc.call import ServerCall

MAX_WAITING = 4096
"""Callers of one process that wait for the end of a job. Each takes one of the calls to the jobs service that may be open at once
(JOBS_MAX_STREAMS), and submits need some too."""


UNBOUND = (InvalidInput, NotFound, Unavailable)
"""How a request is refused that another release may have accepted."""


class Rendering(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the answer of a job is rendered over REST: what `splitserve.oip.rest` and `v1` need of its request."""

    api: str = "v2"
    is_columnar: bool = False
    outputs: tuple[RequestedOutput, ...] = ()
    parameters: dict[str, Parameter] = {}

    @classmethod
    def of(cls, request: InferRequest) -> Rendering:
        """The rendering that a request of V2 asks for."""
        return cls(outputs=request.outputs, parameters=dict(request.parameters))

    def request(self, model: str) -> InferRequest:
        """The part of the request that says how its answer is rendered."""
        return InferRequest(model, (), outputs=self.outputs, parameters=self.parameters)


class ProxyJobs:
    """The verbs of jobs for the callers of the proxy.

    Args:
        service: of the proxy; guarded if callers are authenticated.
        jobs: the jobs service; None: there is none.
        limits: on requests.
        is_authenticated: whether callers are. Otherwise all are one.
        is_local: whether only this machine can reach the proxy.
    """

    def __init__(
        self,
        service: ProxyService | Guard,
        jobs: Jobs | None,
        limits: RequestLimits,
        *,
        is_authenticated: bool = False,
        is_local: bool = True,
    ) -> None:
        self._service = service
        self._given = jobs
        self._limits = limits
        self._is_authenticated = is_authenticated
        self._is_local = is_local
        self._draining = asyncio.Event()
        self._n_waiting = 0

    def drain(self) -> None:
        """Answer everyone who waits for the end of a job, with the job as it is."""
        self._draining.set()

    @property
    def is_enabled(self) -> bool:
        """Whether there is a jobs service."""
        return self._given is not None

    @property
    def _jobs(self) -> Jobs:
        if self._given is None:
            raise Unsupported("jobs are not supported: the proxy has no jobs service (PROXY_JOBS_TARGET; fused: JOBS_DIR)")
        return self._given

    def _caller(self) -> JobCaller:
        if not self._is_authenticated:
            return JobCaller()
        caller = current.get()
        if caller is None or caller is NOBODY:
            raise Unauthenticated(NO_CREDENTIALS)
        if not caller.owner:
            raise PermissionDenied("jobs belong to callers: the token has no name, or no subject (sub)")
        return JobCaller(caller.owner, caller.models)

    def check_enabled(self) -> None:
        """Raises:
        Unsupported: there is no jobs service; it says which setting is missing.
        """
        _ = self._jobs

    def bind(self, request: InferRequest) -> InferRequest:
        """The request as it is stored: bound to the release that it gets now, and checked.

        Raises:
            SplitserveError: it is refused; if it is one of `UNBOUND`, `submitted_before` may know its job.
        """
        self._limits.check(request)
        bound = self._service.bind(request)
        parameters = {name: value for name, value in bound.parameters.items() if name != PRIORITY}
        return msgspec.structs.replace(bound, parameters=parameters)

    async def submit(self, bound: InferRequest, rendering: Rendering, options: JobOptions) -> Submitted:
        """Store a request as a job. ``bound``: by `bind`."""
        jobs, caller = self._jobs, self._caller()
        message = oip.encode_request(bound)
        if bound.trace is not None:
            oip.add_trace(message, bound.trace)
        submission = Submission(
            model=bound.model,
            version=bound.version,
            request=message.SerializeToString(),
            rendering=msgspec.json.encode(rendering),
            options=options,
        )
        return await jobs.submit(caller, submission)

    async def submitted_before(self, options: JobOptions, refusal: SplitserveError) -> Submitted:
        """The job of a request that cannot be bound now, e.g. since another release serves, if its key has stored it before.

        Raises:
            Gone: the job was removed.
            SplitserveError: there is none; the refusal.
        """
        job = await known_job(self._jobs, self._caller(), options.key, options.fingerprint)
        if job is None:
            raise refusal
        return Submitted(job, is_new=False)

    async def get(self, job_id: str, wait_s: float = 0.0) -> Job:
        """As `Jobs.get`; at once where `MAX_WAITING` wait already."""
        jobs, caller = self._jobs, self._caller()
        if not wait_s > 0 or self._draining.is_set() or self._n_waiting >= MAX_WAITING:
            return await jobs.get(caller, job_id)
        self._n_waiting += 1
        ended = asyncio.ensure_future(jobs.get(caller, job_id, wait_s))
        draining = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait((ended, draining), return_when=asyncio.FIRST_COMPLETED)
            return ended.result() if ended.done() else await jobs.get(caller, job_id)
        finally:
            self._n_waiting -= 1
            ended.cancel()
            draining.cancel()

    async def result(self, job_id: str) -> JobAnswer:
        """As `Jobs.result`, if the caller may still call the model."""
        answer = await self._jobs.result(self._caller(), job_id)
        if self._is_authenticated:
            check_model(answer.job.model)
        return answer

    async def delete(self, job_id: str, *, keep_ended: bool = False) -> Job:
        """As `Jobs.delete`."""
        return await self._jobs.delete(self._caller(), job_id, keep_ended=keep_ended)

    async def list_jobs(self, *, model: str = "", status: str = "", limit: int = 0, after: str = "") -> list[Job]:
        """As `Jobs.list_jobs`.

        Raises:
            PermissionDenied: callers are not authenticated, and anyone in the network would see the jobs of all.
        """
        jobs, caller = self._jobs, self._caller()
        if not (self._is_authenticated or self._is_local):
            raise PermissionDenied("jobs are listed for authenticated callers only (PROXY_AUTH_FILE), or on loopback")
        return await jobs.list_jobs(caller, model=model, status=status, limit=limit, after=after)

    # Over gRPC.

    @property
    def methods(self) -> MoreMethods:
        """The gRPC service."""
        handlers = {
            "SubmitJob": self._grpc_submit,
            "GetJob": self._grpc_get,
            "GetJobResult": self._grpc_result,
            "DeleteJob": self._grpc_delete,
            "ListJobs": self._grpc_list,
        }
        return MoreMethods(protobuf.SERVICE, handlers, pb.DESCRIPTOR)

    async def _grpc_submit(self, data: bytes, call: ServerCall) -> bytes:
        self.check_enabled()
        message = oip.parse(pb.SubmitJobRequest, data)
        mark = fingerprint([b"grpc", _meaning(message)]) if message.idempotency_key else b""
        options = msgspec.structs.replace(protobuf.decode_options(message), fingerprint=mark)
        parameters = {
            name: message.request.parameters[name].string_param for name in FIELDS if name in message.request.parameters
        }
        method = f"{protobuf.SERVICE}/SubmitJob"
        attributes = {"rpc.system.name": "grpc", "rpc.method": method, "splitserve.model": message.request.model_name[:128]}
        with submitting(received_in(parameters) or received_in(call.metadata), method, attributes) as trace:
            try:
                request = msgspec.structs.replace(oip.decode_request(message.request, NO_DEADLINE), trace=trace)
                bound = self.bind(request)
            except UNBOUND as refusal:
                submitted = await self.submitted_before(options, refusal)
            else:
                submitted = await self.submit(bound, Rendering.of(request), options)
        return _bytes(pb.SubmitJobResponse(job=protobuf.encode_job(submitted.job), is_new=submitted.is_new))

    async def _grpc_get(self, data: bytes, call: ServerCall) -> bytes:
        message = oip.parse(pb.GetJobRequest, data)
        return _bytes(pb.GetJobResponse(job=protobuf.encode_job(await self.get(message.id, message.wait_s))))

    async def _grpc_result(self, data: bytes, call: ServerCall) -> bytes:
        result = await self.result(oip.parse(pb.GetJobResultRequest, data).id)
        answer = pb.GetJobResultResponse(job=protobuf.encode_job(result.job))
        answer.answer.ParseFromString(result.answer)
        return _bytes(answer)

    async def _grpc_delete(self, data: bytes, call: ServerCall) -> bytes:
        message = oip.parse(pb.DeleteJobRequest, data)
        job = await self.delete(message.id, keep_ended=message.keep_ended)
        return _bytes(pb.DeleteJobResponse(job=protobuf.encode_job(job)))

    async def _grpc_list(self, data: bytes, call: ServerCall) -> bytes:
        message = oip.parse(pb.ListJobsRequest, data)
        status = protobuf.decode_status(message.status)
        jobs = await self.list_jobs(model=message.model, status=status, limit=message.limit, after=message.after)
        return _bytes(pb.ListJobsResponse(jobs=[protobuf.encode_job(job) for job in jobs]))


def fingerprint(parts: Iterable[bytes]) -> bytes:
    """A digest of parts, each with its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def _meaning(message: Any) -> bytes:
    """The request without its key, its trace, and what the proxy sets."""
    copy = pb.SubmitJobRequest()
    copy.CopyFrom(message)
    for field in ("idempotency_key", "fingerprint", "rendering", "only_known"):
        copy.ClearField(field)
    for name in FIELDS:
        copy.request.parameters.pop(name, None)
    data: bytes = copy.SerializeToString(deterministic=True)
    return data


def _bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data
