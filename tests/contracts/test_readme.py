"""The README's examples, run as they stand against a running system."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.demo_models import Demos
from tests.system.processes import System, wait_until

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.xdist_group("readme")


@pytest.fixture(scope="module")
def folder(demos: Demos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user would stand: a clone with its ``.venv`` and ``./models``."""
    clone = tmp_path_factory.mktemp("clone")
    shutil.copytree(demos.repository, clone / "models")
    (clone / "examples").symlink_to(ROOT / "examples")
    (clone / ".venv").symlink_to(Path(sys.executable).parents[1])
    return clone


@pytest.fixture(scope="module")
def system(folder: Path) -> System:
    running = System(folder / "models", is_fused=True, JOBS_DIR=str(folder / "jobs")).wait_until_settled()
    yield running
    running.stop()


def run(system: System, folder: Path, language: str, code: str) -> str:
    """What a block prints; its addresses are those of the system under test."""
    code = code.replace("127.0.0.1:8000", system.http).replace("127.0.0.1:8001", system.grpc)
    for command in ("infer", "jobs submit"):
        code = code.replace(f"splitserve {command}", f"splitserve {command} --url {system.grpc}")
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


EXPECTED = [
    ("V1 records", '"label":"Adelie"'),
    ("V2 tensors", '"data":[0]'),
    ("our client", "[1 1]"),
    ("tritonclient", "[1]"),
    ("the command", "Chinstrap"),
    ("a batch", "rows in 344 = rows out 344 + errors 0"),
    ("a job", "Gentoo"),
    ("publishing", "wine 1.1"),
]
"""What each block prints, in the README's order."""


def test_the_readme_has_the_examples_that_are_tested() -> None:
    """Every block is tested."""
    assert len(BLOCKS) == len(EXPECTED)


@pytest.mark.parametrize("index", range(len(EXPECTED)), ids=[name for name, _ in EXPECTED])
def test_an_example_of_the_readme_works_unchanged(system: System, folder: Path, index: int) -> None:
    """Pasted by a new user, it answers."""
    printed = run(system, folder, *BLOCKS[index])

    assert EXPECTED[index][1] in printed


def test_a_model_published_while_the_system_runs_can_be_called(system: System, folder: Path) -> None:
    """Within seconds, as the README says."""
    if not (folder / "models" / "wine").exists():
        run(system, folder, *BLOCKS[-1])

    wait_until(lambda: system.rest("/v2/models/wine/ready")[0] == 200, "the published model")


def test_every_link_to_a_file_resolves() -> None:
    """Relative links of the README and the documents."""
    pages = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    pages += sorted((ROOT / "docs").rglob("*.md"))

    broken = [
        f"{page.name}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / link).exists()
    ]

    assert broken == []
