"""Batch scoring: the release that serves online, over files and tables (docs/batch.md). Needs the extra ``batch``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from splitserve.scoring.errors import ScoringError, ServerGone, TooManyErrors, WrongUsage

if TYPE_CHECKING:
    from splitserve.scoring.batches import batch_schema, score_batches
    from splitserve.scoring.program import score
    from splitserve.scoring.summary import Summary

__all__ = [
    "ScoringError",
    "ServerGone",
    "Summary",
    "TooManyErrors",
    "WrongUsage",
    "batch_schema",
    "score",
    "score_batches",
]

_HOMES = {"Summary": "summary", "batch_schema": "batches", "score": "program", "score_batches": "batches"}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use: the command starts its workers before it imports pyarrow."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
