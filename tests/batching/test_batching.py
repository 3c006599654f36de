"""Natural batching, in virtual time, in front of a backend that delays, fails, answers short and answers long."""

from __future__ import annotations

import asyncio
import gc
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.batching.batcher import Batcher
from splitserve.batching.merging import merge, split
from splitserve.batching.queue import ADAPTIVE_IN_FLIGHT, OVERDUE_S, SLOW_ROW_S, BatchLimits, RowCost
from splitserve.errors import DeadlineExceeded, InvalidInput, Overloaded, PairMismatch, SplitserveError, Unavailable
from splitserve.oip.messages import NO_DEADLINE, InferRequest, InferResponse, RequestedOutput
from splitserve.oip.statistics import Statistics
from splitserve.tensors import Tensor, encode_bytes
from tests.budgets import examples
from tests.virtual_time import run

POISON = -1
CALL_S = 0.05


def row_request(
    values: Sequence[int], *, caller: int = 0, deadline: float = NO_DEADLINE, name: str = "x", **fields: Any
) -> InferRequest:
    """A request of one INT32 row for each value."""
    raw = struct.pack(f"<{len(values)}i", *values)
    return InferRequest(
        "m", (Tensor(name, "INT32", (len(values), 1), raw),), version="1.1", deadline=deadline, caller=caller, **fields
    )


def values_of(tensor: Tensor) -> tuple[int, ...]:
    return struct.unpack(f"<{len(tensor.raw) // 4}i", tensor.raw)


class Backend:
    """Answers every row with its double, after a while; refuses calls with a poisoned row.

    ``sent`` keeps the requests; ``misbehave`` may change an answer or raise, by the number of the call.
    """

    def __init__(
        self, misbehave: Callable[[int, InferResponse], InferResponse] = lambda _, answer: answer, *, call_s: float = CALL_S
    ) -> None:
        self.sent: list[InferRequest] = []
        self.n_at_once = self.n_most_at_once = 0
        self._misbehave = misbehave
        self._call_s = call_s

    async def __call__(self, request: InferRequest) -> InferResponse:
        number = len(self.sent)
        self.sent.append(request)
        self.n_at_once += 1
        self.n_most_at_once = max(self.n_at_once, self.n_most_at_once)
        try:
            await asyncio.sleep(self._call_s)
        finally:
            self.n_at_once -= 1
        values = values_of(request.inputs[0])
        if POISON in values:
            raise InvalidInput(f"row {values.index(POISON)} is poisoned")
        doubles = tuple(2 * value for value in values)
        outputs = (
            Tensor("y", "INT32", (len(values), 1), struct.pack(f"<{len(values)}i", *doubles)),
            Tensor("text", "BYTES", (len(values),), encode_bytes([str(value).encode() for value in doubles])),
        )
        return self._misbehave(number, InferResponse("m", "1.1", outputs))

    def rows(self) -> list[tuple[int, ...]]:
        """The values of each call."""
        return [values_of(request.inputs[0]) for request in self.sent]


def batcher_on(backend: Callable[[InferRequest], Awaitable[InferResponse]], **limits: Any) -> Batcher:
    n_backends = limits.pop("n_backends", lambda: 1)
    return Batcher(backend, BatchLimits(**limits), n_backends=n_backends, clock=asyncio.get_running_loop().time)


async def outcome(answer: Awaitable[InferResponse]) -> Any:
    """The doubles of an answer, or the error."""
    try:
        return values_of((await answer).outputs[0])
    except (SplitserveError, asyncio.CancelledError) as error:
        return error


async def outcomes(batcher: Batcher, requests: Sequence[InferRequest]) -> list[Any]:
    return list(await asyncio.gather(*(outcome(batcher.infer(request)) for request in requests)))


def test_no_request_waits_for_a_timer() -> None:
    """A request that finds no call in flight is sent at once."""

    async def main() -> None:
        backend = Backend(call_s=0)

        await outcomes(batcher_on(backend), [row_request([1])])

        assert backend.rows() == [(1,)]
        assert asyncio.get_running_loop().time() == 0

    run(main())


