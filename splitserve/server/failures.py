"""Exceptions as the errors that callers are told: what REST and gRPC render is decided here, once."""

from __future__ import annotations

import structlog

from splitserve.errors import Internal, Overloaded, SplitserveError, TooLarge, at_stage
from splitserve.wire.byte_budget import BudgetExceeded
from splitserve.wire.http1.messages import BodyTooLarge


def in_table(error: Exception) -> Exception:
    """The error of the table that a limit of the wire stands for; any other exception as it is."""
    if isinstance(error, BodyTooLarge):
        return TooLarge(str(error))
    if isinstance(error, BudgetExceeded):
        return Overloaded(str(error))
    return error


def named(error: Exception, stage: str) -> SplitserveError:
    """The error that a caller is told. Of an unexpected exception it learns nothing; the log does.

    Args:
        error: what was raised.
        stage: the name that an error gets which has none.
    """
    failure = at_stage(stage).named(in_table(error))
    if isinstance(failure, Internal):
        # An unexpected error. The caller gets "internal error" only.
        structlog.get_logger().error("internal error", stage=failure.stage, exc_info=failure)
    return failure
