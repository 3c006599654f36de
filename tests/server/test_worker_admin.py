"""One admin port for several workers: their answers over unix sockets, added up."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from splitserve.server import logs
from splitserve.server.admin import SharedLogLevel, beats_of, worker_listener
from splitserve.server.worker_admin import Workers
from splitserve.server.workers import INDEX_VARIABLE, SOCKETS_VARIABLE
from splitserve.telemetry.families import CPU, FAMILIES, LOOP_LAG, RSS, WORKER_BEAT_AGE, WORKER_UP
from splitserve.telemetry.recorders import LATENCY_BOUNDS, Histogram
from splitserve.telemetry.registry import Snapshot

TIMEOUT_S = 30.0


class Worker:
    """Implements `splitserve.server.admin.Administered`: a worker that has used some CPU."""

    def __init__(self, cpu_s: float, reason: str = "") -> None:
        self.families = {family.name: family for family in FAMILIES}
        self.cpu_s = cpu_s
        self.reason = reason
        self.level = "info"
        self.lag = Histogram(LATENCY_BOUNDS)
        self.lag.observe(1.0)

    async def snapshot(self) -> Snapshot:
        return {CPU.name: {(): self.cpu_s}, RSS.name: {(): 1000}, LOOP_LAG.name: {(): self.lag.read()}}

    async def not_ready_reason(self) -> str:
        return self.reason

    async def set_log_level(self, level: logs.Level) -> None:
        self.level = level


@asynccontextmanager
async def running(monkeypatch: pytest.MonkeyPatch, folder: Path, **workers: Worker) -> AsyncIterator[None]:
    """Workers that listen, by their index: ``_0``, ``_1``."""
    async with AsyncExitStack() as stack:
        for name, worker in workers.items():
            monkeypatch.setenv(SOCKETS_VARIABLE, str(folder))
            monkeypatch.setenv(INDEX_VARIABLE, f"{name[1:]}/2")
            await stack.enter_async_context(worker_listener(worker))
        yield


def up(snapshot: Snapshot) -> dict[str, object]:
    return {index: value for (index,), value in snapshot[WORKER_UP.name].items()}


async def test_one_answer_covers_all_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Counters and histograms are sums; a gauge is shown for each."""
    workers = Workers(tmp_path, 2, timeout_s=TIMEOUT_S)
    async with running(monkeypatch, tmp_path, _0=Worker(1.5), _1=Worker(2.0)):
        found = await workers.snapshot()

    assert found[CPU.name] == {(): 3.5}
    assert found[LOOP_LAG.name][()].sum == 2.0  # type: ignore[union-attr]
    assert found[RSS.name] == {("0",): 1000, ("1",): 1000}
    assert up(found) == {"0": 1, "1": 1}


async def test_a_worker_that_ended_lowers_no_sum(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its last counts stay, also after it was started again; its gauges go."""
    workers = Workers(tmp_path, 2, timeout_s=TIMEOUT_S)
    async with running(monkeypatch, tmp_path, _0=Worker(1.0)):
        async with running(monkeypatch, tmp_path, _1=Worker(10.0)):
            await workers.snapshot()
        ended = await workers.snapshot()
        async with running(monkeypatch, tmp_path, _1=Worker(0.25)):
            again = [await workers.snapshot() for _ in range(2)]

    assert (ended[CPU.name], ended[RSS.name], up(ended)) == ({(): 11.0}, {("0",): 1000}, {"0": 1, "1": 0})
    assert [found[CPU.name] for found in again] == [{(): 11.25}] * 2
    assert up(again[0]) == {"0": 1, "1": 1}


async def test_a_silent_worker_becomes_a_metric(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It accepts and never answers: the scrape does not wait for it longer than its time."""
    silent = socket.socket(socket.AF_UNIX)
    silent.bind(str(tmp_path / "1.sock"))
    silent.listen()
    with silent:
        async with running(monkeypatch, tmp_path, _0=Worker(1.0)), asyncio.timeout(TIMEOUT_S):
            found = await Workers(tmp_path, 2, timeout_s=1.0).snapshot()

    assert up(found) == {"0": 1, "1": 0}
    assert found[CPU.name] == {(): 1.0}


async def test_how_long_a_worker_is_blocked_is_seen_by_another_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its own event loop cannot say so before it wakes up."""
    workers = Workers(tmp_path, 2, timeout_s=TIMEOUT_S)
    with beats_of(tmp_path, 0).writing() as beat:
        beat()
    now = time.monotonic()
    monkeypatch.setattr("splitserve.telemetry.process.time.monotonic", lambda: now + 2.0)

    ages = (await workers.snapshot())[WORKER_BEAT_AGE.name]

    assert ages.keys() == {("0",)}
    assert ages["0",] >= 2.0  # type: ignore[operator]


async def test_the_service_is_ready_if_a_worker_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They share the port, and load the same models."""
    workers = Workers(tmp_path, 2, timeout_s=TIMEOUT_S)
    assert await workers.not_ready_reason() == "no worker answers"

    first, second = Worker(1.0, reason="loading"), Worker(1.0, reason="loading")
    async with running(monkeypatch, tmp_path, _0=first, _1=second):
        assert await workers.not_ready_reason() == "loading"
        second.reason = ""
        assert await workers.not_ready_reason() == ""


async def test_the_log_level_is_that_of_all_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One PUT reaches each."""
    monkeypatch.setattr(logs.LogLevel, "current", "info")
    monkeypatch.setattr(logs.LogLevel, "_least", logs.LogLevel._least)
    first, second = Worker(1.0), Worker(1.0)
    async with running(monkeypatch, tmp_path, _0=first, _1=second):
        await Workers(tmp_path, 2, timeout_s=TIMEOUT_S).set_log_level("debug")

    assert (first.level, second.level, logs.LogLevel.current) == ("debug", "debug", "debug")


async def test_a_worker_that_starts_later_has_the_log_level_that_was_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Or did not answer when it was set: no worker logs at another level than the others."""
    for name in ("current", "_least"):
        monkeypatch.setattr(logs.LogLevel, name, getattr(logs.LogLevel, name))
    await Workers(tmp_path, 2, timeout_s=TIMEOUT_S).set_log_level("debug")
    logs.LogLevel.set("info")  # as a process that starts

    SharedLogLevel(tmp_path).follow()
    followed = logs.LogLevel.current
    (tmp_path / "log-level").write_text("loud")
    SharedLogLevel(tmp_path).follow()
    SharedLogLevel(tmp_path / "nowhere").follow()

    assert (followed, logs.LogLevel.current) == ("debug", "debug")