def test_requests_that_arrive_during_a_call_are_merged_into_the_next() -> None:
    """While a call is in flight others wait, and are merged into the next call; each gets its own rows."""

    async def main() -> None:
        backend = Backend()
        batcher = batcher_on(backend)
        first = asyncio.create_task(outcome(batcher.infer(row_request([1]))))
        await asyncio.sleep(0.02)

        others = await outcomes(batcher, [row_request([2, 3]), row_request([4])])

        assert backend.rows() == [(1,), (2, 3, 4)]
        assert (await first, *others) == ((2,), (4, 6), (8,))

    run(main())


def test_the_answer_keeps_each_callers_id() -> None:
    """Merged or not, an answer has the id of its request."""

    async def main() -> None:
        batcher = batcher_on(Backend())

        answers = await asyncio.gather(*(batcher.infer(row_request([n], id=f"id {n}")) for n in range(3)))

        assert [answer.id for answer in answers] == ["id 0", "id 1", "id 2"]
        assert [answer.outputs[1].raw for answer in answers] == [encode_bytes([text]) for text in (b"0", b"2", b"4")]

    run(main())


@pytest.mark.parametrize(
    "other",
    [
        row_request([2], name="z"),
        row_request([2], outputs=(RequestedOutput("y"),)),
        row_request([2], parameters={"sequence_id": 7}),
        msgspec.structs.replace(row_request([2]), version="2.1"),
        msgspec.structs.replace(row_request([2]), model="other"),
        msgspec.structs.replace(row_request([2]), inputs=(Tensor("x", "INT32", (1, 1, 1), struct.pack("<i", 2)),)),
        msgspec.structs.replace(row_request([2]), inputs=(Tensor("x", "UINT32", (1, 1), struct.pack("<i", 2)),)),
    ],
    ids=["name", "outputs", "parameters", "version", "model", "shape", "datatype"],
)
def test_only_compatible_requests_are_merged(other: InferRequest) -> None:
    """Only requests that differ in nothing but their rows share a call."""

    async def main() -> None:
        backend = Backend()

        await outcomes(batcher_on(backend), [row_request([1]), other])

        assert sorted(backend.rows()) == [(1,), (2,)]

    run(main())


def test_requests_that_cannot_be_merged_are_sent_alone() -> None:
    """A signature without a free leading dimension: one call a request, one after the other."""

    async def main() -> None:
        backend = Backend()
        batcher = batcher_on(backend)

        await asyncio.gather(*(batcher.infer(row_request([n]), is_mergeable=False) for n in range(3)))

        assert backend.rows() == [(0,), (1,), (2,)]
        assert backend.n_most_at_once == 1

    run(main())


def test_a_call_is_bounded_by_rows_and_bytes() -> None:
    """Merging stops at either limit; a request that is larger by itself goes out alone."""

    async def main() -> None:
        by_rows, by_bytes = Backend(), Backend()

        await outcomes(
            batcher_on(by_rows, max_batch_size=3),
            [row_request([1, 1]), row_request([2] * 9), row_request([3]), row_request([4, 4])],
        )
        await outcomes(batcher_on(by_bytes, max_batch_bytes=8), [row_request([n]) for n in range(3)])

        assert by_rows.rows() == [(1, 1), (2,) * 9, (3, 4, 4)]
        assert by_bytes.rows() == [(0, 1), (2,)]

    run(main())


def test_callers_take_turns() -> None:
    """One caller's flood does not keep another's only request waiting."""

    async def main() -> None:
        backend = Backend()
        flood = [row_request([n], caller=1) for n in range(6)]

        await outcomes(batcher_on(backend, max_batch_size=2), [*flood, row_request([100], caller=2)])

        assert 100 in backend.rows()[0]

    run(main())


def test_a_full_queue_refuses_at_once() -> None:
    """A request that finds the queue full is refused without waiting."""

    async def main() -> None:
        batcher = batcher_on(Backend(), max_queue_size=2)
        waiting = [asyncio.create_task(outcome(batcher.infer(row_request([n])))) for n in range(2)]
        await asyncio.sleep(0)

        with pytest.raises(Overloaded, match="2 requests are queued, the limit is 2"):
            await batcher.infer(row_request([9]))

        assert asyncio.get_running_loop().time() == 0
        assert await asyncio.gather(*waiting) == [(0,), (2,)]

    run(main())


