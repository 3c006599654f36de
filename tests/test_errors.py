"""The errors that cross a hop: one table, the same over every transport."""

from __future__ import annotations

import grpc
import pytest

from splitserve import errors
from splitserve.errors import (
    TABLE,
    DeadlineExceeded,
    Internal,
    InvalidInput,
    NotFound,
    Overloaded,
    PairMismatch,
    SplitserveError,
    TooLarge,
    Unavailable,
    at_stage,
    from_wire,
)

ROWS = {
    # class: (gRPC code, HTTP status, reason, a retry helps)
    "InvalidInput": ("INVALID_ARGUMENT", 400, "INVALID_INPUT", False),
    "TooLarge": ("RESOURCE_EXHAUSTED", 413, "TOO_LARGE", False),
    "Unauthenticated": ("UNAUTHENTICATED", 401, "UNAUTHENTICATED", False),
    "PermissionDenied": ("PERMISSION_DENIED", 403, "PERMISSION_DENIED", False),
    "NotFound": ("NOT_FOUND", 404, "NOT_FOUND", False),
    "Gone": ("NOT_FOUND", 410, "GONE", False),
    "Conflict": ("FAILED_PRECONDITION", 409, "CONFLICT", False),
    "NotFinished": ("FAILED_PRECONDITION", 409, "NOT_FINISHED", True),
    "IdempotencyKeyReused": ("FAILED_PRECONDITION", 422, "IDEMPOTENCY_KEY_REUSED", False),
    "StorageFull": ("RESOURCE_EXHAUSTED", 507, "STORAGE_FULL", False),
    "Overloaded": ("RESOURCE_EXHAUSTED", 429, "OVERLOADED", True),
    "Unavailable": ("UNAVAILABLE", 503, "UNAVAILABLE", True),
    "DeadlineExceeded": ("DEADLINE_EXCEEDED", 504, "DEADLINE_EXCEEDED", False),
    "Cancelled": ("CANCELLED", 499, "CANCELLED", False),
    "Unsupported": ("UNIMPLEMENTED", 501, "UNSUPPORTED", False),
    "PairMismatch": ("INTERNAL", 500, "PAIR_MISMATCH", False),
    "Internal": ("INTERNAL", 500, "INTERNAL", False),
}


def test_the_error_table_is_this():
    """Every row of the table, restated: a status that changes here changes for every client."""
    found = {kind.__name__: (kind.grpc_code, kind.http_status, kind.reason, kind.is_retryable) for kind in TABLE}

    assert found == ROWS


def test_every_error_is_in_the_table():
    """A class that is not in the table could cross no hop and keep its meaning."""
    defined = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SplitserveError)}

    assert defined - {SplitserveError} == set(TABLE)


def test_a_reason_names_one_error_only():
    """The reason distinguishes two errors with the same code."""
    reasons = [kind.reason for kind in TABLE]

    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("kind", TABLE)
def test_every_code_is_a_grpc_status(kind):
    """The face finds the code by its name."""
    assert kind.grpc_code in grpc.StatusCode.__members__


@pytest.mark.parametrize("kind", TABLE)
def test_an_error_is_the_same_after_a_hop(kind):
    """Class, message, stage, model and pair survive the wire."""
    raised = kind("what went wrong", stage="predict", model="penguins", pair="1.2")

    received = from_wire(raised.grpc_code, raised.message, raised.reason, raised.metadata)

    assert type(received) is kind
    assert received.message == str(received) == "what went wrong"
    assert (received.stage, received.model, received.pair) == ("predict", "penguins", "1.2")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", InvalidInput),
        ("NOT_FOUND", NotFound),
        ("UNAVAILABLE", Unavailable),
        ("DEADLINE_EXCEEDED", DeadlineExceeded),
        ("UNIMPLEMENTED", errors.Unsupported),
        ("UNAUTHENTICATED", errors.Unauthenticated),
        ("PERMISSION_DENIED", errors.PermissionDenied),
        ("CANCELLED", errors.Cancelled),
        ("RESOURCE_EXHAUSTED", Overloaded),
        ("INTERNAL", Internal),
        ("DATA_LOSS", Internal),
        ("UNKNOWN", Internal),
    ],
)
@pytest.mark.parametrize("reason", ["", "SOMETHING_NEWER"])
def test_without_a_known_reason_the_code_decides(code, kind, reason):
    """For a third-party server, or a newer splitserve, the code decides; of two meanings the less severe one is assumed."""
    assert type(from_wire(code, "message", reason)) is kind


def test_a_known_reason_wins_over_the_code():
    """RESOURCE_EXHAUSTED is a queue that is full, unless the reason says that the message was too large."""
    assert type(from_wire("RESOURCE_EXHAUSTED", "message", "TOO_LARGE")) is TooLarge


def test_error_metadata_has_only_known_facts():
    """Unknown facts are absent, not empty."""
    assert InvalidInput("message").metadata == {}
    assert InvalidInput("message", stage="proxy", pair="1.2").metadata == {"stage": "proxy", "pair": "1.2"}


def test_the_innermost_stage_is_kept():
    """An error that passes several stages keeps the facts of the first."""
    with (
        pytest.raises(NotFound) as caught,
        at_stage("proxy", model="outer", pair="9.9"),
        at_stage("preprocess", model="penguins", pair="1.2"),
    ):
        raise NotFound("no such version", stage="predict")

    assert caught.value.metadata == {"stage": "predict", "model": "penguins", "pair": "1.2"}


def test_a_stage_adds_missing_facts():
    """The code that raises it does not need to know its stage."""
    with pytest.raises(NotFound) as caught, at_stage("proxy", model="penguins", pair="1.2"), at_stage("preprocess"):
        raise NotFound("no such version")

    assert caught.value.metadata == {"stage": "preprocess", "model": "penguins", "pair": "1.2"}


def test_an_unexpected_exception_becomes_internal_without_its_text():
    """The original exception is logged as the cause; the caller gets "internal error"."""
    accident = KeyError("/secret/path")

    with pytest.raises(Internal) as caught, at_stage("predict", model="penguins", pair="1.2"):
        raise accident

    assert caught.value.message == "internal error"
    assert caught.value.__cause__ is accident
    assert caught.value.metadata == {"stage": "predict", "model": "penguins", "pair": "1.2"}


@pytest.mark.parametrize("error", [PairMismatch("message"), RuntimeError("message")])
def test_a_model_name_is_truncated_to_fit_a_header(error):
    """The name comes from the caller and is sent in trailing metadata, which is limited."""
    with pytest.raises(SplitserveError) as caught, at_stage("proxy", model="m" * 100_000):
        raise error

    assert caught.value.model == "m" * 128


def test_base_exceptions_are_not_caught():
    """Cancellation and the end of the process pass through."""
    with pytest.raises(SystemExit), at_stage("proxy"):
        raise SystemExit
