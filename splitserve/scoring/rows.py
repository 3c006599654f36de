"""Rows answered in large calls, so that a row that is refused fails alone.

1. A block of rows is scored in calls of at most `CHUNK_ROWS` rows and about `CHUNK_BYTES`.
2. Its rows with an infinite number, which hardly any model takes, are sent alone, if they are few. If the call of the others
   fails, those with NaN are sent alone, too; if one of these fails, such rows are from then on, without a call that fails first.
3. If the others fail still, they are halved until the rows that are refused are alone.
4. What was learnt is forgotten at the end of a shard: the calls that a shard's rows take, and so the last bits of their answers,
   depend on nothing outside of the shard.

Where answers depend on the other rows of the call, a block is one call, and fails as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from splitserve.arrays import Array
from splitserve.batching.batcher import SHARED_ERRORS
from splitserve.errors import Internal, SplitserveError
from splitserve.scoring.errors import ScoringError
from splitserve.scoring.inputs import InputValues
from splitserve.scoring.release import Clock, Scorer
from splitserve.tensors import Tensor

CHUNK_ROWS = 8192
CHUNK_BYTES = 8 * 1024**2

MAX_SHARE_ALONE = 8
"""Rows are sent alone only where they are fewer than one in so many."""

_ALONE = "row 0: "
_MESSAGE_LENGTH = 500
_MEMORY = "not enough memory for a call of {n_rows} rows"

Kind = Literal["infinite", "missing"]


class Refused(NamedTuple):
    """Why a row has no answer: the stage that refused it, the reason of the error table, and the message."""

    stage: str
    reason: str
    message: str


class Answered(NamedTuple):
    """The answers to some rows, by their places in the block."""

    rows: Array
    outputs: Sequence[Tensor]


class RowScorer:
    """Scores the rows of one shard.

    Args:
        scorer: answers rows.
        is_row_wise: whether an answer depends on its own row alone.
        clock: adds up seconds by stage.
    """

    def __init__(self, scorer: Scorer, clock: Clock, *, is_row_wise: bool) -> None:
        self._scorer = scorer
        self._clock = clock
        self._is_row_wise = is_row_wise
        self._refused_kinds: list[Kind] = ["infinite"]

    def score(self, values: Sequence[InputValues], rows: Array) -> tuple[list[Answered], dict[int, Refused]]:
        """The answers to some rows of a block, in parts of any order, and why others have none.

        Args:
            values: of each input, in the order of the signature.
            rows: places in the block, ascending.

        Raises:
            ScoringError: no row can be answered any more.
        """
        answered: list[Answered] = []
        refused: dict[int, Refused] = {}
        for part in self._calls(values, rows):
            suspects = self._are(self._refused_kinds, values, part)
            if not (self._is_row_wise and _are_few(suspects)):
                suspects[:] = False
            self._send(values, part[~suspects], answered, refused)
            for row in part[suspects]:
                self._send(values, np.array([row]), answered, refused)
        return answered, refused

    def _calls(self, values: Sequence[InputValues], rows: Array) -> Iterator[Array]:
        if not len(rows):
            return
        if not self._is_row_wise:
            yield rows
            return
        row_bytes = sum(each.row_bytes for each in values)
        most = max(min(CHUNK_ROWS, int(CHUNK_BYTES / max(row_bytes, 1))), 1)
        yield from np.array_split(rows, math.ceil(len(rows) / most))

    def _send(self, values: Sequence[InputValues], rows: Array, answered: list[Answered], refused: dict[int, Refused]) -> None:
        if not len(rows):
            return
        error = self._try(values, rows, answered)
        if error is None:
            return
        if len(rows) == 1 or not self._is_row_wise:
            why = _refused(error)
            refused.update(dict.fromkeys(rows.tolist(), why))
            return
        for kind in ("infinite", "missing"):
            suspects = self._are([kind], values, rows)
            if suspects.any() and _are_few(suspects):
                n_before = len(refused)
                for row in rows[suspects]:
                    self._send(values, np.array([row]), answered, refused)
                if len(refused) > n_before and kind not in self._refused_kinds:
                    self._refused_kinds.append(kind)
                self._send(values, rows[~suspects], answered, refused)
                return
        for half in np.array_split(rows, 2):
            self._send(values, half, answered, refused)

    def _try(self, values: Sequence[InputValues], rows: Array, answered: list[Answered]) -> Exception | None:
        """The error of a call, which one of its rows may have caused."""
        chosen = _as_slice(rows)
        tensors = [each.tensor(chosen) for each in values]
        try:
            outputs = self._scorer.infer(tensors, self._clock)
        except SHARED_ERRORS as error:
            raise ScoringError(error.message) from error
        except SplitserveError as error:
            if isinstance(error.__cause__, MemoryError):
                raise ScoringError(_MEMORY.format(n_rows=len(rows))) from error
            return error
        answered.append(Answered(rows, outputs))
        return None

    @staticmethod
    def _are(kinds: Sequence[Kind], values: Sequence[InputValues], rows: Array) -> Array:
        """Which rows have a number of one of these kinds."""
        found = np.zeros(len(rows), np.bool_)
        for each in values if kinds else ():
            numbers = each.numbers
            if numbers is not None:
                block = numbers[_as_slice(rows)].reshape(len(rows), -1)
                with np.errstate(all="ignore"):
                    if math.isfinite(block.sum()):  # then each is, and nearly always
                        continue
                for kind in kinds:
                    found |= (np.isinf(block) if kind == "infinite" else np.isnan(block)).any(axis=1)
        return found


def _as_slice(rows: Array) -> Array | slice:
    """The same rows, as a view where they are neighbours."""
    if not len(rows):
        return rows
    low, high = int(rows[0]), int(rows[-1]) + 1
    return slice(low, high) if high - low == len(rows) else rows


def _are_few(suspects: Array) -> bool:
    return bool(suspects.sum() <= max(len(suspects) // MAX_SHARE_ALONE, 1))


def _refused(error: Exception) -> Refused:
    assert isinstance(error, SplitserveError), "a scorer raises no other"
    message = error.message.removeprefix(_ALONE)
    if isinstance(error, Internal) and error.__cause__ is not None:  # the process is the user's own: nothing to hide
        message = f"{type(error.__cause__).__name__}: {error.__cause__}"
    return Refused(error.stage or "preprocess", error.reason, message[:_MESSAGE_LENGTH])
