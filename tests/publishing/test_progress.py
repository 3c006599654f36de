"""A publication ends: with a release, or with an error once its time is over."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from splitserve import PublishError, publish, publish_predictor
from splitserve.arrays import from_array
from splitserve.publishing import as_served, progress, publish_onnx
from splitserve.publishing import halves as halves_module
from splitserve.publishing.halves import PublishOptions
from splitserve.publishing.predictor_half import ModelSamples, predictor_half
from splitserve.publishing.preprocessor_half import passing_half
from splitserve.publishing.progress import WRITING, Progress
from splitserve.repository.folder import Repository
from splitserve.repository.golden import Golden, encode
from splitserve.repository.manifest import Manifest
from tests.publishing import pipelines
from tests.system.models import softmax_model

SAMPLES = np.zeros((3, 3), np.float32)


def loop_for_ever() -> None:
    """As a converter that does not end; what it raises itself it also catches."""
    while True:
        try:
            pass
        except Exception:
            continue


def test_a_loop_is_interrupted_and_named() -> None:
    """Although it catches every exception."""
    message = r"took longer than 0.05 s, at the step: conversion at FP64; .*time_limit_s"
    with pytest.raises(PublishError, match=message), Progress("m", 0.05) as steps:
        steps.step("conversion at FP64")
        loop_for_ever()


def test_a_loop_in_another_thread_is_interrupted() -> None:
    """Of a web application, say."""
    found: list[str] = []

    def run() -> None:
        try:
            with Progress("m", 0.05) as steps:
                steps.step("a step")
                loop_for_ever()
        except PublishError as error:
            found.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)

    assert "at the step: a step" in found[0]


def test_what_ends_in_time_is_not_interrupted() -> None:
    """Neither within nor afterwards; its own errors pass."""
    for _ in range(20):
        with Progress("m", 60):
            pass
    with pytest.raises(KeyError), Progress("m", 60):
        raise KeyError
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


class Endless(TransformerMixin, BaseEstimator):
    """Transforms a few calls, then never ends."""

    n_calls = 0

    def fit(self, X: object, y: object = None) -> Endless:
        self.fitted_ = True
        return self

    def transform(self, X: object) -> object:
        Endless.n_calls += 1
        if Endless.n_calls > 3:
            loop_for_ever()
        return X


def test_a_publication_that_takes_too_long_writes_nothing(tmp_path: Path) -> None:
    """The error names the step."""
    rows = pipelines.numbers(50, 0)
    pipeline = make_pipeline(Endless(), LogisticRegression()).fit(rows, pipelines.two(rows))

    with pytest.raises(
        PublishError, match=r"publishing took longer than 1 s, at the step: (the pipeline's own answers|transforms at FP32);"
    ):
        publish(pipeline, rows, name="m", repository=tmp_path, time_limit_s=1, trusted_modules=[Endless.__module__])

    assert not list(tmp_path.rglob("*.json"))


class EndlessSamples(dict[str, np.ndarray]):
    """Sample inputs that are read for ever."""

    def items(self) -> Any:
        loop_for_ever()


@pytest.mark.parametrize("publish_model", [publish_predictor, publish_onnx])
def test_a_model_that_takes_too_long_is_not_written(publish_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"took longer than 0.3 s, at the step: the model on the sample inputs"):
        publish_model(softmax_model(3), EndlessSamples(), name="m", repository=tmp_path, time_limit_s=0.3)

    assert not list(tmp_path.rglob("*.json"))


def test_writing_is_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before is removed."""
    write = Repository.write

    def half_written(self: Repository, manifest: Manifest, files: Mapping[str, bytes]) -> Any:
        return write(self, manifest, files) if manifest.kind == "preprocess" else loop_for_ever()

    predictor = predictor_half(softmax_model(3), ModelSamples(SAMPLES), PublishOptions(name="m"))
    halves = passing_half(predictor, SAMPLES), predictor
    monkeypatch.setattr(Repository, "write", half_written)

    with pytest.raises(PublishError, match="took longer than 0.2 s, at the step: writing"), Progress("m", 0.2) as steps:
        steps.step(WRITING)
        halves_module.write(Repository(tmp_path), *halves, version=None, progress=steps)

    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("publish_model", [publish_predictor, publish_onnx])
