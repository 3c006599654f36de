"""Predict, preprocess and proxy without a transport: versions, pairs, and which stage an error blames."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from predict_service.service import PredictService
from preprocess_service.service import PreprocessService
from proxy.service import ProxyService
from splitserve import publish_predictor, publish_preprocessor
from splitserve.arrays import from_array, to_array
from splitserve.errors import (
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    Overloaded,
    PairMismatch,
    SplitserveError,
    Unavailable,
)
from splitserve.oip.messages import (
    LOADING,
    READY,
    UNAVAILABLE,
    InferRequest,
    InferResponse,
    ModelState,
    RequestedOutput,
    deadline_after,
)
from splitserve.repository.folder import Repository
from splitserve.runtimes import predictor as predictors
from splitserve.runtimes import preprocessor as preprocessors
from splitserve.server.store import VersionStore
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor
from splitserve.testing import FakeInference, signature
from tests.folders import MadeOnce
from tests.system.models import softmax_model

pytestmark = pytest.mark.heavy  # they publish

ROWS = np.random.default_rng(0).normal(size=(20, 3))
FEATURES = TensorSpec("features", "FP32", ("batch", 3))
SCORES = TensorSpec("scores", "FP32", ("batch", 2))


@pytest.fixture
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def repository(made_once: MadeOnce, tmp_path: Path) -> Repository:
    """The model ``m``: two preprocessors and two predictors."""
    return Repository(Path(shutil.copytree(made_once(publish_halves), tmp_path, dirs_exist_ok=True)))


def publish_halves(repository: Path) -> None:
    for scale in (1, 2):
        scaler = StandardScaler().fit(ROWS * scale)
        publish_preprocessor(scaler, ROWS, name="m", repository=repository)
        publish_predictor(softmax_model(3), np.zeros((1, 3), np.float32), name="m", repository=repository)


def request(rows: Any = ROWS[:2], *, version: str = "", name: str = "features", model: str = "m", **fields: Any) -> InferRequest:
    return InferRequest(model, (from_array(name, np.asarray(rows)),), version=version, **fields)


def scores(request: InferRequest) -> InferResponse:
    """Two zeros for each row."""
    n_rows = request.inputs[0].n_rows
    return InferResponse(request.model, request.version, (from_array("scores", np.zeros((n_rows, 2), np.float32)),))


def fake_predict(*versions: str, answer: Any = scores, features: TensorSpec = FEATURES) -> FakeInference:
    return FakeInference(*(signature("m", [features], [SCORES], version=number) for number in versions), answer=answer)


async def preprocess_service(repository: Repository, predict: Any, executor: Executor) -> PreprocessService:
    """A service that has loaded its bundles and refreshed."""
    store = VersionStore(repository, "preprocess", preprocessors.load, allow_unreleased_pairs=True)
    service = PreprocessService(store, predict, executor, allow_unreleased_pairs=True)
    await store.refresh()
    await service.refresh()
    return service


async def predict_service(repository: Repository, executor: Executor) -> PredictService:
    store = VersionStore(repository, "predict", predictors.load, allow_unreleased_pairs=True)
    await store.refresh()
    return PredictService(store, executor)


async def test_predict_uses_the_latest_version_by_default(repository: Repository, executor: Executor) -> None:
    """Without a version the newest; a number selects that version."""
    service = await predict_service(repository, executor)
    features = ROWS[:2].astype(np.float32)

    latest = await service.infer(request(features))
    first = await service.infer(request(features, version="1"))

    assert (latest.version, first.version) == ("2", "1")
    assert to_array(latest.outputs[0]).shape == (2, 2)


@pytest.mark.parametrize(("model", "version"), [("nope", ""), ("m", "9"), ("m", "abc"), ("m", "1.1"), ("m", "01")])
async def test_predict_knows_no_other_versions(repository: Repository, executor: Executor, model: str, version: str) -> None:
    """An unknown version is never answered by another one."""
    service = await predict_service(repository, executor)

    with pytest.raises(NotFound, match="^Request for unknown model"):
        await service.infer(request(ROWS[:1].astype(np.float32), model=model, version=version))


async def test_predict_accepts_only_the_datatype_of_the_signature(repository: Repository, executor: Executor) -> None:
    """A server of the protocol does not convert datatypes."""
    service = await predict_service(repository, executor)

    with pytest.raises(InvalidInput, match='input "features": expected datatype FP32, got FP64') as raised:
        await service.infer(request(ROWS[:1]))

    assert raised.value.stage == "predict"


async def test_predict_is_loading_until_every_bundle_was_tried(repository: Repository, executor: Executor) -> None:
    """Before the first poll has finished, an unknown model may still be loaded, so NOT_FOUND would be wrong."""
    service = PredictService(VersionStore(repository, "predict", predictors.load, allow_unreleased_pairs=True), executor)

    with pytest.raises(Unavailable, match="models are still being loaded"):
        await service.infer(request())

    assert await service.not_ready_reason() == "models are still being loaded"


async def test_a_request_past_its_deadline_is_not_processed(repository: Repository, executor: Executor) -> None:
    """Every stage checks the deadline before it begins."""
    predict = fake_predict("1")
    preprocess = await preprocess_service(repository, predict, executor)
    proxy = ProxyService(preprocess)
    await proxy.refresh()

    for service in (await predict_service(repository, executor), preprocess, proxy):
        with pytest.raises(DeadlineExceeded):
            await service.infer(request(deadline=deadline_after(-1)))

    assert predict.requests == []


async def test_preprocess_transforms_calls_predict_and_answers_with_the_pair(repository: Repository, executor: Executor) -> None:
    """Version K.M: transformed with K, sent to M with the caller's id and deadline."""
    predict = fake_predict("1", "2")
    service = await preprocess_service(repository, predict, executor)
    deadline = deadline_after(10)

    response = await service.infer(request(version="1.2", id="7", deadline=deadline))

    sent = predict.requests[0]
    assert (response.version, response.id) == ("1.2", "7")
    assert (sent.version, sent.id, sent.deadline) == ("2", "7", deadline)
    np.testing.assert_allclose(to_array(sent.inputs[0]), StandardScaler().fit(ROWS).transform(ROWS[:2]), rtol=1e-6)


