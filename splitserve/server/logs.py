"""Logs: one line per event on standard output, a constant event name and facts as keys; JSON unless on a terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar, Literal

import msgspec
import structlog
from structlog.typing import Processor

from splitserve.errors import SplitserveError
from splitserve.server.failures import in_table
from splitserve.server.workers import own_place

AUDIT = "audit"
"""The event of `splitserve.server.audit`."""

Format = Literal["auto", "json", "text"]
Level = Literal["debug", "info", "warning", "error"]


def configure(*, level: Level, format: Format, service: str, requests: str = "all") -> None:
    """Set up logging for this process. Call it once, first."""
    RequestLog.wanted = every_of(requests)
    LogLevel.set(level)
    is_json = format == "json" or (format == "auto" and not sys.stdout.isatty())
    index, count = own_place()
    place: dict[str, object] = {"service": service, **({"worker": index} if count > 1 else {})}
    renderer = structlog.processors.JSONRenderer(serializer=_to_json) if is_json else structlog.dev.ConsoleRenderer(colors=False)
    structlog.configure(
        processors=[
            LogLevel.keep,
            structlog.contextvars.merge_contextvars,
            _adding(place),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([structlog.processors.format_exc_info] if is_json else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),  # `LogLevel` filters, since the level may change
        # A line is one write: workers share the output, and it may be unbuffered.
        logger_factory=structlog.WriteLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=logging.WARNING, force=True)


def _adding(facts: Mapping[str, object]) -> Processor:
    """Adds these to each line. Variables of a context would not be there in threads, such as the one that exports spans."""
    return lambda _logger, _method, event: {**event, **facts}


class LogLevel:
    """The minimum level that is logged by this process. Loggers are cached, so that it is looked up for each line."""

    current: ClassVar[Level] = "info"
    _least: ClassVar[int] = logging.INFO

    @classmethod
    def set(cls, level: Level) -> None:
        """From now on."""
        cls.current, cls._least = level, getattr(logging, level.upper())
        RequestLog.every = RequestLog.wanted if cls._least <= logging.INFO else 0  # no line is made that would be dropped

    @classmethod
    def keep(cls, _logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """A structlog processor that drops the lines of lower levels, except those for auditors."""
        if structlog.processors.NAME_TO_LEVEL[method] < cls._least and event.get("event") != AUDIT:
            raise structlog.DropEvent
        return event


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
    """Which requests are logged besides those that fail. Set by `configure`.

    ``wanted``: one in so many that succeed, or that their callers cancel; 0: none. ``every``: the same, at the level of now.
    """

    wanted: ClassVar[int] = 1
    every: ClassVar[int] = 1
    _n_seen: ClassVar[int] = 0

    @classmethod
    def takes(cls) -> bool:
        """Whether the next request that succeeds is logged."""
        if cls.every < 2:
            return cls.every == 1
        cls._n_seen += 1
        return cls._n_seen % cls.every == 0


def every_of(requests: str) -> int:
    """`RequestLog.wanted` of a value of ``LOG_REQUESTS``: all, failed, or sampled:N.

    Raises:
        ValueError: it is none of them.
    """
    mode, _, number = requests.partition(":")
    if mode == "sampled" and number.isascii() and number.isdecimal() and 0 < int(number) < 2**31:
        return int(number)
    if requests not in ("all", "failed"):
        raise ValueError(f'expected all, failed, or sampled:N for one in N, got "{requests[:32]}"')
    return int(requests == "all")


def log_request(
    event: str, model: str, version: str, began: float, error: BaseException | None, facts: Mapping[str, object]
) -> None:
    """Log one line for a request: model, version, status, duration, and more facts; never payloads.

    Args:
        event: the verb, e.g. ``"infer"``.
        model: as the caller named it.
        version: that was used, or as the caller named it.
        began: on the monotonic clock.
        error: why it failed, if it did; CancelledError: the caller left.
        facts: request id, rows, bytes, milliseconds by phase, as far as they are known.
    """
    structlog.get_logger().info(
        event,
        model=model[:128],
        version=version[:32],
        status=status_of(error),
        duration_ms=round((time.monotonic() - began) * 1000, 2),
        **facts,
    )


def status_of(error: BaseException | None) -> str:
    """The gRPC code of an outcome; None: OK. An exception that is no `Exception` is a cancellation."""
    if error is None:
        return "OK"
    if not isinstance(error, Exception):
        return "CANCELLED"
    known = in_table(error)
    return known.grpc_code if isinstance(known, SplitserveError) else "INTERNAL"


def http_status_of(error: BaseException) -> int:
    """The HTTP status of an outcome; 499, as nginx has it, where the caller has left."""
    if not isinstance(error, Exception):
        return 499
    known = in_table(error)
    return known.http_status if isinstance(known, SplitserveError) else 500
