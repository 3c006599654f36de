"""Example requests from the golden samples in a repository."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from splitserve.errors import InvalidInput
from splitserve.oip.rest import json_values
from splitserve.repository import golden
from splitserve.repository.manifest import GOLDEN_FILE, BundleError
from splitserve.repository.sources import source_of
from splitserve.tensors import Tensor


def golden_instance(where: str | Path, model: str) -> Any:
    """The first golden sample of a model's newest preprocessor as a V1 instance; None if JSON cannot represent it."""
    try:
        source = source_of(where, cache=os.environ.get("MODEL_CACHE", ""))
        bundle = source.open(max(key for key in source.bundles() if (key.model, key.kind) == (model, "preprocess")))
        manifest = bundle.manifest
        samples = golden.decode(bundle.read(GOLDEN_FILE), manifest.inputs, manifest.outputs)
        values = {tensor.name: _first_row(tensor) for tensor in samples.inputs}
    except (ValueError, BundleError, InvalidInput):
        return None
    return values if len(values) > 1 else next(iter(values.values()))


def _first_row(tensor: Tensor) -> Any:
    values = [None if isinstance(each, float) and math.isnan(each) else each for each in json_values(tensor)]
    if tensor.shape[1:] == (1,):
        return values[0]
    row: list[Any] = values[: math.prod(tensor.shape[1:])]
    for size in reversed(tensor.shape[2:]):
        row = [row[start : start + size] for start in range(0, len(row), size)]
    return row
