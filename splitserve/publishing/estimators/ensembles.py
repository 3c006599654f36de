"""Estimators made of estimators. What is inside may be anything that has a form."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
from sklearn.base import is_classifier, is_regressor
from sklearn.dummy import DummyClassifier
from sklearn.multiclass import OneVsRestClassifier

from splitserve.arrays import Array
from splitserve.publishing.errors import NotConvertible
from splitserve.publishing.estimators.form import (
    Form,
    Forwarding,
    Regressor,
    Target,
    constant_rows,
    converts,
    form_of,
    labels,
    shares_of,
    two_columns,
)
from splitserve.publishing.estimators.kernels import one_vs_one
from splitserve.publishing.estimators.neighbours import distances
from splitserve.publishing.estimators.others import interpolated
from splitserve.publishing.estimators.steps import inverse_of
from splitserve.publishing.graph import Value, concat


def added(values: Sequence[Value]) -> Value:
    """The sum, one after the other, in float64."""
    total = values[0].astype(np.float64)
    for value in values[1:]:
        total = total + value.astype(np.float64)
    return total


def numbers(form: Form) -> Value:
    """What ``predict`` of an inner estimator gives, (n_rows, n_targets), as numbers."""
    if is_classifier(form.estimator):
        return form.predict.astype(np.float64).reshape(-1, 1)
    return form.predict


def positive_score(form: Form) -> Value:
    """(n_rows, 1), greater for the second of two classes. Source: ``sklearn.multiclass._predict_binary``."""
    if is_regressor(form.estimator):
        return form.predict
    if hasattr(form.estimator, "decision_function"):
        return form.decision_function
    return form.predict_proba.take([1])


def threshold_of(estimator: Any) -> float:
    """Source: ``sklearn.multiclass._threshold_for_binary_predict``."""
    return 0.0 if hasattr(estimator, "decision_function") and is_classifier(estimator) else 0.5


def placed(form: Form, classes: Array) -> Value:
    """(n_rows,) of an inner estimator's class among those of the outer one."""
    places = np.searchsorted(classes, form.classes)
    return form.graph.constant(places.astype(np.int64)).take(form.class_index, axis=0)


class Inner(Forwarding):
    """A form that asks one inner estimator."""

    @cached_property
    def inner(self) -> Form:
        return form_of(self.inner_estimator, self.x)

    @property
    def inner_estimator(self) -> Any:
        model = self.estimator
        for name in ("best_estimator_", "estimator_", "estimator"):
            if hasattr(model, name):
                return getattr(model, name)
        raise NotConvertible(f"{type(model).__name__} has no inner estimator")


converts(
    *(
        f"sklearn.{name}"
        for name in (
            *("GridSearchCV", "RandomizedSearchCV", "HalvingGridSearchCV", "HalvingRandomSearchCV", "FrozenEstimator"),
            *("SelfTrainingClassifier", "RANSACRegressor"),
        )
    ),
)(Inner)


@converts("sklearn.RFE", "sklearn.RFECV")
class FeatureElimination(Inner):
    @cached_property
    def inner(self) -> Form:
        return form_of(self.estimator.estimator_, self.x.take(np.flatnonzero(self.estimator.support_)))


@converts("sklearn.FixedThresholdClassifier", "sklearn.TunedThresholdClassifierCV")
class ThresholdClassifier(Inner):
    @cached_property
    def class_index(self) -> Value:
        model, inner = self.estimator, self.inner
        classes = np.asarray(model.classes_)
        is_tuned = hasattr(model, "best_threshold_")
        pos_label = model._curve_scorer._get_pos_label() if is_tuned else model.pos_label
        positive = 1 if pos_label is None else int(np.flatnonzero(classes == pos_label)[0])
        methods = model._get_response_method()
        methods = [methods] if isinstance(methods, str) else methods
        method = next(name for name in methods if hasattr(inner.estimator, name))
        if method == "predict_proba":
            score = inner.predict_proba.take(positive)
        else:
            score = inner.decision_function.take(0) if positive else -inner.decision_function.take(0)
        threshold = model.best_threshold_ if is_tuned else model.threshold
        if threshold == "auto":
            threshold = 0.5 if method == "predict_proba" else 0.0
        chosen = (score >= float(threshold)).astype(np.int64)
        return chosen if positive else np.int64(1) - chosen

    @cached_property
    def predict(self) -> Value:
        return labels(self.graph, self.classes, self.class_index)


