"""Preprocess in front of third-party servers: no manifest, perhaps no index, stream, health or version numbers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from preprocess_service.any_server import AnyServer
from preprocess_service.service import PreprocessService
from proxy.service import ProxyService
from splitserve import publish_preprocessor
from splitserve.api.inference import inference_pb2 as pb
from splitserve.arrays import from_array, to_array
from splitserve.errors import NotFound, PairMismatch, PermissionDenied, SplitserveError, Unavailable, Unsupported
from splitserve.oip.messages import LOADING, READY, UNAVAILABLE, InferRequest, ModelMetadata, ModelState
from splitserve.oip.protobuf import SERVICE
from splitserve.remote.inference import RemoteInference
from splitserve.repository.folder import Repository
from splitserve.runtimes import preprocessor as preprocessors
from splitserve.server.store import VersionStore
from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, signature

pytestmark = pytest.mark.heavy  # they publish

ROWS = np.random.default_rng(0).normal(size=(20, 3))
FEATURES = TensorSpec("features", "FP32", ("batch", 3))
SCORES = TensorSpec("scores", "FP32", ("batch", 2))


class Other(FakeInference):
    """A server that answers the six methods of the standard, and no others."""

    def __init__(self, *signatures: ModelMetadata, refusal: SplitserveError | None = None) -> None:
        super().__init__(*signatures)
        self.refusal = refusal or Unsupported("Method not found!")
        self.is_model_ready = True

    async def index(self) -> list[ModelState]:
        raise self.refusal

    async def is_ready(self, model: str, version: str = "") -> bool:
        return self.is_model_ready

    async def load(self, model: str) -> None:
        raise Unsupported("Method not found!")


def of_versions(*versions: str) -> ModelMetadata:
    """The metadata of ``m`` at a server with these versions."""
    return ModelMetadata("m", versions, "other", (FEATURES,), (SCORES,))


class Described(Other):
    """Its metadata, for every version."""

    def __init__(self, *versions: str) -> None:
        super().__init__()
        self.versions = versions

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        if model != "m":
            raise NotFound(f"no {model}")
        return of_versions(*self.versions)


@pytest.mark.parametrize("refusal", [Unsupported("no index"), PermissionDenied("not for you")])
@pytest.mark.parametrize(("versions", "found"), [((), ["0"]), (("v1", "0"), ["0"]), (("1", "3"), ["1", "3"])])
async def test_without_an_index_each_model_is_queried(
    refusal: SplitserveError, versions: tuple[str, ...], found: list[str]
) -> None:
    """Numeric versions are kept; others become the server's default version."""
    server = Described(*versions)
    server.refusal = refusal

    states = await AnyServer(server, models=lambda: ["m", "unknown"]).index()

    assert states == [ModelState("m", version, READY) for version in found]


async def test_a_model_that_is_not_ready_at_the_server_is_not_ready() -> None:
    """The reason names the server as its source."""
    server = Described()
    server.is_model_ready = False

    [state] = await AnyServer(server, models=lambda: ["m"]).index()

    assert (state.state, state.reason) == (UNAVAILABLE, "the predict service says that it is not ready")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ([("", "State.READY")], [("0", READY, "")]),
        ([("", "State.UNKNOWN")], [("", UNAVAILABLE, "the predict service says UNKNOWN")]),
        ([("2", "State.READY"), ("", "LOADING")], [("0", LOADING, ""), ("2", READY, "")]),
        ([("a", "READY"), ("b", "LOADING")], [("0", READY, "")]),
        ([("1", "UNAVAILABLE")], [("1", UNAVAILABLE, "")]),
    ],
)
async def test_an_index_is_read_in_every_known_form(theirs: list[tuple[str, str]], ours: list[tuple[str, str, str]]) -> None:
    """MLServer writes the names of its enum, and omits a missing version."""
    server = FakeInference()
    server.states = [ModelState("m", *state) for state in theirs]

    states = await AnyServer(server, models=list).index()  # type: ignore[arg-type]

    assert [(state.version, state.state, state.reason) for state in states] == ours


async def test_a_version_without_a_number_is_left_to_the_server() -> None:
    """Requested as "", which every server understands."""
    server = Other(signature("m", [FEATURES], version=""))
    any_server = AnyServer(server, models=list)

    await any_server.infer(InferRequest("m", (), version="0"))
    await any_server.infer(InferRequest("m", (), version="2"))

    assert [request.version for request in server.requests] == ["", "2"]
    assert (await any_server.metadata("m", "0")).name == "m"


async def test_a_server_that_refuses_load_requests_is_tolerated() -> None:
    """It loads by itself."""
    await AnyServer(Other(), models=list).load("m")


Answer = Callable[[pb.ModelInferRequest], pb.ModelInferResponse]


