"""Natural batching: while a call is under way, what arrives meanwhile waits, and goes out as the next call, merged.

Nobody waits for a timer: a request that finds nothing under way goes out at once. The more arrives, the more is merged, and the
cost of a call is shared by all in it. Row-major tensors are joined and cut as bytes; there is no numerics here, and no transport.
Whoever has a request is told of its answer by a callback, or awaits it; a task there is for each call, not for each request.

1. A request joins the lane of those that are alike: same model, version, inputs (names, datatypes, inner shapes), wanted outputs
   and parameters. Lanes of one model and version share what may be under way, in turn.
2. When less is under way than may be, the lane's callers give one request each, round and round, until the limits of a call are
   reached: one caller's flood does not keep the others waiting.
3. A request whose caller has left is gone at once; one whose deadline has passed is dropped here. Neither is sent.
4. The merged call has the latest deadline of its members; each member still gets its own answer, or `DeadlineExceeded` in time.
5. If the call fails for its content, each member is tried once more on its own: who sent the bad row fails, the others do not.
6. As many requests may be here as are answered without waiting too long (`admission`); one more is refused at once, or
   one of lower priority that waits is, in its place.
7. If the answer's rows are not the sum of the rows sent, all fail: a caller never sees another's row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence

from splitserve.batching.admission import HIGHEST_PRIORITY
from splitserve.batching.merging import alike, merge, split
from splitserve.batching.pending import OnAnswer, Pending, awaited
from splitserve.batching.queue import OVERDUE_S, Batch, BatchCall, BatchLimits, CompatibleRequests, ModelQueue, QueuedRequest
from splitserve.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    NotFound,
    Overloaded,
    PermissionDenied,
    SplitserveError,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from splitserve.oip.messages import NO_DEADLINE, InferRequest, InferResponse
from splitserve.oip.statistics import Statistics

FOR_ALL = (Cancelled, DeadlineExceeded, NotFound, Overloaded, PermissionDenied, Unauthenticated, Unavailable, Unsupported)
"""Errors that are no member's doing. Any other one member may have brought upon the others."""

_SWEEP_S = 0.005
"""Deadlines that lie this close together are looked at together."""

Send = Callable[[InferRequest], Awaitable[InferResponse]]