@converts("sklearn.VotingClassifier")
class VotingClassifier(Form):
    @cached_property
    def members(self) -> list[Form]:
        return [form_of(each, self.x) for each in self.estimator.estimators_]

    @property
    def weights(self) -> Array:
        given = self.estimator._weights_not_none
        return np.ones(len(self.members)) if given is None else np.asarray(given, np.float64)

    @cached_property
    def predict_proba(self) -> Value:
        parts = [member.predict_proba * float(weight) for member, weight in zip(self.members, self.weights, strict=True)]
        return added(parts) / float(self.weights.sum())

    @cached_property
    def class_index(self) -> Value:
        if self.estimator.voting == "soft":
            return self.predict_proba.argmax()
        n_classes = len(self.estimator.classes_)
        tables = [self.graph.constant(np.eye(n_classes) * weight, np.float64) for weight in self.weights]
        codes = np.arange(n_classes)  # what the members were fitted on
        votes = [table.take(placed(member, codes), axis=0) for table, member in zip(tables, self.members, strict=True)]
        return added(votes).argmax()


@converts("sklearn.VotingRegressor")
class VotingRegressor(VotingClassifier, Regressor):
    @cached_property
    def predict(self) -> Value:
        parts = [member.predict * float(weight) for member, weight in zip(self.members, self.weights, strict=True)]
        return added(parts) / float(self.weights.sum())


class _Stacking(Form):
    @cached_property
    def stacked(self) -> Value:
        """(n_rows, n_outputs) of the inner estimators, and the rows if they are passed on."""
        model, columns = self.estimator, []
        if isinstance(getattr(model, "_label_encoder", None), list):
            raise NotConvertible(
                "StackingClassifier with several targets has no ONNX form; use MultiOutputClassifier(StackingClassifier(...))"
            )
        for estimator, method in zip(model.estimators_, model.stack_method_, strict=True):
            form = form_of(estimator, self.x)
            if method == "predict":
                columns.append(numbers(form))
            elif method == "decision_function":
                columns.append(form.decision_function)
            else:
                columns.append(form.predict_proba.take([1]) if len(model.classes_) == 2 else form.predict_proba)
        if model.passthrough:
            columns.append(self.x)
        return concat(columns)

    @cached_property
    def final(self) -> Form:
        return form_of(self.estimator.final_estimator_, self.stacked)

    @cached_property
    def transform(self) -> Value:
        return self.stacked


@converts("sklearn.StackingClassifier")
class StackingClassifier(_Stacking):
    @cached_property
    def predict_proba(self) -> Value:
        return self.final.predict_proba

    @cached_property
    def decision_function(self) -> Value:
        return self.final.decision_function

    @cached_property
    def class_index(self) -> Value:
        final = self.final
        if not is_classifier(final.estimator):
            return final.predict.reshape(-1).astype(np.int64)
        return placed(final, np.arange(len(self.estimator.classes_)))


@converts("sklearn.StackingRegressor")
class StackingRegressor(_Stacking, Regressor):
    @cached_property
    def predict(self) -> Value:
        return self.final.predict


class _Bagging(Form):
    @cached_property
    def members(self) -> list[Form]:
        model, everything = self.estimator, list(range(self.estimator.n_features_in_))
        found = []
        for estimator, features in zip(model.estimators_, model.estimators_features_, strict=True):
            x = self.x if np.asarray(features).tolist() == everything else self.x.take(features)
            found.append(form_of(estimator, x))
        return found


@converts("sklearn.BaggingClassifier")
class BaggingClassifier(_Bagging):
    @cached_property
    def predict_proba(self) -> Value:
        n_classes, parts = int(self.estimator.n_classes_), []
        for member in self.members:
            codes = np.asarray(member.classes).astype(np.int64)
            if not hasattr(member.estimator, "predict_proba"):
                votes = self.graph.constant(np.eye(n_classes)[codes], np.float64)
                parts.append(votes.take(member.class_index, axis=0))
            elif len(codes) == n_classes:
                parts.append(member.predict_proba)
            else:
                parts.append(member.predict_proba.astype(np.float64) @ np.eye(n_classes)[codes])
        return added(parts) / float(len(parts))

    @cached_property
    def decision_function(self) -> Value:
        return added([member.decision_function for member in self.members]) / float(len(self.members))


@converts("sklearn.BaggingRegressor")
class BaggingRegressor(_Bagging, Regressor):
    @cached_property
    def predict(self) -> Value:
        return added([member.predict for member in self.members]) / float(len(self.members))


