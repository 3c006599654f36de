"""How many requests are admitted: the limit alone, and at a batcher in virtual time, below and far above its capacity."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.batching.admission import FIRST_LIMIT, LEAST_LIMIT, AdaptiveLimit, Preemptible
from splitserve.batching.batcher import Batcher
from splitserve.batching.queue import BatchLimits
from splitserve.errors import DeadlineExceeded, Overloaded, SplitserveError
from splitserve.oip.messages import InferRequest, InferResponse
from splitserve.tensors import Tensor
from tests.virtual_time import run

ALLOWED_S = 1.0


class Stage:
    """Answers after ``call_s`` and ``row_s`` for each row, on so many cores: more calls than those wait for one."""

    def __init__(self, call_s: float, row_s: float = 0.0, n_cores: int = 1) -> None:
        self.call_s, self.row_s = call_s, row_s
        self.error: SplitserveError | None = None
        self.rows: list[bytes] = []
        self._cores = asyncio.Semaphore(n_cores)

    async def __call__(self, request: InferRequest) -> InferResponse:
        self.rows.append(request.inputs[0].raw)
        async with self._cores:
            await asyncio.sleep(self.call_s + self.row_s * request.n_rows)
        if self.error is not None:
            raise self.error
        return InferResponse("m", "1", request.inputs)


class Load:
    """Callers of a batcher, and how each request ended, when and after how long."""

    def __init__(self, stage: Stage, **limits: Any) -> None:
        self._now = asyncio.get_running_loop().time
        self.batcher = Batcher(stage, BatchLimits(**{"max_queue_wait_ms": 1000 * ALLOWED_S, **limits}), clock=self._now)
        self.answered: list[tuple[float, float]] = []
        self.refused: list[tuple[float, float]] = []
        self.expired = 0

    async def infer(self, caller: int, timeout_s: float = 1e6, **options: Any) -> SplitserveError | None:
        began = self._now()
        row = (Tensor("x", "INT8", (1,), bytes([caller % 256])),)
        try:
            await self.batcher.infer(InferRequest("m", row, deadline=began + timeout_s, caller=caller), **options)
            self.answered.append((self._now(), self._now() - began))
        except Overloaded as error:
            self.refused.append((self._now(), self._now() - began))
            return error
        except DeadlineExceeded as error:
            self.expired += 1
            return error
        return None

    async def closed(self, n_callers: int, seconds: float) -> None:
        """Each asks again when it has its answer."""
        end = self._now() + seconds

        async def call(caller: int) -> None:
            while self._now() < end:
                await self.infer(caller)
                await asyncio.sleep(0.001)

        await asyncio.gather(*map(call, range(n_callers)))

    async def open(self, rate: float, seconds: float) -> None:
        """They come when they come."""
        begin = self._now()
        chance, due, calls = random.Random(0), 0.0, []
        while (due := due + chance.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, begin + due - self._now()))
            calls.append(asyncio.ensure_future(self.infer(len(calls))))
        await asyncio.gather(*calls)


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


STAGES = {
    "fast": (0.01, 0.0002, 1, {}),
    "one row at a time": (0.02, 0.0, 1, {"max_batch_size": 1, "max_in_flight": 1}),
    "calls that cost": (0.05, 0.0, 1, {}),
    "slow rows": (0.0, 0.05, 1, {}),
    "slow rows on two cores": (0.01, 0.015, 2, {}),
    "a second for each": (1.0, 0.0, 1, {"max_batch_size": 1, "max_in_flight": 1}),
}
MANY = dict.fromkeys(("fast", "calls that cost"), pytest.mark.heavy)
"""Thousands of requests, even in virtual time."""


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=MANY.get(kind, ())) for kind in STAGES])
def test_at_three_times_the_capacity_throughput_does_not_drop(kind: str) -> None:
    """Nine tenths of the peak at least, refusals are immediate, and the wait of admitted requests is bounded."""
    call_s, row_s, n_cores, limits = STAGES[kind]
    seconds = max(6.0, 400 * row_s, 40 * call_s)

    async def peak() -> float:
        load = Load(Stage(call_s, row_s, n_cores), **{**limits, "max_queue_wait_ms": 0})
        await load.closed(64, seconds)
        return len(load.answered) / load.answered[-1][0]

    async def overload(rate: float) -> Load:
        load = Load(Stage(call_s, row_s, n_cores), **limits)
        await load.open(3 * rate, seconds)
        return load

    capacity = run(peak())
    load = run(overload(capacity))

    goodput = sum(at < seconds for at, _ in load.answered) / seconds
    settled = [latency for at, latency in load.answered if at > seconds / 2]
    assert goodput >= 0.9 * capacity
    assert load.refused
    assert max(latency for _, latency in load.refused) == 0
    assert quantile(settled, 0.99) <= 3 * max(ALLOWED_S, 4 * (call_s + row_s))
    assert load.expired == 0


@pytest.mark.parametrize("n_callers", [1, 64, 256])
@pytest.mark.parametrize("kind", ["fast", "calls that cost"])
def test_requests_that_wait_to_be_merged_are_not_refused(kind: str, n_callers: int) -> None:
    """A few hundred callers that ask again and again queue up for each call, and that is no overload."""
    call_s, row_s, n_cores, limits = STAGES[kind]

    async def main() -> None:
        load = Load(Stage(call_s, row_s, n_cores), **limits)

        await load.closed(n_callers, 2)

        assert load.answered
        assert not load.refused

    run(main())


def test_a_stage_that_recovers_is_used_again() -> None:
    """Slow for a while, then fast: refused requests are accepted again, and soon all of them."""

    async def main() -> None:
        stage = Stage(0.5)
        load = Load(stage, max_batch_size=4, max_in_flight=1)
        await load.open(50, 30)
        assert load.refused
        stage.call_s = 0.001
        await load.closed(64, 2)
        load.refused.clear()

        await load.closed(64, 2)

        assert not load.refused

    run(main())


def test_without_a_maximum_wait_there_is_no_adaptive_limit() -> None:
    """``max_queue_wait_ms`` 0: requests wait without limit while the queue has room."""

    async def main() -> None:
        load = Load(Stage(1.0), max_queue_wait_ms=0, max_batch_size=1, max_in_flight=1)

        await asyncio.gather(*(load.infer(n) for n in range(600)))

        assert (len(load.answered), load.refused) == (600, [])

    run(main())


def test_a_request_that_would_miss_its_deadline_is_refused_at_once() -> None:
    """A request that would be sent only after its deadline is refused at once, while it can still go elsewhere."""

    async def main() -> None:
        load = Load(Stage(0.1), max_batch_size=1, max_in_flight=1)
        flood = asyncio.ensure_future(load.open(9.9, 60))
        await asyncio.sleep(30)
        waiting, _ = load.batcher.occupancy("m")
        assert waiting > 2
        n_refused = len(load.refused)

        await load.infer(-1, timeout_s=0.15)

        assert len(load.refused) == n_refused + 1
        assert load.refused[-1][1] == 0
        await load.infer(-2, timeout_s=5)
        assert len(load.refused) == n_refused + 1
        await flood

    run(main())


def test_refusals_by_the_next_stage_lower_the_limit() -> None:
    """A later stage that reports overload gets fewer requests."""

    async def main() -> float:
        stage = Stage(0.001)
        stage.error = Overloaded("full", stage="predict")
        load = Load(stage)
        for _ in range(20):
            await load.infer(0)
        queue = next(iter(load.batcher._queues.values()))
        return queue.admission.limit

    assert run(main()) == pytest.approx(FIRST_LIMIT * 0.9**20)


def test_the_lowest_priority_is_refused_first() -> None:
    """A waiting request is refused in favour of one of higher priority: the last of the lowest first. Equal priorities keep
    their place."""

    async def main() -> None:
        load = Load(Stage(1.0), max_batch_size=1, max_in_flight=1, max_queue_size=3)
        refused: list[str] = []

        async def infer(name: str, priority: int) -> None:
            if await load.infer(0, priority=priority):
                refused.append(name)

        calls = []
        wishes = [("first", 1), ("a", 2), ("b", 3), ("c", 3), ("urgent", 1), ("middle", 2), ("late", 3), ("more", 1)]
        for name, priority in wishes:
            calls.append(asyncio.ensure_future(infer(name, priority)))
            await asyncio.sleep(0.01)
        await asyncio.gather(*calls)

        assert refused == ["c", "b", "late", "middle"]
        assert len(load.answered) == 4

    run(main())


@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0, 3)), min_size=1, max_size=40), st.integers(1, 4))
def test_no_request_is_refused_while_one_of_lower_priority_waits(arrivals: list[tuple[int, float]], queue_size: int) -> None:
    """For any order of arrival: when a request is refused, all waiting ones have at least its priority."""

    async def main() -> None:
        stage = Stage(0.5)
        load = Load(stage, max_batch_size=1, max_in_flight=1, max_queue_size=queue_size)

        async def infer(priority: int, at: float) -> None:
            await asyncio.sleep(at)
            error = await load.infer(0, priority=priority)
            if error and "higher priority" not in error.message:
                waiting = [queued.priority for queued in load.batcher._requests if queued.is_queued]
                assert all(other <= priority for other in waiting)

        await asyncio.gather(*(infer(*each) for each in arrivals))

        assert len(load.answered) + len(load.refused) == len(arrivals)
        assert load.batcher.occupancy("m") == (0, 0)
        assert len(stage.rows) == len(load.answered)

    run(main())


# The limit alone.


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 100), st.floats(0, 100), st.floats(0, 1)), max_size=200))
def test_the_limit_is_bounded_by_the_observed_occupancy(samples: list[tuple[int, float, float, float]]) -> None:
    """Never below what keeps a stage busy, and never above a multiple of the observed occupancy."""
    limit = AdaptiveLimit(ALLOWED_S)

    for n_found, wait_s, call_s, share in samples:
        limit.learn(n_found, wait_s, call_s, call_s * share)

    most = max([n_found for n_found, *_ in samples], default=1)
    assert LEAST_LIMIT <= limit.limit <= max(FIRST_LIMIT, 3 * most)


@given(st.floats(0.5, 1000))
def test_the_limit_is_what_can_be_answered_within_the_maximum_wait(rate: float) -> None:
    """By Little's law: the answers per second times the allowed wait."""
    limit = AdaptiveLimit(ALLOWED_S)
    alone_s = 1 / rate

    for _ in range(300):
        n_found = int(limit.limit) + 1
        limit.learn(n_found, (n_found - 1) / rate, alone_s, alone_s)

    answered = rate * (alone_s + max(ALLOWED_S, 4 * alone_s))
    assert limit.limit == pytest.approx(max(answered, LEAST_LIMIT), rel=0.5, abs=4)


def test_a_limit_that_is_not_used_is_kept() -> None:
    """Measurements with one caller say nothing about the capacity."""
    limit = AdaptiveLimit(ALLOWED_S)

    for _ in range(100):
        limit.learn(1, 0.0, 5.0, 5.0)

    assert limit.limit == FIRST_LIMIT


def test_one_slow_call_lowers_the_limit_only_a_little() -> None:
    """A pause of the machine is no overload."""
    limit = AdaptiveLimit(ALLOWED_S)
    limit.learn(256, 0.01, 0.01, 0.01)
    before = limit.limit

    limit.learn(256, 5.0, 0.01, 0.01)

    assert limit.limit >= 0.8 * before


def test_the_lowest_priority_is_found() -> None:
    """The lowest priority, and of those who have it the last."""
    waiting: Preemptible[str] = Preemptible()
    for name, priority in (("a", 2), ("b", 9), ("c", 9)):
        waiting.add(name, priority)

    assert (waiting.lowest(below=1), waiting.lowest(below=9)) == ("c", None)
    waiting.remove("c", 9)
    waiting.remove("b", 9)
    assert (waiting.lowest(below=1), waiting.lowest(below=2)) == ("a", None)
