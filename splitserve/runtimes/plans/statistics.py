"""Operations with logarithms, powers, quantiles and distances."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from splitserve.arrays import Array
from splitserve.runtimes.plans.layouts import Layout, Operation, PlanError, Run, StepArrays, block, refuse

_BOUND = 1e-7
"""scikit-learn's distance from the quantiles at the ends within which a number is at the end, ``BOUNDS_THRESHOLD``."""


class YeoJohnson(Operation, frozen=True, tag="yeo_johnson"):
    """The Yeo-Johnson transform with the array ``lambdas``, one for each column; ``by`` "expm1" and log1p, as SciPy computes it,
    or "power", as older versions of scikit-learn do.
    """

    IS_EXACT = False

    by: Literal["expm1", "power"]

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = block(given, "f")
        lambdas = arrays.finite("lambdas", "f", layout.width)
        compute, least = (_by_expm1, np.finfo(layout.dtype).eps) if self.by == "expm1" else (_by_power, np.spacing(1.0))

        def run(X: Array) -> Array:
            found = np.empty_like(X)
            for number, power in enumerate(lambdas):
                found[:, number] = compute(X[:, number], power, least)
            return found

        return run, layout


def _by_expm1(x: Array, power: Any, least: float) -> Array:
    found = np.zeros(len(x), np.result_type(x.dtype, power))
    above = x >= 0
    below = ~above
    found[above] = np.log1p(x[above]) if abs(power) < least else np.expm1(power * np.log1p(x[above])) / power
    if abs(power - 2) > least:
        found[below] = -np.expm1((2 - power) * np.log1p(-x[below])) / (2 - power)
    else:
        found[below] = -np.log1p(-x[below])
    return found


def _by_power(x: Array, power: Any, least: float) -> Array:
    found = np.zeros_like(x)
    above = x >= 0
    below = ~above
    found[above] = np.log1p(x[above]) if abs(power) < least else (np.power(x[above] + 1, power) - 1) / power
    if abs(power - 2) > least:
        found[below] = -(np.power(-x[below] + 1, 2 - power) - 1) / (2 - power)
    else:
        found[below] = -np.log1p(-x[below])
    return found


class BoxCox(Operation, frozen=True, tag="box_cox"):
    """The Box-Cox transform with the array ``lambdas``, one for each column. Refuses numbers that are not positive."""

    IS_EXACT = False

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = block(given, "f")
        lambdas = arrays.finite("lambdas", "f", layout.width).tolist()

        def run(X: Array) -> Array:
            if (X <= 0).any():
                refuse("The Box-Cox transformation can only be applied to strictly positive data")
            found = np.empty_like(X)
            for number, power in enumerate(lambdas):
                found[:, number] = [_box_cox(value, power) for value in X[:, number].tolist()]
            return found

        return run, layout


def _box_cox(value: float, power: float) -> float:
    """With the logarithms of the C library, as SciPy's."""
    if value != value:
        return value
    if abs(power) < 1e-19:
        return math.log(value)
    exponent = power * math.log(value)
    if exponent < 709.78:
        return math.expm1(exponent) / power
    try:
        return math.copysign(1, power) * math.exp(exponent - math.log(abs(power))) - 1 / power
    except OverflowError:
        return math.copysign(math.inf, power)


class Quantiles(Operation, frozen=True, tag="quantiles"):
    """Numbers -> how many of the training data were below, from 0 to 1, interpolated between the array ``quantiles``
    (n_quantiles, n_columns), which are at the array ``references``; if ``normal``, as deviates of the standard normal
    distribution.
    """

    IS_EXACT = False

    normal: bool = False

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = block(given, "f")
        quantiles = arrays.take("quantiles", "f", None, layout.width)
        references = arrays.finite("references", "f", len(quantiles))
        if not len(quantiles):
            raise PlanError("expected quantiles, got none")
        compute = _normal if self.normal else _uniform

        def run(X: Array) -> Array:
            found = np.empty_like(X)
            for number in range(X.shape[1]):
                found[:, number] = compute(X[:, number].copy(), quantiles[:, number], references)
            return found

        return run, layout


