"""What a part of the library needs that this installation may lack. Imports nothing that is not in the standard library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(what: str, packages: str) -> Iterator[None]:
    """Around imports: if one fails since a package is not installed, the error says for what, and how to install it.

    Args:
        what: what needs them, at the beginning of the message.
        packages: what ``pip install`` takes.

    Raises:
        ModuleNotFoundError: a package is not installed; its name is that of the package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} needs more packages ({error.name}): pip install {packages}", name=error.name, path=error.path
        ) from error
