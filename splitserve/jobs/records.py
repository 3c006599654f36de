"""What a job store keeps and returns. Times are seconds since the epoch on the store's clock."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Literal

import msgspec

from splitserve.errors import SplitserveError, from_wire

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]

ACTIVE: tuple[Status, ...] = ("queued", "running")
FINISHED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")

HIGHEST_PRIORITY, DEFAULT_PRIORITY, LOWEST_PRIORITY = 1, 5, 9
"""Of jobs among each other; a smaller number is claimed first."""

OLDEST_SHARE = 8
"""One in this many claimed jobs, and at least one in a claim of two or more, is the oldest one, whatever its priority: no job
starves."""

JOB_ID = re.compile(r"[0-9a-f]{32}")


def new_id() -> str:
    """128 random bits."""
    return secrets.token_hex(16)


class JobError(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a job failed: the fields of a `SplitserveError`."""

    code: str
    reason: str
    message: str
    stage: str = ""
    model: str = ""
    pair: str = ""

    @classmethod
    def of(cls, error: SplitserveError) -> JobError:
        """The record of an error."""
        return cls(error.grpc_code, error.reason, error.message, error.stage, error.model, error.pair)

    def to_error(self) -> SplitserveError:
        """The error again."""
        return from_wire(self.code, self.message, self.reason, {"stage": self.stage, "model": self.model, "pair": self.pair})


class Payload(msgspec.Struct, frozen=True):
    """Bytes in the database, or, if ``ref`` is set, in a file of that name."""

    data: bytes = b""
    ref: str = ""


EVENTS = tuple(f"job.{status}" for status in FINISHED)
"""What a webhook can be told of."""


class Webhook(msgspec.Struct, frozen=True):
    """Where to report the end of a job, for which of the `EVENTS`."""

    url: str
    events: tuple[str, ...] = EVENTS
    trace: dict[str, str] = {}
    """Headers of the trace that the job belongs to."""


def webhook_to(url: str, events: Sequence[str]) -> Webhook:
    """A webhook as a caller asks for it: one that names no events is told of all."""
    return Webhook(url, tuple(events) or EVENTS)


class Rights(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the caller might do when it submitted: shell patterns of models. None: callers were not authenticated."""

    models: tuple[str, ...] | None = None


class JobCaller(msgspec.Struct, frozen=True):
    """Who calls: ``name`` owns what it submits; ``models`` are the shell patterns that it may call, None where callers are not
    authenticated and all are one.
    """

    name: str = ""
    models: tuple[str, ...] | None = None


class JobOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a submit says beside the request; 0: the service's default, for ``expires_s`` any time."""

    key: str = ""
    """Idempotency key; "": none."""

    fingerprint: bytes = b""
    """Of all that gives the request its meaning, for the key."""

    priority: int = 0
    timeout_s: float = 0.0
    expires_s: float = 0.0
    webhook: Webhook | None = None


class NewJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job to store.

    ``request`` is a ``ModelInferRequest`` that names the release; ``rendering`` is how the proxy renders its answer.
    """

    id: str
    owner: str
    model: str
    version: str
    request: Payload
    rendering: bytes = b""
    rights: Rights = Rights()
    priority: int = DEFAULT_PRIORITY
    timeout_s: float = 300.0
    expires_s: float = 0.0
    """Seconds that it may be queued; 0: any time."""

    key: str = ""
    """Idempotency key; "": none."""

    fingerprint: bytes = b""
    """Of the request that carries the key."""

    webhook: Webhook | None = None


class DeliveryState(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far the delivery of a webhook is: pending, delivered or failed."""

    status: str
    attempt: int = 0
    http_status: int = 0
    answer: str = ""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it is in the store. ``expires`` and ``remove_at`` 0: none, or not known yet."""

    id: str
    owner: str
    status: Status
    model: str
    version: str
    priority: int
    created: float
    started: float = 0.0
    finished: float = 0.0
    attempt: int = 0
    timeout_s: float = 0.0
    expires: float = 0.0
    remove_at: float = 0.0
    error: JobError | None = None
    webhook: Webhook | None = None
    delivery: DeliveryState | None = None

    @property
    def is_finished(self) -> bool:
        """Whether its state is final."""
        return self.status in FINISHED


class Submitted(msgspec.Struct, frozen=True):
    """``is_new`` False: the key was known, and this is its job."""

    job: Job
    is_new: bool


class Result(msgspec.Struct, frozen=True):
    """The answer of a job that has succeeded: a ``ModelInferResponse``, and how it is rendered."""

    job: Job
    rendering: bytes
    answer: Payload


class Lease(msgspec.Struct, frozen=True):
    """A claim on a job. ``fence`` grows with every claim: only the newest one may write."""

    id: str
    fence: int


class Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """A job that a worker runs."""

    lease: Lease
    attempt: int
    owner: str
    model: str
    version: str
    rights: Rights
    request: Payload
    timeout_s: float


class Finish(msgspec.Struct, frozen=True):
    """The end of an attempt: the answer, or the error that ends the job."""

    lease: Lease
    answer: Payload | None = None
    error: JobError | None = None


class Retry(msgspec.Struct, frozen=True):
    """Another attempt, after ``delay_s``. ``error`` None: the attempt does not count (drain, 429, the proxy is unreachable)."""

    lease: Lease
    delay_s: float = 0.0
    error: JobError | None = None


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """A webhook to send. ``body`` is signed and sent as it is. ``attempt`` grows with every claim: only the newest one counts."""

    id: str
    job: str
    owner: str
    url: str
    body: bytes
    attempt: int
    created: float


class DeliveryAttempt(msgspec.Struct, frozen=True):
    """How far the delivery of a webhook is after an attempt; ``retry_s`` None: there is no other."""

    id: str
    state: DeliveryState
    retry_s: float | None = None


class Tally(msgspec.Struct, frozen=True):
    """How many jobs of a caller are in a state."""

    owner: str
    status: Status
    n: int


class StoreState(msgspec.Struct, frozen=True):
    """What health and metrics say of the store."""

    tallies: list[Tally]
    oldest_queued_s: float
    outbox: int

    def n(self, *statuses: str) -> int:
        """Jobs in these states."""
        return sum(tally.n for tally in self.tallies if tally.status in statuses)


class Swept(msgspec.Struct, frozen=True):
    """What a sweep did: jobs that ended, and payloads whose jobs are gone. ``is_complete`` False: there is more to sweep."""

    ended: list[str]
    freed: list[str]
    is_complete: bool


class StoreRules(msgspec.Struct, frozen=True, kw_only=True):
    """Rules that a store applies."""

    max_attempts: int = 8
    ttl_s: float = 86_400.0
    """How long a job and its result are kept once it has ended."""

    key_ttl_s: float = 86_400.0
    """How long an idempotency key is remembered."""
