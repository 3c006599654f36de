"""The postprocess step of a preprocessor: scores into probabilities and a label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from splitserve.arrays import Array, from_array, to_array
from splitserve.repository.manifest import Postprocess
from splitserve.repository.pairing import LABEL, PROBABILITIES
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor


def output_specs(step: Postprocess, outputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The signature of `apply`'s result: the scores replaced by probabilities and label."""
    scores = next(spec for spec in outputs if spec.name == step.scores)
    rest = tuple(spec for spec in outputs if spec.name != step.scores)
    made = TensorSpec(PROBABILITIES, scores.datatype, scores.shape), TensorSpec(LABEL, "BYTES", scores.shape[:1])
    return (*made, *rest)


def apply(step: Postprocess, labels: Sequence[str], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Replace the scores (batch, n_labels) by ``probabilities`` of the same shape and ``label`` (batch,) as BYTES."""
    scores = to_array(next(tensor for tensor in outputs if tensor.name == step.scores))
    probabilities = _softmax(scores) if step.activation == "softmax" else scores
    names = np.array(labels, dtype=np.object_)
    best = names[np.argmax(scores, axis=1)]
    rest = tuple(tensor for tensor in outputs if tensor.name != step.scores)
    return (from_array(PROBABILITIES, probabilities), from_array(LABEL, best), *rest)


def _softmax(scores: Array) -> Array:
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities: Array = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities
