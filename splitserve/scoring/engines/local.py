"""The engine of one machine: processes that each hold the release and score one shard after the other.

Workers are started, not forked, as ``python -m splitserve.scoring.worker``, so that they do not import the caller's program. One
that dies is known by its shard; one whose parent dies ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait

import msgspec

from splitserve.scoring.engines.outcomes import Failed, Finished
from splitserve.scoring.engines.processes import StartedEarly, WorkerProcess
from splitserve.scoring.errors import ScoringError
from splitserve.scoring.shards import OnRows, Shard, ShardResult, decode_job


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Rows of the shard in hand that are done."""

    rows: int
    errors: int


Message = Progress | Finished | Failed


class LocalEngine:
    """Worker processes on this machine.

    Args:
        n_workers: how many.
        started: some that were started before; the caller ends those that are not needed.
    """

    def __init__(self, n_workers: int, started: StartedEarly | None = None) -> None:
        self._n_workers = n_workers
        self._started = started or StartedEarly(0)

    def run(self, job: bytes, shards: Sequence[Shard], on_rows: OnRows) -> Generator[ShardResult, None, None]:
        """As `Engine.run`."""
        waiting = deque(shards)
        workers = {}
        try:
            for _ in range(min(self._n_workers, len(shards))):
                worker = _Worker(self._started.take(), job)
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

    def __init__(self, process: WorkerProcess, job: bytes) -> None:
        self._process = process
        self.connection = process.connection
        self._shard: Shard | None = None
        process.send(job)

    def give(self, shard: Shard) -> None:
        """Let it score a shard."""
        self._shard = shard
        self._process.send(msgspec.json.encode(shard))

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
        self._process.end()

    def kill(self) -> None:
        """End it whatever it does."""
        self._process.kill()


_decoder = msgspec.json.Decoder(Message)
