"""The V1 protocol of TensorFlow Serving and KServe: ``instances`` in, ``predictions`` out; ``inputs`` in, ``outputs`` out.

A body has no datatypes; they follow from the model's signature.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Hashable, Iterable, Sequence, Set
from itertools import chain
from typing import Any

import msgspec

from splitserve.errors import InvalidInput
from splitserve.oip.ignored_inputs import ignored_inputs
from splitserve.oip.messages import LOADING, NO_DEADLINE, READY, InferRequest, InferResponse, ModelMetadata, ModelState
from splitserve.oip.rest import decode_json, flatten, json_values, pack_values
from splitserve.signature import TensorSpec
from splitserve.tensors import DATATYPES, Tensor


class _Body(msgspec.Struct):
    instances: list[Any] | msgspec.UnsetType = msgspec.UNSET
    inputs: dict[str, Any] | list[Any] | msgspec.UnsetType = msgspec.UNSET


class V1Request(msgspec.Struct, frozen=True):
    """A request, and whether it is columnar, so that the response has the same form."""

    request: InferRequest
    is_columnar: bool


_decoder = msgspec.json.Decoder(_Body)
_encoder = msgspec.json.Encoder()


def decode_request(
    body: bytes, metadata: ModelMetadata, version: str, *, deadline: float = NO_DEADLINE, caller: Hashable = None
) -> V1Request:
    """The request in a body.

    An instance is an object by input name, or the row of a model's only input, or a list with one value for each input in the
    signature's order. ``inputs`` are whole tensors by input name, or that of a model's only input. A value ``{"b64": "…"}``
    stands for bytes. Inputs that the model ignores are left out.

    Args:
        body: JSON with ``instances`` or ``inputs``; other fields, such as ``signature_name``, are ignored.
        metadata: signature of the model.
        version: requested.
        deadline: of the request.
        caller: for fair queueing.

    Raises:
        InvalidInput: names the instance or input, what was expected and what was sent.
    """
    given = decode_json(body, _decoder)
    if (given.instances is msgspec.UNSET) == (given.inputs is msgspec.UNSET):
        raise InvalidInput('the request body: expected one of "instances" (by row) and "inputs" (by column)')
    if given.inputs is msgspec.UNSET:
        request = from_instances(given.instances, metadata, version, deadline=deadline, caller=caller)
        return V1Request(request, is_columnar=False)
    columns = _columns(given.inputs, metadata.inputs, ignored_inputs(metadata))
    inputs = tuple(_tensor(spec, columns[spec.name]) for spec in metadata.inputs)
    request = InferRequest(metadata.name, inputs, version=version, deadline=deadline, caller=caller)
    return V1Request(request, is_columnar=True)


def _columns(given: dict[str, Any] | list[Any], specs: Sequence[TensorSpec], ignored: Set[str]) -> dict[str, list[Any]]:
    """The rows of each input, by name."""
    names = [spec.name for spec in specs]
    if isinstance(given, list):
        if len(specs) != 1:
            raise InvalidInput(f"inputs: expected an object with {_listed(names)}, got a list")
        return {names[0]: given}
    if missing := [name for name in names if name not in given]:
        raise InvalidInput(f"inputs: missing {_listed(missing)}")
    if unknown := given.keys() - set(names) - ignored:
        raise InvalidInput(f"inputs: unknown {_listed(sorted(unknown))}, expected {_listed(names)}")
    for name in names:
        if not isinstance(given[name], list):
            raise InvalidInput(f'input "{name}": expected a list of rows')
    return given


def from_instances(
    instances: Sequence[Any],
    metadata: ModelMetadata,
    version: str = "",
    *,
    deadline: float = NO_DEADLINE,
    caller: Hashable = None,
) -> InferRequest:
    """As `decode_request`, for instances that are Python values already."""
    specs = metadata.inputs
    ignored = ignored_inputs(metadata)
    rows = [_row(index, instance, specs, ignored) for index, instance in enumerate(instances)]
    inputs = tuple(_tensor(spec, [row[position] for row in rows]) for position, spec in enumerate(specs))
    return InferRequest(metadata.name, inputs, version=version, deadline=deadline, caller=caller)


def _row(index: int, instance: Any, specs: Sequence[TensorSpec], ignored: Set[str]) -> list[Any]:
    """The values of one instance, in the order of the inputs."""
    if isinstance(instance, dict) and instance.keys() != {"b64"}:
        names = [spec.name for spec in specs]
        if missing := [name for name in names if name not in instance]:
            raise InvalidInput(f"instance {index}: missing {_listed(missing)}")
        if unknown := instance.keys() - set(names) - ignored:
            raise InvalidInput(f"instance {index}: unknown {_listed(sorted(unknown))}, expected {_listed(names)}")
        return [instance[name] for name in names]
    if len(specs) == 1:
        return [instance]
    if not isinstance(instance, list) or len(instance) != len(specs):
        raise InvalidInput(f"instance {index}: expected an object or a list of {len(specs)} values, one for each input")
    return instance


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f'"{name[:64]}"' for name in names[:20])


def _tensor(spec: TensorSpec, values: list[Any]) -> Tensor:
    inner = tuple(spec.wire_shape[1:])
    what = f'input "{spec.name}"'
    if inner in ((), (1,)) and not any(isinstance(value, list) for value in values):
        elements = values
    else:
        inner = inner if -1 not in inner else _observed_shape(values) if values else tuple(max(size, 0) for size in inner)
        elements = list(chain.from_iterable(_elements(spec, index, value, inner) for index, value in enumerate(values)))
    datatype = DATATYPES[spec.datatype]
    if datatype.name == "BYTES":
        elements = [_from_base64(spec, element) for element in elements]
    return Tensor(spec.name, spec.datatype, (len(values), *inner), pack_values(what, datatype, elements))


def _elements(spec: TensorSpec, index: int, value: Any, shape: tuple[int, ...]) -> list[Any]:
    elements = flatten(f'instance {index}, input "{spec.name}"', value, shape)
    if len(elements) != math.prod(shape):
        raise InvalidInput(f'instance {index}: input "{spec.name}": expected shape {list(shape)}, got {len(elements)} values')
    return elements


def _observed_shape(values: Sequence[Any]) -> tuple[int, ...]:
    """The shape of the first instance, for inputs with variable inner dimensions."""
    shape, value = [], values[0]
    while isinstance(value, list):
        shape.append(len(value))
        value = value[0] if value else None
    return tuple(shape)


def _from_base64(spec: TensorSpec, element: Any) -> Any:
    if not isinstance(element, dict):
        return element
    try:
        return base64.b64decode(element["b64"], validate=True)
    except (KeyError, TypeError, binascii.Error, ValueError):
        raise InvalidInput(f'input "{spec.name}": expected text or {{"b64": "base64 text"}}') from None


def encode_response(response: InferResponse, *, is_columnar: bool = False) -> bytes:
    """The body of a response: for each row its value if the model has one output, otherwise an object by output name.

    Args:
        response: with outputs of shape (n_rows, ...).
        is_columnar: whole tensors as ``outputs`` instead of rows as ``predictions``.

    Raises:
        InvalidInput: an output has no JSON form.
    """
    columns = {tensor.name: _rows(tensor) for tensor in response.outputs}
    if is_columnar:
        return _encoder.encode({"outputs": next(iter(columns.values())) if len(columns) == 1 else columns})
    if len(columns) == 1:
        return _encoder.encode({"predictions": next(iter(columns.values()))})
    names = list(columns)
    rows = zip(*columns.values(), strict=True)
    return _encoder.encode({"predictions": [dict(zip(names, row, strict=True)) for row in rows]})


def _rows(tensor: Tensor) -> list[Any]:
    """The elements as nested lists of the tensor's shape."""
    values = json_values(tensor)
    for axis in range(len(tensor.shape) - 1, 0, -1):
        size, count = tensor.shape[axis], math.prod(tensor.shape[:axis])
        values = [values[index * size : (index + 1) * size] for index in range(count)]
    return values