async def test_the_newest_pair_is_the_default(repository: Repository, executor: Executor) -> None:
    """No version: the newest preprocessor with the newest predictor that it fits."""
    service = await preprocess_service(repository, fake_predict("1", "2"), executor)

    response = await service.infer(request())

    assert response.version == "2.2"
    assert (await service.metadata("m")).versions == ("1.1", "1.2", "2.1", "2.2")


async def test_a_pair_that_does_not_fit_is_refused_with_the_reason(repository: Repository, executor: Executor) -> None:
    """Checked before it serves: the index, and the error of a request for it, name the difference."""
    predict = fake_predict("1", features=TensorSpec("features", "FP32", ("batch", 4)))
    service = await preprocess_service(repository, predict, executor)

    with pytest.raises(Unavailable, match='"features": expected 4 in dimension 1, the preprocessor produces 3'):
        await service.infer(request(version="1.1"))

    assert {state.state for state in await service.index()} == {UNAVAILABLE}
    assert "no model is ready" in await service.not_ready_reason()


async def test_pairs_of_a_loading_predictor_are_loading(repository: Repository, executor: Executor) -> None:
    """A pair is ready only if its halves are."""
    predict = fake_predict("1")
    predict.states = [ModelState("m", "1", LOADING)]

    service = await preprocess_service(repository, predict, executor)

    assert {state.state for state in await service.index()} == {LOADING}
    with pytest.raises(Unavailable, match="loading"):
        await service.infer(request())


def short(request: InferRequest) -> InferResponse:
    return InferResponse("m", "1", (from_array("scores", np.zeros((1, 2), np.float32)),))


def misnamed(request: InferRequest) -> InferResponse:
    return InferResponse("m", "1", (from_array("other", np.zeros((2, 2), np.float32)),))


def refusing(error: SplitserveError) -> Any:
    def answer(request: InferRequest) -> InferResponse:
        raise error

    return answer


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (short, PairMismatch, 'output "scores": expected FP32 [2, 2], got FP32 [1, 2]'),
        (misnamed, PairMismatch, 'output "scores" is missing'),
        (refusing(InvalidInput("bad", stage="predict")), PairMismatch, "the predictor refused what the preprocessor made: bad"),
        (refusing(NotFound("gone", stage="predict")), Unavailable, "gone"),
        (refusing(Overloaded("full", stage="predict")), Overloaded, "full"),
        (refusing(Unavailable("down", stage="predict")), Unavailable, "down"),
    ],
)
async def test_predicts_failures_are_not_blamed_on_the_caller(
    repository: Repository, executor: Executor, answer: Any, kind: type[SplitserveError], message: str
) -> None:
    """The caller did not make the tensors that predict got; retryable errors stay retryable."""
    service = await preprocess_service(repository, fake_predict("1", answer=answer), executor)

    with pytest.raises(kind) as raised:
        await service.infer(request(version="1.1"))

    assert message in raised.value.message
    assert type(raised.value) is kind
    assert (raised.value.model, raised.value.pair) == ("m", "1.1")


