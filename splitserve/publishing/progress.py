"""How far a publication is: a bar on stderr once it takes long, and an error if it takes too long."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from splitserve.publishing.errors import PublishError

TIME_LIMIT_S = 600.0
"""Seconds that converting, comparing and writing may take by default."""

ENDS_PROCESS_AFTER_S = 5.0
"""Seconds after the limit in which native code may still return, where `ending_process` applies; twice as many where it keeps the
interpreter lock.
"""

WRITING = "writing the bundles"
"""The last step."""

BAR_AFTER_S = 2.0
_STDERR = 2
N_STEPS = 36
"""Steps of a publication at one precision, roughly; the bar waits at its end for those that come on top."""


_ENDS_PROCESS: ContextVar[bool] = ContextVar("ends_process", default=False)


@contextmanager
def ending_process() -> Iterator[None]:
    """Within, a publication in native code that does not return ends the process, with its error on stderr and code 1.

    For commands; a library must not end its caller's process.
    """
    token = _ENDS_PROCESS.set(True)
    try:
        yield
    finally:
        _ENDS_PROCESS.reset(token)


class _OutOfTime(BaseException):
    """Not an `Exception`: converters and transforms may raise anything, which is caught."""


class Progress:
    """What is being done. A context manager that ends its body with an error when the time is over.

    The body is interrupted between two bytecodes, so a loop in Python ends at once; a call into native code, when it returns, or
    with the process (`ending_process`).

    Args:
        name: of the model.
        time_limit_s: seconds until the body ends.
        shows: whether a bar may be shown; by default if stderr is a terminal.
    """

    def __init__(self, name: str, time_limit_s: float, *, shows: bool | None = None) -> None:
        self._name, self._limit = name, time_limit_s
        self._shows = sys.stderr.isatty() if shows is None else shows
        self._what = ""
        self._lock = threading.Lock()
        self._is_over = False
        self._n_done = 0
        self._bar: Any = None
        self._stack = ExitStack()
        self._thread = threading.get_ident()

    def step(self, what: str) -> None:
        """Say what is done next."""
        self._what = what
        self._n_done += 1
        if self._bar is not None:
            self._bar(what, self._n_done)

    def end(self) -> None:
        """Interrupt nothing from here on: what follows must not stop half-way. Interrupts now if the time is over."""
        with self._lock:
            self._is_over = True
        self._stack.close()

    def __enter__(self) -> Progress:
        if not self._limit > 0:
            raise PublishError(f"time_limit_s: expected more than 0 seconds, got {self._limit:g}")
        self._thread = threading.get_ident()
        timers = [threading.Timer(self._limit, self._interrupt)]
        if _ENDS_PROCESS.get():
            timers.append(threading.Timer(self._limit + ENDS_PROCESS_AFTER_S, self._end_process))
            # A timer needs the interpreter lock, which native code may keep, e.g. ONNX Runtime while it loads a model.
            faulthandler.dump_traceback_later(self._limit + 2 * ENDS_PROCESS_AFTER_S, exit=True, file=_STDERR)
            self._stack.callback(faulthandler.cancel_dump_traceback_later)
        if self._shows:
            timers.append(threading.Timer(BAR_AFTER_S, self._show))
        for timer in timers:
            timer.daemon = True
            timer.start()
            self._stack.callback(timer.join)
            self._stack.callback(timer.cancel)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            self.end()
        except _OutOfTime as late:
            kind, error = _OutOfTime, late
            self._stack.close()
        if kind is not None and issubclass(kind, _OutOfTime):
            raise PublishError(self._late()) from error

    def _late(self) -> str:
        return (
            f"publishing took longer than {self._limit:g} s, at the step: {self._what}; give it more time (time_limit_s=, "
            "--time-limit), fewer rows, or a smaller model"
        )

    def _interrupt(self) -> None:
        with self._lock:
            if not self._is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(_OutOfTime))

    def _end_process(self) -> None:
        with self._lock:
            if not self._is_over:
                print(self._late(), file=sys.stderr, flush=True)
                os._exit(1)

    def _show(self) -> None:
        with self._lock:
            if not self._is_over:
                self._bar = _bar(self._name, self._stack)


def _bar(name: str, stack: ExitStack) -> Callable[[str, int], None] | None:
    """Shows the step and how many are done; None if rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        return None
    columns = (TextColumn("publishing {task.fields[model]}"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
    task = shown.add_task("", total=N_STEPS, model=name)
    return lambda what, n_done: shown.update(task, description=what, completed=min(n_done, N_STEPS - 1))
