"""Open Inference Protocol over REST: JSON bodies, followed by binary tensors, <-> the objects of `splitserve.oip.messages`.

Knows bodies, no HTTP server. Source: Open Inference Protocol REST; Triton's "binary tensor data" extension.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Hashable, Mapping, Sequence
from itertools import chain
from typing import Any

import msgspec

from splitserve.errors import InvalidInput
from splitserve.oip.limits import check_json_depth
from splitserve.oip.messages import (
    NO_DEADLINE,
    InferRequest,
    InferResponse,
    ModelMetadata,
    Parameter,
    RequestedOutput,
    scheduled,
)
from splitserve.signature import TensorSpec
from splitserve.tensors import (
    DATATYPES,
    MAX_RANK,
    Datatype,
    Tensor,
    datatype_of,
    encode_bytes,
    n_elements,
    numbers,
    pack,
    unpack,
)

_BINARY_SIZE = "binary_data_size"
_BINARY_OUTPUT = "binary_data"
_ALL_BINARY = "binary_data_output"
_SPECIAL_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: Any = msgspec.UNSET
    parameters: dict[str, Parameter] | None = None


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Parameter] | None = None


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str | None = None
    parameters: dict[str, Parameter] | None = None
    outputs: list[_Output] | None = None


class _PlainInput(msgspec.Struct):
    """An input whose data is a flat list, as most clients send it."""

    name: str
    shape: list[int]
    datatype: str
    data: list[float | int | str] | msgspec.UnsetType = msgspec.UNSET
    parameters: dict[str, Parameter] | None = None


class _PlainRequest(msgspec.Struct):
    inputs: list[_PlainInput]
    id: str | None = None
    parameters: dict[str, Parameter] | None = None
    outputs: list[_Output] | None = None


class _AnswerOutput(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Any = msgspec.UNSET
    parameters: Mapping[str, Parameter] = {}


class _InferAnswer(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[_AnswerOutput]
    id: str = ""
    parameters: Mapping[str, Parameter] = {}


_decoder = msgspec.json.Decoder(_Request)
_plain_decoder = msgspec.json.Decoder(_PlainRequest)
_plain_formats: dict[str, str] = {
    name: datatype.format for name, datatype in DATATYPES.items() if datatype.format and name not in ("BOOL", "FP16")
}
"""Of the datatypes whose numbers `_decode_plain` packs."""
_encoder = msgspec.json.Encoder()


def decode_json(body: bytes, decoder: msgspec.json.Decoder[Any] | None = None, what: str = "the request body") -> Any:
    """Decode a JSON body. The tokens NaN, Infinity and -Infinity, which Python and other clients write, are accepted too.

    Args:
        body: UTF-8.
        decoder: also checks types; None: any JSON.
        what: its name in errors.

    Raises:
        InvalidInput: not JSON, nested too deeply, or a field of the wrong type, which the message names.
    """
    check_json_depth(body, what)
    try:
        return decoder.decode(body) if decoder else msgspec.json.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{what}: {error}") from None
    except RecursionError:
        raise InvalidInput(f"{what} is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if b"NaN" not in body and b"Infinity" not in body:
            raise InvalidInput(f"{what} is not JSON: {error}") from None
    try:
        text = body.decode()
        lenient = json.loads(text, parse_float=_finite)
        if "\\u" in text:
            json.dumps(lenient, ensure_ascii=False).encode()  # fails for a lone surrogate, which UTF-8 cannot encode
        return msgspec.convert(lenient, decoder.type) if decoder else lenient
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise InvalidInput(f"{what} is not JSON: {error}") from None


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"number out of range: {text[:32]}")
    return number


def decode_request(
    model: str,
    version: str,
    body: bytes,
    *,
    header_length: int | None = None,
    deadline: float = NO_DEADLINE,
    caller: Hashable = None,
) -> InferRequest:
    """The request in a body.

    Args:
        model: from the path.
        version: from the path, "" if it has none.
        body: JSON, followed by the binary tensors, if any.
        header_length: bytes of the JSON, from the header Inference-Header-Content-Length; None: the whole body.
        deadline: of the request, which its parameter ``timeout`` can shorten.
        caller: for fair queueing.

    Raises:
        InvalidInput: names the input, what was expected and what was sent.
    """
    n_bytes = len(body)
    if not body:
        raise InvalidInput("the request body is empty, expected JSON")
    head = body
    if header_length is not None:
        if not 0 < header_length <= n_bytes:
            raise InvalidInput(f"Inference-Header-Content-Length is {header_length}, the body has {n_bytes} bytes")
        head = body[:header_length]
    check_json_depth(head)
    message, inputs, end = _decode_plain(head) or _decode_any(head, body)
    if end != n_bytes:
        raise InvalidInput(f"{n_bytes - end} bytes of the body remain after the binary tensors")
    parameters: Mapping[str, Parameter] = {}
    if message.parameters:
        _check_boolean(message.parameters, _ALL_BINARY)
        parameters, deadline = scheduled(_parameters(message.parameters), deadline)
    outputs: tuple[RequestedOutput, ...] = ()
    if message.outputs:
        for item in message.outputs:
            _check_boolean(item.parameters or {}, _BINARY_OUTPUT, f'output "{item.name[:64]}": ')
        outputs = tuple([RequestedOutput(item.name, _parameters(item.parameters)) for item in message.outputs])
    return InferRequest(
        model,
        tuple(inputs),
        version=version,
        outputs=outputs,
        id=message.id or "",
        parameters=parameters,
        deadline=deadline,
        caller=caller,
    )


def _decode_plain(head: bytes) -> tuple[_PlainRequest | _Request, list[Tensor], int] | None:
    """The fast path of `_decode_any`, for flat lists of valid numbers or text; None for anything else, errors included."""
    try:
        message = _plain_decoder.decode(head)
        inputs = []
        for item in message.inputs:
            datatype, values = item.datatype, item.data
            if item.parameters or values is msgspec.UNSET or len(item.shape) > MAX_RANK:
                return None
            count = 1
            for size in item.shape:
                if not 0 <= size < 2**63:
                    return None
                count *= size
            if count != len(values):
                return None
            if datatype == "BYTES":
                raw = encode_bytes([value.encode() for value in values])  # type: ignore[union-attr]  # AttributeError
            else:
                raw = numbers(count, _plain_formats[datatype]).pack(*values)
            inputs.append(Tensor(item.name, datatype, tuple(item.shape), raw))
    except (msgspec.DecodeError, UnicodeError, RecursionError, struct.error, OverflowError, AttributeError, KeyError):
        return None
    return message, inputs, len(head)


def _decode_any(head: bytes, body: bytes) -> tuple[_PlainRequest | _Request, list[Tensor], int]:
    """The JSON with data in any form, its tensors, and where in the body the binary tensors end."""
    message = decode_json(head, _decoder)
    inputs, end = [], len(head)
    for item in message.inputs:
        parameters = item.parameters or {}
        what = f'input "{item.name[:64]}"'
        datatype_of(what, item.datatype)
        n_elements(what, item.shape)
        if _BINARY_SIZE in parameters:
            raw, end = _binary(item, parameters[_BINARY_SIZE], body, end)
        else:
            raw = _pack_json(item)
        inputs.append(Tensor(item.name, item.datatype, tuple(item.shape), raw))
    return message, inputs, end


def decode_raw_request(
    body: bytes, metadata: ModelMetadata, version: str, *, deadline: float = NO_DEADLINE, caller: Hashable = None
) -> InferRequest:
    """The request in a body without JSON: one row of a model's only input. All outputs are returned as binary data.

    Args:
        body: raw elements; a BYTES element without its length prefix.
        metadata: signature of the model. Besides the batch one dimension may be variable: its size follows from the body's.
        version: requested.
        deadline: of the request.
        caller: for fair queueing.

    Raises:
        InvalidInput: the model has several inputs or variable dimensions, or the body has another size.

    Source: Triton, "raw binary request".
    """
    if len(metadata.inputs) != 1:
        raise InvalidInput(f"a body without JSON requires a model with one input, this one has {len(metadata.inputs)}")
    spec = metadata.inputs[0]
    if spec.datatype == "BYTES":
        body = encode_bytes([body])
    tensor = Tensor(spec.name, spec.datatype, _raw_shape(spec, len(body)), body)
    return InferRequest(
        metadata.name, (tensor,), version=version, parameters={_ALL_BINARY: True}, deadline=deadline, caller=caller
    )


def _raw_shape(spec: TensorSpec, n_bytes: int) -> tuple[int, ...]:
    """The shape of one row of ``n_bytes``; whether they fill it is checked with the request."""
    shape = (1, *spec.wire_shape[1:]) if spec.wire_shape[:1] == (-1,) else spec.wire_shape
    if shape.count(-1) > 1:
        raise InvalidInput(f'input "{spec.name}": more than one dimension of {list(shape)} is variable, send JSON')
    size = math.prod(size for size in shape if size > 0) * max(DATATYPES[spec.datatype].itemsize, 1)
    varying = 1 if spec.datatype == "BYTES" else n_bytes // max(size, 1)
    return tuple(varying if size == -1 else size for size in shape)


def _parameters(given: dict[str, Parameter] | None) -> dict[str, Parameter]:
    for name, value in (given or {}).items():
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise InvalidInput(f'parameter "{name[:64]}": expected an integer of at most 64 bits')
    return given or {}


def _check_boolean(parameters: Mapping[str, Parameter], name: str, where: str = "") -> None:
    """Raises:
    InvalidInput: a parameter of the binary data extension has another type, so that ignoring it would change the answer's form.
    """
    if type(parameters.get(name, False)) is not bool:
        raise InvalidInput(f'{where}parameter "{name}": expected a boolean, got {_shown(parameters[name])}')


def _shown(value: Parameter) -> str:
    return _encoder.encode(value).decode()[:32]


def _binary(item: _Input, size: Parameter, body: bytes, start: int) -> tuple[bytes, int]:
    if item.data is not msgspec.UNSET:
        raise InvalidInput(f'input "{item.name}": expected data or {_BINARY_SIZE}, got both')
    if type(size) is not int or size < 0 or size > len(body) - start:
        raise InvalidInput(f'input "{item.name}": {_BINARY_SIZE} is {size}, {len(body) - start} bytes remain of the body')
    return body[start : start + size], start + size


def _pack_json(item: _Input) -> bytes:
    what = f'input "{item.name[:64]}"'
    datatype = datatype_of(what, item.datatype)
    if item.data is msgspec.UNSET:
        raise InvalidInput(f'input "{item.name}": expected data or {_BINARY_SIZE}, got neither')
    if datatype.name in ("FP16", "BF16"):
        raise InvalidInput(f'input "{item.name}": {datatype.name} has no JSON form, send it as binary data')
    count = n_elements(what, item.shape)
    values = flatten(what, item.data, item.shape)
    if len(values) != count:
        raise InvalidInput(f'input "{item.name}": shape {item.shape} needs {count} elements, got {len(values)}')
    return pack_values(what, datatype, values)


def flatten(what: str, data: Any, shape: Sequence[int]) -> list[Any]:
    """The elements of a flat or nested list, row-major.

    Args:
        what: e.g. ``input "x"``, for errors.
        data: a flat list, or lists nested according to the shape.
        shape: of the tensor.

    Raises:
        InvalidInput: not a list, or a nested list has another length than its dimension.
    """
    if not isinstance(data, list):
        raise InvalidInput(f"{what}: expected data to be a list, got {_json_type(data)}")
    if not any(isinstance(item, list) for item in data):
        return data
    level = [data]
    for size in shape[:MAX_RANK]:
        if any(not isinstance(item, list) or len(item) != size for item in level):
            raise InvalidInput(f"{what}: the nested lists do not match shape {list(shape)}")
        level = list(chain.from_iterable(level))
    return level


_EXACT_FLOATS = 2**53
"""A double below this that is an integer was written as that integer: no other one rounds to it."""


def pack_values(what: str, datatype: Datatype, values: list[Any]) -> bytes:
    """The raw form of JSON values: text as UTF-8; for floats, null and "NaN" are NaN; for BYTES, null is the empty string.

    1.0 is accepted for the integer 1. Source: JSON Schema, "Numeric types".

    Raises:
        InvalidInput: a value is not of the datatype, or does not fit it.
    """
    if datatype.name == "BYTES":
        try:
            values = [value.encode() if isinstance(value, str) else b"" if value is None else value for value in values]
        except UnicodeEncodeError:
            raise InvalidInput(f"{what}: an element cannot be encoded as UTF-8") from None
    elif datatype.is_float and not set(map(type, values)) <= {float, int}:
        values = [math.nan if value is None else _SPECIAL_FLOATS.get(value, value) if isinstance(value, str) else value
                  for value in values]  # fmt: skip
    try:
        return pack(what, datatype, values)
    except InvalidInput:
        if not datatype.is_integer:
            raise
        return pack(what, datatype, [_whole(value) for value in values])


def _whole(value: Any) -> Any:
    """A float as the integer that it equals, unless another integer may have been rounded to it."""
    return int(value) if type(value) is float and value.is_integer() and abs(value) < _EXACT_FLOATS else value


def is_binary_requested(request: InferRequest, output: str) -> bool:
    """Whether this output is requested as binary data instead of JSON."""
    for requested in request.outputs:
        if requested.name == output and _BINARY_OUTPUT in requested.parameters:
            return requested.parameters[_BINARY_OUTPUT] is True
    return request.parameters.get(_ALL_BINARY) is True


def encode_response(response: InferResponse, request: InferRequest) -> tuple[bytes, int | None]:
    """The body of a response, and the length of its JSON if binary tensors follow.

    Values that are not finite are null in JSON and counted in the output's parameter ``nonfinite_values``.

    Raises:
        InvalidInput: an output has no JSON form and was not requested as binary data.
    """
    outputs, binary = [], []
    may_be_binary = bool(request.outputs or request.parameters)
    for tensor in response.outputs:
        if may_be_binary and is_binary_requested(request, tensor.name):
            parameters = {_BINARY_SIZE: len(tensor.raw)}
            outputs.append(_AnswerOutput(tensor.name, tensor.datatype, tensor.shape, parameters=parameters))
            binary.append(tensor.raw)
            continue
        values = unpack(tensor) if tensor.datatype in _plain_formats else json_values(tensor)
        answered = _AnswerOutput(tensor.name, tensor.datatype, tensor.shape, values)
        if tensor.datatype in ("FP32", "FP64") and not math.isfinite(sum(values)):
            n_bad = sum([not math.isfinite(value) for value in values])
            answered.parameters = {"nonfinite_values": n_bad} if n_bad else {}
        outputs.append(answered)
    head = _encoder.encode(_InferAnswer(response.model, response.version, outputs, response.id, response.parameters))
    return (b"".join((head, *binary)), len(head)) if binary else (head, None)


def json_values(tensor: Tensor) -> list[Any]:
    """The elements, row-major, as values that have a JSON form.

    Raises:
        InvalidInput: FP16, BF16, or BYTES that are not UTF-8.
    """
    if tensor.datatype in ("FP16", "BF16"):
        raise InvalidInput(f'output "{tensor.name}": {tensor.datatype} has no JSON form, request binary_data for it')
    if tensor.datatype != "BYTES":
        return unpack(tensor)
    try:
        return [value.decode() for value in unpack(tensor)]
    except UnicodeDecodeError:
        raise InvalidInput(f'output "{tensor.name}": an element is not UTF-8 text, request binary_data for it') from None


def encode_metadata(metadata: ModelMetadata) -> dict[str, Any]:
    """The JSON object for a model's signature."""
    document: dict[str, Any] = {
        "name": metadata.name,
        "versions": metadata.versions,
        "platform": metadata.platform,
        "inputs": [_encode_spec(spec) for spec in metadata.inputs],
        "outputs": [_encode_spec(spec) for spec in metadata.outputs],
    }
    if metadata.properties:
        document["properties"] = metadata.properties
    return document


def _encode_spec(spec: TensorSpec) -> Mapping[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.wire_shape}


def _json_type(value: object) -> str:
    names = {dict: "an object", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
