"""How the peers are started, each in its own environment, with the settings that its authors recommend for throughput."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.processes import StageProcess, SystemSpec, free_port
from benchmarks.venvs import ROOT, python_of

KSERVE, PYTRITON, PLAIN, SINGLE = "KServe", "PyTriton", "plain split", "single process"
HTTP_ECHO, GRPC_ECHO = "HTTP echo", "gRPC echo"

DESCRIPTIONS = {
    KSERVE: "kserve 0.21 SDK: transformer and predictor, a worker each, gRPC v2 between them, no access log",
    PYTRITON: "nvidia-pytriton: a server for the transforms and one for the model, dynamic batching in both (256 rows, no delay)",
    PLAIN: "FastAPI with the transforms in two uvicorn workers (uvloop, httptools, orjson), grpcio on uvloop behind, a call each",
    SINGLE: "FastAPI with both halves in each of two uvicorn workers (uvloop, httptools, orjson, no pydantic models)",
    HTTP_ECHO: "our HTTP server with an echo handler: the lower bound of REST",
    GRPC_ECHO: "grpcio's asyncio server on uvloop with an echo handler: the lower bound of gRPC calls",
}


def _local(port: int) -> str:
    return f"127.0.0.1:{port}"


def _peer(repository: Path, **rest: str) -> dict[str, str]:
    # One thread where we use one: on few cores the others only wait for each other.
    return {"REPOSITORY": str(repository), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **rest}


def _uvicorn(python: str, app: str, port: int, workers: int) -> tuple[str, ...]:
    options = ["--port", str(port), "--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    # By default a worker that takes more than 5 s to import is restarted, on a slow machine endlessly.
    options += ["--workers", str(workers), "--timeout-worker-healthcheck", "120"]
    return (python, "-m", "uvicorn", f"benchmarks.peers.{app}:app", *options)


def kserve(repository: Path) -> SystemSpec:
    python, environment = python_of("kserve"), _peer(repository)
    http, grpc, back_http, back_grpc = (free_port() for _ in range(4))

    def command(program: str, http_port: int, grpc_port: int, *rest: str) -> tuple[str, ...]:
        return (python, "-m", f"benchmarks.peers.{program}", "--http_port", str(http_port), "--grpc_port", str(grpc_port), *rest)

    behind = ("--predictor_host", _local(back_grpc), "--predictor_protocol", "grpc-v2")
    stages = (
        StageProcess("predictor", command("kserve_predictor", back_http, back_grpc), environment),
        StageProcess("transformer", command("kserve_transformer", http, grpc, *behind), environment),
    )
    return SystemSpec(KSERVE, stages, _local(http), _local(grpc))


def pytriton(repository: Path) -> SystemSpec:
    python = python_of("pytriton")
    back, front = [free_port() for _ in range(3)], [free_port() for _ in range(3)]
    environment = _peer(repository, BACK=_local(back[1]), PYTRITON_NO_TELEMETRY="1")
    stages = (
        StageProcess("predictor", (python, "-m", "benchmarks.peers.pytriton_predictor", *map(str, back)), environment),
        StageProcess("transformer", (python, "-m", "benchmarks.peers.pytriton_transformer", *map(str, front)), environment),
    )
    return SystemSpec(PYTRITON, stages, _local(front[0]), _local(front[1]))


def plain(repository: Path) -> SystemSpec:
    python, http, back = python_of("plain"), free_port(), free_port()
    environment = _peer(repository, BACK=_local(back))
    stages = (
        StageProcess("back", (python, "-m", "benchmarks.peers.plain_back", str(back)), environment),
        StageProcess("front", _uvicorn(python, "plain_front", http, 2), environment),
    )
    return SystemSpec(PLAIN, stages, _local(http), "")


def single(repository: Path) -> SystemSpec:
    python, http = python_of("plain"), free_port()
    return SystemSpec(SINGLE, (StageProcess("single", _uvicorn(python, "single", http, 2), _peer(repository)),), _local(http), "")


def http_echo(repository: Path) -> SystemSpec:
    http = free_port()
    command = (sys.executable, "-m", "benchmarks.peers.echo_http", str(http))
    return SystemSpec(HTTP_ECHO, (StageProcess("echo", command, _peer(repository)),), _local(http), "")


def grpc_echo(repository: Path) -> SystemSpec:
    grpc = free_port()
    command = (sys.executable, "-m", "benchmarks.peers.echo_grpc", str(grpc))
    return SystemSpec(GRPC_ECHO, (StageProcess("echo", command, _peer(repository)),), "", _local(grpc))


PEERS: dict[str, Callable[[Path], SystemSpec]] = {
    KSERVE: kserve,
    PYTRITON: pytriton,
    PLAIN: plain,
    SINGLE: single,
    HTTP_ECHO: http_echo,
    GRPC_ECHO: grpc_echo,
}
