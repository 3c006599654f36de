"""Jobs at the client: `Job` and `AsyncJob`, and the steps that both run. Knows no transport.

A submit carries an idempotency key, made up if the caller gives none, so that it can be retried without a duplicate.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from splitserve.client.answer import Answer, outputs_of
from splitserve.client.inference import Core, Known, checked, columns_for, requested
from splitserve.client.steps import Ask, JobAsk, Steps, Wait
from splitserve.errors import DeadlineExceeded, Unavailable
from splitserve.jobs.records import Job as JobRecord
from splitserve.jobs.records import JobOptions, webhook_to
from splitserve.oip.messages import InferRequest, InferResponse, Parameter

T = TypeVar("T")

POLL_S = 20.0
"""How long one call waits for the end of a job; less than the idle timeouts of load balancers."""

LEAST_INTERVAL_S = 1.0
"""Between two such calls."""


def submit(
    core: Core,
    model: str,
    inputs: Any,
    *,
    version: str,
    outputs: Sequence[str],
    parameters: Mapping[str, Parameter] | None,
    idempotency_key: str,
    priority: int,
    job_timeout_s: float,
    expires_s: float,
    webhook: str,
    webhook_events: Sequence[str],
    timeout_s: float | None,
) -> Steps[JobRecord]:
    """Encode the inputs and store the job. A known signature that no longer fits is fetched again."""
    deadline = core.deadline_after(timeout_s)
    options = JobOptions(
        key=idempotency_key or uuid.uuid4().hex,
        priority=priority,
        timeout_s=job_timeout_s,
        expires_s=expires_s,
        webhook=webhook_to(webhook, webhook_events) if webhook else None,
    )

    def send(known: Known) -> Steps[JobRecord]:
        columns = columns_for(inputs, known)
        request = InferRequest(
            model,
            tuple(column.tensor() for column in columns),
            version=version,
            outputs=requested(outputs),
            parameters=checked(parameters),
        )
        record: JobRecord = yield from core.ask(Ask("submit", model, version, request, JobAsk(options=options)), deadline)
        return record

    return (yield from core.with_signature(model, version, send, deadline))


def get(core: Core, job_id: str) -> Steps[JobRecord]:
    """The job as it is."""
    record: JobRecord = yield from core.ask(Ask("job", job=JobAsk(job_id)), core.deadline_after(None))
    return record


def wait(core: Core, record: JobRecord, timeout_s: float | None) -> Steps[JobRecord]:
    """The job once it has ended, in whatever state. A server that restarts does not end the waiting.

    Raises:
        DeadlineExceeded: it has not within ``timeout_s``. It goes on.
        NotFound: it was removed.
        Unavailable: the server was away for as long as a request may take.
    """
    end = None if timeout_s is None else core.now() + timeout_s
    give_up_at = core.deadline_after(None)
    while not record.is_finished:
        asked_at = core.now()
        wait_s = POLL_S if end is None else min(POLL_S, end - asked_at)
        if wait_s <= 0:
            raise DeadlineExceeded(f"job {record.id} is still {record.status} after {timeout_s:g} s", model=record.model)
        ask = Ask("job", job=JobAsk(record.id, wait_s=wait_s))
        try:
            record = yield from core.ask(ask, core.deadline_after(None) + wait_s)
            give_up_at = core.deadline_after(None)
        except Unavailable:
            if core.now() + LEAST_INTERVAL_S > give_up_at:
                raise
        # A server that is stopping, or where too many wait, answers at once with the job as it is.
        early_s = min(LEAST_INTERVAL_S, wait_s) - (core.now() - asked_at)
        if early_s > 0 and not record.is_finished:
            yield Wait(early_s)
    return record


def result(core: Core, record: JobRecord) -> Steps[Answer]:
    """The answer of a job that has ended. Raises its error."""
    response: InferResponse = yield from core.ask(Ask("job_result", job=JobAsk(record.id)), core.deadline_after(None))
    return Answer(
        outputs_of(response, core.text), model=response.model or record.model, version=response.version or record.version
    )


def delete(core: Core, job_id: str, *, keep_ended: bool = False) -> Steps[JobRecord]:
    """Cancel it if it has not ended, remove it if it has, unless ``keep_ended``: so a cancel may be sent twice."""
    ask = Ask("job_delete", job=JobAsk(job_id, keep_ended=keep_ended))
    record: JobRecord = yield from core.ask(ask, core.deadline_after(None))
    return record


def list_jobs(core: Core, *, model: str, status: str, limit: int, after: str) -> Steps[list[JobRecord]]:
    """One page."""
    ask = Ask("jobs", model, job=JobAsk(status=status, limit=limit, after=after))
    records: list[JobRecord] = yield from core.ask(ask, core.deadline_after(None))
    return records


class _Job:
    """The state of a job as it was fetched last: ``info``, and its fields."""

    def __init__(self, core: Core, info: JobRecord) -> None:
        self._core = core
        self.info = info

    @property
    def id(self) -> str:
        """128 random bits, as text."""
        return self.info.id

    @property
    def status(self) -> str:
        """queued, running, succeeded, failed or cancelled."""
        return self.info.status

    @property
    def model(self) -> str:
        """Its name."""
        return self.info.model

    @property
    def version(self) -> str:
        """The release, which was chosen when the job was submitted."""
        return self.info.version

    @property
    def error(self) -> Exception | None:
        """Why it failed, or its last attempt did."""
        return None if self.info.error is None else self.info.error.to_error()

    @property
    def is_finished(self) -> bool:
        """Whether its state is final."""
        return self.info.is_finished

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.model} {self.version}: {self.status}>"


class Job(_Job):
    """A job, as `Client.submit` returns it."""

    def __init__(self, core: Core, info: JobRecord, run: Callable[[Steps[Any]], Any]) -> None:
        super().__init__(core, info)
        self._run = run

    def refresh(self) -> Job:
        """Fetch its state again.

        Raises:
            NotFound: it was removed.

        Example::

            print(job.refresh().status)
        """
        self.info = self._run(get(self._core, self.id))
        return self

    def wait(self, timeout_s: float | None = None) -> Job:
        """Wait until it has ended, in whatever state.

        Raises:
            DeadlineExceeded: it has not within ``timeout_s``. It goes on.
            NotFound: it was removed.

        Example::

            job = client.submit("penguins", frame).wait(timeout_s=60)
        """
        self.info = self._run(wait(self._core, self.info, timeout_s))
        return self

    def result(self, timeout_s: float | None = None) -> Answer:
        """Wait for its answer.

        Raises:
            SplitserveError: its own, if it failed.
            Conflict: it was cancelled.
            DeadlineExceeded, NotFound: as `wait`.

        Example::

            frame = client.submit("penguins", frame).result().to_frame()
        """
        self.wait(timeout_s)
        answer: Answer = self._run(result(self._core, self.info))
        return answer

    def cancel(self) -> Job:
        """Cancel it if it has not ended. ``status`` says what it came to: it may have ended before.

        Raises:
            NotFound: it was removed.

        Example::

            if job.cancel().status == "cancelled":
                print("it did not run to its end")
        """
        self.info = self._run(delete(self._core, self.id, keep_ended=True))
        return self

    def remove(self) -> None:
        """Remove it with its result. One that has not ended is cancelled before.

        Example::

            job.remove()
        """
        self.cancel()
        self._run(delete(self._core, self.id))


class AsyncJob(_Job):
    """A job, as `AsyncClient.submit` returns it: as `Job`, awaited."""

    def __init__(self, core: Core, info: JobRecord, run: Callable[[Steps[Any]], Awaitable[Any]]) -> None:
        super().__init__(core, info)
        self._run = run

    async def refresh(self) -> AsyncJob:
        """As `Job.refresh`.

        Example::

            print((await job.refresh()).status)
        """
        self.info = await self._run(get(self._core, self.id))
        return self

    async def wait(self, timeout_s: float | None = None) -> AsyncJob:
        """As `Job.wait`.

        Example::

            job = await (await client.submit("penguins", frame)).wait(timeout_s=60)
        """
        self.info = await self._run(wait(self._core, self.info, timeout_s))
        return self

    async def result(self, timeout_s: float | None = None) -> Answer:
        """As `Job.result`.

        Example::

            frame = (await job.result()).to_frame()
        """
        await self.wait(timeout_s)
        answer: Answer = await self._run(result(self._core, self.info))
        return answer

    async def cancel(self) -> AsyncJob:
        """As `Job.cancel`.

        Example::

            if (await job.cancel()).status == "cancelled":
                print("it did not run to its end")
        """
        self.info = await self._run(delete(self._core, self.id, keep_ended=True))
        return self

    async def remove(self) -> None:
        """As `Job.remove`.

        Example::

            await job.remove()
        """
        await self.cancel()
        await self._run(delete(self._core, self.id))
