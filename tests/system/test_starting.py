"""What clients get from a system that has just been started."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from splitserve import Client, publish
from splitserve.errors import NotFound
from tests.system.processes import System, wait_until

ROWS = np.random.default_rng(0).normal(size=(40, 3))
NAMES = [f"m{number}" for number in range(7)]
REQUEST = {"inputs": [{"name": "features", "datatype": "FP64", "shape": [1, 3], "data": ROWS[0].tolist()}]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven models, which take a while to load; the last is broken and not waited for."""
    folder = tmp_path_factory.mktemp("models")
    for name in (*NAMES, "broken"):
        publish(make_pipeline(StandardScaler(), Ridge()).fit(ROWS, ROWS.sum(axis=1)), ROWS, name=name, repository=folder)
    (folder / "broken" / "predict" / "1" / "model.onnx").write_bytes(b"")
    return folder


def test_a_fused_service_knows_its_models_when_it_opens_its_ports(models: Path) -> None:
    """A balancer without health checks sends requests at once: none is answered with 503 or 404."""
    system = System(models, is_fused=True)
    try:
        answers = {name: system.rest(f"/v2/models/{name}/infer", REQUEST) for name in reversed(NAMES)}
        ready, _ = system.rest("/v2/health/ready")
    finally:
        system.stop()

    assert {name: body for name, (status, body) in answers.items() if status != 200} == {}
    assert ready == 200


@pytest.mark.parametrize("is_fused", [False, True], ids=["split", "fused"])
def test_ready_means_that_everything_has_been_tried(models: Path, is_fused: bool) -> None:
    """The first "ready" of each stage comes after its last model was admitted: none is unavailable then."""
    system = System(models, is_fused=is_fused)
    try:
        wait_until(lambda: system.rest("/v2/health/ready")[0] == 200, "ready")
        states = {name: system.rest(f"/v2/models/{name}/ready")[0] for name in (*NAMES, "broken")}
        stage = system.processes["fused" if is_fused else "preprocess"]
        stage.wait_for("ready")
        events = [line["event"] for line in map(json.loads, stage.lines)]
    finally:
        system.stop()

    assert states == {**dict.fromkeys(NAMES, 200), "broken": 503}
    assert events[: events.index("ready")].count("pair admitted") == len(NAMES)


@pytest.mark.parametrize("is_fused", [False, True], ids=["split", "fused"])
def test_a_restart_serves_the_newest_release_whose_halves_load(tmp_path: Path, is_fused: bool) -> None:
    """Preprocess alone refuses the newest three, which predict cannot know: it is told which older predictor is needed."""
    for number in range(1, 5):
        publish(make_pipeline(StandardScaler(), Ridge()).fit(ROWS, ROWS.sum(axis=1)), ROWS, name="m", repository=tmp_path)
        if number > 1:
            (tmp_path / "m" / "preprocess" / str(number) / "pipeline.skops").write_bytes(b"")
    system = System(tmp_path, is_fused=is_fused, MODEL_VERSIONS="latest:1", PREDICT_REFRESH_INTERVAL_S="0.1")
    try:
        wait_until(lambda: system.rest("/v2/models/m/ready")[0] == 200, "ready")
        _, answer = system.rest("/v2/models/m/infer", REQUEST)
    finally:
        system.stop()

    assert answer["model_version"] == "1.1"


@pytest.mark.parametrize("is_fused", [False, True], ids=["split", "fused"])
def test_a_pair_without_a_release_is_not_found_and_the_error_says_how_to_release_it(tmp_path: Path, is_fused: bool) -> None:
    """Over REST and gRPC."""
    publish(make_pipeline(StandardScaler(), Ridge()).fit(ROWS, ROWS.sum(axis=1)), ROWS, name="two", repository=tmp_path)
    publish(make_pipeline(StandardScaler(), Ridge()).fit(ROWS, ROWS.sum(axis=1)), ROWS, name="two", repository=tmp_path)
    system = System(tmp_path, is_fused=is_fused)
    try:
        wait_until(lambda: system.rest("/v2/models/two/ready")[0] == 200, "ready")
        status, answer = system.rest("/v2/models/two/versions/2.1/infer", REQUEST)
        with Client(system.grpc) as client, pytest.raises(NotFound) as raised:
            client.infer("two", {"features": ROWS[:1]}, version="2.1")
    finally:
        system.stop()

    assert status == 404
    for message in (answer["error"], raised.value.message):
        assert '"splitserve release two 2.1" proves a pair of published halves and makes it one' in message


@pytest.mark.parametrize("service", ["proxy", "predict_service"])
def test_a_service_does_not_import_what_only_commands_use(service: str) -> None:
    """It is installed here; each start would pay for it."""
    code = f"import sys, {service}.__main__; print({{'rich', 'typer'}} & set(sys.modules))"

    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "set()"
    assert importlib.util.find_spec("rich") is not None


def test_workers_give_requests_other_ids() -> None:
    """They are forked from one process, which has made ids before."""
    code = (
        "import os; from splitserve.server.request_ids import new_request_id as new; first = new()[:16]; child = os.fork()\n"
        "if child == 0: os._exit(new()[:16] == first)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), new()[:16] == first)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split() == [
        "0",
        "True",
    ]
