"""Progress of a large table: a bar in the terminal, or the caller's function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

ReportProgress = Callable[[int, int], None]
"""Called with the rows answered so far and the total."""

Progress = bool | ReportProgress


@contextmanager
def reporting(progress: Progress, model: str) -> Iterator[ReportProgress]:
    """The function to report progress to.

    Args:
        progress: True: a bar; or a function.
        model: label of the bar.

    Raises:
        ModuleNotFoundError: a bar is requested and rich is not installed.
    """
    if callable(progress):
        yield progress
    elif progress:
        with _bar(model) as report:
            yield report
    else:
        yield _ignore


def _ignore(n_done: int, n_rows: int) -> None:
    """Report nothing."""


@contextmanager
def _bar(model: str) -> Iterator[ReportProgress]:
    try:
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
    except ModuleNotFoundError:
        raise ModuleNotFoundError("progress=True requires rich; install it, or pass a function") from None
    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task(model, total=None)
        yield lambda n_done, n_rows: bar.update(task, completed=n_done, total=n_rows)
