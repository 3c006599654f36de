"""Programs of users under type checkers: what is right is accepted, mistakes are found."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import splitserve
from tests.clients.conftest import ENVIRONMENTS

PROGRAMS = Path(__file__).parent / "typed"


def mistakes_in(name: str) -> set[int]:
    """The lines of a program that are wrong."""
    lines = (PROGRAMS / name).read_text().splitlines()
    return {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}


def check(command: list[str | Path], folder: Path, name: str) -> tuple[set[int], str]:
    """The lines that a checker complains about, and all that it says."""
    shutil.copy(PROGRAMS / name, folder)
    done = subprocess.run([*command, name], cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    found = re.findall(rf"{name}:(\d+)(?::\d+)?(?: -)?:? error", done.stdout)
    return set(map(int, found)), done.stdout + done.stderr


MYPY = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", ".cache"]


def test_the_package_says_that_it_has_types() -> None:
    """Without this file checkers ignore them. Source: PEP 561."""
    assert Path(splitserve.__file__).with_name("py.typed").exists()


@pytest.mark.heavy
def test_mypy(tmp_path: Path) -> None:
    """Strictly."""
    found, said = check([*MYPY], tmp_path, "good.py")
    assert "error" not in said, said
    assert found == set()

    found, said = check([*MYPY], tmp_path, "bad.py")
    assert found == mistakes_in("bad.py"), said


@pytest.mark.intermediaries  # which installs packages of npm
def test_pyright(tmp_path: Path) -> None:
    """Strictly."""
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict", "reportMissingModuleSource": false}')
    pyright = [ENVIRONMENTS / "node" / "node_modules" / ".bin" / "pyright", "--pythonpath", sys.executable]
    found, said = check([*pyright], tmp_path, "good.py")
    assert found == set(), said

    found, said = check([*pyright], tmp_path, "bad.py")
    assert found >= mistakes_in("bad.py"), said
