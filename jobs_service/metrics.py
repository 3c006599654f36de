"""What the queue of jobs counts, as samples of `splitserve.telemetry.families`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from splitserve.jobs.service import JobCounters
from splitserve.telemetry import families
from splitserve.telemetry.registry import Sample

STAGE = "jobs"


class MeasuredJobs(Protocol):
    """A queue of jobs, as far as metrics are concerned: see `splitserve.jobs.service.JobQueue`."""

    def counters(self) -> JobCounters: ...

    async def not_ready_reason(self) -> str: ...


class JobMetrics:
    """The metrics of a queue.

    Args:
        jobs: the queue.
    """

    def __init__(self, jobs: MeasuredJobs) -> None:
        self._jobs = jobs
        self._reason = ""

    async def refresh(self) -> None:
        """Ask whether jobs can be submitted."""
        self._reason = await self._jobs.not_ready_reason()

    def collect(self) -> Iterator[Sample]:
        """The values of this moment."""
        yield Sample(families.READY, (STAGE,), int(not self._reason))
        counted = self._jobs.counters()
        yield Sample(families.JOBS, ("queued",), counted.queued)
        yield Sample(families.JOBS, ("running",), counted.running)
        yield Sample(families.JOBS_OLDEST, (), counted.oldest_queued_s)
        yield Sample(families.JOB_ATTEMPTS, (), counted.attempts)
        yield Sample(families.JOB_REFUSED_WRITES, (), counted.refused_writes)
        yield Sample(families.JOBS_IN_FLIGHT, (), counted.in_flight)
        yield Sample(families.JOBS_WINDOW, (), counted.window)
        yield Sample(families.JOB_CALLERS, (), counted.waiting_callers)
        yield Sample(families.WEBHOOKS, (), counted.outbox)
