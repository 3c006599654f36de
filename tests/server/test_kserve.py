"""KServe's arguments as settings, and models in the places of its storage initializer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
import yaml
from sklearn.preprocessing import StandardScaler

import preprocess_service.settings
from predict_service.settings import PredictSettings
from splitserve import publish_predictor, publish_preprocessor
from splitserve.repository import sources
from splitserve.repository.bundle import BundleKey
from splitserve.repository.manifest import BundleError, NotFetched
from splitserve.repository.sources import source_of
from splitserve.server import kserve, settings
from tests import certificates
from tests.system.models import softmax_model

pytestmark = pytest.mark.heavy  # they publish

ROWS = np.random.default_rng(0).normal(size=(6, 3))
CONTROLLERS = ["--model_name", "penguins", "--predictor_host", "penguins-predictor.default"]
"""What KServe's controller adds."""


@pytest.fixture(autouse=True)
def _storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """KServe mounts models at a path that does not exist on this machine."""
    monkeypatch.setattr(sources, "missing", lambda where: "")


def test_the_controllers_arguments_suffice_for_a_transformer() -> None:
    """It serves the named model and calls predict at all addresses of the predictor's name, on KServe's gRPC port."""
    config = preprocess_service.settings.read(CONTROLLERS)

    assert config.models == "penguins"
    assert config.predict_target == "dns:///penguins-predictor.default:80"
    assert config.next_tls is None


def test_a_transformers_arguments_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """With "=" or without; an argument takes precedence over the environment variable."""
    monkeypatch.setenv("PREPROCESS_GRPC_PORT", "1")
    arguments = ["--grpc_port=8081", "--http_port=8080", "--model_dir", "/mnt/models", "--predictor_request_timeout_seconds", "7"]

    config = preprocess_service.settings.read([*arguments, "--predictor_protocol=grpc-v2", "--predictor_host", "10.0.0.1:8033"])

    assert (config.grpc_port, config.model_repository, config.default_timeout_s) == (8081, "/mnt/models", 7)
    assert config.predict_target == "dns:///10.0.0.1:8033"


