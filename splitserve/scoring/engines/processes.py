"""Worker processes of this machine, started before anything that is slow to import, so that they import it at the same time."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from types import TracebackType
from typing import Self

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

SMALLEST_SHARE = 8 * 1024**2
"""Bytes of input for each worker that is started before the shards are known."""


class WorkerProcess:
    """``python -m splitserve.scoring.worker`` and the connection to it. It imports what it needs, and waits for a job."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "splitserve.scoring.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a library prints must not mix with the caller's output
                env={**dict.fromkeys(_THREADS, "1"), **os.environ, "PYTHONPATH": _import_path(), "TZ": "UTC"},
            )
        finally:
            theirs.close()

    def send(self, data: bytes) -> None:
        """If it has ended, nothing: its connection says why."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(data)

    def wait(self) -> int:
        """Its exit status, which is negative for a signal."""
        return self._process.wait()

    def end(self) -> None:
        """No more shards."""
        self.connection.close()
        self._process.wait()

    def kill(self) -> None:
        """End it whatever it does."""
        self._process.kill()
        self.end()


class StartedEarly:
    """Worker processes that no engine has taken yet; those that none takes are ended.

    Args:
        n_workers: how many.
    """

    def __init__(self, n_workers: int) -> None:
        self._waiting: list[WorkerProcess] = []
        try:
            for _ in range(n_workers):
                self._waiting.append(WorkerProcess())
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def take(self) -> WorkerProcess:
        """One of them, or a new one."""
        return self._waiting.pop() if self._waiting else WorkerProcess()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        while self._waiting:
            self._waiting.pop().kill()


def n_of_machine(n_workers: int) -> int:
    """So many, or one a core if none are asked for."""
    return n_workers or len(os.sched_getaffinity(0))


def n_needed(path: str, n_workers: int) -> int:
    """How many workers an input surely needs, by the size of a file; of a folder, a glob or a URL, one."""
    try:
        size = Path(path).stat().st_size
    except (OSError, ValueError):
        return min(n_workers, 1) if "://" in path or any(character in path for character in "*?[") else 0
    return min(n_workers, 1 + size // SMALLEST_SHARE)


def _import_path() -> str:
    """Where this process imports from, so that workers find the same modules: the working directory only if it does, too."""
    return os.pathsep.join(dict.fromkeys(path or str(Path.cwd()) for path in sys.path))
