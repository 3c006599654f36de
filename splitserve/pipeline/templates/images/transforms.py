"""The preprocessing: the object that makes the pixels for training is the one that `build` publishes."""

from __future__ import annotations

from sklearn.pipeline import Pipeline, make_pipeline

from splitserve.transformers import DecodeImage, NormaliseImage, ResizeImage

SIZE = 32


def make_transforms() -> Pipeline:
    """JPEG or PNG files (n, 1) -> pixels (n, 3, 32, 32) float32: decoded, the central square, resized, normalised.

    How a file is decoded: `splitserve.transformers.DecodeImage`.
    """
    return make_pipeline(DecodeImage(), ResizeImage(SIZE, crop=1.0), NormaliseImage(mean=0.5, std=0.25))
