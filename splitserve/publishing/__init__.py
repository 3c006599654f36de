"""Publishing: a fitted scikit-learn pipeline, or its parts -> bundles in a model repository, checked before they are written."""

from __future__ import annotations

from splitserve.publishing.errors import PublishError
from splitserve.publishing.from_bundles import Proposal, propose, release, rollback, withdraw
from splitserve.publishing.from_parts import publish_onnx, publish_predictor, publish_preprocessor, refused_types
from splitserve.publishing.from_pipeline import Published, publish
from splitserve.repository.manifest import Postprocess

__all__ = [
    "Postprocess",
    "Proposal",
    "PublishError",
    "Published",
    "propose",
    "publish",
    "publish_onnx",
    "publish_predictor",
    "publish_preprocessor",
    "refused_types",
    "release",
    "rollback",
    "withdraw",
]
