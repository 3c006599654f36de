"""The worker: claims jobs, sends them to the proxy with low priority, and writes how they ended.

1. It keeps up to a window of jobs in flight, merges small ones, and leaves the rest of the merging to the proxy. The window is
   halved when the proxy says 429, and grows again with successes.
2. Leases are renewed by a task of its own, whatever the jobs do. A job whose lease is lost is dropped: what it would write is
   refused.
3. How jobs ended is written in groups: while one group is being written, the next one forms. If the store is unreachable, the
   group is kept and written again; meanwhile its jobs hold their leases and their places in the window, which bounds the buffer.
4. An error of the request's content ends the job; an error of the system is retried with backoff, up to the store's limit of
   attempts. An attempt that the proxy refused (429, or for the credentials of this service), or that ended because the proxy was
   unreachable, or because a payload could not be read or stored, is given back.
5. Draining: nothing is claimed any more; what is in flight may finish within the grace, and is given back after that.

It knows no transport: ``inference`` is any `InferenceService`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import structlog

from splitserve.api.inference import inference_pb2 as pb
from splitserve.backoff import Backoff
from splitserve.batching.admission import BACKGROUND_PRIORITY
from splitserve.batching.batcher import Batcher
from splitserve.batching.merging import is_mergeable
from splitserve.batching.queue import BatchLimits
from splitserve.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    NotFound,
    Overloaded,
    SplitserveError,
    StorageFull,
    Unauthenticated,
    Unavailable,
    at_stage,
)
from splitserve.jobs.payloads import Payloads
from splitserve.jobs.records import Claimed, Finish, JobError, Lease, Payload, Retry, new_id
from splitserve.jobs.store import JobStore
from splitserve.oip import protobuf
from splitserve.oip.messages import ON_BEHALF_OF, PRIORITY, InferenceService, InferRequest, InferResponse, deadline_after
from splitserve.oip.pending import Pending
from splitserve.oip.permission import is_permitted, not_permitted
from splitserve.telemetry.traces import Attribute, Span, TraceContext, Tracer, Tracing

STAGE = "jobs"

RETRIED = (Cancelled, DeadlineExceeded, Internal, NotFound, Overloaded, StorageFull, Unavailable)
"""Errors of the system. A model or release that is not there may be back after a rollout."""

INTERNAL_ATTEMPTS = 3
"""An unexpected error may be the content's after all: it is tried no more often."""

BACKOFF = Backoff(1.0, 60.0, jitter=(0.75, 1.25))
SLOW_DOWN_S = 0.1
"""The window is halved at most once in this time: the refusals of one moment are one signal."""

STORE_RETRY_S = 0.2

REFUSED_PAUSE_S = 5.0
"""How long nothing is claimed after the proxy has refused the credentials of this service."""

MERGED_BYTES = 64 * 1024
"""Jobs of few small rows cost more than their rows, so the worker merges some; larger ones it leaves to the proxy."""

MAX_KNOWN_RELEASES = 1024


