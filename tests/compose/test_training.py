"""Training pipelines with ``--containers``: steps in images of their own, and an evaluation of the images that were built."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitserve.pipeline.context import StepFailed
from splitserve.pipeline.images import started_images
from splitserve.pipeline.index import Finished, Index
from splitserve.pipeline.new import copy_template
from splitserve.pipeline.serving import running_images
from tests.compose.stack import ROOT, free_ports, run, wait_until
from tests.pipeline import tiny

pytestmark = [pytest.mark.compose, pytest.mark.xdist_group("compose"), pytest.mark.timeout(600)]

NAME = f"compose_test_{uuid.uuid4().hex[:8]}"
"""Of both pipelines here, and so a part of the names of their images; no other tests on this machine have it."""


@pytest.fixture(scope="module", autouse=True)
def images_removed(docker: str) -> Iterator[None]:
    """What was built here."""
    yield
    for name in (f"splitserve-step-{NAME}-*", f"{NAME}-*"):
        if found := run([docker, "images", "--quiet", "--filter", f"reference={name}"]).split():
            run([docker, "image", "rm", "--force", *set(found)])


def command(folder: Path, name: str, *arguments: str) -> list[str]:
    """In an environment where the package below the folder can be imported."""
    return ["env", f"PYTHONPATH={folder}{os.pathsep}{ROOT}", sys.executable, "-m", name, "run", "--containers", *arguments]


def tiny_package(folder: Path) -> Path:
    """The package ``tiny``, whose pipeline has the name above, with an empty lock."""
    package = tiny.write(folder)
    (package / "lock.txt").write_text("")
    program = (package / "__main__.py").read_text()
    declared = "pipeline(Path(__file__).parent)"
    assert declared in program
    program = program.replace(declared, f"replace({declared}, name={NAME!r})").replace(
        "import sys", "import sys\nfrom dataclasses import replace"
    )
    (package / "__main__.py").write_text(program)
    return package


def last(index: Index, step: str) -> Finished:
    found = index.last(step)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def birds(docker: str, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """The tables example, run to a registered release."""
    folder = tmp_path_factory.mktemp("training")
    copy_template(folder / NAME, "tables")
    run(command(folder, NAME, "--set", f"model={NAME}", "--set", "n_timed=20"))
    return Index(folder / "training-store", NAME)


def test_the_tables_example_runs_in_containers(docker: str, birds: Index):
    """Steps with images have their digests; served labels were those of training, and the release is registered."""
    for step in ("data", "train"):
        assert run([docker, "image", "inspect", "--format", "{{.Id}}", last(birds, step).depends_on["image"]])
    assert {last(birds, step).depends_on["image"] for step in ("build", "evaluate", "register")} == {None}
    measured = last(birds, "evaluate").last_metrics()
    assert measured["accuracy"] == last(birds, "train").last_metrics()["accuracy"] >= 0.9
    assert {"rest p50 ms", "rest p99 ms", "grpc p50 ms", "grpc p99 ms"} <= set(measured)
    images = json.loads((Path(last(birds, "build").folder) / "images.json").read_text())
    registered = json.loads((Path(last(birds, "register").folder) / "registered.json").read_text())
    with contextlib.closing(sqlite3.connect(birds.store / "mlflow.db")) as database:
        query = "SELECT key, value FROM model_version_tags WHERE name = ? AND version = ?"
        tags = dict(database.execute(query, (NAME, registered["version"])).fetchall())
    for service, image in images.items():
        assert (tags[f"splitserve.image.{service}"], tags[f"splitserve.image.{service}.digest"]) == (
            image["name"],
            image["digest"],
        )
    assert {service: image["name"].partition(":")[0] for service, image in images.items()} == {
        service: f"{NAME}-{service}" for service in ("proxy", "preprocess", "predict")
    }
    assert run([docker, "ps", "--all", "--quiet", "--filter", "ancestor=" + images["predict"]["digest"]]) == ""


def test_an_image_that_does_not_start_says_its_last_lines(docker: str, birds: Index, tmp_path: Path):
    """And nothing of it is left. One that was removed is named, with the way out."""
    images = json.loads((Path(last(birds, "build").folder) / "images.json").read_text())
    (tmp_path / "Dockerfile").write_text(
        f'FROM {images["predict"]["name"]}\nENTRYPOINT ["python", "-c", "exit(\'no model here\')"]\n'
    )
    broken = run([docker, "build", "--quiet", "--tag", f"{NAME}-broken", str(tmp_path)]).strip()

    def start(digest: str) -> None:
        changed = {**images, "predict": {"name": "broken", "digest": digest}}
        with running_images(changed, tmp_path, project=f"{NAME}-broken"):
            pytest.fail("it started")

    with pytest.raises(
        StepFailed, match=r"the services did not start: predict exited with 1; (.|\n)*predict-1 +\| no model here"
    ):
        start(broken)
    assert run([docker, "ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={NAME}-broken"]) == ""
    with pytest.raises(StepFailed, match="image broken, sha256:0+, is not on this machine; run with --from build"):
        start("sha256:" + "0" * 64)


def test_containers_that_a_killed_evaluation_has_left_are_removed_by_the_next(docker: str, birds: Index):
    images = json.loads((Path(last(birds, "build").folder) / "images.json").read_text())
    listed = [docker, "ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={NAME}-left"]
    ports = free_ports(2)

    def start():
        return started_images(images, http_port=ports[0], grpc_port=ports[1], project=f"{NAME}-left")

    killed = start()
    killed.__enter__()  # and never left
    left = set(run(listed).split())
    assert len(left) == 3
    with start():
        assert left.isdisjoint(run(listed).split())
    assert run(listed) == ""


def test_training_in_a_container_that_is_killed_is_resumed(docker: str, tmp_path: Path):
    """The container ends with its runner; the next one has its checkpoints, and the result is that of an uninterrupted run."""
    package = tiny_package(tmp_path)
    train = package / "train.py"
    held = "while epoch == 3 and held.exists():"
    assert held in train.read_text()
    train.write_text(train.read_text().replace(held, 'while epoch == 3 and not Path("/scratch/go").exists():'))

    process = subprocess.Popen(command(tmp_path, "tiny", "--until", "train"))
    try:
        (scratch,) = wait_until(lambda: list((tmp_path / "store/work" / NAME).glob("train-*/")), "the step's folder", 120)
        wait_until(lambda: list(scratch.glob("checkpoints/000002-*")), "the second checkpoint", 120)
        mounted = [docker, "ps", "--quiet", "--filter", f"volume={scratch}"]
        assert run(mounted)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: not run(mounted), "the container's end")

    (scratch / "go").touch()
    run(command(tmp_path, "tiny", "--until", "train"))
    trained = last(Index(tmp_path / "store", NAME), "train")
    assert [line["at"] for line in trained.metrics] == [1, 2, 3, 4]
    assert (Path(trained.folder) / "model.txt").read_text() == "".join(f"{epoch} {3 * 0.1}!\n" for epoch in range(1, 5))


def test_a_step_that_fails_in_a_container_says_why(docker: str, tmp_path: Path):
    """Its own message, from an environment with nothing but Python and the step's lock; an image that cannot be built."""
    package = tiny_package(tmp_path)
    train = """
import importlib.util
def train(context):
    context.fail_unless(False, f"numpy: {importlib.util.find_spec('numpy')}")
"""
    for name, content, message in (
        ("train.py", train, "step train failed: numpy: None\n"),
        ("lock.txt", "no requirement\n", "step train failed: docker build"),
    ):
        (package / "lock.txt").write_text("")
        (package / name).write_text(content)
        done = subprocess.run(command(tmp_path, "tiny"), capture_output=True, text=True)
        assert (done.returncode, message in done.stderr) == (1, True), done.stdout + done.stderr
