"""What publishing proves: an answer depends on its own row alone, is finite, and holds on other machines."""

import numpy as np
import pytest

from splitserve.arrays import from_array, to_array
from splitserve.publishing.proof import row_wise_difference, stable_rows, threads_difference, tolerances_of
from splitserve.repository.golden import scale_of
from splitserve.repository.manifest import Tolerance

ROWS = (from_array("x", np.random.default_rng(1).normal(size=(100, 3)).astype(np.float32)),)


def runs(function, name="y"):
    """What a function of the first input makes of it, as tensors."""
    return lambda inputs: [from_array(name, np.asarray(function(to_array(inputs[0]))))]


def linear(x):
    return x @ np.array([[1.0], [2.0], [3.0]], dtype=np.float32)


def with_the_mean(x):
    return x - x.mean(axis=0)


def with_what_came_before(x):
    return np.cumsum(x, axis=0)


def with_the_mean_of_a_large_call(x):
    return x - (x.mean(axis=0) if len(x) > 50 else 0)


class WithDropout:
    def __init__(self):
        self.random = np.random.default_rng(0)

    def __call__(self, x):
        return x * (self.random.random(x.shape) > 0.5)


class Learning:
    """Transforms that learn while they transform."""

    largest = np.float32(0)

    def __call__(self, x):
        self.largest = max(self.largest, np.abs(x[-1]).max())
        return x / self.largest


def with_the_first_row(x):
    return x + x[:1]


def by_place(x):
    return x + np.arange(len(x), dtype=np.float32)[:, None]


def with_a_label_by_place(x):
    return np.arange(len(x)) % 2


@pytest.mark.parametrize(
    "function",
    [
        with_the_mean,
        with_what_came_before,
        with_the_mean_of_a_large_call,
        WithDropout(),
        Learning(),
        with_the_first_row,
        by_place,
        with_a_label_by_place,
    ],
)
def test_an_answer_that_depends_on_other_rows_or_on_chance_is_found(function):
    assert 'output "y" of row' in row_wise_difference(runs(function), ROWS)


def test_an_answer_of_another_number_of_rows_is_found():
    assert "has shape [1] for 100 rows" in row_wise_difference(runs(lambda x: x.sum(axis=1)[:1]), ROWS)


@pytest.mark.parametrize("function", [linear, lambda x: x > 0, lambda x: np.where(x > 0, np.nan, x), lambda x: np.tanh(x) * 1e9])
def test_an_answer_of_its_row_alone_passes(function):
    """NaN agrees with NaN, and rounding is measured by the scale of the output."""
    assert row_wise_difference(runs(function), ROWS) == ""


def test_rounding_passes_and_more_does_not():
    def shifted(by):
        return runs(lambda x: linear(x) + (np.float32(by) if len(x) == 1 else 0))

    scale = scale_of(linear(to_array(ROWS[0])))
    assert row_wise_difference(shifted(0.5e-5 * scale), ROWS) == ""
    assert row_wise_difference(shifted(5e-5 * scale), ROWS) != ""


def scored(gap):
    """A label that depends on the number of rows, with two scores that differ by ``gap``, in a sign that depends on it, too."""

    def run(inputs):
        n_rows = len(to_array(inputs[0]))
        side = gap if n_rows == 1 else -gap
        scores = np.full((n_rows, 2), 0.5, dtype=np.float32) + np.array([side, -side], dtype=np.float32)
        return [from_array("scores", scores), from_array("label", np.full(n_rows, n_rows == 1, dtype=np.int64))]

    return run


def test_a_label_may_differ_where_rounding_decides_it():
    assert row_wise_difference(scored(1e-6), ROWS) == ""


def test_a_label_of_equal_scores_is_the_same_alone_and_merged():
    assert 'output "label"' in row_wise_difference(scored(0.0), ROWS)


def test_a_label_that_depends_on_threads_is_found():
    def several(inputs):
        scores, label = scored(0.0)(inputs)
        return [scores, from_array("label", 1 - to_array(label))]

    assert 'output "label" of row 0 with several threads' in threads_difference(scored(0.0), several, ROWS)
    assert threads_difference(scored(0.0), scored(0.0), ROWS) == ""


def test_a_label_may_not_differ_where_scores_are_clear():
    def run(inputs):
        x = to_array(inputs[0])
        scores = np.tile(np.array([[0.2, 0.8]], dtype=np.float32), (len(x), 1))
        return [from_array("scores", scores), from_array("label", np.full(len(x), len(x) == 1, dtype=np.int64))]

    assert 'output "label"' in row_wise_difference(run, ROWS)


def test_tolerances_are_the_bound_of_the_datatype_times_the_scale():
    outputs = [
        from_array("single", np.array([1.0, -200.0], dtype=np.float32)),
        from_array("double", np.array([0.0, np.nan])),
        from_array("label", np.array([1, 2])),
    ]

    assert tolerances_of(outputs) == {"single": Tolerance(0.0, 1e-5 * 200), "double": Tolerance(0.0, 1e-12)}


def test_rows_next_to_a_threshold_are_not_golden_rows():
    x = np.array([[0.1], [0.5], [np.nextafter(np.float32(0.5), np.float32(1))], [0.9]], dtype=np.float32)

    assert stable_rows(runs(lambda x: x[:, 0] > 0.5), (from_array("x", x),), {}) == [0, 3]


def test_each_number_is_moved_separately():
    """All numbers moved together may cancel out."""
    x = np.array([[0.5, 0.5], [0.2, 0.9]], dtype=np.float32)

    assert stable_rows(runs(lambda x: x[:, 0] - x[:, 1] >= 0), (from_array("x", x),), {}) == [1]


def test_missing_numbers_and_text_are_not_moved():
    x = np.array([[np.nan], [1.0]], dtype=np.float64)

    assert stable_rows(runs(np.isnan), (from_array("x", x),), {}) == [0, 1]
    assert stable_rows(runs(lambda x: x == b"a"), (from_array("x", np.array(["a", "b"], dtype=object)),), {}) == [0, 1]


def test_a_row_whose_neighbour_is_refused_is_not_a_golden_row():
    def strict(x):
        if (x > 1).any():
            raise ValueError("too large")
        return x

    x = np.array([[0.5], [1.0]], dtype=np.float32)

    assert stable_rows(runs(strict), (from_array("x", x),), {"y": Tolerance(0.0, 1e-5)}) == [0]
