"""The model repository: bundles are written atomically, and read only if their bytes are unchanged."""

from __future__ import annotations

import os
import shutil
from collections import UserDict
from pathlib import Path

import msgspec
import pytest

from splitserve.repository import manifest as manifests
from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import BundleError, NotFetched
from splitserve.repository.source import load_bundle
from tests.repository.bundles import manifest_of, write_bundle

FILES = {"pipeline.skops": b"fitted", "golden.npz": b"samples"}
KEY = BundleKey("penguins", "preprocess", 1)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "models")


def publish(repository: Repository, key: BundleKey = KEY) -> Bundle:
    return write_bundle(repository, key, FILES)


def everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_bundle_is_read_as_it_was_written(repository):
    """The manifest with the digests filled in, and every file."""
    written = publish(repository)

    found = repository.open(KEY)

    assert found.manifest == written.manifest
    assert found.key == written.key == KEY
    assert {name: found.read(name) for name in found.manifest.files} == FILES
    assert written.read("golden.npz") == b"samples"


def test_the_tree_is_model_kind_version(repository):
    """Other accounts and tools read it too, so its modes allow that."""
    publish(repository)

    assert everything_below(repository.root) == [
        "penguins",
        "penguins/preprocess",
        "penguins/preprocess/1",
        "penguins/preprocess/1/golden.npz",
        "penguins/preprocess/1/manifest.json",
        "penguins/preprocess/1/pipeline.skops",
    ]
    assert (repository.root / "penguins/preprocess/1").stat().st_mode & 0o777 == 0o755


def test_a_published_version_never_changes(repository):
    """A second publish of it is refused, and does not change the first."""
    publish(repository)
    before = everything_below(repository.root)

    with pytest.raises(BundleError, match=r"^penguins/preprocess/1: already published"):
        repository.write(manifest_of(KEY), {"pipeline.skops": b"other"})

    assert everything_below(repository.root) == before
    assert repository.open(KEY).read("pipeline.skops") == b"fitted"


def test_a_failed_write_leaves_nothing_behind(repository):
    """Not even temporarily under the bundle's name; the scratch folder is removed."""
    with pytest.raises(BundleError, match=r"^penguins/preprocess/1: cannot be written: No such file or directory$"):
        repository.write(manifest_of(KEY), {**FILES, "no-such-folder/file": b""})

    assert everything_below(repository.root) == ["penguins", "penguins/preprocess"]
    assert list(repository.bundles()) == []


def test_an_interrupted_write_leaves_nothing_behind(repository):
    """The scratch folder is removed after any exception."""

    class Interrupted(UserDict):
        def keys(self):  # asked for once the scratch folder is there
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repository.write(manifest_of(KEY), Interrupted(FILES))

    assert everything_below(repository.root) == ["penguins", "penguins/preprocess"]


def test_an_unwritable_repository_is_reported(tmp_path):
    """A file is where the folder should be."""
    (tmp_path / "models").write_text("not a folder")

    with pytest.raises(BundleError, match=r"^penguins/preprocess/1: cannot be written: Not a directory$"):
        publish(Repository(tmp_path / "models"))


def test_leftovers_of_a_writer_are_ignored(repository):
    """A process that was killed while it wrote leaves a folder under a temporary name; readers and writers do not mind."""
    leftover = repository.root / "penguins/preprocess/.1-abc"
    leftover.mkdir(parents=True)
    (leftover / "manifest.json").write_bytes(b"half")

    assert list(repository.bundles()) == []
    assert repository.next_version("penguins", "preprocess") == 1

    publish(repository)
    assert list(repository.bundles()) == [KEY]


def test_bundles_are_sorted_by_model_kind_and_version(repository):
    """Versions as numbers; a half of a model is there without the other."""
    keys = [
        BundleKey("digits", "predict", 1),
        BundleKey("penguins", "preprocess", 2),
        BundleKey("penguins", "preprocess", 10),
        BundleKey("penguins", "predict", 1),
    ]
    for key in reversed(keys):
        publish(repository, key)

    assert list(repository.bundles()) == keys
    assert repository.models() == ["digits", "penguins"]
    assert repository.versions("penguins", "preprocess") == [2, 10]
    assert repository.next_version("penguins", "preprocess") == 11
    assert repository.next_version("digits", "preprocess") == 1


@pytest.mark.parametrize(
    "folder",
    [
        "penguins/preprocess/0",
        "penguins/preprocess/01",
        "penguins/preprocess/-1",
        "penguins/preprocess/1.0",
        "penguins/preprocess/1a",
        "penguins/preprocess/latest",
        "penguins/preprocess/\u0661",
        "penguins/preprocess/\u00b2",
        "penguins/preprocess/.1",
        "penguins/postprocess/1",
        "penguins/1",
        ".git/preprocess/1",
        "my model/preprocess/1",
        "-x/preprocess/1",
        "lost+found/preprocess/1",
    ],
)
def test_a_folder_with_another_name_is_ignored(repository, folder):
    """Folders that are not a model, kind or version are ignored."""
    (repository.root / folder).mkdir(parents=True)

    assert list(repository.bundles()) == []
    assert repository.models() == []


