"""Models in the images: docker-compose.baked.yml over docker-compose.yml."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.compose.conftest import Model
from tests.compose.stack import Stack, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.xdist_group("compose"), pytest.mark.timeout(900)]

CHOSEN = ("breast-cancer", "weather")


@pytest.fixture(scope="module")
def baked(
    docker: str, project: str, repository: Path, models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """The services with two of the three models inside, one of them damaged, and no folder of models any more."""
    folder = tmp_path_factory.mktemp("baked") / "models"
    shutil.copytree(repository, folder)
    model = folder / "weather" / "predict" / "1" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"\xff")
    running = Stack(docker, f"{project}-baked", folder, overlays=["docker-compose.baked.yml"], SPLITSERVE_BAKED=" ".join(CHOSEN))
    try:
        running.build()
        shutil.rmtree(folder)
        running.up()
        yield running
    finally:
        running.down()


@pytest.mark.parametrize(("service", "half"), [("preprocess", "preprocess"), ("predict", "predict")])
def test_an_image_holds_its_half_of_the_chosen_models(baked: Stack, service: str, half: str) -> None:
    """And the releases of these models. Nothing is mounted, nothing else is there, and it cannot be written."""
    container = baked.container(service)

    found = container.python("import os; print(*sorted(d for d, _, files in os.walk('/models') if 'manifest.json' in files))")
    written = container.try_python("-c", "open('/models/file', 'w')")

    assert found.split() == [f"/models/{name}/{folder}" for name in CHOSEN for folder in (f"{half}/1", "releases/0001-1.1")]
    assert container.facts()["Mounts"] == []
    assert "Read-only file system" in written.stderr


def test_bundles_in_images_are_checked_and_served(baked: Stack, models: dict[str, Model]) -> None:
    """As from a mounted folder: what is whole answers, what is damaged says what is wrong with it."""
    wait_until(lambda: httpx.get(f"{baked.http}/v2/models/breast-cancer/ready").is_success, "ready")
    rows = models["breast-cancer"].rows[:5]

    answer = httpx.post(f"{baked.http}/v1/models/breast-cancer:predict", json={"instances": rows.tolist()}, timeout=60)
    reason = "weather/predict/1: model.onnx: expected sha256"
    wait_until(lambda: reason in httpx.get(f"{baked.http}/v2/models/weather/ready").text, "the damaged model refused")

    labels = [str(row["label"]) for row in answer.json()["predictions"]]
    assert labels == [str(label) for label in models["breast-cancer"].pipeline.predict(rows)]
    assert httpx.get(f"{baked.http}/v2/models/digits/ready").status_code == 404
