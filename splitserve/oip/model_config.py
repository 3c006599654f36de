"""A model's configuration in the form of Triton's "model configuration" extension, derived from its signature.

Read-only: clients learn the tensors and how many rows a request may have.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from splitserve.oip.messages import ModelMetadata
from splitserve.signature import TensorSpec

BACKEND = "splitserve"

ANY_BATCH_SIZE = 2**31 - 1
"""``max_batch_size`` where only the size of messages limits the rows of a request."""


class TensorConfig(msgspec.Struct, frozen=True):
    """A tensor. ``dims`` exclude the batch dimension, if there is one."""

    name: str
    data_type: str
    dims: tuple[int, ...]


class DynamicBatching(msgspec.Struct, frozen=True):
    """Queued requests are merged into one call."""

    max_queue_delay_microseconds: int = 0


class ModelConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    """Fields as in the extension. ``max_batch_size`` 0: the tensors have no batch dimension."""

    name: str
    platform: str
    max_batch_size: int
    input: tuple[TensorConfig, ...]
    output: tuple[TensorConfig, ...]
    backend: str
    dynamic_batching: DynamicBatching | None = None


def config_of(
    metadata: ModelMetadata, *, max_batch_size: int = ANY_BATCH_SIZE, dynamic_batching: DynamicBatching | None = None
) -> ModelConfig:
    """The configuration of a model with this signature.

    Args:
        metadata: of a version.
        max_batch_size: rows of a request, or of a merged call, at most.
        dynamic_batching: set if requests are merged.
    """
    is_batched = all(spec.wire_shape[:1] == (-1,) for spec in (*metadata.inputs, *metadata.outputs))
    return ModelConfig(
        metadata.name,
        metadata.platform,
        max_batch_size if is_batched else 0,
        _tensors(metadata.inputs, is_batched),
        _tensors(metadata.outputs, is_batched),
        BACKEND,
        dynamic_batching if is_batched else None,
    )


def _tensors(specs: Sequence[TensorSpec], is_batched: bool) -> tuple[TensorConfig, ...]:
    return tuple(TensorConfig(spec.name, _data_type(spec.datatype), spec.wire_shape[1 if is_batched else 0 :]) for spec in specs)


def _data_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
