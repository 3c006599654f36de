"""The Open Inference Protocol over gRPC, line by line; docs/conformance.md lists the lines."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from splitserve.api.inference import inference_pb2 as pb
from splitserve.oip.messages import NO_DEADLINE, remaining_s
from splitserve.oip.protobuf import SERVICE
from splitserve.tensors import DATATYPES, encode_bytes
from tests.contracts.faces import LIMIT, Served, served

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["own", "grpcio"])
async def shared_system(request: pytest.FixtureRequest) -> AsyncIterator[Served]:
    """On both engines: grpcio's server is the reference for ours."""
    async with served(GRPC_ENGINE=request.param) as system:
        yield system


ONE_AND_TWO = b"\x00\x00\x80?\x00\x00\x00@"
TYPED = {
    "BOOL": ("bool_contents", [True, False]),
    "INT8": ("int_contents", [-128, 127]),
    "INT16": ("int_contents", [-(2**15), 2**15 - 1]),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1]),
    "UINT8": ("uint_contents", [0, 255]),
    "UINT16": ("uint_contents", [0, 2**16 - 1]),
    "UINT32": ("uint_contents", [0, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 2**64 - 1]),
    "FP32": ("fp32_contents", [1.5, math.inf]),
    "FP64": ("fp64_contents", [1.5, -math.inf]),
    "BYTES": ("bytes_contents", [b"\xff", b""]),
}