@converts("sklearn.AdaBoostClassifier")
class AdaBoostClassifier(Form):
    @cached_property
    def decision_function(self) -> Value:
        model = self.estimator
        n_classes, parts = int(model.n_classes_), []
        for estimator, weight in zip(model.estimators_, model.estimator_weights_, strict=False):
            table = np.where(np.eye(n_classes) == 1, weight, -1 / (n_classes - 1) * weight)
            parts.append(self.graph.constant(table, np.float64).take(placed(form_of(estimator, self.x), self.classes), axis=0))
        scores = added(parts) / float(model.estimator_weights_.sum())
        return scores.take([1]) - scores.take([0]) if n_classes == 2 else scores

    @cached_property
    def predict_proba(self) -> Value:
        if self.estimator.n_classes_ == 1:
            return constant_rows(self.x, [1.0])
        if self.estimator.n_classes_ == 2:
            return (concat([-self.decision_function, self.decision_function]) / 2.0).softmax()
        return (self.decision_function / float(self.estimator.n_classes_ - 1)).softmax()

    @cached_property
    def class_index(self) -> Value:
        if self.estimator.n_classes_ == 1:
            return self.predict_proba.argmax()
        if self.estimator.n_classes_ == 2:
            return (self.decision_function.take(0) > 0.0).astype(np.int64)
        return self.decision_function.argmax()


@converts("sklearn.AdaBoostRegressor")
class AdaBoostRegressor(Regressor):
    """The weighted median of the inner predictions."""

    @cached_property
    def predict(self) -> Value:
        model = self.estimator
        given = concat([form_of(each, self.x).predict.astype(np.float64) for each in model.estimators_])
        values, order = given.smallest(len(model.estimators_))
        weights = self.graph.constant(model.estimator_weights_[: len(model.estimators_)], np.float64).take(order, axis=0)
        sums = self.graph.op("CumSum", weights, self.graph.constant(np.int64(1)))
        reaches = (sums >= 0.5 * sums.take([-1])).astype(np.int64)
        first = self.graph.op("ArgMax", reaches, axis=1, keepdims=1)
        return self.graph.op("GatherElements", values, first, axis=1)


@converts("sklearn.CalibratedClassifierCV")
class CalibratedClassifier(Form):
    @cached_property
    def predict_proba(self) -> Value:
        members = self.estimator.calibrated_classifiers_
        return added([self._calibrated(member) for member in members]) / float(len(members))

    def _calibrated(self, member: Any) -> Value:
        form = form_of(member.estimator, self.x)
        n_classes = len(member.classes)
        by_decision = hasattr(member.estimator, "decision_function")
        scores = (form.decision_function if by_decision else form.predict_proba).astype(np.float64)
        if member.method == "temperature":
            logits = (concat([-scores, scores]) if n_classes == 2 else scores) if by_decision else (scores + 1e-12).log()
            return _limited(float(member.calibrators[0].beta_) * logits).softmax()
        if n_classes == 2:
            return _limited(two_columns(_calibrator(scores.take([-1]), member.calibrators[0])))
        places = np.searchsorted(member.classes, np.asarray(member.estimator.classes_))
        columns = [constant_rows(self.x, [0.0])] * n_classes
        for column, (place, calibrator) in enumerate(zip(places, member.calibrators, strict=True)):
            columns[place] = _calibrator(scores.take([column]), calibrator)
        return _limited(shares_of(concat(columns), 1.0 / n_classes))


def _calibrator(scores: Value, calibrator: Any) -> Value:
    """(n_rows, 1) of a calibrator of (n_rows, 1) scores."""
    if hasattr(calibrator, "a_"):
        return (-(float(calibrator.a_) * scores + float(calibrator.b_))).sigmoid()
    clipped = scores.maximum(float(calibrator.X_min_)).minimum(float(calibrator.X_max_))
    places, values = np.asarray(calibrator.X_thresholds_, np.float64), np.asarray(calibrator.y_thresholds_, np.float64)
    return interpolated(clipped, places, values)


def _limited(probabilities: Value) -> Value:
    """1 where rounding went beyond it, as scikit-learn does."""
    is_over = (probabilities > 1.0).logical_and(probabilities <= 1.0 + 1e-5)
    return probabilities.graph.where(is_over, 1.0, probabilities)


@cache
def _of_equal_scores() -> tuple[int, bool]:
    """Which of three classes OneVsRestClassifier predicts where every score is 0, and whether probabilities that are all 0 stay
    0. In older versions of scikit-learn it is the last class, and they become NaN.
    """
    rows = np.zeros((3, 1))
    model = OneVsRestClassifier(DummyClassifier(strategy="constant", constant=0)).fit(rows, [0, 1, 2])
    with np.errstate(invalid="ignore"):
        return int(model.predict(rows)[0]), not np.isnan(model.predict_proba(rows)).any()


