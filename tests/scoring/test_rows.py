"""Rows answered in large calls: who fails, and in how many calls."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from splitserve.arrays import Array, to_array
from splitserve.errors import Unavailable
from splitserve.scoring import rows as scoring_rows
from splitserve.scoring.errors import ScoringError
from splitserve.scoring.inputs import InputValues, bind, values_of
from splitserve.scoring.rows import Answered, Refused, RowScorer
from tests.scoring.releases import Adding, release

N_ROWS = 1000


class NoClock:
    def add(self, stage: str, seconds: float) -> None: ...


def values(numbers: Array) -> list[InputValues]:
    columns = {"number": pa.array(numbers), "text": pa.array(["t"] * len(numbers)), "count": pa.array(np.ones(len(numbers), int))}
    specs = release().inputs
    bindings = bind(specs, {name: array.type for name, array in columns.items()}, {}, where="here")
    return values_of(specs, bindings, columns, len(numbers))[0]


def score(scorer: Adding, numbers: Array, *, is_row_wise: bool = True) -> tuple[dict[int, float], dict[int, Refused]]:
    """The sums by place, and the refused rows."""
    answered, refused = RowScorer(scorer, NoClock(), is_row_wise=is_row_wise).score(values(numbers), np.arange(len(numbers)))
    return sums(answered), refused


def sums(answered: list[Answered]) -> dict[int, float]:
    return {
        int(row): float(value)
        for each in answered
        for row, value in zip(each.rows, to_array(each.outputs[0]).ravel(), strict=True)
    }


@pytest.mark.parametrize("bad", [np.inf, np.nan, -7.0], ids=["infinite", "missing", "other"])
@pytest.mark.parametrize("places", [[0], [N_ROWS - 1], [3, 4, 500]], ids=str)
def test_exactly_the_bad_rows_fail(bad: float, places: list[int]) -> None:
    """Whatever is bad about them, and the message is that of the row alone."""
    numbers = np.arange(N_ROWS, dtype=float)
    numbers[places] = bad
    scorer = Adding(lambda found: np.isinf(found) | np.isnan(found) | (found == -7))

    found, refused = score(scorer, numbers)

    assert sorted(refused) == places
    assert set(refused.values()) == {Refused("preprocess", "INVALID_INPUT", "a number is refused")}
    assert found == {row: row + 1.0 for row in range(N_ROWS) if row not in places}


def test_large_numbers_are_not_infinite() -> None:
    """Their sum is: nothing is learnt from it."""
    scorer = Adding()

    _, refused = score(scorer, np.full(N_ROWS, 1e308))

    assert refused == {}
    assert scorer.calls == [N_ROWS]


def test_rows_like_one_that_failed_are_sent_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first call that fails, no large one does."""
    monkeypatch.setattr(scoring_rows, "CHUNK_ROWS", 100)
    numbers = np.arange(N_ROWS, dtype=float)
    numbers[50::100] = np.nan
    scorer = Adding(np.isnan)

    _, refused = score(scorer, numbers)

    assert len(refused) == 10
    assert sorted(scorer.calls) == [1] * 10 + [99] * 10 + [100]


def test_a_row_with_an_infinite_number_costs_one_small_call() -> None:
    """No large call fails, unless such rows are many."""
    numbers = np.arange(N_ROWS, dtype=float)
    numbers[7] = np.inf
    scorer = Adding()
    score(scorer, numbers)
    assert scorer.calls == [N_ROWS - 1, 1]

    taken = Adding(lambda found: np.zeros(len(found), bool))
    score(taken, np.full(N_ROWS, np.inf))
    assert taken.calls == [N_ROWS]


def test_rows_with_missing_numbers_stay_together_where_the_model_takes_them() -> None:
    """Only what was refused alone is sent alone."""
    numbers = np.arange(N_ROWS, dtype=float)
    numbers[::2] = np.nan
    scorer = Adding()

    found, refused = score(scorer, numbers)

    assert scorer.calls == [N_ROWS]
    assert not refused
    assert len(found) == N_ROWS


def test_calls_are_small_where_rows_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes limit a call as well as rows."""
    monkeypatch.setattr(scoring_rows, "CHUNK_BYTES", 2000)
    scorer = Adding()

    score(scorer, np.zeros(N_ROWS))

    assert max(scorer.calls) * 17 <= 2000
    assert sum(scorer.calls) == N_ROWS


def test_answers_that_depend_on_other_rows_are_one_call() -> None:
    """Which fails as a whole."""
    numbers = np.zeros(20_000)
    scorer = Adding()
    found, refused = score(scorer, numbers, is_row_wise=False)
    assert scorer.calls == [20_000]
    assert len(found) == 20_000

    numbers[7] = np.inf
    found, refused = score(scorer, numbers, is_row_wise=False)

    assert (len(found), len(refused)) == (0, 20_000)


def test_an_error_that_no_row_causes_ends_the_run() -> None:
    """Nothing is counted as a bad row."""

    class Gone(Adding):
        def infer(self, inputs: object, clock: object) -> list[object]:  # type: ignore[override]
            raise Unavailable("the server is gone")

    with pytest.raises(ScoringError, match="the server is gone"):
        score(Gone(), np.zeros(3))
