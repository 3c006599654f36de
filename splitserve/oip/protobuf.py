"""Open Inference Protocol over gRPC: protobuf messages <-> the objects of `splitserve.oip.messages`.

Knows messages, no channels or servers. Raw contents pass through unchanged; typed contents are converted to raw contents here, so
that no other module has to handle them.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from google.protobuf.message import DecodeError

from splitserve.api.inference import inference_pb2 as pb
from splitserve.errors import DOMAIN, InvalidInput, SplitserveError, from_wire
from splitserve.oip.messages import (
    NO_DEADLINE,
    REQUEST_ID,
    TIMEOUT,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelState,
    Parameter,
    RequestedOutput,
    ServerMetadata,
    remaining_s,
    scheduled,
)
from splitserve.oip.model_config import ModelConfig
from splitserve.oip.raw_contents import LARGE_BYTES, field, with_raw, without_raw
from splitserve.oip.statistics import ModelStatistics
from splitserve.signature import TensorSpec
from splitserve.telemetry.traces import BAGGAGE, FIELDS, TRACEPARENT, TraceContext, received_in
from splitserve.tensors import Tensor, datatype_of, pack
from splitserve.versions import is_number

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

REASON_KEY = "splitserve-not-ready-bin"
"""Trailing metadata of a ServerReady response with ``ready = false``: the reason, as UTF-8."""

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata of an error: a ``google.rpc.Status``. Source: gRPC, "Richer error model"."""

PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata of an error: when to retry, negative for never. Source: gRPC proposal A6, "Pushback"."""

STREAM_KEY = "splitserve-stream"
"""Initial metadata of a ModelStreamInfer stream that carries complete errors and many calls at once."""

CALLER_KEY = "splitserve-caller"
"""Metadata of calls and streams of our services. The one that a client calls has decided whether the request is traced."""

WORKER_KEY = "splitserve-worker"
"""Initial metadata of the same stream: which of the processes that share the port answers, e.g. ``0/4``."""

CANCEL = "splitserve_cancel"
"""Parameter of a message on such a stream that cancels a request."""

_RAW_INPUTS = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
_RAW_OUTPUTS = pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER
_INFER_RESPONSE = pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER

_ID_FIRST = b"\x1a"
"""How a ``ModelInferRequest`` begins whose first field is ``id``."""

_CONTENTS_FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Source: Open Inference Protocol gRPC, ``InferTensorContents``. FP16 and BF16 have no field."""

_SAME_WIDTH = {"INT32": "i", "INT64": "q", "UINT32": "I", "UINT64": "Q", "FP32": "f", "FP64": "d"}
"""Datatypes whose field has the same range, so that no value has to be checked."""


def parse(message_type: Any, data: bytes) -> Any:
    """Parse a protobuf message.

    Raises:
        InvalidInput: the bytes are not a message of this type.
    """
    try:
        return message_type.FromString(data)
    except DecodeError:
        raise InvalidInput(f"the request is not a {message_type.DESCRIPTOR.full_name}") from None


def encode_stream_request(request: InferRequest, identity: str) -> bytes:
    """A request as a message on a stream. Messages have no deadline; the remaining time is sent as the parameter ``timeout``."""
    message = _request_envelope(request)
    message.id = identity
    if request.deadline != NO_DEADLINE:
        message.parameters[TIMEOUT].int64_param = max(1, int(remaining_s(request.deadline) * 1e6))
    if name := request.id or request.log_id:
        message.parameters[REQUEST_ID].string_param = name
    if request.trace is not None:
        add_trace(message, request.trace)
    return b"".join(_parts(message, message.raw_input_contents, _RAW_INPUTS, request.inputs))


def _parts(envelope: Any, contents: Any, number: int, tensors: Sequence[Tensor]) -> list[bytes]:
    """The bytes of a message in parts: raw contents that are large are written around the library.

    Args:
        envelope: the message without them.
        contents: its field for them.
        number: of that field.
        tensors: that have them.
    """
    raws = [tensor.raw for tensor in tensors]
    if sum(map(len, raws)) < LARGE_BYTES:
        contents.extend(raws)
        return [envelope.SerializeToString()]
    return with_raw(envelope.SerializeToString(), number, raws)


def add_trace(message: pb.ModelInferRequest, trace: TraceContext) -> None:
    """The context of a trace as parameters of a message that has no headers: one on a stream, or of a job."""
    for name, value in trace.items():
        message.parameters[name].string_param = value


