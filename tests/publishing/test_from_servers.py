"""A preprocessor is proven against the running third-party predict server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from splitserve import publish_preprocessor
from splitserve.api.inference import inference_pb2 as pb
from splitserve.arrays import to_array
from splitserve.checks.examination import examine
from splitserve.checks.matrix import HERE, judge
from splitserve.remote import running_model
from splitserve.remote.inference import RemoteInference
from splitserve.remote.running_model import RunningModel
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import GOLDEN_FILE
from splitserve.repository.release import Release
from splitserve.repository.releases import ReleaseReader
from splitserve.runtimes.release import golden_of
from splitserve.signature import TensorSpec
from tests.command_line import run_command
from tests.remote.test_any_server import bare_server

ROWS = np.random.default_rng(0).normal(size=(20, 3))
WEIGHTS = np.array([[1, 0], [0, 1], [1, 1]], np.float32)


def scores(request: pb.ModelInferRequest, features: Any) -> pb.ModelInferResponse:
    found = (features @ WEIGHTS).astype(np.float32)
    tensor = pb.ModelInferResponse.InferOutputTensor(name="scores", datatype="FP32", shape=list(found.shape))
    return pb.ModelInferResponse(model_name="m", outputs=[tensor], raw_output_contents=[found.tobytes()])


def features_of(request: pb.ModelInferRequest) -> Any:
    return np.frombuffer(request.raw_input_contents[0], np.float32).reshape(-1, 3)


def row_wise(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    return scores(request, features_of(request))


def centred(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    """Answers depend on the other rows of the call."""
    features = features_of(request)
    return scores(request, features - features.mean(axis=0))


def wide(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    """Another output than it says."""
    response = row_wise(request)
    response.outputs[0].name = "other"
    return response


@pytest.fixture
def models(tmp_path: Path) -> Path:
    publish_preprocessor(StandardScaler().fit(ROWS), ROWS, name="m", repository=tmp_path)
    return tmp_path


async def run(models: Path, address: str, *options: str, pair: str = "1.0") -> Any:
    command = ["release", "m", pair, "--predict", address, "--repository", str(models), *options]
    return await asyncio.to_thread(run_command, *command)


def current(models: Path) -> Release | None:
    return ReleaseReader(Repository(models)).history("m").current()


async def test_it_is_released_with_the_signature_of_the_server(models: Path) -> None:
    """And with golden rows and the answers of the whole; nothing is known of what the model was trained on."""
    async with bare_server(row_wise) as address:
        shown = await run(models, address)
        refused = await run(models, address, "--yes")
        result = await run(models, address, "--yes", "--accept-unknown-features")

    release = current(models)
    assert "nothing was recorded" in shown.output
    assert (refused.exit_code, "--accept-unknown-features" in refused.output) == (1, True)
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "released m 1.0 as release 1")
    assert release is not None
    assert (release.manifest.proven, release.manifest.predictor, str(release.pair)) == ("server", "", "1.0")
    assert release.manifest.accepted == ("unknown features",)
    assert release.manifest.server_inputs == (TensorSpec("features", "FP32", release.manifest.server_inputs[0].shape),)
    assert [spec.wire_shape for spec in release.manifest.server_outputs] == [(-1, 2)]
    golden = golden_of(release.manifest, Repository(models).open_release(release.key).read(GOLDEN_FILE))
    expected = StandardScaler().fit(ROWS).transform(to_array(golden.inputs[0])) @ WEIGHTS
    np.testing.assert_allclose(to_array(golden.outputs[0]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (centred, "an answer depends on the other rows of its call"),
        (wide, 'output "scores" is missing'),
    ],
)
async def test_a_server_that_answers_otherwise_is_refused(models: Path, answer: Any, message: str) -> None:
    async with bare_server(answer) as address:
        result = await run(models, address, "--yes", "--accept-unknown-features")

    assert result.exit_code == 1
    assert message in result.output
    assert current(models) is None


async def test_a_server_whose_model_takes_other_features_is_refused(models: Path) -> None:
    async with bare_server(row_wise, n_features=9) as address:
        result = await run(models, address, "--yes", "--accept-unknown-features")

    assert result.exit_code == 1
    assert 'the halves do not fit: "features": expected 9 in dimension 1, the preprocessor produces 3' in result.output


async def test_a_server_that_describes_nothing_is_refused(models: Path) -> None:
    async with bare_server(row_wise, is_described=False) as address:
        result = await run(models, address, "--yes", "--accept-unknown-features")

    assert result.exit_code == 1
    assert "does not say what its model's inputs and outputs are" in result.output


async def test_a_version_that_the_server_does_not_have_is_said(models: Path) -> None:
    async with bare_server(row_wise) as address:
        result = await run(models, address, pair="1.4")

    assert (result.exit_code, result.output) == (1, f"{address}: no version 4\n")


async def test_a_server_that_is_not_there_is_said(models: Path) -> None:
    result = await run(models, "127.0.0.1:1")

    assert result.exit_code == 1
    assert result.output.startswith("127.0.0.1:1: ")
    assert len(result.output.splitlines()) == 1


async def test_the_matrix_tries_the_half_that_is_in_the_repository(models: Path) -> None:
    """The other is asked by verification only."""
    async with bare_server(row_wise) as address:
        await run(models, address, "--yes", "--accept-unknown-features")
    source = Repository(models)

    matrix = judge(source, {HERE: examine(source)})

    (release,) = matrix.releases
    assert (release.pair, release.serves, release.verdicts[HERE].is_admitted) == ("1.0", "by default", True)
    assert "a third-party server" in release.verdicts[HERE].warnings[0]
    assert matrix.problems == ()


async def test_many_rows_are_sent_in_requests_that_any_server_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from splitserve.arrays import from_array

    sizes: list[int] = []

    def counted(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        sizes.append(request.inputs[0].shape[0])
        return row_wise(request)

    monkeypatch.setattr(running_model, "MAX_REQUEST_BYTES", 100)
    rows = ROWS.astype(np.float32)

    def infer(address: str) -> Any:
        with RunningModel(RemoteInference(address, stage="predict"), "m") as model:
            return to_array(model.infer([from_array("features", rows)])[0])

    async with bare_server(counted) as address:
        found = await asyncio.to_thread(infer, address)

    np.testing.assert_allclose(found, rows @ WEIGHTS, atol=1e-6)
    assert sizes == [7, 7, 6]
