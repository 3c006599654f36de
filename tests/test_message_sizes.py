"""Answers and features that no message can hold are refused before they are computed, by the stage whose limit they exceed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from sklearn.preprocessing import OneHotEncoder

from predict_service.service import PredictService
from preprocess_service.service import PreprocessService
from proxy.service import ProxyService
from splitserve import AsyncClient, publish_predictor, publish_preprocessor
from splitserve.arrays import from_array
from splitserve.errors import InvalidInput, TooLarge
from splitserve.oip.limits import MAX_MESSAGE_BYTES
from splitserve.oip.messages import InferRequest, InferResponse, RequestedOutput
from splitserve.remote.inference import RemoteInference
from splitserve.repository.folder import Repository
from splitserve.runtimes import predictor as predictors
from splitserve.runtimes import preprocessor as preprocessors
from splitserve.server.store import VersionStore
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor
from splitserve.testing import FakeInference, serving, signature

MIB = 1024 * 1024

N_OUTPUTS = 200_000
N_CATEGORIES = 1000

X = TensorSpec("x", "FP32", ("batch", 1))
WIDE = TensorSpec("y", "FP32", ("batch", N_OUTPUTS))
ONE = TensorSpec("z", "FP32", ("batch", 1))


@pytest.fixture
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def rows(count: int, name: str = "x", dtype: type = np.float32) -> Tensor:
    return from_array(name, np.zeros((count, 1), dtype))


def wide_model() -> bytes:
    """x (batch, 1) becomes y (batch, 200,000) and z (batch, 1)."""
    graph = helper.make_graph(
        [helper.make_node("Expand", ["x", "shape"], ["y"]), helper.make_node("Identity", ["x"], ["z"])],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", N_OUTPUTS]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 1]),
        ],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [1, N_OUTPUTS])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


@pytest.fixture
async def predict(tmp_path: Path, executor: Executor) -> PredictService:
    publish_predictor(wide_model(), np.zeros((2, 1), np.float32), name="m", repository=tmp_path)
    store = VersionStore(Repository(tmp_path), "predict", predictors.load, allow_unreleased_pairs=True)
    await store.refresh()
    return PredictService(store, executor)


@pytest.fixture
async def preprocess(tmp_path: Path, executor: Executor) -> PreprocessService:
    """One-hot encodes a column of integers: 8 bytes become 4,000."""
    encoder = OneHotEncoder(sparse_output=False).fit(np.arange(N_CATEGORIES).reshape(-1, 1))
    publish_preprocessor(encoder, np.arange(N_CATEGORIES).reshape(-1, 1), name="m", repository=tmp_path)
    store = VersionStore(Repository(tmp_path), "preprocess", preprocessors.load, allow_unreleased_pairs=True)
    features = TensorSpec("features", "FP32", ("batch", N_CATEGORIES))
    service = PreprocessService(store, FakeInference(signature("m", [features], [ONE])), executor, allow_unreleased_pairs=True)
    await store.refresh()
    await service.refresh()
    return service


@pytest.fixture
def peak_growth() -> Callable[[], int]:
    """Peak growth of this process since the test began, in bytes, native allocations included."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of this process's memory cannot be reset here")
    before = memory("VmRSS")
    return lambda: memory("VmHWM") - before


def memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status does not have {field}")


async def test_predict_refuses_an_answer_larger_than_a_message(predict: PredictService, peak_growth: Callable[[], int]) -> None:
    """1,000 rows of 200,000 outputs are 800 MB: refused before the model runs, and nothing of that size is allocated."""
    with pytest.raises(
        TooLarge, match=r"at least 800004000 bytes for 1000 rows, the limit is 67108864 \(PREDICT_MAX_MES"
    ) as raised:
        await predict.infer(InferRequest("m", (rows(1000),)))

    assert raised.value.stage == "predict"
    assert peak_growth() < 32 * MIB


async def test_answers_within_the_message_limit_are_sent(predict: PredictService) -> None:
    """As many rows as the limit holds; of the outputs those count that are requested."""
    at_limit = MAX_MESSAGE_BYTES // (4 * N_OUTPUTS + 4)

    answer = await predict.infer(InferRequest("m", (rows(at_limit),)))
    narrow = await predict.infer(InferRequest("m", (rows(1000),), outputs=(RequestedOutput("z"),)))

    assert answer.outputs[0].shape == (at_limit, N_OUTPUTS)
    assert narrow.outputs[0].shape == (1000, 1)
    with pytest.raises(TooLarge):
        await predict.infer(InferRequest("m", (rows(at_limit + 1),)))