def timeout_s(message: pb.ModelInferRequest) -> float | None:
    """The seconds that a message on a stream may take, by its parameter ``timeout``; None: it does not say.

    A stream has no deadline for each of its messages: there the parameter is what gRPC's timeout is to a unary call.
    """
    microseconds = message.parameters[TIMEOUT].int64_param if TIMEOUT in message.parameters else 0
    return microseconds / 1e6 if microseconds > 0 else None


def request_id(data: bytes) -> str:
    """The id of a request that is refused before it is decoded; "" if it has none."""
    try:
        identity: str = pb.ModelInferRequest.FromString(data).id
    except DecodeError:
        return ""
    return identity


def encode_stream_cancel(identity: str) -> bytes:
    """The message on a stream that cancels the request with this id. It is a request without a model, and has no answer."""
    message = pb.ModelInferRequest(id=identity)
    message.parameters[CANCEL].bool_param = True
    return message.SerializeToString()


def cancelled_id(data: bytes) -> str | None:
    """The id of the request that a message on a stream cancels; None: the message is a request."""
    if not data.startswith(_ID_FIRST):  # a request begins with its model
        return None
    try:
        message = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        return None
    return message.id if CANCEL in message.parameters and not message.model_name else None


def encode_stream_response(response: InferResponse, identity: str) -> bytes:
    """A response as a message on a stream, with the id of its request."""
    envelope = _response_envelope(response)
    envelope.id = identity
    parts = _parts(envelope, envelope.raw_output_contents, _RAW_OUTPUTS, response.outputs)
    return b"".join(field(_INFER_RESPONSE, *parts))


def parse_stream_response(data: bytes) -> tuple[pb.ModelStreamInferResponse, Sequence[bytes] | None]:
    """The message of a stream's answer, and its raw contents if they are not in it.

    Raises:
        DecodeError: the bytes are not such a message.
    """
    if len(data) >= LARGE_BYTES and (found := without_raw(memoryview(data), _INFER_RESPONSE)) and len(found[1]) == 1:
        rest, (inner,) = found
        if (parts := without_raw(inner, _RAW_OUTPUTS)) is not None:
            envelope, raws = parts
            message = pb.ModelStreamInferResponse.FromString(b"".join((rest, *field(_INFER_RESPONSE, envelope))))
            return message, [bytes(raw) for raw in raws]
    return pb.ModelStreamInferResponse.FromString(data), None


def encode_stream_error(identity: str, error: SplitserveError) -> bytes:
    """An error as a message on a stream: its text in the protocol's field, code, reason and metadata as parameters."""
    message = pb.ModelStreamInferResponse(error_message=error.message)
    message.infer_response.id = identity
    facts = {"code": error.grpc_code, "reason": error.reason, **error.metadata}
    _encode_parameters({f"{DOMAIN}_{name}": fact for name, fact in facts.items()}, message.infer_response.parameters)
    return message.SerializeToString()


def raise_stream_error(message: pb.ModelStreamInferResponse) -> None:
    """Raises:
    SplitserveError: raised by the peer, if the message on a stream is an error.
    """
    parameters = message.infer_response.parameters
    if message.error_message or f"{DOMAIN}_code" in parameters:
        facts = {name.removeprefix(f"{DOMAIN}_"): value.string_param for name, value in parameters.items()}
        raise from_wire(facts.get("code", "INTERNAL"), message.error_message, facts.get("reason", ""), facts)


def parse_request(data: bytes, *, is_large: bool | None = None) -> tuple[pb.ModelInferRequest, Sequence[bytes] | None]:
    """The message of a request, and its raw contents if they are not in it.

    Args:
        data: what was received.
        is_large: whether to read the raw contents by hand; None: if it pays.

    Raises:
        InvalidInput: the bytes are not such a message.
    """
    is_large = len(data) >= LARGE_BYTES if is_large is None else is_large
    if is_large and (found := without_raw(memoryview(data), _RAW_INPUTS)) is not None:
        return parse(pb.ModelInferRequest, found[0]), [bytes(raw) for raw in found[1]]
    return parse(pb.ModelInferRequest, data), None


