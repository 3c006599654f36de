"""Logs: one line per event on standard output, a constant event name and facts as keys; JSON unless on a terminal."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec
import structlog

from splitserve.errors import SplitserveError
from splitserve.server.failures import in_table
from splitserve.server.workers import own_place

Format = Literal["auto", "json", "text"]
Level = Literal["debug", "info", "warning", "error"]
Requests = Literal["all", "failed"]


def configure(*, level: Level, format: Format, service: str, requests: Requests = "all") -> None:
    """Set up logging for this process. Call it once, first."""
    RequestLog.is_complete = requests == "all"
    is_json = format == "json" or (format == "auto" and not sys.stdout.isatty())
    renderer = structlog.processors.JSONRenderer(serializer=_to_json) if is_json else structlog.dev.ConsoleRenderer(colors=False)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([structlog.processors.format_exc_info] if is_json else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        # A line is one write: workers share the output, and it may be unbuffered.
        logger_factory=structlog.WriteLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    index, count = own_place()
    if count > 1:
        structlog.contextvars.bind_contextvars(worker=index)
    logging.basicConfig(handlers=[_ToStructlog()], level=logging.WARNING, force=True)


def _to_json(event: dict[str, Any], **_: object) -> str:
    return msgspec.json.encode(event, enc_hook=repr).decode()


class _ToStructlog(logging.Handler):
    """Writes what libraries log. A message with named arguments, ``"event: %(name)s"``, becomes the event and its fields."""

    def emit(self, record: logging.LogRecord) -> None:
        fields = record.args if isinstance(record.args, Mapping) else {}
        event = record.msg.partition(": %(")[0] if fields else record.getMessage()
        exception = {"exc_info": record.exc_info} if record.exc_info else {}
        structlog.get_logger().log(record.levelno, event, logger=record.name, **fields, **exception)


class RequestLog:
    """Set by `configure`. ``is_complete``: requests that succeed are logged too."""

    is_complete: ClassVar[bool] = True


def log_request(event: str, model: str, version: str, began: float, error: BaseException | None) -> None:
    """Log one line for a request: model, version, status, duration; never payloads. Requests that succeed only if all are wanted.

    Args:
        event: the verb, e.g. ``"infer"``.
        model: as the caller named it.
        version: that was used, or as the caller named it.
        began: on the monotonic clock.
        error: why it failed, if it did; CancelledError: the caller left.
    """
    has_failed = not (error is None or isinstance(error, asyncio.CancelledError))
    if not has_failed and not RequestLog.is_complete:
        return
    structlog.get_logger().info(
        event,
        model=model[:128],
        version=version[:32],
        status=_status(error),
        duration_ms=round((time.monotonic() - began) * 1000, 2),
    )


def _status(error: BaseException | None) -> str:
    if error is None:
        return "OK"
    if not isinstance(error, Exception):
        return "CANCELLED"
    known = in_table(error)
    return known.grpc_code if isinstance(known, SplitserveError) else "INTERNAL"
