"""The transformers that splitserve adds to scikit-learn's."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.utils.validation import check_is_fitted

from splitserve import pictures
from splitserve.arrays import Array, from_array, to_array
from splitserve.errors import InvalidInput
from splitserve.publishing import publish_preprocessor
from splitserve.repository.folder import Repository
from splitserve.runtimes import preprocessor, sklearn_pipeline
from splitserve.transformers import DecodeImage, Flatten, NormaliseImage, ResizeImage

HEIGHT, WIDTH = 6, 4


def noise(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Array:
    """A picture in which all parts differ."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(picture: Array | Image.Image, form: str = "PNG", **options: Any) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[ExifTags.Base.Orientation] = orientation
    return block.tobytes()


def png(width: int, height: int, *, bit_depth: int = 8, lines: Sequence[bytes] = ()) -> bytes:
    """An RGB file written by hand, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + line for line in lines))
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def rows(*files: object) -> Array:
    """Files as a preprocessor gets them, (n, 1)."""
    return np.array([[file] for file in files], dtype=np.object_)


def decode(*files: object) -> list[Array]:
    return list(DecodeImage().transform(rows(*files)))


@pytest.fixture
def pipeline() -> Any:
    return make_pipeline(DecodeImage(), ResizeImage(2, crop=1.0), NormaliseImage((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))


def test_a_png_is_decoded_exactly():
    """A PNG is lossless: the same pixels, as uint8 RGB."""
    picture = noise()

    (decoded,) = decode(encode(picture))

    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, picture)


def test_a_jpeg_is_decoded_approximately():
    """A JPEG of one colour is decoded as that colour, up to rounding."""
    picture = np.full((HEIGHT, WIDTH, 3), (200, 100, 50), dtype=np.uint8)

    (decoded,) = decode(encode(picture, "JPEG"))

    assert decoded.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(decoded, picture.astype(float), atol=3)


def test_pictures_of_different_sizes_are_decoded_together():
    """The pictures of a call may have different sizes; their order is kept."""
    small, large = noise(2, 3), noise(30, 20)

    decoded = decode(encode(small), encode(large))

    assert [picture.shape for picture in decoded] == [(2, 3, 3), (30, 20, 3)]


def test_pictures_of_one_size_stay_an_array_of_pictures():
    """Equal sizes do not turn the (n,) objects into one array of numbers."""
    decoded = DecodeImage().transform(rows(encode(noise()), encode(noise(seed=1))))

    assert decoded.shape == (2,)
    np.testing.assert_array_equal(decoded[1], noise(seed=1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_every_type_of_png_becomes_rgb(mode: str):
    """Black and white, grey, palette and transparent files all become three channels."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white").convert(mode)

    (decoded,) = decode(encode(picture))

    np.testing.assert_array_equal(decoded, np.full((HEIGHT, WIDTH, 3), 255))


def test_transparency_is_ignored():
    """The colour of a pixel counts, however little is to be seen of it."""
    (decoded,) = decode(encode(Image.new("RGBA", (1, 1), (10, 20, 30, 0))))

    assert decoded.tolist() == [[[10, 20, 30]]]


def test_a_transparent_palette_is_decoded_without_a_warning():
    """Pillow would warn that the transparency of a palette is lost; warnings are errors here."""
    picture = Image.fromarray(noise()).quantize(8)

    (decoded,) = decode(encode(picture, transparency=bytes(range(8))))

    np.testing.assert_array_equal(decoded, np.asarray(picture.convert("RGB")))


def test_grey_of_16_bits_is_scaled_to_8():
    """The high byte is kept; Pillow's own conversion would make everything from 255 on white."""
    grey = np.array([[0, 0x0100, 0x8000, 0xFFFF]], dtype=np.uint16)

    (decoded,) = decode(encode(grey))

    assert decoded[0].tolist() == [[0] * 3, [1] * 3, [0x80] * 3, [0xFF] * 3]


def test_colours_of_16_bits_are_scaled_to_8():
    """The high byte of each channel is kept."""
    file = png(1, 1, bit_depth=16, lines=[bytes.fromhex("ffff 8000 0100")])

    (decoded,) = decode(file)

    assert decoded.tolist() == [[[0xFF, 0x80, 0x01]]]


@pytest.mark.parametrize(("mode", "colour"), [("L", (90, 90, 90)), ("CMYK", (200, 100, 50))])
def test_every_type_of_jpeg_becomes_rgb(mode: str, colour: tuple[int, int, int]):
    """Grey and printers' JPEG files become three channels of the same colour."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), colour).convert(mode)

    (decoded,) = decode(encode(picture, "JPEG"))

    np.testing.assert_allclose(decoded, np.full((HEIGHT, WIDTH, 3), colour, dtype=float), atol=3)


UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}
"""What the orientations of EXIF 2.3, 4.6.4, mean: from the stored pixels to those that are to be seen."""


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_exif_orientation_of_a_png_is_applied(orientation: int):
    """Phones store pixels in the sensor's orientation and record the rotation in EXIF."""
    stored = noise()

    (decoded,) = decode(encode(stored, exif=exif(orientation)))

    np.testing.assert_array_equal(decoded, UPRIGHT[orientation](stored))


