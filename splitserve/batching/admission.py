"""Admission control: how many requests of one model may be queued and in flight before the next is refused.

The limit adapts so that accepted requests do not wait longer than a setting allows. It is the gradient algorithm of Envoy's
adaptive concurrency filter and Netflix' concurrency-limits, on two measurements of each completed call: how long its oldest
request was in the system, and how many requests were there when that one arrived.

    gradient = (unloaded latency + allowed wait) / (wait + call)     between 0.5 and 2
    limit    = requests found * gradient                             approached by a fifth, if lower than the limit
               requests found * gradient + sqrt(requests found)      adopted at once, if higher

The unloaded latency is that of a call for a single request: the least seen, minus the cost of the other rows in that call. The
allowed wait is a setting, but at least a few such calls: waiting for the call in flight is how requests are merged. The published
algorithms lower the limit now and then to measure the unloaded latency; this one does not need to. A limit that is not reached
stays as it is. Until the limit has come down, requests whose estimated wait is more than twice the allowed one are refused too.

Knows no requests and no clock. See docs/decisions/0014-adaptive-admission.md.
"""

from __future__ import annotations

import math
from typing import Generic, Literal, TypeVar

T = TypeVar("T")

RefusalKind = Literal["queue_full", "queue_wait", "deadline", "background"]

_KINDS: tuple[tuple[str, RefusalKind], ...] = (
    ("max_queue_size", "queue_full"),
    ("max_background_wait_ms", "background"),
    ("request's deadline", "deadline"),
)
"""What a reason contains; any other is about the queue wait."""


def kind_of_refusal(reason: str) -> RefusalKind:
    """What a reason for which a request is refused is about."""
    return next((kind for part, kind in _KINDS if part in reason), "queue_wait")


FIRST_LIMIT = 256
"""The limit before the first measurement."""

LEAST_LIMIT = 16
"""The limit never falls below this: a stall of one second with few requests says nothing about capacity. Where so few really
wait too long, the estimated wait refuses them."""

_LEAST_GRADIENT, _MOST_GRADIENT = 0.5, 2.0
"""Source: Envoy, "Adaptive Concurrency"."""

_STEP_DOWN = 0.2
"""Source: the smoothing of Netflix' Gradient2. One call that was delayed by chance costs at most a tenth of the limit."""

_BACK_OFF = 0.9
"""Source: Netflix' AIMD limit, for dropped calls."""

CALLS_WORTH_WAITING = 4
"""The least allowed wait, in calls for a single request, for any setting: below that there is little to merge."""

_FORGET = 1.01
"""Each sample raises the least latency seen by a hundredth, so that a stage that has become slower is recognised."""


class AdaptiveLimit:
    """The limit of one queue.

    Args:
        allowed_wait_s: how long requests may be queued; 0: any time, and there is no limit.
    """

    __slots__ = ("_allowed_s", "_allowed_wait_s", "_request_s", "alone_s", "limit")

    def __init__(self, allowed_wait_s: float) -> None:
        self._allowed_wait_s = allowed_wait_s
        self._allowed_s = math.inf
        self._request_s = 0.0
        self.alone_s = 0.0
        """The unloaded latency: seconds of a call for a single request; 0 before the first measurement."""
        self.limit = float(FIRST_LIMIT) if allowed_wait_s else math.inf

    def learn(self, n_found: int, wait_s: float, call_s: float, alone_s: float) -> None:
        """Record a completed call, by its oldest request.

        Args:
            n_found: requests in the system when it arrived, itself included; at least the number of requests in the call.
            wait_s: how long it was queued.
            call_s: how long the call took.
            alone_s: how long the call would have taken for this request only.
        """
        self.alone_s = min(alone_s, self.alone_s * _FORGET) if self.alone_s else alone_s
        if not self._allowed_wait_s:
            return
        total_s = wait_s + call_s
        self._request_s = total_s / n_found if wait_s > call_s else 0.0
        self._allowed_s = self.alone_s + max(self._allowed_wait_s, CALLS_WORTH_WAITING * self.alone_s)
        gradient = min(_MOST_GRADIENT, max(_LEAST_GRADIENT, self._allowed_s / max(total_s, 1e-9)))
        if gradient < 1.0:
            if (aim := n_found * gradient) < self.limit:
                self.limit = max(float(LEAST_LIMIT), self.limit + (aim - self.limit) * _STEP_DOWN)
        elif (aim := n_found * gradient + math.sqrt(n_found)) > self.limit:
            self.limit = aim

    def back_off(self) -> None:
        """Lower the limit: the next stage was overloaded, or did not answer in time."""
        self.limit = max(float(LEAST_LIMIT), self.limit * _BACK_OFF)

    def refusal_reason(self, n_present: int, time_left_s: float) -> str:
        """Why a request is refused; "" if it is accepted.

        Args:
            n_present: requests that are queued and in flight.
            time_left_s: until its deadline.
        """
        if n_present >= self.limit:
            return "estimated queue wait exceeds its limit"
        expected_s = n_present * self._request_s  # 0 unless requests queue up
        if expected_s > 2 * self._allowed_s:
            return "estimated queue wait exceeds its limit"
        if expected_s > time_left_s:
            return "estimated queue wait exceeds the request's deadline"
        return ""


