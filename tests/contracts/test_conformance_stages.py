"""The Open Inference Protocol at predict and at preprocess, which are servers of it by themselves; lines as at the proxy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from predict_service.service import PredictService
from preprocess_service.any_server import AnyServer
from preprocess_service.service import PreprocessService
from splitserve.api.inference import inference_pb2 as pb
from splitserve.oip.messages import InferenceService, ServerMetadata
from splitserve.oip.protobuf import SERVICE
from splitserve.oip.statistics import Statistics
from splitserve.publishing.simple_models import publish_all
from splitserve.remote.inference import RemoteInference
from splitserve.repository.folder import Repository
from splitserve.runtimes import predictor, preprocessor
from splitserve.server.grpc_config import GrpcConfig
from splitserve.server.grpc_face import GrpcFace
from splitserve.server.store import VersionStore
from splitserve.tensors import DATATYPES, encode_bytes
from tests.contracts.test_conformance_grpc import TYPED, case, lines

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT = 1_000_000
ONE_AND_TWO = b"\x00\x00\x80?\x00\x00\x00@"
SIXTEEN = b"\x01\x00\x00\x00" * 16


class Stage(NamedTuple):
    """A stage behind its gRPC face, and how it writes the only version of a model."""

    channel: grpc.aio.Channel
    version: str

    async def call(self, method: str, request: Any = b"", **options: Any) -> Any:
        """A unary method with a message, or with bytes that need not be one; the answer, parsed."""
        raw = request if isinstance(request, bytes) else request.SerializeToString()
        return getattr(pb, f"{method}Response").FromString(await self.channel.unary_unary(f"/{SERVICE}/{method}")(raw, **options))

    async def refusal(self, method: str, request: Any) -> tuple[grpc.StatusCode, str]:
        """Code and message of a call that fails."""
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await self.call(method, request)
        return raised.value.code(), raised.value.details() or ""


@asynccontextmanager
async def faced(name: str, service: InferenceService, statistics: Statistics) -> AsyncIterator[str]:
    """The service on a free port; gives its address."""
    metadata = ServerMetadata(f"splitserve-{name}", "0", ("statistics",))
    config = GrpcConfig(stage=name, metadata=metadata, max_message_bytes=LIMIT)
    async with GrpcFace(service, config, statistics=statistics) as face:
        yield f"127.0.0.1:{face.port}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stages(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Stage]]:
    """Preprocess in front of predict, with the simple models."""
    root = tmp_path_factory.mktemp("stages")
    assert list(publish_all(root))
    predictors = VersionStore(Repository(root), "predict", predictor.load)
    preprocessors = VersionStore(Repository(root), "preprocess", preprocessor.load)
    await predictors.refresh()
    await preprocessors.refresh()
    with ThreadPoolExecutor(1) as executor:
        predict = PredictService(predictors, executor)
        async with (
            faced("predict", predict, predict.statistics) as predict_address,
            RemoteInference(predict_address, stage="predict") as remote,
        ):
            preprocess = PreprocessService(preprocessors, AnyServer(remote, models=preprocessors.catalogue.models), executor)
            await preprocess.refresh()
            async with (
                faced("preprocess", preprocess, preprocess.statistics) as preprocess_address,
                grpc.aio.insecure_channel(predict_address) as to_predict,
                grpc.aio.insecure_channel(preprocess_address) as to_preprocess,
            ):
                yield {"predict": Stage(to_predict, "1"), "preprocess": Stage(to_preprocess, "1.1")}


@pytest.fixture(params=["predict", "preprocess"])
def stage(request: pytest.FixtureRequest, stages: dict[str, Stage]) -> Stage:
    return stages[request.param]


def request(
    model: str = "identity_fp32", *raws: bytes, datatype: str = "FP32", shape: Any = (1, 2), contents: Any = None, **fields: Any
) -> pb.ModelInferRequest:
    """A request with the input of the models that give back what they get."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="INPUT0", datatype=datatype, shape=shape)
    if contents is not None:
        tensor.contents.MergeFrom(pb.InferTensorContents(**contents))
    return pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=raws, **fields)


def simple(*outputs: str, **fields: Any) -> pb.ModelInferRequest:
    """A request for a sum and a difference of (1, 16)."""
    tensor = pb.ModelInferRequest.InferInputTensor
    return pb.ModelInferRequest(
        model_name="simple",
        inputs=[tensor(name=name, datatype="INT32", shape=[1, 16]) for name in ("INPUT0", "INPUT1")],
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
        raw_input_contents=[SIXTEEN, SIXTEEN],
        **fields,
    )


