"""The containers as a user runs them: what the images hold, what they may do, what they answer, how they stop."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import np_to_triton_dtype

from tests.compose.conftest import Model, probe, wait_until_ready
from tests.compose.stack import SERVICES, Container, Stack, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.xdist_group("compose"), pytest.mark.timeout(900)]

N_ROWS = 60
TOLERANCE = 1e-4
NAMES = ("breast-cancer", "digits", "weather")

EVERY = {"splitserve", "httptools", "prometheus_client"}
"""What each image holds: HTTP/1.1 and metrics, for its admin listener."""
OWN = {
    "proxy": {"proxy"} | EVERY,
    "preprocess": {"preprocess_service", "numpy", "pandas", "scipy", "sklearn", "skops"} | EVERY,
    "predict": {"predict_service", "numpy", "onnxruntime"} | EVERY,
}
"""What each image holds of all that the three together need, and of what none needs."""
ALL = set.union(*OWN.values()) | {
    "fused_service",
    "training",
    "tests",
    "onnx",
    "skl2onnx",
    "torch",
    "pip",
    "pytest",
    "fsspec",
    "aiohttp",
}


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_holds_only_what_its_service_needs(stack: Stack, service: str) -> None:
    """No scikit-learn in predict, no ONNX Runtime in preprocess, no numerics in the proxy, and no service's code in another's."""
    code = f"import importlib.util, json; print(json.dumps([n for n in {sorted(ALL)} if importlib.util.find_spec(n)]))"

    found = json.loads(stack.container(service).python(code))

    assert set(found) == OWN[service]


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_has_no_rights(stack: Stack, service: str) -> None:
    """Not root, no capabilities, no way to gain any, and nothing to write to."""
    container = stack.container(service)

    status = dict(line.split(":\t", 1) for line in container.python("print(open('/proc/1/status').read())").splitlines())
    written = container.try_python("-c", "open('/app/file', 'w')")

    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"10001"}
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert "Read-only file system" in written.stderr


@pytest.mark.parametrize("service", ["preprocess", "predict"])
def test_models_are_mounted_read_only(stack: Stack, service: str) -> None:
    """A service reads the model repository and no more."""
    written = stack.container(service).try_python("-c", "open('/models/file', 'w')")

    assert "Read-only file system" in written.stderr


def test_only_the_proxy_is_published_and_only_on_loopback(stack: Stack) -> None:
    """Inner services are not reachable from outside, since no credentials are required by default."""
    published = {
        service: {
            (port, binding["HostIp"])
            for port, bindings in stack.container(service).facts()["NetworkSettings"]["Ports"].items()
            for binding in bindings or ()
        }
        for service in SERVICES
    }

    assert published == {"proxy": {("8000/tcp", "127.0.0.1"), ("8001/tcp", "127.0.0.1")}, "preprocess": set(), "predict": set()}


@pytest.mark.parametrize("name", NAMES)
def test_rest_gives_the_answer_of_the_pipeline(stack: Stack, models: dict[str, Model], name: str) -> None:
    """Labels are equal and probabilities within 1e-4, missing values included."""
    rows = models[name].rows[:N_ROWS]

    answer = httpx.post(f"{stack.http}/v2/models/{name}/infer", json={"inputs": rest_inputs(rows)}, timeout=60)

    assert answer.status_code == 200, answer.text
    check(
        {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in answer.json()["outputs"]}, models[name]
    )


@pytest.mark.parametrize("name", NAMES)
def test_grpc_gives_the_answer_of_the_pipeline(stack: Stack, models: dict[str, Model], name: str) -> None:
    """The same, asked by another project's client."""
    tensors = [grpc_input(*column) for column in columns_of(models[name].rows[:N_ROWS]).items()]

    with tritonclient.grpc.InferenceServerClient(stack.grpc) as client:
        answer = client.infer(name, tensors)

    check({output: answer.as_numpy(output) for output in ("label", "probabilities")}, models[name])


@pytest.mark.parametrize("service", SERVICES)
def test_every_line_that_a_service_writes_is_json(stack: Stack, service: str) -> None:
    """Also the lines of libraries."""
    for line in stack.container(service).lines():
        assert json.loads(line)["event"]


def test_liveness_is_of_one_service_and_readiness_of_all_stages(stack: Stack, models: dict[str, Model]) -> None:
    """Without predict the other services are live, so that nothing restarts them, and not ready, so that no requests are sent."""
    healthy, ready = ["127.0.0.1:8001"], ["127.0.0.1:8001", "--ready"]
    proxy = stack.container("proxy")
    assert probe(proxy, healthy)
    assert probe(proxy, ready)

    stack.compose("stop", "predict")

    wait_until(lambda: not probe(proxy, ready), "the proxy not ready")
    assert probe(proxy, healthy)
    assert probe(stack.container("preprocess"), ["127.0.0.1:8011"])
    stack.up()
    wait_until_ready(stack, models)


def test_stop_ends_every_service_in_order_and_down_leaves_nothing(
    docker: str, project: str, repository: Any, models: dict[str, Model]
) -> None:
    """SIGTERM reaches Python, which ends by itself with status 0; then nothing of the project is left."""
    stack = Stack(docker, f"{project}-2", repository)
    try:
        stack.build()
        stack.up()
        containers = {service: stack.container(service) for service in SERVICES}

        stack.compose("stop")

        for service, container in containers.items():
            assert container.facts()["State"]["ExitCode"] == 0, service
            assert json.loads(container.lines()[-1])["event"] == "stopped", service
        assert stopped_at(containers["proxy"]) < stopped_at(containers["preprocess"]) < stopped_at(containers["predict"])
    finally:
        stack.down()
    assert not any(stack.leftovers().values()), stack.leftovers()


def stopped_at(container: Container) -> str:
    finished: str = container.facts()["State"]["FinishedAt"]
    return finished


def columns_of(rows: Any) -> dict[str, np.ndarray]:
    """What a client sends: a column each, or one array."""
    if not hasattr(rows, "columns"):
        return {"rows": rows}
    return {name: rows[name].to_numpy().reshape(-1, 1) for name in rows.columns}


def rest_inputs(rows: Any) -> list[dict[str, Any]]:
    datatypes = {"f": "FP64", "u": "UINT8", "O": "BYTES"}
    return [
        {
            "name": name,
            "datatype": datatypes[column.dtype.kind],
            "shape": column.shape,
            "data": [None if value != value else value for value in column.ravel().tolist()],
        }
        for name, column in columns_of(rows).items()
    ]


def grpc_input(name: str, column: np.ndarray) -> tritonclient.grpc.InferInput:
    if column.dtype == np.object_:
        column = np.array([["" if value != value else value] for value in column.ravel()], dtype=np.object_)
    tensor = tritonclient.grpc.InferInput(name, list(column.shape), np_to_triton_dtype(column.dtype))
    tensor.set_data_from_numpy(column)
    return tensor


def check(answer: dict[str, np.ndarray], model: Model) -> None:
    rows = model.rows[:N_ROWS]
    labels = [label.decode() if isinstance(label, bytes) else label for label in answer["label"].tolist()]
    assert labels == model.pipeline.predict(rows).tolist()
    np.testing.assert_allclose(answer["probabilities"], model.pipeline.predict_proba(rows), rtol=0, atol=TOLERANCE)
