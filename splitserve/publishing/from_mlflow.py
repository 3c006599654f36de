"""A scikit-learn model that is registered in MLflow -> the fitted pipeline and its input example.

Only files are read: the registry says which version is meant, its files are downloaded, and the pipeline is read from a skops
file, or from a pickle if that is allowed. Nothing of the model's own is imported or run: not its loader, its code paths or its
requirements, and the types that it asks to trust are not trusted for that.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from sklearn.pipeline import Pipeline, make_pipeline

from splitserve.publishing.errors import PublishError
from splitserve.publishing.estimator_files import read_pickle, read_skops
from splitserve.runtimes.rows import Rowset

N_ROWS_MIN = 30
"""Fewer sample rows prove too little."""

_ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_DTYPES = {
    "double": "float64",
    "float": "float32",
    "long": "int64",
    "integer": "int32",
    "boolean": "bool",
    "string": "object",
}
"""Source: MLflow, ``mlflow.types.DataType``; other types keep what JSON says."""


class Registered(msgspec.Struct, frozen=True):
    """A registered version: ``origin`` names it without an alias, ``example`` is None if it has none."""

    name: str
    origin: str
    pipeline: Pipeline
    example: Rowset | None


def read(address: str, *, trusted_modules: Sequence[str] = (), allow_pickle: bool = False) -> Registered:
    """Fetch and read a registered scikit-learn model.

    Args:
        address: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``, in the registry that MLflow's own environment variables name.
        trusted_modules: further modules whose types may be in it.
        allow_pickle: read it if it is a pickle, and so run the code in it.

    Raises:
        PublishError: MLflow is not installed, has no such version, or it is no scikit-learn model that can be read.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise PublishError(f"{address}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # before it is imported
    try:
        import mlflow.artifacts
        from mlflow import MlflowClient
    except ImportError as error:
        raise PublishError('models of MLflow need more packages: pip install "splitserve[mlflow]"') from error
    name = found["name"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            client = MlflowClient()
            registered = (
                client.get_model_version_by_alias(name, found["alias"])
                if found["alias"]
                else client.get_model_version(name, found["version"])
            )
            origin = f"models:/{name}/{registered.version}"
            downloaded = Path(mlflow.artifacts.download_artifacts(artifact_uri=origin, dst_path=folder))
        except Exception as error:  # each artifact store has classes of its own
            raise PublishError(f"{address}: {error}") from error
        return _read(downloaded, name, origin, trusted_modules, allow_pickle)


def sample_rows(registered: Registered, rows: Rowset | None) -> Rowset:
    """What the model is proven on: the rows given, and the input example where it has the same columns.

    Raises:
        PublishError: fewer than `N_ROWS_MIN`.
    """
    example = registered.example
    n_example = 0 if example is None else len(example)
    if rows is None and n_example < N_ROWS_MIN:
        raise PublishError(
            f"{registered.origin}: its input example has {n_example} rows, at least {N_ROWS_MIN} are needed to prove the model "
            "on; give --rows FILE with rows of its training data"
        )
    joined = example if rows is None else _joined(example, rows)
    if joined is None or len(joined) < N_ROWS_MIN:
        raise PublishError(
            f"{registered.origin}: expected at least {N_ROWS_MIN} sample rows, got {0 if joined is None else len(joined)}"
        )
    return joined


def _joined(example: Rowset | None, rows: Rowset) -> Rowset:
    if isinstance(example, pd.DataFrame) and isinstance(rows, pd.DataFrame):
        if set(example) <= set(rows):
            return pd.concat([rows[list(example)].astype(example.dtypes.to_dict()), example], ignore_index=True)
    elif isinstance(example, np.ndarray) and isinstance(rows, np.ndarray) and example.shape[1:] == rows.shape[1:]:
        return np.concatenate([rows.astype(example.dtype), example])
    return rows


def _read(folder: Path, name: str, origin: str, trusted_modules: Sequence[str], allow_pickle: bool) -> Registered:
    import yaml

    try:
        described = yaml.safe_load(_inside(folder, "MLmodel").read_text())
        flavors = dict(described["flavors"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise PublishError(f"{origin}: MLmodel cannot be read: {error}") from error
    flavor = flavors.get("sklearn")
    if not isinstance(flavor, dict):
        raise PublishError(f"{origin}: {_other_flavor([str(each) for each in flavors if each != 'python_function'], origin)}")
    path = _inside(folder, str(flavor.get("pickled_model", "model.skops")))
    fitted = _fitted(path, str(flavor.get("serialization_format", "")), origin, trusted_modules, allow_pickle)
    fitted = getattr(fitted, "best_estimator_", fitted)
    pipeline = fitted if isinstance(fitted, Pipeline) else make_pipeline(fitted)
    return Registered(name, origin, pipeline, _example(folder, described, origin))


def _other_flavor(flavors: Sequence[str], origin: str) -> str:
    """What to do with a model that is none of scikit-learn.

    Args:
        flavors: except for python_function, which every model has.
        origin: of the model.
    """
    found = f"expected the flavor sklearn, got {', '.join(flavors) or 'python_function alone'}"
    if "splitserve" in flavors:
        return (
            "is a release already, of a training pipeline; serve it with MODEL_REPOSITORY=mlflow:MODEL@ALIAS, or get its files, "
            f'which are a model repository, with "mlflow artifacts download -u {origin}"'
        )
    if "onnx" in flavors:
        return (
            f'{found}; get its files with "mlflow artifacts download -u {origin}", and publish them with '
            '"splitserve publish NAME --onnx model.onnx --data samples.npz"'
        )
    if boosting := next((each for each in flavors if each in ("xgboost", "lightgbm", "catboost")), ""):
        return (
            f'{found}; load it with mlflow.{boosting}.load_model("{origin}") where you trust its files, and call publish('
            "make_pipeline(model), …); a model that is no estimator of scikit-learn's interface has to be trained again as one"
        )
    if network := next((each for each in flavors if each in ("pytorch", "tensorflow", "keras")), ""):
        return f"{found}; export the {network} model to ONNX and publish that with --onnx"
    return f"{found}; log the fitted pipeline with mlflow.sklearn.log_model, or export it to ONNX and publish that with --onnx"


def _fitted(path: Path, form: str, origin: str, trusted_modules: Sequence[str], allow_pickle: bool) -> Any:
    if form != "skops" and not allow_pickle:
        raise PublishError(
            f"{origin}: is a pickle ({form or 'of unknown form'}), and reading one runs the code in it; log it with "
            'serialization_format="skops", or give --allow-pickle if you trust everyone who can write to the registry'
        )
    return read_skops(path, origin, trusted_modules) if form == "skops" else read_pickle(path, origin)


def _example(folder: Path, described: Mapping[str, Any], origin: str) -> Rowset | None:
    """The input example, with the datatypes of the model's signature."""
    info = described.get("saved_input_example_info")
    if not isinstance(info, dict) or info.get("type") not in ("dataframe", "ndarray"):
        return None
    try:
        given = json.loads(_inside(folder, str(info.get("artifact_path", ""))).read_text())
        types = json.loads((described.get("signature") or {}).get("inputs") or "[]")
        if info["type"] == "ndarray":
            dtype = types[0]["tensor-spec"]["dtype"] if types and "tensor-spec" in types[0] else None
            return np.array(given["inputs"] if isinstance(given, dict) else given, dtype=dtype)
        if info.get("pandas_orient") == "split":
            frame = pd.DataFrame(given["data"], columns=given.get("columns"))
        else:
            frame = pd.read_json(io.StringIO(json.dumps(given)), orient=info.get("pandas_orient", "records"))
        known = {
            spec["name"]: _DTYPES[spec["type"]] for spec in types if spec.get("type") in _DTYPES and spec.get("name") in frame
        }
        return frame.astype(known)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PublishError(f"{origin}: its input example cannot be read: {type(error).__name__}: {error}") from error


def _inside(folder: Path, name: str) -> Path:
    """A file of the model.

    Raises:
        PublishError: it would be elsewhere.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise PublishError(f"MLmodel names a file outside of the model: {name}")
    return path
