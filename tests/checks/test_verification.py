"""What a pair must answer to its golden rows, and whether a system does."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from splitserve import publish, publish_predictor, publish_preprocessor
from splitserve.arrays import Array, to_array
from splitserve.checks.verify import Promise, pairs_of, promise, verify
from splitserve.errors import Unavailable
from splitserve.oip.messages import ModelMetadata
from splitserve.publishing import Postprocess
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import BundleError
from splitserve.runtimes import postprocess
from splitserve.versions import Pair
from tests.system.models import softmax_model

IRIS, SPECIES = load_iris(return_X_y=True)
PIPELINE = make_pipeline(StandardScaler(), LogisticRegression()).fit(IRIS, SPECIES)


class FakeServer:
    """Answers every request with these arrays; is said to have these versions."""

    def __init__(self, answer: Mapping[str, Array], versions: tuple[str, ...] = ()) -> None:
        self.answer = answer
        self.versions = versions
        self.asked: list[tuple[str, str, Mapping[str, Any]]] = []

    def infer(self, model: str, inputs: Mapping[str, Any], *, version: str = "") -> Mapping[str, Array]:
        self.asked.append((model, version, inputs))
        return self.answer

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        return ModelMetadata(model, self.versions, "fake", (), ())


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """``iris`` 1.1, published together; preprocessor 2 of its own."""
    folder = tmp_path_factory.mktemp("models")
    publish(PIPELINE, IRIS, name="iris", repository=folder)
    publish_preprocessor(MinMaxScaler().fit(IRIS), IRIS[::2], name="iris", repository=folder)
    return Repository(folder)


def arrays(promised: Promise) -> dict[str, Array]:
    """What a system that keeps the promise answers."""
    return {tensor.name: to_array(tensor).copy() for tensor in promised.outputs}


def take_away_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ONNX Runtime were not installed."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "splitserve.runtimes.predictor")
    monkeypatch.delattr("splitserve.runtimes.predictor")


def test_halves_that_were_published_together_have_recorded_all(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has to be run: neither library is needed."""
    take_away_the_runtime(monkeypatch)

    promised = promise(repository, "iris", Pair(1, 1))

    rows = to_array(promised.inputs[0])
    found = arrays(promised)
    assert promised.is_recorded
    np.testing.assert_allclose(found["probabilities"], PIPELINE.predict_proba(rows), atol=1e-5)
    np.testing.assert_array_equal(found["label"], PIPELINE.predict(rows))
    assert promised.tolerances["probabilities"].atol > 0


def test_a_pair_that_came_together_later_is_run_here(repository: Repository) -> None:
    """The predictor on the features that the preprocessor is known to make."""
    promised = promise(repository, "iris", Pair(2, 1))

    features = MinMaxScaler().fit(IRIS).transform(to_array(promised.inputs[0]))
    assert not promised.is_recorded
    np.testing.assert_allclose(arrays(promised)["probabilities"], PIPELINE[-1].predict_proba(features), atol=1e-5)


