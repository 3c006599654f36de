"""The README's commands for containers, as they stand, in a fresh clone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.compose.stack import ROOT, free_ports

pytestmark = [pytest.mark.compose, pytest.mark.xdist_group("compose"), pytest.mark.timeout(900)]

ENVIRONMENT_FILES = ("requirements/dev.txt", "pyproject.toml")


def fresh_clone(folder: Path) -> Path:
    """A clone with this environment as its own, so that make has no packages to install."""
    clone = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    (clone / ".venv").symlink_to(sys.prefix)
    for name in ENVIRONMENT_FILES:
        os.utime(clone / name, (0, 0))  # older than the environment: make takes it as it is
    return clone


def test_the_readme_starts_containers_in_a_fresh_clone(docker: str, project: str, tmp_path: Path) -> None:
    """The block with `docker compose up`, word by word, leaves a system that answers for each demo model."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (commands,) = [block for block in blocks if "docker compose up" in block]
    clone = fresh_clone(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "docker").symlink_to(docker)
    http_port, grpc_port = free_ports(2)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("COMPOSE_", "SPLITSERVE_", "MAKE"))},
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "COMPOSE_PROJECT_NAME": f"{project}-readme",
        "SPLITSERVE_HTTP_PORT": str(http_port),
        "SPLITSERVE_GRPC_PORT": str(grpc_port),
    }
    try:
        done = subprocess.run(["bash", "-euc", commands], cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

        for model in ("penguins", "breast-cancer", "digits"):
            assert httpx.get(f"http://127.0.0.1:{http_port}/v2/models/{model}/ready").is_success
    finally:
        down = [docker, "compose", "down", "--volumes", "--rmi", "local", "--remove-orphans"]
        subprocess.run(down, cwd=clone, env=environment, check=True, capture_output=True)
