"""Batch scoring as a function; the command is in `splitserve.cli`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from splitserve.checks.examination import NOTHING_MORE, Allowed
from splitserve.scoring.runs import DEFAULT_MAX_ERRORS, ScoringOptions, plan, run
from splitserve.scoring.summary import Summary


def score(
    model: str,
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    repository: str | os.PathLike[str] = "./models",
    map: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    to: str = "",
    limit: int | None = None,
    sample: float = 1.0,
    max_errors: int | str = DEFAULT_MAX_ERRORS,
    encoding: str = "utf-8",
    delimiter: str = "",
    engine: str = "local",
    url: str = "",
    workers: int = 0,
    resume: bool = True,
    overwrite: bool = False,
    escape_formulas: bool = False,
    allowed: Allowed = NOTHING_MORE,
    signature_key: str = "",
    progress: bool = False,
) -> Summary:
    """Score a file, a folder or a glob, as the command ``splitserve batch`` does.

    Args:
        model: a name, or ``NAME@K.M`` for a pair; by default what serves requests without a version.
        input: Parquet, CSV, JSON lines, Arrow IPC, or a folder of them or of pictures; a path or a URL of fsspec.
        output: a file, if it has a suffix, else a folder.
        repository: the model repository: a folder or a URL.
        map: the input by the column that it is read from, where the names differ.
        keep: names of columns that are copied to the output; ``["all"]`` for all.
        to: the format of a folder's files: parquet, csv, jsonl or arrow; that of the input by default.
        limit: score the first rows only.
        sample: score this share of the rows.
        max_errors: rows that may fail: a number, or a percentage like ``"1%"``.
        encoding: of text.
        delimiter: between the cells of CSV: a comma by default, a tab in ``.tsv``.
        engine: where shards are scored: local, or ray, spark or dask: a session of theirs that the program has is used.
        url: of a running system that answers, in place of a release that is loaded here from the repository.
        workers: processes; 0 for one a core.
        resume: go on with an equal run that has begun in the output.
        overwrite: replace the output of another run.
        escape_formulas: in CSV, write a quote before text that a spreadsheet would run.
        allowed: what the services' settings allow.
        signature_key: a public key in PEM form: the release must be signed.
        progress: show it on stderr.

    Returns:
        Counts, and ``exit_status``: 3 if all rows, or more than ``max_errors``, have failed.

    Raises:
        TooManyErrors: more than ``max_errors`` rows have failed before the end.
        ScoringError: the input, the release or the output cannot be used; the message names it.
    """
    options = ScoringOptions(
        repository=os.fspath(repository),
        mapping=dict(map or {}),
        keep=tuple(keep),
        to=to,
        encoding=encoding,
        delimiter=delimiter,
        limit=limit,
        sample=sample,
        max_errors=str(max_errors),
        engine=engine,
        url=url,
        workers=workers,
        resume=resume,
        overwrite=overwrite,
        escape_formulas=escape_formulas,
        allowed=allowed,
        signature_key=signature_key,
    )
    planned = plan(model, os.fspath(input), os.fspath(output), options)
    return run(planned, options, shows_progress=progress)
