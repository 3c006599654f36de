"""Settings: from the environment, checked before anything is bound."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from predict_service.settings import PredictSettings
from preprocess_service.settings import PreprocessSettings
from proxy.settings import ProxySettings
from splitserve.batching.queue import BatchLimits
from splitserve.server import settings
from splitserve.server.face_settings import FaceSettings
from splitserve.telemetry.recorders import LATENCY_BOUNDS
from tests.signing_keys import make_keys

ALL = (ProxySettings, PreprocessSettings, PredictSettings)


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default repository."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("kind", "variable", "value", "message"),
    [
        (ProxySettings, "PROXY_PREPROCESS_TARGET", "", 'expected a gRPC target as "host:port"'),
        (ProxySettings, "PROXY_PREPROCESS_TARGET", "preprocess", 'expected a gRPC target as "host:port"'),
        (ProxySettings, "PROXY_PREPROCESS_TARGET", "preprocess:70000", 'expected a gRPC target as "host:port"'),
        (PreprocessSettings, "PREPROCESS_PREDICT_TARGET", " ", 'expected a gRPC target as "host:port"'),
        (PreprocessSettings, "PREPROCESS_PREDICT_TARGET", "dns:///predict", 'expected a gRPC target as "host:port"'),
        (ProxySettings, "PROXY_DEFAULT_TIMEOUT_S", "inf", "finite number"),
        (ProxySettings, "PROXY_GRACE_S", "nan", "finite number"),
        (PredictSettings, "PREDICT_PROVIDERS", "Nope", 'which ONNX Runtime has here; got "Nope"'),
        (PredictSettings, "PREDICT_PROVIDERS", "", "expected some of"),
        (PredictSettings, "MODEL_REPOSITORY", "nowhere", "nowhere: expected a folder, which may be empty; it does not exist"),
        (PreprocessSettings, "MODEL_REPOSITORY", "file:///nowhere", "/nowhere: expected a folder"),
        (PredictSettings, "PREDICT_GRPC_SOCKET", "predict", 'expected an absolute path of at most 100 bytes, got "predict"'),
        (PredictSettings, "PREDICT_GRPC_SOCKET", f"/{'a' * 100}", "expected an absolute path of at most 100 bytes"),
    ],
)
def test_settings_that_cannot_work_end_the_process_naming_the_variable(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: type[settings.ServiceSettings],
    variable: str,
    value: str,
    message: str,
) -> None:
    """Before a port is bound, with the expected value; a warning or a service without models would not do."""
    monkeypatch.setenv(variable, value)

    with pytest.raises(SystemExit) as raised:
        settings.read(kind)

    printed = capsys.readouterr().err
    assert raised.value.code == 2
    assert printed.startswith(f"{variable}: ")
    assert message in printed


@pytest.mark.parametrize(
    "target",
    [
        "predict:8021",
        "10.0.0.1:1",
        "[::1]:8021",
        "dns:///predict:8021",
        "dns://8.8.8.8/predict:8021",
        "unix:/run/s",
        "xds:///predict",
    ],
)
def test_targets_are_grpc_names(target: str) -> None:
    """Every form that gRPC can resolve."""
    assert settings.check_target(target) == target


def test_a_setting_comes_from_its_own_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Prefixes separate services that share an environment; some variables are shared on purpose."""
    monkeypatch.setenv("PREDICT_GRPC_PORT", "1234")
    monkeypatch.setenv("MODEL_REPOSITORY", str(tmp_path))

    predict, preprocess = settings.read(PredictSettings), settings.read(PreprocessSettings)

    assert (predict.grpc_port, preprocess.grpc_port) == (1234, 8011)
    assert predict.model_repository == preprocess.model_repository == str(tmp_path)


@pytest.mark.parametrize("kind", ALL)
def test_several_workers_do_not_share_a_unix_socket(kind: type[FaceSettings]) -> None:
    with pytest.raises(ValidationError, match="several workers cannot share a unix socket; got 2 workers"):
        kind(workers=2, grpc_socket="/run/x")

    assert kind(grpc_socket="/run/x").grpc_config.socket_path == "/run/x"


