"""Large payloads: files in a folder, or objects in a bucket."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from splitserve.errors import StorageFull, Unavailable
from splitserve.jobs.payloads import STRAY_AGE_S, Payloads
from splitserve.jobs.records import Payload


@pytest.fixture(params=["folder", "bucket"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "payloads") if request.param == "folder" else f"file://{tmp_path}/payloads"


async def test_small_payloads_stay_in_the_database(where):
    """Up to the threshold."""
    payloads = Payloads(where, inline_bytes=3)

    assert await payloads.store(b"abc") == Payload(b"abc")
    assert await payloads.read(Payload(b"abc")) == b"abc"


async def test_large_payloads_are_files_until_they_are_removed(where, tmp_path):
    """The row has the name only."""
    payloads = Payloads(where, inline_bytes=3)

    stored = await payloads.store(b"abcd")
    read = await payloads.read(stored)
    await payloads.remove([stored.ref, "", "never-there"])

    assert (stored.data, read) == (b"", b"abcd")
    assert list((tmp_path / "payloads").iterdir()) == []
    with pytest.raises(FileNotFoundError):
        await payloads.read(stored)


async def test_old_files_without_a_row_are_removed(where, tmp_path):
    """They are what a crash has left behind; young ones may belong to a submit in progress."""
    payloads = Payloads(where, inline_bytes=0)
    stray, known, young = [(await payloads.store(b"x")).ref for _ in range(3)]
    past = time.time() - STRAY_AGE_S - 5
    for ref in (stray, known):
        os.utime(tmp_path / "payloads" / ref, (past, past))

    async def known_refs(refs):
        assert set(refs) == {stray, known}
        return [known]

    assert await payloads.remove_strays(known_refs) == 1
    assert {path.name for path in (tmp_path / "payloads").iterdir()} == {known, young}


async def test_a_file_is_synced_before_its_name_is_known(tmp_path, monkeypatch):
    """The file, then its new name, then the folder."""
    steps = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda number: (steps.append(Path(f"/proc/self/fd/{number}").is_dir()), fsync(number)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (steps.append("rename"), rename(self, to)))

    await Payloads(str(tmp_path / "payloads"), inline_bytes=0).store(b"x")

    assert steps == [False, "rename", True]


@pytest.mark.parametrize(("number", "kind"), [(28, StorageFull), (5, Unavailable)])
async def test_what_the_disk_refuses_is_named(tmp_path, monkeypatch, number, kind):
    """A full disk is a 507, anything else a 503; nothing is left behind."""
    payloads = Payloads(str(tmp_path / "payloads"), inline_bytes=0)

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)

    with pytest.raises(kind):
        await payloads.store(b"x")

    assert list((tmp_path / "payloads").iterdir()) == []
