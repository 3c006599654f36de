"""The worker in front of a fake proxy, on the store in a folder."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import structlog.testing

from splitserve.api.inference import inference_pb2 as pb
from splitserve.batching.admission import BACKGROUND_PRIORITY
from splitserve.errors import (
    DeadlineExceeded,
    Internal,
    InvalidInput,
    NotFound,
    Overloaded,
    PairMismatch,
    PermissionDenied,
    SplitserveError,
    StorageFull,
    Unauthenticated,
    Unavailable,
)
from splitserve.jobs import worker as worker_module
from splitserve.jobs.payloads import Payloads
from splitserve.jobs.records import Job, NewJob, Rights, StoreRules, new_id
from splitserve.jobs.service import JobQueue
from splitserve.jobs.sqlite import SqliteStore
from splitserve.jobs.worker import INTERNAL_ATTEMPTS, Worker, WorkerRules, backoff_s
from splitserve.oip import protobuf
from splitserve.oip.messages import InferRequest, InferResponse, ModelMetadata
from splitserve.server.lifecycle import background
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor
from splitserve.testing import signature

TENSOR = Tensor("x", "INT32", (1, 1), b"\x07\0\0\0")
HOUR = 3600.0


class Proxy:
    """Answers with the inputs, unless ``misbehave`` raises or waits."""

    def __init__(self) -> None:
        self.requests: list[InferRequest] = []
        self.not_ready = ""
        self.signature: ModelMetadata | None = None
        """None: jobs are sent one by one."""
        self.misbehave: Callable[[InferRequest], Awaitable[None]] | None = None

    async def infer(self, request: InferRequest) -> InferResponse:
        self.requests.append(request)
        if self.misbehave is not None:
            await self.misbehave(request)
        return InferResponse(request.model, request.version, request.inputs, request.id)

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        if self.signature is None:
            raise Unavailable("not known")
        return self.signature

    async def not_ready_reason(self) -> str:
        return self.not_ready


class Workshop:
    """A store, a proxy and a worker."""

    def __init__(self, store: SqliteStore, folder: Path) -> None:
        self.store = store
        self.proxy = Proxy()
        self.payloads = Payloads(str(folder / "payloads"), inline_bytes=1000)
        self.has_changed = asyncio.Event()
        self.worker = self.new_worker()
        self._tasks = contextlib.AsyncExitStack()

    def new_worker(self, **rules: float) -> Worker:
        rules = {"poll_s": 0.01, **rules}
        return Worker(self.store, self.proxy, self.payloads, WorkerRules(**rules), on_ended=lambda _: self.has_changed.set())

    @contextlib.asynccontextmanager
    async def working(self, worker: Worker | None = None) -> AsyncIterator[Worker]:
        worker = worker or self.worker
        task = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def submit(self, tensor: Tensor = TENSOR, **options: object) -> Job:
        request = InferRequest("m", (tensor,), version="1.1", id="mine")
        payload = await self.payloads.store(protobuf.encode_request(request).SerializeToString())
        options = {"owner": "ann", "model": "m", "version": "1.1", **options}
        return (await self.store.submit(NewJob(id=new_id(), request=payload, **options))).job

    async def until(self, job: Job, is_it: Callable[[Job], bool]) -> Job:
        async with asyncio.timeout(30):
            while True:
                self.has_changed.clear()
                now = await self.store.get("ann", job.id)
                if is_it(now):
                    return now
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.has_changed.wait(), 0.05)

    async def ended(self, job: Job) -> Job:
        return await self.until(job, lambda now: now.is_finished)

    async def answer_of(self, job: Job) -> InferResponse:
        result = await self.store.result("ann", job.id)
        message = protobuf.parse(pb.ModelInferResponse, await self.payloads.read(result.answer))
        return protobuf.decode_response(message)


@pytest.fixture
async def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Workshop]:
    monkeypatch.setattr(worker_module, "backoff_s", lambda attempt: 0.0)
    store = SqliteStore(tmp_path / "jobs", StoreRules(max_attempts=4))
    store.open()
    yield Workshop(store, tmp_path)
    await store.close()


def raising(*errors: SplitserveError) -> Callable[[InferRequest], Awaitable[None]]:
    """Raises each of them once, and the last one for ever if it is the only one."""
    left = list(errors)

    async def misbehave(_: InferRequest) -> None:
        if left:
            raise left[0] if len(errors) == 1 else left.pop(0)

    return misbehave


async def test_a_job_is_answered_as_a_plain_inference(workshop):
    """The release that was bound at submit is asked, with the lowest priority and the job's own deadline."""
    job = await workshop.submit()

    async with workshop.working():
        ended = await workshop.ended(job)

    answer = await workshop.answer_of(job)
    (request,) = workshop.proxy.requests
    assert (ended.status, ended.attempt) == ("succeeded", 1)
    assert (answer.outputs, answer.id) == ((TENSOR,), "mine")
    assert (request.version, request.parameters["priority"]) == ("1.1", BACKGROUND_PRIORITY)


