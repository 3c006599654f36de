"""Clients of other makers do everything that they do against any server of the protocol."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.conftest import environment, run_command
from tests.system.processes import System

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]

TRITON = ("tritonclient[grpc,http]==2.73.0", "aiohttp", "grpcio-reflection", "grpcio-health-checking")
PERF_ANALYZER = "perf-analyzer==2.60.0"
KSERVE = "kserve==0.21.0"
MLSERVER = "mlserver==1.7.1"

Run = Callable[..., str]


@pytest.mark.line("6.3 tritonclient")
@pytest.mark.parametrize("face", ["http", "grpc"])
def test_tritonclient(split: System, run: Run, face: str) -> None:
    """Health, metadata, configuration, statistics, repository, inference in all forms, streams over gRPC."""
    address = split.http if face == "http" else split.grpc

    assert "passed" in run(f"tritonclient_{face}.py", environment("triton", *TRITON), address)


@pytest.mark.line("6.3 tritonclient.aio")
def test_tritonclient_of_asyncio(split: System, run: Run) -> None:
    """Over REST and gRPC, many at once, and on a stream."""
    assert "passed" in run("tritonclient_aio.py", environment("triton", *TRITON), split.http, split.grpc)


@pytest.mark.line("6.3 grpc tools")
def test_a_client_that_knows_only_reflection_and_probes(split: System, run: Run) -> None:
    """As grpcurl and grpc_health_probe ask."""
    assert "passed" in run("tools.py", environment("triton", *TRITON), split.grpc)


@pytest.mark.line("6.3 kserve")
def test_kserves_clients(split: System, run: Run) -> None:
    """InferenceRESTClient in both protocols, InferenceGRPCClient."""
    assert "passed" in run("kserve_clients.py", environment("kserve", KSERVE), split.http, split.grpc)


@pytest.mark.line("6.3 mlserver infer")
@pytest.mark.parametrize("transport", ["rest", "grpc"])
def test_mlserver_infer(split: System, tmp_path: Path, transport: str) -> None:
    """Requests of a file, several merged into one."""
    tensors = [{"name": name, "datatype": "INT32", "shape": [1, 16], "data": list(range(16))} for name in ("INPUT0", "INPUT1")]
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text("".join(json.dumps({"id": str(number), "inputs": tensors}) + "\n" for number in range(8)))
    address = split.http if transport == "rest" else split.grpc

    program = environment("mlserver", MLSERVER) / "mlserver"
    run_command(
        program, "infer", "--url", address, "--model-name", "simple", "--input-data-path", requests,
        "--output-data-path", answers, "--workers", "2", "--batch-size", "2", "--transport", transport,
    )  # fmt: skip

    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(found) == 8
    assert all(answer["outputs"][0]["data"] == [2 * number for number in range(16)] for answer in found)


def perf_analyzer() -> Path:
    """The program inside of the package: its wrapper always exits 0."""
    libc = ctypes.CDLL("libc.so.6")
    libc.gnu_get_libc_version.restype = ctypes.c_char_p
    if tuple(map(int, libc.gnu_get_libc_version().split(b"."))) < (2, 38):
        pytest.skip("perf_analyzer is built for glibc 2.38 and newer")
    packages = environment("perf", PERF_ANALYZER).parent / "lib"
    return next(packages.glob("python*/site-packages/perf_analyzer/bin/perf_analyzer"))


@pytest.mark.line("6.3 perf_analyzer")
@pytest.mark.parametrize("load", [("--concurrency-range", "4"), ("--request-rate-range", "100")], ids=["closed loop", "rate"])
@pytest.mark.parametrize("face", ["http", "grpc"])
def test_perf_analyzer(split: System, face: str, load: tuple[str, str]) -> None:
    """The load generator that people know: it reads configuration and statistics before it sends."""
    address = split.http if face == "http" else split.grpc
    window = ("--request-count", "100")

    output = run_command(perf_analyzer(), "-m", "simple", "-u", address, "-i", face, *load, *window)

    assert "Throughput" in output
