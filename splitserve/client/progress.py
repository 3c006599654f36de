"""How far a large frame has come: a bar in the terminal, or a function of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int], None]
"""Called with the rows answered so far and the rows in all."""

Progress = bool | Report


@contextmanager
def reporting(progress: Progress, model: str) -> Iterator[Report]:
    """What to tell of the rows that are done.

    Args:
        progress: True shows a bar; a function is called.
        model: named in front of the bar.

    Raises:
        ModuleNotFoundError: a bar is wanted, and rich is not installed.
    """
    if callable(progress):
        yield progress
    elif progress:
        with _bar(model) as report:
            yield report
    else:
        yield _ignore


def _ignore(n_done: int, n_rows: int) -> None:
    """Nobody wants to know."""


@contextmanager
def _bar(model: str) -> Iterator[Report]:
    try:
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
    except ModuleNotFoundError:
        raise ModuleNotFoundError("progress=True shows its bar with rich: install it, or give a function") from None
    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task(model, total=None)
        yield lambda n_done, n_rows: bar.update(task, completed=n_done, total=n_rows)
