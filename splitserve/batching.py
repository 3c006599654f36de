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
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from splitserve.admission import HIGHEST_PRIORITY, AdaptiveLimit, LessUrgent
from splitserve.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    NotFound,
    Overloaded,
    PairMismatch,
    PermissionDenied,
    SplitserveError,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from splitserve.oip import NO_DEADLINE, InferRequest, InferResponse
from splitserve.statistics import Stopwatch
from splitserve.tensors import DATATYPES, Tensor, bytes_offsets

MIB = 1024 * 1024

FOR_ALL = (Cancelled, DeadlineExceeded, NotFound, Overloaded, PermissionDenied, Unauthenticated, Unavailable, Unsupported)
"""Errors that are no member's doing. Any other one member may have brought upon the others."""

SLOW_ROW_S = 0.002
"""From here on rows cost so much that merging them saves little, and calls side by side keep all stages busy."""

_SWEEP_S = 0.005
"""Deadlines that lie this close together are looked at together."""

Send = Callable[[InferRequest], Awaitable[InferResponse]]


class Limits(msgspec.Struct, frozen=True):
    """Bounds of the calls for one model.

    ``max_batch_size`` rows and ``max_batch_bytes`` bounds what is merged; a request that is larger by itself goes out alone.
    ``max_queue_size`` requests may wait. ``max_in_flight`` calls may be under way for each backend; 0 adapts it: one where a call
    costs more than its rows; up to `ADAPTIVE_IN_FLIGHT` where the rows do, and beside calls that are full or take longer than
    `OVERDUE_S`.
    ``max_queue_delay_ms`` above 0 lets a request wait so long for others although nothing is under way. ``max_queue_wait_ms`` is
    how long requests shall wait for their call: how many are taken adapts to it; 0 takes them while there is room in the queue.
    """

    max_batch_size: int = 256
    max_batch_bytes: int = MIB
    max_queue_size: int = 4096
    max_in_flight: int = 0
    max_queue_delay_ms: float = 0.0
    max_queue_wait_ms: float = 0.0


ADAPTIVE_IN_FLIGHT = 8
"""Calls under way for each backend where rows are slow: enough to keep a few threads at each stage busy."""

