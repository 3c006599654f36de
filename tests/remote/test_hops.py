"""What crosses a hop besides requests: the remaining time, and why a stage is not ready."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.service import ProxyService
from splitserve.errors import DeadlineExceeded, Unavailable
from splitserve.oip.messages import NO_DEADLINE, InferRequest, InferResponse, deadline_after
from splitserve.remote.inference import MAX_RESERVE_S, MIN_TIME_S, RemoteInference
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor
from splitserve.testing import FakeInference, serving, signature
from splitserve.wire.byte_budget import BudgetExceeded, ByteBudget

ECHO = signature("echo", [TensorSpec("x", "FP32", ("batch", 1))], version="1.1")
LOADING = "waiting for the model repository: s3://models cannot be read"


def request(timeout_s: float) -> InferRequest:
    return InferRequest("echo", (Tensor("x", "FP32", (1, 1), bytes(4)),), version="1.1", deadline=deadline_after(timeout_s))


async def until(claim: Any) -> None:
    async with asyncio.timeout(20):
        while not await claim():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Sending(RemoteInference):
    """Records requests instead of sending them."""

    sent: tuple[InferRequest, float]

    async def _infer_with_retries(self, request: InferRequest, timeout_s: float) -> InferResponse:
        self.sent = (request, timeout_s)
        return InferResponse("echo", "1.1", ())


@pytest.mark.parametrize("timeout_s", [0.05, 20.0])
async def test_each_hop_reserves_part_of_the_remaining_time(timeout_s: float) -> None:
    """P-15: the next stage gets what remains, less a reserve for the way back of its answer or error."""
    remote = Sending("127.0.0.1:1", stage="predict")
    asked = request(timeout_s)

    await remote.infer(asked)

    sent, sent_timeout_s = remote.sent
    assert 0 < asked.deadline - sent.deadline <= MAX_RESERVE_S + 1e-6
    assert sent_timeout_s < timeout_s
    assert sent.deadline > asked.deadline - timeout_s / 2


async def test_without_a_deadline_there_is_no_reserve() -> None:
    """Without a deadline nothing is reserved."""
    remote = Sending("127.0.0.1:1", stage="predict")

    await remote.infer(InferRequest("echo", ()))

    assert remote.sent[0].deadline == NO_DEADLINE


async def test_a_request_without_enough_time_left_is_not_sent() -> None:
    """P-15: with almost no time left the call is refused here."""
    behind = FakeInference(ECHO)
    async with serving(behind) as address, RemoteInference(address, stage="predict") as remote:
        await remote.index()
        with pytest.raises(DeadlineExceeded, match="deadline exceeded before predict was called"):
            await remote.infer(request(MIN_TIME_S / 2))

    assert behind.requests == []


async def test_the_proxy_gives_the_reason_why_a_stage_is_not_ready() -> None:
    """A stage that accepts no calls yet gives the reason, and the proxy passes it on rather than "cannot be reached"."""
    behind = FakeInference(ECHO, not_ready=LOADING)
    behind.is_loaded = False
    async with (
        serving(behind, stage="preprocess") as address,
        RemoteInference(address, stage="preprocess", wait_s=0.1) as remote,
    ):
        proxy = ProxyService(remote)
        await proxy.refresh()
        assert await proxy.not_ready_reason() == f"the preprocess service is not ready: {LOADING}"
        with pytest.raises(Unavailable, match="s3://models cannot be read"):
            await proxy.infer(request(20))

        behind.is_loaded, behind.not_ready = True, ""

        async def is_ready() -> bool:
            await proxy.refresh()
            return not await proxy.not_ready_reason()

        await until(is_ready)
        await proxy.infer(request(20))


async def test_an_unreachable_stage_is_named() -> None:
    """An unreachable stage cannot give a reason itself."""
    async with RemoteInference("127.0.0.1:1", stage="preprocess", wait_s=0.1) as remote:
        proxy = ProxyService(remote)
        await proxy.refresh()

        assert await proxy.not_ready_reason() == "the preprocess service cannot be reached"


@given(st.lists(st.lists(st.integers(0, 50), max_size=5), max_size=20))
def test_bytes_are_released_whatever_the_outcome(wishes: list[list[int]]) -> None:
    """Never more than the budget is held, and nothing once all have ended."""
    budget = ByteBudget(100)

    for wish in wishes:
        try:
            with budget.reservation() as reservation:
                for n_bytes in wish:
                    reservation.reserve(n_bytes)
                    assert budget.used <= 100
        except BudgetExceeded:
            assert sum(wish) > 100
        assert budget.used == 0