def test_a_cancelled_request_frees_its_place_in_the_queue() -> None:
    """A cancelled request does not count any more, and its rows are not sent."""

    async def main() -> None:
        backend = Backend()
        batcher = batcher_on(backend, max_queue_size=1)
        first = asyncio.create_task(outcome(batcher.infer(row_request([1]))))
        await asyncio.sleep(0.01)
        leaving = asyncio.create_task(outcome(batcher.infer(row_request([2]))))
        await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.sleep(0.01)

        last = await outcome(batcher.infer(row_request([3])))

        assert (await first, last) == ((2,), (6,))
        assert backend.rows() == [(1,), (3,)]

    run(main())


def test_a_call_without_waiting_callers_is_cancelled() -> None:
    """When all callers of a call have cancelled, it makes room for others."""

    async def main() -> None:
        backend = Backend(call_s=1000)
        batcher = batcher_on(backend)
        leaving = [asyncio.create_task(outcome(batcher.infer(row_request([n])))) for n in range(2)]
        await asyncio.sleep(1)
        assert backend.n_at_once == 1

        for task in leaving:
            task.cancel()
        await asyncio.sleep(1)

        assert backend.n_at_once == 0

    run(main())


def test_each_request_is_answered_by_its_own_deadline() -> None:
    """The merged call has the latest deadline of its requests; one with an earlier deadline fails at that, the others are
    answered."""

    async def main() -> None:
        backend = Backend(call_s=10)
        loop = asyncio.get_running_loop()
        batcher = batcher_on(backend)
        ended: list[float] = []

        async def infer(deadline: float) -> Any:
            answer = await outcome(batcher.infer(row_request([1], deadline=deadline)))
            ended.append(loop.time())
            return answer

        hasty, patient = await asyncio.gather(infer(2), infer(20))

        assert isinstance(hasty, DeadlineExceeded)
        assert patient == (2,)
        assert backend.sent[0].deadline == 20
        assert ended == [pytest.approx(2, abs=0.1), pytest.approx(10)]

    run(main())


def test_a_call_whose_requests_have_expired_is_cancelled() -> None:
    """No caller waits for it any more; the next call is sent."""

    async def main() -> None:
        backend = Backend(call_s=10)
        batcher = batcher_on(backend)

        answers = await outcomes(batcher, [row_request([1], deadline=1)])
        await asyncio.sleep(0)

        assert isinstance(answers[0], DeadlineExceeded)
        assert backend.n_at_once == 0
        assert await outcome(batcher.infer(row_request([2]))) == (4,)

    run(main())


@pytest.mark.parametrize("turns", range(4))
def test_a_request_cancelled_at_any_moment_leaves_no_call(turns: int) -> None:
    """Queued, or before its call has begun, or in flight: the next request finds the place free."""

    async def main() -> None:
        backend = Backend(call_s=10)
        batcher = batcher_on(backend, max_in_flight=1)
        pending = batcher.begin(row_request([1]), lambda _: None)
        for _ in range(turns):
            await asyncio.sleep(0)

        pending.cancel()
        answer = await outcome(batcher.infer(row_request([2])))

        assert answer == (4,)
        assert asyncio.get_running_loop().time() == pytest.approx(10)
        await asyncio.sleep(0)
        assert batcher.occupancy("m") == (0, 0)
        await batcher.close()

    run(main())


def test_a_request_that_expired_in_the_queue_is_not_sent() -> None:
    """No caller waits for its rows."""

    async def main() -> None:
        backend = Backend()
        batcher = batcher_on(backend)

        answers = await outcomes(batcher, [row_request([1], name="z"), row_request([2], deadline=CALL_S / 2), row_request([3])])

        assert isinstance(answers[1], DeadlineExceeded)
        assert backend.rows() == [(1,), (3,)]

    run(main())