OVERDUE_S = 0.1
"""A call that takes longer than this, and than two usually do, does not keep others from going out: something in it is slow, or
its backend hangs."""


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
        self._groups: dict[tuple[str, str], _Group] = {}
        self._lanes: dict[Hashable, _Lane] = {}
        self._members: set[_Member] = set()
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
        member = _Member(request, loop.create_future(), now, lane, watch, priority)
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

    def _make_room(self, group: _Group, priority: int) -> bool:
        """Refuse one that waits and has a lower priority, if there is any."""
        member = group.less_urgent.least(than=priority)
        if member is None:
            return False
        member.lane.remove(member)
        self._drop_if_empty(member.lane)
        _fail([member], Overloaded("refused for a request of higher priority", model=member.request.model))
        return True

    def load(self, model: str) -> tuple[int, int]:
        """Requests of a model that wait, and calls for it that are under way."""
        groups = [group for (name, _), group in self._groups.items() if name == model]
        return sum(group.n_waiting for group in groups), sum(group.n_in_flight for group in groups)

    async def close(self) -> None:
        """Give up what waits and what is under way."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        _fail(list(self._members), Unavailable("the service is stopping"))
        while self._members or self._calls:
            for call in self._calls:
                call.cancel()
            await asyncio.sleep(0)

    def _lane(self, request: InferRequest, is_mergeable: bool) -> _Lane:
        key = _alike(request) if is_mergeable else object()
        lane = self._lanes.get(key)
        if lane is None:
            place = (request.model, request.version)
            group = self._groups.get(place)
            if group is None:
                self._forget_idle_groups()
                group = self._groups[place] = _Group(self._limits(request.model))
            lane = _Lane(key, group, is_mergeable)
        return lane

    def _forget_idle_groups(self) -> None:
        if len(self._groups) >= _MAX_GROUPS:
            self._groups = {place: each for place, each in self._groups.items() if each.lanes or each.n_in_flight}

    def _drop_if_empty(self, lane: _Lane) -> None:
        if not lane.n_waiting:
            lane.group.lanes.pop(lane.key, None)
            self._lanes.pop(lane.key, None)

    def _pump(self, group: _Group) -> None:
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

    def _start(self, group: _Group, members: list[_Member], is_full: bool) -> None:
        call = asyncio.get_running_loop().create_task(self._call(group, members))
        self._calls.add(call)
        now = self._clock()
        group.calls[call] = now + (0.0 if is_full else max(OVERDUE_S, 2 * group.admission.alone_s))
        call.add_done_callback(lambda _: self._ended(call, group, members))  # also of one that is given up before it began
        aboard = _Aboard(call, len(members))
        for member in members:
            member.aboard = aboard
            if member.watch is not None:
                member.watch.end("queue")

    async def _call(self, group: _Group, members: list[_Member]) -> None:
        started = self._clock()
        if not await self._answer(members):
            return
        took_s = self._clock() - started
        n_rows = sum([member.n_rows for member in members])
        group.cost.learn(n_rows, took_s)
        first = members[0]
        alone_s = max(took_s - group.cost.row_s * (n_rows - first.n_rows), took_s / len(members))
        group.admission.learn(max(first.n_found, len(members)), started - first.since, took_s, min(alone_s, took_s))

    def _ended(self, call: asyncio.Task[None], group: _Group, members: list[_Member]) -> None:
        self._calls.discard(call)
        del group.calls[call]
        if not call.cancelled() and (error := call.exception()) is not None:  # a mistake of ours; nobody shall wait for it
            _fail(members, Internal("internal error"))
            raise error
        self._pump(group)

    async def _answer(self, members: Sequence[_Member]) -> bool:
        """Answer all of them; whether it took one call that succeeded."""
        if len(members) == 1:
            return await self._answer_alone(members[0])
        try:
            response = await self._send(merge([member.request for member in members]))
            parts = split(response, [member.n_rows for member in members])
        except FOR_ALL as error:
            members[0].lane.group.note(error)
            _fail(members, error)
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

    async def _answer_alone(self, member: _Member) -> bool:
        if member.answer.done():
            return False
        try:
            response = await self._send(member.request)
            if member.lane.is_mergeable:
                split(response, [member.n_rows])
        except Exception as error:
            member.lane.group.note(error)
            _fail([member], error)
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
                _fail([member], DeadlineExceeded("out of time before the answer came"))
            else:
                next_deadline = min(next_deadline, member.request.deadline)
        self._sweep_at, self._sweeping = NO_DEADLINE, None
        if next_deadline != NO_DEADLINE:
            self._sweep_later(loop, next_deadline - now)


_MAX_GROUPS = 256
"""So many models and versions are remembered though nothing is asked of them: how slow their rows are."""

_N_ALONE_AT_ONCE = 16
"""Members of a call that failed which are tried on their own side by side."""


class _Group:
    """The lanes of one model and version, and what is under way for it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.lanes: OrderedDict[Hashable, _Lane] = OrderedDict()
        self.n_waiting = 0
        self.n_present = 0
        """Those that wait and those under way."""
        self.admission = AdaptiveLimit(limits.max_queue_wait_ms / 1000)
        self.less_urgent: LessUrgent[_Member] = LessUrgent()
        self.calls: dict[asyncio.Task[None], float] = {}
        """Those under way, with when they keep others from going out no longer."""
        self.cost = RowCost()
        self.is_scheduled = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def n_in_flight(self) -> int:
        return len(self.calls)

    def has_slow_rows(self) -> bool:
        """Whether the rows are what takes time, rather than the call."""
        return self.cost.row_s > max(SLOW_ROW_S, self.admission.alone_s / 4)

    def most_rows(self) -> int:
        """Rows of a merged call. Slow ones are not heaped up until the call is overdue."""
        if not self.has_slow_rows():
            return self.limits.max_batch_size
        return min(self.limits.max_batch_size, max(1, int(OVERDUE_S / self.cost.row_s)))

    def full_reason(self, time_left_s: float) -> str:
        """Why a request can not be taken that has so much time; "" when it can."""
        if self.n_waiting >= self.limits.max_queue_size:
            return f"{self.n_waiting} requests wait already, which is the limit"
        if reason := self.admission.why_full(self.n_present, time_left_s):
            return f"{self.n_present} requests are here already, and {reason}"
        return ""

    def note(self, error: Exception) -> None:
        """A call failed: was there too much to do further on?"""
        if isinstance(error, Overloaded | DeadlineExceeded):
            self.admission.back_off()

    def free_at(self, n_backends: int, now: float) -> float:
        """When another call may go out: 0 for at once, `NO_DEADLINE` for once one has ended."""
        n_in_flight = len(self.calls)
        if self.limits.max_in_flight:
            return 0.0 if n_in_flight < self.limits.max_in_flight * n_backends else NO_DEADLINE
        if n_in_flight < n_backends:
            return 0.0
        if n_in_flight >= ADAPTIVE_IN_FLIGHT * n_backends:
            return NO_DEADLINE
        if self.has_slow_rows():
            return 0.0
        return sorted(self.calls.values())[-n_backends]

    def wait_until(self, when: float, now: float, pump: Callable[[_Group], None]) -> None:
        """Pump again then, unless something does so before."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if when != NO_DEADLINE:
            self._timer = asyncio.get_running_loop().call_later(when - now, pump, self)


class RowCost:
    """What one more row adds to the time of a call: the slope of a line through the calls seen, recent ones weighing more.

    Calls of one size tell nothing of it, and leave what was known.
    """

    _MEMORY = 0.9

    def __init__(self) -> None:
        self.row_s = 0.0
        self._weight = self._rows = self._time = self._rows_rows = self._rows_time = 0.0

    def learn(self, n_rows: int, seconds: float) -> None:
        """A call of so many rows took so long."""
        keep = self._MEMORY
        self._weight = self._weight * keep + 1
        self._rows = self._rows * keep + n_rows
        self._time = self._time * keep + seconds
        self._rows_rows = self._rows_rows * keep + n_rows * n_rows
        self._rows_time = self._rows_time * keep + n_rows * seconds
        variance = self._weight * self._rows_rows - self._rows * self._rows
        if variance > 1e-3 * self._weight * self._rows_rows:
            self.row_s = (self._weight * self._rows_time - self._rows * self._time) / variance


class _Lane:
    """Requests that can be merged with each other, by caller."""

    def __init__(self, key: Hashable, group: _Group, is_mergeable: bool) -> None:
        self.key = key
        self.group = group
        self.is_mergeable = is_mergeable
        self.n_waiting = 0
        self._n_rows = 0
        self._since = 0.0
        self._callers: OrderedDict[Hashable, dict[_Member, None]] = OrderedDict()

    def add(self, member: _Member) -> None:
        if not self.n_waiting:
            self._since = member.since
            self.group.lanes[self.key] = self
        queue = self._callers.get(member.request.caller)
        if queue is None:
            queue = self._callers[member.request.caller] = {}
        queue[member] = None
        self.n_waiting += 1
        self.group.n_waiting += 1
        self.group.n_present += 1
        member.n_found = self.group.n_present
        self._n_rows += member.n_rows
        if member.priority > HIGHEST_PRIORITY:
            self.group.less_urgent.add(member, member.priority)

    def remove(self, member: _Member) -> None:
        """It does not wait any more: it was taken, or its caller left."""
        caller = member.request.caller
        queue = self._callers[caller]
        del queue[member]
        if queue:
            self._callers.move_to_end(caller)
        else:
            del self._callers[caller]
        member.is_waiting = False
        if member.priority > HIGHEST_PRIORITY:
            self.group.less_urgent.remove(member, member.priority)
        self.n_waiting -= 1
        self.group.n_waiting -= 1
        self._n_rows -= member.n_rows

    def ripe_at(self) -> float:
        """When it may be sent though others could still join."""
        limits = self.group.limits
        if not limits.max_queue_delay_ms or self.group.n_in_flight or self._n_rows >= limits.max_batch_size:
            return 0.0
        return self._since + limits.max_queue_delay_ms / 1000

    def take(self, now: float) -> tuple[list[_Member], bool]:
        """Members of the next call, a request of each caller in turn, and whether it has no room for another like its last."""
        limits = self.group.limits
        most_rows = self.group.most_rows()
        members: list[_Member] = []
        n_rows = n_bytes = 0
        while self._callers:
            member = next(iter(next(iter(self._callers.values()))))
            if member.request.deadline <= now:
                self.remove(member)
                _fail([member], DeadlineExceeded("out of time before it was sent"))
                continue
            n_rows += member.n_rows
            n_bytes += member.n_bytes
            if members and (n_rows > most_rows or n_bytes > limits.max_batch_bytes):
                self._since = member.since
                break
            self.remove(member)
            members.append(member)
        if not members:
            return members, False
        last = members[-1]
        return members, n_rows + last.n_rows > limits.max_batch_size or n_bytes + last.n_bytes > limits.max_batch_bytes


class _Aboard:
    """A call under way and how many of its members still wait for it; without any it is given up."""

    def __init__(self, call: asyncio.Task[None], n_members: int) -> None:
        self._call = call
        self._n_members = n_members

    def leave(self) -> None:
        self._n_members -= 1
        if not self._n_members:
            self._call.cancel()


class _Member:
    """A request and who waits for its answer."""

    __slots__ = (
        "aboard",
        "answer",
        "is_waiting",
        "lane",
        "n_bytes",
        "n_found",
        "n_rows",
        "priority",
        "request",
        "since",
        "watch",
    )

    def __init__(
        self,
        request: InferRequest,
        answer: asyncio.Future[InferResponse],
        since: float,
        lane: _Lane,
        watch: Stopwatch | None,
        priority: int,
    ) -> None:
        self.request = request
        self.watch = watch
        self.answer = answer
        self.since = since
        self.lane = lane
        self.priority = priority
        self.n_found = 0
        self.is_waiting = True
        self.aboard: _Aboard | None = None
        self.n_rows = request.inputs[0].shape[0] if lane.is_mergeable else 1
        self.n_bytes = sum([len(tensor.raw) for tensor in request.inputs])


def _fail(members: Sequence[_Member], error: Exception) -> None:
    for member in members:
        if not member.answer.done():
            member.answer.set_exception(_copied(error))


def _copied(error: Exception) -> Exception:
    """Each caller adds to its error where it happened, so each gets one of its own."""
    if not isinstance(error, SplitserveError):
        return error
    copy = type(error)(error.message, **error.metadata)
    copy.__cause__ = error.__cause__ or error
    return copy


def _alike(request: InferRequest) -> Hashable:
    """Requests with the same can be merged."""
    return (
        request.model,
        request.version,
        tuple([(tensor.name, tensor.datatype, tensor.shape[1:]) for tensor in request.inputs]),
        tuple([(wanted.name, _items(wanted.parameters)) for wanted in request.outputs]) if request.outputs else None,
        _items(request.parameters) if request.parameters else None,
    )


def _items(parameters: Any) -> Hashable:
    return frozenset(parameters.items()) if parameters else None


def merge(requests: Sequence[InferRequest]) -> InferRequest:
    """One request with the rows of all, in order; they are alike."""
    first = requests[0]
    inputs = []
    for index, like in enumerate(first.inputs):
        parts = [request.inputs[index] for request in requests]
        n_rows = sum([part.shape[0] for part in parts])
        inputs.append(Tensor(like.name, like.datatype, (n_rows, *like.shape[1:]), b"".join([part.raw for part in parts])))
    return InferRequest(
        first.model,
        tuple(inputs),
        version=first.version,
        outputs=first.outputs,
        parameters=first.parameters,
        deadline=max([request.deadline for request in requests]),
    )


def split(response: InferResponse, n_rows: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """The outputs cut into parts of so many rows each.

    Raises:
        PairMismatch: an output's rows are not the sum of these.
    """
    total = sum(n_rows)
    for tensor in response.outputs:
        if not tensor.shape or tensor.shape[0] != total:
            raise PairMismatch(f'output "{tensor.name}" has shape {list(tensor.shape)} for {total} rows')
    if len(n_rows) == 1:
        return [response.outputs]
    return list(zip(*[_cut(tensor, n_rows) for tensor in response.outputs], strict=True)) or [()] * len(n_rows)


def _cut(tensor: Tensor, n_rows: Sequence[int]) -> list[Tensor]:
    inner, raw = tensor.shape[1:], tensor.raw
    row_elements = 1
    for size in inner:
        row_elements *= size
    ends = [0]
    for count in n_rows:
        ends.append(ends[-1] + count)
    if itemsize := DATATYPES[tensor.datatype].itemsize:
        row_bytes = row_elements * itemsize
        offsets = [end * row_bytes for end in ends]
    else:
        every = bytes_offsets(tensor)
        offsets = [every[end * row_elements] for end in ends]
    return [
        Tensor(tensor.name, tensor.datatype, (count, *inner), raw[start:end])
        for count, (start, end) in zip(n_rows, pairwise(offsets), strict=True)
    ]
