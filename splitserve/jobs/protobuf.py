"""Jobs over gRPC: messages of ``splitserve.jobs.v1`` <-> records."""

from __future__ import annotations

import json
from typing import Any

from splitserve.api.splitserve.jobs.v1 import jobs_pb2 as pb
from splitserve.errors import InvalidInput
from splitserve.jobs.records import (
    ACTIVE,
    FINISHED,
    DeliveryState,
    Job,
    JobCaller,
    JobError,
    JobOptions,
    Status,
    Webhook,
    webhook_to,
)

SERVICE = pb.DESCRIPTOR.services_by_name["JobService"].full_name

CALLER_KEY = "splitserve-caller"
"""Metadata of calls from the proxy to jobs: who calls, as JSON in ASCII; absent where callers are not authenticated."""

_STATUS_PREFIX = "JOB_STATUS_"


_MOST_BYTES = 2**31 - 1
_JOB_BYTES = 64 * 1024


def max_wrapped_bytes(max_message_bytes: int) -> int:
    """The largest message between the proxy and jobs: a request or an answer with how it is rendered, which the request says too,
    and with its job. So what the proxy accepts can be stored, and what is stored can be fetched.
    """
    return min(2 * max_message_bytes + _JOB_BYTES, _MOST_BYTES)


def encode_caller(caller: JobCaller) -> tuple[tuple[str, str], ...]:
    """The caller as metadata."""
    if caller.models is None:
        return ()
    return ((CALLER_KEY, json.dumps({"name": caller.name, "models": caller.models})),)


def decode_caller(metadata: tuple[tuple[str, str], ...]) -> JobCaller:
    """The caller in a call's metadata.

    Raises:
        InvalidInput: it is malformed. It is never taken for a call without a caller.
    """
    values = [value for key, value in metadata if key == CALLER_KEY]
    if not values:
        return JobCaller()
    try:
        content = json.loads(values[0])
        return JobCaller(str(content["name"]), tuple(map(str, content["models"])))
    except (ValueError, KeyError, TypeError):
        raise InvalidInput(f"metadata {CALLER_KEY}: expected a caller as JSON") from None


def encode_status(status: str) -> Any:
    """The enum's value; "" is UNSPECIFIED.

    Raises:
        InvalidInput: there is no such status.
    """
    try:
        return pb.JobStatus.Value(_STATUS_PREFIX + (status.upper() or "UNSPECIFIED"))
    except ValueError:
        raise InvalidInput(f'status: expected one of {", ".join((*ACTIVE, *FINISHED))}, got "{status[:32]}"') from None


def decode_status(value: int) -> str:
    """The status; "" for UNSPECIFIED.

    Raises:
        InvalidInput: there is no such status.
    """
    if value not in pb.JobStatus.values():
        raise InvalidInput(f"status: {value} is unknown")
    name: str = pb.JobStatus.Name(value).removeprefix(_STATUS_PREFIX).lower()
    return "" if name == "unspecified" else name


def encode_webhook(webhook: Webhook) -> Any:
    """A webhook as a message."""
    return pb.Webhook(url=webhook.url, events=webhook.events)


def decode_webhook(message: Any) -> Webhook:
    """A webhook."""
    return webhook_to(message.url, message.events)


def encode_options(options: JobOptions) -> Any:
    """A ``SubmitJobRequest`` with the options, and without the request."""
    return pb.SubmitJobRequest(
        idempotency_key=options.key,
        fingerprint=options.fingerprint,
        priority=options.priority,
        timeout_s=options.timeout_s,
        expires_s=options.expires_s,
        webhook=None if options.webhook is None else encode_webhook(options.webhook),
    )


def decode_options(message: Any) -> JobOptions:
    """The options in a ``SubmitJobRequest``."""
    return JobOptions(
        key=message.idempotency_key,
        fingerprint=message.fingerprint,
        priority=message.priority,
        timeout_s=message.timeout_s,
        expires_s=message.expires_s,
        webhook=decode_webhook(message.webhook) if message.HasField("webhook") else None,
    )


def encode_job(job: Job) -> Any:
    """A job as a message."""
    message = pb.Job(
        id=job.id,
        status=encode_status(job.status),
        model=job.model,
        version=job.version,
        priority=job.priority,
        created=job.created,
        started=job.started,
        finished=job.finished,
        expires=job.expires,
        remove_at=job.remove_at,
        attempt=job.attempt,
    )
    if (error := job.error) is not None:
        message.error.CopyFrom(
            pb.JobError(
                code=error.code,
                reason=error.reason,
                message=error.message,
                stage=error.stage,
                model=error.model,
                pair=error.pair,
            )
        )
    if job.webhook is not None:
        message.webhook.CopyFrom(encode_webhook(job.webhook))
    if (delivery := job.delivery) is not None:
        message.delivery.CopyFrom(
            pb.WebhookDelivery(
                status=delivery.status, attempt=delivery.attempt, http_status=delivery.http_status, answer=delivery.answer
            )
        )
    return message


def decode_job(message: Any) -> Job:
    """A job; its owner is the caller, and is not part of the message."""
    error, delivery = message.error, message.delivery
    status: Status = decode_status(message.status) or "queued"  # type: ignore[assignment]
    return Job(
        id=message.id,
        owner="",
        status=status,
        model=message.model,
        version=message.version,
        priority=message.priority,
        created=message.created,
        started=message.started,
        finished=message.finished,
        expires=message.expires,
        remove_at=message.remove_at,
        attempt=message.attempt,
        error=JobError(error.code, error.reason, error.message, error.stage, error.model, error.pair)
        if message.HasField("error")
        else None,
        webhook=decode_webhook(message.webhook) if message.HasField("webhook") else None,
        delivery=DeliveryState(delivery.status, delivery.attempt, delivery.http_status, delivery.answer)
        if message.HasField("delivery")
        else None,
    )
