"""Background requests, such as jobs: they take what others leave over, in virtual time."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from splitserve.batching.admission import ACTIVE_S, BACKGROUND_PRIORITY, MOST_CREDIT, BackgroundShare, ForegroundWait
from splitserve.batching.batcher import Batcher
from splitserve.errors import Overloaded
from tests.batching.test_batching import CALL_S, Backend, batcher_on, outcome, row_request
from tests.virtual_time import run


def begin(batcher: Batcher, *values: int, name: str = "x", background: bool = True) -> asyncio.Task[Any]:
    priority = BACKGROUND_PRIORITY if background else 1
    return asyncio.create_task(outcome(batcher.infer(row_request(values, name=name), priority=priority)))


async def settled(*tasks: asyncio.Task[Any]) -> list[Any]:
    return list(await asyncio.gather(*tasks))


def test_other_requests_fill_a_batch_first() -> None:
    """However long background requests have been queued: they get the rows that are left over."""

    async def main() -> None:
        backend = Backend()
        batcher = batcher_on(backend, max_batch_size=3)
        first = begin(batcher, 0)
        await asyncio.sleep(0.01)
        jobs = [begin(batcher, value) for value in (10, 11, 12)]
        await asyncio.sleep(0.01)

        answers = await settled(*[begin(batcher, value, background=False) for value in (1, 2)])

        assert backend.rows()[:2] == [(0,), (1, 2, 10)]
        assert answers == [(2,), (4,)]
        assert await settled(first, *jobs) == [(0,), (20,), (22,), (24,)]

    run(main())


def test_other_requests_go_first_although_they_cannot_be_merged_with_those_that_wait() -> None:
    """Compatible requests take turns, but not with background ones."""

    async def main() -> None:
        backend = Backend()
        batcher = batcher_on(backend)
        tasks = [begin(batcher, 0)]
        await asyncio.sleep(0.01)
        tasks.append(begin(batcher, 10))
        await asyncio.sleep(0.01)
        tasks.append(begin(batcher, 1, name="other", background=False))

        await settled(*tasks)

        assert backend.rows() == [(0,), (1,), (10,)]

    run(main())


def test_full_batches_of_background_requests_do_not_pile_up() -> None:
    """Other requests start further calls beside full ones; background ones wait for the end of a call."""

    async def main() -> None:
        backend = Backend()
        batcher = batcher_on(backend, max_batch_size=1)

        await settled(*[begin(batcher, value) for value in range(6)])

        assert backend.n_most_at_once == 1

    run(main())


def test_another_request_is_sent_beside_a_full_batch_of_background_requests() -> None:
    """It does not wait for the end of that call."""

    async def main() -> None:
        backend = Backend()
        batcher = batcher_on(backend, max_batch_size=2)
        jobs = begin(batcher, 10, 11)
        await asyncio.sleep(CALL_S / 5)

        await settled(begin(batcher, 1, background=False))

        assert asyncio.get_running_loop().time() == pytest.approx(CALL_S / 5 + CALL_S)
        await settled(jobs)

    run(main())


def test_background_requests_do_not_count_for_the_admission_of_others() -> None:
    """The limit neither counts them nor learns from them."""

    async def main() -> None:
        backend = Backend()
        batcher = batcher_on(backend, max_queue_wait_ms=1, max_batch_size=4)
        jobs = [begin(batcher, value) for value in range(300)]  # more than the first limit
        await asyncio.sleep(0.01)
        (queue,) = batcher._queues.values()
        before = queue.admission.limit

        answer = await settled(begin(batcher, 1, background=False))
        await settled(*jobs)

        assert answer == [(2,)]
        assert queue.admission.limit >= before
        assert queue.n_background == 0

    run(main())


def test_a_queue_full_of_background_requests_has_room_for_others() -> None:
    """The newest background request is refused in its place."""

    async def main() -> None:
        backend = Backend()
        batcher = batcher_on(backend, max_queue_size=2)
        first = begin(batcher, 0)
        await asyncio.sleep(0.01)
        jobs = [begin(batcher, value) for value in (10, 11)]
        await asyncio.sleep(0.01)

        (answer,) = await settled(begin(batcher, 1, background=False))

        assert answer == (2,)
        outcomes = await settled(first, *jobs)
        assert outcomes[:2] == [(0,), (20,)]
        assert isinstance(outcomes[2], Overloaded)

    run(main())


def test_background_requests_are_refused_while_others_wait_long() -> None:
    """The jobs' worker then sends less."""

    async def main() -> None:
        backend = Backend()
        batcher = batcher_on(backend, max_batch_size=1, max_in_flight=1, max_background_wait_ms=20)
        others = [begin(batcher, value, background=False) for value in range(8)]
        await asyncio.sleep(5.5 * CALL_S)

        (refused,) = await settled(begin(batcher, 10))

        assert isinstance(refused, Overloaded)
        await settled(*others)
        await asyncio.sleep(2)
        assert await settled(begin(batcher, 10)) == [(20,)]

    run(main())


