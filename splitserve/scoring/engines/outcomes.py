"""What a worker says of a shard, and the function that the engines of other packages schedule."""

from __future__ import annotations

import msgspec

from splitserve.scoring import errors
from splitserve.scoring.errors import ScoringError
from splitserve.scoring.shards import Shard, ShardResult, decode_job, score_shard


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The shard is done."""

    result: ShardResult


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The shard cannot be scored."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: ScoringError) -> Failed:
        return cls(type(error).__name__, str(error))

    def error(self) -> ScoringError:
        """What was raised in the worker."""
        return _KINDS.get(self.kind, ScoringError)(self.message)


_KINDS: dict[str, type[ScoringError]] = {
    kind.__name__: kind for kind in (ScoringError, errors.WrongUsage, errors.TooManyErrors, errors.ServerGone)
}
_outcomes = msgspec.json.Decoder(Finished | Failed)


def score_task(job: bytes, shard: bytes) -> bytes:
    """Score a shard in a worker of an engine, as `score_shard`. JSON in and out: every engine carries it, errors included."""
    outcome: Finished | Failed
    try:
        outcome = Finished(score_shard(job, msgspec.json.decode(shard, type=Shard)))
    except ScoringError as error:
        outcome = Failed.of(error)
    return msgspec.json.encode(outcome)


def result_of(outcome: bytes) -> ShardResult:
    """What `score_task` has returned.

    Raises:
        ScoringError: the shard cannot be scored.
    """
    decoded: Finished | Failed = _outcomes.decode(outcome)
    if isinstance(decoded, Failed):
        raise decoded.error()
    return decoded.result


def lost(job: bytes, shard: Shard, engine: str, error: BaseException) -> ScoringError:
    """The error of a shard whose worker said nothing: it died, or the engine could not run it."""
    files = decode_job(job).files
    parts = ", ".join(f"{files[part.file].path} from row {part.first_row}" for part in shard.parts[:3])
    return ScoringError(f"{engine} could not score {parts}: {type(error).__name__}: {error}")