def decode_request(
    message: pb.ModelInferRequest,
    deadline: float = NO_DEADLINE,
    caller: Hashable = None,
    raws: Sequence[bytes] | None = None,
    trace: TraceContext | None = None,
) -> InferRequest:
    """The request in a message.

    Args:
        message: of ModelInfer or ModelStreamInfer.
        deadline: of the request, which its parameter ``timeout`` can shorten.
        caller: for fair queueing.
        raws: its raw contents, of `parse_request`; None: those of the message.
        trace: in the headers of the call; parameters of the message take precedence.

    Raises:
        InvalidInput: raw and typed contents are mixed, their number is wrong, or typed contents do not fit their datatype.
    """
    inputs = message.inputs
    if raws := list(message.raw_input_contents) if raws is None else raws:
        for tensor in inputs:
            if tensor.HasField("contents"):
                raise InvalidInput("the contents field must not be specified when using raw_input_contents")
        if len(raws) != len(inputs):
            raise InvalidInput(f"expected one raw_input_contents for each of {len(inputs)} inputs, got {len(raws)}")
    else:
        raws = [_pack_contents("input", tensor) for tensor in inputs]
    identity: str = message.id
    parameters: Mapping[str, Parameter] = {}
    if message.parameters:
        parameters, deadline = scheduled(_decode_parameters(message.parameters), deadline)
        if REQUEST_ID in parameters:
            identity = str(parameters[REQUEST_ID])
            parameters = {name: value for name, value in parameters.items() if name != REQUEST_ID}
        if TRACEPARENT in parameters or BAGGAGE in parameters:
            trace = received_in(parameters) or trace
            parameters = {name: value for name, value in parameters.items() if name not in FIELDS}
    outputs: tuple[RequestedOutput, ...] = ()
    if message.outputs:
        outputs = tuple([RequestedOutput(item.name, _decode_parameters(item.parameters)) for item in message.outputs])
    return InferRequest(
        message.model_name,
        tuple([Tensor(tensor.name, tensor.datatype, tuple(tensor.shape), raw) for tensor, raw in zip(inputs, raws, strict=True)]),
        version=message.model_version,
        outputs=outputs,
        id=identity,
        parameters=parameters,
        deadline=deadline,
        caller=caller,
        trace=trace,
    )


def encode_request(request: InferRequest) -> pb.ModelInferRequest:
    """The message for a request, with raw contents."""
    message = _request_envelope(request)
    message.raw_input_contents.extend([tensor.raw for tensor in request.inputs])
    return message


def _request_envelope(request: InferRequest) -> pb.ModelInferRequest:
    """The message without its raw contents."""
    message = pb.ModelInferRequest(
        model_name=request.model,
        model_version=request.version,
        id=request.id,
        inputs=[
            pb.ModelInferRequest.InferInputTensor(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            for tensor in request.inputs
        ],
    )
    _encode_parameters(request.parameters, message.parameters)
    for requested in request.outputs:
        _encode_parameters(requested.parameters, message.outputs.add(name=requested.name).parameters)
    return message


def decode_response(message: pb.ModelInferResponse, raws: Sequence[bytes] | None = None) -> InferResponse:
    """The response in a message.

    Args:
        message: of ModelInfer or ModelStreamInfer.
        raws: its raw contents, of `parse_stream_response`; None: those of the message.

    Raises:
        InvalidInput: the number of raw contents is not that of the outputs, or typed contents do not fit their datatype.
    """
    outputs = message.outputs
    raws = list(message.raw_output_contents) if raws is None else raws
    if not raws:
        raws = [_pack_contents("output", tensor) for tensor in outputs]
    elif len(raws) != len(outputs):
        raise InvalidInput(f"expected one raw_output_contents for each of {len(outputs)} outputs, got {len(raws)}")
    return InferResponse(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        parameters=_decode_parameters(message.parameters) if message.parameters else {},
        outputs=tuple(
            [Tensor(tensor.name, tensor.datatype, tuple(tensor.shape), raw) for tensor, raw in zip(outputs, raws, strict=True)]
        ),
    )


def encode_response(response: InferResponse) -> pb.ModelInferResponse:
    """The message for a response, with raw contents."""
    message = _response_envelope(response)
    message.raw_output_contents.extend([tensor.raw for tensor in response.outputs])
    return message


def response_bytes(response: InferResponse) -> bytes:
    """The message of `encode_response`, serialized."""
    envelope = _response_envelope(response)
    return b"".join(_parts(envelope, envelope.raw_output_contents, _RAW_OUTPUTS, response.outputs))


def _response_envelope(response: InferResponse) -> pb.ModelInferResponse:
    """The message without its raw contents."""
    message = pb.ModelInferResponse()
    message.model_name = response.model
    message.model_version = response.version
    message.id = response.id
    for tensor in response.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    _encode_parameters(response.parameters, message.parameters)
    return message


def _pack_contents(side: str, tensor: pb.ModelInferRequest.InferInputTensor | pb.ModelInferResponse.InferOutputTensor) -> bytes:
    what = f'{side} "{tensor.name[:64]}"'
    datatype = datatype_of(what, tensor.datatype)
    filled = tensor.contents.ListFields()
    if not filled:
        return b""
    field = _CONTENTS_FIELDS.get(datatype.name)
    if field is None:
        raise InvalidInput(f"{what}: {datatype.name} is supported in raw contents only")
    if len(filled) > 1 or filled[0][0].name != field:
        found = ", ".join(descriptor.name for descriptor, _ in filled)
        raise InvalidInput(f"{what}: the contents of {datatype.name} belong in {field}, got {found}")
    values = filled[0][1]
    if datatype.name in _SAME_WIDTH:
        return array(_SAME_WIDTH[datatype.name], values).tobytes()
    return pack(what, datatype, values)


def _decode_parameters(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Parameter]:
    chosen = ((key, value, value.WhichOneof("parameter_choice")) for key, value in parameters.items())
    return {key: getattr(value, field) for key, value, field in chosen if field}


def _encode_parameters(parameters: Mapping[str, Parameter], into: Any) -> None:
    for key, value in parameters.items():
        if isinstance(value, bool):
            into[key].bool_param = value
        elif isinstance(value, int):
            setattr(into[key], "int64_param" if -(2**63) <= value < 2**63 else "uint64_param", value)
        elif isinstance(value, float):
            into[key].double_param = value
        else:
            into[key].string_param = value


def encode_metadata(metadata: ModelMetadata) -> pb.ModelMetadataResponse:
    """The message for a model's signature."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=metadata.name,
        versions=metadata.versions,
        platform=metadata.platform,
        inputs=[tensor(name=spec.name, datatype=spec.datatype, shape=spec.wire_shape) for spec in metadata.inputs],
        outputs=[tensor(name=spec.name, datatype=spec.datatype, shape=spec.wire_shape) for spec in metadata.outputs],
        properties=metadata.properties,
    )


def decode_metadata(message: pb.ModelMetadataResponse) -> ModelMetadata:
    """A model's signature. Variable dimensions are named by their position, the leading one ``"batch"``."""
    return ModelMetadata(
        name=message.name,
        versions=tuple(message.versions),
        platform=message.platform,
        inputs=_decode_specs(message.inputs),
        outputs=_decode_specs(message.outputs),
        properties=dict(message.properties),
    )


def _decode_specs(tensors: Iterable[pb.ModelMetadataResponse.TensorMetadata]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            tensor.name,
            tensor.datatype,
            tuple(size if size >= 0 else f"{tensor.name}_{axis}" if axis else "batch" for axis, size in enumerate(tensor.shape)),
        )
        for tensor in tensors
    )


