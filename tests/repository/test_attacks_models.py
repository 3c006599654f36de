"""Malicious artefacts, in addition to the tests of each format: refused with a reason, and never executed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sklearn.preprocessing import StandardScaler

from splitserve import publish_predictor, publish_preprocessor
from splitserve.publishing.errors import PublishError
from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import BundleError, Kind
from splitserve.repository.source import load_bundle
from splitserve.runtimes import predictor, preprocessor
from splitserve.runtimes.predictor import Predictor
from tests.folders import MadeOnce
from tests.system.models import affine_model

N = 3
ROWS = np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])


def model_of(nodes: list[onnx.NodeProto], **changes: object) -> bytes:
    """A model whose output ``y`` these nodes make of ``x``."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", TensorProto.FLOAT, ["n", N])], [value("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for name, change in changes.items():
        setattr(model, name, change)
    return bytes(model.SerializeToString())


def of_domain(domain: str, version: int) -> bytes:
    model = onnx.load_from_string(model_of([helper.make_node("Run", ["x"], ["y"], domain=domain)]))
    model.opset_import.append(helper.make_opsetid(domain, version))
    return bytes(model.SerializeToString())


def initializer_that_lies() -> bytes:
    model = onnx.load_from_string(model_of([helper.make_node("Add", ["x", "w"], ["y"])]))
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    tensor.dims[0] = 2**40
    model.graph.initializer.append(tensor)
    return bytes(model.SerializeToString())


def nested(depth: int) -> bytes:
    """An `If` in an `If` in an `If` …"""
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "leaf", [],
                              [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])  # fmt: skip
    for _ in range(depth):
        node = helper.make_node("If", ["c"], ["z"], then_branch=graph, else_branch=graph)
        graph = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])
    return model_of([helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=graph)])