@lines("stage G-01", "stage D9")
async def test_every_method_of_the_protocol_is_there(stage: Stage) -> None:
    """The six of the standard; what does not exist is not ready."""
    assert (await stage.call("ServerLive")).live
    assert (await stage.call("ServerReady")).ready
    assert (await stage.call("ServerMetadata")).name.startswith("splitserve-")
    assert (await stage.call("ModelReady", pb.ModelReadyRequest(name="simple", version=stage.version))).ready
    assert not (await stage.call("ModelReady", pb.ModelReadyRequest(name="nope"))).ready
    metadata = await stage.call("ModelMetadata", pb.ModelMetadataRequest(name="simple"))
    answer = await stage.call("ModelInfer", simple())

    assert list(metadata.versions) == [stage.version]
    assert [(spec.name, spec.datatype, list(spec.shape)) for spec in metadata.inputs] == [
        ("INPUT0", "INT32", [-1, 16]),
        ("INPUT1", "INT32", [-1, 16]),
    ]
    assert answer.raw_output_contents[0] == b"\x02\x00\x00\x00" * 16


@lines("stage G-02")
@pytest.mark.parametrize("datatype", TYPED)
async def test_typed_and_raw_contents_mean_the_same(stage: Stage, datatype: str) -> None:
    """In every datatype; the answer is raw, the same bit for bit."""
    field, values = TYPED[datatype]
    model = f"identity_{datatype.lower()}"
    if datatype == "BYTES":
        values = ["ü".encode(), b""]  # ONNX's strings are UTF-8

    typed = await stage.call("ModelInfer", request(model, datatype=datatype, contents={field: values}))
    raw = typed.raw_output_contents[0]
    again = await stage.call("ModelInfer", request(model, raw, datatype=datatype))

    assert again.raw_output_contents[0] == raw
    if datatype == "BYTES":
        assert raw == encode_bytes(values)
    else:
        assert list(memoryview(raw).cast(DATATYPES[datatype].format)) == values  # type: ignore[call-overload]


@lines("stage G-08")
async def test_half_precision_is_raw_only(stage: Stage) -> None:
    """It has no field of its own."""
    raw = await stage.call("ModelInfer", request("identity_fp16", b"\x00\x3c\x00\x40", datatype="FP16"))
    code, _ = await stage.refusal("ModelInfer", request("identity_fp16", datatype="FP16", contents={"fp32_contents": [1, 2]}))

    assert raw.raw_output_contents[0] == b"\x00\x3c\x00\x40"
    assert code is grpc.StatusCode.INVALID_ARGUMENT


MALFORMED = [
    case("stage G-03", "raw and contents", request("identity_fp32", ONE_AND_TWO, contents={"fp32_contents": [1, 2]})),
    case("stage G-04", "more raws than inputs", request("identity_fp32", ONE_AND_TWO, ONE_AND_TWO)),
    case("stage G-05", "too short", request("identity_fp32", ONE_AND_TWO[:7])),
    case("stage G-05", "too long", request("identity_fp32", ONE_AND_TWO + b"\x00")),
    case("stage G-05", "empty", request("identity_fp32", b"")),
    case("stage G-06", "too few typed", request(contents={"fp32_contents": [1]})),
    case("stage G-06", "wrong field", request(contents={"fp64_contents": [1, 2]})),
    case("stage G-06", "none", request()),
    case("stage G-07", "INT8 of 300", request("identity_int8", datatype="INT8", contents={"int_contents": [300, 0]})),
    case("stage G-09", "negative dimension", request("identity_fp32", ONE_AND_TWO, shape=[-1, 2])),
    case("stage G-09", "product wraps", request("identity_fp32", ONE_AND_TWO, shape=[2**62, 4])),
    case("stage G-10", "length beyond the end", request("identity_bytes", b"\xff\x00\x00\x00a", datatype="BYTES")),
    case("stage G-10", "too few elements", request("identity_bytes", encode_bytes([b"a"]), datatype="BYTES")),
    case("stage G-10", "no UTF-8", request("identity_bytes", encode_bytes([b"\xff", b""]), datatype="BYTES")),
    case("stage G-11", "no inputs", pb.ModelInferRequest(model_name="identity_fp32")),
    case("stage G-12", "unknown output", simple("OUTPUT9")),
    case("stage G-12", "output twice", simple("OUTPUT0", "OUTPUT0")),
    case("stage G-14", "no message", b"\xff\xff\xff"),
    case("stage G-16", "timeout negative", simple(parameters={"timeout": pb.InferParameter(int64_param=-1)})),
    case("stage I-08", "unknown datatype", request("identity_fp32", ONE_AND_TWO, datatype="FP33")),
    case("stage I-09", "another datatype", request("identity_fp32", bytes(16), datatype="FP64")),
    case("stage I-13", "BOOL of 2", request("identity_bool", b"\x02\x00", datatype="BOOL")),
]


@pytest.mark.parametrize("request_", MALFORMED)
async def test_malformed_requests_are_invalid_argument(stage: Stage, request_: Any) -> None:
    """Found by the stage that receives it."""
    code, message = await stage.refusal("ModelInfer", request_)

    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message


