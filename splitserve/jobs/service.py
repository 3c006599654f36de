"""The verbs of asynchronous inference as an interface without a transport, and `JobQueue`, which implements them on a store.

The proxy calls the interface: in the same process, or over gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec
import structlog
from google.protobuf.message import DecodeError

from splitserve.api.inference import inference_pb2 as pb
from splitserve.errors import (
    Conflict,
    IdempotencyKeyReused,
    InvalidInput,
    NotFinished,
    NotFound,
    Overloaded,
    SplitserveError,
    StorageFull,
    TooLarge,
    Unavailable,
)
from splitserve.jobs.payloads import Payloads
from splitserve.jobs.records import (
    ACTIVE,
    DEFAULT_PRIORITY,
    EVENTS,
    FINISHED,
    HIGHEST_PRIORITY,
    JOB_ID,
    LOWEST_PRIORITY,
    Job,
    JobCaller,
    JobOptions,
    NewJob,
    Rights,
    StoreState,
    Submitted,
    Webhook,
    new_id,
)
from splitserve.jobs.store import JobStore
from splitserve.jobs.worker import Worker
from splitserve.telemetry.traces import FIELDS, received_in

STAGE = "jobs"
MAX_KEY_LENGTH = 255
DEFAULT_LISTED, MAX_LISTED = 100, 1000
SWEEP_INTERVAL_S = 1.0
STRAYS_INTERVAL_S = 3600.0
STALE_STATE_S = 10.0
"""A store whose counts are older than this is reported as one that cannot be reached."""


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it is submitted. ``request`` is a ``ModelInferRequest`` that was checked and names its release."""

    model: str
    version: str
    request: bytes
    rendering: bytes
    options: JobOptions


class JobAnswer(msgspec.Struct, frozen=True):
    """The answer of a job: a ``ModelInferResponse``, and how it is rendered."""

    job: Job
    answer: bytes
    rendering: bytes


class Jobs(Protocol):
    """The verbs. Every method may raise `Unavailable`; a job of another caller is `NotFound`."""

    async def submit(self, caller: JobCaller, submission: Submission) -> Submitted:
        """Store a job; it is on disk when this returns.

        Raises:
            InvalidInput: an option is out of its range.
            IdempotencyKeyReused, Gone: as `JobStore.submit`.
            Overloaded: the caller has as many jobs as it may have.
            StorageFull: the disk is full.
        """
        ...

    async def job_of_key(self, caller: JobCaller, key: str, fingerprint: bytes) -> Job | None:
        """The job that was submitted under a key; None: there is none.

        Raises:
            IdempotencyKeyReused, Gone: as `submit`.
        """
        ...

    async def get(self, caller: JobCaller, job_id: str, wait_s: float = 0.0) -> Job:
        """A job, once it has ended or after ``wait_s``."""
        ...

    async def result(self, caller: JobCaller, job_id: str) -> JobAnswer:
        """The answer of a job that has succeeded.

        Raises:
            NotFinished: it has not ended.
            Conflict: it was cancelled.
            SplitserveError: its own error, if it failed.
        """
        ...

    async def delete(self, caller: JobCaller, job_id: str, *, keep_ended: bool = False) -> Job:
        """Cancel a job that has not ended, remove one that has, unless ``keep_ended``. Returns it as it is, or was."""
        ...

    async def list_jobs(
        self, caller: JobCaller, *, model: str = "", status: str = "", limit: int = 0, after: str = ""
    ) -> list[Job]:
        """The caller's jobs, the newest first; ``limit`` 0: `DEFAULT_LISTED`.

        Raises:
            InvalidInput: there is no such status, ``limit`` is too large, or ``after`` is no job of the caller.
        """
        ...


class JobCounters(msgspec.Struct, frozen=True, kw_only=True):
    """What metrics say of jobs.

    Of the store, as of the last count: ``queued``, ``running``, ``oldest_queued_s``, ``outbox``. Of this process since its start:
    ``attempts``, and ``refused_writes``, which came after another claim or a cancel. Of this process now: the rest.
    """

    queued: int = 0
    running: int = 0
    oldest_queued_s: float = 0.0
    """Since the oldest queued job was submitted; 0: none is queued."""

    outbox: int = 0
    """Webhooks that are not delivered yet."""

    attempts: int = 0
    refused_writes: int = 0
    in_flight: int = 0
    """Jobs that the worker has claimed and whose end is not written."""

    window: int = 0
    """Jobs that the worker may have in flight."""

    waiting_callers: int = 0


