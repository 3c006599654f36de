"""Calls as steps: generators that yield what to send and how long to wait, run by the blocking and the async client.

So retries and deadlines are written once and tested without a server. Knows no transport.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Generator, Hashable, Mapping
from functools import partial
from itertools import count
from typing import Any, Literal, NamedTuple, TypeVar

from splitserve.client.retries import Failed, Retries
from splitserve.errors import DeadlineExceeded, SplitserveError
from splitserve.jobs.records import JobOptions
from splitserve.oip.messages import InferRequest

JobVerb = Literal["submit", "job", "job_result", "job_delete", "jobs"]
Verb = Literal["live", "ready", "model_ready", "server_metadata", "model_metadata", "index", "load", "infer"] | JobVerb

T = TypeVar("T")


class JobAsk(NamedTuple):
    """What a verb of jobs has besides model and version: which job, how it is submitted, which are listed."""

    id: str = ""
    wait_s: float = 0.0
    options: JobOptions = JobOptions()
    keep_ended: bool = False
    status: str = ""
    limit: int = 0
    after: str = ""


class Ask(NamedTuple):
    """A verb of the protocol and its arguments."""

    verb: Verb
    model: str = ""
    version: str = ""
    request: InferRequest | None = None
    job: JobAsk | None = None
    headers: Mapping[str, str] | None = None
    """Of this call, beside those of the client."""


class Send(NamedTuple):
    """A step: send this, then resume the generator with the result, or throw `Failed` into it."""

    ask: Ask
    timeout_s: float


class Wait(NamedTuple):
    """A step: sleep."""

    seconds: float


class Once(NamedTuple):
    """A step: run these steps while no other call of the client runs some for the same key, then resume with their result."""

    key: Hashable
    steps: Callable[[], Steps[Any]]


Steps = Generator[Send | Wait | Once, Any, T]


def attempts(ask: Ask, deadline: float, retries: Retries, clock: Callable[[], float] = time.monotonic) -> Steps[Any]:
    """Send until an attempt succeeds or no further one is allowed.

    Args:
        ask: what is sent.
        deadline: point on the clock after which no attempt begins.
        retries: of the client.
        clock: monotonic, in seconds.

    Raises:
        SplitserveError: of the last attempt.
        DeadlineExceeded: the deadline passed before the first attempt.
    """
    for n_failures in count(1):
        timeout_s = deadline - clock()
        if timeout_s <= 0:
            raise DeadlineExceeded("deadline exceeded before the server was called")
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


def run(
    steps: Steps[T],
    send: Callable[[Send], Any],
    wait: Callable[[float], Any] = time.sleep,
    once: Callable[[Once], Any] | None = None,
) -> T:
    """Run the steps, blocking. ``once`` runs the steps of a `Once`."""
    proceed: Callable[[], Send | Wait | Once] = partial(next, steps)
    while True:
        try:
            step = proceed()
        except StopIteration as end:
            result: T = end.value
            return result
        try:
            if isinstance(step, Send):
                answer = send(step)
            elif isinstance(step, Wait):
                answer = wait(step.seconds)
            else:
                answer = once(step) if once else run(step.steps(), send, wait)
        except (Failed, SplitserveError) as failure:
            proceed = partial(steps.throw, failure)
        else:
            proceed = partial(steps.send, answer)


async def run_async(
    steps: Steps[T],
    send: Callable[[Send], Awaitable[Any]],
    wait: Callable[[float], Awaitable[Any]],
    once: Callable[[Once], Awaitable[Any]] | None = None,
) -> T:
    """Run the steps on an event loop."""
    proceed: Callable[[], Send | Wait | Once] = partial(next, steps)
    while True:
        try:
            step = proceed()
        except StopIteration as end:
            result: T = end.value
            return result
        try:
            if isinstance(step, Send):
                answer = await send(step)
            elif isinstance(step, Wait):
                answer = await wait(step.seconds)
            else:
                answer = await (once(step) if once else run_async(step.steps(), send, wait))
        except (Failed, SplitserveError) as failure:
            proceed = partial(steps.throw, failure)
        else:
            proceed = partial(steps.send, answer)
