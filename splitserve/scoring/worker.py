"""``python -m splitserve.scoring.worker FD``: scores shards that come over a connection, and sends the results."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection

import msgspec
import pyarrow as pa

from splitserve.scoring.engines.local import Message, Progress
from splitserve.scoring.engines.outcomes import Failed, Finished
from splitserve.scoring.errors import ScoringError
from splitserve.scoring.shards import Shard, ShardScorer, decode_job


def main(handle: int) -> int:
    """Score until the connection closes; 1 after an error, which was sent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    pa.set_cpu_count(1)
    connection = Connection(handle)
    shards: queue.SimpleQueue[Shard] = queue.SimpleQueue()
    try:
        job = connection.recv_bytes()
    except (EOFError, OSError):  # it was started early and is not needed
        return 0
    threading.Thread(target=_receive, args=(connection, shards), daemon=True).start()

    def send(message: Message) -> None:
        connection.send_bytes(msgspec.json.encode(message))

    try:
        scorer = ShardScorer(decode_job(job))
        while True:
            send(Finished(scorer.score(shards.get(), lambda n_rows, n_errors: send(Progress(n_rows, n_errors)))))
    except ScoringError as error:
        send(Failed.of(error))
        return 1


def _receive(connection: Connection, shards: queue.SimpleQueue[Shard]) -> None:
    """Take shards as they come. When the other end is closed, the parent has ended or died: nobody waits for a result."""
    try:
        while True:
            shards.put(msgspec.json.decode(connection.recv_bytes(), type=Shard))
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
