"""What a run has done, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from splitserve.scoring.progress import duration
from splitserve.scoring.release import ScoringRelease
from splitserve.scoring.shards import ShardResult


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a run: ``rows`` is ``scored`` and ``errors`` together.

    ``reasons`` counts errors by stage and reason, ``stage_seconds`` adds up what the workers took, ``exit_status`` is that of the
    command. ``errors_file`` is empty if there are no errors. ``unused_columns`` are in the input and neither read nor kept,
    ``skipped_files`` in its folder and not read.
    """

    model: str
    pair: str
    release: str
    release_sha256: str
    rows: int
    scored: int
    errors: int
    reasons: dict[str, int]
    first_error: str
    seconds: float
    stage_seconds: dict[str, float]
    shards: int
    resumed_shards: int
    output: str
    errors_file: str
    unused_columns: tuple[str, ...] = ()
    skipped_files: tuple[str, ...] = ()
    exit_status: int = 0

    def __str__(self) -> str:
        speed = f", {self.rows / self.seconds:.0f} rows/s" if self.seconds > 0 else ""
        lines = [
            f"{self.output}: {self.scored} rows scored by {self.model} {self.pair} ({self.release}) in "
            f"{duration(self.seconds)}{speed}",
            f"rows in {self.rows} = rows out {self.scored} + errors {self.errors}",
        ]
        if self.errors:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.reasons.items()))
            lines += [f"errors in {self.errors_file}: {reasons}", f"the first: {self.first_error}"]
        if self.resumed_shards:
            lines.append(f"{self.resumed_shards} of {self.shards} shards were finished before")
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.stage_seconds.items())
        lines.append(f"time of all workers by stage: {stages}" if stages else "nothing was left to do")
        if self.unused_columns:
            lines.append(f"columns not used: {_some(self.unused_columns)}")
        if self.skipped_files:
            lines.append(f"files left out: {_some(self.skipped_files)}")
        return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def summed(
    release: ScoringRelease,
    results: Iterable[ShardResult],
    *,
    seconds: float,
    resumed_shards: int,
    output: str,
    errors_file: str,
    unused_columns: Sequence[str],
    skipped_files: Sequence[str],
    fresh: Sequence[ShardResult],
) -> Summary:
    """The summary of all shards.

    Args:
        release: that scored.
        results: of all shards, by number.
        seconds: that this process took.
        resumed_shards: how many an earlier process had finished.
        output: where the answers are.
        errors_file: where the errors are.
        unused_columns: that were known before.
        skipped_files: of the input's folder.
        fresh: results of this process, whose stages count.
    """
    reasons: dict[str, int] = {}
    stages: dict[str, float] = {}
    unused = dict.fromkeys(unused_columns)
    rows = scored = errors = shards = 0
    first_error = ""
    for result in results:
        shards += 1
        rows, scored, errors = rows + result.rows, scored + result.scored, errors + result.errors
        first_error = first_error or result.first_error
        for reason, count in result.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
        unused.update(dict.fromkeys(name for name in result.unknown_columns if name not in release.ignored))
    for result in fresh:
        for stage, spent in result.seconds.items():
            stages[stage] = round(stages.get(stage, 0.0) + spent, 6)
    return Summary(
        model=release.model,
        pair=release.pair,
        release=release.name,
        release_sha256=release.sha256,
        rows=rows,
        scored=scored,
        errors=errors,
        reasons=reasons,
        first_error=first_error,
        seconds=round(seconds, 3),
        stage_seconds=stages,
        shards=shards,
        resumed_shards=resumed_shards,
        output=output,
        errors_file=errors_file if errors else "",
        unused_columns=tuple(unused),
        skipped_files=tuple(skipped_files),
    )
