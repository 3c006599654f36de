"""The manifest of a bundle: reading returns what was written, without guesses."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version

import pytest

from splitserve.repository import environment, manifest
from splitserve.repository.manifest import BundleError, Column, FileDigest, Manifest, Postprocess, Rows, Tolerance
from splitserve.signature import TensorSpec
from splitserve.versions import MODEL_NAME

FULL = Manifest(
    schema_version=1,
    name="penguins",
    kind="preprocess",
    version=2,
    created="2026-01-02T03:04:05+00:00",
    files={"pipeline.skops": FileDigest("ab" * 32, 5)},
    inputs=(TensorSpec("island", "BYTES", ("batch", 1)),),
    outputs=(TensorSpec("features", "FP32", ("batch", 4)),),
    environment={"scikit-learn": "1.9.1"},
    tolerances={"features": Tolerance(rtol=1e-4)},
    labels=("Adelie", "Gentoo"),
    rows=Rows("frame", (Column("island", "category", "nan", ("Biscoe", "Dream")),)),
    postprocess=Postprocess("scores"),
    refuses="nan",
)

DOCUMENT = {
    "schema_version": 1,
    "name": "penguins",
    "kind": "preprocess",
    "version": 2,
    "created": "2026-01-02T03:04:05+00:00",
    "files": {"pipeline.skops": {"sha256": "ab" * 32, "size": 5}},
    "inputs": [{"name": "island", "datatype": "BYTES", "shape": ["batch", 1]}],
    "outputs": [{"name": "features", "datatype": "FP32", "shape": ["batch", 4]}],
    "environment": {"scikit-learn": "1.9.1"},
    "tolerances": {"features": {"rtol": 1e-4, "atol": 0.0}},
    "labels": ["Adelie", "Gentoo"],
    "rows": {
        "form": "frame",
        "columns": [{"name": "island", "dtype": "category", "missing": "nan", "categories": ["Biscoe", "Dream"]}],
        "element": "",
        "n_dims": 2,
    },
    "postprocess": {"scores": "scores", "activation": "softmax"},
    "refuses": "nan",
}

OPTIONAL = ("tolerances", "labels", "rows", "postprocess", "refuses")


def changed(**fields: object) -> bytes:
    return json.dumps({**DOCUMENT, **fields}).encode()


def without(*names: str) -> bytes:
    return json.dumps({name: value for name, value in DOCUMENT.items() if name not in names}).encode()


def test_a_manifest_is_written_as_this_document():
    """Bundles outlive the code that wrote them: a renamed or changed field could no longer be read."""
    assert json.loads(manifest.encode(FULL)) == DOCUMENT


def test_a_manifest_is_read_as_it_was_written():
    """All of it, also from another writer's JSON."""
    assert manifest.decode(manifest.encode(FULL)) == FULL
    assert manifest.decode(json.dumps(DOCUMENT).encode()) == FULL


def test_the_files_of_a_bundle_have_these_names():
    """Bundles that are published have them."""
    names = (manifest.MANIFEST_FILE, manifest.GOLDEN_FILE, manifest.PIPELINE_FILE, manifest.MODEL_FILE)

    assert names == ("manifest.json", "golden.npz", "pipeline.skops", "model.onnx")


def test_defaults_are_omitted():
    """A predictor's manifest has nothing of a preprocessor's."""
    small = manifest.decode(without(*OPTIONAL))

    assert (small.tolerances, small.labels, small.rows, small.postprocess, small.refuses) == ({}, (), None, None, "")
    assert json.loads(manifest.encode(small)) == json.loads(without(*OPTIONAL))


def test_a_manifest_is_indented():
    """The file is indented for readers."""
    assert manifest.encode(FULL).startswith(b'{\n  "schema_version": 1,\n')


@pytest.mark.parametrize("found", [0, 2, 99])
def test_another_schema_version_is_refused_by_its_number(found):
    """Even if nothing else in it is understood."""
    with pytest.raises(BundleError, match=rf"^manifest\.json: expected schema version 1, got {found}$"):
        manifest.decode(json.dumps({"schema_version": found, "hello": "world"}).encode())


@pytest.mark.parametrize("name", [name for name in DOCUMENT if name not in OPTIONAL])
def test_a_missing_field_is_named(name):
    """All are needed but those that have a default."""
    with pytest.raises(BundleError, match=f"^manifest.json: .*`{name}`"):
        manifest.decode(without(name))


def test_an_unknown_field_is_named():
    """It could change the meaning of the others."""
    with pytest.raises(BundleError, match=r"^manifest\.json: .*`surprise`"):
        manifest.decode(changed(surprise=1))


@pytest.mark.parametrize(
    "data",
    [
        changed(schema_version="1"),
        changed(version="2"),
        changed(version=2.5),
        changed(kind="other"),
        changed(name=None),
        changed(inputs={}),
        changed(inputs=[{"name": "x", "datatype": "FP32"}]),
        changed(inputs=[{"name": "x", "datatype": "FP32", "shape": [1.5]}]),
        changed(files=["pipeline.skops"]),
        changed(files={"pipeline.skops": "ab"}),
        changed(rows={"form": "table"}),
        changed(refuses="everything"),
        changed(tolerances={"y": 0.1}),
    ],
)
def test_a_field_of_another_type_is_refused(data):
    """And named with its place, as far as JSON has one."""
    with pytest.raises(BundleError, match=r"^manifest\.json: .*\$"):
        manifest.decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        manifest.encode(FULL)[:-1],
        manifest.encode(FULL) + b"x",
        b"\xff\xfe",
        manifest.encode(FULL).replace(b"penguins", b"\xff\xfe"),
        b'{"schema_version": 1, "name": ' + b"[" * 100_000,
        b"PK\x03\x04",
    ],
    ids=["empty", "null", "list", "brace", "cut", "junk behind", "no text", "name is no UTF-8", "deep", "zip"],
)
def test_a_file_that_is_not_a_manifest_is_refused(data):
    """Always as the bundle's fault, with the file's name."""
    with pytest.raises(BundleError, match=r"^manifest\.json: "):
        manifest.decode(data)


@pytest.mark.parametrize("name", ["penguins", "p", "7", "breast-cancer", "a.b_c-d", "X" * 128])
def test_a_model_name_is_a_plain_word(name):
    """It becomes a folder, a path and a label."""
    assert MODEL_NAME.fullmatch(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "_x", "a/b", "a b", "a\n", "é", "a:b", "X" * 129, "../x", "a\\b"]
)
def test_a_name_with_special_characters_is_refused(name):
    """To a shell, a file system or a URL."""
    assert not MODEL_NAME.fullmatch(name)


def test_the_environment_is_what_is_installed():
    """Python and each installed package; missing ones are left out."""
    found = environment.observe(["numpy", "no-such-package"])

    assert found == {"python": platform.python_version(), "numpy": version("numpy")}


SIDE_BY_SIDE = """
import sys, threading
from splitserve.repository import manifest

sys.setswitchinterval(1e-6)
data = sys.stdin.buffer.read()
together = threading.Barrier(4)

def decode():
    together.wait()
    manifest.decode(data)

threads = [threading.Thread(target=decode) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.heavy
def test_manifests_may_be_read_concurrently():
    """Models load in threads. One run in three crashed while two threads created the first decoder."""
    codes = [
        subprocess.run([sys.executable, "-c", SIDE_BY_SIDE], input=manifest.encode(FULL), check=False, timeout=60).returncode
        for _ in range(12)
    ]

    assert codes == [0] * 12
