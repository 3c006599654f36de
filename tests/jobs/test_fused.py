"""Jobs of fused processes that share a folder: one owns it, the others forward to it, and one of them follows it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from fused_service.jobs import SharedFolderJobs
from jobs_service.settings import JobsSettings
from splitserve.errors import NotFound, Unavailable
from splitserve.jobs.records import Job, JobCaller, JobOptions
from splitserve.jobs.service import Submission
from splitserve.oip import protobuf
from splitserve.oip.messages import InferRequest
from splitserve.tensors import Tensor
from tests.jobs.whole import Backend, until
from tests.system.processes import free_ports

ANN, BOB = JobCaller("ann", ("*",)), JobCaller("bob", ("*",))


def submission(value: float = 1.0, **options: Any) -> Submission:
    request = InferRequest("echo", (Tensor("x", "FP32", (1, 2), struct.pack("<2f", value, value)),), version="1.1")
    data = protobuf.encode_request(request).SerializeToString()
    return Submission(model="echo", version="1.1", request=data, rendering=b"{}", options=JobOptions(**options))


class Worker:
    """One of the processes: its jobs, and what answers them there."""

    def __init__(self, config: JobsSettings) -> None:
        self.backend = Backend()
        self.jobs = SharedFolderJobs(self.backend, config)

    async def until(self, job: Job, *statuses: str) -> Job:
        """The job, once its status is one of these; also while there is no owner."""
        while True:
            try:
                found = await self.jobs.get(ANN, job.id, 0.0 if "running" in statuses else 5.0)
            except Unavailable:
                await asyncio.sleep(0.01)
                continue
            if found.status in statuses:
                return found


@pytest.fixture
def config(tmp_path: Path) -> JobsSettings:
    return JobsSettings(dir=str(tmp_path / "jobs"), grpc_port=free_ports(1)[0], grace_s=5, inline_bytes=1000)


@pytest.fixture
async def workers(config: JobsSettings) -> AsyncIterator[tuple[Worker, Worker]]:
    """The first one is the owner."""
    first, second = Worker(config), Worker(config)
    async with first.jobs, second.jobs:
        yield first, second


async def test_a_worker_that_is_not_the_owner_forwards_to_it(workers):
    """Its callers cannot tell; the owner runs the job."""
    owner, other = workers
    submitted = await other.jobs.submit(ANN, submission(key="k"))
    again = await owner.jobs.submit(ANN, submission(key="k"))

    ended = await other.until(submitted.job, "succeeded")
    known = [await each.jobs.job_of_key(ANN, "k", b"") for each in workers]

    assert [job.id for job in known] == [ended.id] * 2
    assert await other.jobs.job_of_key(ANN, "other", b"") is None
    assert (submitted.is_new, again.is_new, again.job.id) == (True, False, ended.id)
    assert (len(owner.backend.requests), len(other.backend.requests)) == (1, 0)
    assert (await other.jobs.result(ANN, ended.id)).answer == (await owner.jobs.result(ANN, ended.id)).answer
    assert [job.id for job in await other.jobs.list_jobs(ANN)] == [ended.id]
    with pytest.raises(NotFound):
        await other.jobs.get(BOB, ended.id)
    assert (await other.jobs.delete(ANN, ended.id)).id == ended.id
    with pytest.raises(NotFound):
        await owner.jobs.get(ANN, ended.id)


async def test_when_the_owner_ends_another_worker_follows_it(workers):
    """What the owner has not finished runs there, and the attempt that was given back does not count."""
    owner, other = workers
    owner.backend.gate.clear()
    job = (await other.jobs.submit(ANN, submission())).job
    await other.until(job, "running")

    await owner.jobs.drain(0)
    await owner.jobs.__aexit__(None, None, None)
    ended = await other.until(job, "succeeded")

    assert ended.attempt == 1
    assert len(other.backend.requests) == 1


async def test_draining_finishes_jobs_and_takes_no_others(workers):
    """Those in flight finish, what is queued stays, and callers are answered all along, in every worker."""
    owner, other = workers
    owner.backend.gate.clear()
    first = (await other.jobs.submit(ANN, submission())).job
    await other.until(first, "running")

    draining = asyncio.create_task(owner.jobs.drain(30))
    await until(lambda: owner.jobs._queue.worker._is_draining)
    second = (await other.jobs.submit(ANN, submission())).job
    owner.backend.gate.set()
    await draining

    assert (await other.jobs.get(ANN, first.id)).status == "succeeded"
    assert (await other.jobs.get(ANN, second.id)).status == "queued"
    assert other.backend.requests == []


async def test_a_worker_that_drains_does_not_become_the_owner(workers, config):
    """It would stop at once."""
    owner, other = workers
    await other.jobs.drain(5)

    await owner.jobs.__aexit__(None, None, None)

    async with Worker(config).jobs as third:
        assert third._queue is not None
    assert other.jobs._queue is None
    with pytest.raises(Unavailable):
        await other.jobs.submit(ANN, submission())


async def test_a_port_in_use_is_reported_once_and_tried_again(config):
    """Inference goes on without jobs until then."""
    with structlog.testing.capture_logs() as logs:
        taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", config.grpc_port)
        async with Worker(config).jobs as jobs:
            assert jobs._queue is None
            await jobs._try_to_own()
            taken.close()
            await taken.wait_closed()
            await until(lambda: jobs._queue is not None)

    reasons = [entry["reason"] for entry in logs if entry["event"] == "jobs not opened"]
    (reason,) = reasons
    assert reason.startswith(f"cannot listen on 127.0.0.1:{config.grpc_port}: Address already in use")
