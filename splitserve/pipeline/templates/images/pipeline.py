"""The steps, and what each depends on. Change the parameters here, or for one run by ``--set name=value``.

Only ``train`` needs PyTorch, in an environment of its own, ``.venv-torch`` beside this folder:

    python -m venv .venv-torch && .venv-torch/bin/pip install -r THIS_FOLDER/torch-requirements.txt
"""

from __future__ import annotations

from pathlib import Path

from splitserve.pipeline import Step, TrainingPipeline

LOCK = "requirements.txt"
DATA_LOCK = "data-requirements.txt"
SERVICES = ("proxy.__main__", "preprocess_service.__main__", "predict_service.__main__")

PIPELINE = TrainingPipeline(
    name="images",
    package=__package__ or "",
    folder=Path(__file__).parent,
    parameters={
        "dataset": "cifar-10",
        "source": "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "sha256": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "n_train": 50_000,
        "n_test": 10_000,
        "seed": 0,
        "width": 1.0,
        "epochs": 20,
        "batch_size": 100,
        "learning_rate": 0.05,
        "model": "images",
        "min_accuracy": 0.8,
        "serve": "processes",  # how it is evaluated; "images": as containers, of images with the model inside
        "n_timed": 200,
        "champion_margin": 0.005,
    },
    container_parameters={"serve": "images"},
    steps=[
        Step("data", ".data:store", parameters=("dataset", "source", "sha256", "n_train", "n_test", "seed"), lock=DATA_LOCK),
        Step(
            "train",
            ".train:train",
            inputs=("data/train.npz", "data/test.npz", "data/classes.json"),
            parameters=("seed", "width", "epochs", "batch_size", "learning_rate"),
            lock="torch-requirements.txt",
            python="../.venv-torch/bin/python",
        ),
        Step(
            "build",
            ".build:build",
            inputs=("data/test.npz", "data/test_files.npz", "data/transforms.skops", "data/classes.json", "train"),
            parameters=("model", "serve"),
            extra_modules=SERVICES,
            lock=LOCK,
            needs_docker=True,
        ),
        Step(
            "evaluate",
            ".evaluate:evaluate",
            inputs=("data/test.npz", "data/test_files.npz", "data/classes.json", "train/expected.json", "build"),
            parameters=("model", "min_accuracy", "n_timed"),
            extra_modules=("splitserve.cli.up", *SERVICES),
            lock=LOCK,
            needs_docker=True,
        ),
        Step(
            "register",
            ".register:register",
            inputs=("build", "evaluate"),
            parameters=("model", "champion_margin"),
            lock=LOCK,
            runs_in_runner=True,
        ),
    ],
)
