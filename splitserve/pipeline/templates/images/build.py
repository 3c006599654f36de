"""build: the transforms and the network -> both bundles and a release, in the model repository ``models``."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime
import skops.io

from splitserve.pipeline import Context
from splitserve.pipeline.images import build_images
from splitserve.publishing import Postprocess, publish_predictor, publish_preprocessor, release

from .data import read_files

TOLERANCE = 1e-4
"""How far ONNX Runtime's logits may be from PyTorch's, relative to the largest."""

BATCHES = (1, 2, 7, 64)


def build(context: Context) -> None:
    """The transforms that made the pixels for training are the ones that are published: nothing is copied."""
    name = context.parameters["model"]
    classes = json.loads(context.input("data/classes.json").read_text())
    network = context.input("train/model.onnx").read_bytes()
    with np.load(context.input("data/test.npz")) as stored:
        pixels = stored["pixels"]
    context.metric("worst difference of logits", check(context, network, pixels, np.load(context.input("train/logits.npy"))))

    file = context.input("data/transforms.skops")
    transforms = skops.io.load(file, trusted=skops.io.get_untrusted_types(file=file))  # written by this pipeline's data step
    shown = read_files(context.input("data/test_files.npz"))[:256]
    models = context.outputs / "models"
    predictor = publish_predictor(
        network, pixels[: len(shown)], name=name, repository=models, labels=classes, trained_on=transforms, rows=shown,
        input_name="image",
    )  # fmt: skip
    preprocessor = publish_preprocessor(
        transforms, shown, name=name, repository=models, input_name="image", output_name="pixels", labels=classes,
        postprocess=Postprocess(scores="logits"),
    )  # fmt: skip
    release(name, f"{preprocessor.key.version}.{predictor.key.version}", repository=models)
    if context.parameters["serve"] == "images":
        build_images(context, models)
    else:
        context.fail_unless(
            context.parameters["serve"] == "processes",
            f'serve: expected "processes" or "images", got "{context.parameters["serve"]}"',
        )


def check(context: Context, network: bytes, pixels: Any, expected: Any) -> float:
    """Compare ONNX Runtime with PyTorch on all test images, alone and in batches of 2, 7 and 64.

    Returns:
        the worst difference of a logit, relative to the largest.

    Raises:
        StepFailed: it is above `TOLERANCE`, or a label differs.
    """
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    scale = float(np.abs(expected).max())
    worst = 0.0
    for size in BATCHES:
        n_images = len(pixels) if size == BATCHES[-1] else min(len(pixels), 20 * size)
        parts = [session.run(None, {"pixels": pixels[begin : begin + size]})[0] for begin in range(0, n_images, size)]
        found = np.concatenate(parts)
        difference = float(np.abs(found - expected[: len(found)]).max()) / scale
        context.fail_unless(
            difference <= TOLERANCE,
            f"in batches of {size}, ONNX Runtime's logits differ from PyTorch's by {difference:.1e} of the largest, expected at "
            f"most {TOLERANCE:.0e}",
        )
        n_other = int((found.argmax(axis=1) != expected[: len(found)].argmax(axis=1)).sum())
        context.fail_unless(not n_other, f"in batches of {size}, {n_other} labels differ from PyTorch's")
        worst = max(worst, difference)
    return worst
