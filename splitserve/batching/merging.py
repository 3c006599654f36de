"""Compatible requests merged into one, and its response split again: row-major bytes are joined and sliced, without numerics."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any

from splitserve.errors import PairMismatch
from splitserve.oip.messages import ROW_WISE, InferRequest, InferResponse, ModelMetadata
from splitserve.signature import is_row_wise
from splitserve.telemetry.traces import merged
from splitserve.tensors import DATATYPES, Tensor, bytes_offsets


def is_mergeable(signature: ModelMetadata) -> bool:
    """Whether requests can be merged: the answer to a row does not depend on the other rows."""
    return signature.properties.get(ROW_WISE) != "false" and is_row_wise(signature.inputs, signature.outputs)


def compatibility_key(request: InferRequest) -> Hashable:
    """Equal for requests that can be merged: same model, version, inputs but for their rows, outputs and parameters."""
    if len(request.inputs) == 1 and not request.outputs and not request.parameters:  # as most are
        tensor = request.inputs[0]
        return request.model, request.version, tensor.name, tensor.datatype, tensor.shape[1:]
    return (
        request.model,
        request.version,
        tuple([(tensor.name, tensor.datatype, tensor.shape[1:]) for tensor in request.inputs]),
        tuple([(requested.name, _items(requested.parameters)) for requested in request.outputs]) if request.outputs else None,
        _items(request.parameters) if request.parameters else None,
    )


def _items(parameters: Any) -> Hashable:
    return frozenset(parameters.items()) if parameters else None


def merge(requests: Sequence[InferRequest]) -> InferRequest:
    """One request with the rows of all, in order, the latest of their deadlines, and their ids; pinned if one of them is.

    If they belong to traces, see `splitserve.telemetry.traces.merged`.

    Args:
        requests: compatible ones, at least one; each input of shape (rows, ...).
    """
    first = requests[0]
    inputs = []
    for index, like in enumerate(first.inputs):
        parts = [request.inputs[index] for request in requests]
        n_rows = sum([part.shape[0] for part in parts])
        inputs.append(Tensor(like.name, like.datatype, (n_rows, *like.shape[1:]), b"".join([part.raw for part in parts])))
    traces = [request.trace for request in requests if request.trace is not None]
    return InferRequest(
        first.model,
        tuple(inputs),
        version=first.version,
        outputs=first.outputs,
        parameters=first.parameters,
        deadline=max([request.deadline for request in requests]),
        id=_joined_ids([request.id or request.log_id for request in requests]),
        is_pinned=any(request.is_pinned for request in requests),
        trace=merged(traces, first.model, len(requests), inputs[0].shape[0]) if traces else None,
    )


MAX_IDS_LENGTH = 1024
"""Characters of the id of a merged call."""


def _joined_ids(ids: Sequence[str]) -> str:
    """The ids of merged requests, by which the next stage logs them; those that are too many are left out."""
    named = ",".join(filter(None, ids)) if any(ids) else ""
    return named if len(named) <= MAX_IDS_LENGTH else named[:MAX_IDS_LENGTH].rpartition(",")[0]


def split(response: InferResponse, n_rows: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """The outputs of each request, in order.

    Args:
        response: to the merged request; each output of shape (rows, ...).
        n_rows: the rows of each request.

    Raises:
        PairMismatch: an output does not have as many rows as were sent.
    """
    total = sum(n_rows)
    for tensor in response.outputs:
        if not tensor.shape or tensor.shape[0] != total:
            raise PairMismatch(f'output "{tensor.name}": expected {total} rows, got shape {list(tensor.shape)}')
    if len(n_rows) == 1:
        return [response.outputs]
    return list(zip(*[_split_rows(tensor, n_rows) for tensor in response.outputs], strict=True)) or [()] * len(n_rows)


def _split_rows(tensor: Tensor, n_rows: Sequence[int]) -> list[Tensor]:
    inner, raw = tensor.shape[1:], tensor.raw
    row_elements = 1
    for size in inner:
        row_elements *= size
    ends = [0]
    for count in n_rows:
        ends.append(ends[-1] + count)
    if itemsize := DATATYPES[tensor.datatype].itemsize:
        row_bytes = row_elements * itemsize
        offsets = [end * row_bytes for end in ends]
    else:
        element_offsets = bytes_offsets(tensor)
        offsets = [element_offsets[end * row_elements] for end in ends]
    return [
        Tensor(tensor.name, tensor.datatype, (count, *inner), raw[start:end])
        for count, (start, end) in zip(n_rows, pairwise(offsets), strict=True)
    ]
