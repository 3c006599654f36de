"""The two halves of a published model for programs that know nothing of splitserve: scikit-learn transforms, an ONNX session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import skops.io

MODELS = ("breast-cancer", "penguins")


def transformer(repository: str, model: str) -> Any:
    """The fitted transforms of version 1."""
    data = Path(repository, model, "preprocess", "1", "pipeline.skops").read_bytes()
    return skops.io.loads(data, trusted=skops.io.get_untrusted_types(data=data))


def session(repository: str, model: str) -> Any:
    """The model of version 1, with the settings that are fastest for small models: one thread, run where it is called."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    path = Path(repository, model, "predict", "1", "model.onnx")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def rows(inputs: list[dict[str, Any]]) -> Any:
    """What the transforms take, from the inputs of a V2 JSON request: an array if there is one, else a DataFrame."""
    if len(inputs) == 1:
        return np.asarray(inputs[0]["data"], dtype=np.float64).reshape(inputs[0]["shape"])
    import pandas as pd

    return pd.DataFrame({each["name"]: each["data"] for each in inputs})


def features(transforms: Any, data: Any) -> Any:
    """(n_rows, n_features) float32."""
    result = transforms.transform(data)
    dense = result.toarray() if hasattr(result, "toarray") else result
    return np.ascontiguousarray(dense, dtype=np.float32)


def answer(model: str, outputs: dict[str, Any]) -> dict[str, Any]:
    """A V2 answer, ready for a JSON encoder that knows numpy arrays."""
    return {
        "model_name": model,
        "outputs": [
            {"name": name, "datatype": _datatype(array), "shape": array.shape, "data": array.ravel()}
            for name, array in outputs.items()
        ],
    }


def _datatype(array: Any) -> str:
    return {"float32": "FP32", "int64": "INT64", "object": "BYTES"}[str(array.dtype)]


def run(model: Any, array: Any) -> dict[str, Any]:
    """The outputs of a session by name."""
    names = [output.name for output in model.get_outputs()]
    return dict(zip(names, model.run(names, {"features": array}), strict=True))
