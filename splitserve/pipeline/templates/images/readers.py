"""Readers of datasets: CIFAR-10's binary version, and Fashion-MNIST in the files that Debian packages."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from splitserve.pipeline import StepFailed

CIFAR_RECORD = 1 + 3 * 32 * 32
"""One byte for the label, then the planes of red, green and blue, each row by row (CIFAR-100 has two bytes of labels)."""

CIFAR_IN_A_FILE = 10_000
N_CLASSES = 10

CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FASHION_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip


class Images(NamedTuple):
    """Pixels (n, 32, 32, 3) uint8 and labels (n,) int64."""

    pixels: Any
    labels: Any


def read_cifar(archive: Path) -> tuple[Images, Images]:
    """The train and test images of ``cifar-10-binary.tar.gz``.

    Raises:
        StepFailed: it is no archive or cut short; a file is missing, has the wrong length, or a label out of range.
    """
    found: dict[str, Images] = {}
    try:
        with tarfile.open(archive) as files:
            for member in files:
                name = Path(member.name).name
                if name.endswith(".bin") and (file := files.extractfile(member)) is not None:
                    found[name] = cifar_records(file.read(), name)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise StepFailed(f"{archive}: expected a whole archive of files, got: {error}") from None
    expected = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    if missing := [name for name in expected if name not in found]:
        raise StepFailed(f"{archive}: expected {', '.join(expected)}, missing {', '.join(missing)}")
    train = [found[name] for name in expected[:-1]]
    return Images(np.concatenate([each.pixels for each in train]), np.concatenate([each.labels for each in train])), found[
        expected[-1]
    ]


def cifar_records(content: bytes, name: str, n_records: int = CIFAR_IN_A_FILE) -> Images:
    """The images of one file.

    Raises:
        StepFailed: it does not have ``n_records`` records, or a label is not in 0 to 9; with the offset.
    """
    if len(content) != n_records * CIFAR_RECORD:
        raise StepFailed(
            f"{name}: expected {n_records} records of {CIFAR_RECORD} bytes, {n_records * CIFAR_RECORD} in all, got {len(content)}"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(n_records, CIFAR_RECORD)
    labels = records[:, 0].astype(np.int64)
    if (wrong := np.flatnonzero(labels >= N_CLASSES)).size:
        index = int(wrong[0])
        raise StepFailed(f"{name}: expected a label in 0 to 9 at byte {index * CIFAR_RECORD}, got {labels[index]}")
    return Images(records[:, 1:].reshape(n_records, 3, 32, 32).transpose(0, 2, 3, 1), labels)


def read_fashion_mnist(folder: Path) -> tuple[Images, Images]:
    """The train and test images below ``/usr/share/datasets/fashion-mnist``, grey 28×28: with a black border of 2, three times.

    Raises:
        StepFailed: a file is missing or cut short.
    """
    return _fashion(folder, "train", 60_000), _fashion(folder, "t10k", 10_000)


def _fashion(folder: Path, part: str, n_images: int) -> Images:
    grey = _idx(folder / f"{part}-images-idx3-ubyte.gz", 16, n_images * 28 * 28).reshape(n_images, 28, 28)
    labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz", 8, n_images).astype(np.int64)
    padded = np.pad(grey, ((0, 0), (2, 2), (2, 2)))
    return Images(np.repeat(padded[..., np.newaxis], 3, axis=-1), labels)


def _idx(file: Path, n_header: int, n_bytes: int) -> Any:
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise StepFailed(f"{file}: {error}; Debian's package dataset-fashion-mnist has it") from None
    if len(content) != n_header + n_bytes:
        raise StepFailed(f"{file}: expected {n_header + n_bytes} bytes unpacked, got {len(content)}")
    return np.frombuffer(content, dtype=np.uint8, offset=n_header)
