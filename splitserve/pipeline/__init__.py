"""Training pipelines: steps that are run once, recorded in MLflow, and reused while nothing that they depend on has changed.

`declaration` says what a pipeline is, `dependencies` when a step is the same, `runner` what is run. Only `record` imports MLflow,
once there is something to record. It is not a workflow engine: one machine, one run at a time.
"""

from __future__ import annotations

from splitserve.pipeline.context import Context, StepFailed
from splitserve.pipeline.declaration import DeclarationError, Step, TrainingPipeline

__all__ = ["Context", "DeclarationError", "Step", "StepFailed", "TrainingPipeline"]
