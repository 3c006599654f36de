"""Shards as `dask.delayed` calls, on the cluster of ``DASK_SCHEDULER_ADDRESS``, or on this machine where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence

import dask
import msgspec
from distributed import Client, LocalCluster, as_completed, get_client

from splitserve.scoring.engines.outcomes import lost, result_of, score_task
from splitserve.scoring.errors import ScoringError
from splitserve.scoring.shards import OnRows, Shard, ShardResult


class DaskEngine:
    """One call a shard. A program that has a client keeps it.

    Args:
        n_workers: processes, of one thread each, of a cluster that is started here.
    """

    def __init__(self, n_workers: int) -> None:
        self._n_workers = n_workers

    def run(self, job: bytes, shards: Sequence[Shard], on_rows: OnRows) -> Generator[ShardResult, None, None]:
        """As `Engine.run`."""
        with _client(self._n_workers) as client:
            call = dask.delayed(score_task, pure=False)
            shared = dask.delayed(job)
            futures = client.compute([call(shared, msgspec.json.encode(shard)) for shard in shards])
            by_key = {future.key: shard for future, shard in zip(futures, shards, strict=True)}
            try:
                for done in as_completed(futures):
                    try:
                        outcome = done.result()
                    except Exception as error:  # the task's own, or that its worker has died
                        raise lost(job, by_key[done.key], "Dask", error) from error
                    yield result_of(outcome)
            finally:
                client.cancel(futures)


@contextlib.contextmanager
def _client(n_workers: int) -> Iterator[Client]:
    """Raises:
    ScoringError: there is no scheduler at the address.
    """
    with contextlib.suppress(ValueError):  # there is none
        yield get_client()
        return
    address = dask.config.get("scheduler-address", None)
    with contextlib.ExitStack() as stack:
        try:
            if not address:
                stack.enter_context(dask.config.set({"distributed.nanny.environ.TZ": "UTC"}))
                address = stack.enter_context(
                    LocalCluster(n_workers=n_workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=None)
                )
            client = stack.enter_context(Client(address))
        except (OSError, RuntimeError, ValueError) as error:
            raise ScoringError(f"Dask cannot be reached or started (DASK_SCHEDULER_ADDRESS={address or ''}): {error}") from error
        yield client