class Batcher:
    """Merges requests in front of something that answers them.

    Args:
        send: answers one request, merged or not.
        limits: of a model, by its name.
        n_backends: how many replicas there are to send to.
        statistics: where requests are counted that end here.
        named: makes of what `send` raised the error that the caller of a request is told.
        clock: seconds that never go back, the one that deadlines are on.
    """

    def __init__(
        self,
        send: Send,
        limits: Callable[[str], BatchLimits] | BatchLimits | None = None,
        *,
        n_backends: Callable[[], int] = lambda: 1,
        statistics: Statistics | None = None,
        named: Callable[[InferRequest, Exception], Exception] = lambda _, error: error,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        fixed = limits if isinstance(limits, BatchLimits) else BatchLimits()
        self._send = send
        self._limits = limits if callable(limits) else lambda _: fixed
        self._n_backends = n_backends
        self._statistics = statistics or Statistics()
        self._named = named
        self._clock = clock
        self._groups: dict[tuple[str, str], ModelQueue] = {}
        self._lanes: dict[Hashable, CompatibleRequests] = {}
        self._sweep_at = NO_DEADLINE
        self._sweeping: asyncio.TimerHandle | None = None
        self._calls: set[BatchCall] = set()

    async def infer(self, request: InferRequest, *, is_mergeable: bool = True, priority: int = HIGHEST_PRIORITY) -> InferResponse:
        """As `begin`, for whoever awaits the answer.

        Raises:
            SplitserveError: what `begin` raises, and what it would tell.
        """
        return await awaited(lambda on_answer: self.begin(request, on_answer, is_mergeable=is_mergeable, priority=priority))

    def begin(
        self,
        request: InferRequest,
        on_answer: OnAnswer,
        *,
        is_mergeable: bool = True,
        priority: int = HIGHEST_PRIORITY,
        began: float | None = None,
    ) -> Pending:
        """Answer a request, merged with others like it if the signature allows that.

        Args:
            request: checked against the signature, so that what it is merged with does not fail for its form.
            on_answer: called once, later, with the answer or with an error: `DeadlineExceeded`, or what sending it raised.
            is_mergeable: whether all inputs and outputs have a leading dimension of rows that are independent of each other.
            priority: 1 is the highest; where not all can be taken, larger numbers are refused first.
            began: when work for it began, by the clock here; now if not given.

        Raises:
            Overloaded: as many requests as may are here already, or it would not be its turn before its deadline.
            DeadlineExceeded: its deadline has passed.
        """
        lane = self._lane(request, is_mergeable and bool(request.inputs))
        group = lane.group
        now = self._clock()
        if request.deadline <= now:
            raise DeadlineExceeded("out of time before the work began")
        stands_back = None
        if reason := group.full_reason(request.deadline - now):
            stands_back = group.less_urgent.least(than=priority)
            if stands_back is None:
                raise Overloaded(reason, model=request.model)
            self._take_out(stands_back)
        member = QueuedRequest(request, on_answer, self, lane, now, now if began is None else began, priority)
        lane.add(member)
        self._lanes[lane.key] = lane
        if request.deadline < self._sweep_at:
            self._sweep_later(request.deadline - now)
        if not group.is_scheduled:
            group.is_scheduled = True
            asyncio.get_running_loop().call_soon(self._pump, group)
        if stands_back is not None:
            self._fail([stands_back], Overloaded("refused for a request of higher priority", model=request.model))
        return member

    def leave(self, member: QueuedRequest) -> None:
        """Nobody waits for its answer any more."""
        if member.on_answer is not None:
            member.lane.group.counts.failed(self._clock() - member.began)
            self._end(member)
            if member.call is not None:
                member.call.give_up_for_nobody()

    def _end(self, member: QueuedRequest) -> OnAnswer | None:
        """It is here no longer, waiting or under way. Who is to be told, if anyone."""
        on_answer, member.on_answer = member.on_answer, None
        if on_answer is not None:
            member.lane.group.members.discard(member)
            if member.is_waiting:
                self._take_out(member)
        return on_answer

    def _take_out(self, member: QueuedRequest) -> None:
        member.lane.remove(member)
        self._drop_if_empty(member.lane)

    def _tell(self, member: QueuedRequest, outcome: InferResponse | Exception) -> None:
        """Its answer or its error. What goes wrong in telling one keeps none of the others waiting."""
        on_answer = self._end(member)
        if on_answer is None:
            return
        try:
            on_answer(outcome)
        except Exception as error:
            context = {"message": "who was told of an answer failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)

    def _fail(self, members: Sequence[QueuedRequest], error: Exception) -> None:
        now = self._clock()
        for member in members:
            if member.on_answer is not None:
                member.lane.group.counts.failed(now - member.began)
                self._tell(member, self._named(member.request, _copied(error)))

    def load(self, model: str) -> tuple[int, int]:
        """Requests of a model that wait, and calls for it that are under way."""
        groups = [group for (name, _), group in self._groups.items() if name == model]
        return sum(group.n_waiting for group in groups), sum(group.n_in_flight for group in groups)

    async def close(self) -> None:
        """Give up what waits and what is under way."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        while (members := self._members) or self._calls:
            self._fail(list(members), Unavailable("the service is stopping"))
            for call in self._calls:
                call.task.cancel()
            await asyncio.sleep(0)

    @property
    def _members(self) -> set[QueuedRequest]:
        return {member for group in self._groups.values() for member in group.members}

    def _lane(self, request: InferRequest, is_mergeable: bool) -> CompatibleRequests:
        key = alike(request) if is_mergeable else object()
        lane = self._lanes.get(key)
        if lane is None:
            place = (request.model, request.version)
            group = self._groups.get(place)
            if group is None:
                self._forget_idle_groups()
                group = self._groups[place] = ModelQueue(self._limits(request.model), self._statistics.of(*place))
            lane = CompatibleRequests(key, group, is_mergeable)
        return lane

    def _forget_idle_groups(self) -> None:
        if len(self._groups) >= _MAX_GROUPS:
            self._groups = {place: each for place, each in self._groups.items() if each.lanes or each.n_in_flight}

    def _drop_if_empty(self, lane: CompatibleRequests) -> None:
        if not lane.n_waiting:
            lane.group.lanes.pop(lane.key, None)
            self._lanes.pop(lane.key, None)

    def _pump(self, group: ModelQueue) -> None:
        """Send what may be sent now."""
        group.is_scheduled = False
        while group.lanes:
            now = self._clock()
            if (free_at := group.free_at(max(1, self._n_backends()), now)) > now:
                group.wait_until(free_at, now, self._pump)
                return
            lane = next((each for each in group.lanes.values() if each.ripe_at() <= now), None)
            if lane is None:
                group.wait_until(min(each.ripe_at() for each in group.lanes.values()), now, self._pump)
                return
            load = lane.take(now)
            group.lanes.move_to_end(lane.key)
            self._drop_if_empty(lane)
            self._fail(load.late, DeadlineExceeded("out of time before it was sent"))
            if load.members:
                self._start(group, load)

    def _start(self, group: ModelQueue, load: Batch) -> None:
        patience_s = 0.0 if load.is_full else max(OVERDUE_S, 2 * group.admission.alone_s)
        call = BatchCall(load.members, overdue_at=self._clock() + patience_s)
        call.task = asyncio.get_running_loop().create_task(self._call(group, call))
        call.task.add_done_callback(lambda _: self._ended(group, call))  # also of one that is given up before it began
        self._calls.add(call)
        group.calls.add(call)
        for member in load.members:
            member.call = call

    async def _call(self, group: ModelQueue, call: BatchCall) -> None:
        call.sent_at = self._clock()
        if not await self._answer(group, call):
            return
        took_s = call.answered_at - call.sent_at  # without the time that it took to tell of it
        n_rows = sum([member.n_rows for member in call.members])
        group.cost.learn(n_rows, took_s)
        first = call.members[0]
        alone_s = max(took_s - group.cost.row_s * (n_rows - first.n_rows), took_s / len(call.members))
        group.admission.learn(max(first.n_found, len(call.members)), call.sent_at - first.since, took_s, min(alone_s, took_s))

    def _ended(self, group: ModelQueue, call: BatchCall) -> None:
        self._calls.discard(call)
        group.calls.discard(call)
        error = None if call.task.cancelled() else call.task.exception()
        if error is not None:  # a mistake of ours; nobody shall wait for it
            self._fail(call.members, Internal("internal error"))
        call.members.clear()  # they know the call: a circle, which only the garbage collector would end
        self._pump(group)
        if error is not None:
            raise error

    async def _answer(self, group: ModelQueue, call: BatchCall) -> bool:
        """Answer all of its members; whether it took one call that succeeded."""
        members = call.members
        if len(members) == 1:
            return await self._answer_alone(group, call, members[0])
        try:
            response = await self._send(merge([member.request for member in members]))
            parts = split(response, [member.n_rows for member in members])
        except FOR_ALL as error:
            group.note(error)
            self._fail(members, error)
            return False
        except Exception:
            for start in range(0, len(members), _N_ALONE_AT_ONCE):
                together = members[start : start + _N_ALONE_AT_ONCE]
                await asyncio.gather(*[self._answer_alone(group, call, member) for member in together])
            return False
        call.answered_at = self._clock()
        self._count(group, call, [member for member in members if member.on_answer is not None])
        for member, outputs in zip(members, parts, strict=True):
            if member.on_answer is not None:
                answer = InferResponse(response.model, response.version, outputs, member.request.id, response.parameters)
                self._tell(member, answer)
        return True

    async def _answer_alone(self, group: ModelQueue, call: BatchCall, member: QueuedRequest) -> bool:
        if member.on_answer is None:
            return False
        try:
            response = await self._send(member.request)
            if member.lane.is_mergeable:
                split(response, [member.n_rows])
        except Exception as error:
            group.note(error)
            self._fail([member], error)
            return False
        call.answered_at = self._clock()
        if member.on_answer is not None:
            self._count(group, call, [member])
            self._tell(member, response)
        return True

    def _count(self, group: ModelQueue, call: BatchCall, members: Sequence[QueuedRequest]) -> None:
        """Those that are answered by it now."""
        if not members:
            return
        now = call.answered_at
        group.counts.succeeded(
            len(members),
            n_rows=sum([member.n_rows for member in members]) if len(members) > 1 else members[0].request.n_rows,
            total_ns=_ns(sum([now - member.began for member in members])),
            parts={
                "input": _ns(sum([member.since - member.began for member in members])),
                "queue": _ns(sum([call.sent_at - member.since for member in members])),
                "infer": _ns(len(members) * (now - call.sent_at)),
                "output": 0,
            },
        )

    def _sweep_later(self, delay_s: float) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        delay_s = max(delay_s, _SWEEP_S)
        self._sweep_at = self._clock() + delay_s
        self._sweeping = asyncio.get_running_loop().call_later(delay_s, self._sweep)

    def _sweep(self) -> None:
        """Fail everybody whose time is over, waiting or under way; come back for the next."""
        self._sweep_at, self._sweeping = NO_DEADLINE, None
        now, next_deadline = self._clock(), NO_DEADLINE
        late = []
        for member in self._members:
            if member.request.deadline <= now:
                late.append(member)
            else:
                next_deadline = min(next_deadline, member.request.deadline)
        if next_deadline != NO_DEADLINE:
            self._sweep_later(next_deadline - now)
        self._fail(late, DeadlineExceeded("out of time before the answer came"))
        for call in self._calls:
            call.give_up_for_nobody()


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _copied(error: Exception) -> Exception:
    """Each caller adds to its error where it happened, so each gets one of its own."""
    if not isinstance(error, SplitserveError):
        return error
    copy = type(error)(error.message, **error.metadata)
    copy.__cause__ = error.__cause__ or error
    return copy


_MAX_GROUPS = 256
"""So many models and versions are remembered though nothing is asked of them: how slow their rows are."""

_N_ALONE_AT_ONCE = 16
"""Members of a call that failed which are tried on their own side by side."""