def test_a_predictors_arguments_become_settings() -> None:
    """The same arguments as of KServe's own servers."""
    arguments = ["--model_name=penguins", "--model_dir=/mnt/models", "--grpc_port=8081", "--http_port=8080", "--workers=2"]

    config = settings.read(PredictSettings, **kserve.predictor(arguments))

    assert (config.models, config.model_repository, config.grpc_port) == ("penguins", "/mnt/models", 8081)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predictor_protocol", "v1"], "--predictor_protocol: expected grpc-v2, got v1: predict is called over gRPC"),
        (["--predictor_protocol=v2"], "--predictor_protocol: expected grpc-v2, got v2"),
        (["--predictor_protocol", "grpc-v1"], "--predictor_protocol: expected grpc-v2, got grpc-v1"),
        (["--predictor_host", "http://somewhere/v1"], "--predictor_host: expected a host, or host:port, got http://somewhere/v1"),
        (["--predictor_use_ssl", "perhaps"], "expected true or false, got perhaps"),
        (["--predictor_use_ssl", "true"], "--predictor_use_ssl: needs PREPROCESS_NEXT_CA_FILE"),
        (["--grpc_port", "x"], "argument --grpc_port: invalid int value"),
        (["--grpc_port", "70000"], "grpc_port: Input should be less than or equal to 65535"),
        (["--model_name", "a/b"], '"a/b" cannot be the name of a model'),
    ],
)
def test_a_wrong_argument_ends_the_process_naming_it(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """Exit status 2, before anything is bound."""
    with pytest.raises(SystemExit) as raised:
        preprocess_service.settings.read(arguments)

    assert raised.value.code == 2
    assert message.lower() in capsys.readouterr().err.lower()


def test_predict_is_called_over_tls_with_predictor_use_ssl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the configured certificate authorities, on the port for TLS."""
    monkeypatch.setenv("PREPROCESS_NEXT_CA_FILE", certificates.write(tmp_path, trustme.CA()).ca)

    config = preprocess_service.settings.read([*CONTROLLERS, "--predictor_use_ssl", "True"])

    assert config.predict_target.endswith(":443")
    assert config.next_tls is not None


def test_unknown_arguments_are_ignored_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    """As KServe's own servers do; a newer controller may pass more."""
    preprocess_service.settings.read([*CONTROLLERS, "--new_option", "3"])

    assert capsys.readouterr().err == "ignoring unknown arguments: --new_option 3\n"


def test_the_manifests_arguments_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments, ports and variables of deploy/kserve, with what the controller adds."""
    service = yaml.safe_load(Path("deploy/kserve/inference-service.yaml").read_text())
    runtime = yaml.safe_load(Path("deploy/kserve/serving-runtime.yaml").read_text())
    [transformer], [predictor] = service["spec"]["transformer"]["containers"], runtime["spec"]["containers"]
    for variable in (*transformer["env"], *predictor["env"]):
        monkeypatch.setenv(variable["name"], variable["value"])

    preprocess = preprocess_service.settings.read([*transformer["args"], *CONTROLLERS])
    predict = settings.read(PredictSettings, **kserve.predictor([part.replace("{{.Name}}", "m") for part in predictor["args"]]))

    for config, container in ((preprocess, transformer), (predict, predictor)):
        assert config.grpc_port == container["ports"][0]["containerPort"] == container["readinessProbe"]["grpc"]["port"]
        assert (config.model_repository, config.drain_delay_s) == ("/mnt/models", 1)
    assert predict.models == "m"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The model ``m``: a preprocessor, two predictors, a route."""
    root = tmp_path / "repository"
    publish_preprocessor(StandardScaler().fit(ROWS), ROWS, name="m", repository=root)
    for _ in range(2):
        publish_predictor(softmax_model(3), ROWS.astype(np.float32), name="m", repository=root)
    (root / "m" / "route.json").write_text('{"pairs": [{"pair": "1.1"}]}')
    return root


def mounted(folder: Path, tmp_path: Path) -> Any:
    """The source of a folder that is mounted as ``/mnt/models`` is: through a link with another name."""
    (tmp_path / "mnt").mkdir()
    (tmp_path / "mnt" / "models").symlink_to(folder)
    return source_of(tmp_path / "mnt" / "models")


def test_a_mounted_folder_may_be_a_repository(repository: Path, tmp_path: Path) -> None:
    """As in every other place."""
    source = mounted(repository, tmp_path)

    assert list(source.bundles()) == [
        BundleKey("m", "preprocess", 1),
        BundleKey("m", "predict", 1),
        BundleKey("m", "predict", 2),
    ]
    assert source.route("m") is not None


def test_a_mounted_folder_may_be_that_of_one_model(repository: Path, tmp_path: Path) -> None:
    """Its name comes from its manifests, not from the folder; its route applies."""
    source = mounted(repository / "m", tmp_path)

    assert list(source.bundles()) == [
        BundleKey("m", "preprocess", 1),
        BundleKey("m", "predict", 1),
        BundleKey("m", "predict", 2),
    ]
    assert source.route("m") is not None
    assert source.open(BundleKey("m", "predict", 2)).read("model.onnx")


def test_a_mounted_folder_may_be_one_bundle(repository: Path, tmp_path: Path) -> None:
    """With the name and the version of its manifest."""
    source = mounted(repository / "m" / "predict" / "2", tmp_path)

    assert list(source.bundles()) == [BundleKey("m", "predict", 2)]
    assert source.route("m") is None
    assert source.open(BundleKey("m", "predict", 2)).read("model.onnx")


def test_a_new_version_with_a_broken_manifest_affects_no_other(repository: Path, tmp_path: Path) -> None:
    """The model's name comes from a readable manifest."""
    (repository / "m" / "predict" / "1" / "manifest.json").write_text("{")
    (repository / "m" / "preprocess" / "1" / "manifest.json").write_text("{")
    source = mounted(repository / "m", tmp_path)

    assert len(list(source.bundles())) == 3
    assert source.open(BundleKey("m", "predict", 2)).read("model.onnx")


def test_a_mounted_folder_may_be_filled_late(repository: Path, tmp_path: Path) -> None:
    """Until it exists, the repository is unreadable, not empty; then it is read again."""
    source = source_of(tmp_path / "late")
    with pytest.raises(NotFetched):
        list(source.bundles())

    (repository / "m").rename(tmp_path / "late")

    assert len(list(source.bundles())) == 3


def test_a_mounted_bundle_with_a_broken_manifest_is_reported(tmp_path: Path) -> None:
    """As the state of the repository, since the bundle's name is unknown."""
    (tmp_path / "manifest.json").write_text("{}")

    with pytest.raises(BundleError, match="manifest"):
        list(source_of(tmp_path).bundles())