def lines(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.line(*names)


def case(line: str, title: str, *values: Any) -> Any:
    """One line of a table; ``line`` is its number in the checklist."""
    return pytest.param(*values, id=f"{line} {title}", marks=lines(line))


def infer_request(
    model: str = "echo",
    *raws: bytes,
    datatype: str = "FP32",
    shape: Any = (1, 2),
    contents: dict[str, Any] | None = None,
    outputs: Any = (),
    **fields: Any,
) -> pb.ModelInferRequest:
    """A request with one input x; no raws stand for none, not for empty ones."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype=datatype, shape=shape)
    if contents is not None:
        tensor.contents.MergeFrom(pb.InferTensorContents(**contents))
    wanted = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs]
    return pb.ModelInferRequest(model_name=model, inputs=[tensor], outputs=wanted, raw_input_contents=raws, **fields)


async def status_of(system: Served, method: str, request: Any) -> tuple[grpc.StatusCode, str]:
    """Code and message of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await system.call(method, request)
    return raised.value.code(), raised.value.details() or ""


@lines("G-01")
async def test_every_method_of_the_protocol_is_there(system: Served) -> None:
    """The six of the standard."""
    live, ready = await system.call("ServerLive"), await system.call("ServerReady")
    server = await system.call("ServerMetadata")
    model_ready = await system.call("ModelReady", pb.ModelReadyRequest(name="echo", version="1.1"))
    metadata = await system.call("ModelMetadata", pb.ModelMetadataRequest(name="simple"))
    answer = await system.call("ModelInfer", infer_request("echo", ONE_AND_TWO))

    assert (live.live, ready.ready, server.name, model_ready.ready) == (True, True, "splitserve", True)
    assert [(spec.name, spec.datatype, list(spec.shape)) for spec in metadata.inputs] == [
        ("INPUT0", "INT32", [-1, 4]),
        ("INPUT1", "INT32", [-1, 4]),
    ]
    assert (answer.model_name, answer.model_version, answer.id) == ("echo", "2.1", "")


@lines("D9")
@pytest.mark.parametrize(("name", "version"), [("nope", ""), ("echo", "9.9"), ("echo", "abc")])
async def test_an_unknown_model_is_not_ready(system: Served, name: str, version: str) -> None:
    """An answer, not an error."""
    answer = await system.call("ModelReady", pb.ModelReadyRequest(name=name, version=version))

    assert answer.ready is False


@lines("G-02", "D5", "G-10")
@pytest.mark.parametrize("datatype", TYPED)
async def test_typed_and_raw_contents_mean_the_same(system: Served, datatype: str) -> None:
    """Both are taken; the answer is raw, the same bit for bit, bytes that are no text included."""
    field, values = TYPED[datatype]
    model = f"identity_{datatype.lower()}"

    typed = await system.call("ModelInfer", infer_request(model, datatype=datatype, contents={field: values}))
    raw = typed.raw_output_contents[0]
    again = await system.call("ModelInfer", infer_request(model, raw, datatype=datatype))

    assert again.raw_output_contents[0] == raw
    assert not typed.outputs[0].HasField("contents")
    if datatype == "BYTES":
        assert raw == encode_bytes(values)
    else:
        assert list(memoryview(raw).cast(DATATYPES[datatype].format)) == values  # type: ignore[call-overload]


@lines("G-08")
@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
async def test_half_precision_is_raw_only(system: Served, datatype: str) -> None:
    """It has no field of its own."""
    model = f"identity_{datatype.lower()}"

    raw = await system.call("ModelInfer", infer_request(model, b"\x00\x3c\x00\x40", datatype=datatype))
    code, message = await status_of(
        system, "ModelInfer", infer_request(model, datatype=datatype, contents={"fp32_contents": [1, 2]})
    )

    assert raw.raw_output_contents[0] == b"\x00\x3c\x00\x40"
    assert (code, datatype in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def two_fields() -> pb.ModelInferRequest:
    return infer_request(contents={"fp32_contents": [1, 2], "fp64_contents": [1, 2]})


def with_parameter(name: str, field: str, value: Any) -> pb.ModelInferRequest:
    request = infer_request("echo", ONE_AND_TWO)
    setattr(request.parameters[name], field, value)
    return request


MALFORMED = [
    case("G-03", "raw and contents", infer_request("echo", ONE_AND_TWO, contents={"fp32_contents": [1, 2]})),
    case("G-04", "more raws than inputs", infer_request("echo", ONE_AND_TWO, ONE_AND_TWO)),
    case("G-05", "too short", infer_request("echo", ONE_AND_TWO[:7])),
    case("G-05", "too long", infer_request("echo", ONE_AND_TWO + b"\x00")),
    case("G-05", "empty", infer_request("echo", b"")),
    case("G-06", "too few typed", infer_request(contents={"fp32_contents": [1]})),
    case("G-06", "too many typed", infer_request(contents={"fp32_contents": [1, 2, 3]})),
    case("G-06", "wrong field", infer_request(contents={"fp64_contents": [1, 2]})),
    case("G-06", "two fields", two_fields()),
    case("G-06", "none", infer_request()),
    case("G-07", "INT8 of 300", infer_request("identity_int8", datatype="INT8", contents={"int_contents": [300, 0]})),
    case("G-07", "UINT16 of 2^16", infer_request("identity_uint16", datatype="UINT16", contents={"uint_contents": [2**16, 0]})),
    case("G-09", "negative dimension", infer_request("echo", ONE_AND_TWO, shape=[-1, 2])),
    case("G-09", "product wraps", infer_request("echo", ONE_AND_TWO, shape=[2**62, 4])),
    case("G-10", "length beyond the end", infer_request("identity_bytes", b"\xff\x00\x00\x00a", datatype="BYTES")),
    case("G-10", "length cut off", infer_request("identity_bytes", b"\x00\x00\x00\x00\x01", datatype="BYTES")),
    case("G-10", "too few elements", infer_request("identity_bytes", encode_bytes([b"a"]), datatype="BYTES")),
    case("G-11", "no inputs", pb.ModelInferRequest(model_name="echo")),
    case("G-12", "unknown output", infer_request("echo", ONE_AND_TWO, outputs=["y"])),
    case("G-12", "output twice", infer_request("echo", ONE_AND_TWO, outputs=["x", "x"])),
    case("G-14", "no message", b"\xff\xff\xff"),
    case("G-16", "timeout negative", with_parameter("timeout", "int64_param", -1)),
    case("G-16", "timeout a text", with_parameter("timeout", "string_param", "1")),
    case("I-08", "unknown datatype", infer_request("echo", ONE_AND_TWO, datatype="FP33")),
    case("I-09", "another datatype", infer_request("echo", ONE_AND_TWO, datatype="INT32")),
    case("I-13", "BOOL of 2", infer_request("identity_bool", b"\x02\x00", datatype="BOOL")),
]  # fmt: skip


@pytest.mark.parametrize("request_", MALFORMED)
async def test_malformed_requests_are_invalid_argument(system: Served, request_: Any) -> None:
    """Every mistake of a caller; the message says nothing of our classes; the next call is answered."""
    code, message = await status_of(system, "ModelInfer", request_)

    assert (code, bool(message)) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    assert "class" not in message
    assert (await system.call("ModelInfer", infer_request("echo", ONE_AND_TWO))).model_name == "echo"


UNKNOWN = [
    case("G-11", "empty name", "ModelInfer", infer_request("", ONE_AND_TWO)),
    case("G-11", "unknown model", "ModelInfer", infer_request("nope", ONE_AND_TWO)),
    case("G-13", "unknown version", "ModelInfer", infer_request("echo", ONE_AND_TWO, model_version="9.9")),
    case("G-13", "version that is no pair", "ModelInfer", infer_request("echo", ONE_AND_TWO, model_version="abc")),
    case("G-11", "metadata", "ModelMetadata", pb.ModelMetadataRequest(name="nope")),
    case("G-11", "configuration", "ModelConfig", pb.ModelConfigRequest(name="nope")),
    case("G-11", "statistics", "ModelStatistics", pb.ModelStatisticsRequest(name="nope")),
]


@pytest.mark.parametrize(("method", "request_"), UNKNOWN)
async def test_unknown_models_and_versions_are_not_found(system: Served, method: str, request_: Any) -> None:
    """In the words that clients match (D10)."""
    code, message = await status_of(system, method, request_)

    assert code is grpc.StatusCode.NOT_FOUND
    assert message.startswith("Request for unknown model")


@lines("G-12")
async def test_only_requested_outputs_are_returned(system: Served) -> None:
    """In the requested order."""
    raw = b"\x01\x00\x00\x00" * 4
    tensors = [pb.ModelInferRequest.InferInputTensor(name=name, datatype="INT32", shape=[1, 4]) for name in ("INPUT0", "INPUT1")]
    outputs = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in ("OUTPUT1", "OUTPUT0")]

    answer = await system.call(
        "ModelInfer",
        pb.ModelInferRequest(model_name="simple", inputs=tensors, outputs=outputs, raw_input_contents=[raw, raw]),
    )

    assert [output.name for output in answer.outputs] == ["OUTPUT1", "OUTPUT0"]
    assert answer.raw_output_contents[0] == b"\x00" * 16


@lines("G-13", "D8")
async def test_a_named_version_is_the_one_that_answers(system: Served) -> None:
    """The newest pair if none is named."""
    named = await system.call("ModelInfer", infer_request("echo", ONE_AND_TWO, model_version="1.1", id="7"))
    newest = await system.call("ModelInfer", infer_request("echo", ONE_AND_TWO))

    assert (named.model_version, named.id, newest.model_version) == ("1.1", "7", "2.1")


@lines("G-15")
async def test_a_message_above_the_limit_is_refused(system: Served) -> None:
    """And one beyond grpc's own 4 MiB is none, if the limit is higher."""
    code, _ = await status_of(system, "ModelInfer", infer_request("echo", b"\x00" * (LIMIT + 8), shape=[LIMIT // 8 + 1, 2]))
    async with served(max_message_bytes=16_000_000) as large:
        rows = 1_000_000
        options = [("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{large.faces.grpc.port}", options=options) as channel:
            request = infer_request("echo", bytes(8 * rows), shape=[rows, 2]).SerializeToString()
            answer = pb.ModelInferResponse.FromString(await channel.unary_unary(f"/{SERVICE}/ModelInfer")(request))

    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(answer.raw_output_contents[0]) == 8 * rows


@lines("G-16", "1.3 schedule_policy")
async def test_the_earliest_of_all_deadlines_applies(system: Served) -> None:
    """The call's, or the parameter's, or the default; the parameter is not sent on."""
    await system.call("ModelInfer", infer_request("echo", ONE_AND_TWO), timeout=9)
    await system.call("ModelInfer", with_parameter("timeout", "int64_param", 5_000_000), timeout=9)
    await system.call("ModelInfer", with_parameter("timeout", "int64_param", 0))
    await system.call("ModelInfer", infer_request("echo", ONE_AND_TWO), timeout=100_000)

    left = [remaining_s(request.deadline) for request in system.backend.requests]
    bounds = [(0, 9), (0, 5), (9, 30), (30, 600)]
    assert all(low < seconds < high + 1 for seconds, (low, high) in zip(left, bounds, strict=True))  # gRPC rounds up
    assert all(not request.parameters for request in system.backend.requests)
    with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
        await system.call("ModelInfer", with_parameter("timeout", "int64_param", 1))


@lines("D15", "D16")
async def test_parameters_of_every_type_are_accepted(system: Served) -> None:
    """Parameters reserved by other servers are ignored, and so is one without a value."""
    request = with_parameter("triton_enable_empty_final_response", "bool_param", True)
    request.parameters["priority"].uint64_param = 1
    request.parameters["share"].double_param = 0.5
    request.parameters["nothing"].SetInParent()

    await system.call("ModelInfer", request)

    assert system.backend.requests[0].parameters == {
        "triton_enable_empty_final_response": True,
        "share": 0.5,
    }


@lines("G-17")
async def test_unknown_message_fields_are_skipped(system: Served) -> None:
    """A client may be newer than we are."""
    unknown = b"\xaa\x06\x03abc"  # field 101

    answer = await system.call("ModelInfer", infer_request("echo", ONE_AND_TWO).SerializeToString() + unknown)

    assert answer.model_name == "echo"


@lines("G-18")
@pytest.mark.parametrize("name", ["", SERVICE])
async def test_probes_are_answered(system: Served, name: str) -> None:
    """grpc.health.v1, Check and Watch, for everything and for the service."""
    stub = health_pb2_grpc.HealthStub(system.channel)
    request = health_pb2.HealthCheckRequest(service=name)

    async for update in stub.Watch(request):  # what is served may be known a moment later
        if update.status == health_pb2.HealthCheckResponse.SERVING:
            break
    check = await stub.Check(request)

    assert check.status == health_pb2.HealthCheckResponse.SERVING


@lines("G-19")
@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_tools_without_proto_files_find_every_method(system: Served, version: str) -> None:
    """Reflection, under its old name and its new one."""
    call = system.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]

    listed, found = [answer async for answer in call(iter(requests))]

    file = descriptor_pb2.FileDescriptorProto.FromString(found.file_descriptor_response.file_descriptor_proto[0])
    assert SERVICE in {service.name for service in listed.list_services_response.service}
    assert {"ModelInfer", "ModelConfig"} <= {method.name for method in file.service[0].method}


@lines("G-20")
@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_messages_are_accepted(system: Served, compression: grpc.Compression) -> None:
    """Both algorithms that gRPC has."""
    answer = await system.call("ModelInfer", infer_request("echo", bytes(8000), shape=[1000, 2]), compression=compression)

    assert answer.raw_output_contents[0] == bytes(8000)


@lines("G-21")
async def test_unknown_metadata_is_ignored(system: Served) -> None:
    """Nor keepalive pings."""
    options = [("grpc.keepalive_time_ms", 1000), ("grpc.keepalive_permit_without_calls", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{system.faces.grpc.port}", options=options) as channel:
        method = channel.unary_unary(f"/{SERVICE}/ServerLive")
        answer = pb.ServerLiveResponse.FromString(await method(b"", metadata=(("test", "1"), ("other-bin", b"\xff"))))

    assert answer.live


@lines("1.3 model_configuration")
async def test_the_configuration_has_what_load_generators_read(system: Served) -> None:
    """Dimensions without the batch, datatypes as numbers."""
    config = (await system.call("ModelConfig", pb.ModelConfigRequest(name="simple"))).config
    text = (await system.call("ModelConfig", pb.ModelConfigRequest(name="text", version="1.1"))).config

    assert (config.name, config.platform, config.max_batch_size) == ("simple", "test", 2**31 - 1)
    assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in config.input] == [
        ("INPUT0", pb.TYPE_INT32, [4]),
        ("INPUT1", pb.TYPE_INT32, [4]),
    ]
    assert [tensor.name for tensor in config.output] == ["OUTPUT0", "OUTPUT1"]
    assert text.input[0].data_type == pb.TYPE_STRING


@lines("1.3 statistics")
async def test_statistics_are_the_same_as_over_rest() -> None:
    """One count of both faces."""
    async with served() as system:
        await system.call("ModelInfer", infer_request("echo", ONE_AND_TWO))
        answer = await system.call("ModelStatistics", pb.ModelStatisticsRequest(name="echo", version="2.1"))
        rest = (await system.rest.get("/v2/models/echo/versions/2.1/stats")).json()["model_stats"][0]

    entry = answer.model_stats[0]
    assert (entry.inference_count, entry.execution_count, entry.inference_stats.success.count) == (1, 1, 1)
    assert entry.inference_stats.compute_infer.ns == rest["inference_stats"]["compute_infer"]["ns"] > 0
    assert entry.last_inference == rest["last_inference"]


@lines("1.3 classification")
async def test_the_top_classes_are_returned_as_value_and_index(system: Served) -> None:
    """As BYTES, greatest first."""
    request = infer_request("echo", ONE_AND_TWO, outputs=["x"])
    request.outputs[0].parameters["classification"].int64_param = 1

    answer = await system.call("ModelInfer", request)

    assert (answer.outputs[0].datatype, list(answer.outputs[0].shape)) == ("BYTES", [1, 1])
    assert answer.raw_output_contents[0] == encode_bytes([b"2.000000:1"])
    assert system.backend.requests[0].outputs[0].parameters == {}


@lines("D17")
async def test_a_model_to_load_may_be_named_in_kserves_field() -> None:
    """In the first field; where control is not allowed, it is refused."""
    request = pb.RepositoryModelLoadRequest(repository_name="echo")
    async with served(allow_repository_control=True) as system:
        await system.call("RepositoryModelLoad", request)
        unload = pb.RepositoryModelUnloadRequest(model_name="echo")
        unload.parameters["unload_dependents"].bool_param = False  # tritonclient sends it always
        await system.call("RepositoryModelUnload", unload)
        controlled = list(system.backend.controlled)
    async with served() as system:
        code, _ = await status_of(system, "RepositoryModelLoad", request)

    assert controlled == [("load", "echo"), ("unload", "echo")]
    assert code is grpc.StatusCode.PERMISSION_DENIED


@lines("D18", "1.3 ModelStreamInfer")
async def test_an_error_on_a_stream_is_a_message(system: Served) -> None:
    """With the id of its request; the stream stays open. Requests without a timeout get the default one."""
    call = system.channel.stream_stream(
        f"/{SERVICE}/ModelStreamInfer",
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelStreamInferResponse.FromString,
    )
    requests = [infer_request("nope", ONE_AND_TWO, id="bad"), infer_request("echo", ONE_AND_TWO, id="good")]

    answers = {answer.infer_response.id: answer async for answer in call(iter(requests))}

    assert answers["bad"].error_message.startswith("Request for unknown model")
    assert answers["good"].error_message == ""
    assert answers["good"].infer_response.raw_output_contents[0] == ONE_AND_TWO
    assert system.backend.requests[0].deadline != NO_DEADLINE


@lines("2 unknown method")
async def test_an_unsupported_method_is_unimplemented(system: Served) -> None:
    """Shared memory, tracing and logging of others' extensions."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await system.channel.unary_unary(f"/{SERVICE}/SystemSharedMemoryRegister")(b"")

    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
