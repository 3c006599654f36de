"""Scoring of record batches in a caller's own program: Spark's ``mapInArrow``, Ray's ``map_batches``, or a loop."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from splitserve.checks.examination import NOTHING_MORE, Allowed
from splitserve.scoring.answers import AnswerColumns
from splitserve.scoring.errors import ScoringError
from splitserve.scoring.inputs import bind, plain, plain_type, values_of
from splitserve.scoring.planning import ALL
from splitserve.scoring.release import LoadedRelease, Scorer, ScoringRelease, choose
from splitserve.scoring.rows import Refused, RowScorer
from splitserve.scoring.shards import READ

ERROR = "error"
"""The column that says why a row has no answer; null where it has one."""

_loaded: dict[ScoringRelease, LoadedRelease] = {}


class _NoClock:
    def add(self, stage: str, seconds: float) -> None: ...


def score_batches(
    model: str,
    batches: Iterable[pa.RecordBatch],
    *,
    repository: str | os.PathLike[str] = "./models",
    keep: Sequence[str] = (),
    map: Mapping[str, str] | None = None,
    allowed: Allowed = NOTHING_MORE,
    signature_key: str = "",
) -> Iterator[pa.RecordBatch]:
    """Score record batches in this process, which loads the release once.

    Each batch gives one of as many rows in the same order: the kept columns, the answer, and ``error``: why a row has no answer,
    which is null then. Answers that depend on the other rows of a call are those of the batch.

    Args:
        model: a name, or ``NAME@K.M`` for a pair; by default what serves requests without a version.
        batches: with a column for each input of the signature.
        repository: the model repository: a folder or a URL.
        keep: names of columns that are copied; ``["all"]`` for all.
        map: the input by the column that it is read from, where the names differ.
        allowed: what the services' settings allow.
        signature_key: a public key in PEM form: the release must be signed.

    Raises:
        ScoringError: the release cannot be loaded, or a column is missing or of another type.
    """
    release = choose(model, os.fspath(repository), allowed=allowed, signature_key=signature_key)
    return _scored(release, _loaded_release(release), batches, tuple(keep), dict(map or {}))


def batch_schema(
    model: str,
    schema: pa.Schema,
    *,
    repository: str | os.PathLike[str] = "./models",
    keep: Sequence[str] = (),
    signature_key: str = "",
) -> pa.Schema:
    """The schema of what `score_batches` gives for batches of this schema; nothing is loaded.

    Raises:
        ScoringError: there is no such release or column.
    """
    return _schema(choose(model, os.fspath(repository), signature_key=signature_key), schema, tuple(keep))


def _loaded_release(release: ScoringRelease) -> LoadedRelease:
    if release not in _loaded:
        _loaded.clear()
        _loaded[release] = LoadedRelease(release)
    return _loaded[release]


def _schema(release: ScoringRelease, schema: pa.Schema, keep: tuple[str, ...]) -> pa.Schema:
    names = schema.names if ALL in keep else list(keep)
    if absent := [name for name in names if name not in schema.names]:
        raise ScoringError(f'keep: there is no column "{absent[0]}"; there are {", ".join(schema.names)}')
    kept = [pa.field(name, plain_type(schema.field(name).type)) for name in names]
    fields = [*kept, *AnswerColumns(release).schema, pa.field(ERROR, pa.string())]
    if twice := [field.name for field in kept if field.name in {each.name for each in fields[len(kept) :]}]:
        raise ScoringError(f'"{twice[0]}" is a column of the input and of the answer; leave it out of keep')
    return pa.schema(fields)


def _scored(
    release: ScoringRelease, scorer: Scorer, batches: Iterable[pa.RecordBatch], keep: tuple[str, ...], mapping: Mapping[str, str]
) -> Iterator[pa.RecordBatch]:
    answers = AnswerColumns(release)
    for batch in batches:
        schema = _schema(release, batch.schema, keep)
        kept = schema.names[: len(schema) - len(answers.schema) - 1]
        types = dict(zip(batch.schema.names, batch.schema.types, strict=True))
        bindings = bind(release.inputs, types, mapping, where="the batch", kept=kept)
        n_rows = batch.num_rows
        columns = {name: batch.column(name) for binding in bindings for name in binding.columns}
        values, failures = values_of(release.inputs, bindings, columns, n_rows)
        refused = {place: Refused(READ, "INVALID_INPUT", why) for place, why in failures.items()}
        good = np.setdiff1d(np.arange(n_rows), list(refused))
        rows = RowScorer(scorer, _NoClock(), is_row_wise=release.is_row_wise)
        answered, more = rows.score(values, good)
        refused |= more
        place_of = np.full(n_rows, -1)
        parts = [answers.arrays(each.outputs) for each in answered]
        if answered:
            place_of[np.concatenate([each.rows for each in answered])] = np.arange(sum(len(each.rows) for each in answered))
        taken = pa.array(place_of, mask=place_of < 0)
        made = [
            pa.concat_arrays([part[number] for part in parts]).take(taken) if parts else pa.nulls(n_rows, field.type)
            for number, field in enumerate(answers.schema)
        ]
        errors = [_said(refused[place]) if place in refused else None for place in range(n_rows)] if refused else [None] * n_rows
        yield pa.RecordBatch.from_arrays(
            [*(plain(batch.column(name)) for name in kept), *made, pa.array(errors, pa.string())], schema=schema
        )


def _said(why: Refused) -> str:
    return f"{why.stage}: {why.reason}: {why.message}"
