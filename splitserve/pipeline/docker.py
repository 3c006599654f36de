"""The docker command. Imports nothing but the standard library, and needs no docker until it is called."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache

from splitserve.pipeline.context import StepFailed

_LINES_SHOWN = 15


@cache
def docker_client() -> str:
    """The client to use: ``DOCKER``, else the first on PATH or in /usr/bin that has compose and reaches a daemon.

    Raises:
        StepFailed: there is none.
    """
    candidates = [os.environ.get("DOCKER"), shutil.which("docker"), shutil.which("docker", path="/usr/bin")]
    clients = list(dict.fromkeys(client for client in candidates if client))
    problem = "no docker is installed"
    for client in clients:
        for question in (["compose", "version"], ["version", "--format", "{{.Server.Version}}"]):
            answer = subprocess.run([client, *question], capture_output=True, text=True)
            if answer.returncode:
                problem = f"{client} {' '.join(question)}: {last_lines(answer.stderr, 1) or f'exit status {answer.returncode}'}"
                break
        else:
            return client
    raise StepFailed(f"expected docker with its compose plugin and a running daemon, got: {problem}; DOCKER names another client")


def docker(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """What a docker command prints.

    Raises:
        StepFailed: it fails; with the last lines that it wrote.
    """
    answer = subprocess.run([docker_client(), *arguments], capture_output=True, text=True, env=environment)
    if answer.returncode:
        raise StepFailed(f"docker {' '.join(arguments[:3])} …: exit status {answer.returncode}\n{last_lines(answer.stderr)}")
    return answer.stdout.strip()


def image_id(name: str) -> str:
    """The digest of an image by its name or digest; "" if it is not on this machine."""
    answer = subprocess.run([docker_client(), "image", "inspect", "--format", "{{.Id}}", name], capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else ""


def pip_secret() -> str:
    """The option of ``docker build`` that gives pip this machine's pip.conf, which does not become part of the image."""
    return f"--secret=id=pip_conf,src={os.environ.get('PIP_CONFIG_FILE') or os.devnull}"


def last_lines(text: str, n_lines: int = _LINES_SHOWN) -> str:
    """The last lines of what a program wrote, without empty ones."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-n_lines:])
