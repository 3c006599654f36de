"""Steps in containers: an image for each, and the MLflow server that their files pass through.

A container sees neither the store nor the pipeline's folder. It gets the attempt's inputs from the server and puts its outputs
there; the runner records them as it does those of a process. Only the folder with checkpoints and metrics is mounted.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import splitserve
from splitserve.pipeline.context import StepFailed
from splitserve.pipeline.declaration import Step, TrainingPipeline
from splitserve.pipeline.dependencies import locked_versions
from splitserve.pipeline.digests import digest_of, digest_of_file
from splitserve.pipeline.docker import docker, docker_client, image_id, last_lines, pip_secret
from splitserve.pipeline.worker import end_with_the_runner

DOCKERFILE = Path(__file__).with_name("step.Dockerfile")
PYTHON_IMAGE = "python:{}.{}-slim-bookworm".format(*sys.version_info)
WHEELS_VARIABLE = "SPLITSERVE_TRAINING_WHEELS"
"""Environment variable: a folder with wheels for images of steps, beside those of the index."""

ATTEMPT, SCRATCH = Path("/attempt"), Path("/scratch")
"""The folders of an attempt in a container."""

_START_TIMEOUT_S = 120.0


def runs_in_container(step: Step) -> bool:
    """Whether it has an image: others start containers themselves, or use MLflow in the runner's process."""
    return not (step.needs_docker or step.runs_in_runner)


class StepImages:
    """The images of a pipeline's steps. A name has the digest of all that goes into the image.

    Args:
        pipeline: whose steps.
        modules: files of the project's modules that a step reaches, by their paths below the folder that they are imported from.
    """

    def __init__(self, pipeline: TrainingPipeline, modules: Callable[[Step], Mapping[str, Path]]) -> None:
        self._pipeline = pipeline
        self._modules = modules
        self._library: dict[str, Path] = {}

    def find(self, step: Step) -> str:
        """The digest of the step's image; "" if it has not been built."""
        return image_id(self._name(step, self._files(step)))

    def build(self, step: Step) -> str:
        """The digest of the step's image, which is built if it is not there.

        Raises:
            StepFailed: it cannot be built.
        """
        files = self._files(step)
        name = self._name(step, files)
        if found := image_id(name):
            return found
        print(f"{step.name}: building the image {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "wheels").mkdir()
            for path, file in files.items():
                target = Path(folder, path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
            arguments = ["--build-arg", f"PYTHON_IMAGE={PYTHON_IMAGE}", pip_secret(), "--tag", name]
            docker("build", "--quiet", *arguments, folder)
        return image_id(name)

    def _name(self, step: Step, files: Mapping[str, Path]) -> str:
        content = digest_of({"base": PYTHON_IMAGE, "files": {path: digest_of_file(file) for path, file in files.items()}})
        return f"splitserve-step-{self._pipeline.name}-{step.name}:{content[:16]}".lower()

    def _files(self, step: Step) -> dict[str, Path]:
        """What is copied into the image, by path in its context."""
        if not self._library:
            root = Path(splitserve.__file__).parent
            found = [file for file in root.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
            names = {file.relative_to(root): file for file in found}
            self._library = {
                f"code/splitserve/{name.as_posix()}": file
                for name, file in names.items()
                if name.parts[:2] != ("pipeline", "templates")
            }
        lock = self._pipeline.path(step.lock) if step.lock else Path(os.devnull)
        return {
            "Dockerfile": DOCKERFILE,
            "requirements.txt": lock,
            **{f"wheels/{wheel.name}": wheel for wheel in _wheels(lock)},
            **self._library,
            **{f"code/{path}": file for path, file in self._modules(step).items()},
        }


def _wheels(lock: Path) -> list[Path]:
    """Those of the variable's folder whose package a lock names: others change nothing.

    Raises:
        StepFailed: there is no such folder.
    """
    named = os.environ.get(WHEELS_VARIABLE)
    if not named:
        return []
    if not Path(named).is_dir():
        raise StepFailed(f"{WHEELS_VARIABLE}: expected a folder with wheels, got {named}")
    locked = {_normalised(re.split(r"[^A-Za-z0-9._-]", line)[0]) for line in locked_versions(lock)}
    return sorted(wheel for wheel in Path(named).glob("*.whl") if _normalised(wheel.name.partition("-")[0]) in locked)


def _normalised(name: str) -> str:
    """The name of a package. Source: PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True)
class Container:
    """Where one attempt of a step runs: an image, by digest, and the URL of the attempt's folder."""

    image: str
    url: str

    def command(self, step: Step, scratch: Path) -> list[str]:
        """The command that runs it, for as long as its standard input is open."""
        return [
            docker_client(), "run", "--rm", "--init", "--interactive", "--user", f"{os.getuid()}:{os.getgid()}",
            "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
            "--mount", f"type=bind,source={scratch},target={SCRATCH}",
            *(word for name in step.environment for word in ("--env", name)),
            *step.container_options, self.image, self.url,
        ]  # fmt: skip


class ArtifactServer:
    """An MLflow server over one folder. Containers of this machine reach it, other machines do not. It ends with this process.

    Args:
        folder: whose files it serves, and takes.
        log: file for what it prints.

    Raises:
        StepFailed: it does not start.
    """

    def __init__(self, folder: Path, log: Path) -> None:
        listening, self._host = _addresses()
        with socket.create_server((listening, 0)) as free:
            self._port = free.getsockname()[1]
        arguments = [listening, str(self._port), f"{self._host}:{self._port},{listening}:{self._port}", folder.as_uri()]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "splitserve.pipeline.containers", *arguments],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            self._wait_until_ready(f"http://{listening}:{self._port}/health", log)
        except BaseException:
            self.close()
            raise

    def url(self, path: str) -> str:
        """Of a file or folder, as containers reach it."""
        # It imports httpx, which a run without containers need not.
        from splitserve.repository.sources.mlflow_server import ARTIFACTS

        return f"http://{self._host}:{self._port}{ARTIFACTS}/{path}"

    def close(self) -> None:
        """Stop it."""
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.close()
        self._process.wait()

    def _wait_until_ready(self, url: str, log: Path) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(url, timeout=5).close()
                return
            except OSError:
                time.sleep(0.1)
        raise StepFailed(f"MLflow's server did not start; its last log lines:\n{last_lines(log.read_text(errors='replace'))}")


def _addresses() -> tuple[str, str]:
    """The address to listen on, and what containers call it: of docker's bridge, which other machines do not reach.

    Where docker is in a virtual machine, as on a desktop, that is not an address of this machine: loopback, by docker's name.
    """
    gateway = docker("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}")
    try:
        socket.create_server((gateway, 0)).close()
    except OSError:
        return "127.0.0.1", "host.docker.internal"
    return gateway, gateway


def _serve(host: str, port: str, allowed_hosts: str, destination: str) -> int:
    """The server's process: MLflow's, which ends when the runner does."""
    threading.Thread(target=end_with_the_runner, daemon=True).start()
    command = [sys.executable, "-m", "mlflow", "server", "--artifacts-only", "--artifacts-destination", destination]
    command += ["--host", host, "--port", port, "--allowed-hosts", allowed_hosts, "--workers", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # eight further processes
    return subprocess.run(command, stdin=subprocess.DEVNULL, env=environment).returncode


if __name__ == "__main__":
    sys.exit(_serve(*sys.argv[1:]))
