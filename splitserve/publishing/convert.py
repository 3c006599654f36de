"""A fitted scikit-learn estimator -> an ONNX model with outputs that can be compared with the estimator's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import onnx
from sklearn.base import is_classifier, is_clusterer, is_outlier_detector, is_regressor

from splitserve.arrays import DTYPES, Array
from splitserve.publishing.errors import NotConvertible
from splitserve.publishing.estimators.form import Form, form_of, label_dtype, labels, not_converted
from splitserve.publishing.graph import Graph, Value

PROBABILITIES, LABEL, PREDICTION, SCORES = "probabilities", "label", "prediction", "scores"


class ModelOutput(msgspec.Struct, frozen=True):
    """One output of a model: what it is in the graph, and what it is in scikit-learn.

    ``kind`` is how it is compared: `LABEL`, `PROBABILITIES`, `PREDICTION` or `SCORES`; ``value`` and ``shape`` are made from the
    estimator's form, ``expected`` from the estimator (or a pipeline that ends with it) and rows.
    """

    name: str
    kind: str
    value: Callable[[Form], Value]
    shape: tuple[int | str, ...]
    expected: Callable[[Any, Any], Array]
    classes: tuple[str, ...] = ()


def to_onnx(
    estimator: Any,
    n_features: int,
    *,
    input_name: str,
    precision: str,
    targets: Sequence[str] = (),
    is_sparse: bool = False,
) -> onnx.ModelProto:
    """Convert an estimator.

    Args:
        estimator: fitted; takes (n_rows, n_features).
        n_features: columns of its input.
        input_name: name of the model's only input, (batch, n_features).
        precision: "FP32" or "FP64", the datatype of that input and of floating-point outputs.
        targets: names of the targets, as for `outputs_of`.
        is_sparse: whether the pipeline gives the estimator a sparse matrix, without the zeros of the input.

    Returns:
        A model with the outputs that `outputs_of` lists.

    Raises:
        NotConvertible: says why, and what works instead.
    """
    graph = Graph(DTYPES[precision])
    try:
        form = form_of(estimator, graph.input(input_name, n_features, is_sparse=is_sparse))
        outputs = {}
        for answer in outputs_of(estimator, targets):
            value = answer.value(form)
            if answer.kind != LABEL:
                value = value.astype(graph.dtype)
            sizes = [size for size in answer.shape[1:] if isinstance(size, int)]
            outputs[answer.name] = (value.reshape(-1, *sizes), answer.shape)
        return graph.model(outputs)
    except NotConvertible:
        raise
    except Exception as error:  # forms read attributes of fitted estimators, which may hold anything
        raise not_converted(estimator, f"{type(error).__name__}: {error}") from error


def outputs_of(estimator: Any, targets: Sequence[str] = ()) -> list[ModelOutput]:
    """The outputs of an estimator's model.

    A classifier gives ``label`` (batch,) and, if it has ``predict_proba``, ``probabilities`` (batch, n_classes); with several
    targets ``label_TARGET`` and ``probabilities_TARGET`` for each. A regressor gives ``prediction`` (batch, n_targets), an
    outlier detector ``label`` (1 or -1) and ``scores`` (batch,), what has clusters or components ``label`` and, if it has
    ``predict_proba``, ``probabilities``.

    Args:
        estimator: fitted, or a fitted pipeline that ends with it.
        targets: their names; numbers from 0 by default.

    Raises:
        NotConvertible: the number of names is not that of the targets, or two are the same.
    """
    last = estimator.steps[-1][1] if hasattr(estimator, "steps") else estimator
    if is_regressor(last) or not (is_classifier(last) or is_outlier_detector(last) or is_clusterer(last) or _is_mixture(last)):
        n_targets = n_targets_of(last)
        _named(targets, n_targets)
        return [ModelOutput(PREDICTION, PREDICTION, lambda form: form.predict, ("batch", n_targets), _predicted)]
    if is_classifier(last):
        return _classified(last, targets)
    found = [ModelOutput(LABEL, LABEL, lambda form: form.predict.astype(np.int64), ("batch",), _predicted)]
    if is_outlier_detector(last):
        if hasattr(last, "decision_function"):
            found.append(ModelOutput(SCORES, SCORES, lambda form: form.decision_function, ("batch",), _decided))
    elif hasattr(last, "predict_proba"):
        shape = ("batch", int(last.n_components))
        found.append(ModelOutput(PROBABILITIES, PROBABILITIES, lambda form: form.predict_proba, shape, _probable))
    return found


def n_targets_of(regressor: Any) -> int:
    """How many numbers a fitted regressor gives for a row."""
    if hasattr(regressor, "_preprocessor"):  # HistGradientBoosting, which may take text
        return 1
    n_features = getattr(regressor, "n_features_in_", 1)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numbers instead of the DataFrame of training
        one = np.asarray(regressor.predict(np.zeros((1, n_features))))
    return int(one.size)


def _is_mixture(estimator: Any) -> bool:
    return hasattr(estimator, "weights_") and hasattr(estimator, "predict_proba")


def _named(targets: Sequence[str], n_targets: int) -> Sequence[str]:
    if targets and len(targets) != n_targets:
        raise NotConvertible(f"targets: expected {n_targets} names, got {len(targets)}")
    if len(set(targets)) != len(targets) or "" in targets:
        raise NotConvertible(f"targets: expected names that differ, got {', '.join(map(repr, targets))}")
    return list(targets) or [str(number) for number in range(n_targets)]


def _predicted(model: Any, rows: Any) -> Array:
    found = _as_array(model, "predict", model.predict(rows))
    return found.reshape(-1) if found.shape[1:] == (1,) else found  # some libraries give labels (n_rows, 1)


def _probable(model: Any, rows: Any) -> Array:
    return _as_array(model, "predict_proba", model.predict_proba(rows))


def _decided(model: Any, rows: Any) -> Array:
    return _as_array(model, "decision_function", model.decision_function(rows))


def _as_array(model: Any, method: str, given: Any) -> Array:
    """What a method gave.

    Raises:
        NotConvertible: its rows have different lengths.
    """
    try:
        return np.asarray(given)
    except ValueError as error:
        last = model.steps[-1][1] if hasattr(model, "steps") else model
        raise NotConvertible(
            f"{type(last).__name__}.{method} gives rows of different lengths, which no tensor can hold; give all rows the same "
            "columns, e.g. one for each class"
        ) from error


def _classified(classifier: Any, targets: Sequence[str]) -> list[ModelOutput]:
    classes = target_classes(classifier)
    if classes is None:
        single = np.asarray(classifier.classes_)
        names = tuple(map(str, single.tolist()))
        label_dtype(single)
        found = [ModelOutput(LABEL, LABEL, lambda form: form.predict, ("batch",), _predicted, names)]
        if gives_probabilities(classifier):
            shape = ("batch", len(single))
            found.append(ModelOutput(PROBABILITIES, PROBABILITIES, lambda form: form.predict_proba, shape, _probable, names))
        return found
    found = []
    for number, (target, known) in enumerate(zip(_named(targets, len(classes)), classes, strict=True)):
        found += _of_target(classifier, number, target, known)
    return found


def _of_target(classifier: Any, number: int, target: str, classes: Array) -> list[ModelOutput]:
    names = tuple(map(str, classes.tolist()))

    def label(form: Form) -> Value:
        return labels(form.graph, classes, form.targets[number].class_index)

    def predicted(model: Any, rows: Any) -> Array:
        given = np.asarray(model.predict(rows))[:, number]
        return given.astype(classes.dtype) if classes.dtype.kind in "biuf" else given  # a chain gives floats

    def probable(model: Any, rows: Any) -> Array:
        given = model.predict_proba(rows)
        if isinstance(given, list):
            return np.asarray(given[number])
        positive = np.asarray(given)[:, number]
        return np.stack([1 - positive, positive], axis=1)

    found = [ModelOutput(f"{LABEL}_{target}", LABEL, label, ("batch",), predicted, names)]
    if gives_probabilities(classifier):
        shape = ("batch", len(classes))
        name = f"{PROBABILITIES}_{target}"
        found.append(ModelOutput(name, PROBABILITIES, lambda form: form.targets[number].predict_proba, shape, probable, names))
    return found


def target_classes(classifier: Any) -> list[Array] | None:
    """The classes of each target of a classifier with several, None if it has one."""
    classes = classifier.classes_
    if isinstance(classes, list):
        order = np.argsort(classifier.order_) if hasattr(classifier, "order_") else range(len(classes))  # of a chain
        return [np.asarray(classes[place]) for place in order] if len(classes) > 1 else None
    binarizer = getattr(classifier, "label_binarizer_", getattr(classifier, "_label_binarizer", None))
    is_indicator = str(getattr(binarizer, "y_type_", "")).startswith("multilabel")
    return [np.array([0, 1])] * len(classes) if is_indicator else None


def gives_probabilities(estimator: Any) -> bool:
    """Whether ``predict_proba`` works; a Gaussian process of pairs of classes has it and raises."""
    is_of_pairs = getattr(estimator, "multi_class", "") == "one_vs_one" and getattr(estimator, "n_classes_", 2) > 2
    return hasattr(estimator, "predict_proba") and not (is_of_pairs and hasattr(estimator, "base_estimator_"))


def expected_of(pipeline: Any, rows: Any, outputs: Sequence[ModelOutput]) -> Mapping[str, Array]:
    """What a fitted pipeline, or its estimator, answers to these rows: its `outputs_of`, by their names."""
    return {answer.name: answer.expected(pipeline, rows) for answer in outputs}


class Names(msgspec.Struct, frozen=True):
    """What an estimator's outputs hold: ``labels``, its classes, or with several targets ``output_labels`` by output."""

    labels: tuple[str, ...] = ()
    output_labels: dict[str, tuple[str, ...]] = {}


NO_NAMES = Names()


def names_of(outputs: Sequence[ModelOutput], targets: Sequence[str] = ()) -> Names:
    """The names of a fitted estimator's classes and targets, from its `outputs_of`."""
    if outputs[0].name == LABEL:
        return Names(labels=outputs[0].classes)
    if outputs[0].name == PREDICTION:
        return Names(output_labels={PREDICTION: tuple(targets)} if len(targets) > 1 else {})
    return Names(output_labels={answer.name: answer.classes for answer in outputs if answer.kind == PROBABILITIES})
