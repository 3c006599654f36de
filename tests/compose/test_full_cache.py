"""The cache of fetched models has no room left: tests/compose/cache.yml over docker-compose.yml."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.steady import Reference, SteadyLoad
from splitserve import publish
from splitserve.repository.folder import Repository
from splitserve.repository.sources import index
from tests.compose.conftest import Model, started
from tests.compose.stack import Stack, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.xdist_group("compose"), pytest.mark.timeout(900)]

NAME = "breast-cancer"

FILL = """
import contextlib
with open("/var/cache/splitserve/filler", "wb", 0) as file, contextlib.suppress(OSError):
    while file.write(bytes(512)):
        pass
"""
EMPTY = "import os; os.unlink('/var/cache/splitserve/filler')"


@pytest.fixture
def own_repository(repository: Path, models: dict[str, Model], tmp_path: Path) -> Path:
    """The models, with an index, to be changed."""
    folder = tmp_path / "models"
    shutil.copytree(repository, folder)
    write_index(folder)
    return folder


def write_index(folder: Path) -> None:
    found, problems = index.build(Repository(folder))
    assert problems == []
    index.write(folder, found).chmod(0o644)


@pytest.fixture
def fetching(docker: str, project: str, own_repository: Path, models: dict[str, Model]) -> Iterator[Stack]:
    overlay = str(Path(__file__).with_name("cache.yml"))
    with started(Stack(docker, f"{project}-cache", own_repository, overlays=[overlay]), models) as running:
        yield running


def test_loaded_models_serve_while_the_cache_is_full(fetching: Stack, own_repository: Path, models: dict[str, Model]) -> None:
    """A version for which there is no disk space is reported, and loaded when there is; other versions are unaffected."""
    model = models[NAME]
    predict = fetching.container("predict")
    newer = f"{fetching.http}/v2/models/{NAME}/versions/2.2/ready"
    predict.python(FILL)

    with SteadyLoad([f"grpc://{fetching.grpc}", fetching.http], {NAME: Reference(model.pipeline, model.rows)}) as load:
        publish(model.pipeline, model.rows, name=NAME, repository=own_repository, input_name="rows")
        write_index(own_repository)
        wait_until(lambda: "the cache /var/cache/splitserve has 0 free" in httpx.get(newer).text, "no room for version 2")
        load.wait_for(60)
        predict.python(EMPTY)
        wait_until(lambda: httpx.get(newer).is_success, "version 2")
        load.wait_for(60)

    assert load.failures == []
    assert load.wrong == []
