"""Shards as Ray core tasks, on the cluster of ``RAY_ADDRESS``, or on this machine where there is none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator, Sequence

import msgspec
import ray

from splitserve.scoring.engines.outcomes import lost, result_of, score_task
from splitserve.scoring.errors import ScoringError
from splitserve.scoring.shards import OnRows, Shard, ShardResult


class RayEngine:
    """One task a shard, one CPU a task.

    A program that is connected to Ray already keeps its connection and its workers' environment.

    Args:
        n_workers: CPUs of a Ray that is started here.
    """

    def __init__(self, n_workers: int) -> None:
        self._n_workers = n_workers

    def run(self, job: bytes, shards: Sequence[Shard], on_rows: OnRows) -> Generator[ShardResult, None, None]:
        """As `Engine.run`."""
        with _connected(self._n_workers):
            task = ray.remote(num_cpus=1)(score_task)
            shared = ray.put(job)
            running = {task.remote(shared, msgspec.json.encode(shard)): shard for shard in shards}
            try:
                while running:
                    for done in ray.wait(list(running))[0]:
                        shard = running.pop(done)
                        try:
                            outcome = ray.get(done)
                        except ray.exceptions.RayError as error:
                            raise lost(job, shard, "Ray", error) from error
                        yield result_of(outcome)
            finally:
                for reference in running:
                    ray.cancel(reference, force=True)


@contextlib.contextmanager
def _connected(n_workers: int) -> Iterator[None]:
    """Raises:
    ScoringError: there is no Ray at the address.
    """
    if ray.is_initialized():
        yield
        return
    # An address is Ray's own affair; what it does not take together with one is given only without.
    here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": n_workers, "include_dashboard": False}
    try:
        # What workers print would go to this process's stdout, which has the summary.
        ray.init(log_to_driver=False, runtime_env={"env_vars": {"TZ": "UTC"}}, **here)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ScoringError(
            f"Ray cannot be reached or started (RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')}): {error}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