@pytest.mark.parametrize("file", ["penguins", "penguins/preprocess", "penguins/preprocess/1"])
def test_a_file_in_place_of_a_folder_is_ignored(repository, file):
    """At every level."""
    path = repository.root / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")

    assert list(repository.bundles()) == []


def test_a_missing_repository_is_empty(repository):
    """It may be mounted later."""
    assert list(repository.bundles()) == []
    assert repository.models() == []
    assert repository.versions("penguins", "predict") == []
    assert repository.next_version("penguins", "predict") == 1


def test_a_missing_bundle_is_named(repository):
    """The system's reason, without the path of the host."""
    with pytest.raises(BundleError) as caught:
        repository.open(KEY)

    assert str(caught.value) == "manifest.json cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fittes", "pipeline.skops: expected sha256 .* as in manifest.json, got .*"),
        (b"fitte", "pipeline.skops: expected 6 bytes as in manifest.json, got 5"),
        (b"fitted!", "pipeline.skops: expected 6 bytes as in manifest.json, got 7"),
        (b"", "pipeline.skops: expected 6 bytes as in manifest.json, got 0"),
        (None, "pipeline.skops cannot be read: No such file or directory"),
    ],
    ids=["damaged", "truncated", "longer", "empty", "missing"],
)
def test_a_file_with_a_wrong_digest_is_refused(repository, content, message):
    """By its size, its digest or its absence; the other files can be read."""
    file = publish(repository).folder / "pipeline.skops"
    file.unlink() if content is None else file.write_bytes(content)
    bundle = repository.open(KEY)

    with pytest.raises(BundleError, match=f"^{message}$"):
        bundle.read("pipeline.skops")

    assert bundle.read("golden.npz") == b"samples"


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "../1/golden.npz"])
def test_only_files_that_the_manifest_lists_are_read(repository, name):
    """Anything else was never checked."""
    bundle = publish(repository)

    with pytest.raises(BundleError, match=r"^manifest\.json lists no "):
        bundle.read(name)


def test_a_file_that_the_manifest_does_not_list_is_refused(repository):
    """All unexpected files are named."""
    folder = publish(repository).folder
    (folder / "b.txt").write_bytes(b"")
    (folder / "a").mkdir()

    with pytest.raises(BundleError, match=r"^manifest\.json does not list a, b\.txt$"):
        repository.open(KEY)


@pytest.mark.parametrize(
    "there", [BundleKey("penguins", "preprocess", 2), BundleKey("penguins", "predict", 1), BundleKey("digits", "preprocess", 1)]
)
def test_another_bundles_manifest_is_refused(repository, there):
    """A copied or renamed folder is not the version of its name."""
    shutil.copytree(publish(repository).folder, repository.folder(there))

    with pytest.raises(BundleError, match=rf"^manifest\.json: expected that of {there}, got that of penguins/preprocess/1$"):
        repository.open(there)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, r"manifest\.json: expected schema version 1, got 2"),
        ({"surprise": True}, r"manifest\.json: .*`surprise`.*"),
    ],
)
def test_an_invalid_manifest_is_refused(repository, change, message):
    """Of another schema version, or with a field that is not known."""
    file = publish(repository).folder / "manifest.json"
    file.write_bytes(msgspec.json.encode({**msgspec.json.decode(file.read_bytes()), **change}))

    with pytest.raises(BundleError, match=f"^{message}$"):
        repository.open(KEY)


def rewritten(folder: Path, **changes: object) -> None:
    """Change a manifest's fields."""
    file = folder / "manifest.json"
    file.write_bytes(msgspec.json.encode({**msgspec.json.decode(file.read_bytes()), **changes}))


@pytest.mark.parametrize(
    "name", ["../2/golden.npz", "/etc/passwd", "a/b", "..", ".hidden", "", "a" * 129, "a\0b", "a\n", "manifest.json", "model.sig"]
)
def test_a_manifest_cannot_name_a_file_outside_its_bundle(repository, name):
    """One grammar for names: nothing outside of the bundle's folder is read or fetched."""
    folder = publish(repository).folder
    rewritten(folder, files={name: {"sha256": "0" * 64, "size": 1}})

    with pytest.raises(BundleError, match=r"^manifest\.json: .* cannot be the name of a file; expected a plain "):
        repository.open(KEY)


@pytest.mark.parametrize(
    ("digest", "message"),
    [
        ({"sha256": "../../etc/passwd", "size": 1}, "expected a sha256 of 64 hex digits"),
        ({"sha256": "0" * 64, "size": -1}, "expected a sha256 of 64 hex digits and a size"),
        ({"sha256": "0" * 64, "size": 4 * 1024**3 + 1}, "its files have 4294967297 bytes; the limit is 4294967296"),
    ],
)
def test_a_manifest_cannot_have_invalid_digests_or_sizes(repository, digest, message):
    """Digests are names in caches; sizes are what is read."""
    rewritten(publish(repository).folder, files={"golden.npz": digest})

    with pytest.raises(BundleError, match=message):
        repository.open(KEY)


