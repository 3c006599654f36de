"""Input and output in a bucket: one upload a file, the manifest last, nothing renamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from splitserve.scoring.errors import ScoringError
from splitserve.scoring.storage import RemoteStorage
from tests.object_store import ObjectStore, object_store
from tests.scoring.conftest import Scored
from tests.scoring.here import Here
from tests.scoring.releases import Adding
from tests.scoring.test_runs import Killed, contents, table

pytestmark = pytest.mark.heavy


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ObjectStore]:
    """A bucket with 1,000 rows in two files below ``in``."""
    folder = tmp_path / "local" / "m=04"
    folder.mkdir(parents=True)
    for name in ("1.parquet", "2.parquet"):
        pq.write_table(table(500), folder / name, row_group_size=100)
    with object_store() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        store.client.create_bucket(Bucket="lake")
        store.upload(tmp_path / "local", "lake", "in/")
        yield store


@pytest.mark.parametrize("output", ["out", "out.parquet", "out.csv"])
def test_a_run_from_bucket_to_bucket_is_as_one_of_folders(
    bucket: ObjectStore, tmp_path: Path, scored: Scored, output: str
) -> None:
    """The same bytes under the same names; the manifest is the last to be written."""
    scored(tmp_path / "local", tmp_path / output, shard_rows=8192)

    summary = scored("s3://lake/in", f"s3://lake/{output}", shard_rows=8192)

    assert (summary.rows, summary.errors) == (1000, 0)
    local = contents(tmp_path / output)
    remote = remote_contents(f"s3://lake/{output}")
    if output != "out":  # names of shards have keys of their input in them
        assert list(remote.values()) == list(local.values())
    assert {Path(name).parent for name in remote} == {Path(name).parent for name in local}
    written = [path for method, path in bucket.requests if method in ("PUT", "POST") and output in path and "delete" not in path]
    assert "manifest.json" in written[-1]
    assert not any(".parts" in path for path in RemoteStorage("s3://lake").files("s3://lake"))


def remote_contents(url: str) -> dict[str, bytes]:
    storage = RemoteStorage(url)
    paths = [path for path in storage.files(url) if "_splitserve" not in path]
    found: dict[str, bytes] = {}
    for path in paths:
        with storage.open(path) as file:
            found[path.removeprefix(url).lstrip("/")] = file.read()
    return found


def test_an_upload_that_is_broken_off_leaves_no_object(bucket: ObjectStore, scored: Scored) -> None:
    """The shard is done again."""

    class Dying(Adding):
        def infer(self, inputs: Any, clock: Any) -> Any:
            if self.calls:
                raise Killed
            return super().infer(inputs, clock)

    with pytest.raises(Killed):
        scored("s3://lake/in", "s3://lake/out", shard_rows=8192, engine=Here(Dying()))
    assert not [path for path in RemoteStorage("s3://lake").files("s3://lake/out") if "part-" in path]

    summary = scored("s3://lake/in", "s3://lake/out", shard_rows=8192)

    assert summary.rows == 1000


def test_what_is_listed_is_listed_anew(bucket: ObjectStore, tmp_path: Path, scored: Scored) -> None:
    """A file that another process has added is seen in the same process."""
    assert scored("s3://lake/in", tmp_path / "first.csv").rows == 1000
    bucket.upload(tmp_path / "local", "lake", "in/more/")

    assert scored("s3://lake/in", tmp_path / "second.csv").rows == 2000


def test_an_absent_bucket_is_named(bucket: ObjectStore, tmp_path: Path, scored: Scored) -> None:
    """With its URL."""
    with pytest.raises(ScoringError, match="s3://absent/in"):
        scored("s3://absent/in", tmp_path / "out.csv")