def encode_index_request(needed: Iterable[tuple[str, int]] = ()) -> pb.RepositoryIndexRequest:
    """The message that asks for an index, and names the versions that the caller needs, by model."""
    entry = pb.RepositoryIndexRequest.ModelVersion
    return pb.RepositoryIndexRequest(needed=[entry(name=model, version=str(version)) for model, version in needed])


def decode_needed(message: pb.RepositoryIndexRequest) -> list[tuple[str, int]]:
    """Models and versions that the caller of an index needs; names that cannot be versions are left out."""
    return [(entry.name, int(entry.version)) for entry in message.needed if is_number(entry.version)]


def encode_index(states: Iterable[ModelState]) -> pb.RepositoryIndexResponse:
    """The message for a service's index."""
    entry = pb.RepositoryIndexResponse.ModelIndex
    return pb.RepositoryIndexResponse(
        models=[
            entry(
                name=state.name, version=state.version, state=state.state, reason=state.reason, properties=dict(state.properties)
            )
            for state in states
        ]
    )


def decode_index(message: pb.RepositoryIndexResponse) -> list[ModelState]:
    """What a service knows of its models."""
    return [ModelState(entry.name, entry.version, entry.state, entry.reason, dict(entry.properties)) for entry in message.models]


def encode_server_metadata(metadata: ServerMetadata) -> pb.ServerMetadataResponse:
    """The message for server metadata."""
    return pb.ServerMetadataResponse(name=metadata.name, version=metadata.version, extensions=metadata.extensions)


def encode_config(config: ModelConfig) -> pb.ModelConfigResponse:
    """The message for a model's configuration."""
    return pb.ModelConfigResponse(config=pb.ModelConfig(**msgspec.to_builtins(config)))


def encode_statistics(statistics: Iterable[ModelStatistics]) -> pb.ModelStatisticsResponse:
    """The message for statistics."""
    return pb.ModelStatisticsResponse(model_stats=[pb.ModelStatistics(**msgspec.to_builtins(entry)) for entry in statistics])