def test_a_signature_cannot_name_a_tensor_twice(repository):
    """Each is one array in the file of golden samples, and would be read as often as it is named."""
    spec = {"name": "x", "datatype": "FP32", "shape": ["batch", 1]}
    rewritten(publish(repository).folder, inputs=[spec, spec])

    with pytest.raises(BundleError, match=r"^manifest\.json: two tensors of the signature have the same name$"):
        repository.open(KEY)


@pytest.mark.parametrize("name", ["manifest.json", "golden.npz"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: file.symlink_to("/etc/passwd"), "cannot be read: it is a symbolic link"),
        (lambda file: file.symlink_to("elsewhere"), "cannot be read: it is a symbolic link"),
        (os.mkfifo, "is a pipe; expected a regular file"),
        (lambda file: file.mkdir(), "cannot be read: Is a directory"),
    ],
    ids=["link", "dangling link", "pipe", "folder"],
)
def test_only_regular_files_are_read(repository, name, make, message):
    """A link leads out of the folder, a pipe would be waited for."""
    file = publish(repository).folder / name
    file.unlink()
    make(file)

    with pytest.raises(BundleError, match=f"^{name} {message}$"):
        repository.open(KEY).read(name)


def test_the_size_of_a_manifest_is_limited(repository):
    """A larger one is not read; this is a sparse file of a terabyte."""
    with (publish(repository).folder / "manifest.json").open("wb") as sparse:
        sparse.truncate(2**40)

    with pytest.raises(BundleError, match=r"^manifest\.json has 1099511627776 bytes; the limit is 16777216$"):
        repository.open(KEY)


def test_a_file_of_another_size_is_not_read(repository):
    """Independent of its size."""
    bundle = publish(repository)
    with (bundle.folder / "golden.npz").open("wb") as sparse:
        sparse.truncate(2**40)

    with pytest.raises(BundleError, match=r"^golden\.npz: expected 7 bytes as in manifest\.json, got 1099511627776$"):
        bundle.read("golden.npz")


def test_loading_names_the_bundle(repository):
    """An error names the bundle; otherwise the loaded object is returned."""
    publish(repository)

    def refuse(bundle: Bundle) -> None:
        raise BundleError("golden samples differ")

    assert load_bundle(repository, KEY, lambda bundle: bundle.read("golden.npz")) == b"samples"
    with pytest.raises(BundleError, match=r"^penguins/preprocess/1: golden samples differ$"):
        load_bundle(repository, KEY, refuse)
    with pytest.raises(BundleError, match=r"^digits/predict/3: manifest\.json cannot be read: No such file or directory$"):
        load_bundle(repository, BundleKey("digits", "predict", 3), refuse)


def test_a_written_bundle_can_be_removed(repository):
    """Afterwards it does not exist; removing a missing one is no error."""
    publish(repository)
    other = publish(repository, BundleKey("penguins", "preprocess", 2))

    repository.remove(KEY)
    repository.remove(KEY)

    assert list(repository.bundles()) == [other.key]


def test_the_digests_are_those_of_the_contents(repository):
    """SHA-256; the files in the caller's manifest are replaced."""
    lying = msgspec.structs.replace(
        manifest_of(KEY), files={"golden.npz": manifests.FileDigest("00", 1), "other": manifests.FileDigest("00", 1)}
    )

    bundle = repository.write(lying, {"golden.npz": b"samples"})

    assert bundle.manifest.files == {
        "golden.npz": manifests.FileDigest("24baa7a731ce04b431af93d94cba8e0160a0e6a4607edc2d70c595dd098e56cf", 7)
    }


def test_a_stamp_changes_when_a_file_does(repository: Repository) -> None:
    """After any write, and stays the same otherwise; it is empty for a missing bundle."""
    bundle = publish(repository)
    found = [repository.stamp(KEY), repository.stamp(KEY)]
    for change in (
        lambda: (bundle.folder / "pipeline.skops").write_bytes(b"anothe"),
        lambda: (bundle.folder / "model.sig").write_bytes(b"signed"),
        lambda: (bundle.folder / "golden.npz").unlink(),
    ):
        change()
        found.append(repository.stamp(KEY))

    assert found[0] == found[1]
    assert len(set(found)) == 4
    assert repository.stamp(BundleKey("penguins", "preprocess", 2)) == ""


def test_a_missing_file_is_retryable(repository: Repository) -> None:
    """Bundles are copied file by file: the manifest or another file may arrive later."""
    bundle = publish(repository)
    (bundle.folder / "golden.npz").unlink()
    with pytest.raises(NotFetched, match=r"golden\.npz cannot be read: No such file or directory"):
        bundle.read("golden.npz")
    (bundle.folder / "manifest.json").unlink()

    with pytest.raises(NotFetched, match=r"manifest\.json cannot be read: No such file or directory"):
        repository.open(KEY)
