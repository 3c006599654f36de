"""The status that a gRPC call ends with for an error of the table."""

from __future__ import annotations

from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from splitserve.errors import DOMAIN, SplitserveError
from splitserve.oip import protobuf
from splitserve.wire.grpc.messages import CallError, status_code


def call_error(error: SplitserveError, *, stage: str, retry_after_s: float = 0.0) -> CallError:
    """The status of an error, with its details and its push-back.

    Args:
        error: for the caller.
        stage: the service that answers.
        retry_after_s: the push-back of errors after which a retry helps; 0: none, unless a later stage has retried already.
    """
    metadata: tuple[tuple[str, str | bytes], ...] = ((protobuf.DETAILS_KEY, rich_status(error)),)
    if error.is_retryable and retry_after_s:
        metadata += ((protobuf.PUSHBACK_KEY, str(round(retry_after_s * 1000))),)
    elif error.is_retryable and error.stage != stage:
        metadata += ((protobuf.PUSHBACK_KEY, "-1"),)
    return CallError(error.grpc_code, error.message, metadata)


def rich_status(error: SplitserveError) -> bytes:
    """The ``google.rpc.Status`` of an error, with reason, stage and model in its ``ErrorInfo``."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    detail = any_pb2.Any()
    detail.Pack(info)
    code = status_code(error.grpc_code)
    status: bytes = status_pb2.Status(code=code, message=error.message, details=[detail]).SerializeToString()
    return status
