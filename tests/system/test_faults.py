"""What a system does when a bundle is broken, a request is bad, or a service is gone."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from splitserve import Client, publish_predictor, publish_preprocessor, release
from splitserve.errors import InvalidInput, NotFound, Unavailable
from splitserve.repository.manifest import Postprocess
from tests.demo_models import Demos
from tests.system.models import softmax_model
from tests.system.processes import UNRELEASED, System, wait_until

PREDICT = "/v1/models/{}:predict"


@pytest.fixture(scope="module")
def repository(demos: Demos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo models, and bundles that are broken, unpaired or do not fit."""
    root = tmp_path_factory.mktemp("faults") / "models"
    shutil.copytree(demos.repository, root)
    shutil.copytree(root / "digits", root / "damaged")
    for half in ("preprocess", "predict"):
        manifest = root / "damaged" / half / "1" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"digits"', '"damaged"'))
    shutil.rmtree(root / "damaged" / "releases")
    release("damaged", "1.1", repository=root)
    model = root / "damaged" / "predict" / "1" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"\x00")
    scaler = demos.models["breast-cancer"].pipeline[:-1]
    rows = demos.models["breast-cancer"].rows
    publish_preprocessor(scaler, rows, name="halved", repository=root)
    publish_predictor(softmax_model(30), np.zeros((2, 30), np.float32), name="headless", repository=root)
    publish_preprocessor(scaler, rows, name="misfit", repository=root)
    publish_predictor(softmax_model(29), np.zeros((2, 29), np.float32), name="misfit", repository=root)
    publish_preprocessor(scaler, rows, name="unlabelled", repository=root, postprocess=Postprocess("nothing"), labels=["a", "b"])
    publish_predictor(softmax_model(30), np.zeros((2, 30), np.float32), name="unlabelled", repository=root)
    return root


@pytest.fixture(scope="module", params=["split", "fused"])
def system(request: pytest.FixtureRequest, repository: Path) -> Iterator[System]:
    running = System(repository, is_fused=request.param == "fused", **UNRELEASED).wait_until_settled()
    yield running
    running.stop()


def rows_of(n_features: int) -> dict[str, Any]:
    return {"instances": [[0.5] * n_features]}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("damaged", "damaged/predict/1: model.onnx: expected sha256"),
        ("halved", "it has a preprocessor but no predictor"),
        ("headless", "it has a predictor but no preprocessor"),
        ("misfit", '"features": expected 29 in dimension 1, the preprocessor produces 30'),
        ("unlabelled", 'the postprocess step: expected a predictor output "nothing", got none'),
    ],
)
def test_the_error_for_a_model_that_cannot_serve_has_the_reason(system: System, model: str, reason: str) -> None:
    """It is known and not ready: 503 and UNAVAILABLE with the reason, on every face; other models are served."""
    status, answer = system.rest(PREDICT.format(model), rows_of(30))
    ready_status, ready = system.rest(f"/v2/models/{model}/ready")
    with Client(system.grpc, max_attempts=1) as client, pytest.raises(Unavailable) as raised:
        client.infer(model, {"features": np.zeros((1, 30))})

    assert (status, ready_status) == (503, 503)
    assert reason in answer["error"]
    assert reason in ready["error"]
    assert reason in str(raised.value)
    assert system.rest(PREDICT.format("breast-cancer"), rows_of(30))[0] == 200


def test_the_index_lists_what_is_refused_and_why(system: System) -> None:
    """`splitserve health` and RepositoryIndex show every model, ready or not."""
    from splitserve.api.inference import inference_pb2 as pb

    with grpc.insecure_channel(system.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/RepositoryIndex")
        index = pb.RepositoryIndexResponse.FromString(call(b""))

    states = {(entry.name, entry.version): entry.state for entry in index.models}
    assert states[("breast-cancer", "1.1")] == "READY"
    assert states[("misfit", "1.1")] == "UNAVAILABLE"
    assert states[("halved", "")] == "UNAVAILABLE"


BAD_REQUESTS = {
    "unknown model": ("/v2/models/nope/infer", {"inputs": []}, 404, "Request for unknown model: 'nope'", "proxy"),
    "unknown pair": ("/v2/models/digits/versions/7.1/infer", {"inputs": []}, 404, "version 7.1", "proxy"),
    "not a pair": ("/v2/models/digits/versions/v1/infer", {"inputs": []}, 404, 'a pair is written "K.M"', "proxy"),
    "missing input": ("/v2/models/digits/infer", {"inputs": []}, 400, 'missing input "image"', "proxy"),
    "wrong shape": (
        "/v2/models/digits/infer",
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 8, 9], "data": [0] * 72}]},
        400,
        'input "image": expected shape [-1, 8, 8], got [1, 8, 9]',
        "proxy",
    ),
    "wrong datatype": (
        "/v2/models/digits/infer",
        {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 8, 8], "data": [0] * 64}]},
        400,
        'input "image": expected datatype UINT8, got FP32',
        "proxy",
    ),
    "wrong length": (
        "/v2/models/digits/infer",
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 8, 8], "data": [0] * 63}]},
        400,
        'input "image": shape [1, 8, 8] needs 64 elements, got 63',
        "proxy",
    ),
    "a value that the transforms leave missing": (
        PREDICT.format("breast-cancer"),
        {"instances": [[0.5] * 30, [None] * 30]},
        400,
        "row 1: the features contain a missing or infinite value",
        "preprocess",
    ),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_answered_with_reason_and_stage(system: System, case: str) -> None:
    """The message names the thing, what was expected and what was received; `stage` names the service that found it."""
    path, content, status, message, stage = BAD_REQUESTS[case]

    found_status, answer = system.rest(path, content)

    assert found_status == status
    assert message in answer["error"]
    assert answer["stage"] == stage


