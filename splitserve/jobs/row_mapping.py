"""What the stores' tables hold, as records: the columns are the same in SQLite and PostgreSQL. Also the migrations."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import msgspec

from splitserve.jobs.records import Claimed, Delivery, DeliveryState, Job, JobError, Lease, Payload, Rights, Webhook

encode = msgspec.json.Encoder().encode
_error, _webhook = msgspec.json.Decoder(JobError), msgspec.json.Decoder(Webhook)
_delivery_state, _rights = msgspec.json.Decoder(DeliveryState), msgspec.json.Decoder(Rights)


def encode_optional(record: msgspec.Struct | None) -> bytes | None:
    """A record for a column that may be NULL."""
    return None if record is None else encode(record)


def job_of(row: Sequence[Any]) -> Job:
    """A job from id, owner, status, model, version, priority, created, started, finished, attempt, timeout_s, expires, remove_at,
    error, webhook, delivery.
    """
    return Job(
        id=row[0],
        owner=row[1],
        status=row[2],
        model=row[3],
        version=row[4],
        priority=row[5],
        created=row[6],
        started=row[7],
        finished=row[8],
        attempt=row[9],
        timeout_s=row[10],
        expires=row[11],
        remove_at=row[12],
        error=None if row[13] is None else _error.decode(row[13]),
        webhook=None if row[14] is None else _webhook.decode(row[14]),
        delivery=None if row[15] is None else _delivery_state.decode(row[15]),
    )


def claimed_of(row: Sequence[Any]) -> Claimed:
    """A claimed job from id, fence, attempt, owner, model, version, rights, request, request_ref, timeout_s."""
    return Claimed(
        lease=Lease(row[0], row[1]),
        attempt=row[2],
        owner=row[3],
        model=row[4],
        version=row[5],
        rights=_rights.decode(row[6]),
        request=Payload(bytes(row[7]), row[8]),
        timeout_s=row[9],
    )


def delivery_of(row: Sequence[Any]) -> Delivery:
    """A webhook from id, job, owner, url, body, attempt, created."""
    return Delivery(id=row[0], job=row[1], owner=row[2], url=row[3], body=bytes(row[4]), attempt=row[5], created=row[6])


def migrations(kind: str) -> list[tuple[int, str]]:
    """Numbers and texts of the SQL files of a database, in order."""
    folder = files("splitserve.jobs").joinpath("migrations")
    found = [entry for entry in folder.iterdir() if entry.name.startswith(f"{kind}_") and entry.name.endswith(".sql")]
    numbered = [(int(entry.name.removeprefix(f"{kind}_").removesuffix(".sql")), entry.read_text()) for entry in found]
    return sorted(numbered)
