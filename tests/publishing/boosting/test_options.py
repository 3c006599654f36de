"""Every objective, booster and option of the three libraries is equal, or refused with its name and what to choose instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from splitserve.publishing.boosting.options import OPTIONS, Option
from splitserve.publishing.convert import outputs_of, to_onnx
from splitserve.publishing.errors import NotConvertible
from tests.publishing.boosting.cases import CASES
from tests.publishing.boosting.hard import hard_rows

pytestmark = [pytest.mark.boosting, pytest.mark.filterwarnings("ignore")]

TOLERANCE = {np.float32: 3e-7, np.float64: 1e-14}
"""Of links, whose exponentials differ in the last places; sums and leaves are exact."""

_IDENTITIES = (
    *("reg:squarederror", "reg:absoluteerror", "rank:pairwise", "regression", "regression_l1", "lambdarank", "RMSE", "MAE"),
    *("dart, a regressor", "gblinear, a regressor"),
)
"""Objectives and boosters without a link: equal to the last bit."""

_NAMES = {"cat_features": "colour", "text_features": "colour", "embedding_features": "vector"}


def named(options: list[Option]) -> Any:
    return pytest.mark.parametrize("option", options, ids=lambda option: f"{option.library}: {option.choice}")


def test_each_row_of_the_table_has_a_case() -> None:
    """And each case is a row."""
    assert set(CASES) == {(option.library, option.choice) for option in OPTIONS}
    assert len(CASES) == len(OPTIONS)


@named([option for option in OPTIONS if option.is_equal])
def test_a_supported_option_is_equal(option: Option) -> None:
    """On hard rows: labels always, numbers to the last places, whatever the batch and the number of threads."""
    estimator, rows = CASES[option.library, option.choice]()
    hard = hard_rows(estimator, rows)
    model = to_onnx(estimator, rows.shape[1], input_name="features", precision="FP64").SerializeToString()

    found = run(model, hard)

    for answer in outputs_of(estimator):
        want = answer.expected(estimator, hard)
        have = found[answer.name].reshape(want.shape)
        if want.dtype.kind in "OUSbiu":
            assert have.tolist() == want.tolist(), answer.name
        else:
            bound = 0.0 if option.choice.partition("=")[2] in _IDENTITIES else TOLERANCE[want.dtype.type]
            assert_near(have, want, bound)
    for size, n_threads in ((1, 1), (3, 1), (64, 1), (len(hard), 2)):
        for name, part in run(model, hard[:size], n_threads).items():
            if found[name].dtype.kind == "f":
                assert_near(part, found[name][:size], TOLERANCE[np.float64])
            else:
                assert part.tolist() == found[name][:size].tolist()


def assert_near(have: np.ndarray, want: np.ndarray, bound: float) -> None:
    """Relative to the largest number, if that is above 1."""
    wide = want.astype(np.float64)
    difference = np.where(have == wide, 0.0, np.abs(have - wide))
    assert difference.max() <= bound * max(1.0, float(np.abs(wide).max()))


def run(model: bytes, rows: np.ndarray, n_threads: int = 1) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = n_threads
    session = ort.InferenceSession(model, options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"features": rows.astype(np.float64)}), strict=True))


@named([option for option in OPTIONS if not option.is_equal])
def test_another_option_is_refused(option: Option) -> None:
    """The message names the estimator or the option, and says what works."""
    estimator, rows = CASES[option.library, option.choice]()

    with pytest.raises(NotConvertible, match=r"has no ONNX form.*(use|fit|encode|MultiOutputClassifier)") as refused:
        outputs_of(estimator)
        to_onnx(estimator, rows.shape[1], input_name="features", precision="FP64")

    words = [_NAMES[option.choice]] if option.choice in _NAMES else option.choice.replace("=", " ").split()
    assert any(word in str(refused.value) for word in words)
