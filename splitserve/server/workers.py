"""Several processes of one service that share its ports: ``--workers N``, for hosts with more cores.

The first process only watches over them: it begins one anew that has ended, and hands on signals. They are forked before there
is an event loop, a channel or a server, so that what is imported is shared. The kernel spreads connections over those who listen
on a port (SO_REUSEPORT); a client that wants to reach all of them learns from each which it is (`splitserve.remote.stream`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

import structlog

OPTION = "--workers"
INDEX_VARIABLE = "SPLITSERVE_WORKER"
"""In the environment of a worker: which of how many it is, e.g. ``0/4``."""

RESTART_DELAY_S = 1.0
"""A worker that ends sooner than this after it began is begun anew only after it."""


def take_option(arguments: list[str], variable: str) -> None:
    """Move ``--workers N`` from the command line to the environment variable that the setting is read from."""
    for index, argument in enumerate(arguments):
        name, separator, value = argument.partition("=")
        if name == OPTION:
            os.environ[variable] = value if separator else "".join(arguments[index + 1 : index + 2])
            del arguments[index : index + (1 if separator else 2)]
            return


def own_place() -> tuple[int, int]:
    """Which worker this process is, and how many there are; (0, 1) if it is alone."""
    index, _, count = os.environ.get(INDEX_VARIABLE, "0/1").partition("/")
    return int(index), int(count)


def watch_over(n_workers: int, work: Callable[[], None], ports: Sequence[int]) -> None:
    """Run ``work`` in so many processes until SIGTERM or SIGINT, which they get too; return when all have ended.

    Args:
        n_workers: how many.
        work: what each does.
        ports: that they share.

    Raises:
        SystemExit: a port is 0, which each would take differently.
    """
    if 0 in ports:
        raise SystemExit("several workers share a port, so it has to be named: 0 is none")
    _Watch(n_workers, work).run()


_PR_SET_PDEATHSIG = 1


class _Watch:
    def __init__(self, n_workers: int, work: Callable[[], None]) -> None:
        self._n_workers = n_workers
        self._work = work
        self._workers: dict[int, tuple[int, float]] = {}
        self._is_stopping = False

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hand_on)
        for index in range(self._n_workers):
            self._begin(index)
        while self._workers:
            pid, status = os.wait()
            index, began = self._workers.pop(pid)
            if self._is_stopping:
                continue
            # A worker process has ended unexpectedly and is restarted.
            structlog.get_logger().error("worker ended", worker=index, status=os.waitstatus_to_exitcode(status))
            time.sleep(max(0.0, began + RESTART_DELAY_S - time.monotonic()))
            if not self._is_stopping:
                self._begin(index)

    def _begin(self, index: int) -> None:
        pid = os.fork()
        if pid:
            self._workers[pid] = (index, time.monotonic())
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        _end_with_parent()
        os.environ[INDEX_VARIABLE] = f"{index}/{self._n_workers}"
        try:
            self._work()
        except SystemExit as end:
            _leave(end.code)
        except BaseException:
            # An exception ended the worker.
            structlog.get_logger().exception("worker failed")
            _leave(1)
        _leave(0)

    def _hand_on(self, number: int, _: FrameType | None) -> None:
        self._is_stopping = True
        for pid in self._workers:
            os.kill(pid, number)


def _end_with_parent() -> None:
    """Be told to stop if the first process is killed. Source: prctl(2), PR_SET_PDEATHSIG; elsewhere there is none."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _leave(code: object) -> None:
    """End without what the first process has registered for its own end."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)
