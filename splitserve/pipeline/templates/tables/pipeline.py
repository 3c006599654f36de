"""The steps, and what each depends on. Change the parameters here, or for one run by ``--set name=value``."""

from __future__ import annotations

from pathlib import Path

from splitserve.pipeline import Step, TrainingPipeline

LOCK = "requirements.txt"
DATA_LOCK = "data-requirements.txt"
SERVICES = ("proxy.__main__", "preprocess_service.__main__", "predict_service.__main__")

PIPELINE = TrainingPipeline(
    name="tables",
    package=__package__ or "",
    folder=Path(__file__).parent,
    parameters={
        "data": "penguins.csv",
        "data_sha256": "f204db2c753b0937caac3cb35258562c14f073e4bbc76be24b4c51ce22767a93",
        "target": "species",
        "test_share": 0.25,
        "seed": 0,
        "max_iter": 40,
        "learning_rate": 0.1,
        "model": "penguins",
        "min_accuracy": 0.9,
        "serve": "processes",  # how it is evaluated; "images": as containers, of images with the model inside
        "n_timed": 200,
        "champion_margin": 0.01,
    },
    container_parameters={"serve": "images"},
    steps=[
        Step("data", ".data:split", files=("data",), parameters=("data_sha256", "target", "test_share", "seed"), lock=DATA_LOCK),
        Step(
            "train", ".train:train", inputs=("data",), parameters=("target", "seed", "max_iter", "learning_rate"), lock=DATA_LOCK
        ),
        Step(
            "build",
            ".build:build",
            inputs=("data/train.csv", "train/pipeline.skops"),
            parameters=("target", "model", "serve"),
            extra_modules=SERVICES,
            lock=LOCK,
            needs_docker=True,
        ),
        Step(
            "evaluate",
            ".evaluate:evaluate",
            inputs=("data/test.csv", "train/expected.json", "build"),
            parameters=("target", "model", "min_accuracy", "n_timed"),
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