def test_a_publication_that_cannot_be_written_ends(
    publish_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Repository, "write", lambda *_: loop_for_ever())

    with pytest.raises(PublishError, match="publishing took longer than 0.5 s, at the step: "):
        publish_model(softmax_model(3), SAMPLES, name="m", repository=tmp_path, time_limit_s=0.5)


def test_nothing_is_interrupted_after_the_end() -> None:
    """So the record of a release is whole or is not begun."""
    with Progress("m", 60) as steps:
        steps.end()
        running = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]

    assert not running


def endless_model() -> bytes:
    """An ONNX model that ONNX Runtime runs for ever, in one call."""

    def value(name: str, kind: int, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [helper.make_node("Identity", ["go_on"], ["goes_on"]), helper.make_node("Identity", ["old"], ["new"])],
        "body",
        [
            value("number", TensorProto.INT64, []),
            value("go_on", TensorProto.BOOL, []),
            value("old", TensorProto.FLOAT, [None, 1]),
        ],
        [value("goes_on", TensorProto.BOOL, []), value("new", TensorProto.FLOAT, [None, 1])],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["", "always", "features"], ["scores"], body=body)],
        "endless",
        [value("features", TensorProto.FLOAT, ["n", 1])],
        [value("scores", TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor("always", TensorProto.BOOL, [], [True])],
    )
    model: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    return model


@pytest.mark.parametrize(
    ("library", "messages"),
    [
        ("CDLL", ["publishing took longer than 0.1 s, at the step: native code"]),
        ("PyDLL", ["Timeout", "line 4 in <module>"]),  # no thread of Python can run then; the stack shows where it is
    ],
    ids=["without the interpreter lock", "with the interpreter lock"],
)
def test_a_command_ends_although_native_code_does_not_return(library: str, messages: list[str]) -> None:
    command = (
        "import ctypes; from splitserve.publishing import progress; progress.ENDS_PROCESS_AFTER_S = 0.1\n"
        "with progress.ending_process(), progress.Progress('m', 0.1) as steps:\n"
        "    steps.step('native code')\n"
        f"    ctypes.{library}(None).pause()"
    )

    ended = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=300)

    assert ended.returncode == 1
    assert all(message in ended.stderr for message in messages)


@pytest.mark.parametrize("publish_model", [publish_predictor, publish_onnx])
def test_a_model_that_never_returns_is_refused(publish_model: Callable[..., Any], tmp_path: Path) -> None:
    """It runs in a process of its own, which is ended: otherwise its end would be waited for here for ever."""
    as_served.start()

    with pytest.raises(PublishError, match="took longer than 0.5 s, at the step: the model on the sample inputs"):
        publish_model(endless_model(), SAMPLES[:, :1], name="m", repository=tmp_path, time_limit_s=0.5)

    assert not list(tmp_path.rglob("*.json"))


def test_a_model_that_never_returns_ends_with_its_publisher(tmp_path: Path) -> None:
    """However that ends: with it the other end of the pipe from which requests come is closed."""
    (tmp_path / "model.onnx").write_bytes(endless_model())
    (tmp_path / "samples.npz").write_bytes(encode(Golden((from_array("features", SAMPLES[:, :1]),), ())))
    command = "from splitserve.publishing import as_served; as_served.serve()"
    request = json.dumps({"folder": str(tmp_path), "path": sys.path})

    served = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    answers, _ = served.communicate(request + "\n")  # which closes the pipe, then waits for all that could still answer

    assert (served.returncode, answers) == (0, "")  # nobody waits for an answer


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_time_limit_is_positive(limit: float) -> None:
    with pytest.raises(PublishError, match="time_limit_s: expected more than 0 seconds"):
        Progress("m", limit).__enter__()


def test_a_bar_is_shown_once_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the step that is done; not before."""
    shown: list[str] = []
    begins = threading.Event()

    def bar(name: str, _: object) -> object:
        begins.set()
        return lambda what, _: shown.append(f"{name}: {what}")

    monkeypatch.setattr(progress, "_bar", bar)
    monkeypatch.setattr(progress, "BAR_AFTER_S", 0.01)

    with Progress("m", 60, shows=True) as steps:
        steps.step("early")
        assert begins.wait(60)
        while not shown:
            steps.step("late")

    assert set(shown) == {"m: late"}
