"""How many requests may be in a queue and in the calls behind it: as many as are answered without waiting too long.

The gradient algorithm of Envoy's adaptive concurrency filter and of Netflix' concurrency-limits, on what is measured here: each
call that ends tells how long the request that had waited longest was in the system, and how many were there when it came.

    gradient = (time alone + allowed wait) / (wait + call)     between 0.5 and 2
    limit    = requests found * gradient                       approached by a fifth where that is less
               requests found * gradient + their root          taken where that is more

The time alone is what a call takes for one request: the least seen, less what other rows in its call cost. The allowed wait is a
setting, and at least that of a few such calls: waiting for the call under way is how requests are merged. The published forms
measure the time without load now and then, at a low limit. A limit that is not used is left as it is. Until it has come down,
what would wait for twice as long as allowed, by the last sample, is refused too.

Knows no requests and no clock. See docs/decisions/0014-adaptive-admission.md.
"""

from __future__ import annotations

import math
from typing import Generic, TypeVar

T = TypeVar("T")

FIRST_LIMIT = 256
"""Requests that may be in the system before anything is known of it."""

LEAST_LIMIT = 16
"""A stall of a second, when only few are there, says nothing of how many there may be. Where so few really wait too long, what is
expected of the wait refuses them."""

_LEAST_GRADIENT, _MOST_GRADIENT = 0.5, 2.0
"""Source: Envoy, "Adaptive Concurrency"."""

_STEP_DOWN = 0.2
"""Source: the smoothing of Netflix' Gradient2. One call that was held up by chance costs a tenth of the limit at most."""

_BACK_OFF = 0.9
"""Source: Netflix' AIMD limit, for calls that were dropped further on."""

CALLS_WORTH_WAITING = 4
"""Requests may wait as long as so many calls for one of them take, whatever the setting: below, there is little to merge."""

_FORGET = 1.01
"""With each sample the least time seen counts for a hundredth more, so that a stage that has become slower is believed."""


class AdaptiveLimit:
    """The limit for one queue.

    Args:
        allowed_wait_s: how long requests may wait for their call; 0: without end, and there is no limit.
    """

    __slots__ = ("_allowed_s", "_allowed_wait_s", "_request_s", "alone_s", "limit")

    def __init__(self, allowed_wait_s: float) -> None:
        self._allowed_wait_s = allowed_wait_s
        self._allowed_s = math.inf
        self._request_s = 0.0
        self.alone_s = 0.0
        """What a call for one request takes, as far as is known."""
        self.limit = float(FIRST_LIMIT) if allowed_wait_s else math.inf

    def learn(self, n_found: int, wait_s: float, call_s: float, alone_s: float) -> None:
        """A request was answered.

        Args:
            n_found: requests in the system when it came, itself included; at least those that its call answered.
            wait_s: how long it waited for its call.
            call_s: how long the call took.
            alone_s: how long it would have taken for this request only.
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
        """A call was refused further on, or not answered in time."""
        self.limit = max(float(LEAST_LIMIT), self.limit * _BACK_OFF)

    def why_full(self, n_present: int, time_left_s: float) -> str:
        """Why a request is not taken that finds so many and has so much time; "" if it is."""
        if n_present >= self.limit:
            return "more would wait too long"
        expected_s = n_present * self._request_s  # 0 where they do not queue up
        if expected_s > 2 * self._allowed_s:
            return "more would wait too long"
        if expected_s > time_left_s:
            return "its turn would come after its deadline"
        return ""


HIGHEST_PRIORITY = 1
"""What requests have that name none, or 0: a caller can only stand back, not push forward."""


class LessUrgent(Generic[T]):
    """Those that wait and may be sent away for others: by priority, of which 1 is the highest."""

    def __init__(self) -> None:
        self._levels: dict[int, dict[T, None]] = {}

    def add(self, item: T, priority: int) -> None:
        """It waits now, behind those of its priority."""
        self._levels.setdefault(priority, {})[item] = None

    def remove(self, item: T, priority: int) -> None:
        """It does not wait any more."""
        level = self._levels[priority]
        del level[item]
        if not level:
            del self._levels[priority]

    def least(self, than: int) -> T | None:
        """The one to send away for a request of priority ``than``: of those with the lowest the one that came last.

        None if nobody's priority is lower.
        """
        if not self._levels or (lowest := max(self._levels)) <= than:
            return None
        return next(reversed(self._levels[lowest]))
