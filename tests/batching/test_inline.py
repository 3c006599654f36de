"""Requests that are answered within an iteration of the event loop, in front of a backend that also takes long."""

from __future__ import annotations

import asyncio
from typing import Any

from splitserve.batching.batcher import Batcher
from splitserve.errors import InvalidInput, PairMismatch
from splitserve.oip.messages import InferRequest, InferResponse
from splitserve.oip.statistics import Statistics
from splitserve.tensors import Tensor
from tests.batching.test_batching import POISON, Backend, outcome, outcomes, row_request, values_of
from tests.virtual_time import run

LONG = 100
"""Rows with this value are not answered inline."""

SHORT_ANSWER = 200
"""Rows with this value are answered without rows."""


class InlineBackend(Backend):
    """As `Backend`, and answers requests of one row at once; ``inline`` keeps those."""

    def __init__(self) -> None:
        super().__init__()
        self.inline: list[tuple[int, ...]] = []

    def send_inline(self, request: InferRequest) -> InferResponse | None:
        values = values_of(request.inputs[0])
        if LONG in values:
            return None
        self.inline.append(values)
        if POISON in values:
            raise InvalidInput("the row is poisoned")
        rows = [] if SHORT_ANSWER in values else [2 * value for value in values]
        raw = b"".join(value.to_bytes(4, "little") for value in rows)
        return InferResponse("m", "1.1", (Tensor("y", "INT32", (len(rows), 1), raw),))


def batcher_on(backend: InlineBackend, **options: Any) -> Batcher:
    return Batcher(backend, send_inline=backend.send_inline, clock=asyncio.get_running_loop().time, **options)


def test_a_lone_request_is_answered_without_a_call() -> None:
    async def main() -> None:
        backend, statistics = InlineBackend(), Statistics()

        answers = [await outcome(batcher_on(backend, statistics=statistics).infer(row_request([n]))) for n in (1, 2)]

        assert answers == [(2,), (4,)]
        assert (backend.inline, backend.rows()) == ([(1,), (2,)], [])
        assert statistics.of("m", "1.1").inference_stats.success.count == 2

    run(main())


def test_what_takes_long_is_sent_as_a_call() -> None:
    async def main() -> None:
        backend = InlineBackend()

        answer = await outcome(batcher_on(backend).infer(row_request([LONG])))

        assert answer == (2 * LONG,)
        assert (backend.inline, backend.rows()) == ([], [(LONG,)])

    run(main())


def test_compatible_requests_are_merged_first() -> None:
    """Those that arrive in one iteration of the event loop share a call: it costs less than one answer after the other."""

    async def main() -> None:
        backend = InlineBackend()

        answers = await outcomes(batcher_on(backend), [row_request([1]), row_request([2])])

        assert answers == [(2,), (4,)]
        assert (backend.inline, backend.rows()) == ([], [(1, 2)])

    run(main())


def test_other_work_gets_its_turn_between_two_answers() -> None:
    """Each takes up to some milliseconds of the event loop."""

    async def main() -> None:
        backend, order = InlineBackend(), list[object]()
        batcher, loop = batcher_on(backend), asyncio.get_running_loop()

        for name in ("a", "b"):  # not compatible
            batcher.begin(
                row_request([1], name=name), lambda _, name=name: (order.append(name), loop.call_soon(order.append, "other"))
            )
        await asyncio.sleep(0.01)

        assert order == ["a", "other", "b", "other"]
        assert backend.inline == [(1,), (1,)]

    run(main())


def test_errors_reach_their_caller_and_are_counted() -> None:
    """What the backend raises, and an answer that has not as many rows as were sent."""

    async def main() -> None:
        backend, statistics = InlineBackend(), Statistics()
        batcher = batcher_on(backend, statistics=statistics)

        poisoned, short, good = [await outcome(batcher.infer(row_request([n]))) for n in (POISON, SHORT_ANSWER, 3)]

        assert isinstance(poisoned, InvalidInput)
        assert isinstance(short, PairMismatch)
        assert good == (6,)
        assert statistics.of("m", "1.1").inference_stats.fail.count == 2
        assert batcher.occupancy("m") == (0, 0)

    run(main())


def test_a_request_that_is_cancelled_before_its_turn_is_not_answered() -> None:
    async def main() -> None:
        backend, outcomes_ = InlineBackend(), list[object]()

        batcher_on(backend).begin(row_request([1]), outcomes_.append).cancel()
        await asyncio.sleep(0.01)

        assert (backend.inline, outcomes_) == ([], [])

    run(main())
