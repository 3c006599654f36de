"""Calls as steps: generators that say what to send and how long to wait, run by a client that blocks or one that awaits.

So that retries and deadlines are written once, and tested without a server. Knows no transport.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from itertools import count
from typing import Any, Literal, NamedTuple, TypeVar

from splitserve.client.retries import Failed, Retries
from splitserve.errors import DeadlineExceeded
from splitserve.oip.messages import InferRequest

Verb = Literal["live", "ready", "model_ready", "server_metadata", "model_metadata", "index", "infer"]

T = TypeVar("T")


class Ask(NamedTuple):
    """One question to a server: a verb of the protocol, and what it is about."""

    verb: Verb
    model: str = ""
    version: str = ""
    request: InferRequest | None = None


class Send(NamedTuple):
    """A step: send this, and come back with the answer, or throw `Failed`."""

    ask: Ask
    timeout_s: float


class Wait(NamedTuple):
    """A step: let so many seconds pass."""

    seconds: float


Steps = Generator[Send | Wait, Any, T]


def attempts(ask: Ask, deadline: float, retries: Retries, clock: Callable[[], float] = time.monotonic) -> Steps[Any]:
    """Ask until there is an answer, or until nothing is to be gained from asking again.

    Args:
        ask: the question.
        deadline: point on the clock; no attempt is begun, and none waited for, beyond it.
        retries: of the client.
        clock: monotonic, in seconds.

    Raises:
        SplitserveError: the last attempt's.
        DeadlineExceeded: out of time before the first.
    """
    for n_failures in count(1):
        timeout_s = deadline - clock()
        if timeout_s <= 0:
            raise DeadlineExceeded("out of time before the server was called")
        try:
            answer = yield Send(ask, timeout_s)
        except Failed as failure:
            delay_s = retries.delay_s(failure, n_failures)
            if delay_s is None or clock() + delay_s >= deadline:
                raise failure.error from failure.__cause__
        else:
            retries.succeeded()
            return answer
        yield Wait(delay_s)
    raise AssertionError("count() does not end")


def run(steps: Steps[T], send: Callable[[Send], Any], wait: Callable[[float], Any] = time.sleep) -> T:
    """Take the steps, blocking."""
    proceed: Callable[[], Send | Wait] = partial(next, steps)
    while True:
        try:
            step = proceed()
        except StopIteration as end:
            result: T = end.value
            return result
        if isinstance(step, Wait):
            wait(step.seconds)
            proceed = partial(steps.send, None)
            continue
        try:
            proceed = partial(steps.send, send(step))
        except Failed as failure:
            proceed = partial(steps.throw, failure)


async def run_async(steps: Steps[T], send: Callable[[Send], Awaitable[Any]], wait: Callable[[float], Awaitable[Any]]) -> T:
    """Take the steps, awaiting."""
    proceed: Callable[[], Send | Wait] = partial(next, steps)
    while True:
        try:
            step = proceed()
        except StopIteration as end:
            result: T = end.value
            return result
        if isinstance(step, Wait):
            await wait(step.seconds)
            proceed = partial(steps.send, None)
            continue
        try:
            proceed = partial(steps.send, await send(step))
        except Failed as failure:
            proceed = partial(steps.throw, failure)