@pytest.mark.parametrize(
    ("allowed_s", "waits", "later_s", "is_long"),
    [
        (0.02, [0.5], 0.0, True),
        (0.02, [0.01] * 50, 0.0, False),
        (0.02, [0.5], 1.5, False),
        (0.0, [9.0] * 9, 0.0, False),
    ],
)
def test_the_wait_of_others_is_remembered_for_a_second(
    allowed_s: float, waits: list[float], later_s: float, is_long: bool
) -> None:
    """0 allows any wait."""
    wait = ForegroundWait(allowed_s)
    for each in waits:
        wait.learn(each, 100.0)

    assert wait.is_long(100.0 + later_s) is is_long


def test_while_others_are_active_background_requests_get_a_share_of_their_rows() -> None:
    """Half a row for each of theirs, beside them in their calls, although there is room for more."""

    async def main() -> None:
        backend = Backend()
        batcher = batcher_on(backend, max_background_wait_ms=0, background_share=0.5)
        others = [begin(batcher, 1, background=False)]
        await asyncio.sleep(0.01)
        jobs = [begin(batcher, value) for value in range(100, 140)]
        for _ in range(8):
            others += [begin(batcher, value, background=False) for value in (1, 2, 3, 4)]
            await asyncio.sleep(CALL_S)
        n_beside = sum(value >= 100 for row in backend.rows() for value in row)
        await settled(*others, *jobs)

        n_others = sum(value < 100 for row in backend.rows() for value in row)
        assert n_others == 33
        assert 8 <= n_beside <= n_others / 2
        assert all(any(value < 100 for value in row) for row in backend.rows()[:8])
        assert sorted(value for row in backend.rows() for value in row if value >= 100) == [*range(100, 140)]

    run(main())


def test_in_a_pause_of_others_background_requests_have_small_calls() -> None:
    """And large ones once the others have been away for a while."""

    async def main() -> None:
        backend = Backend()
        batcher = batcher_on(backend)
        await settled(begin(batcher, 1, background=False))
        jobs = [begin(batcher, value) for value in range(100, 400)]
        await settled(*jobs[:MOST_CREDIT])
        in_pause = [len(row) for row in backend.rows()[1:]]
        await settled(*jobs)
        await asyncio.sleep(ACTIVE_S)
        n_before = len(backend.sent)
        await settled(*[begin(batcher, value) for value in range(200)])

        assert set(in_pause) == {MOST_CREDIT}
        assert [len(row) for row in backend.rows()[n_before:]] == [200]

    run(main())


def test_background_requests_that_fit_in_no_call_of_others_are_not_starved() -> None:
    """They have other inputs; what no call of others could carry is saved up for a call of their own."""

    async def main() -> None:
        backend = Backend(call_s=0.01)
        batcher = batcher_on(backend, background_share=0.5)
        job = begin(batcher, 100, name="other")
        others: list[asyncio.Task[Any]] = []
        for _ in range(50):
            others += [begin(batcher, *range(10), background=False)]
            await asyncio.sleep(0.015)
            if job.done():
                break
        assert job.done()
        await settled(job, *others)

    run(main())


@pytest.mark.parametrize(
    ("calls", "later_s", "room"),
    [
        ([], 0.0, math.inf),  # nobody else was ever there
        ([(10, 0)], 0.0, 5.0),
        ([(10, 5)], 0.0, 0.0),
        ([(1000, 0)], 0.0, MOST_CREDIT),
        ([(10, 1000), (10, 0)], 0.0, -10 * MOST_CREDIT + 5),
        ([(10, 5)], 0.5, MOST_CREDIT),  # a pause
        ([(10, 0), (0, 3)], 0.0, 2.0),
        ([(10, 0), (0, 9)], 0.0, 0.0),
        ([(10, 1000), (0, 9)], 0.0, -10 * MOST_CREDIT),
        ([(10, 5)], 1.0, math.inf),
        ([(0, 1000)], 0.0, math.inf),  # background work alone makes nobody active
    ],
)
def test_the_room_for_background_rows(calls: list[tuple[int, int]], later_s: float, room: float) -> None:
    """By the rows of others and of background work that were sent."""
    share = BackgroundShare(0.5)
    for n_rows, n_background in calls:
        share.sent(n_rows, n_background, 100.0)

    assert share.room(100.0 + later_s, pause_s=0.5) == room


def test_a_pause_is_counted_from_the_last_answer() -> None:
    """It is as long as two calls."""

    async def main() -> None:
        batcher = batcher_on(Backend())
        await settled(begin(batcher, 1, background=False))
        await settled(begin(batcher, 100))

        assert asyncio.get_running_loop().time() == pytest.approx(CALL_S + 2 * CALL_S + CALL_S)

    run(main())


def test_another_request_does_not_wait_for_a_call_of_background_requests() -> None:
    """Full or not."""

    async def main() -> None:
        batcher = batcher_on(Backend())
        job = begin(batcher, 100)
        await asyncio.sleep(CALL_S / 5)

        await settled(begin(batcher, 1, background=False))

        assert asyncio.get_running_loop().time() == pytest.approx(CALL_S / 5 + CALL_S)
        await settled(job)

    run(main())
