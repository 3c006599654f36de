"""Requests that are alike as one, and its answer cut apart again: row-major bytes are joined and cut, without numerics."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any

from splitserve.errors import PairMismatch
from splitserve.oip.messages import InferRequest, InferResponse
from splitserve.tensors import DATATYPES, Tensor, bytes_offsets


def alike(request: InferRequest) -> Hashable:
    """Requests with the same can be merged."""
    if len(request.inputs) == 1 and not request.outputs and not request.parameters:  # as most are
        tensor = request.inputs[0]
        return request.model, request.version, tensor.name, tensor.datatype, tensor.shape[1:]
    return (
        request.model,
        request.version,
        tuple([(tensor.name, tensor.datatype, tensor.shape[1:]) for tensor in request.inputs]),
        tuple([(wanted.name, _items(wanted.parameters)) for wanted in request.outputs]) if request.outputs else None,
        _items(request.parameters) if request.parameters else None,
    )


def _items(parameters: Any) -> Hashable:
    return frozenset(parameters.items()) if parameters else None


def merge(requests: Sequence[InferRequest]) -> InferRequest:
    """One request with the rows of all, in order; they are alike."""
    first = requests[0]
    inputs = []
    for index, like in enumerate(first.inputs):
        parts = [request.inputs[index] for request in requests]
        n_rows = sum([part.shape[0] for part in parts])
        inputs.append(Tensor(like.name, like.datatype, (n_rows, *like.shape[1:]), b"".join([part.raw for part in parts])))
    return InferRequest(
        first.model,
        tuple(inputs),
        version=first.version,
        outputs=first.outputs,
        parameters=first.parameters,
        deadline=max([request.deadline for request in requests]),
    )


def split(response: InferResponse, n_rows: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """The outputs cut into parts of so many rows each.

    Raises:
        PairMismatch: an output's rows are not the sum of these.
    """
    total = sum(n_rows)
    for tensor in response.outputs:
        if not tensor.shape or tensor.shape[0] != total:
            raise PairMismatch(f'output "{tensor.name}" has shape {list(tensor.shape)} for {total} rows')
    if len(n_rows) == 1:
        return [response.outputs]
    return list(zip(*[_cut(tensor, n_rows) for tensor in response.outputs], strict=True)) or [()] * len(n_rows)


def _cut(tensor: Tensor, n_rows: Sequence[int]) -> list[Tensor]:
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
        every = bytes_offsets(tensor)
        offsets = [every[end * row_elements] for end in ends]
    return [
        Tensor(tensor.name, tensor.datatype, (count, *inner), raw[start:end])
        for count, (start, end) in zip(n_rows, pairwise(offsets), strict=True)
    ]
