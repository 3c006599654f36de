"""Operations on pictures. Pillow is imported by those who run them, and only then."""

from __future__ import annotations

from typing import Any

import numpy as np

from splitserve.arrays import Array
from splitserve.runtimes.plans.layouts import Layout, Operation, PlanError, Run, StepArrays, numbers, one, refuse

_MAX_SIZE = 4096


def versions() -> dict[str, str]:
    """Of Pillow and its JPEG decoder here; empty if Pillow is not installed."""
    try:
        import PIL
        from PIL import features
    except ImportError:
        return {"pillow": "", "libjpeg": ""}
    return {"pillow": PIL.__version__, "libjpeg": features.version("jpg") or ""}


def _pillow() -> Any:
    try:
        from splitserve import pictures
    except ImportError:
        raise PlanError("it needs Pillow, which is not installed") from None
    return pictures


class DecodePictures(Operation, frozen=True, tag="decode_pictures"):
    """JPEG or PNG files -> RGB pictures, as `splitserve.transformers.DecodeImage`."""

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        one(given, "files")
        pictures = _pillow()

        def run(files: list[Any]) -> Any:
            try:
                return pictures.decode(files)
            except ValueError as error:
                refuse(str(error))

        return run, Layout("pictures")


class ResizePictures(Operation, frozen=True, tag="resize_pictures"):
    """The central square of pictures, bicubically resampled to ``size`` × ``size``, as `splitserve.transformers.ResizeImage`."""

    size: int
    crop: float

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        one(given, "pictures")
        pictures, size, crop = _pillow(), self.size, self.crop
        if not 1 <= size <= _MAX_SIZE or not 0 < crop <= 1:
            raise PlanError(f"expected a size from 1 to {_MAX_SIZE} and a crop above 0 and at most 1")
        return (lambda images: pictures.resize(images, size, crop)), numbers(np.uint8, size, size, 3)


class NormalisePictures(Operation, frozen=True, tag="normalise_pictures"):
    """(height, width, 3) bytes -> (3, height, width) float32: × the array ``scale``, - ``offset``, each of 3 numbers or of 1."""

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        layout = one(given, "numbers")
        if layout.dtype != np.uint8 or len(layout.inner) != 3 or layout.inner[2] != 3:
            raise PlanError(f"expected pictures of bytes, got {layout}")
        scale, offset = (_three(arrays.finite(name, "f", None)) for name in ("scale", "offset"))

        def run(squares: Array) -> Array:
            normalised = squares.astype(np.float32) * scale - offset
            return np.ascontiguousarray(np.moveaxis(normalised, -1, 1))

        return run, numbers(np.float32, 3, *layout.inner[:2])


def _three(array: Array) -> Array:
    if array.dtype != np.float32 or len(array) not in (1, 3):
        raise PlanError("expected 1 or 3 numbers of float32")
    return array
