"""Portable bundles that were published with each minor version of scikit-learn, served in one environment."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("portable_everywhere.py")
UV = Path(sys.executable).with_name("uv")
HERE = ".".join(version("scikit-learn").split(".")[:2])
VERSIONS = ["1.6", "1.7", "1.8", HERE]

PROCESSORS: dict[str, dict[str, str]] = {
    "this processor": {},
    "an old processor": {"NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX2 FMA3", "OPENBLAS_CORETYPE": "Nehalem"},
    "another kernel": {"OPENBLAS_CORETYPE": "Haswell"},
}


def run(python: Path | str, verb: str, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    command = [python, "-W", "ignore", PROGRAM, verb, folder]
    done = subprocess.run(
        command, env={**os.environ, **environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = msgspec.json.decode(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module", params=VERSIONS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """In an environment of its own with this version of scikit-learn, and the newest of all else that it works with."""
    folder = tmp_path_factory.mktemp(f"with-{request.param}")
    (folder / "constraint.txt").write_text(f"scikit-learn=={request.param}.*\n")
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    install = [UV, "pip", "install", "--quiet", "--only-binary", ":all:", "--python", python]
    subprocess.run(
        [*install, "-r", ROOT / "pyproject.toml", "--extra", "publish", "--constraint", folder / "constraint.txt"], check=True
    )
    return folder, run(python, "publish", folder, {})


def test_every_bundle_is_portable(published: tuple[Path, dict[str, Any]]) -> None:
    """Whatever the version: the planner knows its attributes, and the plan equals its arithmetic."""
    _, made = published

    assert {name: reason for name, (portable, reason, *_) in made["counts"].items() if not portable} == {}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_its_answers_here_are_those_of_the_scikit_learn_that_published(
    published: tuple[Path, dict[str, Any]], processor: str
) -> None:
    """On more than 10,000 hard rows, alone: bits of exact operations, 4 units in the last place of rounded ones, and the same
    rows refused; without scikit-learn, skops, pandas or SciPy.
    """
    folder, _ = published

    found = run(sys.executable, "check", folder, PROCESSORS[processor])

    assert found["differ"] == {}
    assert found["imported"] == []
    assert found["rows"] > 10_000
