"""A request in progress, and the two ways to receive its answer: a callback or ``await``.

Knows no queue and no transport: anything that takes a callback and can be cancelled fits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, TypeVar

T = TypeVar("T")


class Pending(Protocol):
    """A request in progress. An `asyncio.Task` is one."""

    def cancel(self) -> object:
        """Abandon the request: its callback is not called after this. No effect once it has been called."""
        ...


async def awaited(begin: Callable[[Callable[[T | Exception], None]], Pending]) -> T:
    """Await what ``begin`` starts. Cancelling the awaiting task cancels the request.

    Args:
        begin: takes the callback; may raise at once.

    Raises:
        Exception: the one that the callback received.
    """
    answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    pending = begin(partial(_settle, answer))
    try:
        return await answer
    finally:
        pending.cancel()


def _settle(answer: asyncio.Future[T], outcome: T | Exception) -> None:
    if answer.done():
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


def begin_task(answer: Callable[[], Awaitable[T]], on_answer: Callable[[T | Exception], None]) -> Pending:
    """Await what ``answer`` returns in a task of its own, and call ``on_answer`` with the result or the exception.

    ``answer`` is called in the task, so that a task cancelled before its first step leaves no coroutine that is never awaited.
    """
    return asyncio.get_running_loop().create_task(_answer(answer, on_answer))


async def _answer(answer: Callable[[], Awaitable[T]], on_answer: Callable[[T | Exception], None]) -> None:
    # A callback of the task would cost another iteration of the event loop.
    try:
        outcome: T | Exception = await answer()
    except Exception as error:
        outcome = error
    on_answer(outcome)
