"""Example requests from the golden samples in a repository."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from splitserve.checks.verify import golden_rows
from splitserve.errors import InvalidInput
from splitserve.oip.rest import json_values
from splitserve.repository.manifest import BundleError
from splitserve.repository.releases import ReleaseReader
from splitserve.repository.sources import source_of
from splitserve.tensors import Tensor


def golden_instance(where: str | Path, model: str) -> Any:
    """The first golden row of a model's current release as a V1 instance; None if there is none, or JSON cannot represent it."""
    try:
        source = source_of(where, cache=os.environ.get("MODEL_CACHE", ""))
        list(source.bundles())
        current = ReleaseReader(source).history(model).current()
        if current is None:
            return None
        values = {tensor.name: _first_row(tensor) for tensor in golden_rows(source, current).inputs}
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
