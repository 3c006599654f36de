"""The interface of a job store. `tests/jobs/test_stores.py` is its specification: every store passes it.

Rules that all stores keep:

1. What a call has returned is on disk.
2. A job's state changes only along queued → running → succeeded | failed | cancelled, running → queued, queued → failed |
   cancelled. The first final state stays.
3. A worker writes only under its newest claim (`Lease.fence`).
4. The attempt is counted in the transaction that claims, so that a job which kills its worker is counted too. It is given back
   where `Retry.error` is None; the fence is not.
5. Leases, delays and times to live are judged by the store's clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from splitserve.errors import Gone, IdempotencyKeyReused, Internal, Unavailable
from splitserve.jobs.records import (
    Claimed,
    Delivery,
    DeliveryAttempt,
    Finish,
    Job,
    JobError,
    Lease,
    NewJob,
    Result,
    Retry,
    StoreState,
    Submitted,
    Swept,
)

SWEEP_SIZE = 500
"""Jobs that one step of a sweep removes at most, so that other calls do not wait for it."""


class JobStore(Protocol):
    """A durable queue of jobs. Methods raise `Unavailable` while the database cannot be reached."""

    async def submit(self, new: NewJob) -> Submitted:
        """Store a job, or find the one that its key has stored.

        Raises:
            IdempotencyKeyReused: the key was used for another request.
            Gone: the key's job was removed.
            StorageFull: the disk is full.
        """
        ...

    async def job_of_key(self, owner: str, key: str, fingerprint: bytes) -> Job | None:
        """The job that a key has stored; None: the key is free.

        Raises:
            IdempotencyKeyReused, Gone: as `submit`.
        """
        ...

    async def get(self, owner: str, job_id: str) -> Job | None:
        """A job of the caller; None: there is none."""
        ...

    async def result(self, owner: str, job_id: str) -> Result | None:
        """A job of the caller with its answer, which is empty unless it has succeeded."""
        ...

    async def list_jobs(self, owner: str, *, model: str = "", status: str = "", limit: int = 100, after: str = "") -> list[Job]:
        """Jobs of the caller, the newest first. ``after``: those that follow this one in the list."""
        ...

    async def delete(self, owner: str, job_id: str, *, keep_ended: bool = False) -> tuple[Job, list[str]] | None:
        """Cancel a job that has not ended, remove one that has, unless ``keep_ended``; None: there is none.

        Returns:
            The job in the state that holds now, or held when it was removed; and the payloads that were freed.
        """
        ...

    def announce(self) -> None:
        """Jobs were queued or have ended: other processes that share the store should poll it soon. Costs the caller nothing."""
        ...

    def on_announcement(self, notify: Callable[[], None]) -> None:
        """Call ``notify`` when another process has announced something."""
        ...

    async def claim(self, worker: str, n: int, lease_s: float) -> Sequence[Claimed]:
        """Up to ``n`` jobs to run: orphans first, then by priority and age. Orphans without attempts left end as failed."""
        ...

    async def give_back_all_but(self, worker: str, leases: Sequence[Lease]) -> int:
        """Queue the running jobs of a worker again that are not among these leases, without counting the attempt; how many.

        A claim may have been committed although its answer was lost with the connection: the worker does not know these jobs, and
        must not keep them. No other claim of the worker may be in progress.
        """
        ...

    async def renew(self, worker: str, leases: Sequence[Lease], lease_s: float) -> Sequence[Lease]:
        """Extend leases. Returns those that are lost: cancelled, or claimed by another worker."""
        ...

    async def finish(self, finishes: Sequence[Finish]) -> Sequence[bool]:
        """End attempts. False: the claim was no longer the newest, and nothing was written."""
        ...

    async def retry(self, retries: Sequence[Retry]) -> Sequence[bool]:
        """Queue jobs again, or end those as failed that have no attempts left. False as in `finish`."""
        ...

    async def sweep(self) -> Swept:
        """End queued jobs that have expired, remove jobs and keys whose time is over: up to `SWEEP_SIZE` of each."""
        ...

    async def finished_among(self, job_ids: Sequence[str]) -> list[str]:
        """Which of these have ended or are gone."""
        ...

    async def claim_delivery(self, lease_s: float, but_hosts: Sequence[str]) -> Delivery | None:
        """A webhook that is due, to none of these hosts."""
        ...

    async def finish_delivery(self, attempt: DeliveryAttempt) -> None:
        """Record an attempt to deliver."""
        ...

    async def state(self) -> StoreState:
        """Counts."""
        ...

    async def known_refs(self, refs: Sequence[str]) -> list[str]:
        """Which of these payloads belong to a job."""
        ...

    async def close(self) -> None:
        """Finish what was begun and release the database."""
        ...


def key_reused(key: str) -> IdempotencyKeyReused:
    """The error for a key with another request."""
    return IdempotencyKeyReused(f'the idempotency key "{key[:64]}" was used for a different request; send a new one')


def key_gone(key: str) -> Gone:
    """The error for a key whose job was removed."""
    return Gone(f'the job of the idempotency key "{key[:64]}" was removed; send a new one to run the request again')


def died(n_attempts: int, model: str) -> JobError:
    """The error of a job whose worker never reported back."""
    return JobError.of(Internal(f"the worker died {n_attempts} times while it ran this job", stage="jobs", model=model))


def expired(model: str) -> JobError:
    """The error of a job that was queued for longer than it allowed."""
    return JobError("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "the job expired in the queue", "jobs", model)


def out_of_attempts(error: JobError, n_attempts: int) -> JobError:
    """The error of a job that was tried as often as allowed."""
    message = f"{error.message} (attempt {n_attempts} of {n_attempts})"
    return JobError(error.code, error.reason, message, error.stage, error.model, error.pair)


def store_unavailable() -> Unavailable:
    """The error while the database cannot be used. What is wrong is in the log."""
    return Unavailable("the job store cannot be reached", stage="jobs")


def internal_error(error: Exception) -> Internal:
    """The error in place of one that a store must not raise, so that whoever calls it goes on. What is wrong is in the log."""
    # A call to the job store failed in a way that nobody foresaw, e.g. because a row was changed by hand.
    structlog.get_logger().error("job store failed", reason=repr(error), code=type(error).__name__, exc_info=error)
    translated = Internal("internal error", stage="jobs")
    translated.__cause__ = error
    return translated