def test_what_has_to_be_run_here_needs_the_runtime(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said in a line, with the package."""
    take_away_the_runtime(monkeypatch)

    with pytest.raises(BundleError, match="iris/predict/1 was not published together .* needs onnxruntime: pip install"):
        promise(repository, "iris", Pair(2, 1))


def test_the_postprocess_step_is_part_of_the_promise(tmp_path: Path) -> None:
    """Labels and probabilities, the latter as exact as the scores."""
    publish_preprocessor(
        StandardScaler().fit(IRIS),
        IRIS,
        name="m",
        repository=tmp_path,
        labels=["no", "yes"],
        postprocess=Postprocess(scores="scores", activation="none"),
    )
    predictor = publish_predictor(softmax_model(4), np.zeros((3, 4), np.float32), name="m", repository=tmp_path)

    promised = promise(Repository(tmp_path), "m", Pair(1, 1))

    found = arrays(promised)
    assert found.keys() == {postprocess.PROBABILITIES, postprocess.LABEL}
    assert set(found["label"]) == {b"no", b"yes"}
    assert promised.tolerances == {"probabilities": predictor.manifest.tolerances["scores"]}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair(9, 1), "iris/preprocess/9: manifest.json cannot be read"),
        (Pair(1, 9), "iris/predict/9: manifest.json cannot be read"),
    ],
)
def test_there_is_no_promise_without_both_halves(repository: Repository, pair: Pair, message: str) -> None:
    """The one that is not there is named."""
    with pytest.raises(BundleError, match=message):
        promise(repository, "iris", pair)


def test_halves_that_do_not_fit_promise_nothing(repository: Repository, tmp_path: Path) -> None:
    """The reason is the one that a service gives."""
    publish_preprocessor(StandardScaler().fit(IRIS), IRIS, name="m", repository=tmp_path)
    publish_predictor(softmax_model(9), np.zeros((3, 9), np.float32), name="m", repository=tmp_path)

    with pytest.raises(BundleError, match="the halves do not fit: .* expected 9 in dimension 1, the preprocessor produces 4"):
        promise(Repository(tmp_path), "m", Pair(1, 1))


def test_a_system_that_answers_as_promised_passes(repository: Repository) -> None:
    """The rows are those of training, the pair is named in the request."""
    promised = promise(repository, "iris", Pair(1, 1))
    server = FakeServer(arrays(promised))

    outcome = verify(repository, server, "iris", Pair(1, 1))

    assert (outcome.problem, outcome.worst) == ("", None)
    ((model, version, inputs),) = server.asked
    assert (model, version) == ("iris", "1.1")
    np.testing.assert_array_equal(inputs["features"], to_array(promised.inputs[0]))


@pytest.mark.parametrize(
    ("output", "change", "index"), [("probabilities", 1e-3, (5, 2)), ("probabilities", np.nan, (0, 0)), ("label", 1, (7,))]
)
def test_the_worst_difference_is_shown(repository: Repository, output: str, change: float, index: tuple[int, ...]) -> None:
    """Beyond the manifest's tolerance for floats, at all for labels: sample, tensor, index, expected, got."""
    answer = arrays(promise(repository, "iris", Pair(1, 1)))
    answer[output][index] += change

    outcome = verify(repository, FakeServer(answer), "iris", Pair(1, 1))

    assert outcome.worst is not None
    assert (outcome.worst.tensor, outcome.worst.sample, outcome.worst.index) == (output, index[0], index)
    assert outcome.problem.startswith(f'output "{output}" of golden sample {index[0]} at {list(index)}: expected ')


def test_an_answer_that_lacks_an_output_differs(repository: Repository) -> None:
    """Or has it in another shape, or of another datatype."""
    answer = arrays(promise(repository, "iris", Pair(1, 1)))
    del answer["label"]

    outcome = verify(repository, FakeServer(answer), "iris", Pair(1, 1))

    assert outcome.problem.endswith("got nothing")


def test_a_system_that_refuses_fails_with_its_words(repository: Repository) -> None:
    """No traceback; the promise is known all the same."""

    class Refusing(FakeServer):
        def infer(self, model: str, inputs: Mapping[str, Any], *, version: str = "") -> Mapping[str, Array]:
            raise Unavailable("models are still being loaded")

    outcome = verify(repository, Refusing({}), "iris", Pair(1, 1))

    assert outcome.problem == "models are still being loaded"
    assert outcome.promise is not None


def test_what_is_ready_and_what_is_routed_is_verified(repository: Repository, tmp_path: Path) -> None:
    """A routed pair that is not ready is asked for too, and fails."""
    folder = tmp_path / "models"
    (folder / "iris").mkdir(parents=True)
    (folder / "iris" / "preprocess").symlink_to(repository.root / "iris" / "preprocess")
    (folder / "iris" / "route.json").write_text('{"pairs": [{"pair": "2.1"}]}')

    assert pairs_of(repository, FakeServer({}, ("1.1",)), "iris") == [Pair(1, 1)]
    assert pairs_of(Repository(folder), FakeServer({}, ("3.1",)), "iris") == [Pair(2, 1), Pair(3, 1)]
    with pytest.raises(Unavailable, match='model "iris" has no pair that is ready'):
        pairs_of(repository, FakeServer({}), "iris")