MODELS: dict[str, Callable[[], bytes]] = {
    "operator of another domain": lambda: of_domain("com.evil", 1),
    "operator that is not there": lambda: model_of([helper.make_node("RunProgram", ["x"], ["y"])]),
    "opset of the future": lambda: of_domain("", 9999),
    "IR version 99": lambda: model_of([helper.make_node("Identity", ["x"], ["y"])], ir_version=99),
    "initializer that lies": initializer_that_lies,
    "undefined input": lambda: model_of([helper.make_node("Add", ["x", "nowhere"], ["y"])]),
    "cycle": lambda: model_of([helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Add", ["x", "a"], ["b"])]),
    "subgraphs in each other": lambda: nested(8),
    "nothing": lambda: b"",
    "a page": lambda: b"<!DOCTYPE html><html></html>",
    "a pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "zeros": lambda: bytes(100_000),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_graph_that_cannot_run_is_refused_with_the_reason(case: str) -> None:
    """E04: a `BundleError` as it loads; the process lives."""
    with pytest.raises(BundleError, match=r"model\.onnx"):
        Predictor(MODELS[case]())


def test_many_nodes_load_or_are_refused() -> None:
    """E04: a long chain is no harm."""
    names = ["x", *(f"n{i}" for i in range(20_000)), "y"]
    nodes = [helper.make_node("Neg", [a], [b]) for a, b in pairwise(names)]

    assert [spec.name for spec in Predictor(model_of(nodes)).outputs] == ["y"]


class Canary:
    """Called if a pickle is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


RUNTIMES = {"pipeline.onnx": "onnx", "pipeline.skops": "sklearn"}
"""What loads a file that is not loaded by default, since there is a plan."""


def publish_halves(repository: Path) -> None:
    publish_preprocessor(StandardScaler().fit(ROWS), ROWS, name="m", repository=repository)
    publish_predictor(affine_model(N, 1, 0), ROWS.astype(np.float32), name="m", repository=repository)


@pytest.mark.heavy
@pytest.mark.parametrize("half", ["preprocess", "predict"])
@pytest.mark.parametrize("form", ["plain", "gz", "xz", "numpy"])
def test_a_pickle_under_another_file_name_is_not_loaded(half: Kind, form: str, made_once: MadeOnce, tmp_path: Path) -> None:
    """E05: in the place of the transforms, the model or the golden samples, plain, compressed or as an array of objects."""
    canary = tmp_path / "canary"
    shutil.copytree(made_once(publish_halves), tmp_path, dirs_exist_ok=True)
    source = Repository(tmp_path)
    load: Any = preprocessor.load if half == "preprocess" else predictor.load
    folder = tmp_path / "m" / half / "1"
    for name in [path.name for path in folder.iterdir() if path.name != "manifest.json"]:
        path, before = folder / name, (folder / name).read_bytes()
        if form == "numpy":
            with path.open("wb") as file:
                np.savez(file, features=np.array([Canary(canary)], object))
        else:
            joblib.dump(Canary(canary), path, compress=0 if form == "plain" else ({"gz": "gzip"}.get(form, form), 3))
        redigest(folder, name)

        with pytest.raises(BundleError):
            load_bundle(source, BundleKey("m", half, 1), partial(load, runtime=RUNTIMES[name]) if name in RUNTIMES else load)

        path.write_bytes(before)
        redigest(folder, name)
    load_bundle(source, BundleKey("m", half, 1), load)
    assert not canary.exists()


def redigest(folder: Path, name: str) -> None:
    """Update the manifest's digests: an attacker can write these too."""
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / name).read_bytes()
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_checked_bytes_are_the_loaded_bytes(tmp_path: Path) -> None:
    """E02: replacing a file after it was read has no effect: the checked bytes are the ones that are used."""
    publish_predictor(affine_model(N, 1, 0), ROWS.astype(np.float32), name="m", repository=tmp_path)
    path = tmp_path / "m" / "predict" / "1" / "model.onnx"

    def load(bundle: Bundle) -> bytes:
        content = bundle.read("model.onnx")
        path.unlink()
        path.symlink_to("/etc/passwd")
        return content

    content = load_bundle(Repository(tmp_path), BundleKey("m", "predict", 1), load)

    assert content == affine_model(N, 1, 0)
    with pytest.raises(BundleError, match="symbolic link"):
        load_bundle(Repository(tmp_path), BundleKey("m", "predict", 1), predictor.load)


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    """E02: ten gigabytes of nothing are not read."""
    publish_predictor(affine_model(N, 1, 0), ROWS.astype(np.float32), name="m", repository=tmp_path)
    path = tmp_path / "m" / "predict" / "1" / "model.onnx"
    with path.open("wb") as file:
        file.truncate(10 * 1024**3)

    with pytest.raises(BundleError, match="bytes"):
        load_bundle(Repository(tmp_path), BundleKey("m", "predict", 1), predictor.load)


def test_a_named_pipe_does_not_block(tmp_path: Path) -> None:
    """E02: reading a pipe would never end."""
    publish_predictor(affine_model(N, 1, 0), ROWS.astype(np.float32), name="m", repository=tmp_path)
    path = tmp_path / "m" / "predict" / "1" / "model.onnx"
    path.unlink()
    os.mkfifo(path)

    with pytest.raises(BundleError, match=r"model\.onnx"):
        load_bundle(Repository(tmp_path), BundleKey("m", "predict", 1), predictor.load)


@pytest.mark.heavy
def test_transforms_with_nan_parameters_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E07: NaN in fitted parameters shows in the golden samples: publish refuses them, and so does a service that loads a bundle
    into which such transforms were put.
    """
    scaler = StandardScaler().fit(ROWS)
    publish_preprocessor(scaler, ROWS, name="m", repository=tmp_path)
    other = tmp_path / "other"
    scaler.mean_ = np.full(N, np.nan)
    with pytest.raises(PublishError, match="is not finite in any row"):
        publish_preprocessor(scaler, ROWS, name="m", repository=other)
    monkeypatch.setattr("splitserve.publishing.as_served.check", lambda *_args, **_options: None)
    publish_preprocessor(scaler, ROWS, name="m", repository=other)
    good, bad = (root / "m" / "preprocess" / "1" for root in (tmp_path, other))
    for name in ("pipeline.skops", "plan.npz"):
        (good / name).write_bytes((bad / name).read_bytes())
        redigest(good, name)

    for runtime in ("auto", "sklearn"):
        with pytest.raises(BundleError, match="golden"):
            load_bundle(Repository(tmp_path), BundleKey("m", "preprocess", 1), partial(preprocessor.load, runtime=runtime))
