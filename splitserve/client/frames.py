"""Columns -> a pandas DataFrame. The only module of the client that imports pandas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from splitserve.arrays import Array


def to_frame(columns: Mapping[str, Array], index: Any) -> Any:
    """As `splitserve.client.Answer.to_frame`."""
    frame = pd.DataFrame(columns)
    if index is not None and len(index) == len(frame):
        frame.index = index
    return frame
