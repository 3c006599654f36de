"""What waits and what is under way for a model: lanes of requests that are alike, served caller by caller, and when one may go.

Keeps the order and the counts; what is sent, and who is told of it, is the business of `splitserve.batching.batcher`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol

import msgspec

from splitserve.batching.admission import HIGHEST_PRIORITY, AdaptiveLimit, LessUrgent
from splitserve.batching.pending import OnAnswer
from splitserve.errors import DeadlineExceeded, Overloaded
from splitserve.oip.messages import NO_DEADLINE, InferRequest
from splitserve.oip.statistics import ModelStatistics

MIB = 1024 * 1024

SLOW_ROW_S = 0.002
"""From here on rows cost so much that merging them saves little, and calls side by side keep all stages busy."""

ADAPTIVE_IN_FLIGHT = 8
"""Calls under way for each backend where rows are slow: enough to keep a few threads at each stage busy."""

OVERDUE_S = 0.1
"""A call that takes longer than this, and than two usually do, does not keep others from going out: something in it is slow, or
its backend hangs."""


class BatchLimits(msgspec.Struct, frozen=True):
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


class ModelQueue:
    """The lanes of one model and version, and what is under way for it."""

    def __init__(self, limits: BatchLimits, counts: ModelStatistics) -> None:
        self.limits = limits
        self.counts = counts
        self.lanes: OrderedDict[Hashable, CompatibleRequests] = OrderedDict()
        self.n_waiting = 0
        self.members: set[QueuedRequest] = set()
        """Those that wait and those under way."""
        self.admission = AdaptiveLimit(limits.max_queue_wait_ms / 1000)
        self.less_urgent: LessUrgent[QueuedRequest] = LessUrgent()
        self.calls: set[BatchCall] = set()
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
        """Why a request cannot be taken that has so much time; "" when it can."""
        if self.n_waiting >= self.limits.max_queue_size:
            return f"{self.n_waiting} requests wait already, which is the limit"
        n_present = len(self.members)
        if reason := self.admission.why_full(n_present, time_left_s):
            return f"{n_present} requests are here already, and {reason}"
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
        return sorted([call.overdue_at for call in self.calls])[-n_backends]

    def wait_until(self, when: float, now: float, pump: Callable[[ModelQueue], None]) -> None:
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


class CompatibleRequests:
    """Requests that can be merged with each other, by caller."""

    def __init__(self, key: Hashable, group: ModelQueue, is_mergeable: bool) -> None:
        self.key = key
        self.group = group
        self.is_mergeable = is_mergeable
        self.n_waiting = 0
        self._n_rows = self._n_bytes = 0
        self._since = 0.0
        self._callers: OrderedDict[Hashable, dict[QueuedRequest, None]] = OrderedDict()

    def add(self, member: QueuedRequest) -> None:
        if not self.n_waiting:
            self._since = member.since
            self.group.lanes[self.key] = self
        of_caller = self._callers.get(member.request.caller)
        if of_caller is None:
            of_caller = self._callers[member.request.caller] = {}
        of_caller[member] = None
        self.n_waiting += 1
        group = self.group
        group.n_waiting += 1
        group.members.add(member)
        member.n_found = len(group.members)
        self._n_rows += member.n_rows
        self._n_bytes += member.n_bytes
        if member.priority > HIGHEST_PRIORITY:
            group.less_urgent.add(member, member.priority)

    def remove(self, member: QueuedRequest) -> None:
        """It does not wait any more: it was taken, or its caller left."""
        caller = member.request.caller
        of_caller = self._callers[caller]
        del of_caller[member]
        if of_caller:
            self._callers.move_to_end(caller)
        else:
            del self._callers[caller]
        self._waits_no_more(member)
        self.n_waiting -= 1
        self.group.n_waiting -= 1
        self._n_rows -= member.n_rows
        self._n_bytes -= member.n_bytes

    def _waits_no_more(self, member: QueuedRequest) -> None:
        member.is_waiting = False
        if member.priority > HIGHEST_PRIORITY:
            self.group.less_urgent.remove(member, member.priority)

    def ripe_at(self) -> float:
        """When it may be sent though others could still join."""
        limits = self.group.limits
        if not limits.max_queue_delay_ms or self.group.n_in_flight or self._n_rows >= limits.max_batch_size:
            return 0.0
        return self._since + limits.max_queue_delay_ms / 1000

    def take(self, now: float) -> Batch:
        """What goes out with the next call: a request of each caller in turn."""
        limits = self.group.limits
        most_rows = self.group.most_rows()
        if self._n_rows <= most_rows and self._n_bytes <= limits.max_batch_bytes:
            return self._take_all(now)
        load = Batch([], [], is_full=False)
        n_rows = n_bytes = 0
        while self._callers:
            member = next(iter(next(iter(self._callers.values()))))
            if member.request.deadline <= now:
                self.remove(member)
                load.late.append(member)
                continue
            n_rows += member.n_rows
            n_bytes += member.n_bytes
            if load.members and (n_rows > most_rows or n_bytes > limits.max_batch_bytes):
                self._since = member.since
                break
            self.remove(member)
            load.members.append(member)
        load.is_full = self._is_full(load.members)
        return load

    def _take_all(self, now: float) -> Batch:
        everybody = [member for of_caller in self._callers.values() for member in of_caller]
        self._callers.clear()
        self.group.n_waiting -= self.n_waiting
        self.n_waiting = self._n_rows = self._n_bytes = 0
        load = Batch([], [], is_full=False)
        for member in everybody:
            self._waits_no_more(member)
            if member.request.deadline > now:
                load.members.append(member)
            else:
                load.late.append(member)
        load.is_full = self._is_full(load.members)
        return load

    def _is_full(self, members: list[QueuedRequest]) -> bool:
        """Whether another like the last would be too much."""
        limits, last = self.group.limits, members[-1:]
        n_rows = sum([member.n_rows for member in members + last])
        return n_rows > limits.max_batch_size or sum([member.n_bytes for member in members + last]) > limits.max_batch_bytes


class Batch(msgspec.Struct):
    """Members of a call; those whose time was over before; whether the call has no room for another like its last."""

    members: list[QueuedRequest]
    late: list[QueuedRequest]
    is_full: bool


class BatchCall:
    """A call under way and its members.

    Args:
        members: those that it was sent for.
        overdue_at: when it keeps others from going out no longer.
    """

    __slots__ = ("answered_at", "members", "overdue_at", "sent_at", "task")

    task: asyncio.Task[None]

    def __init__(self, members: list[QueuedRequest], overdue_at: float) -> None:
        self.members = members
        self.overdue_at = overdue_at
        self.sent_at = self.answered_at = 0.0

    def give_up_for_nobody(self) -> None:
        """Cancel it if none of its members is to be told of an answer any more."""
        if not any(member.on_answer for member in self.members):
            self.task.cancel()


class Keeper(Protocol):
    """Where a member is until it is over."""

    def leave(self, member: QueuedRequest) -> None:
        """Nobody waits for its answer any more."""
        ...


class QueuedRequest:
    """A request, and who is to be told of its answer."""

    __slots__ = (
        "_keeper",
        "began",
        "call",
        "is_waiting",
        "lane",
        "n_bytes",
        "n_found",
        "n_rows",
        "on_answer",
        "priority",
        "request",
        "since",
    )

    def __init__(
        self,
        request: InferRequest,
        on_answer: OnAnswer,
        keeper: Keeper,
        lane: CompatibleRequests,
        since: float,
        began: float,
        priority: int,
    ) -> None:
        self.request = request
        self.on_answer: OnAnswer | None = on_answer
        """None once it is over."""
        self._keeper = keeper
        self.lane = lane
        self.since = since
        self.began = began
        self.priority = priority
        self.n_found = 0
        self.is_waiting = True
        self.call: BatchCall | None = None
        inputs = request.inputs
        self.n_rows = inputs[0].shape[0] if lane.is_mergeable else 1
        self.n_bytes = len(inputs[0].raw) if len(inputs) == 1 else sum([len(tensor.raw) for tensor in inputs])

    def cancel(self) -> None:
        """Nobody waits for its answer any more."""
        self._keeper.leave(self)
