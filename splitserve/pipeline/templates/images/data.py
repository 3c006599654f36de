"""data: the dataset -> pixels as the network gets them, and the test images as clients send them."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import skops.io
from PIL import Image

from splitserve.pipeline import Context, StepFailed

from .fetch import fetch
from .readers import CIFAR_CLASSES, FASHION_CLASSES, Images, read_cifar, read_fashion_mnist
from .transforms import make_transforms


def store(context: Context) -> None:
    """Read, check, take the first of a shuffled order, encode as PNG, and transform."""
    values = context.parameters
    (train, test), classes = _dataset(values)
    transforms = make_transforms()
    draw = np.random.default_rng(values["seed"])
    for name, images, n_images in (("train", train, values["n_train"]), ("test", test, values["n_test"])):
        context.fail_unless(
            0 < n_images <= len(images.labels), f"n_{name}: expected 1 to {len(images.labels)} images, got {n_images}"
        )
        chosen = draw.permutation(len(images.labels))[:n_images]
        files = np.array([[_png(picture)] for picture in images.pixels[chosen]], dtype=np.object_)
        context.progress(n_images, n_images, f"{name} images")
        np.savez(context.outputs / f"{name}.npz", pixels=transforms.transform(files), labels=images.labels[chosen])
        if name == "test":
            _save_files(context.outputs / "test_files.npz", files)
    skops.io.dump(transforms, context.outputs / "transforms.skops")
    (context.outputs / "classes.json").write_text(json.dumps(classes))


def _dataset(values: dict[str, Any]) -> tuple[tuple[Images, Images], list[str]]:
    if values["dataset"] == "cifar-10":
        return read_cifar(fetch(values["source"], values["sha256"])), CIFAR_CLASSES
    if values["dataset"] == "fashion-mnist":
        folder = Path(values["source"])
        digest = digest_of_files(folder)
        if digest != values["sha256"]:
            raise StepFailed(f"{folder}: expected SHA-256 {values['sha256']} of its files, got {digest}")
        return read_fashion_mnist(folder), FASHION_CLASSES
    raise StepFailed(f'dataset: expected "cifar-10" or "fashion-mnist", got "{values["dataset"]}"')


def digest_of_files(folder: Path) -> str:
    """SHA-256 over the bytes of the ``.gz`` files of a folder, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.gz")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "PNG")
    return file.getvalue()


def _save_files(path: Path, files: Any) -> None:
    joined = np.frombuffer(b"".join(files.ravel()), dtype=np.uint8)
    np.savez(path, bytes=joined, ends=np.cumsum([len(file) for file in files.ravel()]))


def read_files(path: Path) -> Any:
    """The test images as clients send them, (n, 1) ``bytes``."""
    with np.load(path) as stored:
        joined, ends = stored["bytes"].tobytes(), stored["ends"].tolist()
    return np.array([[joined[begin:end]] for begin, end in zip([0, *ends], ends, strict=False)], dtype=np.object_)