NOT_FOUND = [
    case("stage G-11", "empty name", "ModelInfer", request("", ONE_AND_TWO)),
    case("stage G-11", "unknown model", "ModelInfer", request("nope", ONE_AND_TWO)),
    case("stage G-11", "metadata", "ModelMetadata", pb.ModelMetadataRequest(name="nope")),
    case("stage G-11", "configuration", "ModelConfig", pb.ModelConfigRequest(name="nope")),
    case("stage G-11", "statistics", "ModelStatistics", pb.ModelStatisticsRequest(name="nope")),
    case("stage G-13", "unknown version", "ModelInfer", request("identity_fp32", ONE_AND_TWO, model_version="9")),
    case("stage G-13", "no version", "ModelInfer", request("identity_fp32", ONE_AND_TWO, model_version="abc")),
]


@pytest.mark.parametrize(("method", "request_"), NOT_FOUND)
async def test_unknown_models_and_versions_are_not_found(stage: Stage, method: str, request_: Any) -> None:
    """In the words that clients match."""
    code, message = await stage.refusal(method, request_)

    assert code is grpc.StatusCode.NOT_FOUND
    assert message.startswith("Request for unknown model")


@lines("stage G-12", "stage G-13")
async def test_the_requested_version_returns_the_requested_outputs(stage: Stage) -> None:
    """In the requested order; the id is echoed."""
    answer = await stage.call("ModelInfer", simple("OUTPUT1", "OUTPUT0", model_version=stage.version, id="7"))

    assert [output.name for output in answer.outputs] == ["OUTPUT1", "OUTPUT0"]
    assert (answer.model_version, answer.id) == (stage.version, "7")
    assert answer.raw_output_contents[0] == bytes(64)


@lines("stage G-15")
async def test_a_message_above_the_limit_is_refused(stage: Stage) -> None:
    """With the status of what is too large."""
    rows = LIMIT // 8 + 1
    code, _ = await stage.refusal("ModelInfer", request("identity_fp32", bytes(8 * rows), shape=[rows, 2]))

    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


@lines("stage G-16")
async def test_a_request_past_its_deadline_is_not_begun(stage: Stage) -> None:
    """Whose timeout is over when the request has arrived."""
    code, _ = await stage.refusal("ModelInfer", simple(parameters={"timeout": pb.InferParameter(int64_param=1)}))

    assert code is grpc.StatusCode.DEADLINE_EXCEEDED


@lines("stage G-18")
@pytest.mark.parametrize("name", ["", SERVICE])
async def test_probes_are_answered(stage: Stage, name: str) -> None:
    """By Check and by Watch."""
    stub = health_pb2_grpc.HealthStub(stage.channel)
    asked = health_pb2.HealthCheckRequest(service=name)

    watched = stub.Watch(asked)
    status = (await watched.read()).status
    watched.cancel()

    assert (await stub.Check(asked)).status == status == health_pb2.HealthCheckResponse.SERVING


@lines("stage G-20")
@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_messages_are_accepted(stage: Stage, compression: grpc.Compression) -> None:
    """Of both kinds that grpc has."""
    answer = await stage.call("ModelInfer", simple(), compression=compression)

    assert len(answer.raw_output_contents) == 2


@lines("stage 1.3")
async def test_configuration_statistics_and_classes_are_given(stage: Stage) -> None:
    """Triton's extensions are in the face, so every stage has them."""
    config = (await stage.call("ModelConfig", pb.ModelConfigRequest(name="simple"))).config
    before = await stage.call("ModelStatistics", pb.ModelStatisticsRequest(name="simple"))
    asked = simple("OUTPUT0")
    asked.outputs[0].parameters["classification"].int64_param = 1
    answer = await stage.call("ModelInfer", asked)
    after = await stage.call("ModelStatistics", pb.ModelStatisticsRequest(name="simple"))

    assert (config.input[0].data_type, list(config.input[0].dims)) == (pb.TYPE_INT32, [16])
    assert after.model_stats[0].inference_count == before.model_stats[0].inference_count + 1
    assert answer.raw_output_contents[0] == encode_bytes([b"2:0"])


@lines("stage 1.3")
async def test_an_error_on_a_stream_is_a_message(stage: Stage) -> None:
    """And the stream stays open."""
    stream = stage.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
    requests = [request("nope", ONE_AND_TWO, id="bad"), simple(id="good")]

    answers = {}
    async for data in stream(iter([each.SerializeToString() for each in requests])):
        answer = pb.ModelStreamInferResponse.FromString(data)
        answers[answer.infer_response.id] = answer.error_message

    assert answers["good"] == ""
    assert answers["bad"].startswith("Request for unknown model")


@lines("stage 2 unknown method")
async def test_an_unsupported_method_is_unimplemented(stage: Stage) -> None:
    """UNIMPLEMENTED."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stage.channel.unary_unary(f"/{SERVICE}/TraceSetting")(b"")

    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