@converts("sklearn.OneVsRestClassifier")
class OneVsRest(Form):
    @cached_property
    def members(self) -> list[Form]:
        return [form_of(each, self.x) for each in self.estimator.estimators_]

    @cached_property
    def targets(self) -> Sequence[Form]:
        model = self.estimator
        if not model.multilabel_:
            return [self]
        has_probabilities = hasattr(model, "predict_proba")
        return [
            Target(
                self,
                np.array([0, 1]),
                two_columns(member.predict_proba.take([1])) if has_probabilities else None,
                self._is_positive(member),
            )
            for member in self.members
        ]

    def _is_positive(self, member: Form) -> Value:
        return (positive_score(member).reshape(-1) > threshold_of(self.estimator.estimators_[0])).astype(np.int64)

    @cached_property
    def decision_function(self) -> Value:
        return concat([positive_score(member).reshape(-1, 1) for member in self.members])

    @cached_property
    def class_index(self) -> Value:
        if len(self.members) == 1:
            return self._is_positive(self.members[0])
        if _of_equal_scores()[0] == 0:
            return self.decision_function.argmax()
        last = len(self.members) - 1
        return np.int64(last) - self.decision_function.take(np.arange(last, -1, -1)).argmax()

    @cached_property
    def predict_proba(self) -> Value:
        shares = concat([member.predict_proba.take([1]) for member in self.members])
        if len(self.members) == 1:
            return two_columns(shares)
        return shares_of(shares) if _of_equal_scores()[1] else shares / shares.sum()


@converts("sklearn._ConstantPredictor")
class ConstantPredictor(Form):
    @cached_property
    def decision_function(self) -> Value:
        return constant_rows(self.x, np.ravel(self.estimator.y_)[:1])

    @cached_property
    def predict_proba(self) -> Value:
        share = float(np.ravel(self.estimator.y_)[0])
        return constant_rows(self.x, [1 - share, share])


@converts("sklearn.OneVsOneClassifier")
class OneVsOne(Form):
    @cached_property
    def scores(self) -> Value:
        """(n_rows, n_classes)."""
        model = self.estimator
        members = []
        for number, estimator in enumerate(model.estimators_):
            used = None if model.pairwise_indices_ is None else model.pairwise_indices_[number]
            members.append(form_of(estimator, self.x if used is None else self.x.take(used)))
        is_second = concat([labels_of_two(member).reshape(-1, 1) for member in members])
        confidence = concat([positive_score(member).reshape(-1, 1) for member in members])
        return one_vs_one(is_second, confidence, len(model.classes_))

    @cached_property
    def decision_function(self) -> Value:
        return self.scores.take([1]) if len(self.estimator.classes_) == 2 else self.scores

    @cached_property
    def class_index(self) -> Value:
        if len(self.estimator.classes_) > 2:
            return self.scores.argmax()
        return (self.scores.take(1) > threshold_of(self.estimator.estimators_[0])).astype(np.int64)


def labels_of_two(form: Form) -> Value:
    """(n_rows, 1) whether an inner estimator predicts 1 and not 0."""
    return (numbers(form).reshape(-1, 1) > 0.5).astype(np.float64)


@converts("sklearn.OutputCodeClassifier")
class OutputCode(Form):
    @cached_property
    def class_index(self) -> Value:
        model = self.estimator
        scores = [positive_score(form_of(each, self.x)).reshape(-1, 1) for each in model.estimators_]
        return distances(concat(scores), model.code_book_).argmin()


@converts("sklearn.MultiOutputClassifier")
class MultiOutputClassifier(Form):
    @cached_property
    def targets(self) -> Sequence[Form]:
        return [form_of(each, self.x) for each in self.estimator.estimators_]


@converts("sklearn.MultiOutputRegressor")
class MultiOutputRegressor(Regressor):
    @cached_property
    def predict(self) -> Value:
        return concat([form_of(each, self.x).predict.astype(np.float64) for each in self.estimator.estimators_])


class _Chain(Form):
    @cached_property
    def chained(self) -> list[Form]:
        """A form for each target, in y's order."""
        model, x, found = self.estimator, self.x, []
        method = getattr(model, "chain_method_", "predict")
        methods = [method] if isinstance(method, str) else method
        for estimator in model.estimators_:
            form = form_of(estimator, x)
            found.append(form)
            chosen = next((name for name in methods if hasattr(estimator, name)), "predict")
            if chosen == "predict":
                x = concat([x, numbers(form)])
            elif chosen == "decision_function":
                x = concat([x, form.decision_function])
            else:
                share = form.predict_proba.take([1])
                x = concat([x, share.log() if chosen == "predict_log_proba" else share])
        return [found[place] for place in np.argsort(model.order_)]


@converts("sklearn.ClassifierChain")
class ClassifierChain(_Chain):
    @cached_property
    def targets(self) -> Sequence[Form]:
        return self.chained


@converts("sklearn.RegressorChain")
class RegressorChain(_Chain, Regressor):
    @cached_property
    def predict(self) -> Value:
        return concat([form.predict.astype(np.float64) for form in self.chained])


@converts("sklearn.TransformedTargetRegressor")
class TransformedTargetRegressor(Regressor):
    @cached_property
    def predict(self) -> Value:
        model = self.estimator
        return inverse_of(model.transformer_, form_of(model.regressor_, self.x).predict.astype(np.float64))
