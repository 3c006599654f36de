"""Runs that are killed at random moments, until one gets to its end."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from splitserve.scoring.runs import ScoringOptions, plan, run
from tests.demo_models import Demos
from tests.scoring.test_local_engine import PROGRAM

pytestmark = pytest.mark.long

N_KILLS = 10
LONGEST_S = 8.0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("output", ["out.parquet", "out"])
def test_ten_kills_change_no_byte(demos: Demos, tmp_path: Path, output: str) -> None:
    """Of one file, or of those in a folder; and every row is counted once."""
    frame = pd.concat([demos.models["penguins"].rows] * 600, ignore_index=True)
    frame.assign(id=range(len(frame))).to_parquet(tmp_path / "in.parquet", row_group_size=8192, index=False)
    options = ScoringOptions(repository=str(demos.repository), keep=("id",), workers=2, shard_rows=8192)
    random.seed(output)

    whole = plan("penguins", str(tmp_path / "in.parquet"), str(tmp_path / "whole" / output), options)
    run(whole, options)
    for _ in range(N_KILLS):
        arguments = [sys.executable, "-c", PROGRAM, str(demos.repository), str(tmp_path / "in.parquet"), str(tmp_path / output)]
        with subprocess.Popen(arguments, start_new_session=True, stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(random.uniform(0.5, LONGEST_S))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
    planned = plan("penguins", str(tmp_path / "in.parquet"), str(tmp_path / output), options)
    summary = run(planned, options)

    assert (summary.rows, summary.scored) == (len(frame), len(frame))
    assert files(tmp_path / output) == files(tmp_path / "whole" / output)


def files(path: Path) -> dict[str, bytes]:
    """The bytes of the output's files."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {each.name: each.read_bytes() for each in path.glob("part-*")}
