"""What a soak makes of what it has seen, and what the load under it takes for a wrong answer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.processes import BenchmarkError
from benchmarks.soak import Sample, SoakResults, judge
from benchmarks.steady import Reference

SECONDS = 600.0


def samples(pss_mb: Callable[[float], float], n_fds: Callable[[float], int]) -> list[Sample]:
    """One every 5 s of one stage."""
    return [Sample(at_s, {"proxy": pss_mb(at_s)}, {"proxy": n_fds(at_s)}) for at_s in np.arange(0.0, SECONDS, 5.0).tolist()]


def test_memory_allocated_during_warm_up_is_no_growth() -> None:
    """Only the second and the last third of the time are compared."""
    (verdict,) = judge(samples(lambda at_s: min(50 + at_s, 200), lambda _: 30), SECONDS)

    assert verdict.is_flat
    assert verdict.pss_mb == (200, 200)


def test_memory_that_grows_slowly_is_found() -> None:
    """1.2 MB a minute is more than is allowed, and is what is said."""
    (verdict,) = judge(samples(lambda at_s: 100 + 1.2 * at_s / 60, lambda _: 30), SECONDS)

    assert not verdict.is_flat
    assert verdict.growth_mb_per_min == pytest.approx(1.2)


def test_only_file_descriptors_that_stay_open_are_a_leak() -> None:
    """The least of each third counts: connections of a busy moment are closed again."""
    (busy,) = judge(samples(lambda _: 100, lambda at_s: 30 + 40 * (at_s % 50 == 0)), SECONDS)
    (leaking,) = judge(samples(lambda _: 100, lambda at_s: 30 + int(at_s / 40)), SECONDS)

    assert busy.is_flat
    assert not leaking.is_flat


def test_a_soak_that_is_too_short_to_judge_is_refused() -> None:
    """Three samples in each third are the least."""
    with pytest.raises(BenchmarkError, match="too short"):
        judge(samples(lambda _: 100, lambda _: 30)[:4], 20.0)


@pytest.mark.parametrize("bad", [{"wrong": 1}, {"failures": {"Unavailable: gone": 1}}, {"bad": {"/x: expected 400, got 500": 1}}])
def test_one_wrong_answer_fails_a_soak(bad: dict[str, object]) -> None:
    """So does a failed request, and a bad one that is not refused as it must be."""
    found = {
        "n_wrong": bad.get("wrong", 0),
        "failures": bad.get("failures", {}),
        "bad": {"refused with 400": 9, **bad.get("bad", {})},
    }  # type: ignore[dict-item]

    assert SoakResults(SECONDS, 50, [], [], 100, latencies_ms={}, **found).n_failed == 1  # type: ignore[arg-type]


class Pipeline:
    """Labels "a" and "b" for rows of one number, by its sign."""

    def predict(self, rows: np.ndarray) -> np.ndarray:
        return np.where(rows[:, 0] < 0, "a", "b")

    def predict_proba(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([rows[:, 0] / 2 + 0.5, 0.5 - rows[:, 0] / 2], axis=1)


def test_the_answer_of_another_row_is_a_wrong_answer() -> None:
    """Labels and probabilities are compared with those of the rows that were sent."""
    rows = np.array([[-0.5], [0.25], [0.75]])
    reference = Reference(Pipeline(), rows)
    right = {"label": np.array(["b", "b"]), "probabilities": Pipeline().predict_proba(rows[1:])}

    assert reference.difference(1, 3, right) == ""
    assert "a probability is off by 0.25" in reference.difference(1, 3, {**right, "probabilities": right["probabilities"][::-1]})
    assert "expected the labels" in reference.difference(0, 2, right)