async def test_only_requested_outputs_are_returned_in_order(repository: Repository, executor: Executor) -> None:
    """Unknown outputs and outputs requested twice are invalid input."""
    service = await preprocess_service(repository, fake_predict("1"), executor)

    response = await service.infer(request(outputs=(RequestedOutput("scores"),)))

    assert [tensor.name for tensor in response.outputs] == ["scores"]
    for names in (("nope",), ("scores", "scores")):
        with pytest.raises(InvalidInput):
            await service.infer(request(outputs=tuple(map(RequestedOutput, names))))


async def test_an_unreachable_predict_is_reported_and_reconnected(repository: Repository, executor: Executor) -> None:
    """Not ready while predict is unreachable; requests are still sent, since it may return before the next poll."""
    predict = fake_predict("1")
    service = await preprocess_service(repository, predict, executor)

    async def lost() -> list[ModelState]:
        raise Unavailable("the predict service cannot be reached")

    found, predict.index = predict.index, lost  # type: ignore[method-assign]
    await service.refresh()
    reason = await service.not_ready_reason()
    states = await service.index()
    response = await service.infer(request())
    predict.index = found  # type: ignore[method-assign]
    await service.refresh()

    assert reason == "the predict service cannot be reached"
    assert {(state.state, state.reason) for state in states} == {(UNAVAILABLE, reason)}
    assert response.version == "2.1"
    assert await service.not_ready_reason() == ""


async def test_an_unexpected_exception_names_its_stage_when_fused_too(repository: Repository) -> None:
    """Without a hop between them, errors still name the stage that failed."""

    class Broken(Executor):
        def submit(self, *arguments: Any, **options: Any) -> Future[Any]:
            raise MemoryError("no more")

    preprocess = await preprocess_service(repository, fake_predict("1"), Broken())
    proxy = ProxyService(preprocess)
    await proxy.refresh()

    with pytest.raises(SplitserveError) as raised:
        await proxy.infer(request())

    assert (raised.value.message, raised.value.stage, raised.value.pair) == ("internal error", "preprocess", "2.1")


async def test_the_proxy_checks_a_request_before_it_sends_it() -> None:
    """Bad input is refused at the edge; the next stage never sees it."""
    backend = FakeInference(signature("m", [TensorSpec("features", "FP64", ("batch", 3))], version="1.1"))
    proxy = ProxyService(backend)
    await proxy.refresh()

    with pytest.raises(InvalidInput) as raised:
        await proxy.infer(request(ROWS[:1, :2]))

    assert raised.value.metadata == {"stage": "proxy", "model": "m", "pair": "1.1"}
    assert backend.requests == []


async def test_the_proxy_forwards_narrower_numbers_unchanged() -> None:
    """The preprocessor widens; the proxy forwards bytes."""
    backend = FakeInference(signature("m", [TensorSpec("features", "FP64", ("batch", 3))], version="1.1"))
    proxy = ProxyService(backend)
    await proxy.refresh()

    await proxy.infer(request(ROWS[:1].astype(np.float32)))

    assert backend.requests[0].inputs[0].datatype == "FP32"


async def test_the_proxy_fetches_each_signature_once() -> None:
    """A published version never changes, so the signature of a ready pair is kept until the pair leaves the index."""
    asked: list[str] = []

    class Counting(FakeInference):
        async def metadata(self, model: str, version: str = "") -> Any:
            asked.append(version)
            return await super().metadata(model, version)

    backend = Counting(signature("m", [FEATURES], version="1.1"))
    proxy = ProxyService(backend)

    await proxy.refresh()
    await proxy.refresh()
    backend.states = []
    await proxy.refresh()
    backend.states = [ModelState("m", "1.1", READY)]
    await proxy.refresh()

    assert asked == ["1.1", "1.1"]


async def test_without_models_the_proxy_gives_the_reason_of_preprocess() -> None:
    """The proxy reports preprocess's reason for having no ready model."""
    backend = FakeInference(not_ready="models are still being loaded")
    proxy = ProxyService(backend)

    await proxy.refresh()

    assert await proxy.not_ready_reason() == "models are still being loaded"
    with pytest.raises(Unavailable, match="models are still being loaded"):
        await proxy.infer(request())


async def test_a_tensor_with_a_wrong_length_is_invalid_input(repository: Repository, executor: Executor) -> None:
    """Preprocess checks it too, since it can be called directly."""
    service = await preprocess_service(repository, fake_predict("1"), executor)
    lying = InferRequest("m", (Tensor("features", "FP64", (2, 3), b"\x00" * 47),))

    with pytest.raises(InvalidInput, match=r'input "features": FP64 of shape \[2, 3\] needs 48 bytes, got 47'):
        await service.infer(lying)
