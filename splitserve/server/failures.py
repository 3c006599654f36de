"""The error that a caller gets for an exception: decided here for REST and gRPC."""

from __future__ import annotations

import structlog

from splitserve.errors import Internal, Overloaded, SplitserveError, TooLarge, at_stage
from splitserve.wire.byte_budget import BudgetExceeded
from splitserve.wire.http1.messages import BodyTooLarge


def in_table(error: Exception) -> Exception:
    """The error of the table for an exceeded limit of the wire; any other exception unchanged."""
    if isinstance(error, BodyTooLarge):
        return TooLarge(str(error))
    if isinstance(error, BudgetExceeded):
        return Overloaded(str(error))
    return error


def named(error: Exception, stage: str) -> SplitserveError:
    """The error for the caller. An unexpected exception is logged, and hidden from the caller.

    Args:
        error: what was raised.
        stage: set on an error that has none.
    """
    failure = at_stage(stage).named(in_table(error))
    if isinstance(failure, Internal):
        # An unexpected error. The caller gets "internal error" only.
        structlog.get_logger().error("internal error", stage=failure.stage, exc_info=failure)
    return failure
