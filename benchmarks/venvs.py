"""An environment for each peer, made once, in ``.venv-peers``. Numerical libraries have the same versions as in our services."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from benchmarks.processes import BenchmarkError

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-peers"

COMPUTE = tuple(f"{name}=={version(name)}" for name in ("scikit-learn", "onnxruntime", "skops"))


class Environment(NamedTuple):
    """The environment of a peer."""

    python: str
    packages: tuple[str, ...]


ENVIRONMENTS = {
    "kserve": Environment(sys.executable, ("kserve==0.21.0", "pandas", *COMPUTE)),
    # Triton's Python backend comes built for the CPython of distributions and does not start under others' builds.
    "pytriton": Environment("/usr/bin/python3", ("nvidia-pytriton==0.7.0", *COMPUTE)),
    "mlserver": Environment(sys.executable, ("mlserver==1.7.1", "mlserver-sklearn==1.7.1", "pandas", *COMPUTE)),
    "mlflow": Environment(sys.executable, ("mlflow==3.13.0", *COMPUTE)),
    "plain": Environment(
        sys.executable,
        ("fastapi==0.165.0", "orjson==3.13.0", "uvicorn[standard]==0.54.0", "grpcio", "protobuf", "pandas", *COMPUTE),
    ),
}


def python_of(name: str) -> str:
    """The interpreter of an environment, which is made if it is not there or not as it should be.

    Raises:
        BenchmarkError: it cannot be made.
    """
    environment = ENVIRONMENTS[name]
    if not Path(environment.python).exists():
        raise BenchmarkError(f"{name} needs {environment.python} (Debian: apt-get install python3)")
    folder = FOLDER / name
    stamp, wanted = folder / ".installed", repr(environment)
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"making {folder.relative_to(ROOT)}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        _uv("venv", "--python", environment.python, str(folder))
        _uv("pip", "install", "--python", str(folder / "bin" / "python"), *environment.packages)
        stamp.write_text(wanted)
    return str(folder / "bin" / "python")


def _uv(*arguments: str) -> None:
    uv = Path(sys.executable).with_name("uv")
    done = subprocess.run([str(uv), "--quiet", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"uv {arguments[0]} failed: {done.stderr}")
