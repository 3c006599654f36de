"""What a process says of itself: the lag of its event loop."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

from splitserve.server.lifecycle import background
from splitserve.telemetry.process import BEAT_S, Beats, ProcessMetrics
from splitserve.telemetry.recorders import LATENCY_BOUNDS
from tests.virtual_time import VirtualTimeLoop, run


def test_a_blocked_event_loop_says_so_afterwards(tmp_path: Path) -> None:
    """Blocked for 2 s: that is the lag of the beat that was due meanwhile."""
    metrics = ProcessMetrics()

    async def main() -> None:
        async with background(metrics.measure_lag(Beats(tmp_path / "0.beat"))):
            await asyncio.sleep(1.5 * BEAT_S)
            cast("VirtualTimeLoop", asyncio.get_running_loop())._now += 2.0
            await asyncio.sleep(BEAT_S)

    run(main())

    slow = [count for bound, count in zip(LATENCY_BOUNDS, metrics.lag.counts, strict=False) if bound >= 2.0]
    assert sum(slow) == 1
    assert metrics.lag.sum >= 2.0 - BEAT_S


def test_without_a_beat_there_is_no_age(tmp_path: Path) -> None:
    """Of a worker that has not started yet, or a file that is none."""
    beats = Beats(tmp_path / "0.beat")
    assert beats.age_s() is None

    (tmp_path / "0.beat").write_bytes(b"part")
    assert beats.age_s() is None

    with beats.writing() as beat:
        beat()
    age_s = beats.age_s()
    assert age_s is not None
    assert age_s >= 0