@pytest.mark.parametrize("kind", ALL)
def test_one_variable_chooses_the_grpc_engine_of_every_service(monkeypatch: pytest.MonkeyPatch, kind: type[FaceSettings]) -> None:
    """Our own engine by default; grpcio is the alternative for peers that fail with it."""
    assert settings.read(kind).grpc_config.engine == "own"

    monkeypatch.setenv("GRPC_ENGINE", "grpcio")

    assert settings.read(kind).grpc_config.engine == "grpcio"


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(("own", "of_all"), [("grpcio", "own"), ("own", "grpcio"), ("grpcio", "")])
def test_a_service_may_have_another_grpc_engine_than_the_others(
    monkeypatch: pytest.MonkeyPatch, kind: type[FaceSettings], own: str, of_all: str
) -> None:
    """Its own variable comes first."""
    monkeypatch.setenv(f"{kind.stage.upper()}_GRPC_ENGINE", own)
    if of_all:
        monkeypatch.setenv("GRPC_ENGINE", of_all)

    assert settings.read(kind).grpc_config.engine == own


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PROXY_HTTP_PORT", "70000"),
        ("GRPC_ENGINE", "other"),
        ("PROXY_GRPC_ENGINE", "other"),
        ("PROXY_GRACE_S", "-1"),
        ("LOG_LEVEL", "loud"),
        ("PROXY_DEFAULT_TIMEOUT_S", "x"),
    ],
)
def test_a_wrong_value_stops_the_process_naming_the_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str
) -> None:
    """Exit status 2 and one line."""
    monkeypatch.setenv(variable, value)

    with pytest.raises(SystemExit) as raised:
        settings.read(ProxySettings)

    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith(f"{variable}: ")


@pytest.mark.parametrize("kind", [PredictSettings, PreprocessSettings])
def test_an_invalid_key_stops_the_process_naming_the_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[settings.ServiceSettings]
) -> None:
    """A service that must refuse unsigned bundles does not start without a valid key."""
    monkeypatch.setenv("MODEL_SIGNATURE_KEY", "/nowhere/key.pem")

    with pytest.raises(SystemExit) as raised:
        settings.read(kind)

    assert raised.value.code == 2
    assert "MODEL_SIGNATURE_KEY: " in (printed := capsys.readouterr().err)
    assert "/nowhere/key.pem: No such file or directory" in printed


@pytest.mark.parametrize("kind", ALL)
def test_every_setting_is_documented(kind: type[settings.ServiceSettings]) -> None:
    """A field without a docstring is not documented."""
    assert [name for name, field in kind.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("kind", ALL)
def test_services_listen_on_loopback_by_default(kind: type[settings.ServiceSettings]) -> None:
    """Calls need no credentials by default, so only local ones are possible."""
    assert settings.read(kind).host == "127.0.0.1"


def test_defaults_are_the_ports_that_clients_expect() -> None:
    """8000 REST, 8001 gRPC at the edge."""
    proxy = settings.read(ProxySettings)

    assert (proxy.http_port, proxy.grpc_port) == (8000, 8001)


def test_batch_limits_can_be_set_by_model() -> None:
    """Limits that are not set for a model are those of all models."""
    text = "imagenet: max_in_flight=4, max_batch_size=8; penguins:max_queue_delay_ms=2.5"

    settings = ProxySettings(max_batch_size=64, batching=text)

    assert settings.batch_limits("imagenet") == BatchLimits(max_batch_size=8, max_in_flight=4, max_queue_wait_ms=1000)
    assert settings.batch_limits("penguins") == BatchLimits(max_batch_size=64, max_queue_delay_ms=2.5, max_queue_wait_ms=1000)
    assert settings.batch_limits("digits") == BatchLimits(max_batch_size=64, max_queue_wait_ms=1000)


@pytest.mark.parametrize(
    "text", ["imagenet", "imagenet: size=3", "imagenet: max_batch_size=0", "a b: max_batch_size=1", "x: max_in_flight=y"]
)
def test_invalid_batch_limits_are_refused(text: str) -> None:
    """The message names the invalid part, before anything starts."""
    with pytest.raises(ValidationError, match="batching"):
        ProxySettings(batching=text)


def test_an_alias_of_mlflow_and_a_signature_key_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """An alias has no signature, so whoever moves it would decide what serves."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MODEL_REPOSITORY", "mlflow:penguins@champion")
    monkeypatch.setenv("MODEL_SIGNATURE_KEY", str(make_keys(tmp_path).public))

    with pytest.raises(SystemExit) as raised:
        settings.read(PredictSettings)

    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith("MODEL_SIGNATURE_KEY: expected none with MODEL_REPOSITORY=mlflow:")


def thresholds(text: str) -> tuple[float, ...]:
    return ProxySettings(SLO_LATENCY_MS=text).latency_bounds


def test_thresholds_of_objectives_are_bucket_bounds() -> None:
    """Whatever they are, besides the usual bounds."""
    bounds = thresholds("37, 250,0.5")

    assert {0.037, 0.25, 0.0005, *LATENCY_BOUNDS} == set(bounds)
    assert list(bounds) == sorted(bounds)
    assert ProxySettings().latency_bounds == LATENCY_BOUNDS == thresholds("")


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "fast", "1;2", "3600001", ",".join(map(str, range(1, 18)))])
def test_thresholds_that_are_none_are_refused(text: str) -> None:
    """When the service starts."""
    with pytest.raises(ValidationError, match="slo_latency_ms|SLO_LATENCY_MS"):
        thresholds(text)