def test_a_poisoned_row_fails_its_own_caller_alone() -> None:
    """The others are answered by a second call each; the error names the caller's own rows."""

    async def main() -> None:
        backend = Backend()
        requests = [row_request([n]) for n in range(5)]
        requests[3] = row_request([7, POISON])

        answers = await outcomes(batcher_on(backend), requests)

        assert [answer for answer in answers if not isinstance(answer, Exception)] == [(0,), (2,), (4,), (8,)]
        assert isinstance(answers[3], InvalidInput)
        assert "row 1" in answers[3].message
        assert max(sum(n in call for call in backend.rows()) for n in (0, 1, 2, 4)) == 2

    run(main())


def test_an_unreachable_backend_is_not_called_for_each_request() -> None:
    """An error that no single request causes fails all of them at once, each with a copy of it."""

    async def main() -> None:
        def gone(_: int, __: InferResponse) -> InferResponse:
            raise Unavailable("gone", stage="predict")

        backend = Backend(gone)

        answers = await outcomes(batcher_on(backend), [row_request([n]) for n in range(4)])

        assert [type(answer) for answer in answers] == [Unavailable] * 4
        assert len({id(answer) for answer in answers}) == 4
        assert answers[0].stage == "predict"
        assert len(backend.sent) == 1

    run(main())


@pytest.mark.parametrize("change", [-1, 1])
def test_no_caller_gets_another_callers_rows(change: int) -> None:
    """An answer with a row too few or too many is given to no caller."""

    async def main() -> None:
        def short_or_long(_: int, answer: InferResponse) -> InferResponse:
            outputs = answer.outputs[0]
            n_rows = outputs.shape[0] + change
            raw = (outputs.raw + bytes(4))[: 4 * n_rows]
            return msgspec.structs.replace(answer, outputs=(Tensor("y", "INT32", (n_rows, 1), raw),))

        answers = await outcomes(batcher_on(Backend(short_or_long)), [row_request([1]), row_request([2])])

        assert [type(answer) for answer in answers] == [PairMismatch] * 2

    run(main())


def test_a_delay_lets_others_join() -> None:
    """``max_queue_delay_ms`` holds the first back, until enough have arrived or the delay has passed."""

    async def main() -> None:
        backend = Backend(call_s=0)
        batcher = batcher_on(backend, max_queue_delay_ms=100, max_batch_size=3)
        loop = asyncio.get_running_loop()
        first = asyncio.create_task(outcome(batcher.infer(row_request([1]))))
        await asyncio.sleep(0.05)

        await outcome(batcher.infer(row_request([2])))
        after_delay = loop.time()
        await outcomes(batcher, [row_request([n]) for n in (3, 4, 5)])

        assert backend.rows() == [(1, 2), (3, 4, 5)]
        assert (after_delay, loop.time()) == (pytest.approx(0.1), pytest.approx(0.1))
        assert await first == (2,)

    run(main())


def test_every_replica_has_calls_in_flight() -> None:
    """The limit on calls in flight follows the number of replicas."""

    async def main() -> None:
        backend = Backend()

        batcher = batcher_on(backend, max_batch_size=1, max_in_flight=1, n_backends=lambda: 3)
        await outcomes(batcher, [row_request([n]) for n in range(9)])

        assert backend.n_most_at_once == 3

    run(main())


@pytest.mark.parametrize(("max_batch_size", "at_most"), [(2, 8), (100, 1)])
def test_a_full_call_does_not_block_the_next(max_batch_size: int, at_most: int) -> None:
    """Waiting for it would not fill the next call further; only calls with room are waited for."""

    async def main() -> None:
        backend = Backend()

        await outcomes(batcher_on(backend, max_batch_size=max_batch_size), [row_request([n]) for n in range(40)])

        assert backend.n_most_at_once == at_most

    run(main())


def test_slow_rows_are_sent_in_concurrent_calls() -> None:
    """Where rows cost more than calls, merging saves nothing and calls overlap."""

    async def main() -> None:
        at_once = 0

        async def slow(request: InferRequest) -> InferResponse:
            nonlocal at_once
            at_once += 1
            peak.append(at_once)
            await asyncio.sleep(0.03 * request.inputs[0].shape[0])
            at_once -= 1
            return InferResponse("m", "1.1", request.inputs)

        peak: list[int] = []
        batcher = batcher_on(slow, max_batch_size=2)
        for n_requests in (1, 3, 2, 3):
            await outcomes(batcher, [row_request([n]) for n in range(n_requests)])

        await outcomes(batcher, [row_request([n]) for n in range(64)])

        assert max(peak) == ADAPTIVE_IN_FLIGHT

    run(main())


