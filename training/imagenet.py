"""Publish `imagenet`: JPEG or PNG files -> which of ImageNet's 1000 classes they show.

    python -m training.imagenet --repository ./models

EfficientNet-Lite0 comes from `training.imagenet_export`, which runs in an environment of its own: no other part needs torch.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import skimage.data
from PIL import Image
from sklearn.pipeline import Pipeline, make_pipeline

from splitserve.arrays import Array, from_array, to_array
from splitserve.publishing import PublishError, publish_predictor, publish_preprocessor, release
from splitserve.repository.bundle import KINDS, BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import Postprocess
from splitserve.runtimes.predictor import Predictor
from splitserve.transformers import DecodeImage, NormaliseImage, ResizeImage

NAME, VERSION, INPUT_NAME = "imagenet", 1, "image"

PICTURES = {"chelsea": "JPEG", "astronaut": "PNG", "camera": "PNG", "coffee": "JPEG", "rocket": "JPEG"}
"""Golden samples: pictures that scikit-image ships, and the format that each is sent in. The camera's is grey."""

SHOWN = {"chelsea": "Egyptian cat", "camera": "tripod", "coffee": "espresso"}
"""Expected labels; others mean that the pixels are not what the network was trained on."""

CROP = 1.0
"""The whole central square. EfficientNet-Lite was evaluated on 0.875 of it, where Chelsea is a near tie: of 153 JPEG encodings
(quality 50 to 100) 92 are an Egyptian cat, the others and the PNG a tiger cat. On the whole square 152 and the PNG
are Egyptian."""

TOLERANCE = 1e-4
"""How far ONNX Runtime's logits, which go up to about 10, may be from torch's."""


class Exported(msgspec.Struct, frozen=True):
    """What `training.imagenet_export` writes; ``logits`` are torch's, (n, 1000)."""

    model: bytes
    labels: list[str]
    logits: Array


def transforms() -> Pipeline:
    """Files (n, 1) -> pixels (n, 3, 224, 224).

    Source: tensorflow/tpu, ``efficientnet_lite_builder.py``, MEAN_RGB and STDDEV_RGB: ``(pixel - 127) / 128``.
    """
    return make_pipeline(DecodeImage(), ResizeImage(224, crop=CROP), NormaliseImage(mean=127 / 255, std=128 / 255))


def picture_files() -> Array:
    """The golden samples as clients send them, (n, 1) ``bytes``."""
    return np.array([[_encode(getattr(skimage.data, name)(), form)] for name, form in PICTURES.items()], dtype=np.object_)


def _encode(picture: Array, form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, form, quality=90)
    return file.getvalue()


def export(torch_python: Path, pixels: Array) -> Exported:
    """Run `training.imagenet_export` with the Python that has torch."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        np.save(folder / "pixels.npy", pixels)
        script = Path(__file__).with_name("imagenet_export.py")
        subprocess.run([torch_python, script, folder / "pixels.npy", folder], check=True)
        names = json.loads((folder / "labels.json").read_text())
        return Exported((folder / "model.onnx").read_bytes(), names, np.load(folder / "logits.npy"))


def check(exported: Exported, pixels: Array) -> None:
    """Compare ONNX Runtime with torch, and both with what the pictures show.

    Raises:
        PublishError: they differ.
    """
    outputs = Predictor(exported.model).infer([from_array("pixels", pixels)])
    logits = to_array(outputs[0])
    worst = float(np.abs(logits - exported.logits).max())
    if not worst <= TOLERANCE:
        raise PublishError(f"ONNX Runtime's logits differ from torch's by {worst:.1e}, expected at most {TOLERANCE:.0e}")
    found = {name: exported.labels[best] for name, best in zip(PICTURES, logits.argmax(axis=1), strict=True)}
    for name, label in SHOWN.items():
        if found[name] != label:
            raise PublishError(f'"{name}" is recognised as "{found[name]}", expected "{label}"')
    print(f"{NAME}: ONNX Runtime differs from torch by at most {worst:.1e}; {found}", flush=True)


def publish_imagenet(repository: Path, torch_python: Path) -> None:
    """Publish both halves as version 1, and release the pair."""
    files = picture_files()
    pixels = transforms().transform(files)
    exported = export(torch_python, pixels)
    check(exported, pixels)
    predictor = publish_predictor(
        exported.model,
        pixels,
        name=NAME,
        repository=repository,
        version=VERSION,
        labels=exported.labels,
        trained_on=transforms(),
        rows=files,
        input_name=INPUT_NAME,
    )
    preprocessor = publish_preprocessor(
        transforms(),
        files,
        name=NAME,
        repository=repository,
        version=VERSION,
        input_name=INPUT_NAME,
        output_name="pixels",
        labels=exported.labels,
        postprocess=Postprocess(scores="logits"),
    )
    record = release(NAME, f"{VERSION}.{VERSION}", repository=repository)
    print(
        f"{NAME} {record.pair}, release {record.sequence}: {preprocessor.folder} and {predictor.folder}",
        flush=True,
    )


def published(repository: Path) -> list[BundleKey]:
    """The halves of version 1 that are there."""
    there = Repository(repository)
    return [BundleKey(NAME, kind, VERSION) for kind in KINDS if VERSION in there.versions(NAME, kind)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Publish the picture model.")
    parser.add_argument("--repository", type=Path, default=Path("models"), help="folder of the model repository")
    parser.add_argument(
        "--torch-python", type=Path, default=Path(".venv-imagenet/bin/python"), help="Python of the environment with torch"
    )
    arguments = parser.parse_args()
    if there := published(arguments.repository):
        print(f"{' and '.join(map(str, there))}: already published; remove {arguments.repository / NAME} to publish again")
        sys.exit(len(there) < len(KINDS))
    if not arguments.torch_python.exists():
        sys.exit(f'{arguments.torch_python}: not found; "make imagenet" creates it')
    try:
        publish_imagenet(arguments.repository, arguments.torch_python)
    except (PublishError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
