"""The access log for auditors: one line for each attempt to change what a service serves or logs, whatever the log level is.

| verb | who | where it is seen |
|---|---|---|
| ``load``, ``unload`` | the caller of a face | at that face |
| ``release``, ``roll back``, ``withdraw``, ``route`` | who wrote to the model repository | at the poll that finds it |
| ``set log level`` | who has the token of the admin listener | there |
"""

from __future__ import annotations

import structlog

from splitserve.repository.release import Release

MAX_LENGTH = 128
"""Of a name, which a caller may have made up."""

REPOSITORY = "model repository"
"""The source of what was not asked of a service, but written where it reads."""


def record(
    verb: str, *, result: str, principal: str, source: str, model: str = "", release: str = "", **facts: str | int | None
) -> None:
    """Write a line.

    Args:
        verb: what was to be done.
        result: OK, or the code of the error.
        principal: who did it, as far as that is known.
        source: the address that it came from.
        model: that it concerns.
        release: that it concerns, K.M.
        facts: more, e.g. what it was before.
    """
    # A change of what is served or logged, or an attempt at one (docs/telemetry.md). Not filtered by the log level.
    structlog.get_logger().info(
        "audit",
        verb=verb,
        principal=principal[:MAX_LENGTH],
        source=source,
        model=model[:MAX_LENGTH],
        release=release,
        result=result,
        **facts,
    )


def record_release(release: Release) -> None:
    """Write a line for a record that was found in the model repository."""
    manifest = release.manifest
    verb = "withdraw" if manifest.withdraws else "roll back" if manifest.rolls_back else "release"
    of = {name: n for name, n in (("withdraws", manifest.withdraws), ("rolls_back", manifest.rolls_back)) if n}
    record(
        verb,
        result="OK",
        principal=manifest.recorded_by,
        source=REPOSITORY,
        model=manifest.model,
        release=manifest.pair,
        sequence=manifest.sequence,
        recorded=manifest.created,
        **of,
    )
