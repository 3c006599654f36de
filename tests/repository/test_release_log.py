"""The releases of a model in a folder: appended whole or not at all, by several publishers."""

import errno
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from splitserve.repository.manifest import MANIFEST_FILE, BundleError
from splitserve.repository.release import SCHEMA_VERSION, ReleaseManifest, decode
from splitserve.repository.release_log import LOCK_FILE, SCRATCH_AGE_S, append, digests, listing, publishing, write_folder

MODEL = "wine"
N_PUBLISHERS, N_RECORDS = 4, 10


def record(pair: str = "1.1"):
    def make(sequence: int):
        files = {"golden.npz": b"rows"}
        manifest = ReleaseManifest(
            schema_version=SCHEMA_VERSION, model=MODEL, sequence=sequence, pair=pair, created="2026-11-30T00:00:00+00:00",
            preprocessor="a" * 64, predictor="b" * 64, files=digests(files),
        )  # fmt: skip
        return manifest, files

    return make


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def append_many(root: Path, number: int) -> list[int]:
    return [append(root, MODEL, record(f"{number}.{number}")).sequence for _ in range(N_RECORDS)]


def test_records_are_numbered_in_order(tmp_path):
    first, second = append(tmp_path, MODEL, record()), append(tmp_path, MODEL, record("2.2"))

    assert [first.sequence, second.sequence] == [1, 2]
    assert listing(tmp_path, MODEL) == [first.key, second.key]
    folder = tmp_path / MODEL / "releases" / "0002-2.2"
    assert decode((folder / MANIFEST_FILE).read_bytes(), second.key) == second.manifest
    assert (folder / "golden.npz").read_bytes() == b"rows"


def test_only_records_are_left_behind(tmp_path):
    append(tmp_path, MODEL, record())

    assert names(tmp_path / MODEL / "releases") == ["0001-1.1"]


def test_several_publishers_never_get_the_same_number(tmp_path):
    with ProcessPoolExecutor(N_PUBLISHERS) as pool:
        numbers = [number for found in pool.map(append_many, [tmp_path] * N_PUBLISHERS, range(1, 5)) for number in found]

    assert len(set(numbers)) == N_PUBLISHERS * N_RECORDS
    assert [key.sequence for key in listing(tmp_path, MODEL)] == sorted(numbers)


def test_the_number_of_a_killed_publisher_is_skipped(tmp_path):
    (tmp_path / MODEL / "releases").mkdir(parents=True)
    (tmp_path / MODEL / "releases" / ".0001").touch()

    assert append(tmp_path, MODEL, record()).sequence == 2


def test_a_number_that_no_reader_would_see_is_not_used(tmp_path):
    (tmp_path / MODEL / "releases" / "999999999-1.1").mkdir(parents=True)

    with pytest.raises(BundleError, match="at most 999999999, got 1000000000"):
        append(tmp_path, MODEL, record())

    assert names(tmp_path / MODEL / "releases") == ["999999999-1.1"]


def test_what_was_recorded_counts_although_its_marker_cannot_be_removed(tmp_path, monkeypatch):
    def fail(path: Path, missing_ok: bool = False):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "unlink", fail)

    assert append(tmp_path, MODEL, record()).sequence == 1
    assert [key.sequence for key in listing(tmp_path, MODEL)] == [1]


def test_a_failed_write_leaves_no_record(tmp_path):
    def fail(sequence: int):
        raise BundleError("not this one")

    with pytest.raises(BundleError, match="not this one"):
        append(tmp_path, MODEL, fail)

    assert names(tmp_path / MODEL / "releases") == []


def test_an_existing_folder_is_never_overwritten(tmp_path):
    write_folder(tmp_path / "1", {"a": b"first"})

    with pytest.raises(FileExistsError):
        write_folder(tmp_path / "1", {"a": b"second"})

    assert (tmp_path / "1" / "a").read_bytes() == b"first"
    assert names(tmp_path) == ["1"]


def test_a_folder_that_appears_during_a_write_is_never_overwritten(tmp_path, monkeypatch):
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: False if path.name == "1" else exists(path))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "a").touch()
    with pytest.raises(OSError, match=r".*"):
        write_folder(tmp_path / "1", {"a": b"second"})

    assert (tmp_path / "1" / "a").read_bytes() == b""
    assert names(tmp_path) == ["1"]


def leave_scratch(root: Path, *, age_s: float) -> Path:
    scratch = root / MODEL / "predict" / ".scratch-left"
    scratch.mkdir(parents=True)
    (scratch / "model.onnx").touch()
    then = scratch.stat().st_mtime - age_s
    os.utime(scratch, (then, then))
    return scratch


def test_leftovers_of_a_killed_publisher_are_removed_after_an_hour(tmp_path):
    scratch = leave_scratch(tmp_path, age_s=SCRATCH_AGE_S + 1)

    with publishing(tmp_path, MODEL):
        assert not scratch.exists()


@pytest.mark.parametrize("name", [".gitkeep", ".snapshot", ".nfs0001", "..data"])
def test_what_no_publisher_left_is_kept(tmp_path, name):
    other = tmp_path / MODEL / "predict" / name
    other.mkdir(parents=True)
    os.utime(other, (0, 0))

    with publishing(tmp_path, MODEL):
        assert other.exists()


@pytest.mark.parametrize("name", [".0007", ".7-abc", ".scratch-abc"])
def test_every_kind_of_leftover_is_removed(tmp_path, name):
    left = tmp_path / MODEL / "releases" / name
    left.mkdir(parents=True)
    os.utime(left, (0, 0))

    with publishing(tmp_path, MODEL):
        assert not left.exists()


def test_recent_leftovers_are_kept(tmp_path):
    scratch = leave_scratch(tmp_path, age_s=SCRATCH_AGE_S - 60)

    with publishing(tmp_path, MODEL):
        assert scratch.exists()


def test_while_others_publish_nothing_is_removed(tmp_path):
    """A publication that takes longer than an hour keeps its scratch folder."""
    scratch = leave_scratch(tmp_path, age_s=SCRATCH_AGE_S + 1)
    os.utime(scratch)
    with publishing(tmp_path, MODEL):
        os.utime(scratch, (0, 0))
        with publishing(tmp_path, MODEL):
            assert scratch.exists()


def test_a_repository_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / MODEL).write_text("a file where the model's folder should be")

    with pytest.raises(BundleError, match="wine: cannot be written"), publishing(tmp_path, MODEL):
        pass
    with pytest.raises(BundleError, match="wine/releases: cannot be written"):
        append(tmp_path, MODEL, record())


def test_the_lock_file_is_not_listed_as_a_model_or_bundle(tmp_path):
    with publishing(tmp_path, MODEL):
        assert (tmp_path / MODEL / LOCK_FILE).is_file()
    assert listing(tmp_path, MODEL) == []
