"""Why a batch run ends early, with the exit status of the command. docs/batch.md lists them."""

from __future__ import annotations

from typing import ClassVar


class ScoringError(Exception):
    """The input, the release, the output or a worker; the message names it and the way out."""

    exit_status: ClassVar[int] = 1


class WrongUsage(ScoringError):
    """Options that do not fit each other, the model or the input."""

    exit_status = 2


class TooManyErrors(ScoringError):
    """More rows failed than ``max_errors`` allows."""

    exit_status = 3


class ServerGone(ScoringError):
    """The running system of ``url`` could not be reached for as long as it was tried."""

    exit_status = 4
