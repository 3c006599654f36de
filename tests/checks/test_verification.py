"""Whether a system answers what the releases of its models have recorded."""

from __future__ import annotations

import json
import shutil
import subprocess
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

from splitserve import publish, publish_predictor, publish_preprocessor, release, rollback, withdraw
from splitserve.arrays import Array, to_array
from splitserve.checks.verify import Outcome, golden_rows, pairs_of, verify
from splitserve.errors import Unavailable
from splitserve.oip.messages import ModelMetadata
from splitserve.publishing import Postprocess
from splitserve.repository.folder import Repository
from splitserve.repository.golden import Golden
from splitserve.repository.manifest import BundleError
from splitserve.repository.releases import ReleaseReader
from splitserve.runtimes import postprocess
from splitserve.versions import Pair
from tests.system.models import softmax_model

IRIS, SPECIES = load_iris(return_X_y=True)
PIPELINE = make_pipeline(StandardScaler(), LogisticRegression()).fit(IRIS, SPECIES)


class FakeServer:
    """Answers every request with these arrays; reports these versions."""

    def __init__(self, answer: Mapping[str, Array], versions: tuple[str, ...] = (), default: str = "") -> None:
        self.answer = answer
        self.default = default
        self.versions = versions
        self.asked: list[tuple[str, str, Mapping[str, Any]]] = []

    def infer(self, model: str, inputs: Mapping[str, Any], *, version: str = "") -> Mapping[str, Array]:
        self.asked.append((model, version, inputs))
        return self.answer

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        return ModelMetadata(model, self.versions, "fake", (), (), {"default": self.default} if self.default else {})


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """``iris`` 1.1, published together; preprocessor 2 of its own, without a release."""
    folder = tmp_path_factory.mktemp("models")
    publish(PIPELINE, IRIS, name="iris", repository=folder)
    publish_preprocessor(MinMaxScaler().fit(IRIS), IRIS[::2], name="iris", repository=folder)
    return Repository(folder)


def golden(repository: Repository, model: str = "iris") -> Golden:
    """That of the current release."""
    current = ReleaseReader(repository).history(model).current()
    assert current is not None
    return golden_rows(repository, current)


def arrays(repository: Repository, model: str = "iris") -> dict[str, Array]:
    """The answer of a correct system."""
    return {tensor.name: to_array(tensor).copy() for tensor in golden(repository, model).outputs}


def verified(repository: Repository, server: FakeServer, model: str = "iris", pair: Pair = Pair(1, 1)) -> Outcome:  # noqa: B008
    [outcome] = verify(repository, server, model, pair)
    return outcome


def test_a_release_has_recorded_all(repository: Repository) -> None:
    """Raw rows and the answers of the whole, which are those of training."""
    rows, found = to_array(golden(repository).inputs[0]), arrays(repository)

    np.testing.assert_allclose(found["probabilities"], PIPELINE.predict_proba(rows), atol=1e-5)
    np.testing.assert_array_equal(found["label"], PIPELINE.predict(rows))


def test_verification_runs_no_model(repository: Repository) -> None:
    """The libraries of neither half are needed."""
    block = (
        "import sys; sys.modules.update(dict.fromkeys(['sklearn', 'skops', 'pandas', 'scipy', 'onnxruntime', 'onnx', 'grpc']))"
    )
    code = (
        f"{block}; from splitserve.checks.verify import golden_rows; from splitserve.repository.folder import Repository; "
        "from splitserve.repository.releases import ReleaseReader; repository = Repository(sys.argv[1]); "
        "print(golden_rows(repository, ReleaseReader(repository).history('iris').current()).inputs[0].n_rows)"
    )

    printed = subprocess.run([sys.executable, "-c", code, repository.root], check=True, capture_output=True, text=True).stdout

    assert int(printed) == golden(repository).inputs[0].n_rows


def test_the_postprocess_step_is_part_of_what_is_recorded(tmp_path: Path) -> None:
    """Labels and probabilities, for halves that were released later too."""
    publish_preprocessor(
        StandardScaler().fit(IRIS),
        IRIS,
        name="m",
        repository=tmp_path,
        labels=["no", "yes"],
        postprocess=Postprocess(scores="scores", activation="none"),
    )
    publish_predictor(softmax_model(4), np.zeros((3, 4), np.float32), name="m", repository=tmp_path)
    release("m", "1.1", repository=tmp_path, accept_unknown_features=True)

    found = arrays(Repository(tmp_path), "m")

    assert found.keys() == {postprocess.PROBABILITIES, postprocess.LABEL}
    assert set(found["label"]) <= {b"no", b"yes"}
    assert verified(Repository(tmp_path), FakeServer(found), "m").problem == ""


def test_a_system_that_answers_as_recorded_passes(repository: Repository) -> None:
    """The rows are those of training, the pair is named in the request."""
    server = FakeServer(arrays(repository))

    outcome = verified(repository, server)

    rows = to_array(golden(repository).inputs[0])
    assert (outcome.problem, outcome.worst, outcome.sequence, outcome.n_rows) == ("", None, 1, len(rows))
    ((model, version, inputs),) = server.asked
    assert (model, version) == ("iris", "1.1")
    np.testing.assert_array_equal(inputs["features"], rows)


