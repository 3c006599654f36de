"""``python -m training run tables|images``, ``status``, ``show RUN``: the example pipelines, run in place."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from splitserve.pipeline import TrainingPipeline
from splitserve.pipeline.commands import main
from splitserve.pipeline.templates.images.pipeline import PIPELINE as IMAGES
from splitserve.pipeline.templates.tables.pipeline import PIPELINE as TABLES

ROOT = Path(__file__).resolve().parents[1]


def in_place(pipeline: TrainingPipeline) -> TrainingPipeline:
    """With its store, and the environments of its steps, in this repository's folder."""
    steps = [replace(step, python=str(ROOT / ".venv-torch/bin/python")) if step.python else step for step in pipeline.steps]
    return replace(pipeline, steps=steps, store=ROOT / "training-store")


if __name__ == "__main__":
    sys.exit(main({pipeline.name: in_place(pipeline) for pipeline in (TABLES, IMAGES)}))
