"""An engine in the process of a test."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing

from splitserve.scoring.release import Scorer
from splitserve.scoring.shards import OnRows, Shard, ShardResult, ShardScorer, decode_job


class Here:
    """Scores shards one after the other, in any order; the scorer may be a fake."""

    def __init__(
        self, scorer: Scorer | None = None, *, reverse: bool = False, watch: Callable[[int], None] | None = None
    ) -> None:
        self._scorer = scorer
        self._watch = watch
        self._reverse = reverse
        self.done: list[int] = []

    def run(self, job: bytes, shards: Sequence[Shard], on_rows: OnRows) -> Generator[ShardResult, None, None]:
        scorer = ShardScorer(decode_job(job), self._scorer)
        with closing(scorer):
            for shard in reversed(shards) if self._reverse else shards:
                self.done.append(shard.number)
                yield scorer.score(shard, self._told(on_rows))

    def _told(self, on_rows: OnRows) -> OnRows:
        """Tells ``watch``, too, how many rows each block has."""

        def tell(n_rows: int, n_errors: int) -> None:
            on_rows(n_rows, n_errors)
            if self._watch is not None:
                self._watch(n_rows)

        return tell