@pytest.mark.parametrize(
    ("output", "change", "index"), [("probabilities", 1e-3, (5, 2)), ("probabilities", np.nan, (0, 0)), ("label", 1, (7,))]
)
def test_the_worst_difference_is_shown(repository: Repository, output: str, change: float, index: tuple[int, ...]) -> None:
    """Beyond the release's tolerance for floats, at all for labels: sample, tensor, index, expected, got."""
    answer = arrays(repository)
    answer[output][index] += change

    outcome = verified(repository, FakeServer(answer))

    assert outcome.worst is not None
    assert (outcome.worst.tensor, outcome.worst.sample, outcome.worst.index) == (output, index[0], index)
    assert outcome.problem.startswith(f'output "{output}" of golden sample {index[0]} at {list(index)}: expected ')


def test_an_answer_that_lacks_an_output_differs(repository: Repository) -> None:
    """Or has it in another shape, or of another datatype."""
    answer = arrays(repository)
    del answer["label"]

    assert verified(repository, FakeServer(answer)).problem.endswith("got nothing")


def test_a_system_that_refuses_fails_with_its_message(repository: Repository) -> None:
    """No traceback; the number of rows that were sent is still reported."""

    class Refusing(FakeServer):
        def infer(self, model: str, inputs: Mapping[str, Any], *, version: str = "") -> Mapping[str, Array]:
            raise Unavailable("models are still being loaded")

    outcome = verified(repository, Refusing({}))

    assert outcome.problem == "models are still being loaded"
    assert outcome.n_rows > 0


def test_a_pair_without_a_release_cannot_be_verified(repository: Repository) -> None:
    """Served or not: the way out is named, and nothing is sent."""
    server = FakeServer({}, ("2.1",))

    outcome = verified(repository, server, pair=Pair(2, 1))

    assert outcome.problem == "has no release, so no answer is recorded; splitserve release iris 2.1 records one"
    assert (outcome.sequence, outcome.n_rows, server.asked) == (0, 0, [])


def test_a_damaged_record_is_named(repository: Repository, tmp_path: Path) -> None:
    """Changed golden samples prove nothing."""
    models = Path(shutil.copytree(repository.root, tmp_path / "models"))
    file = models / "iris" / "releases" / "0001-1.1" / "golden.npz"
    file.write_bytes(file.read_bytes()[:-1] + b"x")

    outcome = verified(Repository(models), FakeServer({}))

    assert outcome.problem.startswith("iris/releases/0001-1.1: golden.npz: expected sha256")


def test_an_unreadable_record_fails_without_affecting_others(repository: Repository, tmp_path: Path) -> None:
    """It may withdraw a release that is served."""
    models = Path(shutil.copytree(repository.root, tmp_path / "models"))
    withdraw_nothing = models / "iris" / "releases" / "0002-1.1"
    withdraw_nothing.mkdir()
    (withdraw_nothing / "manifest.json").write_text("{}")

    outcomes = verify(Repository(models), FakeServer(arrays(repository), ("1.1",)), "iris")

    assert [outcome.pair for outcome in outcomes] == ["1.1", ""]
    assert outcomes[0].problem == ""
    assert outcomes[1].problem.startswith("iris/releases/0002-1.1: ")


def test_ready_and_required_pairs_are_verified(repository: Repository, tmp_path: Path) -> None:
    """The pairs of the route and of the current release are asked for although they are not ready, and fail."""
    models = Path(shutil.copytree(repository.root, tmp_path / "models"))

    def pairs(*versions: str) -> list[Pair]:
        source = Repository(models)
        return pairs_of(source, FakeServer({}, versions), "iris", ReleaseReader(source).history("iris"))

    assert pairs("1.1") == [Pair(1, 1)]
    assert pairs("3.1") == [Pair(1, 1), Pair(3, 1)]
    (models / "iris" / "route.json").write_text(json.dumps({"pairs": [{"pair": "2.1"}]}))
    assert pairs("3.1") == [Pair(1, 1), Pair(2, 1), Pair(3, 1)]
    (models / "iris" / "route.json").unlink()
    withdraw("iris", 1, repository=models)
    assert pairs("3.1") == [Pair(3, 1)]
    with pytest.raises(Unavailable, match='model "iris" has no release, and no pair that is ready'):
        pairs()


def test_a_system_that_does_not_follow_a_rollback_fails(repository: Repository, tmp_path: Path) -> None:
    """Every pair answers as recorded, and requests that name no version still get the pair that was rolled back."""
    copy = Repository(shutil.copytree(repository.root, tmp_path, dirs_exist_ok=True))
    release("iris", "2.1", repository=tmp_path, accept_changed_features=True)
    rollback("iris", repository=tmp_path)
    follows, does_not = (FakeServer(arrays(repository), ("1.1",), default=default) for default in ("1.1", "2.1"))

    assert [outcome.problem for outcome in verify(copy, follows, "iris")] == [""]
    [agrees, other] = verify(copy, does_not, "iris")
    assert not agrees.problem
    assert "requests that name no version get 2.1, expected 1.1, as release 3 or the route says" in other.problem


def test_a_broken_route_is_an_error(repository: Repository, tmp_path: Path) -> None:
    models = Path(shutil.copytree(repository.root, tmp_path / "models"))
    (models / "iris" / "route.json").write_text("[]")

    with pytest.raises(BundleError, match=r"iris: route.json"):
        verify(Repository(models), FakeServer({}), "iris")