async def test_large_requests_and_answers_are_files(workshop, tmp_path):
    """The file of the request goes when the job has ended."""
    large = Tensor("x", "UINT8", (5000,), bytes(5000))
    job = await workshop.submit(large)
    before = list((tmp_path / "payloads").iterdir())

    async with workshop.working():
        await workshop.ended(job)
        answer = await workshop.answer_of(job)
        await workshop.worker.drain(5)

    after = list((tmp_path / "payloads").iterdir())
    assert answer.outputs == (large,)
    assert len(before) == len(after) == 1
    assert before != after


@pytest.mark.parametrize("error", [InvalidInput("row 3"), PairMismatch("halves"), PermissionDenied("no")])
async def test_what_fails_for_its_content_fails_at_once(workshop, error):
    """A second attempt would end the same way."""
    workshop.proxy.misbehave = raising(error)
    job = await workshop.submit()

    async with workshop.working():
        ended = await workshop.ended(job)

    assert (ended.status, ended.attempt, len(workshop.proxy.requests)) == ("failed", 1, 1)
    assert type(ended.error.to_error()) is type(error)


@pytest.mark.parametrize("error", [Unavailable("away"), NotFound('model "m" has no version 1.1'), DeadlineExceeded("slow")])
async def test_what_fails_for_the_system_is_tried_again(workshop, error):
    """And answered, if the system recovers."""
    workshop.proxy.misbehave = raising(error, error)
    job = await workshop.submit()

    async with workshop.working():
        ended = await workshop.ended(job)

    assert (ended.status, ended.attempt) == ("succeeded", 3)


async def test_a_release_that_is_gone_ends_the_job_by_name(workshop):
    """No other release answers in its place."""
    workshop.proxy.misbehave = raising(NotFound('model "m" has no version 1.1'))
    job = await workshop.submit()

    async with workshop.working():
        ended = await workshop.ended(job)

    assert (ended.status, ended.attempt) == ("failed", 4)
    assert "1.1" in ended.error.message
    assert {request.version for request in workshop.proxy.requests} == {"1.1"}


async def test_an_unexpected_error_is_tried_a_few_times_only(workshop):
    """It may be the content's."""
    workshop.proxy.misbehave = raising(Internal("internal error"))
    job = await workshop.submit()

    async with workshop.working():
        ended = await workshop.ended(job)

    assert (ended.status, ended.attempt) == ("failed", INTERNAL_ATTEMPTS)


@pytest.mark.parametrize("what", ["read", "store"])
@pytest.mark.parametrize("error", [StorageFull("the disk for payloads of jobs is full"), Unavailable("payloads of jobs")])
async def test_payloads_that_cannot_be_reached_cost_no_attempt(workshop, monkeypatch, what, error):
    """As a database that cannot: a full disk, or a bucket that is down for a while, loses no job."""
    large = Tensor("x", "UINT8", (5000,), bytes(5000))
    job = await workshop.submit(large)
    operation, n_failures = getattr(workshop.payloads, what), iter(range(10))

    async def failing_first(argument):
        if next(n_failures, None) is not None:
            raise error
        return await operation(argument)

    monkeypatch.setattr(workshop.payloads, what, failing_first)

    async with workshop.working():
        ended = await workshop.ended(job)

    assert (ended.status, ended.attempt) == ("succeeded", 1)
    assert next(n_failures, None) is None


