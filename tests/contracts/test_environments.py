"""Each service runs in an environment that holds its own lock and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.demo_models import Demos
from tests.system.processes import Process

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")

SERVICES = {
    "proxy": ("proxy", {"numpy", "sklearn", "skops", "pandas", "onnxruntime", "onnx"}),
    "preprocess": ("preprocess_service", {"onnxruntime", "onnx", "skl2onnx", "jwt"}),
    "predict": ("predict_service", {"sklearn", "skops", "pandas", "scipy", "jwt"}),
    "jobs": ("jobs_service", {"numpy", "sklearn", "onnxruntime", "jwt", "psycopg"}),
}
"""The module of each service, and what its environment must not hold."""


@pytest.fixture(params=SERVICES)
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """An environment made from a service's lock alone; its name and its Python."""
    python = tmp_path / "venv" / "bin" / "python"
    lock = ROOT / "requirements" / f"{request.param}.txt"
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    subprocess.run([UV, "pip", "install", "--quiet", "--require-hashes", "--python", python, "-r", lock], check=True)
    return request.param, python


def test_a_service_starts_with_its_own_lock_alone(environment: tuple[str, Path], demos: Demos, tmp_path: Path) -> None:
    """It listens and loads its bundles; what the other services need is not there."""
    name, python = environment
    module, foreign = SERVICES[name]
    prefix = name.upper()

    process = Process(
        module,
        {
            "MODEL_REPOSITORY": str(demos.repository),
            "PYTHONPATH": str(ROOT),
            f"{prefix}_GRPC_PORT": "0",
            f"{prefix}_HTTP_PORT": "0",
            "JOBS_DIR": str(tmp_path / "jobs"),
        },
        python,
    )
    process.wait_for("listening" if name in ("proxy", "jobs") else "bundle loaded")
    found = subprocess.run(
        [python, "-c", f"import importlib.util as u; print({{n for n in {foreign!r} if u.find_spec(n)}})"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()

    assert process.stop() == 0
    assert found == "set()"
