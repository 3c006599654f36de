"""Third-party programs against a running split system; each has its own environment in .venv-clients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from splitserve.publishing.simple_models import publish_all
from tests.system.processes import System

ENVIRONMENTS = Path(".venv-clients").resolve()
PROGRAMS = Path(__file__).parent / "programs"
TIMEOUT_S = 240

KSERVE = ("kserve==0.21.0", "onnxruntime==1.22.1")
MLSERVER = ("mlserver==1.7.1", "onnxruntime==1.22.1")
"""The clients are in the package of the server, which runs an ONNX model too."""


@pytest.fixture(scope="session")
def simple_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("simple")
    assert list(publish_all(repository))
    return repository


@pytest.fixture(scope="session")
def split(simple_models: Path) -> Iterator[System]:
    system = System(simple_models, ALLOW_REPOSITORY_CONTROL="true")
    system.wait_until_settled()
    yield system
    system.stop()


def environment(name: str, *packages: str) -> Path:
    """The folder of programs of an environment with these packages; made once."""
    home = ENVIRONMENTS / name
    done = home / "installed"
    wanted = "\n".join(packages)
    if not done.exists() or done.read_text() != wanted:
        uv = Path(sys.executable).with_name("uv")
        subprocess.run([uv, "venv", "--quiet", "--clear", home], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", home / "bin" / "python", *packages], check=True)
        done.write_text(wanted)
    return home / "bin"


@pytest.fixture
def run() -> Callable[..., str]:
    """Runs a program of ours in an environment; gives what it printed, or fails with that."""

    def run_program(program: str, bin_: Path, *arguments: str) -> str:
        return run_command(bin_ / "python", PROGRAMS / program, *arguments)

    return run_program


def run_command(*command: str | Path) -> str:
    """What a command printed; fails with that if the command does."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
