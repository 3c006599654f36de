"""The measured models, trained and published for each run, so that the measured code serves bundles that it has written."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from sklearn.preprocessing import FunctionTransformer
from threadpoolctl import threadpool_limits

from benchmarks.workloads import N_ROWS, Workload
from splitserve import release
from splitserve.arrays import Array
from splitserve.publishing import publish, publish_predictor, publish_preprocessor
from training.demo import DEMOS

PIXELS_SHAPE = (3, 224, 224)
"""One picture as float32: 602,112 bytes."""


def publish_demos(repository: Path) -> dict[str, Workload]:
    """Train and publish the demo models; workloads for those that are measured, by name."""
    workloads = {}
    for name, (train, input_name) in DEMOS.items():
        with threadpool_limits(1):  # on few cores, threads that wait for each other take many times as long
            pipeline, data = train()
        publish(pipeline, data, name=name, repository=repository, input_name=input_name)
        if name == "digits":  # included because a cold start loads it too
            continue
        sample = _complete(data)
        workloads[name] = Workload(name, _rows(sample, input_name), "probabilities", pipeline.predict_proba(sample))
    return workloads


def _complete(data: Any) -> Any:
    """The first rows in which nothing is missing: JSON has no NaN."""
    return data.dropna().iloc[:N_ROWS] if hasattr(data, "columns") else data[:N_ROWS]


def _rows(data: Any, input_name: str) -> tuple[Mapping[str, Array], ...]:
    if not hasattr(data, "columns"):
        return tuple({input_name: data[index : index + 1]} for index in range(len(data)))
    columns = {name: _column(data[name]) for name in data.columns}
    return tuple({name: column[index : index + 1] for name, column in columns.items()} for index in range(len(data)))


def _column(series: Any) -> Array:
    """(n_rows, 1), text as objects."""
    is_number = series.dtype.kind in "fiub"
    return np.asarray(series, dtype=None if is_number else np.object_).reshape(-1, 1)


def publish_tensors(repository: Path) -> dict[str, Workload]:
    """Models that a picture's tensor passes through: `tensor` returns it, `tensor-mean` returns a number for each channel."""
    pixels = np.random.default_rng(0).random((2, *PIXELS_SHAPE), dtype=np.float32)
    made = {
        "tensor": (helper.make_node("Identity", ["features"], ["answer"]), ("batch", *PIXELS_SHAPE), pixels),
        "tensor-mean": (
            helper.make_node("ReduceMean", ["features"], ["answer"], axes=[2, 3], keepdims=0),
            ("batch", PIXELS_SHAPE[0]),
            pixels.mean(axis=(2, 3)),
        ),
    }
    workloads = {}
    for name, (node, shape, expected) in made.items():
        publish_preprocessor(FunctionTransformer().fit(pixels), pixels, name=name, repository=repository, input_name="pixels")
        publish_predictor(_model(node, shape), pixels, name=name, repository=repository)
        release(name, "1.1", repository=repository, accept_unknown_features=True)
        rows = tuple({"pixels": pixels[index : index + 1]} for index in range(len(pixels)))
        workloads[name] = Workload(name, rows, "answer", expected, has_json=False)
    return workloads


def _model(node: onnx.NodeProto, output_shape: Sequence[str | int]) -> onnx.ModelProto:
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ("batch", *PIXELS_SHAPE))
    answer = helper.make_tensor_value_info("answer", TensorProto.FLOAT, output_shape)
    graph = helper.make_graph([node], "tensor", [features], [answer])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def imagenet() -> Workload:
    """The picture model, as ``make imagenet`` has published it: JPEG files, of which Chelsea must be an Egyptian cat."""
    import skimage.data
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(skimage.data.chelsea()).save(file, "JPEG", quality=90)
    picture = np.array([[file.getvalue()]], dtype=np.object_)
    label = np.array([b"Egyptian cat"], dtype=np.object_)
    return Workload("imagenet", ({"image": picture},), "label", label.reshape(1, 1), has_json=False)
