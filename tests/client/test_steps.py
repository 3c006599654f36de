"""Retries and deadlines, without a server and without time passing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from splitserve.client.retries import BACKOFF, Failed, Retries
from splitserve.client.steps import Ask, Send, attempts, run
from splitserve.errors import DeadlineExceeded, InvalidInput, Unavailable
from splitserve.remote.retry_budget import MAX_TOKENS

ASK = Ask("infer", "m")


class World:
    """A clock that advances when a call waits, and a server that fails as scripted."""

    def __init__(self, *failures: Failed) -> None:
        self.now = 100.0
        self.sent: list[float] = []
        self._failures = list(failures)

    def send(self, step: Send) -> Any:
        self.sent.append(step.timeout_s)
        if self._failures:
            raise self._failures.pop(0)
        return "answer"

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def call(self, *, timeout_s: float = 60, retries: Retries | None = None) -> Any:
        steps = attempts(ASK, self.now + timeout_s, retries or plain(5), lambda: self.now)
        return run(steps, self.send, self.wait)


def plain(max_attempts: int, uniform: Callable[[float, float], float] = lambda low, high: high) -> Retries:
    return Retries(max_attempts, uniform=uniform)


def gone(retry_after_s: float | None = None) -> Failed:
    return Failed(Unavailable("gone"), can_retry=True, retry_after_s=retry_after_s)


def test_pauses_grow_and_the_time_left_shrinks() -> None:
    """Twice as long each time; each attempt has what remains of the deadline."""
    world = World(gone(), gone(), gone())

    assert world.call() == "answer"
    assert world.sent == pytest.approx([60, 59.9, 59.7, 59.3])


def test_pauses_are_finite() -> None:
    """However often a request is tried."""
    assert plain(10_000).delay_s(gone(), 5_000) == BACKOFF.most_s


def test_pauses_are_random() -> None:
    """Clients that failed together do not retry together: between half and all of the pause."""
    bounds: list[tuple[float, float]] = []

    World(gone()).call(retries=plain(2, lambda low, high: bounds.append((low, high)) or high))

    assert bounds == [(0.5, 1)]


def test_the_servers_push_back_is_honoured() -> None:
    """Retry-After and pushback take the place of our own pause, and are never shortened."""
    world = World(gone(retry_after_s=7))

    world.call(retries=plain(2, lambda low, high: low))

    assert world.now == 107


def test_attempts_are_bounded() -> None:
    """The last failure is the caller's."""
    world = World(*[gone()] * 9)

    with pytest.raises(Unavailable, match="gone"):
        world.call(retries=plain(3))

    assert len(world.sent) == 3


def test_an_attempt_that_is_not_retryable_ends_the_call() -> None:
    """The transport knows which failures those are."""
    world = World(Failed(InvalidInput("bad")))

    with pytest.raises(InvalidInput):
        world.call()

    assert len(world.sent) == 1


def test_no_pause_extends_beyond_the_deadline() -> None:
    """If the next attempt would begin after the deadline, the failure is raised at once."""
    world = World(gone(retry_after_s=10))

    with pytest.raises(Unavailable):
        world.call(timeout_s=10)

    assert world.now == 100


def test_a_deadline_that_passed_before_the_first_attempt_sends_nothing() -> None:
    """No work is begun for a caller that no longer waits."""
    world = World()

    with pytest.raises(DeadlineExceeded):
        world.call(timeout_s=0)

    assert world.sent == []


def test_the_budget_stops_retries_to_a_server_that_only_fails() -> None:
    """Half of the tokens are for retries; from then on every call is one attempt."""
    retries, sent = plain(5), 0
    for _ in range(100):
        world = World(*[gone()] * 5)
        with pytest.raises(Unavailable):
            world.call(retries=retries)
        sent += len(world.sent)

    assert sent == 100 + MAX_TOKENS / 2


def test_successes_refill_the_budget() -> None:
    """Eight answers allow one retry."""
    retries = plain(2)
    for _ in range(100):
        with pytest.raises(Unavailable):
            World(gone(), gone()).call(retries=retries)
    for _ in range(8):
        World().call(retries=retries)

    assert World(gone()).call(retries=retries) == "answer"


def test_at_least_one_attempt_is_needed() -> None:
    """Zero would send nothing."""
    with pytest.raises(ValueError, match="max_attempts"):
        Retries(0)
