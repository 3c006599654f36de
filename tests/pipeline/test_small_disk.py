"""A disk that is full or cannot be written: what a run says then, what is recorded, and that the same command continues later.

The disks are real ones, of 24 MB in memory, mounted where only the test's own process sees them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.pipeline.small_disk import WRITES

pytestmark = [pytest.mark.training, pytest.mark.timeout(600), pytest.mark.xdist_group("pipeline")]

UNSHARE = ["unshare", "--map-root-user", "--mount"]


@pytest.fixture(scope="module")
def happened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Outcomes before and after there is room, and the errors that were printed, by scenario."""
    folder = tmp_path_factory.mktemp("disks")
    mount = [*UNSHARE, "mount", "-t", "tmpfs", "none", str(folder)]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    command = [*UNSHARE, sys.executable, "-W", "ignore", "-m", "tests.pipeline.small_disk", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("scenario", [*WRITES, "read-only artifacts"])
def test_a_disk_that_cannot_be_written_fails_the_step(happened: dict[str, Any], scenario: str):
    """It says so, marks the step and the run as failed, and runs nothing downstream; with room, the same command continues."""
    before, after, printed = happened[scenario]

    reason = "Read-only file system" if scenario == "read-only artifacts" else "No space left on device"
    last = printed.splitlines()[-1]
    assert last.startswith("step data failed: ")
    assert f"{reason}; what has finished is kept, and the same command continues" in last
    assert before == {
        "code": 1,
        "steps": {"data": "failed"},
        "finished": [],
        "attempts": [],
        "mlflow": {"tiny": "FAILED", "data": "FAILED"},
    }
    assert after == {"code": 0, "steps": {"data": "finished"}, "finished": ["data"], "attempts": []}


def test_a_store_that_cannot_be_written_ends_the_run_before_it_begins(happened: dict[str, Any]):
    """With the file that cannot be written."""
    before, after, printed = happened["a read-only store"]

    assert before == {"code": 1}
    assert "/store/lock: Read-only file system; what has finished is kept" in printed
    assert after["code"] == 0
