"""Jobs through the proxy's gRPC face: ``splitserve.jobs.v1``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio

from splitserve.api.splitserve.jobs.v1 import jobs_pb2 as pb
from splitserve.errors import Conflict, IdempotencyKeyReused, InvalidInput, NotFinished, NotFound
from splitserve.jobs.records import new_id
from splitserve.oip import protobuf
from splitserve.oip.messages import InferRequest
from splitserve.remote.inference import translate
from splitserve.tensors import Tensor
from tests.jobs.whole import Whole, whole

pytestmark = pytest.mark.asyncio(loop_scope="module")
REQUEST = InferRequest("echo", (Tensor("x", "FP32", (1, 2), b"\0\0\x80\x3f\0\0\0\x40"),), id="mine")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Whole]:
    async with whole(tmp_path_factory.mktemp("system")) as system:
        yield system


def submit_request(request: InferRequest = REQUEST, **fields: object) -> pb.SubmitJobRequest:
    return pb.SubmitJobRequest(request=protobuf.encode_request(request), **fields)


async def error_of(call) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return translate(caught.value, "proxy")


async def test_a_job_is_submitted_awaited_and_fetched(system):
    """The answer is that of ModelInfer."""
    submitted = await system.call("SubmitJob", submit_request(priority=2, timeout_s=60))
    job = (await system.call("GetJob", pb.GetJobRequest(id=submitted.job.id, wait_s=25))).job
    result = await system.call("GetJobResult", pb.GetJobResultRequest(id=job.id))

    answer = protobuf.decode_response(result.answer)
    assert submitted.is_new
    assert (submitted.job.status, submitted.job.priority) == (pb.JOB_STATUS_QUEUED, 2)
    assert (job.status, job.version, job.attempt) == (pb.JOB_STATUS_SUCCEEDED, "2.1", 1)
    assert (answer.outputs, answer.id, answer.version) == (REQUEST.inputs, "mine", "2.1")


async def test_a_job_submitted_over_grpc_has_a_result_over_rest(system):
    """And the other way round: they are the same jobs."""
    submitted = (await system.call("SubmitJob", submit_request())).job
    await system.call("GetJob", pb.GetJobRequest(id=submitted.id, wait_s=25))

    result = await system.rest.get(f"/v2/jobs/{submitted.id}/result")

    assert result.json()["outputs"][0]["data"] == [1.0, 2.0]


async def test_errors_are_those_of_the_table(system):
    """With their reasons."""
    system.backend.gate.clear()
    try:
        job = (await system.call("SubmitJob", submit_request(idempotency_key="errors"))).job
        not_finished = await error_of(system.call("GetJobResult", pb.GetJobResultRequest(id=job.id)))
        other = InferRequest("echo", (Tensor("x", "FP32", (1, 2), bytes(8)),))
        reused = await error_of(system.call("SubmitJob", submit_request(other, idempotency_key="errors")))
        deleted = (await system.call("DeleteJob", pb.DeleteJobRequest(id=job.id))).job
        cancelled = await error_of(system.call("GetJobResult", pb.GetJobResultRequest(id=job.id)))
    finally:
        system.backend.gate.set()
    unknown = await error_of(system.call("GetJob", pb.GetJobRequest(id=new_id())))
    malformed = await error_of(system.call("SubmitJob", submit_request(InferRequest("echo", ()))))

    kinds = [type(error) for error in (not_finished, reused, cancelled, unknown, malformed)]
    assert kinds == [NotFinished, IdempotencyKeyReused, Conflict, NotFound, InvalidInput]
    assert deleted.status == pb.JOB_STATUS_CANCELLED


async def test_a_key_gives_the_same_job(system):
    """Whatever the client says in the fields that the proxy sets."""
    first = await system.call("SubmitJob", submit_request(idempotency_key="same", fingerprint=b"1"))
    second = await system.call("SubmitJob", submit_request(idempotency_key="same", fingerprint=b"2", rendering=b"junk"))

    assert (first.is_new, second.is_new) == (True, False)
    assert first.job.id == second.job.id


async def test_a_key_gives_its_job_although_its_request_would_be_refused_now(system, monkeypatch):
    """Another release serves. That the proxy may ask for known jobs only is nothing to its clients."""
    first = await system.call("SubmitJob", submit_request(idempotency_key="rollout"))

    def refuse(_: InferRequest) -> None:
        raise NotFound("no such version")

    monkeypatch.setattr(system.service, "bind", refuse)
    again = await system.call("SubmitJob", submit_request(idempotency_key="rollout", only_known=True))
    new = await error_of(system.call("SubmitJob", submit_request(idempotency_key="another")))
    monkeypatch.undo()
    stored = await system.call("SubmitJob", submit_request(idempotency_key="another", only_known=True))

    assert (again.job.id, again.is_new) == (first.job.id, False)
    assert type(new) is NotFound
    assert stored.is_new


async def test_jobs_are_listed(system):
    """By status too."""
    job = (await system.call("SubmitJob", submit_request(InferRequest("identity_fp32", REQUEST.inputs)))).job
    await system.call("GetJob", pb.GetJobRequest(id=job.id, wait_s=25))

    found = await system.call("ListJobs", pb.ListJobsRequest(model="identity_fp32", status=pb.JOB_STATUS_SUCCEEDED))

    assert [each.id for each in found.jobs] == [job.id]
    assert type(await error_of(system.call("ListJobs", pb.ListJobsRequest(status=77)))) is InvalidInput


async def test_the_deadline_of_a_submit_does_not_bound_the_job(system):
    """The job has a timeout of its own."""
    system.backend.gate.clear()
    job = (await system.call("SubmitJob", submit_request(), timeout=0.3)).job
    await asyncio.sleep(0.4)
    system.backend.gate.set()

    found = (await system.call("GetJob", pb.GetJobRequest(id=job.id, wait_s=25))).job

    assert found.status == pb.JOB_STATUS_SUCCEEDED
