"""The engine of one machine: processes that each hold the release and score one shard after the other.

Workers are started, not forked, as ``python -m splitserve.scoring.worker``, so that they do not import the caller's program. One
that dies is known by its shard; one whose parent dies ends.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import msgspec

from splitserve.scoring.engines.outcomes import Failed, Finished
from splitserve.scoring.errors import ScoringError
from splitserve.scoring.shards import OnRows, Shard, ShardResult, decode_job

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Rows of the shard in hand that are done."""

    rows: int
    errors: int


Message = Progress | Finished | Failed


class LocalEngine:
    """Worker processes on this machine.

    Args:
        n_workers: how many.
    """

    def __init__(self, n_workers: int) -> None:
        self._n_workers = n_workers

    def run(self, job: bytes, shards: Sequence[Shard], on_rows: OnRows) -> Generator[ShardResult, None, None]:
        """As `Engine.run`."""
        waiting = deque(shards)
        workers = {}
        try:
            for _ in range(min(self._n_workers, len(shards))):
                worker = _Worker(job)
                workers[worker.connection] = worker
                worker.give(waiting.popleft())
            while workers:
                for ready in wait(list(workers)):
                    assert isinstance(ready, Connection), "nothing else is waited for"
                    worker = workers[ready]
                    message = worker.receive(job)
                    if isinstance(message, Progress):
                        on_rows(message.rows, message.errors)
                    elif isinstance(message, Failed):
                        raise message.error()
                    else:
                        if waiting:
                            worker.give(waiting.popleft())
                        else:
                            del workers[ready]
                            worker.end()
                        yield message.result
        finally:
            for worker in workers.values():
                worker.kill()


class _Worker:
    """A process, and the shard that it has in hand."""

    def __init__(self, job: bytes) -> None:
        self.connection, theirs = Pipe()
        self._shard: Shard | None = None
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
        self._send(job)

    def give(self, shard: Shard) -> None:
        """Let it score a shard."""
        self._shard = shard
        self._send(msgspec.json.encode(shard))

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended: `receive` says why
            self.connection.send_bytes(data)

    def receive(self, job: bytes) -> Message:
        """Its next message.

        Raises:
            ScoringError: the process has died.
        """
        try:
            message: Message = _decoder.decode(self.connection.recv_bytes())
            return message
        except (EOFError, ConnectionResetError):
            status = self._process.wait()
            files, shard = decode_job(job).files, self._shard
            parts = ", ".join(f"{files[part.file].path} from row {part.first_row}" for part in shard.parts[:3]) if shard else ""
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            hint = "; the machine may be out of memory: use fewer --workers" if status == -9 else ""
            raise ScoringError(f"the worker that scored {parts} {how}{hint}") from None

    def end(self) -> None:
        """No more shards."""
        self.connection.close()
        self._process.wait()

    def kill(self) -> None:
        """End it whatever it does."""
        self._process.kill()
        self.end()


_decoder = msgspec.json.Decoder(Message)


def _import_path() -> str:
    """Where this process imports from, so that workers find the same modules: the working directory only if it does, too."""
    return os.pathsep.join(dict.fromkeys(path or str(Path.cwd()) for path in sys.path))
