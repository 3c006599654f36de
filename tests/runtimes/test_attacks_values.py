"""Values that could break the arithmetic: at both stages, in the runtimes that serve."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from predict_service.service import PredictService
from preprocess_service.service import PreprocessService
from proxy.service import ProxyService
from splitserve import publish, publish_predictor, publish_preprocessor
from splitserve.arrays import from_array, to_array
from splitserve.errors import DeadlineExceeded, InvalidInput
from splitserve.oip.messages import InferRequest, InferResponse, deadline_after
from splitserve.repository.folder import Repository
from splitserve.runtimes import predictor as predictors
from splitserve.runtimes import preprocessor as preprocessors
from splitserve.runtimes.predictor import Predictor
from splitserve.server.compute import Compute
from splitserve.server.store import VersionStore
from tests.system.models import affine_model, slow_model

pytestmark = pytest.mark.heavy  # they publish

N = 3
LONG_S = 60


@pytest.fixture
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


async def served(root: Path, executor: Executor) -> ProxyService:
    """All three stages as objects, over what was published."""
    repository = Repository(root)
    predicts = VersionStore(repository, "predict", predictors.load, allow_unreleased_pairs=True)
    preprocesses = VersionStore(repository, "preprocess", preprocessors.load, allow_unreleased_pairs=True)
    await predicts.refresh()
    await preprocesses.refresh()
    preprocess = PreprocessService(preprocesses, PredictService(predicts, executor), executor, allow_unreleased_pairs=True)
    await preprocess.refresh()
    proxy = ProxyService(preprocess)
    await proxy.refresh()
    return proxy


def request(values: Any, model: str = "m", timeout_s: float = LONG_S, dtype: Any = np.float64) -> InferRequest:
    return InferRequest(model, (from_array("features", np.asarray(values, dtype)),), deadline=deadline_after(timeout_s))


class Owner:
    """Of work."""


SCALED = np.array([[1.0, 2.0, 5.0], [3.0, 4.0, 5.0]])
TRANSFORMS = {
    "scaler with a column that never varies": lambda: StandardScaler().fit(SCALED),
    "logarithm": lambda: FunctionTransformer(np.log).fit(SCALED),
    "root": lambda: FunctionTransformer(np.sqrt).fit(SCALED),
}
VALUES = [np.nan, np.inf, -np.inf, 5e-324, 1e308, -1e308, -1.0, 0.0, -0.0]


@pytest.mark.parametrize("transform", TRANSFORMS)
async def test_every_number_is_answered_or_refused_with_a_reason(transform: str, tmp_path: Path, executor: Executor) -> None:
    """D07: an answer or a 400, never a 500, and no line of numpy's for each request. What is not a number stays none."""
    publish_preprocessor(TRANSFORMS[transform](), SCALED, name="m", repository=tmp_path)
    publish_predictor(affine_model(N, 1, 0), SCALED.astype(np.float32), name="m", repository=tmp_path)
    proxy = await served(tmp_path, executor)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in VALUES:
            (answer,) = await asyncio.gather(proxy.infer(request([[value] * N])), return_exceptions=True)
            assert isinstance(answer, InferResponse | InvalidInput)
            if isinstance(answer, InferResponse) and np.isfinite(value):
                assert answer.outputs[0].shape == (1, N)


async def test_a_request_larger_than_a_merged_call_is_one_call(tmp_path: Path, executor: Executor) -> None:
    """D11: ``max_batch_size`` bounds what is merged; a larger request below the limit of rows is sent alone."""
    publish_preprocessor(StandardScaler().fit(SCALED), SCALED, name="m", repository=tmp_path)
    publish_predictor(affine_model(N, 1, 0), SCALED.astype(np.float32), name="m", repository=tmp_path)
    proxy = await served(tmp_path, executor)

    many = await proxy.infer(request(np.ones((1000, N))))

    assert many.outputs[0].shape == (1000, N)


async def test_inputs_with_different_numbers_of_rows_are_malformed(tmp_path: Path, executor: Executor) -> None:
    """D11: whichever of the columns is longer."""
    table = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    publish_preprocessor(make_column_transformer((StandardScaler(), ["a", "b"])).fit(table), table, name="m", repository=tmp_path)
    publish_predictor(affine_model(2, 1, 0), np.ones((2, 2), np.float32), name="m", repository=tmp_path)
    proxy = await served(tmp_path, executor)

    for rows in ((2, 3), (3, 2), (0, 1)):
        inputs = tuple(from_array(name, np.zeros((n, 1))) for name, n in zip("ab", rows, strict=True))
        with pytest.raises(InvalidInput):
            await proxy.infer(InferRequest("m", inputs, deadline=deadline_after(LONG_S)))


async def test_a_poisoned_row_fails_its_own_request_only(tmp_path: Path, executor: Executor) -> None:
    """D15, P-17: one that the transforms refuse among 15 that came with it: 15 right answers, one 400."""
    rows = np.random.default_rng(0).normal(size=(50, N))
    publish(make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, rows[:, 0] > 0), rows, name="m", repository=tmp_path)
    proxy = await served(tmp_path, executor)
    expected = [to_array((await proxy.infer(request([[n] * N]))).outputs[0]).tolist() for n in range(16)]

    values = [[[float(n) if n != 7 else np.nan] * N] for n in range(16)]
    answers = await asyncio.gather(*(proxy.infer(request(each)) for each in values), return_exceptions=True)

    assert isinstance(answers[7], InvalidInput)
    good = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert [to_array(answer.outputs[0]).tolist() for answer in good] == expected[:7] + expected[8:]


async def test_a_run_without_waiting_callers_is_cancelled(tmp_path: Path, executor: Executor) -> None:
    """G05: a model that runs for minutes is stopped at its caller's deadline, and its thread serves others."""
    zeros = np.zeros((1, N), np.float32)
    publish_predictor(slow_model(N, n_rounds=10_000_000), zeros, name="slow", repository=tmp_path)
    store = VersionStore(Repository(tmp_path), "predict", predictors.load, allow_unreleased_pairs=True)
    await store.refresh()
    service = PredictService(store, executor)

    for _ in range(3):  # more than there are threads
        with pytest.raises(DeadlineExceeded):
            await service.infer(request(np.ones((1, N)), "slow", timeout_s=0.2, dtype=np.float32))

    async with asyncio.timeout(LONG_S):
        answer = await service.infer(request(zeros, "slow", dtype=np.float32))
    assert to_array(answer.outputs[0]).tolist() == zeros.tolist()


async def test_a_slow_transform_delays_no_other_answer(executor: Executor) -> None:
    """D13: a transform that does not end cannot be stopped and keeps its thread; its caller does not wait beyond the deadline."""
    released = threading.Event()
    compute = Compute(executor)
    stuck = asyncio.create_task(compute.run(Owner(), 1, released.wait))
    await asyncio.sleep(0)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await asyncio.shield(stuck)
    assert await compute.run(Owner(), 1, lambda: "served") == "served"

    released.set()
    assert await stuck


def test_the_number_of_threads_is_as_configured() -> None:
    """G09: a run uses one thread by default."""
    model = Predictor(affine_model(N, 1, 0))

    options = model._session.get_session_options()

    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
