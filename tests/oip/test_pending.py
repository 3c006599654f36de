"""A request in progress, awaited or with a callback."""

from __future__ import annotations

import asyncio
import gc
from functools import partial

from splitserve.oip.pending import begin_task


async def test_a_task_calls_back_with_its_result_or_its_error() -> None:
    """Once each."""
    error = ValueError("no")
    outcomes: asyncio.Queue[int | Exception] = asyncio.Queue()

    async def answer(outcome: int | Exception) -> int:
        await asyncio.sleep(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    begin_task(partial(answer, 1), outcomes.put_nowait)
    begin_task(partial(answer, error), outcomes.put_nowait)

    assert [await outcomes.get(), await outcomes.get()] == [1, error]


async def test_a_task_cancelled_before_its_first_step_is_cleaned_up() -> None:
    """No callback, and no coroutine that was never awaited, about which Python warns."""
    outcomes: list[Exception | None] = []

    async def answer() -> None:
        raise AssertionError("begun")

    begin_task(answer, outcomes.append).cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()

    assert outcomes == []
