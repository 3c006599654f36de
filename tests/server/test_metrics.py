"""Parts of a process that are neither a stage nor the process itself."""

from __future__ import annotations

from jobs_service.metrics import JobMetrics
from splitserve.jobs.service import JobCounters
from splitserve.server.metrics import CACHE_INTERVAL_S, CacheMetrics, Metrics
from splitserve.telemetry.families import CACHE_BYTES, JOBS, READY


class FakeJobs:
    """Implements `jobs_service.metrics.MeasuredJobs`."""

    reason = ""

    def counters(self) -> JobCounters:
        return JobCounters(queued=3)

    async def not_ready_reason(self) -> str:
        return self.reason


async def test_jobs_say_whether_they_are_ready() -> None:
    """As each stage does."""
    jobs, metrics = FakeJobs(), Metrics()
    metrics.add_part("jobs", JobMetrics(jobs))
    ready = await metrics.snapshot()
    jobs.reason = "the job store cannot be reached"
    not_ready = await metrics.snapshot()

    assert (ready[READY.name], not_ready[READY.name]) == ({("jobs",): 1}, {("jobs",): 0})
    assert ready[JOBS.name]["queued",] == 3


async def test_the_cache_is_not_counted_at_each_scrape() -> None:
    """It may have very many files."""
    now, n_counted = 0.0, 0

    def count() -> int:
        nonlocal n_counted
        n_counted += 1
        return 1000 * n_counted

    metrics = Metrics()
    metrics.add_part("cache", CacheMetrics(count, clock=lambda: now))

    found = [(await metrics.snapshot())[CACHE_BYTES.name] for _ in range(3)]
    now = CACHE_INTERVAL_S
    later = (await metrics.snapshot())[CACHE_BYTES.name]

    assert found == [{(): 1000}] * 3
    assert later == {(): 2000}
