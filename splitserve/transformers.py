"""scikit-learn transformers that serving often needs and scikit-learn does not have. Every preprocess service trusts them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin

from splitserve.arrays import Array

MAX_PIXELS = 50_000_000
"""Larger pictures are refused before they are decoded: a small file can hold a very large one."""

IMAGE_FORMATS = ("JPEG", "PNG")


class _Stateless(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Nothing is learnt: fitted from the start."""

    def fit(self, X: Any, y: Any = None) -> _Stateless:
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True


class Flatten(_Stateless):
    """(n, …) -> (n, product of the rest)."""

    def transform(self, X: Array) -> Array:
        array = np.asarray(X)
        return array.reshape(array.shape[0], -1)


class DecodeImage(_Stateless):
    """(n, 1) JPEG or PNG files as ``bytes`` -> (n,) objects, each a uint8 array (height, width, 3).

    Raises:
        ValueError: an element is not a JPEG or PNG file, is damaged, or has more than ``MAX_PIXELS`` pixels.
    """

    def transform(self, X: Array) -> Array:
        files = np.asarray(X, dtype=np.object_).ravel()
        images = np.empty(len(files), dtype=np.object_)
        for index, file in enumerate(files):
            images[index] = _decode(file, index)
        return images


class ResizeImage(_Stateless):
    """(n,) images of any size -> (n, size, size, 3) uint8: the middle square of each, resampled bicubically.

    Args:
        size: height and width of the result, in pixels.
        crop: which part of the shorter side the square takes, 0 to 1.
    """

    def __init__(self, size: int = 224, crop: float = 0.875) -> None:
        self.size = size
        self.crop = crop

    def transform(self, X: Array) -> Array:
        from PIL import Image

        result = np.empty((len(X), self.size, self.size, 3), dtype=np.uint8)
        for index, image in enumerate(X):
            height, width = image.shape[:2]
            side = min(height, width) * self.crop
            left, top = (width - side) / 2, (height - side) / 2
            resized = Image.fromarray(image).resize(
                (self.size, self.size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
            )
            result[index] = np.asarray(resized)
        return result


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
        scale = 1 / (255 * np.asarray(self.std, dtype=np.float32))
        offset = np.asarray(self.mean, dtype=np.float32) / np.asarray(self.std, dtype=np.float32)
        normalised = X.astype(np.float32) * scale - offset
        return np.ascontiguousarray(np.moveaxis(normalised, -1, 1), dtype=np.float32)


def _decode(file: bytes, index: int) -> Array:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(file), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"image {index} has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are taken")
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, TypeError, Image.DecompressionBombError):
        raise ValueError(f"image {index} is not a readable JPEG or PNG file") from None
