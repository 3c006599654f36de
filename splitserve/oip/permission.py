"""Which models a caller may call: those whose names match one of its shell patterns (``penguins-*``)."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from splitserve.errors import PermissionDenied


def is_permitted(models: Iterable[str], model: str) -> bool:
    """Whether one of the patterns ``models`` matches the model's name."""
    return any(fnmatchcase(model, pattern) for pattern in models)


def not_permitted(model: str, *, any_more: bool = False) -> PermissionDenied:
    """The error of a caller that may not call the model. ``any_more``: it was permitted before."""
    message = f'no permission to call a model "{model[:64]}"'
    return PermissionDenied(f"{message} any more" if any_more else message, model=model[:128])
