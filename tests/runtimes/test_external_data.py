"""ONNX models are what is in their own bytes: one that keeps weights in another file is refused, wherever the tensor is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitserve.repository.manifest import BundleError
from splitserve.runtimes.external_data import refuse_external_data
from splitserve.runtimes.predictor import Predictor
from tests.system.models import softmax_model

PLACES = ["weights.bin", "../weights.bin", "/proc/self/environ", "/dev/zero", "", "a/../../weights.bin"]


def outside(location: str = "weights.bin", *, entries: bool = True) -> onnx.TensorProto:
    """A tensor with external data."""
    tensor = numpy_helper.from_array(np.zeros((3, 2), np.float32), "weights")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    if entries:
        tensor.external_data.add(key="location", value=location)
    return tensor


def with_initializer(tensor: onnx.TensorProto) -> onnx.ModelProto:
    model = onnx.load_from_string(softmax_model(3))
    model.graph.initializer[0].CopyFrom(tensor)
    return model


def in_a_constant() -> onnx.ModelProto:
    model = onnx.load_from_string(softmax_model(3))
    model.graph.node.insert(0, helper.make_node("Constant", [], ["unused"], value=outside()))
    return model


def in_a_branch() -> onnx.ModelProto:
    model = onnx.load_from_string(softmax_model(3))
    branch = helper.make_graph([], "branch", [], [], [outside()])
    model.graph.node.insert(0, helper.make_node("If", ["condition"], [], then_branch=branch, else_branch=branch))
    return model


def in_a_function() -> onnx.ModelProto:
    model = onnx.load_from_string(softmax_model(3))
    node = helper.make_node("Constant", [], ["y"], value=outside())
    model.functions.append(helper.make_function("own", "F", [], ["y"], [node], [helper.make_opsetid("", 17)]))
    return model


def in_a_sparse_initializer() -> onnx.ModelProto:
    model = onnx.load_from_string(softmax_model(3))
    model.graph.sparse_initializer.add().values.CopyFrom(outside())
    return model


@pytest.mark.parametrize(
    "make",
    [lambda: with_initializer(outside()), in_a_constant, in_a_branch, in_a_function, in_a_sparse_initializer],
    ids=["initializer", "constant", "branch", "function", "sparse"],
)
def test_weights_in_another_file_are_refused(make: Callable[[], onnx.ModelProto]) -> None:
    """With the file, and the way to put them inside."""
    with pytest.raises(
        BundleError, match=r"^model\.onnx: expected all weights in this file, got external data in 'weights\.bin'; .*onnx\.save"
    ) as raised:
        refuse_external_data(make().SerializeToString())
    assert "; put them into it: " in str(raised.value)


@pytest.mark.parametrize("place", PLACES)
def test_external_data_is_refused_whatever_the_file(place: str) -> None:
    """No path is resolved, so none can lead out of the bundle's folder."""
    with pytest.raises(BundleError, match="expected all weights in this file"):
        Predictor(with_initializer(outside(place)).SerializeToString())


def test_a_duplicate_location_is_refused() -> None:
    """Whichever would count."""
    tensor = outside("../one.bin")
    tensor.external_data.add(key="location", value="two.bin")

    with pytest.raises(BundleError, match=r"expected all weights in this file"):
        refuse_external_data(with_initializer(tensor).SerializeToString())


def test_a_model_that_merely_contains_the_word_is_accepted() -> None:
    """A name or a text may be "location"."""
    model = onnx.load_from_string(softmax_model(3))
    model.doc_string = "location"
    model.metadata_props.add(key="location", value="Vienna")

    refuse_external_data(model.SerializeToString())
    Predictor(model.SerializeToString())


@pytest.mark.parametrize("data", [b"location", b"\x3a\xff\xff\xff\x7flocation"])
def test_a_file_that_is_not_onnx_is_refused(data: bytes) -> None:
    """As the bundle's fault."""
    with pytest.raises(BundleError, match=r"^model\.onnx: "):
        Predictor(data)


def test_onnx_runtime_cannot_find_external_files_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a tensor escaped the check: ONNX Runtime searches another folder than the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(np.ones((3, 2), np.float32).tobytes())
    monkeypatch.setattr("splitserve.runtimes.predictor.refuse_external_data", lambda model: None)

    with pytest.raises(BundleError, match=f"cannot load it: (?s:.*)({os.devnull}|xternal)"):
        Predictor(with_initializer(outside("weights.bin")).SerializeToString())