def test_the_exif_orientation_of_a_jpeg_is_applied():
    """The orientation counts in both formats."""
    (decoded,) = decode(encode(noise(), "JPEG", exif=exif(6)))

    assert decoded.shape == (WIDTH, HEIGHT, 3)


@pytest.mark.parametrize("block", [exif(0), exif(9), b"Exif\0\0not TIFF"])
def test_an_invalid_orientation_is_ignored(block: bytes):
    """A picture with a wrong or damaged EXIF block is decoded unrotated."""
    (decoded,) = decode(encode(noise(), exif=block))

    np.testing.assert_array_equal(decoded, noise())


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_truncated_file_is_refused_by_its_number(form: str):
    """Half a file is damaged, not half a picture; the message says which of the call's files it was."""
    whole = encode(noise(64, 64), form)

    with pytest.raises(ValueError, match="image 1 is damaged"):
        decode(whole, whole[: len(whole) // 2])


def test_a_file_with_a_wrong_checksum_is_refused():
    """A flipped bit in a PNG file's header is found."""
    file = bytearray(encode(noise()))
    file[20] ^= 1

    with pytest.raises(ValueError, match="image 0 is damaged"):
        decode(bytes(file))


@pytest.mark.parametrize(
    "file",
    [b"", b"hello", encode(noise(), "GIF"), encode(noise(), "BMP"), encode(noise(), "TIFF"), "text", None],
    ids=["empty", "words", "gif", "bmp", "tiff", "str", "none"],
)
def test_other_image_formats_are_refused(file: object):
    """Formats other than JPEG and PNG are not parsed, even if Pillow could."""
    with pytest.raises(ValueError, match="image 0 is not a JPEG or PNG file"):
        decode(file)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(form: str, monkeypatch: pytest.MonkeyPatch):
    """The size is taken from the header: a file that ends there is refused for its size, not for its end."""
    monkeypatch.setattr(pictures, "MAX_PIXELS", 64 * 64 - 1)
    file = encode(noise(64, 64), form)

    with pytest.raises(ValueError, match="image 0 has 64 x 64 pixels; the limit is 4095"):
        decode(file[: len(file) * 3 // 4])


def test_a_picture_at_the_pixel_limit_is_accepted(monkeypatch: pytest.MonkeyPatch):
    """The limit itself is allowed."""
    monkeypatch.setattr(pictures, "MAX_PIXELS", HEIGHT * WIDTH)

    assert len(decode(encode(noise()))) == 1


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_decompression_bomb_is_refused_by_its_size(side: int):
    """Pillow warns of the smaller and raises an error of its own at the larger; here both are the caller's error."""
    with pytest.raises(ValueError, match=f"image 0 has {side} x {side} pixels"):
        decode(png(side, side))


def test_pictures_of_too_many_pixels_together_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Many pictures below the limit of one picture must not exhaust memory together."""
    monkeypatch.setattr(pictures, "MAX_PIXELS_TOGETHER", 2 * HEIGHT * WIDTH)
    file = encode(noise())

    assert len(decode(file, file)) == 2
    with pytest.raises(ValueError, match="72 pixels in total; the limit is 48"):
        decode(file, file, file)


def test_out_of_memory_is_not_reported_as_a_bad_file(monkeypatch: pytest.MonkeyPatch):
    """It says something of this machine, so it is no ValueError, which would be the caller's error."""

    def load(image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(PngImageFile, "load", load)

    with pytest.raises(MemoryError):
        decode(encode(noise()))


@given(
    form=st.sampled_from(["JPEG", "PNG"]),
    changes=st.lists(st.tuples(st.integers(3, 400), st.binary(min_size=1, max_size=4)), max_size=4),
    end=st.integers(10, 1000),
)
def test_a_damaged_file_gives_a_picture_or_a_value_error(form: str, changes: list[tuple[int, bytes]], end: int):
    """Any content gives a picture or a ValueError, which is the caller's error."""
    file = bytearray(encode(noise(12, 10), form, exif=exif(6)))
    for start, data in changes:
        file[start : start + len(data)] = data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "MAX_PIXELS", 10_000)
        try:
            (decoded,) = decode(bytes(file[:end]))
        except ValueError:
            return

    assert decoded.dtype == np.uint8
    assert decoded.shape[2:] == (3,)


def test_the_centre_is_cropped():
    """The square takes its part of the shorter side; where it is as large as the result its pixels are unchanged."""
    wide = noise(8, 12)

    (square,) = ResizeImage(4, crop=0.5).transform([wide])

    np.testing.assert_array_equal(square, wide[2:6, 4:8])


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (3, 2), (640, 480)])
def test_pictures_of_any_size_are_resized_to_the_same(shape: tuple[int, int]):
    """A picture smaller than the square is enlarged; one colour stays that colour."""
    picture = np.full((*shape, 3), (10, 20, 30), dtype=np.uint8)

    resized = ResizeImage(224).transform([picture])

    assert resized.dtype == np.uint8
    assert resized.shape == (1, 224, 224, 3)
    assert (resized == (10, 20, 30)).all()


def test_a_reduced_picture_keeps_its_mean():
    """Every pixel of the square has its share in a smaller picture: fine stripes become grey, not one of their colours."""
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255

    (resized,) = ResizeImage(8, crop=1.0).transform([stripes])

    np.testing.assert_allclose(resized, 127.5, atol=12)


def test_pixels_are_normalised_by_channel():
    """(pixel / 255 - mean) / std, with the channels first, as float32."""
    pictures = np.stack([noise(), noise(seed=1)])
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    normalised = NormaliseImage(mean, std).transform(pictures)

    assert normalised.dtype == np.float32
    expected = ((pictures / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(normalised, expected, rtol=1e-5, atol=1e-6)


def test_one_mean_applies_to_all_channels():
    """EfficientNet-Lite's mean and deviation bring a pixel to (pixel - 127) / 128."""
    pictures = np.array([0, 127, 255], dtype=np.uint8).reshape(1, 1, 1, 3)

    normalised = NormaliseImage(mean=127 / 255, std=128 / 255).transform(pictures)

    np.testing.assert_allclose(normalised.ravel(), [-127 / 128, 0, 1], atol=1e-6)


def test_flatten_keeps_the_rows():
    """All but the leading dimension become one."""
    flat = Flatten().transform(np.arange(24).reshape(2, 3, 4))

    assert flat.tolist() == [list(range(12)), list(range(12, 24))]


TRANSFORMERS = [Flatten(), DecodeImage(), ResizeImage(8, crop=0.5), NormaliseImage((0.1, 0.2, 0.3), std=0.4)]


@pytest.mark.parametrize("transformer", TRANSFORMERS, ids=lambda each: type(each).__name__)
def test_a_clone_has_the_same_parameters(transformer: Any):
    """scikit-learn's rule for estimators: what the constructor takes is what get_params gives, unchanged."""
    copy = clone(transformer)

    assert copy is not transformer
    assert copy.get_params() == transformer.get_params()


@pytest.mark.parametrize("transformer", TRANSFORMERS, ids=lambda each: type(each).__name__)
def test_no_fit_is_needed(transformer: Any):
    """They learn nothing, so they can be published without a call of fit; fit gives the transformer itself."""
    check_is_fitted(transformer)

    assert transformer.fit(None) is transformer


@pytest.mark.parametrize("transformer", TRANSFORMERS, ids=lambda each: type(each).__name__)
def test_a_transformer_is_loaded_without_being_trusted_by_name(transformer: Any):
    """skops keeps the parameters, tuples as tuples, and the loader trusts the library's own types."""
    loaded = sklearn_pipeline.load(sklearn_pipeline.dump(transformer))

    assert type(loaded) is type(transformer)
    assert loaded.get_params() == transformer.get_params()


def test_the_global_pandas_output_setting_has_no_effect(pipeline: Any):
    """Images have no column names: scikit-learn's transform_output leaves them arrays."""
    with sklearn.config_context(transform_output="pandas"):
        pixels = pipeline.fit_transform(rows(encode(noise())))

    assert type(pixels) is np.ndarray


@pytest.mark.heavy
def test_a_published_image_pipeline_answers_as_in_process(pipeline: Any, tmp_path: Path):
    """Published and loaded as a service loads it, the pipeline gives the same pixels for files that it has not seen."""
    samples = rows(encode(noise()), encode(noise(9, 9), "JPEG"))
    bundle = publish_preprocessor(pipeline, samples, name="tiny", repository=tmp_path, input_name="image", output_name="pixels")
    unseen = rows(encode(noise(30, 20, seed=2), "JPEG"), encode(noise(5, 8, seed=3)), encode(noise(seed=4)))

    loaded = preprocessor.load(Repository(tmp_path).open(bundle.key))
    (pixels,) = loaded.transform([from_array("image", unseen)])

    assert (pixels.name, pixels.datatype, pixels.shape) == ("pixels", "FP32", (3, 3, 2, 2))
    np.testing.assert_array_equal(to_array(pixels), pipeline.transform(unseen))


@pytest.mark.heavy
def test_a_damaged_file_is_the_callers_error(pipeline: Any, tmp_path: Path):
    """What the transforms refuse reaches the caller as InvalidInput, which is a 400, with the file's number."""
    bundle = publish_preprocessor(pipeline, rows(encode(noise())), name="tiny", repository=tmp_path, input_name="image")
    loaded = preprocessor.load(bundle)

    with pytest.raises(InvalidInput, match="image 1 is not a JPEG or PNG file"):
        loaded.transform([from_array("image", rows(encode(noise()), b"hello"))])
