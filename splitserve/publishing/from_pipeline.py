"""A fitted pipeline -> both bundles of a model, compared with the pipeline before anything is written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from scipy.sparse import issparse
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import get_tags

from splitserve.arrays import Array, to_array
from splitserve.publishing import as_served, samples
from splitserve.publishing.agreement import compare, expected_answer, kind_of, larger, scales_of, split_answer
from splitserve.publishing.category_columns import coded
from splitserve.publishing.convert import LABEL, ModelOutput, Names, names_of, outputs_of, to_onnx
from splitserve.publishing.equality import HardRowComparison
from splitserve.publishing.errors import NotConvertible, PublishError
from splitserve.publishing.estimators.refused import reason_for
from splitserve.publishing.halves import (
    N_PROBED,
    PredictorHalf,
    PreprocessorHalf,
    PublishOptions,
    repository_at,
    said_of_golden,
)
from splitserve.publishing.predictor_half import ModelSamples, predictor_half
from splitserve.publishing.preprocessor_half import FeatureForm, preprocessor_half
from splitserve.publishing.progress import TIME_LIMIT_S, WRITING, Progress
from splitserve.publishing.proof import BATCH_SIZES
from splitserve.publishing.releasing import write_released
from splitserve.publishing.training_data import INPUT_NAME, as_rows, check_fitted, not_a_pipeline
from splitserve.repository.bundle import BundleKey
from splitserve.repository.defaults import said_of_record
from splitserve.repository.manifest import GoldenRows
from splitserve.repository.release import Compared
from splitserve.runtimes.meaning import meaning_of
from splitserve.runtimes.rows import Rowset, to_tensors

DEFAULT_TOLERANCE = 1e-4
"""How far the answers of the split may be from the pipeline's: absolute for probabilities, relative to their spread for
predictions.

