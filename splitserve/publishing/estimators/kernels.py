"""Support vector machines, kernel ridge and Gaussian processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from scipy.linalg import solve_triangular
from sklearn.gaussian_process import kernels as gp

from splitserve.arrays import Array
from splitserve.publishing.errors import NotConvertible
from splitserve.publishing.estimators.form import Form, Forwarding, Regressor, converts, form_of, inlier, two_columns
from splitserve.publishing.estimators.neighbours import distances
from splitserve.publishing.graph import Value, concat
from splitserve.runtimes.preprocessor import to_dense

_KERNELS = ("linear", "poly", "polynomial", "rbf", "sigmoid", "laplacian")


def kernel(x: Value, points: Array, name: Any, *, gamma: float, coef0: float, degree: float) -> Value:
    """(n_rows, n_points) of a kernel of scikit-learn, in float64.

    Raises:
        NotConvertible: it has no ONNX form.
    """
    if name not in _KERNELS:
        shown = f"the kernel {name}" if isinstance(name, str) else "a callable kernel"
        raise NotConvertible(f"{shown} has no ONNX form; use one of {', '.join(_KERNELS)}")
    known = to_dense(points).astype(np.float64)
    if name == "rbf":
        return (-gamma * distances(x, known)).exp()
    if name == "laplacian":
        return (-gamma * distances(x, known, "manhattan")).exp()
    product: Value = x.astype(np.float64) @ known.T
    if name == "linear":
        return product
    shifted = gamma * product + coef0
    return shifted.tanh() if name == "sigmoid" else shifted**degree


class SupportVectors(Form):
    def kernel(self) -> Value:
        model = self.estimator
        return kernel(
            self.x, model.support_vectors_, model.kernel, gamma=model._gamma, coef0=model.coef0, degree=float(model.degree)
        )

    def weighted(self) -> Value:
        """(n_rows, 1) of what has one decision."""
        model = self.estimator
        return self.kernel() @ to_dense(model.dual_coef_).T + float(np.ravel(model.intercept_)[0])


@converts("sklearn.SVC", "sklearn.NuSVC")
class SupportVectorClassifier(SupportVectors):
    """Source: libsvm's ``svm_predict_values``: a decision for each pair of classes, then votes."""

    @cached_property
    def pairs(self) -> Value:
        """(n_rows, n_pairs), positive where the first class of the pair wins."""
        model = self.estimator
        n_classes, ends = len(model.classes_), np.cumsum(model._n_support)
        starts = ends - model._n_support
        columns = []
        dual = to_dense(model._dual_coef_)
        for first, second in combinations(range(n_classes), 2):
            column = np.zeros(dual.shape[1])
            for one, row in ((first, second - 1), (second, first)):
                column[starts[one] : ends[one]] = dual[row, starts[one] : ends[one]]
            columns.append(column)
        return self.kernel() @ np.stack(columns, axis=1) + np.ravel(model._intercept_).reshape(1, -1)

    @cached_property
    def class_index(self) -> Value:
        n_classes = len(self.estimator.classes_)
        if self.estimator.break_ties and n_classes > 2:
            return self.decision_function.argmax()
        if n_classes == 2:
            return (self.pairs.take(0) > 0.0).logical_not().astype(np.int64)
        return one_vs_one((self.pairs > 0.0).logical_not(), None, n_classes).argmax()

    @cached_property
    def decision_function(self) -> Value:
        n_classes = len(self.estimator.classes_)
        if n_classes == 2:
            return -self.pairs
        if self.estimator.decision_function_shape == "ovo":
            return self.pairs
        return one_vs_one(self.pairs < 0.0, -self.pairs, n_classes)

    @cached_property
    def predict_proba(self) -> Value:
        model = self.estimator
        slope, offset = (np.ravel(each).reshape(1, -1) for each in (model._probA, model._probB))
        least = 1e-7  # as libsvm clips it
        first_wins = (-(self.pairs * slope + offset)).sigmoid().maximum(least).minimum(1 - least)
        return coupled(first_wins, len(model.classes_))