async def test_a_job_whose_stored_request_is_gone_fails(workshop, tmp_path):
    """It names what is missing, e.g. after a backup without its payloads was restored."""
    job = await workshop.submit(Tensor("x", "UINT8", (5000,), bytes(5000)))
    for path in (tmp_path / "payloads").iterdir():
        path.unlink()

    async with workshop.working():
        ended = await workshop.ended(job)

    assert "the stored request cannot be found" in ended.error.message
    assert workshop.proxy.requests == []


async def test_429_does_not_count_and_slows_down(workshop):
    """However often it comes."""
    workshop.proxy.misbehave = raising(*[Overloaded("queue full")] * 6)
    jobs = [await workshop.submit() for _ in range(3)]
    before = workshop.worker.window

    async with workshop.working():
        ended = [await workshop.ended(job) for job in jobs]

    assert {job.status for job in ended} == {"succeeded"}
    assert max(job.attempt for job in ended) == 1
    assert workshop.worker.window < before


async def test_nothing_is_claimed_while_the_proxy_is_not_ready(workshop):
    """Jobs stay queued, without an attempt."""
    workshop.proxy.not_ready = "the proxy cannot be reached"
    job = await workshop.submit()

    async with workshop.working():
        await workshop.until(job, lambda now: workshop.worker._not_ready == "the proxy cannot be reached")
        before = await workshop.store.get("ann", job.id)
        workshop.proxy.not_ready = ""
        ended = await workshop.ended(job)

    assert (before.status, before.attempt) == ("queued", 0)
    assert (ended.status, ended.attempt) == ("succeeded", 1)


async def test_a_proxy_that_goes_away_costs_no_attempt(workshop, monkeypatch):
    """Nothing is known to be wrong with the job."""
    monkeypatch.setattr(worker_module, "BACKOFF", worker_module.BACKOFF._replace(first_s=0.0))
    n_calls = []

    async def go_away(_: InferRequest) -> None:
        n_calls.append(1)
        if len(n_calls) < 10:
            workshop.proxy.not_ready = "the proxy cannot be reached"
            asyncio.get_running_loop().call_later(0.001, lambda: setattr(workshop.proxy, "not_ready", ""))
            raise Unavailable("the proxy cannot be reached", stage="proxy")

    workshop.proxy.misbehave = go_away
    job = await workshop.submit()

    async with workshop.working():
        ended = await workshop.ended(job)

    assert (ended.status, ended.attempt) == ("succeeded", 1)


async def test_wrong_credentials_of_the_service_cost_no_attempt(workshop, monkeypatch):
    """They are the operator's fault, who learns it from the log; nothing is wrong with the jobs, which wait."""
    monkeypatch.setattr(worker_module, "REFUSED_PAUSE_S", 0.0)
    workshop.proxy.misbehave = raising(*[Unauthenticated("the credentials are not valid")] * 10)
    with structlog.testing.capture_logs() as logs:
        job = await workshop.submit()
        async with workshop.working(workshop.new_worker()):
            ended = await workshop.ended(job)

    assert (ended.status, ended.attempt) == ("succeeded", 1)
    assert [entry["see"] for entry in logs if "credentials refused" in entry["event"]] == ["JOBS_PROXY_TOKEN_FILE"] * 10


async def test_nothing_is_claimed_for_a_while_after_wrong_credentials(workshop, monkeypatch):
    """Every job would be refused."""
    monkeypatch.setattr(worker_module, "REFUSED_PAUSE_S", HOUR)
    workshop.proxy.misbehave = raising(Unauthenticated("the credentials are not valid"))
    jobs = [await workshop.submit() for _ in range(3)]
    worker = workshop.new_worker(window=1)

    async with workshop.working(worker):
        await workshop.until(jobs[0], lambda _: worker._refused_at > 0 and worker.n_running == 0)
        is_ready = await worker._is_inference_ready()

    assert not is_ready
    assert [(await workshop.store.get("ann", job.id)).status for job in jobs] == ["queued"] * 3
    assert len(workshop.proxy.requests) == 1


