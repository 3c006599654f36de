"""scikit-learn transformers that serving often needs and scikit-learn does not have. Every preprocess service trusts them."""

from __future__ import annotations

import io
from typing import Any, Literal, Self

import numpy as np
from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from sklearn.base import BaseEstimator, TransformerMixin

from splitserve.arrays import Array

MAX_PIXELS = 50_000_000
"""A larger picture is refused before it is decoded: a small file can hold a very large one."""

MAX_PIXELS_TOGETHER = 200_000_000
"""Limit on the pixels of all pictures of one call; decoded, each takes three bytes."""

_READERS: dict[bytes, type[ImageFile]] = {b"\xff\xd8\xff": JpegImageFile, b"\x89PNG\r\n\x1a\n": PngImageFile}
"""By the first bytes of a file. Not `Image.open`: it has a limit of its own, which only warns up to twice its size."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The inverse of each EXIF orientation. Not `ImageOps.exif_transpose`: it rewrites the EXIF block and fails on a damaged one."""


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
        ValueError: an element is not a JPEG or PNG file or is damaged, or has more than ``MAX_PIXELS`` pixels, or all together
            have more than ``MAX_PIXELS_TOGETHER``.
    """

    def transform(self, X: Array) -> Array:
        opened = [_open(file, index) for index, file in enumerate(np.asarray(X, dtype=np.object_).ravel())]
        n_pixels = sum(image.width * image.height for image in opened)
        if n_pixels > MAX_PIXELS_TOGETHER:
            raise ValueError(f"the images have {n_pixels} pixels in total; the limit is {MAX_PIXELS_TOGETHER}")
        images = np.empty(len(opened), dtype=np.object_)
        for index, image in enumerate(opened):
            images[index] = _decode(image, index)
        return images


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
        squares = np.empty((len(X), self.size, self.size, 3), dtype=np.uint8)
        for index, image in enumerate(X):
            middle = Image.fromarray(_middle_square(image, self.crop))
            squares[index] = np.asarray(middle.resize((self.size, self.size), Image.Resampling.BICUBIC))
        return squares


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
        return np.ascontiguousarray(np.moveaxis(normalised, -1, 1))


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


def _open(file: object, index: int) -> ImageFile:
    """A picture of which only the header has been read."""
    data = file if isinstance(file, bytes) else b""
    reader = next((reader for start, reader in _READERS.items() if data.startswith(start)), None)
    if reader is None:
        raise ValueError(f"image {index} is not a JPEG or PNG file")
    try:
        image = reader(io.BytesIO(data))
    except Exception as error:  # Pillow's parsers raise arbitrary exceptions
        raise _damaged(index) from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"image {index} has {image.width} x {image.height} pixels; the limit is {MAX_PIXELS}")
    return image


def _decode(image: ImageFile, index: int) -> Array:
    try:
        with image:
            image.load()
            return np.asarray(_upright(_rgb(image), image))
    except MemoryError:
        raise
    except Exception as error:
        raise _damaged(index) from error


def _damaged(index: int) -> ValueError:
    return ValueError(f"image {index} is damaged")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # grey of 16 bits, which convert would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)  # else convert warns that it is lost
    return image.convert("RGB")


def _upright(picture: Image.Image, file: Image.Image) -> Image.Image:
    try:
        orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block is ignored
        return picture
    turn = _UPRIGHT.get(orientation)
    return picture if turn is None else picture.transpose(turn)


def _middle_square(image: Array, crop: float) -> Array:
    height, width = image.shape[:2]
    side = max(1, int(crop * min(height, width)))
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    return image[top : top + side, left : left + side]