class JobRules(msgspec.Struct, frozen=True, kw_only=True):
    """Limits on jobs of callers."""

    timeout_s: float = 300.0
    """Of jobs that set none."""

    max_timeout_s: float = 300.0
    max_expires_s: float = 30 * 86_400.0
    max_wait_s: float = 30.0
    max_jobs_per_caller: int = 1_000_000
    """Queued and running."""

    max_request_bytes: int = 64 * 1024 * 1024


class JobQueue:
    """Implements `Jobs`. `run` has to run meanwhile: it sweeps, counts, and wakes callers that wait.

    Args:
        store: where jobs are.
        payloads: of large requests.
        rules: limits.
        check_webhook: raises if a webhook is not allowed.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: JobStore,
        payloads: Payloads,
        rules: JobRules | None = None,
        *,
        check_webhook: Callable[[JobCaller, Webhook], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._payloads = payloads
        self._rules = rules or JobRules()
        self._check_webhook = check_webhook
        self._clock = clock
        self._log = structlog.get_logger()
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._poll_now = asyncio.Event()
        self._active: dict[str, int] = {}
        """Jobs of each caller that have not ended, at the last count, and those submitted since."""
        self.worker: Worker | None = None
        self.state: StoreState | None = None
        """At the last count."""
        self._counted_at = clock()
        self._problem = "starting"
        self._is_draining = False
        self.on_webhook: Callable[[], None] = lambda: None
        store.on_announcement(self._announced)

    # The verbs.

    async def submit(self, caller: JobCaller, submission: Submission) -> Submitted:
        options = submission.options
        try:
            self._check(caller, submission)
            return await self._submit(caller, submission)
        except (InvalidInput, Overloaded, StorageFull):  # a caller that repeats a key gets its job all the same
            known = await known_job(self, caller, options.key, options.fingerprint)
            if known is None:
                raise
            return Submitted(known, is_new=False)

    async def _submit(self, caller: JobCaller, submission: Submission) -> Submitted:
        options = submission.options
        if self._active.get(caller.name, 0) >= self._rules.max_jobs_per_caller:
            raise self._too_many(caller)
        payload = await self._payloads.store(submission.request)
        new = NewJob(
            id=new_id(),
            owner=caller.name,
            rights=Rights(caller.models),
            model=submission.model,
            version=submission.version,
            request=payload,
            rendering=submission.rendering,
            priority=options.priority or DEFAULT_PRIORITY,
            timeout_s=options.timeout_s or self._rules.timeout_s,
            expires_s=options.expires_s,
            key=options.key,
            fingerprint=options.fingerprint,
            webhook=_traced(options.webhook, submission.request),
        )
        try:
            submitted = await self._store.submit(new)
        except SplitserveError as error:
            if error.reason != "UNAVAILABLE":  # then the job may be stored after all
                await self._payloads.remove([payload.ref])
            raise
        if submitted.is_new:
            self._active[caller.name] = self._active.get(caller.name, 0) + 1
            self._store.announce()
            if self.worker is not None:
                self.worker.wake()
        else:
            await self._payloads.remove([payload.ref])
        return submitted

    async def job_of_key(self, caller: JobCaller, key: str, fingerprint: bytes) -> Job | None:
        return await self._store.job_of_key(caller.name, key, fingerprint)

    def _too_many(self, caller: JobCaller) -> Overloaded:
        return Overloaded(
            f"{self._active[caller.name]} jobs of the caller have not ended, the limit is "
            f"{self._rules.max_jobs_per_caller} (JOBS_MAX_JOBS_PER_CALLER)",
            stage=STAGE,
        )

    def _check(self, caller: JobCaller, submission: Submission) -> None:
        rules, options = self._rules, submission.options
        n_bytes = len(submission.request)
        if n_bytes > rules.max_request_bytes:
            raise TooLarge(f"the request has {n_bytes} bytes, the limit is {rules.max_request_bytes} (JOBS_MAX_MESSAGE_BYTES)")
        if options.priority and not HIGHEST_PRIORITY <= options.priority <= LOWEST_PRIORITY:
            raise InvalidInput(f"priority: expected {HIGHEST_PRIORITY} to {LOWEST_PRIORITY}, got {options.priority}")
        for name, value, limit in (
            ("timeout", options.timeout_s, rules.max_timeout_s),
            ("expires", options.expires_s, rules.max_expires_s),
        ):
            if not 0 <= value <= limit:
                raise InvalidInput(f"{name}: expected 0 to {limit:.15g} seconds, got {value:.15g}")
        if len(options.key) > MAX_KEY_LENGTH or not options.key.isprintable():
            got = f"{len(options.key)} characters" if options.key.isprintable() else "a control character"
            raise InvalidInput(f"idempotency key: expected up to {MAX_KEY_LENGTH} printable characters, got {got}")
        if options.webhook is not None:
            if unknown := set(options.webhook.events) - set(EVENTS):
                raise InvalidInput(f"webhook events: expected some of {', '.join(EVENTS)}, got {', '.join(sorted(unknown))[:64]}")
            self._check_webhook(caller, options.webhook)

    async def get(self, caller: JobCaller, job_id: str, wait_s: float = 0.0) -> Job:
        job = await self._get(caller, job_id)
        wait_s = min(wait_s, self._rules.max_wait_s)
        if job.is_finished or not wait_s > 0 or self._is_draining:
            return job
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(job_id, set()).add(waiter)
        try:
            job = await self._get(caller, job_id)  # it may have ended before anybody knew of the waiter
            if not job.is_finished:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await waiter
                job = await self._get(caller, job_id)
        finally:
            waiters = self._waiting.get(job_id, set())
            waiters.discard(waiter)
            if not waiters:
                self._waiting.pop(job_id, None)
        return job

    async def _get(self, caller: JobCaller, job_id: str) -> Job:
        job = await self._store.get(caller.name, job_id) if JOB_ID.fullmatch(job_id) else None
        if job is None:
            raise _unknown(job_id)
        return job

    async def result(self, caller: JobCaller, job_id: str) -> JobAnswer:
        found = await self._store.result(caller.name, job_id) if JOB_ID.fullmatch(job_id) else None
        if found is None:
            raise _unknown(job_id)
        job = found.job
        if job.status in ACTIVE:
            raise NotFinished(f"the job is {job.status}", stage=STAGE, model=job.model, pair=job.version)
        if job.status == "cancelled":
            raise Conflict("the job was cancelled", stage=STAGE, model=job.model, pair=job.version)
        if job.error is not None:
            raise job.error.to_error()
        try:
            answer = await self._payloads.read(found.answer)
        except FileNotFoundError:
            raise _unknown(job_id) from None
        return JobAnswer(job, answer, found.rendering)

    async def delete(self, caller: JobCaller, job_id: str, *, keep_ended: bool = False) -> Job:
        found = await self._store.delete(caller.name, job_id, keep_ended=keep_ended) if JOB_ID.fullmatch(job_id) else None
        if found is None:
            raise _unknown(job_id)
        job, freed = found
        self._cancel_here([job_id])
        self.ended([job_id])
        await self._payloads.remove(freed)
        return job

    async def list_jobs(
        self, caller: JobCaller, *, model: str = "", status: str = "", limit: int = 0, after: str = ""
    ) -> list[Job]:
        if status and status not in (*ACTIVE, *FINISHED):
            raise InvalidInput(f'status: expected one of {", ".join((*ACTIVE, *FINISHED))}, got "{status[:32]}"')
        if not 0 <= limit <= MAX_LISTED:
            raise InvalidInput(f"limit: expected up to {MAX_LISTED}, got {limit}")
        if "\0" in model:  # which PostgreSQL has no text for
            return []
        if after and not (JOB_ID.fullmatch(after) and await self._store.get(caller.name, after)):
            raise InvalidInput(f'after: expected the id of a job that exists, got "{after[:64]}"')
        return await self._store.list_jobs(caller.name, model=model, status=status, limit=limit or DEFAULT_LISTED, after=after)

    async def not_ready_reason(self) -> str:
        """Why jobs cannot be submitted; "" if they can."""
        if self._clock() - self._counted_at > STALE_STATE_S:
            return self._problem or "the job store cannot be reached"
        return self._problem

    # In the background.

    async def run(self) -> None:
        """Sweep, count, and wake callers that wait, until cancelled."""
        await asyncio.gather(self._keep_sweeping(), self._keep_polling(), self._keep_removing_strays())

    def ended(self, job_ids: Iterable[str]) -> None:
        """Jobs have ended, or may have: wake those who wait for them."""
        self._wake(job_ids)
        self._store.announce()
        self.on_webhook()

    def _wake(self, job_ids: Iterable[str]) -> None:
        for job_id in job_ids:
            for waiter in self._waiting.get(job_id, ()):
                if not waiter.done():
                    waiter.set_result(None)

    async def drain(self, grace_s: float) -> None:
        """Claim no more, let jobs in flight finish, then answer everyone who still waits, with the job as it is."""
        if self.worker is not None:
            await self.worker.drain(grace_s)
        self._is_draining = True
        self._wake(self._waiting)

    def counters(self) -> JobCounters:
        """For metrics. Asks neither the store nor the proxy."""
        state, worker = self.state or StoreState([], 0.0, 0), self.worker
        return JobCounters(
            queued=state.n("queued"),
            running=state.n("running"),
            oldest_queued_s=state.oldest_queued_s,
            outbox=state.outbox,
            attempts=worker.n_attempts if worker else 0,
            refused_writes=worker.n_refused_writes if worker else 0,
            in_flight=worker.n_running if worker else 0,
            window=int(worker.window) if worker else 0,
            waiting_callers=self.n_waiting,
        )

    @property
    def n_waiting(self) -> int:
        """Callers that wait for the end of a job."""
        return sum(map(len, self._waiting.values()))

    def _announced(self) -> None:
        self._poll_now.set()
        if self.worker is not None:
            self.worker.wake()
        self.on_webhook()

    async def _keep_polling(self) -> None:
        """Find out which of the jobs that somebody waits for, or that run here, have ended elsewhere, e.g. were cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SWEEP_INTERVAL_S):
                    await self._poll_now.wait()
            self._poll_now.clear()
            running = self.worker.running_ids if self.worker is not None else set()
            if watched := running.union(self._waiting):
                with contextlib.suppress(SplitserveError):
                    ended = await self._store.finished_among(list(watched))
                    self._wake(ended)
                    self._cancel_here(running.intersection(ended))

    def _cancel_here(self, job_ids: Iterable[str]) -> None:
        """Drop jobs that have ended, if they are in flight here."""
        if self.worker is not None:
            for job_id in job_ids:
                self.worker.cancel(job_id)

    async def _keep_sweeping(self) -> None:
        while True:
            try:
                await self._sweep()
                self._problem = ""
            except SplitserveError as error:
                self._problem = error.message
            await asyncio.sleep(SWEEP_INTERVAL_S)

    async def _sweep(self) -> None:
        state = await self._store.state()
        self.state, self._counted_at = state, self._clock()
        active: dict[str, int] = {}
        for tally in state.tallies:
            if tally.status in ACTIVE:
                active[tally.owner] = active.get(tally.owner, 0) + tally.n
        self._active = active
        swept = await self._store.sweep()
        while True:
            if swept.ended:
                self.ended(swept.ended)
            await self._payloads.remove(swept.freed)
            if swept.is_complete:
                return
            swept = await self._store.sweep()

    async def _keep_removing_strays(self) -> None:
        while True:
            with contextlib.suppress(SplitserveError, OSError):
                if n_removed := await self._payloads.remove_strays(self._store.known_refs):
                    # Files of requests or answers whose jobs were never stored, or are gone.
                    self._log.info("stray payloads removed", files=n_removed)
            await asyncio.sleep(STRAYS_INTERVAL_S)


async def known_job(jobs: Jobs, caller: JobCaller, key: str, fingerprint: bytes) -> Job | None:
    """The job that a submit stored before it is refused now, e.g. since another release or other limits are in force.

    None: there is none, the key was used for another request, or that is unknown: then the refusal is the answer.

    Raises:
        Gone: the job was removed.
    """
    if not key or len(key) > MAX_KEY_LENGTH or not key.isprintable():
        return None
    try:
        return await jobs.job_of_key(caller, key, fingerprint)
    except (IdempotencyKeyReused, Unavailable):
        return None


def _unknown(job_id: str) -> NotFound:
    return NotFound(f'there is no job "{job_id[:64]}"', stage=STAGE)


def _traced(webhook: Webhook | None, request: bytes) -> Webhook | None:
    """The webhook, with the context of the trace that the request is of."""
    if webhook is None:
        return None
    try:
        parameters = pb.ModelInferRequest.FromString(request).parameters
    except DecodeError:  # the job will fail, and say so
        return webhook
    context = received_in({name: parameters[name].string_param for name in FIELDS if name in parameters})
    return webhook if context is None else msgspec.structs.replace(webhook, trace=dict(context.items()))