async def test_requests_with_large_answers_are_not_merged_beyond_the_limit_of_a_batch(predict: PredictService) -> None:
    """Merged, ten answers would be ten times as large."""
    await asyncio.gather(*[predict.infer(InferRequest("m", (rows(2),))) for _ in range(10)])

    (entry,) = predict.statistics.report(await predict.index())
    assert {each.batch_size for each in entry.batch_stats} == {2}


@pytest.mark.heavy
async def test_preprocess_refuses_features_larger_than_a_message(
    preprocess: PreprocessService, peak_growth: Callable[[], int]
) -> None:
    """A one-hot request of 2.3 MB would become 1.1 GB: refused before the transforms run."""
    request = InferRequest("m", (rows(290_000, "features", np.int64),))

    with pytest.raises(TooLarge, match=r"the features .* 1160000000 bytes .* \(PREPROCESS_MAX_MESSAGE_BYTES\)") as raised:
        await preprocess.infer(request)

    assert raised.value.stage == "preprocess"
    assert peak_growth() < 32 * MIB


@pytest.mark.heavy
async def test_a_malformed_request_is_invalid_whatever_size_it_claims(preprocess: PreprocessService) -> None:
    """A claimed number of rows without their bytes is malformed, not large."""
    with pytest.raises(InvalidInput, match="needs 8000000 bytes, got 8"):
        await preprocess.infer(InferRequest("m", (Tensor("features", "INT64", (1_000_000, 1), bytes(8)),)))


async def test_the_proxy_refuses_an_answer_larger_than_a_message() -> None:
    """Nothing is sent to preprocess."""
    backend = FakeInference(signature("m", [X], [WIDE], version="1.1"))
    proxy = ProxyService(backend)
    await proxy.refresh()

    with pytest.raises(TooLarge, match="PROXY_MAX_MESSAGE_BYTES") as raised:
        await proxy.infer(InferRequest("m", (rows(1000),)))

    assert (raised.value.stage, raised.value.http_status, backend.requests) == ("proxy", 413, [])


TEXT = TensorSpec("x", "BYTES", ("batch", 1))


def long_for_two_rows(request: InferRequest) -> InferResponse:
    """A text of 2,000 bytes for each of two rows, of one byte otherwise."""
    n_rows = request.inputs[0].n_rows
    return InferResponse("m", "1", (texts(n_rows, b"x" * (2000 if n_rows == 2 else 1)),), request.id)


def texts(count: int, text: bytes = b"") -> Tensor:
    return from_array("x", np.full((count, 1), text, np.object_))


async def test_an_answer_of_unpredictable_size_is_too_large_and_not_unavailable() -> None:
    """Text, on a stream: the error is not retryable, and other requests on the stream are answered."""
    service = FakeInference(signature("m", [TEXT]), answer=long_for_two_rows)
    async with serving(service, max_message_bytes=2000) as address, RemoteInference(address, stage="predict") as remote:
        while not remote.n_streams:
            await remote.is_ready("m")

        small = await remote.infer(InferRequest("m", (texts(1),)))
        with pytest.raises(TooLarge, match=r"the answer has \d+ bytes, the limit is 2000"):
            await remote.infer(InferRequest("m", (texts(2),)))
        again = await remote.infer(InferRequest("m", (texts(1),)))

    assert small == again
    assert len(service.requests) == 3


async def test_an_answer_of_unpredictable_size_is_too_large_over_a_unary_call_too() -> None:
    """The status has the reason, which distinguishes it from a full queue."""
    service = FakeInference(signature("m", [TEXT]), answer=long_for_two_rows)
    async with serving(service, max_message_bytes=2000) as address, AsyncClient(address) as client:
        with pytest.raises(TooLarge, match=r"the answer has \d+ bytes, the limit is 2000"):
            await client.infer("m", {"x": [[""], [""]]})

    assert len(service.requests) == 1
