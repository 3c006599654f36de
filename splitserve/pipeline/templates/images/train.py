"""train: pixels -> a network, its ONNX file, and its answers to the test images. Needs PyTorch; nothing else imports it.

Each epoch begins by seeding PyTorch with (seed, epoch): shuffling, augmentation and dropout do not depend on where training was
interrupted. It runs on one thread, so the sums have one order; the result of an interrupted training is equal to the last bit.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from torch.nn import functional

from .network import vgg11

if TYPE_CHECKING:
    from splitserve.pipeline import Context

INFERENCE_BATCH = 250


def train(context: Context) -> None:
    """Train, with a checkpoint after each epoch; measure; export."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    values = context.parameters
    classes = json.loads(context.input("data/classes.json").read_text())
    pixels, labels = _load(context, "train")
    context.fail_unless(
        len(labels) >= values["batch_size"], f"batch_size: expected at most the {len(labels)} images, got {values['batch_size']}"
    )
    torch.manual_seed(values["seed"])
    network = vgg11(len(classes), values["width"])
    training = _Training(network, values, pixels, labels)
    begin = training.resume(context)
    for epoch in range(begin + 1, values["epochs"] + 1):
        loss = training.epoch(context, epoch)
        context.metric("train loss", loss, at=epoch)
        context.checkpoints.save(epoch, training.state(epoch))
    network.eval()
    _measure(context, network, classes)
    onnx.save(to_onnx(network, pixels[:2]), context.outputs / "model.onnx")


class _Training:
    """Network, optimiser and schedule, which are saved and resumed together."""

    def __init__(self, network: Any, values: dict[str, Any], pixels: Any, labels: Any) -> None:
        self.network, self.pixels, self.labels = network, pixels, labels
        self.seed, self.batch_size = values["seed"], values["batch_size"]
        self.optimiser = torch.optim.SGD(network.parameters(), lr=values["learning_rate"], momentum=0.9, weight_decay=5e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, T_max=values["epochs"])

    def epoch(self, context: Context, epoch: int) -> float:
        """One pass over the images in a new order, each flipped or not; the last incomplete batch is left out.

        Returns:
            the mean loss.
        """
        torch.manual_seed(self.seed * 1_000_003 + epoch)
        self.network.train()
        order = torch.randperm(len(self.labels))
        n_batches = len(order) // self.batch_size
        total = 0.0
        for number in range(n_batches):
            chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
            batch = self.pixels[chosen]
            is_flipped = torch.rand(len(chosen)) < 0.5
            batch[is_flipped] = batch[is_flipped].flip(-1)
            self.optimiser.zero_grad()
            loss = functional.cross_entropy(self.network(batch), self.labels[chosen])
            loss.backward()
            self.optimiser.step()
            total += float(loss.detach())
            context.progress(number + 1, n_batches, f"batches of epoch {epoch}")
        self.schedule.step()
        return float(total / n_batches)

    def state(self, epoch: int) -> bytes:
        """Tensors and plain data only, so that it loads with ``weights_only``."""
        file = io.BytesIO()
        parts = (self.network, self.optimiser, self.schedule)
        torch.save({"epoch": epoch, "states": [part.state_dict() for part in parts]}, file)
        return file.getvalue()

    def resume(self, context: Context) -> int:
        """Load the newest checkpoint, if there is one; the number of its epoch, else 0."""
        found = context.checkpoints.newest()
        context.forget_metrics(after=found[0] if found else 0)
        if found is None:
            return 0
        state = torch.load(io.BytesIO(found[1]), weights_only=True)
        for part, values in zip((self.network, self.optimiser, self.schedule), state["states"], strict=True):
            part.load_state_dict(values)
        print(f"resuming after epoch {found[0]}", flush=True)
        return int(found[0])


def _load(context: Context, part: str) -> tuple[Any, Any]:
    with np.load(context.input(f"data/{part}.npz")) as stored:
        return torch.from_numpy(stored["pixels"]), torch.from_numpy(stored["labels"])


def _measure(context: Context, network: Any, classes: list[str]) -> None:
    pixels, labels = _load(context, "test")
    with torch.inference_mode():
        logits = torch.cat([network(part) for part in pixels.split(INFERENCE_BATCH)])
    found = logits.argmax(dim=1)
    epochs = context.parameters["epochs"]
    context.metric("accuracy", float((found == labels).double().mean()), at=epochs)
    context.metric("loss", float(functional.cross_entropy(logits, labels)), at=epochs)
    counts = torch.zeros((len(classes), len(classes)), dtype=torch.int64)
    for truth, guess in zip(labels.tolist(), found.tolist(), strict=True):
        counts[truth, guess] += 1
    for index, name in enumerate(classes):
        context.metric(f"recall {name}", float(counts[index, index]) / max(1, int(counts[index].sum())), at=epochs)
    (context.outputs / "confusion.json").write_text(json.dumps({"classes": classes, "counts": counts.tolist()}))
    (context.outputs / "expected.json").write_text(json.dumps([classes[index] for index in found.tolist()]))
    np.save(context.outputs / "logits.npy", logits.numpy())


def to_onnx(network: Any, pixels: Any) -> Any:
    """An ONNX model with a free batch dimension: input ``pixels``, output ``logits``.

    Args:
        network: in evaluation mode.
        pixels: at least two images, else the exporter takes the batch for a constant.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # about missing torchvision
        program = torch.onnx.export(
            network, (pixels,), input_names=["pixels"], output_names=["logits"], dynamic_shapes=({0: "batch"},), verbose=False
        )
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces, with the paths of this machine
    return model