HIGHEST_PRIORITY = 1
"""The priority of requests that name none, or 0: a caller can lower its priority, not raise it."""


BACKGROUND_PRIORITY = 1000
"""From this priority on requests are background work, such as jobs: they take the rows of a batch that others leave over, and the
admission limit neither counts them nor learns from them."""

FORGET_WAIT_S = 1.0
"""How long a measured queue wait holds background requests back."""


class ForegroundWait:
    """How long requests that are not background work wait in the queue, to hold background work back.

    Args:
        allowed_s: the wait up to which background work is accepted; 0: any.
    """

    __slots__ = ("_allowed_s", "_measured_at", "_wait_s")

    def __init__(self, allowed_s: float) -> None:
        self._allowed_s = allowed_s
        self._wait_s = 0.0
        self._measured_at = -math.inf

    def learn(self, wait_s: float, now: float) -> None:
        """Record the wait of a call's oldest request."""
        if now - self._measured_at > FORGET_WAIT_S:
            self._wait_s = 0.0
        self._wait_s += (wait_s - self._wait_s) * _STEP_DOWN
        self._measured_at = now

    def is_long(self, now: float) -> bool:
        """Whether it is longer than allowed, and was measured a short while ago."""
        return 0 < self._allowed_s < self._wait_s and now - self._measured_at <= FORGET_WAIT_S


ACTIVE_S = 1.0
"""For so long after a request that is not background work, another one is expected."""

LEAST_PAUSE_S = 0.01
"""Requests that arrive more often than this leave no pause: background work would use the CPU that they need."""

MOST_CREDIT = 64
"""Rows of background work that may be saved up for one call."""


class BackgroundShare:
    """How many rows of background work the next call may carry, so that other requests hardly notice it.

    While others are active, each of their rows gives room for a share of a row. In a pause of theirs there is room for a small
    call, and once they have been away for `ACTIVE_S` there is no limit.

    Args:
        share: rows of background work for each row of others.
    """

    __slots__ = ("_credit", "_share", "active_at")

    def __init__(self, share: float) -> None:
        self._share = share
        self._credit = 0.0
        self.active_at = -math.inf
        """When a call for others was sent or answered last."""

    def sent(self, n_rows: int, n_background: int, now: float) -> None:
        """Record a call, by its rows of others and of background work.

        One that has more rows than there was room for takes up later room; one of background work alone, what was saved up.
        """
        if n_rows:
            self.active_at = now
            self._credit = max(-10.0 * MOST_CREDIT, min(MOST_CREDIT, self._credit + self._share * n_rows) - n_background)
        else:
            self._credit = min(self._credit, max(0.0, self._credit - n_background))

    def room(self, now: float, pause_s: float) -> float:
        """Rows that the next call may carry; one request may have more if this is at least `MOST_CREDIT`.

        Args:
            now: point on the same clock as for `sent`.
            pause_s: how long others have to be quiet for a pause.
        """
        if now >= self.active_at + ACTIVE_S:
            return math.inf
        return MOST_CREDIT if now >= self.active_at + pause_s else self._credit


class Preemptible(Generic[T]):
    """Queued requests of lower priority, which give way to others when the queue is full. 1 is the highest priority."""

    def __init__(self) -> None:
        self._levels: dict[int, dict[T, None]] = {}

    def add(self, item: T, priority: int) -> None:
        """Append it to those of its priority."""
        self._levels.setdefault(priority, {})[item] = None

    def remove(self, item: T, priority: int) -> None:
        """Remove one that is queued no longer."""
        level = self._levels[priority]
        del level[item]
        if not level:
            del self._levels[priority]

    def lowest(self, *, below: int) -> T | None:
        """The request to refuse in favour of one of priority ``below``: the newest of the lowest priority.

        None if no queued request has a lower priority than that.
        """
        if not self._levels or (lowest := max(self._levels)) <= below:
            return None
        return next(reversed(self._levels[lowest]))