async def test_a_job_that_exceeds_its_own_timeout_fails(workshop):
    """It is not tried again: it would take as long."""

    async def take_long(request: InferRequest) -> None:
        await asyncio.sleep(0.01)
        raise DeadlineExceeded("deadline exceeded")

    workshop.proxy.misbehave = take_long
    job = await workshop.submit(timeout_s=0.01)

    async with workshop.working():
        ended = await workshop.ended(job)

    assert (ended.status, ended.attempt) == ("failed", 1)
    assert "its timeout of 0.01 s" in ended.error.message


async def test_rights_are_those_of_the_caller(workshop):
    """Not of the worker."""
    job = await workshop.submit(rights=Rights(("other-*",)))

    async with workshop.working():
        ended = await workshop.ended(job)

    assert type(ended.error.to_error()) is PermissionDenied
    assert workshop.proxy.requests == []


async def test_a_long_job_keeps_its_lease(workshop):
    """Renewal does not wait for the work; another worker does not get the job."""
    release = asyncio.Event()

    async def wait(_: InferRequest) -> None:
        await release.wait()

    workshop.proxy.misbehave = wait
    job = await workshop.submit()
    renewals = []
    renew = workshop.store.renew

    async def counted(worker: str, leases, lease_s: float):
        renewals.append(list(leases))
        if sum(map(len, renewals)) > 10:
            release.set()
        return await renew(worker, leases, lease_s)

    workshop.store.renew = counted
    first, second = workshop.new_worker(lease_s=0.3), workshop.new_worker(lease_s=0.3)
    async with workshop.working(first), workshop.working(second):
        ended = await workshop.ended(job)

    assert (ended.status, ended.attempt, len(workshop.proxy.requests)) == ("succeeded", 1, 1)


async def test_a_paused_worker_drops_what_it_held(workshop):
    """Its lease was over, another worker has answered: there is one result, and nobody sees an error."""
    is_first = [True]
    stuck = asyncio.Event()

    async def stick_once(_: InferRequest) -> None:
        if is_first and is_first.pop():
            await stuck.wait()

    workshop.proxy.misbehave = stick_once
    job = await workshop.submit()
    paused = workshop.new_worker(lease_s=HOUR)
    async with workshop.working(paused):
        await workshop.until(job, lambda now: bool(workshop.proxy.requests))
        await workshop.store._call(lambda connection: connection.execute("UPDATE jobs SET lease_until = 0"))
        async with workshop.working():
            ended = await workshop.ended(job)
        stuck.set()
        await paused.drain(5)

    assert (ended.status, ended.attempt) == ("succeeded", 2)
    assert paused.n_refused_writes == 1
    assert (await workshop.store.get("ann", job.id)).status == "succeeded"


async def test_a_running_job_that_is_cancelled_is_dropped(workshop):
    """At once, where the worker is told."""
    was_cancelled = asyncio.Event()

    async def wait(_: InferRequest) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            was_cancelled.set()
            raise

    workshop.proxy.misbehave = wait
    job = await workshop.submit()

    async with workshop.working() as worker, asyncio.timeout(30):
        await workshop.until(job, lambda now: bool(workshop.proxy.requests))
        await workshop.store.delete("ann", job.id)
        worker.cancel(job.id)
        await was_cancelled.wait()
        assert worker.n_running == 0

    assert (await workshop.store.get("ann", job.id)).status == "cancelled"


async def test_a_running_job_that_another_replica_cancels_is_dropped(workshop):
    """The announcement tells it; its next heartbeat would be late."""
    was_cancelled = asyncio.Event()

    async def wait(_: InferRequest) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            was_cancelled.set()

    workshop.proxy.misbehave = wait
    queue = JobQueue(workshop.store, workshop.payloads, check_webhook=lambda *_: None)
    queue.worker = workshop.new_worker(lease_s=HOUR)
    job = await workshop.submit()

    async with workshop.working(queue.worker), background(queue.run()), asyncio.timeout(30):
        await workshop.until(job, lambda now: bool(workshop.proxy.requests))
        await workshop.store.delete("ann", job.id)
        queue._announced()
        await was_cancelled.wait()

    assert queue.worker.n_running == 0


