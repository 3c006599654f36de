"""A dry run: everything is checked, nothing is written, and some rows are scored to see how long the rest would take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import msgspec

from splitserve.scoring.progress import duration
from splitserve.scoring.runs import Plan, ScoringOptions, n_workers
from splitserve.scoring.shards import ShardScorer


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a run would do. ``rows`` is None where only reading tells, and then so is ``seconds``."""

    model: str
    pair: str
    release: str
    input_format: str
    output_format: str
    output: str
    files: int
    shards: int
    rows: int | None
    inputs: dict[str, str]
    columns: list[str]
    unused_columns: Sequence[str]
    skipped_files: Sequence[str]
    sampled_rows: int
    sampled_errors: int
    rows_per_second: float
    seconds: float | None

    def __str__(self) -> str:
        rows = "an unknown number of" if self.rows is None else str(self.rows)
        lines = [
            f"{self.release}: {rows} rows of {self.input_format} in {self.files} files, {self.shards} shards",
            f"to {self.output} ({self.output_format}): {', '.join(self.columns)}",
            f"inputs: {', '.join(f'{name} from {column}' for name, column in self.inputs.items())}",
            f"{self.sampled_rows} rows were tried, {self.sampled_errors} of them bad: {self.rows_per_second:.0f} rows/s"
            + ("" if self.seconds is None else f", about {duration(self.seconds)}"),
        ]
        if self.unused_columns:
            lines.append(f"columns not used: {', '.join(self.unused_columns)}")
        if self.skipped_files:
            lines.append(f"files left out: {', '.join(self.skipped_files)}")
        return "\n".join(lines)


def dry_run(planned: Plan, options: ScoringOptions) -> Estimate:
    """Load the release, score the first rows, and scale up.

    Raises:
        ScoringError: the release or the first rows cannot be used.
    """
    job = planned.job
    scorer = ShardScorer(job)
    n_rows = n_errors = 0
    began = time.perf_counter()
    if planned.shards:
        with contextlib.closing(scorer):
            n_rows, n_errors = scorer.try_first(planned.shards[0])
    speed = n_rows / max(time.perf_counter() - began, 1e-9) * max(min(n_workers(options), len(planned.shards)), 1)
    total = planned.n_rows if planned.n_rows is None else round(planned.n_rows * options.sample)
    bindings = job.files[0].bindings if job.files else ()
    return Estimate(
        model=job.release.model,
        pair=job.release.pair,
        release=job.release.name,
        input_format=job.input_format,
        output_format=job.output_format,
        output=planned.output.path,
        files=len(job.files),
        shards=len(planned.shards),
        rows=total,
        inputs={binding.input: ", ".join(binding.columns) for binding in bindings},
        columns=job.schema.names,
        unused_columns=planned.unused_columns,
        skipped_files=planned.skipped_files,
        sampled_rows=n_rows,
        sampled_errors=n_errors,
        rows_per_second=round(speed, 1),
        seconds=None if total is None or not n_rows else round(total / speed, 1),
    )
