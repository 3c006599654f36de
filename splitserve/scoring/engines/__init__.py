"""Where shards are scored. An engine schedules `splitserve.scoring.shards.score_shard` and nothing else."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from splitserve.scoring.shards import OnRows, Shard, ShardResult


class Engine(Protocol):
    """Runs shards somewhere, in any order."""

    def run(self, job: bytes, shards: Sequence[Shard], on_rows: OnRows) -> Generator[ShardResult, None, None]:
        """The result of each shard as it finishes. Closing the iterator ends what still runs.

        Args:
            job: a `ScoringJob` as JSON.
            shards: those to be done.
            on_rows: told of rows of shards that are not finished yet, where the engine knows.

        Raises:
            ScoringError: a shard cannot be scored; the message names its file.
        """
        ...
