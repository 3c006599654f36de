"""What is asked of docker, and the files that pass through MLflow's server. Runs: tests/compose/test_training.py."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitserve.pipeline import containers, docker
from splitserve.pipeline.commands import main
from splitserve.pipeline.containers import ArtifactServer, Container, StepImages
from splitserve.pipeline.context import StepFailed
from splitserve.pipeline.declaration import Step, TrainingPipeline
from splitserve.pipeline.dependencies import locked_versions
from splitserve.pipeline.exchange import Exchange
from splitserve.pipeline.runner import Runner
from splitserve.pipeline.templates.images.pipeline import PIPELINE as IMAGES
from splitserve.pipeline.templates.tables.pipeline import PIPELINE as TABLES
from tests.pipeline import tiny

ROOT = Path(__file__).parents[2]

FAKE = """#!/bin/sh
echo "$@" >> {folder}/calls
cat {folder}/answer 2>/dev/null
case "$1" in
  {failing}) echo "unknown command" >&2; exit 1 ;;
esac
"""


def fake(folder: Path, name: str, failing: str = "none") -> Path:
    """A program in docker's place, which writes down how it is called."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(FAKE.format(folder=folder, failing=failing))
    program.chmod(0o755)
    return program


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    program = fake(tmp_path / "docker", "docker")
    monkeypatch.setenv("DOCKER", str(program))
    docker.docker_client.cache_clear()
    yield program
    docker.docker_client.cache_clear()