def status_of(states: Iterable[ModelState]) -> dict[str, Any]:
    """The status of a model's versions, as in TensorFlow Serving. Source: its REST API, "Model status API"."""
    names = {READY: "AVAILABLE", LOADING: "LOADING"}
    return {
        "model_version_status": [
            {
                "version": state.version,
                "state": names.get(state.state, "END"),
                "status": {"error_code": "OK" if state.state in names else "UNAVAILABLE", "error_message": state.reason},
            }
            for state in states
            if state.version
        ]
    }


_TENSORFLOW_TYPES = {
    "BOOL": "DT_BOOL", "INT8": "DT_INT8", "INT16": "DT_INT16", "INT32": "DT_INT32", "INT64": "DT_INT64",
    "UINT8": "DT_UINT8", "UINT16": "DT_UINT16", "UINT32": "DT_UINT32", "UINT64": "DT_UINT64",
    "FP16": "DT_HALF", "BF16": "DT_BFLOAT16", "FP32": "DT_FLOAT", "FP64": "DT_DOUBLE", "BYTES": "DT_STRING",
}  # fmt: skip


def metadata_of(metadata: ModelMetadata, version: str) -> dict[str, Any]:
    """A model's signature, as in TensorFlow Serving. Source: its REST API, "Model Metadata API"; 64-bit integers are strings."""
    signature = {
        "inputs": {spec.name: _tensor_info(spec) for spec in metadata.inputs},
        "outputs": {spec.name: _tensor_info(spec) for spec in metadata.outputs},
        "method_name": "tensorflow/serving/predict",
    }
    return {
        "model_spec": {"name": metadata.name, "signature_name": "", "version": version},
        "metadata": {"signature_def": {"signature_def": {"serving_default": signature}}},
    }


def _tensor_info(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": _TENSORFLOW_TYPES[spec.datatype],
        "tensor_shape": {"dim": [{"size": str(size), "name": ""} for size in spec.wire_shape], "unknown_rank": False},
    }