ONNX models compute in float32 where scikit-learn uses float64: that alone makes a difference of up to about 1e-6.
"""


class Published(msgspec.Struct, frozen=True):
    """What `publish` wrote. ``worst_difference`` is the largest one between the split and the original over the rows checked;
    ``hard_rows`` counts the rows that were made to be difficult, by kind; ``notes`` are about columns, and say why the pair does
    not serve by default if a route pins another or it has to be signed; ``sequence`` is the number of the release;
    ``preprocessor`` and ``predictor`` are the places of the bundles, folders or URLs.
    """

    name: str
    pair: str
    preprocessor: Path | str
    predictor: Path | str
    n_checked: int
    worst_difference: float
    sequence: int
    golden: GoldenRows = "rows"
    n_golden: int = 0
    hard_rows: dict[str, int] = {}
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.name} {self.pair}, release {self.sequence}: {self.preprocessor} and {self.predictor}",
                f"on {self.n_checked} rows of X and {sum(self.hard_rows.values())} hard rows the split differs from the original "
                f"by at most {self.worst_difference:.1e}: {_listed(self.hard_rows)}",
                said_of_golden(self.golden, self.n_golden),
                *self.notes,
            )
        )


def publish(
    pipeline: Pipeline,
    X: Any,
    *,
    name: str,
    repository: str | os.PathLike[str],
    version: int | None = None,
    input_name: str = INPUT_NAME,
    tolerance: float = DEFAULT_TOLERANCE,
    trusted_modules: Sequence[str] = (),
    allow_pickle: bool = False,
    row_wise: bool = True,
    golden: Any = "rows",
    targets: Sequence[str] = (),
    time_limit_s: float = TIME_LIMIT_S,
    origin: str = "",
) -> Published:
    """Split a fitted pipeline before its estimator, publish both halves, and release the pair.

    The estimator is converted to ONNX, at float32 or, if that is not close enough, at float64. Then the two halves, as a service
    would load them, are compared with the pipeline on ``X``. The release is written last: from then on the pair serves.

    Args:
        pipeline: fitted; its last step is the estimator, the steps before it are the transforms.
        X: data of the kind that the pipeline was fitted on, (n_rows, …): a DataFrame or an array. Golden samples are taken from
            it by default, so it should show every category and, where clients may send them, missing values.
        name: what clients call the model.
        repository: folder or URL of the model repository.
        version: of both halves; the next free number of each by default.
        input_name: what clients call the input if ``X`` is an array; a DataFrame's inputs are its columns.
        tolerance: how far probabilities (absolute) and predictions (relative to their spread) may be from the pipeline's.
        trusted_modules: modules of your own transformers; the service must be told to trust them too.
        allow_pickle: write the transforms as a pickle if skops cannot store them; a service loads one only if it is allowed to,
            since that runs any code in it.
        row_wise: prove that the answer for a row does not depend on the other rows of its call. False: it may, and services never
            merge its requests with those of others.
        golden: what is stored as golden rows: "rows", rows of ``X``; "synthetic", rows drawn from each column's range and
            categories; or rows of your own, a DataFrame or array like ``X``, of which at most 64 are taken.
        targets: names of what an estimator with several targets predicts, in the order of y's columns; numbers by default.
        time_limit_s: seconds that converting, comparing and writing the bundles may take.
        origin: where the pipeline comes from, e.g. ``models:/wine/7``; recorded in both manifests.

    Raises:
        PublishError: the pipeline is not fitted or not supported, ``X`` does not fit it, the split differs from it, a service
            could not load it, the time is over, or the version exists. Nothing has been written then.
    """
    if not isinstance(pipeline, Pipeline):
        raise PublishError(not_a_pipeline(pipeline))
    check_fitted(pipeline)
    estimator = pipeline.steps[-1][1]
    if not hasattr(estimator, "predict"):
        reason = reason_for(estimator) or "has no predict; publish_preprocessor takes transforms"
        raise PublishError(f"the last step, {type(estimator).__name__}, {reason}")
    options = PublishOptions(
        name=name,
        input_name=input_name,
        trusted_modules=trusted_modules,
        allow_pickle=allow_pickle,
        row_wise=row_wise,
        golden=golden,
        origin=origin,
    )
    target = repository_at(repository)
    with Progress(name, time_limit_s) as progress:
        as_served.start()
        original = _original(pipeline, X, targets, progress)
        proven = _proven(original, options, tolerance, progress)
        n_hard = sum(proven.hard_rows.values())
        worst = {output: value for output, value in proven.worst.items() if np.isfinite(value)}  # JSON has no infinity
        compared = Compared(proven.n_checked + n_hard, hard_rows=proven.hard_rows, batch_sizes=BATCH_SIZES, worst=worst)
        half = proven.preprocessor
        progress.step(WRITING)
        release = write_released(
            target, half, proven.predictor, version=version, proven="pipeline", compared=compared, progress=progress
        )
    pair = release.pair
    return Published(
        name,
        str(pair),
        target.place(BundleKey(name, "preprocess", pair.preprocessor)),
        target.place(BundleKey(name, "predict", pair.predictor)),
        proven.n_checked,
        max((value for output, value in proven.worst.items() if kind_of(output) != LABEL), default=0.0),
        release.sequence,
        half.manifest.golden,
        half.golden.inputs[0].n_rows,
        proven.hard_rows,
        (*half.notes, *said_of_record(target, release)),
    )


class _Proven(msgspec.Struct, frozen=True):
    """Halves that answer as the pipeline does, and on what that was compared."""

    preprocessor: PreprocessorHalf
    predictor: PredictorHalf
    n_checked: int
    hard_rows: dict[str, int]
    worst: dict[str, float]


class _Original(msgspec.Struct, frozen=True):
    """A pipeline that is split: what each half is made from, rows of ``X``, and its answers to some of them, ``checked``.

    ``is_sparse``: the transforms give the estimator a sparse matrix.
    """

    pipeline: Pipeline
    transformer: Any
    estimator: Any
    outputs: Sequence[ModelOutput]
    targets: Sequence[str]
    rows: Any
    checked: Any
    expected: Mapping[str, Array]
    is_sparse: bool

    @property
    def names(self) -> Names:
        return names_of(self.outputs, self.targets)


def _original(pipeline: Pipeline, X: Any, targets: Sequence[str], progress: Progress) -> _Original:
    progress.step("the pipeline's own answers")
    given, pipeline = pipeline, _without_samplers(pipeline)
    transformer = pipeline[:-1] if len(pipeline.steps) > 1 else make_pipeline(FunctionTransformer()).fit(X)
    rows = as_rows(X)
    checked = samples.take(rows, samples.spread(len(rows), samples.N_CHECKED))
    try:
        every = partial(_features_of, transformer, rows, list(range(len(rows))))
        first = _features_of(transformer, rows, [0])
        inner = coded(pipeline.steps[-1][1], first, every)
        if inner.step is not None:
            transformer = Pipeline([*transformer.steps, ("category_codes", inner.step)])
        outputs = outputs_of(inner.estimator, targets)
        expected = expected_answer(given, checked, outputs)
    except NotConvertible as error:
        raise PublishError(str(error)) from error
    return _Original(pipeline, transformer, inner.estimator, outputs, targets, rows, checked, expected, issparse(first))


def _without_samplers(pipeline: Pipeline) -> Pipeline:
    """Without steps of training alone: those of imbalanced-learn's pipelines that draw other rows, which `predict` leaves out."""
    steps = [(name, step) for name, step in pipeline.steps if not hasattr(step, "fit_resample")]
    return pipeline if len(steps) == len(pipeline.steps) else Pipeline(steps)


