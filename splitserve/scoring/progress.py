"""How far a run is, on stderr: a bar on a terminal, elsewhere a line each ten seconds. Nothing goes to stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TextIO

LINE_EVERY_S = 10.0


class Progress:
    """Rows done, rows per second, time left and bad rows. A context manager.

    Args:
        n_rows: of the run; None if unknown.
        shows: whether anything is shown.
        stream: where lines go; stderr by default.
        clock: seconds that never go back.
    """

    def __init__(
        self, n_rows: int | None, *, shows: bool, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._n_rows = n_rows
        self._shows = shows
        self._stream = stream or sys.stderr
        self._clock = clock
        self._began = self._last_line = clock()
        self._n_resumed = 0
        self.done = 0
        self.errors = 0
        self._stack = ExitStack()
        self._update: Callable[[], None] | None = None

    def __enter__(self) -> Progress:
        if self._shows and self._stream.isatty():
            self._update = self._bar()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def resumed(self, rows: int, errors: int) -> None:
        """Rows that an earlier process has done: they count, but not for the speed."""
        self._n_resumed = rows
        self.add(rows, errors)

    def add(self, rows: int, errors: int) -> None:
        """So many more rows are done, so many of them bad."""
        self.done += rows
        self.errors += errors
        if self._update is not None:
            self._update()
        elif self._shows and self._clock() - self._last_line >= LINE_EVERY_S:
            self._last_line = self._clock()
            print(self.line(), file=self._stream, flush=True)

    def line(self) -> str:
        """The state in words."""
        speed = (self.done - self._n_resumed) / max(self._clock() - self._began, 1e-9)
        of = f" of {self._n_rows}" if self._n_rows is not None else ""
        left = ""
        if self._n_rows is not None and speed > 0:
            left = f", {duration((self._n_rows - self.done) / speed)} left"
        return f"{self.done}{of} rows, {speed:.0f} rows/s{left}, {self.errors} bad"

    def _bar(self) -> Callable[[], None] | None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar
        except ImportError:
            return None
        columns: list[Any] = [BarColumn(), TextColumn("{task.description}")]
        bar = self._stack.enter_context(Bar(*columns, console=Console(file=self._stream), transient=True))
        task = bar.add_task(self.line(), total=self._n_rows)
        return lambda: bar.update(task, completed=self.done, description=self.line())


def duration(seconds: float) -> str:
    """E.g. ``1 h 02 min``."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
