"""What the queue of jobs counts, as samples of `splitserve.telemetry.families`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from splitserve.jobs.service import JobCounters
from splitserve.telemetry import families
from splitserve.telemetry.registry import Collect, Sample


def job_metrics(counters: Callable[[], JobCounters]) -> Collect:
    """Reads the counters of a queue."""

    def collect() -> Iterator[Sample]:
        counted = counters()
        yield Sample(families.JOBS, ("queued",), counted.queued)
        yield Sample(families.JOBS, ("running",), counted.running)
        yield Sample(families.JOBS_OLDEST, (), counted.oldest_queued_s)
        yield Sample(families.JOB_ATTEMPTS, (), counted.attempts)
        yield Sample(families.JOB_REFUSED_WRITES, (), counted.refused_writes)
        yield Sample(families.JOBS_IN_FLIGHT, (), counted.in_flight)
        yield Sample(families.JOBS_WINDOW, (), counted.window)
        yield Sample(families.JOB_CALLERS, (), counted.waiting_callers)
        yield Sample(families.WEBHOOKS, (), counted.outbox)

    return collect
