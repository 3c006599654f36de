"""What happens again and again, or while the clock is set: nothing is left behind, and nothing goes by the clock on the wall."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from pathlib import Path

import numpy as np
import pytest

from splitserve import publish_predictor
from splitserve.errors import NotFound
from splitserve.oip.messages import READY
from splitserve.repository.folder import Repository
from splitserve.runtimes import predictor
from splitserve.server.store import VersionStore
from tests.contracts.faces import served
from tests.system.models import affine_model

ROW = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.5]}


async def test_concurrent_loading_and_unloading_leaves_a_consistent_state(tmp_path: Path) -> None:
    """P-26: 200 wishes for one model, several at a time: each is done or says that there is none, and the last one holds."""
    publish_predictor(affine_model(3, 1, 0), np.ones((2, 3), np.float32), name="m", repository=tmp_path)
    store = VersionStore(Repository(tmp_path), "predict", predictor.load, allow_unreleased_pairs=True)
    await store.refresh()

    async def wish(number: int) -> None:
        with contextlib.suppress(NotFound):
            await (store.unload("m") if number % 2 else store.load("m"))

    for start in range(0, 200, 8):
        await asyncio.gather(*map(wish, range(start, start + 8)))
    await store.load("m")

    assert [(state.name, state.version, state.state) for state in store.catalogue.index()] == [("m", "1", READY)]
    store.choose("m", 1)
    await store.unload("m")
    assert [state.state for state in store.catalogue.index()] == ["UNAVAILABLE"]
    store.close()


async def test_setting_the_system_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """P-34: an hour forth and back between any two looks: deadlines, queues and counters go by the clock that only runs."""
    async with served() as system:
        real = time.time
        hours = itertools.cycle((0, 3600, -3600))
        monkeypatch.setattr(time, "time", lambda: real() + next(hours))
        for _ in range(10):
            answer = await system.rest.post("/v2/models/echo/infer", json={"inputs": [ROW]}, headers={"request-timeout": "20"})
            assert answer.status_code == 200

        counted = system.service.statistics._models[("echo", "2.1")].inference_stats
        assert counted.success.count == 10
        assert 0 <= counted.queue.ns <= counted.success.ns < 60e9
