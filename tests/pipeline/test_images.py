"""The images example with PyTorch in its own environment: to a registered release, and through a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from splitserve.pipeline.index import Finished, Index
from splitserve.pipeline.new import copy_template

pytestmark = [pytest.mark.training, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
SMALL = {"n_train": 301, "n_test": 50, "width": 0.0625, "epochs": 3, "batch_size": 50}
"""The last batch would have one image, which batch norm cannot train on."""


def copied(folder: Path) -> Path:
    copy_template(folder / "clothes", "images")
    (folder / ".venv-torch").symlink_to(ROOT / ".venv-torch")
    return folder


def start(folder: Path, *arguments: str, **parameters: object) -> subprocess.Popen[bytes]:
    from splitserve.pipeline.templates.images.data import digest_of_files  # here: `make check` collects this file

    values = {"dataset": "fashion-mnist", "source": str(DATA), "sha256": digest_of_files(DATA), **parameters}
    command = [sys.executable, "-m", "clothes", "run", *arguments, *(f"--set={name}={value}" for name, value in values.items())]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])})


def last(folder: Path, step: str) -> Finished:
    found = Index(folder / "training-store", "clothes").last(step)
    assert found is not None
    return found


def test_images_go_from_files_to_a_registered_release(tmp_path: Path):
    """A quarter of VGG11's width, 5,000 images: at least 80 % of 1,000, and every served label is training's (`evaluate`)."""
    folder = copied(tmp_path)
    assert start(folder, n_train=5000, n_test=1000, width=0.25, epochs=3).wait() == 0
    assert last(folder, "evaluate").last_metrics()["accuracy"] >= 0.8
    wrong = json.loads((Path(last(folder, "evaluate").folder) / "wrong.json").read_text())
    assert len(wrong) == 50
    assert all(item["true"] != item["found"] for item in wrong)
    registered = json.loads((Path(last(folder, "register").folder) / "registered.json").read_text())
    assert registered["is_champion"] is True


DRAWS = """
import json, sys
from types import SimpleNamespace
import torch
from splitserve.pipeline.templates.images.train import _Training

class Recording(torch.nn.Linear):
    def forward(self, batch):
        seen.append(batch.flatten(1).tolist())
        return super().forward(batch.flatten(1))

def draws(*epochs):
    global seen
    pixels = torch.arange(40.0).reshape(20, 1, 1, 2)
    values = {"seed": 0, "batch_size": 5, "learning_rate": 0.0, "epochs": 3}
    training = _Training(Recording(2, 2), values, pixels, torch.zeros(20, dtype=torch.int64))
    for epoch in epochs:
        seen = []
        training.epoch(SimpleNamespace(progress=lambda *_: None), epoch)
    return seen

print(json.dumps([draws(1), draws(2), draws(1, 2)]))
"""


def test_each_epoch_draws_anew_and_the_same_whatever_ran_before_it():
    """Order and flips of the images, each of which is here its number."""
    python, environment = ROOT / ".venv-torch/bin/python", {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, "-c", DRAWS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, second_after_first = json.loads(done.stdout)
    assert sorted(min(row) // 2 for batch in second for row in batch) == list(range(20)), "each image once"
    orders = [[min(row) // 2 for batch in each for row in batch] for each in (first, second)]
    flips = [{min(row) // 2: row[0] > row[1] for batch in each for row in batch} for each in (first, second)]
    assert orders[0] != orders[1]
    assert flips[0] != flips[1]
    assert second == second_after_first


def test_training_that_is_killed_ends_with_equal_bits(tmp_path: Path):
    """Whichever epoch it was in: weights, logits and losses are those of an uninterrupted run; one epoch is lost at most."""
    whole = copied(tmp_path / "whole")
    assert start(whole, "--until", "train", **SMALL).wait() == 0

    killed = copied(tmp_path / "killed")
    for epoch in (1, 2):
        process = start(killed, "--until", "train", **SMALL)
        while not list((killed / "training-store" / "work").glob(f"clothes/train-*/checkpoints/00000{epoch}-*")):
            assert process.poll() is None, "it ended before"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(killed, "--until", "train", **SMALL).wait() == 0

    expected, found = last(whole, "train"), last(killed, "train")
    assert found.outputs == expected.outputs
    assert [(line["name"], line["at"], line["value"]) for line in found.metrics] == [
        (line["name"], line["at"], line["value"]) for line in expected.metrics
    ]
