"""Where work runs, with a clock that the work advances."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from splitserve.server.compute import INLINE_S, Compute


class Owner:
    """Blocking work that records the thread in which it ran."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def work(self, seconds: float) -> bool:
        self.now_s += seconds
        return threading.current_thread() is threading.main_thread()


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def compute(owner: Owner) -> Iterator[Compute]:
    with ThreadPoolExecutor(1) as executor:
        yield Compute(executor, clock=lambda: owner.now_s)


SHORT, LONG = INLINE_S / 10, INLINE_S * 10


async def test_unmeasured_work_runs_in_a_thread_and_short_work_in_the_loop(compute: Compute, owner: Owner) -> None:
    """The first call of a size may take long."""
    first = await compute.run(owner, 1, owner.work, SHORT)
    second = await compute.run(owner, 1, owner.work, SHORT)

    assert (first, second) == (False, True)


async def test_only_what_is_known_to_be_short_runs_inline(compute: Compute, owner: Owner) -> None:
    """The caller runs the rest in another way."""
    unmeasured = compute.run_inline(owner, 1, owner.work, SHORT)
    await compute.run(owner, 1, owner.work, SHORT)
    short, became_long = (compute.run_inline(owner, 1, owner.work, seconds) for seconds in (SHORT, LONG))

    assert (unmeasured, short, became_long) == (None, True, True)
    assert compute.run_inline(owner, 1, owner.work, SHORT) is None


async def test_durations_are_measured_by_size(compute: Compute, owner: Owner) -> None:
    """The duration for one row does not predict that for a thousand."""
    await compute.run(owner, 1, owner.work, SHORT)

    assert not await compute.run(owner, 1000, owner.work, LONG)
    assert not await compute.run(owner, 1000, owner.work, LONG)
    assert await compute.run(owner, 1, owner.work, SHORT)


async def test_work_that_becomes_slow_moves_to_a_thread(compute: Compute, owner: Owner) -> None:
    """One long call is enough."""
    await compute.run(owner, 1, owner.work, SHORT)
    await compute.run(owner, 1, owner.work, LONG)

    assert not await compute.run(owner, 1, owner.work, SHORT)


async def test_work_that_fails_is_timed_and_raises(compute: Compute, owner: Owner) -> None:
    """The caller gets the exception, from the loop as from a thread."""

    def fail() -> None:
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            await compute.run(owner, 1, fail)
