"""register: the evaluated release -> a version in MLflow's model registry, and perhaps its champion."""

from __future__ import annotations

import json

from splitserve.pipeline import Context
from splitserve.pipeline.registry import register_release


def register(context: Context) -> None:
    """Runs only after an evaluation that passed."""
    evaluation = json.loads(context.input("evaluate/evaluation.json").read_text())
    register_release(
        context,
        context.input("build/models"),
        model=context.parameters["model"],
        metric="accuracy",
        value=evaluation["accuracy"],
        margin=context.parameters["champion_margin"],
    )
