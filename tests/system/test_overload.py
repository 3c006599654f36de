"""A system at three times its capacity, which is limited by a transform that sleeps, one row at a time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest

from splitserve import publish_predictor, publish_preprocessor, release
from tests.system.models import affine_model
from tests.system.processes import System
from tests.system.sleeping import Sleeping

SLEEP_S = 0.05
ALLOWED_WAIT_S = 0.5
SECONDS = 6.0
N_FEATURES = 3
PATH = "/v2/models/slow/infer"


@pytest.fixture(params=["split", "fused"])
def system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[System]:
    rows = np.ones((1, N_FEATURES), np.float32)
    modules = ["tests.system.sleeping"]
    publish_preprocessor(Sleeping(SLEEP_S), rows, name="slow", repository=tmp_path, trusted_modules=modules)
    publish_predictor(affine_model(N_FEATURES, 2, 1), rows, name="slow", repository=tmp_path)
    release("slow", "1.1", repository=tmp_path, accept_unknown_features=True, trusted_modules=modules)
    running = System(
        tmp_path,
        is_fused=request.param == "fused",
        PYTHONPATH=str(Path(__file__).parents[2]),
        PREPROCESS_TRUSTED_MODULES=modules[0],
        PROXY_MAX_BATCH_SIZE="1",
        PROXY_MAX_IN_FLIGHT="1",
        PROXY_MAX_QUEUE_WAIT_MS=str(1000 * ALLOWED_WAIT_S),
    )
    yield running.wait_until_settled()
    running.stop()


class Answer(NamedTuple):
    """The outcome of one request; times in seconds since the load began."""

    sent: float
    ended: float
    status: int
    body: dict[str, object]


class Load:
    """Sends numbered rows and records the answers."""

    def __init__(self, system: System) -> None:
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(base_url=f"http://{system.http}", timeout=60, limits=limits)
        self._began = asyncio.get_running_loop().time()
        self.answers: list[Answer] = []

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()

    def now(self) -> float:
        return asyncio.get_running_loop().time() - self._began

    async def ask(self, number: int) -> None:
        sent = self.now()
        data = [float(number)] * N_FEATURES
        tensor = {"name": "features", "datatype": "FP32", "shape": [1, N_FEATURES], "data": data}
        answer = await self._client.post(PATH, json={"inputs": [tensor]})
        self.answers.append(Answer(sent, self.now(), answer.status_code, answer.json()))
        if answer.status_code == 200:
            assert answer.json()["outputs"][0]["data"] == [2 * value + 1 for value in data]
        else:
            assert "retry-after" in answer.headers

    async def closed(self, n_callers: int) -> None:
        async def call() -> None:
            while self.now() < SECONDS:
                await self.ask(len(self.answers))

        await asyncio.gather(*(call() for _ in range(n_callers)))

    async def open(self, rate: float) -> None:
        calls = []
        for number in range(int(rate * SECONDS)):
            await asyncio.sleep(max(0.0, number / rate - self.now()))
            calls.append(asyncio.create_task(self.ask(number)))
        await asyncio.gather(*calls)

    def goodput(self) -> float:
        return sum(answer.status == 200 and answer.ended < SECONDS for answer in self.answers) / SECONDS


@pytest.mark.long  # needs the machine to itself; tests/batching/test_admission.py does the same in virtual time
async def test_beyond_saturation_throughput_does_not_drop(system: System) -> None:
    """P-12: nine tenths of the peak at least; the others get 429 while the first are still served; every answer is correct.

    Waiting is measured by how many requests were answered meanwhile, which does not depend on the machine's speed.
    """
    async with Load(system) as few:
        await few.closed(8)
    peak = few.goodput()
    assert Counter(answer.status for answer in few.answers) == {200: len(few.answers)}

    async with Load(system) as many:
        await many.open(3 / SLEEP_S)

    assert many.goodput() >= 0.9 * peak
    assert {answer.status for answer in many.answers} == {200, 429}
    good = [answer for answer in many.answers if answer.status == 200]
    refused = [answer for answer in many.answers if answer.status == 429]
    assert len(refused) > len(good) / 2
    assert {answer.body["reason"] for answer in refused} == {"OVERLOADED"}
    prompt = sorted(answered_meanwhile(each, good) for each in refused)
    assert prompt[int(0.9 * (len(prompt) - 1))] <= 2
    settled = sorted(answered_meanwhile(each, good) for each in good if each.sent > SECONDS / 2)
    assert settled[int(0.99 * (len(settled) - 1))] <= 3 * ALLOWED_WAIT_S / SLEEP_S


def answered_meanwhile(one: Answer, others: list[Answer]) -> int:
    """How many others were answered while this one was in flight."""
    return sum(one.sent < other.ended < one.ended for other in others)
