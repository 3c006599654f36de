"""What a webhook says of a job: ids and bodies, in the form of Standard Webhooks. Sending them is `splitserve.jobs.webhooks`.

Source: Standard Webhooks, "Webhook content": type, timestamp, data; thin, without the result.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import msgspec

from splitserve.jobs.records import Job


def event_of(job: Job) -> str:
    """The name of the event that ended a job."""
    return f"job.{job.status}"


def outbox_row(job: Job) -> tuple[str, str, str, str, str, bytes] | None:
    """Id, job, owner, URL, host and body of the webhook for the end of a job; None: it was not asked for.

    The id follows from job and event, so that a receiver recognises a webhook that is sent again, even after the database was
    restored from a backup.
    """
    if job.webhook is None or event_of(job) not in job.webhook.events:
        return None
    return f"msg_{job.id}_{job.status}", job.id, job.owner, job.webhook.url, host_of(job.webhook.url), body(job)


def body(job: Job) -> bytes:
    """The body, serialised once: these bytes are stored, signed and sent.

    If the job belongs to a trace, its context is in the body too. Source: CloudEvents, "Distributed Tracing extension".
    """
    trace = job.webhook.trace if job.webhook is not None else {}
    content = {**trace, "type": event_of(job), "timestamp": rfc3339(job.finished), "data": job_json(job)}
    return msgspec.json.encode(content)


def host_of(url: str) -> str:
    """What limits per receiver go by."""
    return (urlsplit(url).hostname or "").lower()


def rfc3339(seconds: float) -> str | None:
    """A time as text, in UTC; None for 0, which is not known yet."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z") if seconds else None


def job_json(job: Job) -> dict[str, Any]:
    """A job as its owner sees it in JSON."""
    content: dict[str, Any] = {
        "id": job.id,
        "status": job.status,
        "model": job.model,
        "version": job.version,
        "priority": job.priority,
        "created": rfc3339(job.created),
        "started": rfc3339(job.started),
        "finished": rfc3339(job.finished),
        "expires": rfc3339(job.expires),
        "remove_at": rfc3339(job.remove_at),
        "attempt": job.attempt,
        "error": None,
        "urls": {"self": f"/v2/jobs/{job.id}", "result": f"/v2/jobs/{job.id}/result"},
    }
    if job.error is not None:
        error = job.error.to_error()
        content["error"] = {"error": error.message, "reason": error.reason, "status": error.http_status, **error.metadata}
    if job.webhook is not None:
        content["webhook"] = {"url": job.webhook.url, "events": job.webhook.events}
        if job.delivery is not None:
            content["webhook"]["delivery"] = job.delivery
    return content
