"""The services started as KServe starts containers: with its arguments, and models where its storage initializer puts them."""

from __future__ import annotations

from splitserve import Client
from tests.demo_models import Demos
from tests.system.processes import Process, wait_until

MODEL = "breast-cancer"


def test_both_halves_serve_a_model_by_kserves_arguments(demos: Demos) -> None:
    """Predict has one bundle, preprocess the model's folder; callers reach the transformer over gRPC."""
    folder = demos.repository / MODEL
    common = [f"--model_name={MODEL}", "--http_port=8080", "--grpc_port=0"]
    predict = Process(
        "predict_service",
        {"PREDICT_ALLOW_UNRELEASED_PAIRS": "true"},
        arguments=[*common, f"--model_dir={folder / 'predict' / '1'}"],
    )
    processes = [predict]
    try:
        host = f"127.0.0.1:{predict.wait_for('listening')['grpc_port']}"
        arguments = [*common, f"--model_dir={folder}", "--predictor_host", host, "--predictor_protocol", "grpc-v2"]
        preprocess = Process("preprocess_service", {"PREPROCESS_REFRESH_INTERVAL_S": "0.1"}, arguments=arguments)
        processes.append(preprocess)
        with Client(f"127.0.0.1:{preprocess.wait_for('listening')['grpc_port']}") as client:
            wait_until(lambda: client.is_model_ready(MODEL), "the pair is ready")
            answer = client.infer(MODEL, demos.models[MODEL].rows[:3])
    finally:
        codes = [process.stop() for process in reversed(processes)]

    assert answer.version == "1.1"
    assert answer["label"].tolist() == demos.models[MODEL].pipeline.predict(demos.models[MODEL].rows[:3]).tolist()
    assert codes == [0, 0]
