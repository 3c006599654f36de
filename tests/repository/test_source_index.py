"""The index of a model repository: what it lists, and what is refused in an index."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import BundleError, FileDigest
from splitserve.repository.sources import index
from tests.repository.bundles import KEY, write_bundle, write_route

DIGEST = {"sha256": "0" * 64, "size": 2}


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """One bundle, one route."""
    found = Repository(tmp_path)
    write_bundle(found)
    write_route(found)
    return found


def digest_of(path: Path) -> FileDigest:
    return FileDigest(hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)


def test_an_index_equals_a_listing(repository: Repository) -> None:
    """The digests of manifests and routes; it is read as it was written."""
    found, problems = index.build(repository)
    path = index.write(repository.root, found)

    assert problems == []
    assert index.decode(path.read_bytes()) == found
    assert found.keys() == {KEY: digest_of(repository.folder(KEY) / "manifest.json")}
    assert found.routes == {"m": digest_of(repository.root / "m" / "route.json")}
    assert found.signatures == {}
    assert path.stat().st_mode & 0o777 == 0o644
    assert [each.name for each in repository.root.iterdir() if each.is_file()] == ["index.json"]


def test_the_index_lists_signatures(repository: Repository) -> None:
    """It may be added to a bundle that is listed already."""
    signature = repository.folder(KEY) / "model.sig"
    signature.write_bytes(b"{}")

    assert index.build(repository)[0].signatures == {"m/predict/1": digest_of(signature)}


def test_a_broken_bundle_is_left_out_and_named(repository: Repository) -> None:
    """The others are listed."""
    (write_bundle(repository, BundleKey("m", "predict", 2)).folder / "manifest.json").write_bytes(b"?")

    found, problems = index.build(repository)

    assert list(found.bundles) == ["m/predict/1"]
    assert len(problems) == 1
    assert problems[0].startswith("m/predict/2: manifest.json: ")


def test_a_broken_route_is_left_out_and_named(repository: Repository) -> None:
    """Its model is listed."""
    (repository.root / "m" / "route.json").write_bytes(b"?")

    found, problems = index.build(repository)

    assert (list(found.bundles), found.routes) == (["m/predict/1"], {})
    assert len(problems) == 1
    assert problems[0].startswith("m: route.json: ")


def test_an_unwritable_index_leaves_nothing_behind(repository: Repository) -> None:
    """Not even the scratch file."""
    (repository.root / "index.json").mkdir()

    with pytest.raises(OSError, match=r"index\.json"):
        index.write(repository.root, index.build(repository)[0])

    assert sorted(path.name for path in repository.root.iterdir()) == ["index.json", "m"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "expected schema version 2, got 1"),
        ({"bundles": 1}, "Expected `object`"),
        (
            {"bundles": {"../x/predict/1": DIGEST}},
            "expected a bundle as MODEL/predict/1 or MODEL/preprocess/1, got '../x/predict/1'",
        ),
        ({"bundles": {"m/predict/0": DIGEST}}, "got 'm/predict/0'"),
        ({"releases": {"m/releases/1-1.1": DIGEST}}, "expected a release as MODEL/releases/0001-1.1, got 'm/releases/1-1.1'"),
        ({"signatures": {"m": DIGEST}}, "a signature of 'm', which is not in it"),
        ({"routes": {"..": DIGEST}}, "'..' cannot be the name of a model"),
        ({"routes": {"m": {"sha256": "../../x", "size": 2}}}, "m: expected a sha256 of 64 hex digits and a size"),
        ({"bundles": {"m/predict/1": {"sha256": "0" * 64, "size": -1}}}, "m/predict/1: expected a sha256"),
        ({"routes": {"m": {"sha256": "0" * 64, "size": 2**40}}}, "m has 1099511627776 bytes; the limit is 16777216"),
    ],
)
def test_an_inconsistent_index_is_refused(change: dict[str, Any], message: str) -> None:
    """Its entries become paths and sizes."""
    data = msgspec.json.encode({"schema_version": 2, "bundles": {"m/predict/1": DIGEST}, **change})

    with pytest.raises(BundleError) as caught:
        index.decode(data)

    assert str(caught.value).startswith("index.json: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"<html>", b"[]", b"\xff", b"[" * 100_000])
def test_a_file_that_is_not_an_index_is_refused(data: bytes) -> None:
    """A server may answer anything."""
    with pytest.raises(BundleError, match=r"^index\.json: "):
        index.decode(data)
