"""Worker processes that are started before it is known what there is to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitserve.scoring.engines import processes
from splitserve.scoring.engines.processes import SMALLEST_SHARE, StartedEarly, n_needed
from tests.command_line import run_command

pytestmark = pytest.mark.xdist_group("scoring")


@pytest.mark.parametrize(
    ("path", "expected"),
    [("small", 1), ("large", 3), (".", 1), ("*.csv", 1), ("memory://t.csv", 1), ("absent", 0), ("nul\0", 0)],
)
def test_workers_are_started_for_what_is_surely_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, expected: int
) -> None:
    """A small table on a machine of many cores starts one."""
    monkeypatch.chdir(tmp_path)
    Path("small").write_text("a")
    with Path("large").open("wb") as file:
        file.truncate(2 * SMALLEST_SHARE)

    assert n_needed(path, 64) == expected


@pytest.mark.heavy
def test_a_worker_that_is_not_needed_ends_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    """Its connection is closed before a job came."""
    with StartedEarly(1) as started:
        worker = started.take()
        worker.connection.close()

        assert worker.wait() == 0

    assert capfd.readouterr() == ("", "")


@pytest.mark.heavy
def test_workers_that_nobody_took_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that fails before its first row leaves none behind."""
    made: list[processes.WorkerProcess] = []

    class Noted(processes.WorkerProcess):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(processes, "WorkerProcess", Noted)
    (tmp_path / "t.csv").write_text("a\n1\n")

    done = run_command("batch", "m", tmp_path / "t.csv", tmp_path / "out.csv", "--repository", tmp_path / "absent")

    assert done.exit_code == 1
    assert len(made) == 1
    assert made[0].connection.closed
    assert made[0].wait() == -9
