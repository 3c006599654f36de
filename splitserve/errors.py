"""The errors that cross a hop, with their gRPC and HTTP status.

One class is one row of the table in docs/errors.md; gRPC and REST both render from the class, so that they cannot disagree.
Knows no gRPC and no HTTP library.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import ClassVar

DOMAIN = "splitserve"
"""``google.rpc.ErrorInfo.domain`` of every error that a splitserve service raised."""


class SplitserveError(Exception):
    """An error that a caller sees. Raise a subclass.

    Args:
        message: names the thing, what was expected and what was given; never payloads, paths or addresses.
        stage: the service that failed; set by the first face that the error passes.
        model: the model that was called.
        pair: the version that was called, ``"K.M"`` at preprocess and proxy.
    """

    grpc_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    reason: ClassVar[str] = "INTERNAL"
    is_retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, stage: str = "", model: str = "", pair: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.stage = stage
        self.model = model
        self.pair = pair

    def at(self, *, stage: str = "", model: str = "", pair: str = "") -> SplitserveError:
        """The error itself, with these facts where they are not set yet."""
        self.stage = self.stage or stage
        self.model = self.model or model
        self.pair = self.pair or pair
        return self

    @property
    def metadata(self) -> dict[str, str]:
        """Where it happened: ``google.rpc.ErrorInfo.metadata``, and fields of the REST body."""
        facts = {"stage": self.stage, "model": self.model, "pair": self.pair}
        return {key: value for key, value in facts.items() if value}


class InvalidInput(SplitserveError):
    """A tensor, a row or the request is malformed: its name, shape, datatype, length or JSON."""

    grpc_code = "INVALID_ARGUMENT"
    http_status = 400
    reason = "INVALID_INPUT"


class TooLarge(SplitserveError):
    """Larger than a limit."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 413
    reason = "TOO_LARGE"


class Unauthenticated(SplitserveError):
    """No credentials, or wrong ones."""

    grpc_code = "UNAUTHENTICATED"
    http_status = 401
    reason = "UNAUTHENTICATED"


class PermissionDenied(SplitserveError):
    """The caller is known and may not do this."""

    grpc_code = "PERMISSION_DENIED"
    http_status = 403
    reason = "PERMISSION_DENIED"


class NotFound(SplitserveError):
    """No such model, version or path."""

    grpc_code = "NOT_FOUND"
    http_status = 404
    reason = "NOT_FOUND"


class Conflict(SplitserveError):
    """The request contradicts what exists: a job that has ended is cancelled, or has no result."""

    grpc_code = "FAILED_PRECONDITION"
    http_status = 409
    reason = "CONFLICT"


class NotFinished(SplitserveError):
    """The job whose result was asked for has not ended yet."""

    grpc_code = "FAILED_PRECONDITION"
    http_status = 409
    reason = "NOT_FINISHED"
    is_retryable = True


class IdempotencyKeyReused(SplitserveError):
    """An idempotency key was used for a different request."""

    grpc_code = "FAILED_PRECONDITION"
    http_status = 422
    reason = "IDEMPOTENCY_KEY_REUSED"


class Gone(SplitserveError):
    """What an idempotency key has created was removed."""

    grpc_code = "NOT_FOUND"
    http_status = 410
    reason = "GONE"


class Overloaded(SplitserveError):
    """A queue or a concurrency limit is full."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429
    reason = "OVERLOADED"
    is_retryable = True


class Unavailable(SplitserveError):
    """Loading, draining, or the next stage cannot be reached."""

    grpc_code = "UNAVAILABLE"
    http_status = 503
    reason = "UNAVAILABLE"
    is_retryable = True


class StorageFull(SplitserveError):
    """There is no room to store a job."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 507
    reason = "STORAGE_FULL"


class DeadlineExceeded(SplitserveError):
    """The deadline has passed, or too little time is left to begin."""

    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 504
    reason = "DEADLINE_EXCEEDED"


class Cancelled(SplitserveError):
    """The caller has cancelled or disconnected."""

    grpc_code = "CANCELLED"
    http_status = 499
    reason = "CANCELLED"


class Unsupported(SplitserveError):
    """Not supported."""

    grpc_code = "UNIMPLEMENTED"
    http_status = 501
    reason = "UNSUPPORTED"


class PairMismatch(SplitserveError):
    """The halves of a pair do not fit, or a stage broke its signature. Never the caller's fault."""

    grpc_code = "INTERNAL"
    http_status = 500
    reason = "PAIR_MISMATCH"


class Internal(SplitserveError):
    """Anything else. The caller gets the message only; the cause is in the log."""


TABLE: tuple[type[SplitserveError], ...] = (
    InvalidInput,
    TooLarge,
    Unauthenticated,
    PermissionDenied,
    NotFound,
    Gone,
    Conflict,
    NotFinished,
    IdempotencyKeyReused,
    Overloaded,
    StorageFull,
    Unavailable,
    DeadlineExceeded,
    Cancelled,
    Unsupported,
    PairMismatch,
    Internal,
)

_BY_REASON = {error.reason: error for error in TABLE}
_BY_GRPC_CODE = {error.grpc_code: error for error in reversed(TABLE)} | {
    # Without a reason these codes are ambiguous; the less severe meaning is assumed.
    "RESOURCE_EXHAUSTED": Overloaded,
    "INTERNAL": Internal,
}


def from_wire(grpc_code: str, message: str, reason: str = "", metadata: Mapping[str, str] | None = None) -> SplitserveError:
    """The error that another stage raised.

    Args:
        grpc_code: a gRPC status name, e.g. ``"NOT_FOUND"``.
        message: the status message.
        reason: of the response's ``ErrorInfo``; "" (a third-party server): the code decides.
        metadata: of the response's ``ErrorInfo``.
    """
    facts = metadata or {}
    kind = _BY_REASON.get(reason) or _BY_GRPC_CODE.get(grpc_code, Internal)
    return kind(message, stage=facts.get("stage", ""), model=facts.get("model", ""), pair=facts.get("pair", ""))


class at_stage:  # noqa: N801
    """Set the stage of every error that leaves the ``with`` block, unless a later stage has set it.

    A class with the name of a function: a generator would cost three times as much for every request.

    Raises:
        Internal: in place of an exception that is not a `SplitserveError`, which becomes its cause.
    """

    __slots__ = ("_model", "_pair", "_stage")

    def __init__(self, stage: str, *, model: str = "", pair: str = "") -> None:
        self._stage = stage
        self._model = model
        self._pair = pair

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and (named := self.named(error)) is not error:
            raise named from error

    def named(self, error: Exception) -> SplitserveError:
        """The error as it leaves the ``with`` block."""
        if isinstance(error, SplitserveError):
            return error.at(stage=self._stage, model=self._model[:128], pair=self._pair)
        internal = Internal("internal error", stage=self._stage, model=self._model[:128], pair=self._pair)
        internal.__cause__ = error
        return internal
