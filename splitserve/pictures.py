"""Pictures: files -> arrays, decoded, resized and normalised with Pillow."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

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


def decode(files: Sequence[object]) -> Array:
    """(n,) objects, each a uint8 array (height, width, 3) of RGB, of JPEG or PNG files.

    Raises:
        ValueError: as `splitserve.transformers.DecodeImage`.
    """
    opened = [_open(file, index) for index, file in enumerate(files)]
    n_pixels = sum(image.width * image.height for image in opened)
    if n_pixels > MAX_PIXELS_TOGETHER:
        raise ValueError(f"the images have {n_pixels} pixels in total; the limit is {MAX_PIXELS_TOGETHER}")
    images = np.empty(len(opened), dtype=np.object_)
    for index, image in enumerate(opened):
        images[index] = _decode(image, index)
    return images


def resize(images: Sequence[Array] | Array, size: int, crop: float) -> Array:
    """(n, size, size, 3) uint8: the central square of each, resampled bicubically."""
    squares = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for index, image in enumerate(images):
        middle = Image.fromarray(_middle_square(image, crop))
        squares[index] = np.asarray(middle.resize((size, size), Image.Resampling.BICUBIC))
    return squares


def normalise(squares: Array, mean: float | tuple[float, ...], std: float | tuple[float, ...]) -> Array:
    """(n, height, width, 3) uint8 -> (n, 3, height, width) float32: ``(pixel / 255 - mean) / std``."""
    scale = 1 / (255 * np.asarray(std, dtype=np.float32))
    offset = np.asarray(mean, dtype=np.float32) / np.asarray(std, dtype=np.float32)
    normalised = squares.astype(np.float32) * scale - offset
    return np.ascontiguousarray(np.moveaxis(normalised, -1, 1))


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
