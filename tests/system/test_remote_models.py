"""Services whose model repository is a bucket, or on a web server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from splitserve import publish_predictor, publish_preprocessor, release
from splitserve.repository.folder import Repository
from splitserve.repository.sources import index
from tests.file_server import FileServer, cut, flip, status
from tests.object_store import ObjectStore, object_store
from tests.system.models import affine_model
from tests.system.processes import Process, System, wait_until

COMMAND = Path(sys.executable).with_name("splitserve")
N_FEATURES = 3
QUICK = {
    "MODEL_POLL_INTERVAL_S": "0.1",
    "MODEL_FETCH_TIMEOUT_S": "20",
    "PREDICT_REFRESH_INTERVAL_S": "0.1",
    "PREPROCESS_REFRESH_INTERVAL_S": "0.1",
}
NO_BUCKET = "s3://models/prod: not found: The specified bucket does not exist"


def publish(repository: Path, number: int, name: str = "m") -> None:
    """Both halves as this version; the output is the input plus the version number."""
    rows = np.ones((4, N_FEATURES))
    scaler = StandardScaler(with_mean=False, with_std=False).fit(rows)
    publish_preprocessor(scaler, rows, name=name, repository=repository, version=number)
    model = affine_model(N_FEATURES, 1, number, n_ballast=1_000_000)
    publish_predictor(model, rows.astype(np.float32), name=name, repository=repository, version=number)
    release(name, f"{number}.{number}", repository=repository, accept_unknown_features=True)


@contextmanager
def serving(url: str, cache: Path, *, is_fused: bool = False, **settings: str) -> Iterator[System]:
    system = System(url, is_fused=is_fused, MODEL_CACHE=str(cache), **{**QUICK, **settings})
    try:
        yield system
    finally:
        codes = system.stop()
    assert set(codes.values()) == {0}, [process.lines for process in system.processes.values()]


def is_ready(system: System, pair: str) -> bool:
    return system.rest(f"/v2/models/m/versions/{pair}/ready")[0] == 200


def answer(system: System) -> Any:
    return system.rest("/v1/models/m:predict", {"instances": [[1.0] * N_FEATURES]})


@pytest.fixture
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.mark.parametrize("is_fused", [False, True], ids=["split", "fused"])
def test_services_wait_for_a_bucket_and_a_restart_fetches_nothing(tmp_path: Path, store: ObjectStore, is_fused: bool) -> None:
    """They run, report what they wait for, and serve once it exists; afterwards everything is in the cache."""
    publish(tmp_path / "models", 1)
    with serving("s3://models/prod", tmp_path / "cache", is_fused=is_fused, **store.environment) as system:
        readers = [process for name, process in system.processes.items() if name != "proxy"]
        logged = [process.wait_for("model repository unreadable")["reason"] for process in readers]
        wait_until(lambda: f"waiting for the model repository: {NO_BUCKET}" in str(system.rest("/v2/health/ready")), "why")
        told = subprocess.run([COMMAND, "health", "--url", system.grpc], capture_output=True, text=True).stderr
        health = system.rest("/v2/health/live")[0], system.rest("/v2/health/ready")[0]

        store.client.create_bucket(Bucket="models")
        store.upload(tmp_path / "models", "models", "prod/")
        wait_until(lambda: is_ready(system, "1.1"), "ready")
        status_code, answered = answer(system)

    fetched = store.fetched()
    store.requests.clear()
    with serving("s3://models/prod", tmp_path / "cache", is_fused=is_fused, **store.environment) as system:
        wait_until(lambda: is_ready(system, "1.1"), "ready again")
        again = answer(system)

    assert logged == [NO_BUCKET] * len(readers)
    assert health == (200, 503)
    assert f"waiting for the model repository: {NO_BUCKET}" in told
    assert (status_code, again[0]) == (200, 200)
    assert answered == again[1]
    assert "/models/prod/m/predict/1/model.onnx" in fetched
    assert store.fetched() == []


def test_only_selected_bundles_are_fetched(tmp_path: Path, store: ObjectStore) -> None:
    """The models that are named, their newest release with the one before it, and what the route names."""
    for number in (1, 2, 3, 4):
        publish(tmp_path / "models", number)
    publish(tmp_path / "models", 1, "other")
    (tmp_path / "models" / "m" / "route.json").write_bytes(b'{"pairs": [{"pair": "1.1"}]}')
    store.client.create_bucket(Bucket="models")
    store.upload(tmp_path / "models", "models", "prod/")

    wanted = {"MODELS": "m", "MODEL_VERSIONS": "latest:1"}
    with serving("s3://models/prod", tmp_path / "cache", is_fused=True, **wanted, **store.environment) as system:
        wait_until(lambda: all(is_ready(system, pair) for pair in ("1.1", "3.3", "4.4")), "ready")

    assert {path.removeprefix("/models/prod/").rpartition("/")[0] for path in store.fetched()} == {
        "m",
        "m/preprocess/1",
        "m/preprocess/3",
        "m/preprocess/4",
        "m/predict/1",
        "m/predict/3",
        "m/predict/4",
        *(f"m/releases/000{number}-{number}.{number}" for number in (1, 2, 3, 4)),
    }


def test_a_damaged_object_is_reported_and_unloads_nothing(tmp_path: Path, store: ObjectStore) -> None:
    """The previous pair keeps serving; once the object is repaired and the model reloaded, the new one is served."""
    publish(tmp_path / "models", 1)
    store.client.create_bucket(Bucket="models")
    store.upload(tmp_path / "models", "models", "prod/")
    settings = {"ALLOW_REPOSITORY_CONTROL": "true", **store.environment}
    with serving("s3://models/prod", tmp_path / "cache", is_fused=True, **settings) as system:
        wait_until(lambda: is_ready(system, "1.1"), "ready")
        publish(tmp_path / "models", 2)
        model = tmp_path / "models" / "m" / "predict" / "2" / "model.onnx"
        right = model.read_bytes()
        model.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
        store.upload(tmp_path / "models", "models", "prod/")

        # At first predict may not have tried it yet, which is another reason.
        reason = wait_until(lambda: reason if "model.onnx" in (reason := refused(system, "2.2")) else "", "the report")
        serves_on = is_ready(system, "1.1")
        model.write_bytes(right)
        store.upload(tmp_path / "models", "models", "prod/")
        system.rest("/v2/repository/models/m/load", {})
        wait_until(lambda: is_ready(system, "2.2"), "the mended version")

    assert reason.startswith(f"m/predict/2: model.onnx: expected {len(right)} bytes, sha256 ")
    assert reason.endswith(", twice in a row from s3://models/prod")
    assert serves_on


def refused(system: System, pair: str) -> str:
    """Why a pair is; "" if it is not."""
    _, entries = system.rest("/v2/repository/index", {})
    return next((str(entry["reason"]) for entry in entries if entry["version"] == pair and entry["state"] == "UNAVAILABLE"), "")


def test_an_unreliable_web_server_is_tolerated(tmp_path: Path) -> None:
    """Busy, cut off in the middle, a wrong byte: each is retried, and only correct files are served."""
    root = tmp_path / "models"
    publish(root, 1)
    server = FileServer(root)
    server.fail("index.json", status(503))
    server.fail("m/predict/1/model.onnx", status(503), cut, flip)
    server.fail("m/preprocess/1/golden.npz", cut, status(503))
    with server.running(), serving(server.url, tmp_path / "cache", is_fused=True) as system:
        wait_until(lambda: "index.json: not found" in str(system.rest("/v2/health/ready")), "the reason")
        index.write(root, index.build(Repository(root))[0])
        wait_until(lambda: is_ready(system, "1.1"), "ready")
        status_code, _ = answer(system)
        waits = {event["bundle"]: event["reason"] for event in system.processes["fused"].events("bundle not fetched")}

    assert status_code == 200
    assert not any(server.faults.values())
    assert waits.keys() == {"m/predict/1", "m/preprocess/1"}


def test_an_unwritable_cache_is_reported_and_retried(tmp_path: Path, store: ObjectStore) -> None:
    """No restart is needed once it is repaired."""
    publish(tmp_path / "models", 1)
    store.client.create_bucket(Bucket="models")
    store.upload(tmp_path / "models", "models", "prod/")
    cache = tmp_path / "cache"
    cache.write_bytes(b"a file where the folder should be")
    with serving("s3://models/prod", cache, is_fused=True, **store.environment) as system:
        wait_until(lambda: "set MODEL_CACHE to a writable folder" in str(system.rest("/v2/health/ready")), "the reason")
        cache.unlink()
        wait_until(lambda: is_ready(system, "1.1"), "ready")


def test_a_stop_does_not_wait_for_a_stalled_download(tmp_path: Path) -> None:
    """The process ends although the server has stopped sending, long before the timeout."""
    from tests.file_server import stall

    root = tmp_path / "models"
    publish(root, 1)
    index.write(root, index.build(Repository(root))[0])
    server = FileServer(root)
    server.fail("m/predict/1/model.onnx", stall)
    environment = {"MODEL_REPOSITORY": server.url, "MODEL_CACHE": str(tmp_path / "cache"), "MODEL_FETCH_TIMEOUT_S": "3600"}
    with server.running():
        process = Process("predict_service", {**environment, "PREDICT_GRPC_PORT": "0"})
        wait_until(lambda: server.asked("m/predict/1/model.onnx"), "a download under way")

        assert process.stop() == 0


def test_an_unsupported_url_stops_a_service_before_it_listens() -> None:
    """Exit status 2, the variable, and the supported forms."""
    process = Process("predict_service", {"MODEL_REPOSITORY": "ftp://host/models"})

    assert process.wait() == 2
    assert process.lines == [
        "MODEL_REPOSITORY: Value error, expected a folder or a URL with s3://, gs://, az://, http://, https://; got ftp://"
    ]
