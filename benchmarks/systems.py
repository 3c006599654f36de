"""How our own services are started."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.processes import BenchmarkError, RunningSystem, StageProcess, SystemSpec, free_port

Settings = Mapping[str, str]

_ADMIN = {f"{service}_ADMIN_PORT": "0" for service in ("PROXY", "PREPROCESS", "PREDICT", "JOBS")}
"""Admin listeners are open, as they are by default."""


def split(repository: Path, settings: Settings, name: str = "splitserve") -> SystemSpec:
    """Predict, preprocess and proxy, each a process."""
    http, grpc, preprocess, predict = (free_port() for _ in range(4))
    common = {"MODEL_REPOSITORY": str(repository), "LOG_FORMAT": "json", "LOG_LEVEL": "warning", **_ADMIN, **settings}
    stages = (
        _stage("predict", "predict_service", {**common, "PREDICT_GRPC_PORT": str(predict)}),
        _stage(
            "preprocess",
            "preprocess_service",
            {**common, "PREPROCESS_GRPC_PORT": str(preprocess), "PREPROCESS_PREDICT_TARGET": f"127.0.0.1:{predict}"},
        ),
        _stage(
            "proxy",
            "proxy",
            {
                **common,
                "PROXY_HTTP_PORT": str(http),
                "PROXY_GRPC_PORT": str(grpc),
                "PROXY_PREPROCESS_TARGET": f"127.0.0.1:{preprocess}",
            },
        ),
    )
    return SystemSpec(name, stages, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}")


def with_jobs(repository: Path, folder: Path, settings: Settings, name: str = "splitserve jobs") -> SystemSpec:
    """`split`, and the jobs service with SQLite in ``folder``."""
    jobs = str(free_port())
    spec = split(repository, {"PROXY_JOBS_TARGET": f"127.0.0.1:{jobs}", **settings}, name)
    environment = {
        "LOG_FORMAT": "json",
        "LOG_LEVEL": "warning",
        "JOBS_DIR": str(folder),
        **_ADMIN,
        "JOBS_GRPC_PORT": jobs,
        "JOBS_PROXY_TARGET": spec.grpc,
        **settings,
    }
    return spec._replace(stages=(*spec.stages, _stage("jobs", "jobs_service", environment)))


def fused(repository: Path, settings: Settings, name: str = "splitserve fused") -> SystemSpec:
    """All in one process."""
    http, grpc = free_port(), free_port()
    ports = {"PROXY_HTTP_PORT": str(http), "PROXY_GRPC_PORT": str(grpc)}
    environment = {
        "MODEL_REPOSITORY": str(repository),
        "LOG_FORMAT": "json",
        "LOG_LEVEL": "warning",
        **_ADMIN,
        **settings,
        **ports,
    }
    return SystemSpec(name, (_stage("fused", "fused_service", environment),), f"127.0.0.1:{http}", f"127.0.0.1:{grpc}")


def _stage(name: str, module: str, environment: Settings) -> StageProcess:
    return StageProcess(name, (sys.executable, "-m", module), environment)


def wait_until_ready(system: RunningSystem, models: Sequence[str]) -> float:
    """Seconds from the start of the processes until the proxy reports every one of these models as ready."""
    waiting = list(models)

    def are_ready() -> bool:
        while waiting and _is_ready(system.http, waiting[0]):
            waiting.pop(0)
        return not waiting

    return system.wait_until(are_ready, "waiting for its models")


def _is_ready(address: str, model: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/v2/models/{model}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """Environment variables written as ``NAME=VALUE``.

    Raises:
        BenchmarkError: one is not.
    """
    pairs = [text.partition("=") for text in texts]
    if wrong := next((name for name, sign, _ in pairs if not (name and sign)), None):
        raise BenchmarkError(f'--set "{wrong}": expected NAME=VALUE')
    return {name: value for name, _, value in pairs}