class WorkerRules(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of a worker.

    ``merged_rows`` of small jobs are sent as one request: few, so that the proxy can fit them in where others leave rows over.
    ``poll_s`` is how long an orphan or a delayed job waits at most once it could be claimed.
    """

    window: int = 256
    merged_rows: int = 32
    lease_s: float = 10.0
    poll_s: float = 0.5

    @property
    def batch_limits(self) -> BatchLimits:
        """Of the requests to the proxy: so many at once that it can merge them, and use all replicas."""
        return BatchLimits(
            max_batch_size=self.merged_rows,
            max_batch_bytes=MERGED_BYTES,
            max_queue_size=self.window,
            max_in_flight=max(8, self.window // 4),
            max_background_wait_ms=0,
        )


class _Running(msgspec.Struct, eq=False):
    """A job in flight, or one whose end is not written yet. ``pending`` is the work in progress, if there is any."""

    claimed: Claimed
    began: float
    pending: Pending | None = None
    has_ended: bool = False
    span: Span | None = None
    """Of this attempt, if it is recorded."""

    def cancel(self) -> None:
        if self.pending is not None:
            self.pending.cancel()

    def end_span(self, code: str) -> None:
        """No effect without a span, or a second time."""
        span, self.span = self.span, None
        if span is not None and (tracer := Tracing.tracer) is not None:
            tracer.end(span, code)


class Worker:
    """Runs jobs until `run` is cancelled.

    Args:
        store: where jobs come from.
        inference: what answers them.
        payloads: of large requests and answers.
        rules: its limits.
        on_ended: called with the ids of jobs whose final state was written.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: JobStore,
        inference: InferenceService,
        payloads: Payloads,
        rules: WorkerRules | None = None,
        *,
        on_ended: Callable[[Sequence[str]], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._inference = inference
        self._payloads = payloads
        self._rules = rules or WorkerRules()
        self._on_ended = on_ended
        self._clock = clock
        self._log = structlog.get_logger()
        self.name = new_id()
        """An incarnation: no two workers have the same, not even one after the other."""
        self.window = float(min(32, self._rules.window))
        self.n_refused_writes = 0
        """Writes that came too late: another claim was newer, or the job was cancelled."""
        self.n_attempts = 0
        self._batcher = Batcher(inference.infer, self._rules.batch_limits)
        self._mergeable: dict[tuple[str, str], bool] = {}
        """By model and version: whether its rows are independent; False while it is being asked."""
        self._learning: set[asyncio.Task[None]] = set()
        self._running: dict[Lease, _Running] = {}
        self._ended: list[Finish | Retry] = []
        self._has_ended = asyncio.Event()
        self._work = asyncio.Event()
        self._has_room = asyncio.Event()
        self._slowed_at = self._renewed_at = self._asked_at = clock()
        self._refused_at = -math.inf
        self._is_draining = self._may_hold_unknown = False
        self._not_ready = "starting"

    @property
    def n_running(self) -> int:
        """Jobs in flight, and those whose end is not written yet."""
        return len(self._running)

    @property
    def running_ids(self) -> set[str]:
        """The jobs in flight."""
        return {lease.id for lease, running in self._running.items() if not running.has_ended}

    def wake(self) -> None:
        """There may be jobs to claim."""
        self._work.set()

    def cancel(self, job_id: str) -> None:
        """The job was cancelled: drop it.

        Rows that were not sent yet never are. A request that has no other job's rows is cancelled at the proxy, which does not
        send it on if it has not yet.
        """
        for lease, running in list(self._running.items()):
            if lease.id == job_id and not running.has_ended:
                self._drop(lease)

    async def run(self) -> None:
        """Work until cancelled."""
        tasks = [asyncio.create_task(each) for each in (self._keep_renewing(), self._keep_writing(), self._keep_claiming())]
        try:
            await asyncio.gather(*tasks)
        finally:
            for running in self._running.values():
                running.cancel()
            for task in (*tasks, *self._learning):
                task.cancel()
            await asyncio.gather(*tasks, *self._learning, return_exceptions=True)
            await self._batcher.close()

    async def drain(self, grace_s: float) -> None:
        """Claim no more; let what is in flight finish, give back the rest. `run` has to run on until this returns."""
        self._is_draining = True
        self._work.set()
        await self._until_empty(grace_s)
        for lease, running in list(self._running.items()):
            if not running.has_ended:
                running.cancel()
                self._end(Retry(lease))
        await self._until_empty(min(grace_s, self._rules.lease_s))

    async def _until_empty(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._running:
                    self._has_room.clear()
                    await self._has_room.wait()

    # Claiming.

    async def _keep_claiming(self) -> None:
        while True:
            self._work.clear()
            n_claimed = 0
            try:
                if not self._is_draining and await self._is_inference_ready() and not self._is_draining:
                    n_claimed = await self._claim()
            except SplitserveError as error:
                self._log.debug("no jobs claimed", reason=error.message)
            if n_claimed == 0 or self._n_free() < 1:
                await self._wait_for_work()

    def _n_free(self) -> int:
        return int(self.window) - len(self._running)

    async def _wait_for_work(self) -> None:
        """Until there may be jobs and there is room for a good part of a window."""
        end = self._clock() + self._rules.poll_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._rules.poll_s):
                await self._work.wait()
        while self._n_free() < max(1, int(self.window) // 4) and self._clock() < end + self._rules.lease_s:
            self._has_room.clear()
            await self._has_room.wait()

    async def _is_inference_ready(self) -> bool:
        if self._clock() - self._refused_at < REFUSED_PAUSE_S:
            return False
        if not self._not_ready and self._clock() - self._asked_at < self._rules.poll_s:
            return True
        self._asked_at = self._clock()
        reason = await self._inference.not_ready_reason()
        if reason != self._not_ready:
            self._not_ready = reason
            if reason:
                # Jobs stay queued until the proxy is ready.
                self._log.info("jobs wait", reason=reason)
        return not reason

    async def _claim(self) -> int:
        if self._clock() - self._renewed_at > self._rules.lease_s:
            await self._renew()  # this process was paused: first learn what is still its own
        free = self._n_free()
        if free < 1:
            return 0
        if self._may_hold_unknown:
            await self._store.give_back_all_but(self.name, list(self._running))
        self._may_hold_unknown = True  # until the answer is here: it may be lost although the claim was committed
        claims = await self._store.claim(self.name, free, self._rules.lease_s)
        self._may_hold_unknown = False
        if self._is_draining:
            await self._store.retry([Retry(claimed.lease) for claimed in claims])
            return 0
        for claimed in claims:
            self._start(claimed)
        return len(claims)

    # An attempt.

    def _start(self, claimed: Claimed) -> None:
        self.n_attempts += 1
        running = self._running[claimed.lease] = _Running(claimed, self._clock())
        if claimed.request.ref:
            running.pending = asyncio.create_task(self._read(running))
        else:
            self._begin(running, claimed.request.data)

    async def _read(self, running: _Running) -> None:
        """Begin once the request is read from its file."""
        claimed = running.claimed
        try:
            data = await self._payloads.read(claimed.request)
        except FileNotFoundError as error:  # the job was cancelled between the claim and now; then this is not written
            missing = JobError.of(Internal("the stored request cannot be found", stage=STAGE, model=claimed.model))
            self._log.debug("request of a job not found", reason=str(error))
            self._end(Retry(claimed.lease, backoff_s(claimed.attempt), missing))
        except (StorageFull, Unavailable):
            self._give_back(claimed)
        except Exception as error:
            self._failed(running, error)
        else:
            self._begin(running, data)

    def _begin(self, running: _Running, data: bytes) -> None:
        claimed = running.claimed
        try:
            request = self._request(claimed, data)
            if request.trace is not None and (tracer := Tracing.tracer) is not None:
                request = self._traced(running, request, request.trace, tracer)
            merges = self._is_mergeable(claimed.model, claimed.version)
            running.pending = self._batcher.begin(request, partial(self._answered, running), is_mergeable=merges)
        except Exception as error:
            self._failed(running, error)

    def _traced(self, running: _Running, request: InferRequest, trace: TraceContext, tracer: Tracer) -> InferRequest:
        """The request with a span for this attempt, a child of the job's submission, if that was recorded."""
        claimed = running.claimed
        attributes: dict[str, Attribute] = {
            "splitserve.job": claimed.lease.id,
            "splitserve.job.attempt": claimed.attempt,
            "splitserve.model": claimed.model,
            "splitserve.release": claimed.version,
            "splitserve.rows": request.n_rows,
        }
        context = tracer.continued(trace, "consumer", f"run job {claimed.model}", attributes)
        if context is None:
            return request
        running.span = context.span
        return msgspec.structs.replace(request, trace=context)

    def _request(self, claimed: Claimed, data: bytes) -> InferRequest:
        models = claimed.rights.models  # of its caller, when it submitted the job
        if models is not None and not is_permitted(models, claimed.model):
            raise not_permitted(claimed.model)
        message = protobuf.parse(pb.ModelInferRequest, data)
        request = protobuf.decode_request(message, deadline_after(claimed.timeout_s))
        parameters = {**request.parameters, PRIORITY: BACKGROUND_PRIORITY}
        if models is not None:
            parameters[ON_BEHALF_OF] = claimed.owner
        return msgspec.structs.replace(request, parameters=parameters, version=claimed.version)

    def _is_mergeable(self, model: str, version: str) -> bool:
        """Whether jobs of a release are merged. Not before its signature is known, which the first of them asks for."""
        release = model, version
        known = self._mergeable.get(release)
        if known is None:
            if len(self._mergeable) >= MAX_KNOWN_RELEASES:
                self._mergeable.clear()
            self._mergeable[release] = known = False
            self._learning = {task for task in self._learning if not task.done()}
            self._learning.add(asyncio.create_task(self._learn(model, version)))
        return known

    async def _learn(self, model: str, version: str) -> None:
        try:
            self._mergeable[model, version] = is_mergeable(await self._inference.metadata(model, version))
        except SplitserveError:
            self._mergeable.pop((model, version), None)  # the next job asks again

    def _answered(self, running: _Running, outcome: InferResponse | Exception) -> None:
        if isinstance(outcome, Exception):
            self._failed(running, outcome)
            return
        self.window = min(float(self._rules.window), self.window + 1 / self.window)
        try:
            data = protobuf.encode_response(outcome).SerializeToString()
        except Exception as error:
            self._failed(running, error)
            return
        if self._payloads.is_inline(data):
            self._end(Finish(running.claimed.lease, Payload(data)))
        else:
            running.pending = asyncio.create_task(self._store_answer(running, data))

    async def _store_answer(self, running: _Running, data: bytes) -> None:
        try:
            self._end(Finish(running.claimed.lease, await self._payloads.store(data)))
        except (StorageFull, Unavailable):
            self._give_back(running.claimed)
        except Exception as error:
            self._failed(running, error)

    def _give_back(self, claimed: Claimed) -> None:
        """Payloads cannot be read or stored, e.g. because the disk is full: that is neither the job's fault nor the proxy's."""
        self._slow_down()
        self._end(Retry(claimed.lease, backoff_s(claimed.attempt)))

    def _failed(self, running: _Running, error: Exception) -> None:
        """What follows from an error."""
        claimed = running.claimed
        error = at_stage(STAGE, model=claimed.model, pair=claimed.version).named(error)
        record = JobError.of(error)
        if isinstance(error, Overloaded):
            self._slow_down()
            self._end(Retry(claimed.lease, random.uniform(0.05, 0.5)))  # noqa: S311
        elif isinstance(error, Unauthenticated):
            self._refused()
            self._end(Retry(claimed.lease))
        elif isinstance(error, DeadlineExceeded) and self._clock() - running.began >= 0.9 * claimed.timeout_s:
            message = f"the job took longer than its timeout of {claimed.timeout_s:g} s"
            self._end(Finish(claimed.lease, error=msgspec.structs.replace(record, message=message)))
        elif not isinstance(error, RETRIED) or (isinstance(error, Internal) and claimed.attempt >= INTERNAL_ATTEMPTS):
            self._end(Finish(claimed.lease, error=record))
        elif isinstance(error, Unavailable):
            running.pending = asyncio.create_task(self._retry_when_ready(claimed, record))
        else:
            self._end(Retry(claimed.lease, backoff_s(claimed.attempt), record))

    def _refused(self) -> None:
        now = self._clock()
        if now - self._refused_at >= REFUSED_PAUSE_S:
            # The proxy refuses this service's token, or it has none. Jobs stay queued.
            self._log.warning("credentials refused by the proxy", see="JOBS_PROXY_TOKEN_FILE")
        self._refused_at = now

    async def _retry_when_ready(self, claimed: Claimed, record: JobError) -> None:
        reason = await self._inference.not_ready_reason()
        if reason:
            self._not_ready = reason
            self._end(Retry(claimed.lease, BACKOFF.first_s))  # the proxy is unreachable: nothing was tried
        else:
            self._end(Retry(claimed.lease, backoff_s(claimed.attempt), record))

    def _slow_down(self) -> None:
        now = self._clock()
        if now - self._slowed_at >= SLOW_DOWN_S:
            self._slowed_at = now
            self.window = max(1.0, self.window / 2)

    def _end(self, outcome: Finish | Retry) -> None:
        """An attempt has ended; it is written with the next group."""
        running = self._running.get(outcome.lease)
        if running is None:  # dropped meanwhile
            self._free(outcome)
            return
        running.pending = None  # breaks a reference cycle, which only the garbage collector would free
        running.has_ended = True
        if running.span is not None:
            error = outcome.error
            running.end_span(error.code if error else "OK" if isinstance(outcome, Finish) else "CANCELLED")
        self._ended.append(outcome)
        self._has_ended.set()

    def _free(self, outcome: Finish | Retry) -> None:
        """Remove the payload of an answer that nobody will read; a sweep removes what this misses."""
        if isinstance(outcome, Finish) and outcome.answer is not None and outcome.answer.ref:
            asyncio.get_running_loop().create_task(self._payloads.remove([outcome.answer.ref]))

    def _drop(self, lease: Lease) -> None:
        running = self._running.pop(lease, None)
        if running is not None:
            running.cancel()
            running.end_span("CANCELLED")
        self._has_room.set()

    # Writing.

    async def _keep_writing(self) -> None:
        while True:
            await self._has_ended.wait()
            self._has_ended.clear()
            group, self._ended = self._ended, []
            while True:
                try:
                    await self._write(group)
                    break
                except Internal:
                    await self._write_one_by_one(group)
                    break
                except SplitserveError:
                    await asyncio.sleep(STORE_RETRY_S)

    async def _write_one_by_one(self, group: Sequence[Finish | Retry]) -> None:
        """One of a group cannot be written: it ends as failed, and holds up no other."""
        for outcome in group:
            try:
                await self._write([outcome])
            except Internal as error:
                self._ended.append(Finish(outcome.lease, error=JobError.of(Internal(error.message, stage=STAGE))))
            except SplitserveError:
                self._ended.append(outcome)
        if self._ended:
            self._has_ended.set()
            await asyncio.sleep(STORE_RETRY_S)

    async def _write(self, group: Sequence[Finish | Retry]) -> None:
        """Write a group. Writing it again, because an error hid whether it was written, changes nothing: fences are used once."""
        finishes = [each for each in group if isinstance(each, Finish)]
        retries = [each for each in group if isinstance(each, Retry)]
        written = list(await self._store.finish(finishes)) if finishes else []
        rewritten = list(await self._store.retry(retries)) if retries else []
        unread = []
        outcomes: list[Finish | Retry] = [*finishes, *retries]
        for outcome, is_written in zip(outcomes, [*written, *rewritten], strict=True):
            running = self._running.pop(outcome.lease, None)
            if not is_written:
                self.n_refused_writes += 1
                self._free(outcome)
            elif isinstance(outcome, Finish) and running is not None:
                unread.append(running.claimed.request.ref)
        self._has_room.set()
        self._work.set()
        self._on_ended([outcome.lease.id for outcome in group])
        await self._payloads.remove(unread)

    # Leases.

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(self._rules.lease_s / 3)
            with contextlib.suppress(SplitserveError):
                await self._renew()

    async def _renew(self) -> None:
        leases = list(self._running)
        for lease in await self._store.renew(self.name, leases, self._rules.lease_s):
            running = self._running.get(lease)
            if running is not None and not running.has_ended:
                # The job was cancelled, or another worker has claimed it after a pause of this one.
                self._log.info("lease lost", job=lease.id)
                self._drop(lease)
        self._renewed_at = self._clock()


def backoff_s(attempt: int) -> float:
    """The delay after an attempt, by its number."""
    return BACKOFF.pause_s(attempt)