@given(st.floats(0, 0.05), st.floats(0, 0.05), st.lists(st.integers(1, 64), min_size=2, max_size=50))
def test_the_cost_of_a_row_is_the_slope(call_s: float, row_s: float, sizes: list[int]) -> None:
    """The cost of a row is separated from the fixed cost of a call."""
    cost = RowCost()

    for n_rows in [*sizes, 1, 64]:
        cost.learn(n_rows, call_s + row_s * n_rows)

    assert cost.row_s == pytest.approx(row_s, abs=SLOW_ROW_S / 100)


def test_a_call_that_hangs_does_not_keep_the_others_waiting() -> None:
    """Overdue calls do not count against the limit, up to a bound."""

    async def main() -> None:
        n_sent = 0

        async def first_two_hang(request: InferRequest) -> InferResponse:
            nonlocal n_sent
            n_sent += 1
            await asyncio.sleep(1000 if n_sent < 3 else 0)
            return InferResponse("m", "1.1", request.inputs)

        batcher = batcher_on(first_two_hang)
        hanging = []
        for _ in range(2):
            hanging.append(asyncio.create_task(outcome(batcher.infer(row_request([1])))))
            await asyncio.sleep(OVERDUE_S + 0.01)

        assert await outcome(batcher.infer(row_request([3]))) == (3,)

        assert asyncio.get_running_loop().time() == pytest.approx(2 * (OVERDUE_S + 0.01))
        await batcher.close()
        await asyncio.gather(*hanging)

    run(main())


def test_closing_answers_every_request() -> None:
    """Who waits when it is closed gets an error."""

    async def main() -> None:
        batcher = batcher_on(Backend(call_s=1000))
        waiting = [asyncio.create_task(outcome(batcher.infer(row_request([n], name=name)))) for n, name in enumerate("xxz")]
        await asyncio.sleep(1)

        await batcher.close()

        assert all(isinstance(answer, SplitserveError) for answer in await asyncio.gather(*waiting))

    run(main())


def test_the_callback_is_called_once_and_after_begin_has_returned() -> None:
    """Never during `begin`: once, with the answer or the error."""

    async def main() -> None:
        batcher = batcher_on(Backend())
        told: list[Any] = []

        batcher.begin(row_request([1]), told.append)
        late = batcher.begin(row_request([2], deadline=CALL_S / 2), told.append)
        assert told == []
        await asyncio.sleep(1)
        late.cancel()

        assert [type(outcome) for outcome in told] == [DeadlineExceeded, InferResponse]

    run(main())


def test_the_callback_of_a_cancelled_request_is_not_called() -> None:
    """Neither with an answer nor with an error; a call without callers is cancelled, and a queued request is not sent."""

    async def main() -> None:
        backend = Backend(call_s=10)
        batcher = batcher_on(backend)
        told: list[Any] = []
        pending = [batcher.begin(row_request([n]), told.append) for n in range(2)]
        await asyncio.sleep(1)
        pending.append(batcher.begin(row_request([2]), told.append))

        for each in pending:
            each.cancel()
        await asyncio.sleep(0.001)

        assert (told, backend.rows(), backend.n_at_once) == ([], [(0, 1)], 0)
        assert batcher.occupancy("m") == (0, 0)

    run(main())


def test_an_exception_in_a_callback_does_not_affect_other_callbacks() -> None:
    """The event loop's handler hears of it, as of any callback that fails."""

    async def main() -> None:
        batcher = batcher_on(Backend())
        told: list[Any] = []
        heard: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))

        def fail(_: InferResponse | Exception) -> None:
            raise RuntimeError("a bug")

        batcher.begin(row_request([1]), fail)
        batcher.begin(row_request([2]), told.append)
        await asyncio.sleep(1)

        assert [values_of(answer.outputs[0]) for answer in told] == [(4,)]
        assert [str(context["exception"]) for context in heard] == ["a bug"]
        assert batcher.occupancy("m") == (0, 0)

    run(main())


