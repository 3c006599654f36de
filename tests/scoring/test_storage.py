"""What is written appears whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from splitserve.scoring.errors import ScoringError
from splitserve.scoring.progress import Progress, duration
from splitserve.scoring.storage import LocalStorage
from tests.scoring.conftest import Scored
from tests.scoring.test_runs import contents


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushed, renamed, and then the folder flushed."""
    target, steps = tmp_path / "in" / "file", []
    fsync, replace = os.fsync, Path.replace

    def note_flush(handle: int) -> None:
        kind = "folder" if Path(f"/proc/self/fd/{handle}").is_dir() else "file"
        steps.append(f"flush {kind}, named: {target.exists()}")
        fsync(handle)

    def note_rename(self: Path, other: Path) -> Path:
        steps.append(f"rename within {self.parent == other.parent}")
        return replace(self, other)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(Path, "replace", note_rename)

    with LocalStorage().writing(str(target)) as file:
        file.write(b"x")

    assert steps == ["flush file, named: False", "rename within True", "flush folder, named: True"]
    assert target.read_bytes() == b"x"


def test_what_was_there_stays_if_writing_fails(tmp_path: Path) -> None:
    """And nothing is left beside it."""
    (tmp_path / "file").write_bytes(b"old")

    with pytest.raises(ValueError, match="broken"), LocalStorage().writing(str(tmp_path / "file")) as file:
        file.write(b"new")
        raise ValueError("broken")

    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize("output", ["out.csv", "out"])
def test_a_disk_that_is_full_at_any_moment_ends_the_run_which_goes_on_later(
    tmp_path: Path, scored: Scored, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """Status 1, no output before it is whole, and in the end the same bytes."""
    (tmp_path / "t.csv").write_text("number,text,count\n" + "inf,a,1\n" + "1,a,1\n" * 40)
    scored(tmp_path / "t.csv", tmp_path / "whole" / output, shard_bytes=200)
    fsync, n_ended, n_flushed = os.fsync, 0, 0
    said: list[tuple[int, bool]] = []

    def fill(handle: int) -> None:
        nonlocal n_flushed
        n_flushed += 1
        if n_flushed > n_ended:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    while True:
        target, n_flushed = tmp_path / str(n_ended) / output, 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fill)
            try:
                scored(tmp_path / "t.csv", target, shard_bytes=200)
                break
            except ScoringError as error:
                said.append((error.exit_status, "No space left on device" in str(error)))
        summary = scored(tmp_path / "t.csv", target, shard_bytes=200)
        assert (summary.rows, summary.scored, summary.errors) == (41, 40, 1)
        assert contents(target) == contents(tmp_path / "whole" / output)
        assert not list(tmp_path.rglob(".splitserve-*"))
        n_ended += 1

    assert n_ended > 10
    assert set(said) == {(1, True)}


def test_progress_is_a_line_each_ten_seconds_without_a_terminal() -> None:
    """With rows per second, time left and bad rows; nothing before the first ten."""
    lines: list[str] = []
    now = [0.0]

    class Stream:
        def isatty(self) -> bool:
            return False

        def write(self, text: str) -> None:
            lines.append(text)

        def flush(self) -> None: ...

    stream: Any = Stream()
    with Progress(100_000, shows=True, stream=stream, clock=lambda: now[0]) as progress:
        for second in range(1, 21):
            now[0] = float(second)
            progress.add(1000, second == 5)

    assert "".join(lines) == (
        "10000 of 100000 rows, 1000 rows/s, 1 min 30 s left, 1 bad\n20000 of 100000 rows, 1000 rows/s, 1 min 20 s left, 1 bad\n"
    )


def test_rows_of_an_earlier_process_count_but_not_for_the_speed() -> None:
    """Nor for the time that is left."""
    now = [0.0]
    progress = Progress(1000, shows=False, clock=lambda: now[0])
    progress.resumed(500, 2)
    now[0] = 10.0
    progress.add(100, 0)

    assert progress.line() == "600 of 1000 rows, 10 rows/s, 40 s left, 2 bad"
    assert duration(3720) == "1 h 02 min"
