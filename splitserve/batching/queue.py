"""What is queued and in flight for a model: compatible requests together, callers in turn, and when a batch may be sent.

Keeps order and counts. `splitserve.batching.batcher` sends batches and answers callers.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeAlias

import msgspec

from splitserve.batching.admission import (
    HIGHEST_PRIORITY,
    LEAST_PAUSE_S,
    MOST_CREDIT,
    AdaptiveLimit,
    BackgroundShare,
    ForegroundWait,
    Preemptible,
)
from splitserve.errors import DeadlineExceeded, Overloaded
from splitserve.oip.messages import NO_DEADLINE, InferRequest, OnAnswer
from splitserve.oip.statistics import ModelStatistics

MIB = 1024 * 1024

SLOW_ROW_S = 0.002
"""If a row costs at least this, merging saves little, and concurrent calls keep all stages busy."""

ADAPTIVE_IN_FLIGHT = 8
"""Concurrent calls for each backend where rows are slow: enough to keep a few threads of each stage busy."""

OVERDUE_S = 0.1
"""A call that takes longer than this, and than two calls usually do, no longer blocks the next one: something in it is slow, or
its backend hangs."""


class BatchLimits(msgspec.Struct, frozen=True):
    """Limits of the batches of one model.

    ``max_batch_size`` rows and ``max_batch_bytes``, of inputs and of the answers to them, limit what is merged; a request that is
    larger by itself is sent alone.
    ``max_queue_size`` limits the queued requests.
    ``max_in_flight`` limits concurrent calls for each backend; 0 adapts: one where a call costs more than its rows; up to
    `ADAPTIVE_IN_FLIGHT` where the rows cost more, and in addition to calls that are full or take longer than `OVERDUE_S`.
    ``max_queue_delay_ms`` above 0 keeps a request queued for this long although no call is in flight, so that others can join it.
    ``max_queue_wait_ms`` is the target for the longest wait in the queue: the number of accepted requests adapts to it; 0 accepts
    requests up to ``max_queue_size``.
    ``max_background_wait_ms``: while other requests wait longer than this in the queue, background ones are refused; 0: never.
    ``background_share``: rows of background requests that are sent for each row of others, while there are others.
    """

    max_batch_size: int = 256
    max_batch_bytes: int = MIB
    max_queue_size: int = 4096
    max_in_flight: int = 0
    max_queue_delay_ms: float = 0.0
    max_queue_wait_ms: float = 0.0
    max_background_wait_ms: float = 20.0
    background_share: float = 0.05


class ModelQueue:
    """The requests of one model and version: queued by compatibility, or in flight.

    Args:
        limits: of its batches.
        statistics: where its requests are counted.
        call_phase: what a call is to a request: "hop" or "compute".
    """

    def __init__(self, limits: BatchLimits, statistics: ModelStatistics, call_phase: str = "compute") -> None:
        self.loop = asyncio.get_running_loop()  # asking for it costs a system call
        self.limits = limits
        self.statistics = statistics
        self.call_phase = call_phase
        self.compatible: OrderedDict[Hashable, CompatibleRequests] = OrderedDict()
        """Non-empty, in the order in which they get the next call."""
        self.n_queued = 0
        self.requests: set[QueuedRequest] = set()
        """Those queued and those in flight."""
        self.n_background = 0
        """Background requests among them."""
        self.foreground_wait = ForegroundWait(limits.max_background_wait_ms / 1000)
        self.background_share = BackgroundShare(limits.background_share)
        self.admission = AdaptiveLimit(limits.max_queue_wait_ms / 1000)
        self.preemptible: Preemptible[QueuedRequest] = Preemptible()
        self.calls: set[BatchCall] = set()
        """Those in flight."""
        self.cost = RowCost()
        self.is_scheduled = False
        """Whether the event loop will dispatch from this queue in its next iteration."""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def n_in_flight(self) -> int:
        """Calls in flight."""
        return len(self.calls)

    def has_slow_rows(self) -> bool:
        """Whether the rows take most of a call's time, rather than its fixed cost."""
        return self.cost.row_s > max(SLOW_ROW_S, self.admission.alone_s / 4)

    def max_rows(self) -> int:
        """Rows of the next batch at most: ``max_batch_size``, but not so many slow rows that the call is overdue."""
        if not self.has_slow_rows():
            return self.limits.max_batch_size
        return min(self.limits.max_batch_size, max(1, int(OVERDUE_S / self.cost.row_s)))

    def background_at(self, n_backends: int, now: float) -> float:
        """When a call with background requests only may be sent: 0 for at once, `NO_DEADLINE` for not before one has ended.

        It waits for a pause of the others, so that they find few calls in flight; or until there is room that no call of theirs
        could use.
        """
        if len(self.calls) >= n_backends * (2 if self.has_slow_rows() else 1):
            return NO_DEADLINE
        if self.background_share.room(now, self.pause_s) >= MOST_CREDIT:
            return 0.0
        return self.background_share.active_at + self.pause_s

    @property
    def pause_s(self) -> float:
        """How long no other request has to be there for a pause."""
        return max(LEAST_PAUSE_S, 2 * self.admission.alone_s)

    def discard(self, queued: QueuedRequest) -> None:
        """Forget a request that is neither queued nor in flight any more."""
        if queued in self.requests:
            self.requests.remove(queued)
            self.n_background -= queued.is_background

    def discard_all(self, answered: Sequence[QueuedRequest]) -> None:
        """As `discard`, for all requests of a call, of which some may have been forgotten already."""
        if self.n_background:
            self.n_background -= sum([queued.is_background for queued in answered if queued in self.requests])
        self.requests.difference_update(answered)

    def background_refusal_reason(self, now: float) -> str:
        """Why a background request is refused; "" if it is accepted."""
        if self.n_queued >= self.limits.max_queue_size:
            return f"{self.n_queued} requests are queued, the limit is {self.limits.max_queue_size} (max_queue_size)"
        return "other requests wait in the queue (max_background_wait_ms)" if self.foreground_wait.is_long(now) else ""

    def refusal_reason(self, time_left_s: float) -> str:
        """Why a request with so much time until its deadline is refused; "" if it is accepted."""
        if self.n_queued >= self.limits.max_queue_size:
            return f"{self.n_queued} requests are queued, the limit is {self.limits.max_queue_size} (max_queue_size)"
        n_present = len(self.requests) - self.n_background
        if reason := self.admission.refusal_reason(n_present, time_left_s):
            return f"{reason}, {n_present} requests are queued or in flight"
        return ""

    def record_failure(self, error: Exception) -> None:
        """Lower the admission limit if a call failed because the next stage is overloaded."""
        if isinstance(error, Overloaded | DeadlineExceeded):
            self.admission.back_off()

    def free_at(self, n_backends: int, now: float) -> float:
        """When another call may be sent: 0 for at once, `NO_DEADLINE` for not before one has ended."""
        n_in_flight = len(self.calls)
        if self.limits.max_in_flight:
            return 0.0 if n_in_flight < self.limits.max_in_flight * n_backends else NO_DEADLINE
        if n_in_flight < n_backends:
            return 0.0
        if n_in_flight >= ADAPTIVE_IN_FLIGHT * n_backends:
            return NO_DEADLINE
        if self.has_slow_rows():
            return 0.0
        overdue_at = sorted([call.overdue_at for call in self.calls if not call.is_background])
        return overdue_at[-n_backends] if len(overdue_at) >= n_backends else 0.0

    def dispatch_at(self, when: float, now: float, dispatch: Callable[[ModelQueue], None]) -> None:
        """Call ``dispatch`` at ``when``; replaces what was set before. `NO_DEADLINE`: the end of a call will do it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if when != NO_DEADLINE:
            self._timer = self.loop.call_later(when - now, dispatch, self)


class RowCost:
    """The seconds that one more row adds to a call: the slope of a regression line over past calls, recent ones weighted more.

    Calls that all have the same number of rows leave the estimate unchanged.
    """

    _MEMORY = 0.9

    def __init__(self) -> None:
        self.row_s = 0.0
        self._weight = self._rows = self._time = self._rows_rows = self._rows_time = 0.0

    def learn(self, n_rows: int, seconds: float) -> None:
        """Record a call of ``n_rows`` rows."""
        keep = self._MEMORY
        self._weight = self._weight * keep + 1
        self._rows = self._rows * keep + n_rows
        self._time = self._time * keep + seconds
        self._rows_rows = self._rows_rows * keep + n_rows * n_rows
        self._rows_time = self._rows_time * keep + n_rows * seconds
        variance = self._weight * self._rows_rows - self._rows * self._rows
        if variance > 1e-3 * self._weight * self._rows_rows:
            self.row_s = (self._weight * self._rows_time - self._rows * self._time) / variance


_ByCaller: TypeAlias = "OrderedDict[Hashable, dict[QueuedRequest, None]]"


class CompatibleRequests:
    """Queued requests that can be merged with each other, by caller.

    Args:
        key: equal for compatible requests.
        queue: the one that they are part of.
        is_mergeable: whether they have rows; otherwise each is sent alone.
    """

    def __init__(self, key: Hashable, queue: ModelQueue, is_mergeable: bool) -> None:
        self.key = key
        self.queue = queue
        self.is_mergeable = is_mergeable
        self.n_queued = 0
        self._n_rows = self._n_bytes = 0
        self._since = 0.0
        self._foreground: _ByCaller = OrderedDict()
        self._background: _ByCaller = OrderedDict()

    @property
    def has_foreground(self) -> bool:
        """Whether a request that is not background work is queued."""
        return bool(self._foreground)

    def add(self, queued: QueuedRequest) -> None:
        """Append it to the requests of its caller."""
        if not self.n_queued:
            self._since = queued.queued_at
            self.queue.compatible[self.key] = self
        callers = self._background if queued.is_background else self._foreground
        caller = queued.request.caller
        of_caller = callers.get(caller)
        if of_caller is None:
            callers[caller] = {queued: None}
        else:
            of_caller[queued] = None
        self.n_queued += 1
        queue = self.queue
        queue.n_queued += 1
        queue.requests.add(queued)
        queue.n_background += queued.is_background
        queued.n_found = len(queue.requests) - queue.n_background
        self._n_rows += queued.n_rows
        self._n_bytes += queued.n_bytes
        if queued.priority > HIGHEST_PRIORITY:
            queue.preemptible.add(queued, queued.priority)

    def remove(self, queued: QueuedRequest) -> None:
        """Remove one that is sent, or that its caller has cancelled."""
        caller, callers = queued.request.caller, self._background if queued.is_background else self._foreground
        of_caller = callers[caller]
        del of_caller[queued]
        if of_caller:
            callers.move_to_end(caller)
        else:
            del callers[caller]
        queued.is_queued = False
        if queued.priority > HIGHEST_PRIORITY:
            self.queue.preemptible.remove(queued, queued.priority)
        self.n_queued -= 1
        self.queue.n_queued -= 1
        self._n_rows -= queued.n_rows
        self._n_bytes -= queued.n_bytes

    def due_at(self) -> float:
        """When a batch is sent although more requests could join it; 0 for at once."""
        limits = self.queue.limits
        if not limits.max_queue_delay_ms or self.queue.n_in_flight or self._n_rows >= limits.max_batch_size:
            return 0.0
        return self._since + limits.max_queue_delay_ms / 1000

    def take_batch(self, now: float) -> Batch:
        """Remove and return what the next call sends: a request of each caller in turn, up to the limits; background last."""
        queue, limits = self.queue, self.queue.limits
        max_rows = queue.max_rows()
        if not self._background and self._n_rows <= max_rows and self._n_bytes <= limits.max_batch_bytes:
            return self._take_all(now)
        room = queue.background_share.room(now, queue.pause_s)
        batch = Batch([], [], is_full=False)
        n_rows = n_bytes = n_background = 0
        while callers := self._foreground or self._background:
            queued = next(iter(next(iter(callers.values()))))
            if queued.request.deadline <= now:
                self.remove(queued)
                batch.expired.append(queued)
                continue
            if queued.is_background and min(queued.n_rows, MOST_CREDIT) > room - n_background:
                break
            n_rows += queued.n_rows
            n_bytes += queued.n_bytes
            if batch.requests and (n_rows > max_rows or n_bytes > limits.max_batch_bytes):
                self._since = queued.queued_at
                n_rows -= queued.n_rows
                n_bytes -= queued.n_bytes
                break
            if queued.is_background:
                n_background += queued.n_rows
            self.remove(queued)
            batch.requests.append(queued)
        queue.background_share.sent(n_rows - n_background, n_background, now)
        batch.is_full = self._is_full(batch.requests, n_rows, n_bytes)
        return batch

    def _take_all(self, now: float) -> Batch:
        everything = [queued for of_caller in self._foreground.values() for queued in of_caller]
        self._foreground.clear()
        n_rows, n_bytes = self._n_rows, self._n_bytes
        self.queue.background_share.sent(n_rows, 0, now)
        self.queue.n_queued -= self.n_queued
        self.n_queued = self._n_rows = self._n_bytes = 0
        batch = Batch([], [], is_full=False)
        for queued in everything:
            queued.is_queued = False
            if queued.priority > HIGHEST_PRIORITY:
                self.queue.preemptible.remove(queued, queued.priority)
            if queued.request.deadline > now:
                batch.requests.append(queued)
            else:
                batch.expired.append(queued)
                n_rows -= queued.n_rows
                n_bytes -= queued.n_bytes
        batch.is_full = self._is_full(batch.requests, n_rows, n_bytes)
        return batch

    def _is_full(self, requests: list[QueuedRequest], n_rows: int, n_bytes: int) -> bool:
        """Whether another request like the last one would exceed a limit, on top of so many rows and bytes."""
        if not requests:
            return False
        limits, last = self.queue.limits, requests[-1]
        return n_rows + last.n_rows > limits.max_batch_size or n_bytes + last.n_bytes > limits.max_batch_bytes


class Batch(msgspec.Struct):
    """Requests that one call sends; those whose deadline has passed before; whether another like the last would not fit."""

    requests: list[QueuedRequest]
    expired: list[QueuedRequest]
    is_full: bool


class BatchCall:
    """A call in flight.

    Args:
        requests: those that it was sent for.
        overdue_at: from when it no longer blocks the next call.
    """

    __slots__ = ("answered_at", "overdue_at", "requests", "sent_at", "task")

    task: asyncio.Task[None]

    def __init__(self, requests: list[QueuedRequest], overdue_at: float) -> None:
        self.requests = requests
        self.overdue_at = overdue_at
        self.sent_at = self.answered_at = 0.0

    @property
    def is_background(self) -> bool:
        """Whether it has background requests only."""
        return self.requests[0].is_background

    def cancel_if_abandoned(self) -> None:
        """Cancel it if no caller waits for its answer any more."""
        if not any(queued.on_answer for queued in self.requests):
            self.task.cancel()


class QueuedRequest(msgspec.Struct, eq=False):
    """A request that is queued or in flight, and the callback for its answer. What `Batcher.begin` returns.

    ``queued_at`` and ``began_at`` are points on the batcher's clock: work for it may have begun before it was queued. 1 is the
    highest ``priority``. ``n_bytes``: of its inputs or of its answer, whichever is larger.
    """

    request: InferRequest
    on_answer: OnAnswer | None
    """None once it has been called, or the caller has cancelled."""
    on_cancel: Callable[[QueuedRequest], None]
    """Called with this object when the caller cancels."""
    compatible: CompatibleRequests
    """Where it is queued."""
    queued_at: float
    began_at: float
    priority: int
    is_background: bool
    n_rows: int
    n_bytes: int
    n_found: int = 0
    """Requests queued and in flight when it was queued, itself included and background ones excluded."""
    is_queued: bool = True
    call: BatchCall | None = None
    """None while it is queued."""

    def phases(self) -> Mapping[str, float]:
        """Seconds that it was queued, and that its call took, once that has answered it; else nothing."""
        call = self.call
        if call is None or not call.answered_at:
            return {}
        return {"queue": call.sent_at - self.queued_at, self.compatible.queue.call_phase: call.answered_at - call.sent_at}

    def cancel(self) -> None:
        """Abandon it: the callback is not called after this."""
        self.on_cancel(self)
