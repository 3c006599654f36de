"""scikit-learn transformers that serving often needs and scikit-learn does not have. Every preprocess service trusts them."""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin

from splitserve import pictures
from splitserve.arrays import Array


class _Stateless(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Nothing is learnt: fitted from the start."""

    def fit(self, X: Any, y: Any = None) -> Self:
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True


class Flatten(_Stateless):
    """(n, …) -> (n, product of the rest)."""

    def transform(self, X: Array) -> Array:
        array = np.asarray(X)
        return array.reshape(array.shape[0], -1)


class DecodeImage(_Stateless):
    """(n, 1) JPEG or PNG files as ``bytes`` -> (n,) objects, each a uint8 array (height, width, 3) of RGB.

    The EXIF orientation is applied; transparency and colour profiles are ignored.

    Raises:
        ValueError: an element is not a JPEG or PNG file or is damaged, or has more than ``pictures.MAX_PIXELS`` pixels, or all
            together have more than ``pictures.MAX_PIXELS_TOGETHER``.
    """

    def transform(self, X: Array) -> Array:
        return pictures.decode(np.asarray(X, dtype=np.object_).ravel().tolist())


class ResizeImage(_Stateless):
    """(n,) images of any size -> (n, size, size, 3) uint8: the central square of each, resampled bicubically.

    Args:
        size: height and width of the result, in pixels.
        crop: which part of the shorter side the square takes, above 0 and at most 1.

    Source: tensorflow/tpu, EfficientNet's ``preprocessing.py``, ``_decode_and_center_crop``: the rounding is the same.
    """

    def __init__(self, size: int = 224, crop: float = 0.875) -> None:
        self.size = size
        self.crop = crop

    def transform(self, X: Array) -> Array:
        return pictures.resize(X, self.size, self.crop)


class NormaliseImage(_Stateless):
    """(n, height, width, 3) uint8 -> (n, 3, height, width) float32: ``(pixel / 255 - mean) / std``.

    Args:
        mean: of the three channels, or of all.
        std: likewise.
    """

    def __init__(self, mean: float | tuple[float, ...] = 0.5, std: float | tuple[float, ...] = 0.5) -> None:
        self.mean = mean
        self.std = std

    def transform(self, X: Array) -> Array:
        return pictures.normalise(X, self.mean, self.std)


Unseen = Literal["missing", "after", "next"]


class CategoryCodes(_Stateless):
    """(n, n_features) rows with columns of categories -> (n, n_features) float64 with their codes, as boosted trees compute with.

    Args:
        categories: of each column, those with the codes 0, 1, 2 …; None for a column of numbers.
        unseen: the code of other categories: "missing": NaN, as of a missing value; "after": one more than the last; "next": that
            of the next category, in the order of numbers or of the signed UTF-8 bytes of text, as XGBoost 3 looks them up.

    Raises:
        ValueError: "next", and there is no next category.
    """

    def __init__(self, categories: list[list[Any] | None], unseen: Unseen = "missing") -> None:
        self.categories = categories
        self.unseen = unseen

    @property
    def categories_(self) -> list[list[Any]]:
        """As of scikit-learn's encoders."""
        return [each for each in self.categories if each is not None]

    def transform(self, X: Any) -> Array:
        frame = X.iloc if hasattr(X, "iloc") else np.asarray(X)
        codes = np.empty((len(X), len(self.categories)))
        for number, known in enumerate(self.categories):
            column = frame[:, number]
            codes[:, number] = np.asarray(column, np.float64) if known is None else self._codes(column.tolist(), known)
        return codes

    def _codes(self, values: list[Any], known: list[Any]) -> list[float]:
        code_of = {category: float(code) for code, category in enumerate(known)}
        for value in set(values).difference(code_of):
            code_of[value] = np.nan if value is None or value != value else self._unseen_code(value, known)
        return [code_of[value] for value in values]

    def _unseen_code(self, value: Any, known: list[Any]) -> float:
        if self.unseen == "missing":
            return np.nan
        if self.unseen == "after":
            return float(len(known))
        later = [(_order(each), code) for code, each in enumerate(known) if _order(each) > _order(value)]
        if not later:
            raise ValueError(f"{value!r} is not a category that the model knows")
        return float(min(later)[1])


def _order(category: Any) -> Any:
    """What categories are sorted by: numbers by themselves, text by its bytes."""
    return np.frombuffer(category.encode(), np.int8).tolist() if isinstance(category, str) else category