def coupled(first_wins: Value, n_classes: int) -> Value:
    """Probabilities of classes (n_rows, n_classes) from those that the first of each pair wins (n_rows, n_pairs).

    Source: libsvm's ``multiclass_probability``, which goes on until the largest error of a row is below 0.005 / n_classes.
    """
    graph = first_wins.graph
    wins: dict[tuple[int, int], Value] = {}
    for number, (first, second) in enumerate(combinations(range(n_classes), 2)):
        wins[first, second] = first_wins.take([number])
        wins[second, first] = 1.0 - wins[first, second]
    products = []  # Q of the source, a row of it for each class
    for one in range(n_classes):
        others = [wins[other, one] * wins[other, one] for other in range(n_classes) if other != one]
        own = others[0]
        for each in others[1:]:
            own = own + each
        products.append([own if other == one else -(wins[other, one] * wins[one, other]) for other in range(n_classes)])

    def once(shares: Value) -> tuple[Value, Value]:
        share = [shares.take([number]) for number in range(n_classes)]
        weighted = [_dot(row, share) for row in products]
        total = _dot(share, weighted)
        errors = concat([(each - total).abs() for each in weighted]).max()
        is_open = errors >= 0.005 / n_classes
        for one in range(n_classes):
            step = (total - weighted[one]) / products[one][one]
            share[one] = share[one] + step
            scale = 1.0 + step
            total = (total + step * (step * products[one][one] + 2.0 * weighted[one])) / scale / scale
            weighted = [(each + step * product) / scale for each, product in zip(weighted, products[one], strict=True)]
            share = [each / scale for each in share]
        goes_on = is_open.astype(np.int64).max(0, keepdims=False).reshape(1).take(0, axis=0) > np.int64(0)
        return goes_on, graph.where(is_open, concat(share), shares)

    equal = concat([first_wins.take([0]) * 0.0 + 1.0 / n_classes] * n_classes)
    return graph.loop(max(100, n_classes), equal, once)


def _dot(left: Sequence[Value], right: Sequence[Value]) -> Value:
    total = left[0] * right[0]
    for one, other in zip(left[1:], right[1:], strict=True):
        total = total + one * other
    return total


def one_vs_one(is_second: Value, confidence: Value | None, n_classes: int) -> Value:
    """(n_rows, n_classes) of votes and, scaled to break ties, summed confidences. Source: ``_ovr_decision_function``.

    Args:
        is_second: (n_rows, n_pairs), whether the second class of the pair wins.
        confidence: (n_rows, n_pairs), positive for the second class.
        n_classes: their number.
    """
    pairs = list(combinations(range(n_classes), 2))
    firsts, seconds = (np.eye(n_classes)[[pair[side] for pair in pairs]] for side in (0, 1))
    chosen = is_second.astype(np.float64)
    votes = chosen @ seconds + (1.0 - chosen) @ firsts
    if confidence is None:
        return votes
    total = confidence.astype(np.float64) @ (seconds - firsts)
    return votes + total / (3.0 * (total.abs() + 1.0))


@converts("sklearn.SVR", "sklearn.NuSVR")
class SupportVectorRegressor(SupportVectors, Regressor):
    @cached_property
    def predict(self) -> Value:
        return self.weighted()


@converts("sklearn.OneClassSVM")
class OneClassSVM(SupportVectors):
    @cached_property
    def decision_function(self) -> Value:
        return self.weighted()

    @cached_property
    def predict(self) -> Value:
        return inlier(self.decision_function, self.decision_function > 0.0)


@converts("sklearn.KernelRidge")
class KernelRidge(Regressor):
    @cached_property
    def predict(self) -> Value:
        model = self.estimator
        known = np.asarray(model.X_fit_)
        gamma = 1.0 / known.shape[1] if model.gamma is None else float(model.gamma)
        found = kernel(self.x, known, model.kernel, gamma=gamma, coef0=float(model.coef0), degree=float(model.degree))
        return found @ np.asarray(model.dual_coef_).reshape(len(known), -1)


def covariance(x: Value, known: Array, of: Any) -> Value:
    """(n_rows, n_known) of a kernel of Gaussian processes.

    Raises:
        NotConvertible: it has no ONNX form.
    """
    if isinstance(of, gp.Sum):
        return covariance(x, known, of.k1) + covariance(x, known, of.k2)
    if isinstance(of, gp.Product):
        return covariance(x, known, of.k1) * covariance(x, known, of.k2)
    if isinstance(of, gp.Exponentiation):
        return covariance(x, known, of.kernel) ** float(of.exponent)
    if isinstance(of, gp.ConstantKernel):
        return _nothing(x, known) + float(of.constant_value)
    if isinstance(of, gp.WhiteKernel):
        return _nothing(x, known)
    if isinstance(of, gp.DotProduct):
        return x.astype(np.float64) @ known.T + float(of.sigma_0) ** 2
    scale = np.broadcast_to(of.length_scale, known.shape[1]) if hasattr(of, "length_scale") else np.ones(known.shape[1])
    squares = distances(x.astype(np.float64) / scale.reshape(1, -1), known / scale)
    if type(of) is gp.RBF:
        return (-0.5 * squares).exp()
    if isinstance(of, gp.Matern):
        return _matern(squares, float(of.nu))
    if isinstance(of, gp.RationalQuadratic):
        return (1.0 + squares / (2.0 * float(of.alpha))) ** -float(of.alpha)
    if isinstance(of, gp.ExpSineSquared):
        waves = x.graph.op("Sin", distances(x, known).sqrt() * (np.pi / float(of.periodicity))) / float(of.length_scale)
        return (-2.0 * waves * waves).exp()
    raise NotConvertible(f"the kernel {type(of).__name__} has no ONNX form; use RBF, Matern or RationalQuadratic")


