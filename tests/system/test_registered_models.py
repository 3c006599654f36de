"""Services that follow an alias of MLflow's registry, and what callers see when it is moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from splitserve import Client, publish_predictor, publish_preprocessor, release
from splitserve.repository.folder import Repository
from tests.registry_server import ALIAS, RegistryServer
from tests.system.models import affine_model
from tests.system.processes import System, wait_until
from tests.system.test_reload import FAST, N_FEATURES, Load, expected, versions

ROWS = {"features": np.ones((1, N_FEATURES))}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RegistryServer]:
    for name in ("MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    with RegistryServer(tmp_path / "artifacts").running() as server:
        assert isinstance(server, RegistryServer)
        yield server


@contextmanager
def serving(registry: RegistryServer, cache: Path, *, is_fused: bool, **settings: str) -> Iterator[System]:
    environment = {
        "MLFLOW_TRACKING_URI": registry.url,
        "MODEL_CACHE": str(cache),
        "MODEL_POLL_INTERVAL_S": "0.1",
        "PREDICT_REFRESH_INTERVAL_S": "0.1",
        "PREPROCESS_REFRESH_INTERVAL_S": "0.1",
        **FAST,
        **settings,
    }
    system = System("mlflow:m@champion", is_fused=is_fused, **environment)
    try:
        yield system
    finally:
        system.stop()


def built(registry: RegistryServer, version: str, scale: int) -> None:
    """A model 1.1 in a folder of its own, whose answer for rows of ones is ``1 + scale``, and a version with its files."""
    rows, folder = np.ones((4, N_FEATURES)), registry.folder / version
    scaler = StandardScaler(with_mean=False).fit(rows)
    scaler.scale_ = np.full(N_FEATURES, 1 / scale)
    publish_preprocessor(scaler, rows, name="m", repository=folder)
    publish_predictor(affine_model(N_FEATURES, 1 / scale, scale), rows.astype(np.float32), name="m", repository=folder)
    release("m", "1.1", repository=folder, accept_unknown_features=True)
    registry.register("m", version, Repository(folder))


@pytest.mark.parametrize("is_fused", [False, True], ids=["split", "fused"])
def test_moving_an_alias_loses_no_request(registry: RegistryServer, tmp_path: Path, is_fused: bool) -> None:
    """Forth, back to a version that is held, and to one that is older than both; two builds have the same numbers."""
    for version in (1, 2, 3):
        built(registry, str(version), version)
    with serving(registry, tmp_path / "cache", is_fused=is_fused) as system:
        wait_until(lambda: default(system) == "3.3", "version 3")
        load = Load(system)
        load.start()
        try:
            for version in ("2", "3", "1"):
                registry.aliases[("m", "champion")] = version
                wait_until(lambda pair=f"{version}.{version}": default(system) == pair, f"version {version}")
        finally:
            load.stop()
        assert load.complaints == []
        assert load.n_answers > 0


def default(system: System) -> str:
    """The pair that answered a request which names none; "" if none did."""
    request = {"inputs": [{"name": "features", "datatype": "FP64", "shape": [1, 3], "data": [1.0, 1.0, 1.0]}]}
    return str(system.rest("/v2/models/m/infer", request)[1].get("model_version", ""))


def test_what_serves_goes_on_when_the_registry_is_away(registry: RegistryServer, tmp_path: Path) -> None:
    """The index says why nothing new is loaded; a service that starts then waits for it."""
    built(registry, "1", 1)
    with serving(registry, tmp_path / "cache", is_fused=True) as system:
        wait_until(lambda: versions(system) == ["1.1"], "version 1")
        registry.authorization = "Bearer other"
        body = {"name": "m"}

        def reason() -> str:
            return str(system.rest("/v2/repository/index", body)[1])

        wait_until(lambda: "mlflow:m@champion: " in reason() and "access denied: HTTP status 401" in reason(), "the reason")
        assert versions(system) == ["1.1"]
        with Client(system.grpc) as client:
            assert client.infer("m", ROWS)["scores"][0, 0] == expected("1.1")
    assert registry.asked(ALIAS)