def _uniform(x: Array, quantiles: Array, references: Array) -> Array:
    return _interpolated(x, quantiles, references, x == quantiles[0], x == quantiles[-1])


def _normal(x: Array, quantiles: Array, references: Array) -> Array:
    at_low, at_high = x - _BOUND < quantiles[0], x + _BOUND > quantiles[-1]
    deviates = normal_deviates(_interpolated(x, quantiles, references, at_low, at_high))
    edge = _BOUND - np.spacing(1)
    ends = normal_deviates(np.array([edge, 1 - edge]))
    return np.clip(deviates, ends[0], ends[1])


def _interpolated(x: Array, quantiles: Array, references: Array, at_low: Array, at_high: Array) -> Array:
    is_number = ~np.isnan(x)
    present = x[is_number]
    up = np.interp(present, quantiles, references)
    down = np.interp(-present, -quantiles[::-1], -references[::-1])
    x[is_number] = 0.5 * (up - down)
    x[at_high] = 1
    x[at_low] = 0
    return x


_MIDDLE = (
    (
        -5.99633501014107895267e1, 9.80010754185999661536e1, -5.66762857469070293439e1, 1.39312609387279679503e1,
        -1.23916583867381258016e0,
    ),
    (
        1.0, 1.95448858338141759834e0, 4.67627912898881538453e0, 8.63602421390890590575e1, -2.25462687854119370527e2,
        2.00260212380060660359e2, -8.20372256168333339912e1, 1.59056225126211695515e1, -1.18331621121330003142e0,
    ),
)  # fmt: skip
_TAIL = (
    (
        4.05544892305962419923e0, 3.15251094599893866154e1, 5.71628192246421288162e1, 4.40805073893200834700e1,
        1.46849561928858024014e1, 2.18663306850790267539e0, -1.40256079171354495875e-1, -3.50424626827848203418e-2,
        -8.57456785154685413611e-4,
    ),
    (
        1.0, 1.57799883256466749731e1, 4.53907635128879210584e1, 4.13172038254672030440e1, 1.50425385692907503408e1,
        2.50464946208309415979e0, -1.42182922854787788574e-1, -3.80806407691578277194e-2, -9.33259480895457427372e-4,
    ),
)  # fmt: skip
_FAR_TAIL = (
    (
        3.23774891776946035970e0, 6.91522889068984211695e0, 3.93881025292474443415e0, 1.33303460815807542389e0,
        2.01485389549179081538e-1, 1.23716634817820021358e-2, 3.01581553508235416007e-4, 2.65806974686737550832e-6,
        6.23974539184983293730e-9,
    ),
    (
        1.0, 6.02427039364742014255e0, 3.67983563856160859403e0, 1.37702099489081330271e0, 2.16236993594496635890e-1,
        1.34204006088543189037e-2, 3.28014464682127739104e-4, 2.89247864745380683936e-6, 6.79019408009981274425e-9,
    ),
)  # fmt: skip


def normal_deviates(p: Array) -> Array:
    """The quantile function of the standard normal distribution, as SciPy's ``ndtri``.

    Source: S. Moshier, Cephes, ``ndtri.c``.
    """
    found = [_deviate(each) for each in p.astype(np.float64).tolist()]
    return np.array(found).astype(p.dtype)


def _deviate(p: float) -> float:
    if not 0 < p < 1:
        return -math.inf if p == 0 else math.inf if p == 1 else math.nan
    is_low, y = p <= 1 - 0.13533528323661269189, p
    if not is_low:
        y = 1 - y
    if y > 0.13533528323661269189:
        y -= 0.5
        square = y * y
        return (y + y * (square * _ratio(_MIDDLE, square))) * 2.50662827463100050242e0
    x = math.sqrt(-2 * math.log(y))
    z = 1 / x
    deviate = (x - math.log(x) / x) - z * _ratio(_TAIL if x < 8 else _FAR_TAIL, z)
    return -deviate if is_low else deviate