def test_a_callback_may_begin_another_request() -> None:
    """From within the callback, after an answer or a preemption; the limit of the queue still holds."""

    async def main() -> None:
        backend = Backend()
        batcher = batcher_on(backend, max_queue_size=2, max_batch_size=1, max_in_flight=1)
        left, n_waiting, outcomes = 20, [], []

        def again(outcome: InferResponse | Exception) -> None:
            nonlocal left
            outcomes.append(outcome)
            if left:
                left -= 1
                begin(1 + left % 3)

        def begin(priority: int) -> None:
            try:
                batcher.begin(row_request([left]), again, priority=priority)
            except Overloaded as error:
                outcomes.append(error)
            n_waiting.append(batcher.occupancy("m")[0])

        for priority in (3, 2, 2, 1, 1, 1):
            begin(priority)
        await asyncio.sleep(10)

        assert max(n_waiting) == 2
        assert len(outcomes) == len(n_waiting)
        assert batcher.occupancy("m") == (0, 0)

    run(main())


def test_the_time_of_callbacks_is_not_part_of_a_call() -> None:
    """The duration of calls decides how many are concurrent; slow callbacks do not count as slow calls."""

    async def main() -> None:
        now = 0.0

        async def answer(request: InferRequest) -> InferResponse:
            nonlocal now
            now += 0.125
            return InferResponse("m", "1.1", request.inputs)

        def take_long(_: InferResponse | Exception) -> None:
            nonlocal now
            now += 10

        statistics = Statistics()
        batcher = Batcher(answer, statistics=statistics, clock=lambda: now)
        for _ in range(4):
            batcher.begin(row_request([1]), take_long)
        await asyncio.sleep(1)

        assert next(iter(batcher._queues.values())).admission.alone_s == 0.125
        assert statistics.of("m", "1.1").inference_stats.compute_infer.ns == 4 * 0.125e9

    run(main())


def test_finished_requests_leave_no_reference_cycles() -> None:
    """No circles of objects: memory is free when a call has ended, not when the collector finds time."""

    async def main() -> None:
        batcher = batcher_on(Backend())
        told: list[Any] = []
        for _ in range(2):
            gc.collect()
            for n in range(20):
                batcher.begin(row_request([n]), told.append)
            await asyncio.sleep(1)

        assert len(told) == 40
        assert gc.collect() < 20

    run(main())


def test_each_request_is_counted_by_its_outcome() -> None:
    """Answered or failed, also in a merged call; the duration is the sum of its parts."""

    async def main() -> None:
        statistics = Statistics()
        loop = asyncio.get_running_loop()
        batcher = Batcher(Backend(), BatchLimits(), statistics=statistics, clock=loop.time)
        pending = [batcher.begin(row_request([n, n]), lambda _: None, began_at=loop.time() - 0.01) for n in range(3)]
        await asyncio.sleep(CALL_S / 2)
        batcher.begin(row_request([1, POISON]), lambda _: None)
        batcher.begin(row_request([1], deadline=loop.time() + CALL_S / 4), lambda _: None)
        pending[0].cancel()
        await asyncio.sleep(1)

        counts = statistics.of("m", "1.1")
        stats = counts.inference_stats
        assert (stats.success.count, stats.fail.count, counts.inference_count) == (2, 3, 4)
        parts = (stats.compute_input, stats.queue, stats.compute_infer, stats.compute_output)
        assert [part.ns for part in parts] == [pytest.approx(2e7), 0, pytest.approx(2 * CALL_S * 1e9), 0]
        assert stats.success.ns == pytest.approx(sum(part.ns for part in parts))

    run(main())


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=4), min_size=1, max_size=6))
def test_merging_and_splitting_is_the_identity(parts: list[list[int]]) -> None:
    """Joining rows and cutting them again gives each its own."""
    merged = merge([row_request(part) for part in parts])

    found = split(InferResponse("m", "1.1", merged.inputs), [len(part) for part in parts])

    assert [values_of(outputs[0]) for outputs in found] == [tuple(part) for part in parts]