def test_a_client_without_compose_is_passed_over(client: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The one that DOCKER names comes first; if none will do, the message says what each lacks."""
    assert docker.docker_client() == str(client)

    docker.docker_client.cache_clear()
    monkeypatch.setenv("DOCKER", str(fake(tmp_path / "old", "docker", failing="compose")))
    monkeypatch.setattr(shutil, "which", lambda name, path=None: str(client) if path else None)
    assert docker.docker_client() == str(client)

    docker.docker_client.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(StepFailed, match="old/docker compose version: unknown command; DOCKER names another client"):
        docker.docker_client()


def test_a_command_that_fails_says_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Path):
    fake(client.parent, "docker", failing="build")
    with pytest.raises(StepFailed, match="docker build --quiet . …: exit status 1\nunknown command"):
        docker.docker("build", "--quiet", ".")


def test_a_container_gets_what_its_step_declares(client: Path, tmp_path: Path):
    """The image by digest, the variables that are declared, its scratch folder and nothing else of this machine."""
    step = Step("train", ".train:train", environment=("SWITCH",), container_options=("--gpus=all",))
    command = Container("sha256:12", "http://172.17.0.1:5000/x").command(step, tmp_path)
    assert command[:5] == [str(client), "run", "--rm", "--init", "--interactive"]
    assert [word for word in command if "source=" in word] == [f"type=bind,source={tmp_path},target=/scratch"]
    assert command[-5:] == ["--env", "SWITCH", "--gpus=all", "sha256:12", "http://172.17.0.1:5000/x"]


def test_an_image_is_named_by_all_that_is_in_it(client: Path, tmp_path: Path):
    """A line of code that the step reaches, its lock or the Dockerfile; not the code of other steps."""
    pipeline = tiny.pipeline(tiny.write(tmp_path / "project"))
    train = pipeline.step("train")

    def name() -> str:
        """As docker is asked for it."""
        images = StepImages(pipeline, Runner(pipeline)._dependencies.modules_of)
        images.find(train)
        return (client.parent / "calls").read_text().split()[-1]

    first = name()
    assert first.startswith("splitserve-step-tiny-train:")
    (pipeline.folder / "evaluate.py").write_text("changed = 1")
    assert name() == first
    names = {first}
    for changed in ("deeper.py", "lock.txt"):
        with (pipeline.folder / changed).open("a") as file:
            file.write("x = 1\n")
        names.add(name())
    assert len(names) == 3


def test_wheels_of_a_folder_go_into_the_images_of_steps_whose_lock_names_their_packages(
    client: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Their bytes are part of the image's name; other wheels are not."""
    package = tiny.write(tmp_path / "project")
    (package / "lock.txt").write_text("torch==2.13.0\nMy.Package==1 ; python_version > '3'\n")
    pipeline, wheels = tiny.pipeline(package), tmp_path / "wheels"
    wheels.mkdir()

    def find(step: str) -> tuple[str, set[str]]:
        """The image's name, and the wheels that it is built with."""
        images = StepImages(pipeline, Runner(pipeline)._dependencies.modules_of)
        images.find(pipeline.step(step))
        name = (client.parent / "calls").read_text().split()[-1]
        return name, {path for path in images._files(pipeline.step(step)) if path.startswith("wheels/")}

    without = find("train"), find("data")
    monkeypatch.setenv("SPLITSERVE_TRAINING_WHEELS", str(wheels))
    for name in (
        "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl",
        "my_package-1-py3-none-any.whl",
        "torchvision-1-py3-none-any.whl",
    ):
        (wheels / name).write_bytes(b"1")

    name, found = find("train")
    assert found == {"wheels/torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl", "wheels/my_package-1-py3-none-any.whl"}
    assert name != without[0][0]
    assert find("data") == without[1], "its lock names none of them"
    (wheels / "torchvision-1-py3-none-any.whl").write_bytes(b"2")
    assert find("train")[0] == name
    (wheels / "my_package-1-py3-none-any.whl").write_bytes(b"2")
    assert find("train")[0] != name

    monkeypatch.setenv("SPLITSERVE_TRAINING_WHEELS", str(tmp_path / "none"))
    with pytest.raises(StepFailed, match="SPLITSERVE_TRAINING_WHEELS: expected a folder with wheels, got .*none"):
        find("train")


def test_modules_are_copied_to_where_they_are_imported_from(tmp_path: Path):
    pipeline = tiny.pipeline(tiny.write(tmp_path))
    modules = Runner(pipeline)._dependencies.modules_of(pipeline.step("train"))
    assert {name for name in modules if name.startswith("tiny")} == {
        "tiny/__init__.py", "tiny/train.py", "tiny/helper.py", "tiny/deeper.py",
    }  # fmt: skip


def test_parameters_for_containers_hold_unless_they_are_set(client: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A step that needs docker runs on this machine; the others have images."""
    pipeline = TrainingPipeline(
        name="p", package="tiny", folder=tiny.write(tmp_path), store=tmp_path / "store", parameters={"floor": "low", "rate": 1},
        container_parameters={"floor": "high"},
        steps=[Step("build", ".data:data", parameters=("floor",), needs_docker=True), Step("train", ".train:train")],
    )  # fmt: skip

    def digest(*arguments: str) -> str:
        main(pipeline, ["status", *arguments])
        build, train = capsys.readouterr().out.splitlines()[1:3]
        assert train.endswith("its image has not been built" if "--containers" in arguments else "has never finished")
        return build.split()[3]

    low, high = digest(), digest("--set", "floor=high")
    assert low != high
    assert digest("--containers") == high
    assert digest("--containers", "--set", "floor=low") == low


def test_an_image_of_the_same_name_with_other_bytes_is_another_step(client: Path, tmp_path: Path):
    """What counts is the image's digest, not its name."""
    runner = Runner(tiny.pipeline(tiny.write(tmp_path / "project")), in_containers=True)

    def digest(image: str) -> str:
        (client.parent / "answer").write_text(image)
        return runner.states()[0].digest

    assert digest("sha256:12") == digest("sha256:12") != digest("sha256:34")


@pytest.mark.training
@pytest.mark.filterwarnings("ignore")
def test_files_pass_through_mlflows_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever their names; bytes that are not the expected ones are refused; the server ends with its runner."""
    monkeypatch.setattr(containers, "_addresses", lambda: ("127.0.0.1", "127.0.0.1"))
    served = tmp_path / "served"
    (served / "attempt" / "inputs").mkdir(parents=True)
    contents = {"inputs/plain.txt": b"one", "inputs/with space, ü & 100%.bin": b"\0" * 100_000}
    for name, content in contents.items():
        (served / "attempt" / name).write_bytes(content)

    server = ArtifactServer(served, tmp_path / "log")
    try:
        exchange = Exchange(server.url("attempt"))
        exchange.fetch({name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}, tmp_path / "here")
        assert all((tmp_path / "here" / name).read_bytes() == content for name, content in contents.items())

        for name in contents:
            exchange.send(name.replace("inputs", "outputs/deep"), tmp_path / "here" / name)
            assert (served / "attempt" / name.replace("inputs", "outputs/deep")).read_bytes() == contents[name]

        with pytest.raises(StepFailed, match="expected SHA-256 00, got "):
            exchange.fetch({"inputs/plain.txt": "00"}, tmp_path / "here")
        with pytest.raises(StepFailed, match="inputs/none"):
            exchange.fetch({"inputs/none": "00"}, tmp_path / "here")
    finally:
        server.close()
    with pytest.raises(StepFailed, match="inputs/plain.txt: "):
        while exchange.read("inputs/plain.txt"):  # the last of its processes may need a moment to end
            pass


@pytest.mark.training
def test_a_server_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(containers, "_addresses", lambda: ("127.0.0.1", "127.0.0.1"))
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no module named flask\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(StepFailed, match="did not start; its last log lines:\nno module named flask"):
        ArtifactServer(tmp_path, tmp_path / "log")


def test_a_steps_process_in_a_container_imports_only_python(tmp_path: Path):
    """What the lock of a step has to hold is what its own code needs."""
    program = (
        "import sys, splitserve.pipeline.worker; "
        "print({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names) - {'__main__', 'splitserve'})"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.heavy
def test_an_installed_splitserve_has_what_images_are_built_from(tmp_path: Path):
    """The wheel, where there is no clone: the same Dockerfile, compose files, locks and code."""
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "build", "--quiet", "--wheel", "--out-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    program = (
        "import shutil, sys; from splitserve.pipeline.images import build_sources\n"
        "with build_sources() as folder: shutil.copytree(folder, sys.argv[1])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    subprocess.run([sys.executable, "-P", "-c", program, tmp_path / "sources"], env=environment, check=True)

    found = tmp_path / "sources"
    for target in ("proxy", "preprocess", "predict"):
        assert f" AS {target}\n" in (found / "Dockerfile").read_text()
        assert (found / "requirements" / f"{target}.txt").read_bytes() == (ROOT / "requirements" / f"{target}.txt").read_bytes()
    copied = [
        line.split()[1]
        for line in (found / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY") and "--" not in line
    ]
    assert set(copied) >= {"splitserve", "proxy"}
    for package in copied:
        assert {path.relative_to(found) for path in (found / package).rglob("*.py")} >= {
            path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")
        }
    for name in ("Dockerfile", ".dockerignore", "docker-compose.yml", "docker-compose.baked.yml"):
        assert (found / name).read_bytes() == (ROOT / name).read_bytes()


ONLY_LOCKED = """
import sys
from importlib import import_module, metadata
from packaging.utils import canonicalize_name
locked = {canonicalize_name(name) for name in sys.argv[2].split()}
homes = metadata.packages_distributions()
own = sys.stdlib_module_names | {"splitserve"}
for module, names in homes.items():
    if module not in own and locked.isdisjoint(map(canonicalize_name, names)):
        sys.modules[module] = None  # as if it were not installed
import_module(sys.argv[1])
"""


@pytest.mark.heavy
@pytest.mark.parametrize("module", ["mlflow.server.fastapi_app", "fsspec"])
def test_the_extra_has_what_the_runner_needs_beside_the_steps(module: str):
    """MLflow's server imports more than the client, and asks for it nowhere; a registered version may be in a folder."""
    names = [re.split("[ =]", line)[0] for line in locked_versions(TABLES.path("requirements.txt"))]
    done = subprocess.run([sys.executable, "-c", ONLY_LOCKED, module, " ".join(names)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("pipeline", [IMAGES, TABLES], ids=lambda pipeline: pipeline.name)
def test_the_lock_of_a_step_that_has_an_image_has_what_it_imports(pipeline: TrainingPipeline):
    """Of each step of the examples, but those with an environment of their own, which is not installed here."""
    steps = [step for step in pipeline.steps if containers.runs_in_container(step) and not step.python]
    assert steps
    for step in steps:
        names = [re.split("[ =]", line)[0] for line in locked_versions(pipeline.path(step.lock))]
        module = pipeline.module_of(step.run.partition(":")[0])
        done = subprocess.run(
            [sys.executable, "-c", ONLY_LOCKED, module, " ".join(names)], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
