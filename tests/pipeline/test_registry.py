"""Records, releases and aliases at MLflow's own tracking server, with artifacts that it proxies and in S3."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from splitserve import Client, publish
from splitserve.cli import app
from splitserve.errors import SplitserveError
from splitserve.pipeline.commands import main
from splitserve.pipeline.context import Call, Context, RecordError, StepFailed
from splitserve.pipeline.index import Index
from splitserve.pipeline.registry import register_release
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import NotFetched
from splitserve.repository.source import fetch_bundle
from splitserve.repository.sources import source_of
from tests.folders import MadeOnce
from tests.object_store import ObjectStore, object_store
from tests.pipeline import tiny
from tests.pipeline.tiny import ran, run
from tests.pipeline.tracking_server import tracking_server
from tests.system.processes import System, wait_until

pytestmark = [
    pytest.mark.training,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.xdist_group("pipeline-registry"),
]

RANDOM = np.random.default_rng(0)
X = pd.DataFrame({"size": RANDOM.normal(size=60), "count": RANDOM.integers(0, 5, 60), "colour": RANDOM.choice(["a", "b"], 60)})
Y = (X["size"] > 0).astype(int)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tracking_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


@pytest.fixture(scope="module")
def bucket() -> Iterator[ObjectStore]:
    with object_store() as store:
        store.client.create_bucket(Bucket="mlflow")
        yield store


@pytest.fixture(autouse=True)
def _environment(server: str, bucket: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MLflow's own variables, and nothing else, name the servers."""
    variables = {
        **{name: value for name, value in bucket.environment.items() if name != "AWS_ENDPOINT_URL"},
        "MLFLOW_S3_ENDPOINT_URL": bucket.environment["AWS_ENDPOINT_URL"],
        "MLFLOW_TRACKING_URI": server,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MODEL_CACHE": str(tmp_path / "cache"),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)


@pytest.fixture(params=["proxied", "s3"])
def client(request: pytest.FixtureRequest, server: str) -> Iterator[Any]:
    """MLflow's client. The experiment of the pipeline keeps its artifacts where the parameter says; renamed at the end."""
    from mlflow.tracking import MlflowClient

    found = MlflowClient(server, server)
    location = "s3://mlflow/artifacts" if request.param == "s3" else None
    experiment = found.create_experiment("tiny", artifact_location=location)
    yield found
    found.rename_experiment(experiment, f"was tiny {experiment}")


def test_a_run_is_recorded_at_a_server_and_reused_from_there(
    client: Any, bucket: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Statuses, metrics and outputs; another machine downloads what has finished, and runs again what differs there."""
    first, second = tiny.write(tmp_path / "first"), tiny.write(tmp_path / "second")

    assert ran(run(first)) == ["data", "train", "evaluate"]
    assert {line.partition(":")[0] for line in capsys.readouterr().out.splitlines()} == {"data", "train", "evaluate"}
    runs = {each.info.run_name: each for each in client.search_runs([client.get_experiment_by_name("tiny").experiment_id])}
    assert {each.info.status for each in runs.values()} == {"FINISHED"}
    assert runs["train"].data.metrics["loss"] == 0.25
    uri = runs["train"].info.artifact_uri
    is_in_bucket = uri.startswith("s3://")
    assert is_in_bucket or uri.startswith("mlflow-artifacts:/")
    listed = bucket.client.list_objects_v2(Bucket="mlflow", Prefix=f"artifacts/{runs['train'].info.run_id}/")
    assert [each["Key"].rpartition("/artifacts/")[2] for each in listed.get("Contents", ())] == [
        "outputs/model.txt", "step.json"
    ] * is_in_bucket  # fmt: skip

    assert run(second) is None
    model = Path(Index(second.parent / "store", "tiny").last("train").folder) / "model.txt"
    assert model.is_relative_to(second.parent)
    (second / "deeper.py").write_text("SUFFIX = '?'\n")
    assert ran(run(second)) == ["train", "evaluate"]


def _build(folder: Path) -> None:
    columns = X[["size", "count"]]
    publish(make_pipeline(StandardScaler(), LogisticRegression()).fit(columns, Y), columns, name="wine", repository=folder)


@pytest.fixture
def models(made_once: MadeOnce, tmp_path: Path) -> Path:
    """A repository with a release of `wine`, as the register step gets it: a copy."""
    shutil.copytree(made_once(_build), tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def name(client: Any) -> Iterator[str]:
    """The name of a registered model, which is deleted at the end."""
    yield "wine"
    client.delete_registered_model("wine")


def register(models: Path, folder: Path, value: float) -> dict[str, Any]:
    """Register the release as the register step does; what the step writes."""
    from splitserve.pipeline.record import Record

    folder.mkdir(exist_ok=True)
    context = Context(
        Call("register", "m", "f", parameters={}, files={}, locked=[], inputs="", outputs=str(folder), scratch="", error="")
    )
    context.record = Record(folder, "tiny")
    context.run_id = context.record.start("register", {})
    register_release(context, models, model="wine", metric="accuracy", value=value)
    result: dict[str, Any] = json.loads((folder / "registered.json").read_text())
    return result


def test_a_registered_release_is_loaded_by_its_alias(client: Any, name: str, models: Path, tmp_path: Path) -> None:
    """The same bytes; the alias moves by its rule and takes the source with it; MLflow has the signature."""
    assert register(models, tmp_path / "1", 0.9)["is_champion"]
    source = source_of("mlflow:wine@champion")

    assert [str(key) for key in source.bundles()] == ["wine/predict/1", "wine/preprocess/1"]
    bundle = fetch_bundle(source, BundleKey("wine", "predict", 1))
    built = Repository(models).open(BundleKey("wine", "predict", 1))
    assert bundle.manifest_sha256 == built.manifest_sha256
    assert bundle.read("model.onnx") == built.read("model.onnx")

    assert not [tag for tag in client.get_model_version("wine", "1").tags if "image" in tag]

    assert not register(models, tmp_path / "2", 0.8)["is_champion"]
    assert [key.version for key in source.bundles() if key.kind == "predict"] == [1]
    assert register(models, tmp_path / "3", 0.95)["is_champion"]
    assert [key.version for key in source.bundles() if key.kind == "predict"] == [1, 3]
    assert str(source.route("wine").named()[0]) == "3.3"
    source.close()

    from mlflow.models import get_model_info

    signature = get_model_info("models:/wine@champion").signature
    assert [(spec.name, str(spec.type), spec.shape) for spec in signature.inputs] == [
        ("size", "float64", (-1, 1)),
        ("count", "float64", (-1, 1)),
    ]
    assert [spec.name for spec in signature.outputs] == ["label", "probabilities"]

    again = CliRunner().invoke(app, ["publish", "--mlflow", "models:/wine@champion", "--repository", str(tmp_path / "again")])
    assert again.exit_code == 1
    assert "models:/wine/3: is a release already" in again.output


@pytest.mark.parametrize("client", ["proxied"], indirect=True)
def test_a_version_names_the_images_that_were_built_with_it(client: Any, name: str, models: Path, tmp_path: Path) -> None:
    """What was evaluated can be found from the registry."""
    images = {service: {"name": f"wine-{service}:1", "digest": f"sha256:{service}"} for service in ("proxy", "predict")}
    (models.parent / "images.json").write_text(json.dumps(images))

    register(models, tmp_path / "1", 0.9)

    tags = client.get_model_version("wine", "1").tags
    assert {tag: value for tag, value in tags.items() if "image" in tag} == {
        "splitserve.image.proxy": "wine-proxy:1",
        "splitserve.image.proxy.digest": "sha256:proxy",
        "splitserve.image.predict": "wine-predict:1",
        "splitserve.image.predict.digest": "sha256:predict",
    }


@pytest.mark.parametrize("client", ["proxied"], indirect=True)
def test_what_a_server_does_not_have_is_named(client: Any, name: str, models: Path, tmp_path: Path) -> None:
    """In MLflow's words."""
    register(models, tmp_path / "1", 0.9)
    for where, message in (
        ("mlflow:other@champion", "Registered Model with name=other not found"),
        ("mlflow:wine@staging", "alias staging not found"),
        ("mlflow:wine/7", "Model Version .*wine.*7.* not found"),
    ):
        source = source_of(where)
        with pytest.raises(NotFetched, match=message):
            list(source.bundles())
        source.close()


@pytest.mark.parametrize("client", ["proxied"], indirect=True)
def test_a_champion_that_cannot_be_asked_for_keeps_the_alias(
    client: Any, name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that fails is not a model without a champion."""
    register(models, tmp_path / "1", 0.9)

    def fails(*_: object) -> None:
        raise ConnectionError("connection reset")

    monkeypatch.setattr("mlflow.tracking.MlflowClient.get_registered_model", fails)
    with pytest.raises(RecordError, match=f"MLflow at {client.tracking_uri}: get_registered_model: connection reset"):
        register(models, tmp_path / "2", 0.1)
    monkeypatch.undo()

    assert client.get_model_version_by_alias("wine", "champion").version == "1"


def test_an_upload_that_fails_registers_nothing(server: str, models: Path, tmp_path: Path) -> None:
    """Here the bucket does not exist."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(server, server)
    experiment = client.create_experiment("tiny", artifact_location="s3://nowhere/artifacts")
    try:
        with pytest.raises(RecordError, match="log_artifacts: .*NoSuchBucket"):
            register(models, tmp_path / "1", 0.9)
        assert client.search_model_versions("name = 'wine'") == []
    finally:
        client.rename_experiment(experiment, f"was tiny {experiment}")


@pytest.mark.parametrize("client", ["proxied"], indirect=True)
def test_an_artifact_store_that_gives_back_something_else_registers_nothing(
    client: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the file."""
    download = type(client).download_artifacts

    def damaged(*values: Any) -> str:
        folder = Path(download(*values))
        (folder / "index.json").write_text("{}")
        return str(folder)

    monkeypatch.setattr("mlflow.tracking.MlflowClient.download_artifacts", damaged)
    with pytest.raises(StepFailed, match="does not give back what was uploaded: index.json differs; nothing is registered"):
        register(models, tmp_path / "1", 0.9)
    assert client.search_model_versions("name = 'wine'") == []


def test_a_server_that_is_away_ends_a_run_with_its_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Without the password in it, and without a traceback."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    assert main(tiny.pipeline(tiny.write(tmp_path)), ["run"]) == 1

    said = capsys.readouterr().err
    assert said.startswith("MLflow at http://127.0.0.1:1: get_experiment_by_name: ")
    assert "secret" not in said


@pytest.mark.parametrize("client", ["proxied"], indirect=True)
def test_services_serve_what_the_alias_names(client: Any, name: str, models: Path, tmp_path: Path) -> None:
    """And the next one when it is moved, under the version's number."""
    register(models, tmp_path / "1", 0.9)
    system = System("mlflow:wine@champion", is_fused=True, MODEL_CACHE=str(tmp_path / "cache"), MODEL_POLL_INTERVAL_S="0.1")
    try:
        with Client(system.grpc) as caller:
            wait_until(lambda: answered(caller) == "1.1", "version 1")
            register(models, tmp_path / "2", 0.9)
            wait_until(lambda: answered(caller) == "2.2", "version 2")
    finally:
        system.stop()


def answered(caller: Client) -> str:
    """The pair that answers; "" while none does."""
    try:
        return str(caller.infer("wine", X[["size", "count"]][:1]).version)
    except SplitserveError:
        return ""


@pytest.mark.parametrize("client", ["proxied"], indirect=True)
def test_a_model_of_mlflow_is_published_from_a_server(client: Any, tmp_path: Path) -> None:
    """Logged as MLflow does it, registered, published from its files, and served names say where it is from."""
    import mlflow

    mlflow.set_tracking_uri(client.tracking_uri)
    columns = X[["size", "count"]]
    with mlflow.start_run(experiment_id=client.get_experiment_by_name("tiny").experiment_id):
        mlflow.sklearn.log_model(
            make_pipeline(StandardScaler(), LogisticRegression()).fit(columns, Y),
            name="model",
            input_example=columns,
            registered_model_name="grape",
            pip_requirements=[],
            serialization_format="skops",
        )
    (version,) = client.search_model_versions("name = 'grape'")
    client.set_registered_model_alias("grape", "champion", version.version)

    done = CliRunner().invoke(app, ["publish", "--mlflow", "models:/grape@champion", "--repository", str(tmp_path / "models")])

    assert done.exit_code == 0, done.output
    assert f"models:/grape/{version.version} is grape 1.1" in done.output
    assert (
        Repository(tmp_path / "models").open(BundleKey("grape", "predict", 1)).manifest.origin
        == f"models:/grape/{version.version}"
    )
    client.delete_registered_model("grape")