def _nothing(x: Value, known: Array) -> Value:
    return (x.astype(np.float64) @ np.zeros_like(known).T).maximum(0.0)


def _matern(squares: Value, nu: float) -> Value:
    if nu == np.inf:
        return (-0.5 * squares).exp()
    root = squares.sqrt()
    if nu == 0.5:
        return (-root).exp()
    if nu == 1.5:
        scaled = root * np.sqrt(3.0)
        return (1.0 + scaled) * (-scaled).exp()
    if nu == 2.5:
        scaled = root * np.sqrt(5.0)
        return (1.0 + scaled + scaled * scaled / 3.0) * (-scaled).exp()
    raise NotConvertible(f"Matern with nu={nu:g} has no ONNX form; use 0.5, 1.5, 2.5 or inf")


@converts("sklearn.GaussianProcessRegressor")
class GaussianProcessRegressor(Regressor):
    @cached_property
    def predict(self) -> Value:
        model = self.estimator
        known = np.asarray(model.X_train_, np.float64)
        alpha = np.asarray(model.alpha_).reshape(len(known), -1)
        mean = covariance(self.x, known, model.kernel_) @ alpha
        return mean * np.ravel(model._y_train_std).reshape(1, -1) + np.ravel(model._y_train_mean).reshape(1, -1)


@converts("sklearn.GaussianProcessClassifier")
class GaussianProcessClassifier(Forwarding):
    @cached_property
    def inner(self) -> Form:
        return form_of(self.estimator.base_estimator_, self.x)


@converts("sklearn._BinaryGaussianProcessClassifierLaplace")
class BinaryGaussianProcess(Form):
    @cached_property
    def covariance(self) -> Value:
        return covariance(self.x, np.asarray(self.estimator.X_train_, np.float64), self.estimator.kernel_)

    @cached_property
    def latent(self) -> Value:
        model = self.estimator
        return self.covariance @ (model.y_train_ - model.pi_).reshape(-1, 1)

    @cached_property
    def class_index(self) -> Value:
        return (self.latent.take(0) > 0.0).astype(np.int64)

    @cached_property
    def predict_proba(self) -> Value:
        """Source: ``_BinaryGaussianProcessClassifierLaplace.predict_proba``; the diagonal of its kernels is constant."""
        from sklearn.gaussian_process._gpc import COEFS, LAMBDAS

        model = self.estimator
        known = np.asarray(model.X_train_, np.float64)
        diagonal = np.asarray(model.kernel_.diag(known))
        if not np.allclose(diagonal, diagonal[0], rtol=1e-12, atol=0):
            raise NotConvertible(
                "GaussianProcessClassifier with a kernel that is not stationary has no ONNX form; use RBF, Matern or sums of them"
            )
        inverse = solve_triangular(model.L_, np.diag(model.W_sr_), lower=True)
        solved = self.covariance @ inverse.T
        variance = float(diagonal[0]) - (solved * solved).sum()
        alpha, scales = 0.5 / variance, np.ravel(LAMBDAS).reshape(1, -1)
        arguments = (self.latent * scales) * (alpha / (alpha + scales**2)).sqrt()  # (n_rows, 5)
        integrals = (np.pi / alpha).sqrt() * erf(arguments) / (2.0 * (variance * (2.0 * np.pi)).sqrt())
        return two_columns((integrals * np.ravel(COEFS).reshape(1, -1)).sum() + 0.5 * float(np.sum(COEFS)))


def erf(x: Value) -> Value:
    """The error function in float64, where ONNX Runtime may have it in float32 only.

    By its series to 3, by its continued fraction beyond: within 1e-15. Source: Abramowitz and Stegun, 7.1.6 and 7.1.14.
    """
    size = x.abs().minimum(6.5)
    near, far = size.minimum(3.0), size.maximum(3.0)
    term = near
    total = near
    for number in range(1, 60):
        term = term * (near * near) * (2.0 / (2.0 * number + 1.0))
        total = total + term
    series = total * (-near * near).exp() * (2.0 / np.sqrt(np.pi))
    fraction = far
    for number in range(60, 0, -1):
        fraction = far + (number / 2.0) / fraction
    tail = (-far * far).exp() / (fraction * np.sqrt(np.pi))
    found = x.graph.where(size <= 3.0, series, 1.0 - tail)
    return x.graph.where(x < 0.0, -found, found)