def test_grpc_status_details_have_the_same_facts(system: System) -> None:
    """`google.rpc.ErrorInfo` carries reason, domain, stage, model and pair across the hops."""
    info = error_info(system, np.full((1, 30), np.nan))
    assert (info.reason, info.domain) == ("INVALID_INPUT", "splitserve")
    assert dict(info.metadata) == {"stage": "preprocess", "model": "breast-cancer", "pair": "1.1"}


def error_info(system: System, features: np.ndarray) -> error_details_pb2.ErrorInfo:
    """What the details of the failed call say."""
    from splitserve.arrays import from_array
    from splitserve.oip import protobuf
    from splitserve.oip.messages import InferRequest

    message = protobuf.encode_request(InferRequest("breast-cancer", (from_array("features", features),)))
    with grpc.insecure_channel(system.grpc) as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(message.SerializeToString())
    trailing = dict(raised.value.trailing_metadata())
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(trailing["grpc-status-details-bin"]).details[0].Unpack(info)
    return info


def test_the_client_raises_the_servers_classes(system: System) -> None:
    """An error is the same class on both sides of the wire, with its stage."""
    with Client(system.grpc) as client:
        with pytest.raises(NotFound):
            client.infer("nope", {})
        with pytest.raises(InvalidInput) as raised:
            client.infer("breast-cancer", {"features": np.full((1, 30), np.inf)})

    assert (raised.value.stage, raised.value.model, raised.value.pair) == ("preprocess", "breast-cancer", "1.1")


def test_without_predict_the_other_services_are_not_ready(demos: Demos) -> None:
    """Calls fail at once and name the stage, readiness gives the reason, and no other service needs a restart."""
    system = System(demos.repository).wait_until_settled()
    try:
        port = int(system.processes["predict"].wait_for("listening")["grpc_port"])
        system.processes["predict"].signal(signal.SIGKILL)
        system.processes["predict"].wait()

        status, answer = system.rest(PREDICT.format("breast-cancer"), rows_of(30))
        wait_until(lambda: system.rest("/v2/health/ready")[0] == 503, "not ready")
        _, ready = system.rest("/v2/health/ready")
        live, _ = system.rest("/v2/health/live")
        system.start_predict(port)
        wait_until(lambda: system.rest("/v2/health/ready")[0] == 200, "ready again")

        assert (status, answer["stage"], answer["reason"]) == (503, "predict", "UNAVAILABLE")
        assert "the predict service cannot be reached" in ready["error"]
        assert live == 200
        assert system.rest(PREDICT.format("breast-cancer"), rows_of(30))[0] == 200
    finally:
        system.stop()


def test_a_wrong_setting_stops_a_service_before_it_listens(demos: Demos) -> None:
    """Exit status 2 and the variable's name."""
    from tests.system.processes import Process

    process = Process("predict_service", {"PREDICT_GRPC_PORT": "many", "PREDICT_WORKERS": "0"})

    assert process.wait() == 2
    assert any(line.startswith("PREDICT_GRPC_PORT: ") for line in process.lines)
    assert any(line.startswith("PREDICT_WORKERS: ") for line in process.lines)


def test_a_port_in_use_stops_a_service_and_is_named(system: System, demos: Demos) -> None:
    """One line with the address, no traceback."""
    from tests.system.processes import Process

    port = system.grpc.rpartition(":")[2]

    process = Process("predict_service", {"PREDICT_GRPC_PORT": port, "MODEL_REPOSITORY": str(demos.repository)})

    assert process.wait() == 1
    assert any(f"cannot listen on 127.0.0.1:{port}" in line for line in process.lines)
    assert not any("Traceback" in line for line in process.lines)


def test_a_bundle_published_while_the_system_runs_is_served(demos: Demos, tmp_path: Path) -> None:
    """The services follow the repository; the newest pair that fits is the default."""
    shutil.copytree(demos.repository, tmp_path / "models")
    system = System(tmp_path / "models", PREPROCESS_REFRESH_INTERVAL_S="0.1", PREDICT_REFRESH_INTERVAL_S="0.1")
    try:
        system.wait_until_settled()
        demo = demos.models["breast-cancer"]

        publish_preprocessor(demo.pipeline[:-1], demo.rows, name="breast-cancer", repository=tmp_path / "models")
        release("breast-cancer", "2.1", repository=tmp_path / "models")
        wait_until(lambda: "2.1" in system.rest("/v2/models/breast-cancer")[1]["versions"], "pair 2.1")
        _, answer = system.rest(
            "/v2/models/breast-cancer/infer",
            {"inputs": [{"name": "features", "datatype": "FP64", "shape": [1, 30], "data": [0.5] * 30}]},
        )

        assert answer["model_version"] == "2.1"
    finally:
        system.stop()
