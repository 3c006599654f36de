"""The output parameter ``classification``: the top k classes instead of scores. Source: Triton's "classification" extension.

Works on wire bytes, so that the proxy can do it without numerics.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from functools import partial

import msgspec

from splitserve.errors import InvalidInput
from splitserve.oip.messages import (
    InferenceService,
    InferRequest,
    InferResponse,
    ModelMetadata,
    OnAnswer,
    Parameter,
    RequestedOutput,
)
from splitserve.oip.pending import Pending, begin_task
from splitserve.tensors import DATATYPES, Tensor, encode_bytes, unpack

PARAMETER = "classification"
LABELS = "labels"
"""The property of a model's metadata with the names of its classes, a JSON list; of a model with several targets a JSON object of
lists, by the name of the output whose columns they are."""


def is_requested(request: InferRequest) -> bool:
    """Whether the classes of an output are requested."""
    return bool(request.outputs) and any(PARAMETER in output.parameters for output in request.outputs)


def begin(service: InferenceService, request: InferRequest, on_answer: OnAnswer) -> Pending:
    """As the service's `begin`; requested classes replace the scores of its response.

    Such requests run in a task, since their labels may have to be fetched.

    Raises:
        SplitserveError: as `InferenceService.begin`. ``on_answer`` receives InvalidInput where the parameter is not a positive
            integer, or the output is not numeric.
    """
    if not is_requested(request):
        return service.begin(request, on_answer)
    return begin_task(partial(_infer, service, request), on_answer)


async def _infer(service: InferenceService, request: InferRequest) -> InferResponse:
    requested = {output.name: output.parameters[PARAMETER] for output in request.outputs if PARAMETER in output.parameters}
    response = await service.infer(_without_parameter(request))
    metadata = await service.metadata(response.model, response.version)
    outputs = tuple(
        _classes(tensor, requested[tensor.name], labels_of(metadata, tensor.name)) if tensor.name in requested else tensor
        for tensor in response.outputs
    )
    return msgspec.structs.replace(response, outputs=outputs)


def _without_parameter(request: InferRequest) -> InferRequest:
    outputs = tuple(
        RequestedOutput(output.name, {name: value for name, value in output.parameters.items() if name != PARAMETER})
        for output in request.outputs
    )
    return msgspec.structs.replace(request, outputs=outputs)


def encode_labels(labels: Sequence[str], output_labels: Mapping[str, Sequence[str]]) -> str:
    """The property; "" without labels.

    Args:
        labels: of the classes of a model with one target.
        output_labels: by output, of a model with several.
    """
    known = output_labels or labels
    return msgspec.json.encode(known).decode() if known else ""


def labels_of(metadata: ModelMetadata, output: str) -> list[str]:
    """The names of an output's columns, i.e. of the classes; empty if unknown. There may be more or fewer than columns."""
    text = metadata.properties.get(LABELS)
    try:
        known = msgspec.json.decode(text, type=list[str] | dict[str, list[str]]) if text else []
    except msgspec.DecodeError:  # another maker's property of that name
        return []
    return known.get(output, []) if isinstance(known, dict) else known


def _classes(tensor: Tensor, count: Parameter, labels: Sequence[str]) -> Tensor:
    """The ``count`` greatest scores of each row, in descending order, as BYTES ``"value:index"`` or ``"value:index:label"``.

    Raises:
        InvalidInput: ``count`` is not a positive integer, or the tensor is not of numbers.
    """
    if type(count) is not int or count < 1:
        raise InvalidInput(f'output "{tensor.name}": {PARAMETER}: expected a positive integer, got {str(count)[:32]}')
    datatype = DATATYPES[tensor.datatype]
    if not (datatype.is_integer or datatype.is_float) or not datatype.format:
        raise InvalidInput(f'output "{tensor.name}": {PARAMETER}: expected a numeric datatype, got {tensor.datatype}')
    values = unpack(tensor)
    batch = tensor.shape[:1] if len(tensor.shape) > 1 else ()
    n_classes = math.prod(tensor.shape[len(batch) :])
    names = labels if len(labels) == n_classes else ()
    count = min(count, n_classes)
    elements = []
    for start in range(0, len(values), max(n_classes, 1)):
        row = values[start : start + n_classes]
        # nlargest keeps the order of equal scores; NaN comes last
        best = heapq.nlargest(count, range(n_classes), key=lambda index: _order(row[index]))
        elements += [_element(row[index], index, names) for index in best]
    return Tensor(tensor.name, "BYTES", (*batch, count), encode_bytes(elements))


def _order(value: float) -> float:
    return -math.inf if value != value else value


def _element(value: float, index: int, names: Sequence[str]) -> bytes:
    shown = f"{value:f}" if isinstance(value, float) else str(value)
    return (f"{shown}:{index}:{names[index]}" if names else f"{shown}:{index}").encode()
