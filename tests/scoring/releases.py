"""Releases that no repository has, and scorers that are no models, for unit tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from splitserve.arrays import Array, from_array, to_array
from splitserve.errors import InvalidInput
from splitserve.scoring.release import Clock, ScoringRelease
from splitserve.signature import BATCH, TensorSpec
from splitserve.tensors import Tensor

NUMBER, TEXT, COUNT = (
    TensorSpec("number", "FP64", (BATCH, 1)),
    TensorSpec("text", "BYTES", (BATCH, 1)),
    TensorSpec("count", "INT64", (BATCH, 1)),
)
SUM, LABEL = TensorSpec("sum", "FP64", (BATCH, 1)), TensorSpec("label", "BYTES", (BATCH,))


def release(*inputs: TensorSpec, outputs: Sequence[TensorSpec] = (SUM, LABEL), is_row_wise: bool = True) -> ScoringRelease:
    """A release with this signature."""
    return ScoringRelease(
        repository="",
        model="m",
        sequence=1,
        pair="1.1",
        sha256="a" * 64,
        preprocessor="b" * 64,
        predictor="c" * 64,
        inputs=inputs or (NUMBER, TEXT, COUNT),
        outputs=tuple(outputs),
        is_row_wise=is_row_wise,
    )


class Adding:
    """Answers with the number added to the count, and the text; refuses calls with a number that ``refuses`` says.

    ``calls`` records how many rows each call had.
    """

    def __init__(self, refuses: Callable[[Array], Array] = lambda numbers: np.isinf(numbers)) -> None:
        self._refuses = refuses
        self.calls: list[int] = []

    def infer(self, inputs: Sequence[Tensor], clock: Clock) -> Sequence[Tensor]:
        by_name = {tensor.name: to_array(tensor) for tensor in inputs}
        numbers = by_name["number"]
        self.calls.append(len(numbers))
        if self._refuses(numbers).any():
            raise InvalidInput("row 0: a number is refused", stage="preprocess")
        clock.add("predict", 0.0)
        return [from_array("sum", numbers + by_name["count"]), from_array("label", by_name["text"].reshape(-1))]