def _proven(original: _Original, options: PublishOptions, tolerance: float, progress: Progress) -> _Proven:
    """The halves at the first precision at which they answer as the pipeline does.

    Raises:
        PublishError: there is none, or a service could not load them.
    """
    differences: list[str] = []
    for precision in ("FP32", "FP64"):
        try:
            found = _at_precision(original, options, tolerance, precision, progress)
        except (NotConvertible, PublishError) as error:
            raise PublishError("; ".join([*differences, f"at {precision}, {error}"]) if differences else str(error)) from error
        if isinstance(found, _Proven):
            return found
        differences.append(f"at {precision}, {found}")
    raise PublishError("; ".join(differences))


def _at_precision(
    original: _Original, options: PublishOptions, tolerance: float, precision: str, progress: Progress
) -> _Proven | str:
    """The halves at one precision, or how they differ from the pipeline.

    Raises:
        NotConvertible: the estimator has no ONNX form.
        PublishError: a half cannot be made, or a service could not load it.
    """
    progress.step(f"transforms at {precision}")
    preprocessor = _preprocessor_of(original, options, precision)
    progress.step(f"conversion at {precision}")
    predictor = _predictor_of(original, options, preprocessor, precision)
    progress.step(f"rows of X at {precision}")
    scales = scales_of(original.expected)
    tensors = to_tensors(preprocessor.rows, preprocessor.manifest.inputs, original.checked)
    answers = split_answer(preprocessor, predictor, tensors)
    worst, difference = compare(answers, original.expected, tolerance, precision=precision, scales=scales)
    if difference:
        return difference
    comparison = HardRowComparison(
        original.pipeline,
        preprocessor,
        predictor,
        original.transformer,
        original.estimator,
        tensors,
        outputs=original.outputs,
        tolerance=tolerance,
        scales=scales,
        is_sparse=original.is_sparse,
        tick=partial(_hard_step, progress, precision),
    )
    outcome = comparison.run(is_row_wise=options.row_wise)
    if outcome.difference:
        return outcome.difference
    progress.step("loading as a service does")
    as_served.check(
        preprocessor,
        predictor,
        trusted_modules=options.trusted_modules,
        allow_pickle=options.allow_pickle,
        inputs=preprocessor.golden.inputs,
    )
    return _Proven(preprocessor, predictor, len(original.checked), outcome.hard_rows, larger(worst, outcome.worst))


def _preprocessor_of(original: _Original, options: PublishOptions, precision: str) -> PreprocessorHalf:
    features = FeatureForm(precision=precision, all_as_floats=True, refuses=_refuses(original.estimator))
    return preprocessor_half(original.transformer, original.rows, features, options, names=original.names)


def _predictor_of(original: _Original, options: PublishOptions, half: PreprocessorHalf, precision: str) -> PredictorHalf:
    """The predictor whose golden inputs are the golden features of the preprocessor ``half``."""
    model = to_onnx(
        original.estimator,
        _n_features(half),
        input_name=INPUT_NAME,
        precision=precision,
        targets=original.targets,
        is_sparse=original.is_sparse,
    )
    features = {tensor.name: to_array(tensor) for tensor in half.golden.outputs}
    tried = ModelSamples(features, half.golden.inputs, half.manifest.golden, _features(half, original.checked))
    meaning = meaning_of(original.transformer)
    return predictor_half(model.SerializeToString(), tried, options, names=original.names, meaning=meaning)


def _hard_step(progress: Progress, precision: str, kind: str) -> None:
    progress.step(f"hard rows at {precision}: {kind}")


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _features_of(transformer: Any, rows: Rowset, chosen: list[int]) -> Any:
    """What the estimator gets for some rows; None if the transforms refuse them, which is told later."""
    try:
        return transformer.transform(samples.take(rows, chosen))
    except Exception:  # a transform may raise anything
        return None


def _features(half: PreprocessorHalf, rows: Rowset) -> dict[str, Array]:
    """What the preprocessor makes of some of the rows, by name."""
    probed = samples.take(rows, samples.spread(len(rows), N_PROBED))
    outputs = half.runtime.transform(to_tensors(half.rows, half.manifest.inputs, probed))
    return {tensor.name: to_array(tensor) for tensor in outputs}


def _n_features(half: PreprocessorHalf) -> int:
    shape = half.manifest.outputs[0].shape
    if len(shape) != 2:
        raise PublishError(f"the transforms give {half.manifest.outputs[0]}; an estimator takes (n_rows, n_features)")
    return int(shape[1])


def _refuses(estimator: Any) -> Literal["", "inf", "nan"]:
    """Which values ``predict`` rejects: "nan" (NaN and infinity), "inf" (infinity) or "" (neither).

    Found by calling it: the tags of estimators that do not validate say nothing.
    """
    if not hasattr(estimator, "n_features_in_"):
        return "inf" if get_tags(estimator).input_tags.allow_nan else "nan"

    def takes(value: float) -> bool:
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                estimator.predict(np.full((1, estimator.n_features_in_), value))
        except Exception:  # whatever it raises, it does not take it
            return False
        return True

    if not takes(np.nan):
        return "nan"
    return "" if takes(np.inf) else "inf"