class Arrival(msgspec.Struct, frozen=True):
    """A request of the property test: when it arrives, its caller, its rows, when the caller leaves."""

    at: float
    caller: int
    lane: str
    n_rows: int
    is_poisoned: bool
    deadline_s: float | None
    leaves_after_s: float | None


MISBEHAVIOURS = ("none", "none", "none", "short", "long", "unavailable", "crash")

arrivals = st.lists(
    st.builds(
        Arrival,
        at=st.floats(0, 5),
        caller=st.integers(0, 3),
        lane=st.sampled_from("xxxz"),
        n_rows=st.integers(0, 4),
        is_poisoned=st.sampled_from([False] * 7 + [True]),
        deadline_s=st.none() | st.floats(0.01, 5),
        leaves_after_s=st.none() | st.none() | st.floats(0, 3),
    ),
    min_size=1,
    max_size=24,
)


@settings(max_examples=examples(300))
@given(
    arrivals,
    st.lists(st.sampled_from(MISBEHAVIOURS), max_size=8),
    st.builds(
        dict,
        max_batch_size=st.integers(1, 8),
        max_in_flight=st.integers(0, 3),
        max_queue_size=st.integers(1, 12),
        max_queue_delay_ms=st.sampled_from([0, 0, 300]),
    ),
)
def test_every_caller_gets_its_own_rows_or_an_error(arriving: list[Arrival], mischief: list[str], limits: dict[str, int]) -> None:
    """For any arrivals, departures and behaviour of the backend: nothing hangs, no caller gets another's rows, a request known
    to be dead is not sent, no row is sent more than twice, the queue's bound holds.
    """

    async def main() -> None:
        loop = asyncio.get_running_loop()
        backend = Backend(_misbehaving(mischief))
        batcher = batcher_on(backend, **limits)
        dead_at: dict[int, float] = {}

        async def call(index: int, arrival: Arrival) -> Any:
            await asyncio.sleep(arrival.at)
            values = [POISON if arrival.is_poisoned and not n else 1000 * (index + 1) + n for n in range(arrival.n_rows)]
            deadline = NO_DEADLINE if arrival.deadline_s is None else loop.time() + arrival.deadline_s
            request = row_request(values, caller=arrival.caller, deadline=deadline, name=arrival.lane)
            dead_at[index] = min(
                deadline, loop.time() + (arrival.leaves_after_s if arrival.leaves_after_s is not None else NO_DEADLINE)
            )
            started = loop.time()
            try:
                async with asyncio.timeout(arrival.leaves_after_s):
                    answer = await batcher.infer(request)
            except (SplitserveError, TimeoutError, RuntimeError) as error:
                if isinstance(error, DeadlineExceeded):
                    assert loop.time() >= deadline
                return error
            finally:
                assert batcher.occupancy("m")[0] <= limits["max_queue_size"]
                if deadline != NO_DEADLINE:
                    assert loop.time() <= max(deadline, started) + 0.02
            assert values_of(answer.outputs[0]) == tuple(2 * value for value in values)
            return answer

        await asyncio.gather(*(call(index, arrival) for index, arrival in enumerate(arriving)))

        await asyncio.sleep(0.001)
        assert batcher.occupancy("m") == (0, 0)
        assert backend.n_at_once == 0
        for index, arrival in enumerate(arriving):
            if arrival.n_rows and not arrival.is_poisoned:
                passes = sum(1000 * (index + 1) in row for row in backend.rows())
                assert passes <= 2

    run(main())


def _misbehaving(mischief: list[str]) -> Callable[[int, InferResponse], InferResponse]:
    def misbehave(number: int, answer: InferResponse) -> InferResponse:
        match mischief[number] if number < len(mischief) else "none":
            case "unavailable":
                raise Unavailable("gone")
            case "crash":
                raise RuntimeError("a bug")
            case "short" if answer.outputs[0].shape[0]:
                return _resized(answer, -1)
            case "long":
                return _resized(answer, 1)
        return answer

    return misbehave


def _resized(answer: InferResponse, change: int) -> InferResponse:
    tensor = answer.outputs[0]
    n_rows = tensor.shape[0] + change
    return msgspec.structs.replace(answer, outputs=(Tensor("y", "INT32", (n_rows, 1), (tensor.raw + bytes(4))[: 4 * n_rows]),))
