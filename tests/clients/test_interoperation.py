"""Predict replaced by third-party servers of the same ONNX model: the answers are the same."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from splitserve import Client
from splitserve.api.inference import inference_pb2 as pb
from splitserve.oip.protobuf import SERVICE
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.signature import TensorSpec
from tests.clients.conftest import KSERVE, MLSERVER, PROGRAMS, environment, run_command
from tests.demo_models import Demos
from tests.system.processes import PATIENCE_S, UNRELEASED, System, free_ports, wait_until

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]

PEERS = Path(__file__).parent / "peers"
MANIFESTS = sorted(Path("deploy/kserve").glob("*.yaml"))
MODEL = "breast-cancer"


@pytest.fixture(scope="session")
def expected(demos: Demos) -> dict[str, np.ndarray[Any, Any]]:
    """What our own predict gives."""
    system = System(demos.repository)
    try:
        return answer(system.wait_until_settled(), demos, "1.1")
    finally:
        system.stop()


def answer(system: System, demos: Demos, pair: str) -> dict[str, np.ndarray[Any, Any]]:
    with Client(system.grpc) as client:
        found = client.infer(MODEL, demos.models[MODEL].rows[:50])
        assert found.version == pair
        return {name: found[name] for name in found}


def mlserver(demos: Demos, folder: Path, version: str) -> tuple[list[str | Path], int]:
    """The command of an MLServer with the model, and its gRPC port."""
    http_port, grpc_port, metrics_port = free_ports(3)
    bundle = Repository(demos.repository).open(BundleKey(MODEL, "predict", 1))
    settings = {
        "host": "127.0.0.1", "http_port": http_port, "grpc_port": grpc_port, "metrics_port": metrics_port, "parallel_workers": 0,
    }  # fmt: skip
    model = {
        "name": MODEL,
        "implementation": "mlserver_onnx.OnnxModel",
        "inputs": tensors(bundle.manifest.inputs),
        "outputs": tensors(bundle.manifest.outputs),
        "parameters": {"uri": str(bundle.folder / "model.onnx"), **({"version": version} if version else {})},
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    return [environment("mlserver", *MLSERVER) / "mlserver", "start", folder], grpc_port


def kserve(demos: Demos, folder: Path, version: str) -> tuple[list[str | Path], int]:
    """The command of KServe's Python server with the model, and its gRPC port. It has no versions, and no index."""
    http_port, grpc_port = free_ports(2)
    bundle = Repository(demos.repository).open(BundleKey(MODEL, "predict", 1))
    signature = json.dumps({"inputs": tensors(bundle.manifest.inputs), "outputs": tensors(bundle.manifest.outputs)})
    python = environment("kserve", *KSERVE) / "python"
    ports = [f"--http_port={http_port}", f"--grpc_port={grpc_port}"]
    return [python, PEERS / "kserve_onnx.py", MODEL, bundle.folder / "model.onnx", signature, *ports], grpc_port


def tensors(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
    return [{"name": spec.name, "datatype": spec.datatype, "shape": list(spec.wire_shape)} for spec in specs]


@contextmanager
def running(command: list[str | Path], port: int, folder: Path) -> Iterator[str]:
    """Run a server in the place of predict; gives its address when it is ready."""
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": str(PEERS)}, start_new_session=True
        )
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            is_ready = channel.unary_unary(f"/{SERVICE}/ModelReady", response_deserializer=pb.ModelReadyResponse.FromString)

            def look() -> bool:
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    return bool(is_ready(pb.ModelReadyRequest(name=MODEL).SerializeToString()).ready)
                except grpc.RpcError:
                    return False

            wait_until(look, "the model is ready at the other server")
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.line("6.3 predict of others")
@pytest.mark.parametrize(
    ("server", "version", "pair"), [(mlserver, "", "1.0"), (mlserver, "3", "1.3"), (kserve, "", "1.0")],
    ids=["mlserver", "mlserver with a version", "kserve"],
)  # fmt: skip
def test_other_servers_can_replace_predict(
    demos: Demos, expected: dict[str, np.ndarray[Any, Any]], tmp_path: Path, server: Any, version: str, pair: str
) -> None:
    """It has no manifest, no health service and no stream; the preprocessor is checked against its metadata."""
    command, port = server(demos, tmp_path, version)

    with running(command, port, tmp_path) as address:
        system = System(demos.repository, predict=address, MODELS=MODEL, **UNRELEASED)
        try:
            wait_until(lambda: system.rest(f"/v2/models/{MODEL}/ready")[0] == 200, "the pair is ready")
            found = answer(system, demos, pair)
        finally:
            system.stop()

    assert found.keys() == expected.keys()
    for name in expected:
        if expected[name].dtype.kind == "f":
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert found[name].tolist() == expected[name].tolist()


@pytest.mark.line("kserve manifests")
def test_the_manifests_for_kserve_are_valid() -> None:
    """By the models of KServe's Python client, which are made of the schema that its custom resources have."""
    assert MANIFESTS

    assert "passed" in check_manifests(*MANIFESTS)


@pytest.mark.line("kserve manifests")
@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("readinessProbe", "readynessProbe", "V1Container has no readynessProbe"),
        ("containerPort: 8081", 'containerPort: "8081"', "containerPort: '8081' is no int"),
        ("  predictor:", "  predict:", "V1beta1InferenceServiceSpec has no predict"),
    ],
)
def test_a_manifest_that_kserve_would_refuse_is_found(tmp_path: Path, right: str, wrong: str, message: str) -> None:
    """The check above can fail."""
    broken = tmp_path / "broken.yaml"
    broken.write_text(Path("deploy/kserve/inference-service.yaml").read_text().replace(right, wrong))

    with pytest.raises(AssertionError, match=re.escape(message)):
        check_manifests(broken)


def check_manifests(*files: Path) -> str:
    return run_command(environment("kserve", *KSERVE) / "python", PROGRAMS / "kserve_manifests.py", *files)
