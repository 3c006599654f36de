"""Large payloads: files in a folder, or objects in a bucket."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from splitserve.errors import StorageFull, Unavailable
from splitserve.jobs.payloads import STRAY_AGE_S, Payloads
from splitserve.jobs.records import Payload
from tests.object_store import object_store
from tests.system.processes import free_ports


class Place:
    """Where payloads are: a folder, or a bucket."""

    def __init__(self, where: str, names: Callable[[], set[str]], age: Callable[[str, float], None]) -> None:
        self.where = where
        self.names = names
        self.age = age
        """Makes a payload older by so many seconds."""


@pytest.fixture(params=["folder", "file system", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    folder = tmp_path / "payloads"

    def age(ref: str, seconds: float) -> None:
        past = time.time() - seconds
        os.utime(folder / ref, (past, past))

    if request.param != "bucket":
        where = str(folder) if request.param == "folder" else f"file://{folder}"
        yield Place(where, lambda: {path.name for path in folder.iterdir()}, age)
        return
    from moto.s3.models import s3_backends

    with object_store() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        store.client.create_bucket(Bucket="jobs")

        def names() -> set[str]:
            found = store.client.list_objects_v2(Bucket="jobs", Prefix="payloads/").get("Contents", [])
            return {entry["Key"].removeprefix("payloads/") for entry in found}

        def age_object(ref: str, seconds: float) -> None:
            objects = s3_backends["123456789012"]["aws"].buckets["jobs"].keys
            objects[f"payloads/{ref}"].last_modified -= timedelta(seconds=seconds)

        yield Place("s3://jobs/payloads", names, age_object)


@pytest.fixture
def where(place: Place) -> str:
    return place.where


async def no_refs(_: Sequence[str]) -> list[str]:
    return []


async def test_small_payloads_stay_in_the_database(where):
    """Up to the threshold."""
    payloads = Payloads(where, inline_bytes=3)

    assert await payloads.store(b"abc") == Payload(b"abc")
    assert await payloads.read(Payload(b"abc")) == b"abc"


async def test_large_payloads_are_files_until_they_are_removed(place):
    """The row has the name only."""
    payloads = Payloads(place.where, inline_bytes=3)

    stored = await payloads.store(b"abcd")
    read = await payloads.read(stored)
    await payloads.remove([stored.ref, "", "never-there"])

    assert (stored.data, read) == (b"", b"abcd")
    assert place.names() == set()
    with pytest.raises(FileNotFoundError):
        await payloads.read(stored)


async def test_old_files_without_a_row_are_removed(place):
    """They are what a crash has left behind; young ones may belong to a submit in progress."""
    payloads = Payloads(place.where, inline_bytes=0)
    assert await payloads.remove_strays(no_refs) == 0
    stray, known, young = [(await payloads.store(b"x")).ref for _ in range(3)]
    for ref in (stray, known):
        place.age(ref, STRAY_AGE_S + 5)

    async def known_refs(refs):
        assert set(refs) == {stray, known}
        return [known]

    assert await payloads.remove_strays(known_refs) == 1
    assert place.names() == {known, young}


async def test_what_cannot_be_removed_is_left_to_the_sweep(tmp_path):
    """The others are removed, and nobody is told."""
    payloads = Payloads(str(tmp_path / "payloads"), inline_bytes=0)
    stored = await payloads.store(b"x")
    (tmp_path / "payloads" / "folder").mkdir()

    await payloads.remove(["folder", stored.ref])

    assert [path.name for path in (tmp_path / "payloads").iterdir()] == ["folder"]


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


async def test_a_bucket_that_cannot_be_reached_is_unavailable(monkeypatch):
    """Its client's errors are told apart from ours; removing is left to the sweep, and the service starts without it."""
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    S3FileSystem.clear_instance_cache()  # one that another test has used keeps that test's number of attempts
    payloads = Payloads("s3://jobs/payloads", inline_bytes=0)

    with pytest.raises(Unavailable, match="payloads of jobs"):
        await payloads.store(b"x")
    with pytest.raises(Unavailable):
        await payloads.read(Payload(ref="x"))
    with pytest.raises(OSError, match="Could not connect"):
        await payloads.remove_strays(no_refs)
    await payloads.remove(["x"])
