"""Scores as the best few classes: the output parameter ``classification``. Source: Triton's "classification" extension.

Works on wire bytes, so the proxy can do it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

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
"""The property of a model's metadata that holds the names of its classes, as a JSON list."""


def is_wanted(request: InferRequest) -> bool:
    """Whether an output is asked for as classes."""
    return bool(request.outputs) and any(PARAMETER in output.parameters for output in request.outputs)


def begin(service: InferenceService, request: InferRequest, on_answer: OnAnswer) -> Pending:
    """As the service's `begin`, with the outputs as classes that the request wants so. The service sees nothing of it.

    Requests with such outputs take a task, since their labels may have to be asked for.

    Raises:
        SplitserveError: as `InferenceService.begin`. ``on_answer`` receives InvalidInput where the parameter is not a positive
            integer, or the output is not numeric.
    """
    if not is_wanted(request):
        return service.begin(request, on_answer)
    return begin_task(_infer(service, request), on_answer)


async def _infer(service: InferenceService, request: InferRequest) -> InferResponse:
    wanted = {output.name: output.parameters[PARAMETER] for output in request.outputs if PARAMETER in output.parameters}
    response = await service.infer(_without_parameter(request))
    labels = labels_of(await service.metadata(response.model, response.version))
    outputs = tuple(
        _classes(tensor, wanted[tensor.name], labels) if tensor.name in wanted else tensor for tensor in response.outputs
    )
    return msgspec.structs.replace(response, outputs=outputs)


def _without_parameter(request: InferRequest) -> InferRequest:
    outputs = tuple(
        RequestedOutput(output.name, {name: value for name, value in output.parameters.items() if name != PARAMETER})
        for output in request.outputs
    )
    return msgspec.structs.replace(request, outputs=outputs)


def labels_of(metadata: ModelMetadata) -> list[str]:
    """The names of a model's classes; none if it does not tell."""
    text = metadata.properties.get(LABELS)
    return msgspec.json.decode(text, type=list[str]) if text else []


def _classes(tensor: Tensor, count: Parameter, labels: Sequence[str]) -> Tensor:
    """The ``count`` greatest of each row, greatest first, as BYTES ``"value:index"`` or ``"value:index:label"``."""
    if type(count) is not int or count < 1:
        raise InvalidInput(f'output "{tensor.name}": {PARAMETER} is a number of classes, at least 1')
    datatype = DATATYPES[tensor.datatype]
    if not (datatype.is_integer or datatype.is_float) or not datatype.format:
        raise InvalidInput(f'output "{tensor.name}": {tensor.datatype} has no classes')
    values = unpack(tensor)
    batch = tensor.shape[:1] if len(tensor.shape) > 1 else ()
    n_classes = math.prod(tensor.shape[len(batch) :])
    names = labels if len(labels) == n_classes else ()
    count = min(count, n_classes)
    elements = []
    for start in range(0, len(values), max(n_classes, 1)):
        row = values[start : start + n_classes]
        # nlargest keeps the order of equals; NaN, which has no order, comes last
        best = heapq.nlargest(count, range(n_classes), key=lambda index: _order(row[index]))
        elements += [_element(row[index], index, names) for index in best]
    return Tensor(tensor.name, "BYTES", (*batch, count), encode_bytes(elements))


def _order(value: float) -> float:
    return -math.inf if value != value else value


def _element(value: float, index: int, names: Sequence[str]) -> bytes:
    shown = f"{value:f}" if isinstance(value, float) else str(value)
    return (f"{shown}:{index}:{names[index]}" if names else f"{shown}:{index}").encode()
