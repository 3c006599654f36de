"""Third-party clients work as with any server of the protocol."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.conftest import ENVIRONMENTS, KSERVE, MLSERVER, environment, run_command
from tests.clients.glibc import loader_for
from tests.system.processes import System

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]

TRITON = ("tritonclient[grpc,http]==2.73.0", "aiohttp", "grpcio-reflection", "grpcio-health-checking")
OPEN_INFERENCE = ("open-inference-grpc==2.0.0", "open-inference-openapi==2.0.0.1", "protobuf")
PERF_ANALYZER = ("perf-analyzer==2.60.0", "--no-deps", "--python-platform", f"{platform.machine()}-manylinux_2_38")

Run = Callable[..., str]


@pytest.mark.line("6.3 tritonclient")
@pytest.mark.parametrize("face", ["http", "grpc"])
def test_tritonclient(split: System, run: Run, face: str) -> None:
    """Health, metadata, configuration, statistics, repository, inference in all forms, streams over gRPC."""
    address = split.http if face == "http" else split.grpc

    assert "passed" in run(f"tritonclient_{face}.py", environment("triton", *TRITON), address)


@pytest.mark.line("6.3 each stage")
@pytest.mark.parametrize("program", ["tritonclient_grpc.py", "tools.py"])
@pytest.mark.parametrize("stage", ["preprocess", "predict"])
def test_clients_at_each_stage(split: System, run: Run, stage: str, program: str) -> None:
    """Preprocess and predict are servers of the protocol by themselves."""
    assert "passed" in run(program, environment("triton", *TRITON), getattr(split, stage))


@pytest.mark.line("6.3 tritonclient.aio")
def test_tritonclient_of_asyncio(split: System, run: Run) -> None:
    """Over REST and gRPC, many at once, and on a stream."""
    assert "passed" in run("tritonclient_aio.py", environment("triton", *TRITON), split.http, split.grpc)


@pytest.mark.line("6.3 grpc tools")
def test_a_client_that_knows_only_reflection_and_probes(split: System, run: Run) -> None:
    """As grpcurl and grpc_health_probe ask."""
    assert "passed" in run("tools.py", environment("triton", *TRITON), split.grpc)


@pytest.mark.line("6.3 open-inference")
def test_the_clients_made_from_the_protocols_documents(split: System, run: Run) -> None:
    """Over REST from its OpenAPI document, over gRPC from its proto."""
    assert "passed" in run("generated_clients.py", environment("open-inference", *OPEN_INFERENCE), split.http, split.grpc)


@pytest.mark.line("6.3 kserve")
def test_kserves_clients(split: System, run: Run) -> None:
    """InferenceRESTClient in both protocols, InferenceGRPCClient."""
    assert "passed" in run("kserve_clients.py", environment("kserve", *KSERVE), split.http, split.grpc)


@pytest.mark.line("6.3 mlserver infer")
def test_mlserver_infer(split: System, tmp_path: Path) -> None:
    """Requests of a file, several merged into one. It has an option for gRPC, and answers that it does not support it yet."""
    tensors = [{"name": name, "datatype": "INT32", "shape": [1, 16], "data": list(range(16))} for name in ("INPUT0", "INPUT1")]
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text("".join(json.dumps({"id": str(number), "inputs": tensors}) + "\n" for number in range(8)))

    program = environment("mlserver", *MLSERVER) / "mlserver"
    run_command(
        program, "infer", "--url", split.http, "--model-name", "simple", "--input-data-path", requests,
        "--output-data-path", answers, "--workers", "2", "--batch-size", "2", "--transport", "rest",
    )  # fmt: skip

    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(found) == 8
    assert all(answer["outputs"][0]["data"] == [2 * number for number in range(16)] for answer in found)


def perf_analyzer() -> list[str]:
    """The program inside of the package: its wrapper always exits 0."""
    packages = environment("perf", *PERF_ANALYZER).parent / "lib"
    program = next(packages.glob("python*/site-packages/perf_analyzer/bin/perf_analyzer"))
    return [*loader_for((2, 38), ENVIRONMENTS / "glibc"), str(program)]


LOADS = {
    "closed loop": ("--concurrency-range", "4"),
    "rate": ("--request-rate-range", "100"),
    "batches": ("--concurrency-range", "4", "--async", "-b", "4"),
    "data": ("--concurrency-range", "2", "--input-data", "DATA"),
}


@pytest.mark.line("6.3 perf_analyzer")
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("face", ["http", "grpc"])
def test_perf_analyzer(split: System, tmp_path: Path, face: str, load: str) -> None:
    """The load generator that people know: it reads configuration and statistics before it sends."""
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"data": [{"INPUT0": [number] * 16, "INPUT1": list(range(16))} for number in range(4)]}))
    options = [str(data) if option == "DATA" else option for option in LOADS[load]]

    assert "Throughput" in measured(split, "simple", face, *options)


@pytest.mark.line("6.3 perf_analyzer")
def test_perf_analyzer_on_a_stream(split: System) -> None:
    """Many requests on one ModelStreamInfer, answers matched by id."""
    assert "Throughput" in measured(split, "simple", "grpc", "--async", "--streaming", "--concurrency-range", "4")


@pytest.mark.line("6.3 perf_analyzer")
@pytest.mark.parametrize("face", ["http", "grpc"])
@pytest.mark.parametrize(
    ("model", "options"),
    [("simple_identity", ("--string-length", "16", "--shape", "INPUT0:2")), ("custom_identity_int32", ("--shape", "INPUT0:64"))],
)
def test_perf_analyzer_with_text_and_with_sizes_that_vary(split: System, model: str, face: str, options: tuple[str, ...]) -> None:
    """BYTES, and a dimension that the caller chooses."""
    assert "Throughput" in measured(split, model, face, "--concurrency-range", "2", *options)


def measured(split: System, model: str, face: str, *options: str) -> str:
    """What perf_analyzer prints of a hundred requests."""
    address = split.http if face == "http" else split.grpc
    return run_command(*perf_analyzer(), "-m", model, "-u", address, "-i", face, "--request-count", "100", *options)