def _ratio(polynomials: tuple[tuple[float, ...], tuple[float, ...]], x: float) -> float:
    values = []
    for coefficients in polynomials:
        value = coefficients[0]
        for coefficient in coefficients[1:]:
            value = value * x + coefficient
        values.append(value)
    return values[0] / values[1]


class NearestRows(Operation, frozen=True, tag="nearest_rows"):
    """Missing numbers are the average of the ``n_neighbours`` nearest of the ``rows`` (an array, NaN where missing) that have the
    column, by the Euclidean distance of the columns that both have; ``by_distance`` weighs them by its inverse. Columns that no
    row has are left out.
    """

    IS_EXACT = False

    n_neighbours: int
    by_distance: bool = False

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = block(given, "f")
        rows = arrays.take("rows", "f", None, layout.width)
        if layout.dtype != np.float64 or rows.dtype != np.float64 or np.isinf(rows).any():
            raise PlanError("expected rows of finite numbers, NaN where missing, of float64")
        if self.n_neighbours < 1 or not len(rows):
            raise PlanError("expected neighbours, got none")
        gaps = np.isnan(rows)
        kept = np.flatnonzero(~gaps.all(axis=0))
        if not len(kept):
            raise PlanError("expected a column with numbers")
        filled = np.where(gaps, 0.0, rows)
        n_neighbours, by_distance = self.n_neighbours, self.by_distance

        def run(X: Array) -> Array:
            missing = np.isnan(X)
            receivers = np.flatnonzero(missing[:, kept].any(axis=1))
            if not len(receivers):
                return X[:, kept]
            found = X.copy()
            distances = _distances(X[receivers], missing[receivers], filled, gaps)
            for column in kept.tolist():
                lacking = np.flatnonzero(missing[receivers, column])
                if not len(lacking):
                    continue
                donors = np.flatnonzero(~gaps[:, column])
                of_column = distances[lacking][:, donors]
                lonely = np.isnan(of_column).all(axis=1)
                found[receivers[lacking[lonely]], column] = np.ma.array(rows[:, column], mask=gaps[:, column]).mean()
                if not lonely.all():
                    values = rows[donors, column]
                    found[receivers[lacking[~lonely]], column] = _average(of_column[~lonely], values, n_neighbours, by_distance)
            return found[:, kept]

        return run, Layout("numbers", layout.dtype, (len(kept),))


def _distances(X: Array, missing: Array, rows: Array, gaps: Array) -> Array:
    """(n, n_rows) Euclidean distances, scaled up for missing columns; NaN where no column is in both."""
    X = np.where(missing, 0.0, X)
    distances = -2 * (X @ rows.T)
    distances += np.einsum("ij,ij->i", X, X)[:, np.newaxis]
    distances += np.einsum("ij,ij->i", rows, rows)[np.newaxis]
    np.maximum(distances, 0, out=distances)
    distances -= np.dot(X * X, gaps.T)
    distances -= np.dot(missing, (rows * rows).T)
    np.clip(distances, 0, None, out=distances)
    n_present = np.dot(1 - missing, ~gaps.T)
    distances[n_present == 0] = np.nan
    np.maximum(1, n_present, out=n_present)
    distances /= n_present
    distances *= X.shape[1]
    found: Array = np.sqrt(distances)
    return found


def _average(distances: Array, values: Array, n_neighbours: int, by_distance: bool) -> Array:
    n_neighbours = min(n_neighbours, len(values))
    nearest = np.argpartition(distances, n_neighbours - 1, axis=1)[:, :n_neighbours]
    chosen = np.take_along_axis(distances, nearest, axis=1)
    weights = np.ones_like(chosen)
    if by_distance:
        weights = 1.0 / chosen
        at_once = np.isinf(weights)
        rows = at_once.any(axis=1)
        weights[rows] = at_once[rows]
    weights[np.isnan(chosen)] = 0.0
    average = np.ma.average(np.ma.array(values.take(nearest)), axis=1, weights=weights)
    return np.ma.getdata(average)