async def test_a_drained_worker_finishes_what_it_can(workshop):
    """And gives the rest back, without an attempt."""
    release = asyncio.Event()

    async def wait(request: InferRequest) -> None:
        await (release.wait() if request.inputs == (TENSOR,) else asyncio.Event().wait())

    workshop.proxy.misbehave = wait
    quick = await workshop.submit()
    slow = await workshop.submit(Tensor("x", "INT32", (1, 1), b"\x08\0\0\0"))

    async with workshop.working() as worker:
        await workshop.until(quick, lambda now: len(workshop.proxy.requests) == 2)
        asyncio.get_running_loop().call_soon(release.set)
        await worker.drain(0.2)

    assert (await workshop.store.get("ann", quick.id)).status == "succeeded"
    now = await workshop.store.get("ann", slow.id)
    assert (now.status, now.attempt) == ("queued", 0)


async def test_what_is_claimed_while_draining_begins_is_given_back(workshop):
    """The claim was under way."""
    job = await workshop.submit()
    claim = workshop.store.claim

    async def claim_and_drain(*arguments):
        claimed = await claim(*arguments)
        workshop.worker._is_draining = True
        return claimed

    workshop.store.claim = claim_and_drain
    async with workshop.working():
        await workshop.until(job, lambda now: workshop.worker._is_draining and now.status == "queued")

    now = await workshop.store.get("ann", job.id)
    assert (now.status, now.attempt, workshop.proxy.requests) == ("queued", 0, [])


async def test_rolling_restarts_use_up_no_attempts(workshop):
    """Ten workers one after the other, each drained while the job runs."""

    async def wait(_: InferRequest) -> None:
        await asyncio.Event().wait()

    workshop.proxy.misbehave = wait
    job = await workshop.submit()
    for number in range(10):
        worker = workshop.new_worker()
        async with workshop.working(worker):
            await workshop.until(job, lambda now, n=number: len(workshop.proxy.requests) > n)
            await worker.drain(0)
    workshop.proxy.misbehave = None

    async with workshop.working():
        ended = await workshop.ended(job)

    assert (ended.status, ended.attempt) == ("succeeded", 1)


async def test_results_wait_for_a_store_that_is_away(workshop):
    """They are kept, within the window, and each job has one result when the store is back."""
    finish = workshop.store.finish
    n_tries = []

    async def away(finishes):
        n_tries.append(len(finishes))
        if len(n_tries) < 4:
            raise Unavailable("the job store cannot be reached")
        return await finish(finishes)

    workshop.store.finish = away
    worker = workshop.new_worker(window=4)
    jobs = [await workshop.submit() for _ in range(12)]

    async with workshop.working(worker):
        ended = [await workshop.ended(job) for job in jobs]

    assert {job.status for job in ended} == {"succeeded"}
    assert {job.attempt for job in ended} == {1}
    assert len(workshop.proxy.requests) == 12
    assert max(n_tries) <= 4


async def test_an_end_that_cannot_be_written_holds_up_no_other(workshop, monkeypatch):
    """The job fails; the others of its group end as they did."""
    jobs = [await workshop.submit() for _ in range(3)]
    finish = workshop.store.finish

    async def finish_others(finishes):
        if any(each.lease.id == jobs[1].id and each.error is None for each in finishes):
            raise Internal("internal error", stage="jobs")
        return await finish(finishes)

    monkeypatch.setattr(workshop.store, "finish", finish_others)

    async with workshop.working():
        ended = [await workshop.ended(job) for job in jobs]

    assert [job.status for job in ended] == ["succeeded", "failed", "succeeded"]
    assert ended[1].error.reason == "INTERNAL"


async def test_the_window_bounds_what_is_in_flight(workshop):
    """And fills up again as jobs end."""
    n_now, n_most = [0], [0]

    async def count(_: InferRequest) -> None:
        n_now[0] += 1
        n_most[0] = max(n_most[0], n_now[0])
        await asyncio.sleep(0)
        n_now[0] -= 1

    workshop.proxy.misbehave = count
    jobs = [await workshop.submit() for _ in range(20)]

    async with workshop.working(workshop.new_worker(window=5)):
        for job in jobs:
            await workshop.ended(job)

    assert 1 <= n_most[0] <= 5