def raw(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    """Two zeros a row, as bytes."""
    n_rows = request.inputs[0].shape[0]
    tensor = pb.ModelInferResponse.InferOutputTensor(name="scores", datatype="FP32", shape=[n_rows, 2])
    return pb.ModelInferResponse(model_name="m", outputs=[tensor], raw_output_contents=[bytes(8 * n_rows)])


def typed(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    """The same in the typed field."""
    n_rows = request.inputs[0].shape[0]
    contents = pb.InferTensorContents(fp32_contents=[0.0] * 2 * n_rows)
    tensor = pb.ModelInferResponse.InferOutputTensor(name="scores", datatype="FP32", shape=[n_rows, 2], contents=contents)
    return pb.ModelInferResponse(model_name="m", outputs=[tensor])


@asynccontextmanager
async def bare_server(answer: Answer, *, n_features: int = 3, is_described: bool = True) -> AsyncIterator[str]:
    """A gRPC server of the six methods of the standard and nothing else; gives its address."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    inputs = [tensor(name="features", datatype="FP32", shape=[-1, n_features])] if is_described else []
    outputs = [tensor(name="scores", datatype="FP32", shape=[-1, 2])] if is_described else []

    async def model_ready(request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        return pb.ModelReadyResponse(ready=True)

    async def model_metadata(request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        if request.version:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no version {request.version}")
        return pb.ModelMetadataResponse(name="m", inputs=inputs, outputs=outputs)

    async def model_infer(request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        assert request.model_version == ""
        return answer(request)

    methods = {
        "ModelReady": (model_ready, pb.ModelReadyRequest),
        "ModelMetadata": (model_metadata, pb.ModelMetadataRequest),
        "ModelInfer": (model_infer, pb.ModelInferRequest),
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            method, request_deserializer=message.FromString, response_serializer=lambda answer: answer.SerializeToString()
        )
        for name, (method, message) in methods.items()
    }
    async with serving_methods(handlers) as address:
        yield address


@asynccontextmanager
async def serving_methods(handlers: dict[str, Any]) -> AsyncIterator[str]:
    """Serve these methods of the protocol on a free port; gives the address."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.fixture
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@asynccontextmanager
async def preprocess(target: str, tmp_path: Path, executor: Executor) -> AsyncIterator[PreprocessService]:
    """In front of the server at an address, with the first preprocessor of ``m``."""
    publish_preprocessor(StandardScaler().fit(ROWS), ROWS, name="m", repository=tmp_path)
    store = VersionStore(Repository(tmp_path), "preprocess", preprocessors.load, allow_unreleased_pairs=True)
    async with RemoteInference(target, stage="predict", wait_s=20) as remote:
        service = PreprocessService(
            store, AnyServer(remote, models=store.catalogue.models), executor, allow_unreleased_pairs=True
        )
        await store.refresh()
        await service.refresh()
        yield service


def request() -> InferRequest:
    return InferRequest("m", (from_array("features", ROWS[:4]),), id="7")


@pytest.mark.parametrize("answer", [raw, typed])
async def test_any_server_of_the_protocol_can_replace_predict(tmp_path: Path, executor: Executor, answer: Answer) -> None:
    """Its metadata is checked against the preprocessor; calls are unary; the pair says that its version has no number."""
    async with bare_server(answer) as target, preprocess(target, tmp_path, executor) as service:
        response = await service.infer(request())

        assert await service.not_ready_reason() == ""
        assert (response.version, response.id) == ("1.0", "7")
        assert to_array(response.outputs[0]).tolist() == [[0.0, 0.0]] * 4
        assert (await service.infer(InferRequest("m", request().inputs, version="1.0"))).version == "1.0"


async def test_a_server_whose_metadata_does_not_fit_is_refused(tmp_path: Path, executor: Executor) -> None:
    """Before a request is answered wrongly."""
    async with bare_server(raw, n_features=4) as target, preprocess(target, tmp_path, executor) as service:
        with pytest.raises(
            Unavailable, match='the halves do not fit: "features": expected 4 in dimension 1, the preprocessor produces 3'
        ):
            await service.infer(request())


async def test_a_server_without_a_signature_is_refused(tmp_path: Path, executor: Executor) -> None:
    """A fit that cannot be checked is refused; the reason says what to do."""
    async with bare_server(raw, is_described=False) as target, preprocess(target, tmp_path, executor) as service:
        with pytest.raises(Unavailable, match="has no signature of the model; declare its inputs and outputs there"):
            await service.infer(request())


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelInfer"])
async def test_a_malformed_message_of_the_server_is_reported(method: str) -> None:
    """MLServer, for one, has another type in the field where the standard has the properties of a model."""

    async def broken(data: bytes, context: Any) -> bytes:
        return b"\x0a\x01\xff"  # a name that is no UTF-8

    async with (
        serving_methods({method: grpc.unary_unary_rpc_method_handler(broken)}) as address,
        RemoteInference(address, stage="predict", wait_s=20) as remote,
    ):
        with pytest.raises(PairMismatch, match="the predict service returned a malformed message"):
            await (remote.metadata("m") if method == "ModelMetadata" else remote.infer(request()))


async def test_a_changed_signature_of_an_unnamed_version_is_detected(tmp_path: Path, executor: Executor) -> None:
    """Only versions with a number are known never to change."""
    publish_preprocessor(StandardScaler().fit(ROWS), ROWS, name="m", repository=tmp_path)
    store = VersionStore(Repository(tmp_path), "preprocess", preprocessors.load, allow_unreleased_pairs=True)
    server = Described()
    service = PreprocessService(store, AnyServer(server, models=store.catalogue.models), executor, allow_unreleased_pairs=True)
    await store.refresh()
    await service.refresh()

    async def other(model: str, version: str = "") -> ModelMetadata:
        return signature("m", [TensorSpec("features", "FP32", ("batch", 9))], [SCORES], version="")

    server.metadata = other  # type: ignore[method-assign]
    await service.refresh()

    assert [(state.version, state.state) for state in await service.index()] == [("1.0", UNAVAILABLE)]


async def test_the_proxy_fetches_signatures_of_unnamed_versions_again() -> None:
    """It keeps the signatures of pairs whose halves have numbers."""
    asked: list[str] = []

    class Counting(FakeInference):
        async def metadata(self, model: str, version: str = "") -> ModelMetadata:
            asked.append(version)
            return await super().metadata(model, version)

    proxy = ProxyService(Counting(signature("m", [FEATURES], version="1.0"), signature("m", [FEATURES], version="1.1")))
    await proxy.refresh()
    await proxy.refresh()

    assert asked == ["1.0", "1.1", "1.0"]
