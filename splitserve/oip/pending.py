"""A request in progress, and the two ways to receive its answer: a callback or ``await``.

Knows no queue and no transport: anything that takes a callback and can be cancelled fits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol, TypeVar

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


def begin_task(answer: Coroutine[Any, Any, T], on_answer: Callable[[T | Exception], None]) -> Pending:
    """Run ``answer`` in a task of its own and call ``on_answer`` with its result, or with its exception."""
    # The task is that of the coroutine itself: one around it, cancelled before its first step, would never await it.
    task = asyncio.get_running_loop().create_task(answer)
    task.add_done_callback(partial(_deliver, on_answer))
    return task


def _deliver(on_answer: Callable[[T | Exception], None], task: asyncio.Task[T]) -> None:
    if task.cancelled():
        return
    error = task.exception()
    if error is None:
        on_answer(task.result())
    elif isinstance(error, Exception):
        on_answer(error)
