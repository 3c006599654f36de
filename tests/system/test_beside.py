"""Our client and a third-party client in one process: both register the package ``inference`` with protobuf."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.processes import System

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("beside.py")


def labels(python: str | Path, system: System, other: str, first: str) -> set[str]:
    command = [python, PROGRAM, other, first, system.grpc, system.http]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    return {label for line in lines for label in line.replace("] [", "]|[").split("|")}


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_our_client_and_tritonclient_work_in_one_process(system: System, first: str) -> None:
    """Whichever is imported first, over REST and gRPC, in turn; and they get the same answers."""
    assert len(labels(sys.executable, system, "triton", first)) == 1


@pytest.mark.kserve
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_our_client_and_kserves_work_in_one_process(system: System, first: str) -> None:
    """As with tritonclient; in an environment of its own, which KServe's many dependencies need."""
    assert len(labels(ROOT / ".venv-kserve" / "bin" / "python", system, "kserve", first)) == 1
