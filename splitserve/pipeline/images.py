"""Images of the services with the built models inside, and a system of their containers: Dockerfile and docker-compose.yml."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import splitserve
from splitserve.pipeline.context import Context, StepFailed
from splitserve.pipeline.digests import digest_of, digests_of_folder
from splitserve.pipeline.docker import docker, image_id

IMAGES_FILE = "images.json"
"""Name and digest of the image of each service; an output of the step that made them."""

SERVICES = ("proxy", "preprocess", "predict")

_COMPOSE_FILES = ("docker-compose.yml", "docker-compose.baked.yml")
_PACKAGES = ("splitserve", "proxy", "preprocess_service", "predict_service", "jobs_service")


def build_images(context: Context, models: Path) -> None:
    """Make the images of proxy, preprocess and predict, the latter two with their halves of all models inside.

    Their names are ``MODEL-SERVICE:DIGEST``, where the digest is that of the models' files. The step's function runs on a
    machine with docker: ``needs_docker=True``.

    Args:
        context: gets the output `IMAGES_FILE`.
        models: the model repository.

    Raises:
        StepFailed: they cannot be built.
    """
    with build_sources() as folder:
        model, tag = next(path.name for path in sorted(models.iterdir())), digest_of(digests_of_folder(models))[:16]
        names = {service: f"{model}-{service}:{tag}".lower() for service in SERVICES}
        overlay = {service: {"image": name} for service, name in names.items()}
        with _composition(folder, f"splitserve-{uuid.uuid4().hex[:12]}", overlay, SPLITSERVE_MODELS=str(models)) as compose:
            compose("build", "--quiet")
    images = {service: {"name": name, "digest": image_id(name)} for service, name in names.items()}
    (context.outputs / IMAGES_FILE).write_text(json.dumps(images, indent=1))
    print(f"{context.step}: images {', '.join(names.values())}", flush=True)


@dataclass(frozen=True)
class Containers:
    """Those of a started system."""

    _compose: _Compose

    def ended(self) -> str:
        """Which of them has ended, and how; "" if all are running."""
        return self._compose("ps", "--all", "--status", "exited", "--format", "{{.Service}} exited with {{.ExitCode}}")

    def logs(self) -> str:
        """The last lines of each."""
        return self._compose("logs", "--no-color", "--tail", "10")


@contextmanager
def started_images(
    images: Mapping[str, Mapping[str, str]], *, http_port: int, grpc_port: int, project: str
) -> Iterator[Containers]:
    """A container of each image, removed at the end. What an attempt that was killed has left is removed first.

    Args:
        images: those of `IMAGES_FILE`.
        http_port: of the proxy, on loopback.
        grpc_port: of the proxy, on loopback.
        project: the name that docker has for them.

    Raises:
        StepFailed: one is missing, or cannot be started.
    """
    for image in images.values():
        if not image_id(image["digest"]):
            raise StepFailed(f"image {image['name']}, {image['digest']}, is not on this machine; run with --from build")
    overlay = {service: {"image": image["digest"], "pull_policy": "never", "restart": "no"} for service, image in images.items()}
    ports = {"SPLITSERVE_HTTP_PORT": str(http_port), "SPLITSERVE_GRPC_PORT": str(grpc_port)}
    with build_sources() as folder, _composition(folder, project, overlay, **ports) as compose:
        compose("down", "--remove-orphans")
        try:
            compose("up", "--no-build", "--detach")
            yield Containers(compose)
        finally:
            compose("down", "--remove-orphans")


class _Compose:
    """``docker compose`` with its options."""

    def __init__(self, options: Sequence[str], environment: Mapping[str, str]) -> None:
        self._options, self._environment = options, environment

    def __call__(self, *arguments: str) -> str:
        return docker("compose", *self._options, *arguments, environment=self._environment)


@contextmanager
def _composition(folder: Path, project: str, services: Mapping[str, Mapping[str, str]], **variables: str) -> Iterator[_Compose]:
    """The services of the compose files with models inside, and with what ``services`` changes."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("COMPOSE_", "SPLITSERVE_"))}
    with tempfile.TemporaryDirectory() as scratch:
        overlay = Path(scratch, "overlay.json")
        overlay.write_text(json.dumps({"services": services}))
        files = [*(folder / name for name in _COMPOSE_FILES), overlay]
        options = [word for file in files for word in ("--file", str(file))]
        options += ["--project-directory", str(folder), "--project-name", project, "--progress", "quiet", "--ansi", "never"]
        yield _Compose(options, {**own, **variables})


@contextmanager
def build_sources() -> Iterator[Path]:
    """A folder with the Dockerfile, the compose files and what they copy: a clone, or what is installed, put together."""
    installed = Path(splitserve.__file__).parents[1]
    if (installed / "Dockerfile").exists():
        yield installed
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(Path(__file__).with_name("deployment"), folder, dirs_exist_ok=True)
        for package in _PACKAGES:
            shutil.copytree(installed / package, Path(folder, package), ignore=shutil.ignore_patterns("__pycache__"))
        yield Path(folder)
