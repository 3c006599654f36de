"""Natural batching: while a call is under way, what arrives meanwhile waits, and goes out as the next call, merged.

Nobody waits for a timer: a request that finds nothing under way goes out at once. The more arrives, the more is merged, and the
cost of a call is shared by all in it. Row-major tensors are joined and cut as bytes; there is no numerics here, and no transport.

1. A request joins the lane of those that are alike: same model, version, inputs (names, datatypes, inner shapes), wanted outputs
   and parameters. Lanes of one model and version share what may be under way, in turn.
2. When less is under way than may be, the lane's callers give one request each, round and round, until the limits of a call are
   reached: one caller's flood does not keep the others waiting.
3. A request whose caller has left is gone at once; one whose deadline has passed is dropped here. Neither is sent.
4. The merged call has the latest deadline of its members; each member still gets its own answer, or `DeadlineExceeded` in time.
5. If the call fails for its content, each member is tried once more on its own: who sent the bad row fails, the others do not.
6. As many requests may be here as are answered without waiting too long (`splitserve.admission`); one more is refused at once, or
   one of lower priority that waits is, in its place.
7. If the answer's rows are not the sum of the rows sent, all fail: a caller never sees another's row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence

from splitserve.admission import HIGHEST_PRIORITY
from splitserve.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from splitserve.lanes import OVERDUE_S, Aboard, Group, Lane, Limits, Member, fail
from splitserve.merging import alike, merge, split
from splitserve.oip import NO_DEADLINE, InferRequest, InferResponse
from splitserve.statistics import Stopwatch

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
        clock: seconds that never go back, the one that deadlines are on.
    """

    def __init__(
        self,
        send: Send,
        limits: Callable[[str], Limits] | Limits | None = None,
        *,
        n_backends: Callable[[], int] = lambda: 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        fixed = limits if isinstance(limits, Limits) else Limits()
        self._send = send
        self._limits = limits if callable(limits) else lambda _: fixed
        self._n_backends = n_backends
        self._clock = clock
        self._groups: dict[tuple[str, str], Group] = {}
        self._lanes: dict[Hashable, Lane] = {}
        self._members: set[Member] = set()
        self._sweep_at = NO_DEADLINE
        self._sweeping: asyncio.TimerHandle | None = None
        self._calls: set[asyncio.Task[None]] = set()

    async def infer(
        self,
        request: InferRequest,
        *,
        is_mergeable: bool = True,
        watch: Stopwatch | None = None,
        priority: int = HIGHEST_PRIORITY,
    ) -> InferResponse:
        """Answer a request, merged with others like it if the signature allows that.

        Args:
            request: checked against the signature, so that what it is merged with does not fail for its form.
            is_mergeable: whether all inputs and outputs have a leading dimension of rows that are independent of each other.
            watch: told how long it waited, and how long the call took that it was sent with.
            priority: 1 is the highest; where not all can be taken, larger numbers are refused first.

        Raises:
            Overloaded: as many requests as may are here already, or it would not be its turn before its deadline.
            DeadlineExceeded: its deadline passed.
            SplitserveError: what sending it raised.
        """
        lane = self._lane(request, is_mergeable and bool(request.inputs))
        group = lane.group
        now = self._clock()
        if request.deadline <= now:
            raise DeadlineExceeded("out of time before the work began")
        if (reason := group.full_reason(request.deadline - now)) and not self._make_room(group, priority):
            raise Overloaded(reason, model=request.model)
        loop = asyncio.get_running_loop()
        member = Member(request, loop.create_future(), now, lane, watch, priority)
        lane.add(member)
        self._lanes[lane.key] = lane
        self._members.add(member)
        if request.deadline < self._sweep_at:
            self._sweep_later(loop, request.deadline - now)
        if not group.is_scheduled:
            group.is_scheduled = True
            loop.call_soon(self._pump, group)
        try:
            response = await member.answer
            if watch is not None:
                watch.end("infer")
            return response
        finally:
            self._members.discard(member)
            group.n_present -= 1
            if member.is_waiting:
                lane.remove(member)
                self._drop_if_empty(lane)
            elif member.aboard is not None:
                member.aboard.leave()

    def _make_room(self, group: Group, priority: int) -> bool:
        """Refuse one that waits and has a lower priority, if there is any."""
        member = group.less_urgent.least(than=priority)
        if member is None:
            return False
        member.lane.remove(member)
        self._drop_if_empty(member.lane)
        fail([member], Overloaded("refused for a request of higher priority", model=member.request.model))
        return True

    def load(self, model: str) -> tuple[int, int]:
        """Requests of a model that wait, and calls for it that are under way."""
        groups = [group for (name, _), group in self._groups.items() if name == model]
        return sum(group.n_waiting for group in groups), sum(group.n_in_flight for group in groups)

    async def close(self) -> None:
        """Give up what waits and what is under way."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        fail(list(self._members), Unavailable("the service is stopping"))
        while self._members or self._calls:
            for call in self._calls:
                call.cancel()
            await asyncio.sleep(0)

    def _lane(self, request: InferRequest, is_mergeable: bool) -> Lane:
        key = alike(request) if is_mergeable else object()
        lane = self._lanes.get(key)
        if lane is None:
            place = (request.model, request.version)
            group = self._groups.get(place)
            if group is None:
                self._forget_idle_groups()
                group = self._groups[place] = Group(self._limits(request.model))
            lane = Lane(key, group, is_mergeable)
        return lane

    def _forget_idle_groups(self) -> None:
        if len(self._groups) >= _MAX_GROUPS:
            self._groups = {place: each for place, each in self._groups.items() if each.lanes or each.n_in_flight}

    def _drop_if_empty(self, lane: Lane) -> None:
        if not lane.n_waiting:
            lane.group.lanes.pop(lane.key, None)
            self._lanes.pop(lane.key, None)

    def _pump(self, group: Group) -> None:
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
            members, is_full = lane.take(now)
            group.lanes.move_to_end(lane.key)
            self._drop_if_empty(lane)
            if members:
                self._start(group, members, is_full)

    def _start(self, group: Group, members: list[Member], is_full: bool) -> None:
        call = asyncio.get_running_loop().create_task(self._call(group, members))
        self._calls.add(call)
        now = self._clock()
        group.calls[call] = now + (0.0 if is_full else max(OVERDUE_S, 2 * group.admission.alone_s))
        call.add_done_callback(lambda _: self._ended(call, group, members))  # also of one that is given up before it began
        aboard = Aboard(call, len(members))
        for member in members:
            member.aboard = aboard
            if member.watch is not None:
                member.watch.end("queue")

    async def _call(self, group: Group, members: list[Member]) -> None:
        started = self._clock()
        if not await self._answer(members):
            return
        took_s = self._clock() - started
        n_rows = sum([member.n_rows for member in members])
        group.cost.learn(n_rows, took_s)
        first = members[0]
        alone_s = max(took_s - group.cost.row_s * (n_rows - first.n_rows), took_s / len(members))
        group.admission.learn(max(first.n_found, len(members)), started - first.since, took_s, min(alone_s, took_s))

    def _ended(self, call: asyncio.Task[None], group: Group, members: list[Member]) -> None:
        self._calls.discard(call)
        del group.calls[call]
        if not call.cancelled() and (error := call.exception()) is not None:  # a mistake of ours; nobody shall wait for it
            fail(members, Internal("internal error"))
            raise error
        self._pump(group)

    async def _answer(self, members: Sequence[Member]) -> bool:
        """Answer all of them; whether it took one call that succeeded."""
        if len(members) == 1:
            return await self._answer_alone(members[0])
        try:
            response = await self._send(merge([member.request for member in members]))
            parts = split(response, [member.n_rows for member in members])
        except FOR_ALL as error:
            members[0].lane.group.note(error)
            fail(members, error)
            return False
        except Exception:
            for start in range(0, len(members), _N_ALONE_AT_ONCE):
                await asyncio.gather(*map(self._answer_alone, members[start : start + _N_ALONE_AT_ONCE]))
            return False
        for member, outputs in zip(members, parts, strict=True):
            if not member.answer.done():
                answer = InferResponse(response.model, response.version, outputs, member.request.id, response.parameters)
                member.answer.set_result(answer)
        return True

    async def _answer_alone(self, member: Member) -> bool:
        if member.answer.done():
            return False
        try:
            response = await self._send(member.request)
            if member.lane.is_mergeable:
                split(response, [member.n_rows])
        except Exception as error:
            member.lane.group.note(error)
            fail([member], error)
            return False
        if not member.answer.done():
            member.answer.set_result(response)
        return True

    def _sweep_later(self, loop: asyncio.AbstractEventLoop, delay_s: float) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        delay_s = max(delay_s, _SWEEP_S)
        self._sweep_at = self._clock() + delay_s
        self._sweeping = loop.call_later(delay_s, self._sweep, loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Fail everybody whose time is over, waiting or under way; come back for the next."""
        now, next_deadline = self._clock(), NO_DEADLINE
        for member in self._members:
            if member.request.deadline <= now:
                fail([member], DeadlineExceeded("out of time before the answer came"))
            else:
                next_deadline = min(next_deadline, member.request.deadline)
        self._sweep_at, self._sweeping = NO_DEADLINE, None
        if next_deadline != NO_DEADLINE:
            self._sweep_later(loop, next_deadline - now)


_MAX_GROUPS = 256
"""So many models and versions are remembered though nothing is asked of them: how slow their rows are."""

_N_ALONE_AT_ONCE = 16
"""Members of a call that failed which are tried on their own side by side."""