def row(value: int) -> Tensor:
    return Tensor("x", "INT32", (1, 1), value.to_bytes(4, "little"))


async def test_small_jobs_are_merged_and_each_has_its_own_end(workshop):
    """Once the signature of their release is known. A bad row fails its own job only."""
    workshop.proxy.signature = signature("m", [TensorSpec("x", "INT32", ("batch", 1))], version="1.1")
    claim, may_claim = workshop.store.claim, asyncio.Event()
    may_claim.set()

    async def claim_later(*arguments):
        await may_claim.wait()
        return await claim(*arguments)

    async def refuse(request: InferRequest) -> None:
        if row(7).raw in [request.inputs[0].raw[at : at + 4] for at in range(0, len(request.inputs[0].raw), 4)]:
            raise InvalidInput("seven")

    workshop.store.claim = claim_later
    workshop.proxy.misbehave = refuse
    async with workshop.working() as worker:
        await workshop.until(await workshop.submit(), lambda now: now.is_finished and worker._mergeable == {("m", "1.1"): True})
        may_claim.clear()
        jobs = [await workshop.submit(row(value)) for value in range(10)]
        n_before = len(workshop.proxy.requests)
        may_claim.set()
        ended = [await workshop.ended(job) for job in jobs]

    assert max(request.n_rows for request in workshop.proxy.requests[n_before:]) > 1
    assert [job.status for job in ended] == ["failed" if value == 7 else "succeeded" for value in range(10)]
    for value in {*range(10)} - {7}:
        answer = await workshop.answer_of(jobs[value])
        assert (answer.outputs, answer.id) == ((row(value),), "mine")


async def test_rows_of_a_cancelled_job_are_not_sent_if_they_were_not_yet(workshop):
    """The job was claimed and waits for a call to end."""
    release = asyncio.Event()

    async def wait(_: InferRequest) -> None:
        await release.wait()

    workshop.proxy.misbehave = wait
    worker = workshop.new_worker(window=32)
    jobs = [await workshop.submit(row(value)) for value in range(WorkerRules(window=32).batch_limits.max_in_flight + 1)]

    async with workshop.working(worker):
        await workshop.until(jobs[0], lambda now: len(workshop.proxy.requests) == len(jobs) - 1 and worker.n_running == len(jobs))
        sent = {request.inputs[0].raw for request in workshop.proxy.requests}
        (waiting,) = [job for value, job in enumerate(jobs) if row(value).raw not in sent]
        await workshop.store.delete("ann", waiting.id)
        worker.cancel(waiting.id)
        release.set()
        ended = [await workshop.ended(job) for job in jobs]

    assert sorted(job.status for job in ended) == ["cancelled"] + ["succeeded"] * (len(jobs) - 1)
    assert {request.inputs[0].raw for request in workshop.proxy.requests} == sent


def test_backoff_doubles_up_to_a_limit():
    """With jitter, so that jobs that failed together are not tried together."""
    assert 0.75 <= backoff_s(1) <= 1.25
    assert 3.0 <= backoff_s(3) <= 5.0
    assert 45 <= backoff_s(40) <= 75
    assert 45 <= backoff_s(10_000) <= 75


async def test_jobs_of_a_claim_whose_answer_is_lost_run(workshop, monkeypatch):
    """It was committed before the connection broke: the worker that renews its leases would keep them for ever."""
    claim, lost = workshop.store.claim, []

    async def committed_and_cut_off(*arguments):
        claims = await claim(*arguments)
        if claims and not lost:
            lost.extend(claims)
            raise Unavailable("the job store cannot be reached")
        return claims

    monkeypatch.setattr(workshop.store, "claim", committed_and_cut_off)
    job = await workshop.submit()
    async with workshop.working(workshop.new_worker(lease_s=HOUR)):
        ended = await workshop.ended(job)

    assert [each.lease.id for each in lost] == [job.id]
    assert (ended.status, ended.attempt) == ("succeeded", 1)
