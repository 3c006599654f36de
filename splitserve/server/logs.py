"""Logs: one line an event on standard output, a constant event name and facts as keys; JSON unless a person reads along."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, ClassVar, Literal

import msgspec
import structlog

from splitserve.errors import SplitserveError
from splitserve.server.workers import own_place

Format = Literal["auto", "json", "text"]
Level = Literal["debug", "info", "warning", "error"]
Requests = Literal["all", "failed"]


def configure(*, level: Level, format: Format, service: str, requests: Requests = "all") -> None:
    """Set up logging for this process. Call it once, first."""
    RequestLine.logs_all = requests == "all"
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


class RequestLine:
    """Writes a line for the request that is handled inside the ``with``, see `log_request`.

    Args:
        event: what was asked for.
        model: as the caller named it.
        version: likewise; set ``version`` to the one that was used.
    """

    logs_all: ClassVar[bool] = True

    def __init__(self, event: str, model: str, version: str) -> None:
        self._event = event
        self._model = model
        self.version = version
        self._began = time.monotonic()

    def __enter__(self) -> RequestLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        log_request(self._event, self._model, self.version, self._began, error)


def log_request(event: str, model: str, version: str, began: float, error: BaseException | None) -> None:
    """One line for a request: model, version, status, time. Never payloads. Of those that succeed only if all are wanted.

    Args:
        event: what was asked for.
        model: as the caller named it.
        version: that was used, or as the caller named it.
        began: on the monotonic clock.
        error: that it failed with, if it did.
    """
    is_nothing_wrong = error is None or isinstance(error, asyncio.CancelledError)  # the caller left
    if is_nothing_wrong and not RequestLine.logs_all:
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
    if isinstance(error, SplitserveError):
        return error.grpc_code
    return "CANCELLED" if isinstance(error, asyncio.CancelledError) else "INTERNAL"
