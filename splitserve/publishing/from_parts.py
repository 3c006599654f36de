"""Fitted transforms, or an ONNX model -> one bundle of a model, or both where no transforms are needed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from splitserve.arrays import Array, from_array
from splitserve.errors import SplitserveError
from splitserve.publishing import as_served
from splitserve.publishing.convert import Names
from splitserve.publishing.errors import PublishError
from splitserve.publishing.halves import PublishOptions, repository_at, write
from splitserve.publishing.predictor_half import ModelSamples, predictor_half
from splitserve.publishing.preprocessor_half import FeatureForm, passing_half, preprocessor_half
from splitserve.publishing.progress import TIME_LIMIT_S, WRITING, Progress
from splitserve.publishing.proof import BATCH_SIZES
from splitserve.publishing.releasing import write_released
from splitserve.publishing.training_data import INPUT_NAME, as_rows, check_fitted
from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.manifest import BundleError, Postprocess
from splitserve.repository.release import Compared
from splitserve.runtimes import sklearn_pipeline
from splitserve.runtimes.meaning import NO_MEANING, meaning_of
from splitserve.runtimes.rows import UnsupportedRows, observe, to_tensors
from splitserve.tensors import Tensor

_ON_SAMPLES = "the model on the sample inputs"

_MAY_NOT_RETURN = ("Loop", "TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor")
"""Operators: loops, and trees, which ONNX Runtime rewrites while it loads them (microsoft/onnxruntime#27391)."""


def publish_preprocessor(
    transformer: Any,
    X: Any,
    *,
    name: str,
    repository: str | os.PathLike[str],
    version: int | None = None,
    input_name: str = INPUT_NAME,
    output_name: str = INPUT_NAME,
    precision: str = "FP32",
    labels: Sequence[object] = (),
    postprocess: Postprocess | None = None,
    trusted_modules: Sequence[str] = (),
    allow_pickle: bool = False,
    row_wise: bool = True,
    golden: Any = "rows",
    time_limit_s: float = TIME_LIMIT_S,
) -> Bundle:
    """Publish fitted transforms as a preprocessor.

    Args:
        transformer: fitted; a Pipeline of transforms, a ColumnTransformer or a single one.
        X: as for `publish`.
        name: what clients call the model.
        repository: folder or URL of the model repository.
        version: the next free number by default.
        input_name: what clients call the input if ``X`` is an array.
        output_name: the predictor's name for its input.
        precision: "FP32" or "FP64", the datatype of floating-point features; others keep their datatype.
        labels: class names in the order of the predictor's scores, for the postprocess step.
        postprocess: how scores become probabilities and a label; without it the predictor's outputs are the answer.
        trusted_modules: modules of your own transformers; the service must be told to trust them too.
        allow_pickle: as for `publish`.
        row_wise: as for `publish`.
        golden: as for `publish`.
        time_limit_s: as for `publish`.

    Raises:
        PublishError: not fitted, ``X`` does not fit, a service could not load it, or the version exists. Nothing has been
            written then.
    """
    check_fitted(transformer)
    options = PublishOptions(
        name=name,
        input_name=input_name,
        trusted_modules=trusted_modules,
        allow_pickle=allow_pickle,
        row_wise=row_wise,
        golden=golden,
    )
    target = repository_at(repository)
    with Progress(name, time_limit_s) as progress:
        progress.step("the transforms")
        features = FeatureForm(name=output_name, precision=precision, all_as_floats=False)
        half = preprocessor_half(transformer, as_rows(X), features, options, names=_named(labels), postprocess=postprocess)
        progress.step("loading as a service does")
        as_served.check(half, trusted_modules=trusted_modules, allow_pickle=allow_pickle)
        progress.step(WRITING)
        return write(target, half, version=version, progress=progress)[0]


def publish_predictor(
    model: bytes | str | os.PathLike[str] | onnx.ModelProto,
    sample_inputs: Mapping[str, Array] | Array,
    *,
    name: str,
    repository: str | os.PathLike[str],
    version: int | None = None,
    labels: Sequence[object] = (),
    trained_on: Any = None,
    rows: Any = None,
    input_name: str = INPUT_NAME,
    row_wise: bool = True,
    time_limit_s: float = TIME_LIMIT_S,
) -> Bundle:
    """Publish an ONNX model, made by whatever means, as a predictor.

    Args:
        model: a path, the file's bytes or the loaded model. Its weights must be inside.
        sample_inputs: arrays (n_samples, …) by input name, or the array of the only input; 64 of them, spread
            evenly, become the golden samples.
        name: what clients call the model.
        repository: folder or URL of the model repository.
        version: the next free number by default.
        labels: class names in the order of its scores.
        trained_on: the fitted transforms whose results it was trained on; then it is paired only with preprocessors whose
            features mean the same.
        rows: the raw rows that ``sample_inputs`` were made from, in the same order: a DataFrame or an array. With them a release
            can show that the features of a preprocessor are, in numbers, those of training.
        input_name: what clients call the input if ``rows`` is an array, as for `publish_preprocessor`.
        row_wise: as for `publish`.
        time_limit_s: seconds that running the model on the samples and writing the bundle may take.

    Raises:
        PublishError: ONNX Runtime cannot run it, the samples do not fit, the time is over, or the version exists. Nothing has
            been written then.
    """
    target = repository_at(repository)
    with Progress(name, time_limit_s) as progress:
        progress.step("reading the model")
        data = _model_bytes(model)
        meaning = NO_MEANING if trained_on is None else meaning_of(trained_on)
        tried = ModelSamples(sample_inputs, _raw_rows(rows, input_name))
        progress.step(_ON_SAMPLES)
        _run_apart(data, sample_inputs)
        options = PublishOptions(name=name, row_wise=row_wise)
        half = predictor_half(data, tried, options, names=_named(labels), meaning=meaning)
        progress.step(WRITING)
        return write(target, half, version=version, progress=progress)[0]


def _raw_rows(rows: Any, input_name: str) -> tuple[Tensor, ...]:
    if rows is None:
        return ()
    data = as_rows(rows)
    try:
        form, specs = observe(data, input_name)
    except UnsupportedRows as error:
        raise PublishError(str(error)) from error
    return tuple(to_tensors(form, specs, data))


def publish_onnx(
    model: bytes | str | os.PathLike[str] | onnx.ModelProto,
    sample_inputs: Mapping[str, Array] | Array,
    *,
    name: str,
    repository: str | os.PathLike[str],
    version: int | None = None,
    labels: Sequence[object] = (),
    row_wise: bool = True,
    time_limit_s: float = TIME_LIMIT_S,
) -> tuple[Bundle, Bundle]:
    """Publish an ONNX model that needs no transforms, and release it: a preprocessor passes the inputs on unchanged.

    Args:
        model: as for `publish_predictor`.
        sample_inputs: as for `publish_predictor`.
        name: what clients call the model.
        repository: folder or URL of the model repository.
        version: of both halves; the next free number of each by default.
        labels: class names in the order of its scores.
        row_wise: as for `publish`.
        time_limit_s: as for `publish_predictor`.

    Raises:
        PublishError: as for `publish_predictor`. Nothing has been written then.
    """
    target = repository_at(repository)
    with Progress(name, time_limit_s) as progress:
        progress.step("reading the model")
        data = _model_bytes(model)
        progress.step(_ON_SAMPLES)
        _run_apart(data, sample_inputs)
        options = PublishOptions(name=name, row_wise=row_wise)
        predictor = predictor_half(data, ModelSamples(sample_inputs), options, names=_named(labels))
        progress.step("the preprocessor that passes the inputs on")
        preprocessor = passing_half(predictor, sample_inputs)
        compared = Compared(preprocessor.golden.inputs[0].n_rows, batch_sizes=BATCH_SIZES)
        progress.step(WRITING)
        pair = write_released(
            target, preprocessor, predictor, version=version, proven="halves", compared=compared, progress=progress
        ).pair
    first = target.open(BundleKey(name, "preprocess", pair.preprocessor))
    return first, target.open(BundleKey(name, "predict", pair.predictor))


def refused_types(transformer: Any) -> list[str]:
    """Names of types and functions in fitted transforms that a service refuses unless it trusts their modules.

    Args:
        transformer: fitted; a Pipeline of transforms, a ColumnTransformer or a single one.

    Raises:
        PublishError: skops does not support the transforms.
    """
    try:
        return sklearn_pipeline.untrusted_types(sklearn_pipeline.dump(transformer))
    except BundleError as error:
        raise PublishError(str(error)) from error


def _run_apart(model: bytes, sample_inputs: Mapping[str, Array] | Array) -> None:
    """Run a model in a process of its own first if it has operators that ONNX Runtime may load or run for ever: the time limit
    can end that, and not native code of this process. What is wrong with the model is found by what runs it next.

    Raises:
        PublishError: it ends the process.
    """
    with suppress(DecodeError, SplitserveError):
        loaded = onnx.load_from_string(model)
        nodes = [*loaded.graph.node, *(node for function in loaded.functions for node in function.node)]
        if not any(map(_may_not_return, nodes)):
            return
        weights = {each.name for each in loaded.graph.initializer}
        names = [each.name for each in loaded.graph.input if each.name not in weights]
        by_name = sample_inputs if isinstance(sample_inputs, Mapping) else {names[0]: sample_inputs}
        as_served.check_model(model, [from_array(name, np.asarray(array)) for name, array in by_name.items()])


def _may_not_return(node: onnx.NodeProto) -> bool:
    inner = [each for attribute in node.attribute for graph in (attribute.g, *attribute.graphs) for each in graph.node]
    return node.op_type in _MAY_NOT_RETURN or any(map(_may_not_return, inner))


def _named(labels: Sequence[object]) -> Names:
    return Names(labels=tuple(map(str, labels)))


def _model_bytes(model: bytes | str | os.PathLike[str] | onnx.ModelProto) -> bytes:
    if isinstance(model, onnx.ModelProto):
        data: bytes = model.SerializeToString()
        return data
    return model if isinstance(model, bytes) else _read(model)


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise PublishError(f"{os.fspath(path)}: {error.strerror}") from error
