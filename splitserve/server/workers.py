"""Several processes of one service that share its ports: ``--workers N``, for hosts with more cores.

The first process only supervises: it restarts a worker that has ended, and forwards signals. Workers are forked before there is
an event loop, a channel or a server, so that imported modules share memory. The kernel distributes connections over the
processes that listen on a port (SO_REUSEPORT); each reports its index to clients (`splitserve.remote.stream`).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

import structlog

from splitserve.child_processes import ending_with_parent

OPTION = "--workers"
INDEX_VARIABLE = "SPLITSERVE_WORKER"
"""In the environment of a worker: its index and the number of workers, e.g. ``0/4``."""

SOCKETS_VARIABLE = "SPLITSERVE_WORKER_SOCKETS"
"""In the environment of a worker: the folder of the sockets on which workers answer the admin process: ``0.sock`` …"""

RESTART_DELAY_S = 1.0
"""Minimum time between two starts of a worker."""


def take_option(arguments: list[str], variable: str) -> None:
    """Move ``--workers N`` from the command line to the setting's environment variable."""
    for index, argument in enumerate(arguments):
        name, separator, value = argument.partition("=")
        if name == OPTION:
            os.environ[variable] = value if separator else "".join(arguments[index + 1 : index + 2])
            del arguments[index : index + (1 if separator else 2)]
            return


def own_place() -> tuple[int, int]:
    """Index of this worker and number of workers; (0, 1) without workers."""
    index, _, count = os.environ.get(INDEX_VARIABLE, "0/1").partition("/")
    return int(index), int(count)


def check(ports: Sequence[int]) -> None:
    """Raises:
    SystemExit: a port is 0, so that each process would get another one.
    """
    if 0 in ports:
        raise SystemExit("workers share a port: expected a port other than 0")


def supervise(n_workers: int, work: Callable[[], None], admin: Callable[[], None] | None = None) -> None:
    """Run ``work`` in several processes until SIGTERM or SIGINT, which is forwarded; return when all have ended.

    Args:
        n_workers: number of processes.
        work: of each process.
        admin: of one more process, which answers for all workers; None: there is none.
    """
    _Supervisor(n_workers, work, admin).run()


_ADMIN = -1
"""The index of the process that answers for all workers."""


class _Supervisor:
    def __init__(self, n_workers: int, work: Callable[[], None], admin: Callable[[], None] | None) -> None:
        self._n_workers = n_workers
        self._work = work
        self._admin = admin
        self._workers: dict[int, tuple[int, float]] = {}
        self._is_stopping = False

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        for index in range(self._n_workers):
            self._begin(index)
        if self._admin is not None:
            self._begin(_ADMIN)
        while self._workers:
            pid, status = os.wait()
            index, began = self._workers.pop(pid)
            if self._is_stopping:
                continue
            # A worker process, or that of the admin listener (-1), has ended unexpectedly and is restarted.
            structlog.get_logger().error("worker ended", worker=index, status=os.waitstatus_to_exitcode(status))
            time.sleep(max(0.0, began + RESTART_DELAY_S - time.monotonic()))
            if not self._is_stopping:
                self._begin(index)

    def _begin(self, index: int) -> None:
        end_with_parent = ending_with_parent()
        pid = os.fork()
        if pid:
            self._workers[pid] = (index, time.monotonic())
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        end_with_parent()
        work = self._work
        if index == _ADMIN and self._admin is not None:
            work = self._admin
        else:
            os.environ[INDEX_VARIABLE] = f"{index}/{self._n_workers}"
        try:
            work()
        except SystemExit as end:
            _exit(end.code)
        except BaseException:
            # An exception ended the worker.
            structlog.get_logger().exception("worker failed")
            _exit(1)
        _exit(0)

    def _forward(self, number: int, _: FrameType | None) -> None:
        self._is_stopping = True
        for pid in self._workers:
            os.kill(pid, number)


def _exit(code: object) -> None:
    """Exit without the first process' exit handlers."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)
