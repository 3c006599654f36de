"""The tables example as a user has it: copied, run to a registered release, and kept from registering what is not good."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from splitserve.pipeline.digests import digests_of_folder
from splitserve.pipeline.index import Index
from splitserve.pipeline.new import TEMPLATES
from splitserve.repository.folder import Repository
from splitserve.repository.releases import ReleaseReader
from tests.command_line import run_command
from tests.folders import MadeOnce

pytestmark = [pytest.mark.training, pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("pipeline-tables")]

ROOT = Path(__file__).parents[2]


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, "-m", "birds", *arguments], env=environment, cwd="/", capture_output=True, text=True, check=False
    )


def _copied_and_run(folder: Path) -> None:
    result = run_command("pipeline", "new", folder / "birds", "--template", "tables")
    assert result.exit_code == 0, result.output
    done = command(folder, "run")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "output").write_text(done.stdout)


@pytest.fixture(scope="module")
def folder(made_once: MadeOnce) -> Path:
    """A copy of the example that has run. Tests leave its files as they are."""
    return made_once(_copied_and_run)


@pytest.fixture(scope="module")
def index(folder: Path) -> Index:
    return Index(folder / "training-store", "birds")


def registry(folder: Path):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{folder / 'training-store' / 'mlflow.db'}")


def test_the_example_ends_with_a_registered_release(folder: Path, index: Index):
    """All steps finished, the served labels were those of training, and the registry's files are the release's."""
    assert (folder / "output").read_text().count("finished in") == 5
    evaluated = index.last("evaluate")
    metrics = evaluated.last_metrics()
    assert metrics["accuracy"] == index.last("train").last_metrics()["accuracy"] >= 0.9
    assert {"rest p50 ms", "rest p99 ms", "grpc p50 ms", "grpc p99 ms"} <= set(metrics)

    assert len(list((folder / "training-store" / "reports").glob("*.html"))) >= 1

    version = registry(folder).get_model_version_by_alias("penguins", "champion")
    assert (str(version.version), version.tags["splitserve.pair"]) == ("1", "1.1")
    release = ReleaseReader(Repository(Path(version.source.removeprefix("file://")))).history("penguins").current()
    assert str(release.pair) == "1.1"
    built = {path.removeprefix("models/"): digest for path, digest in index.last("build").outputs.items()}
    registered = digests_of_folder(Path(version.source.removeprefix("file://")))
    assert registered.pop("index.json") == version.tags["splitserve.index"]
    assert registered.pop("MLmodel")
    assert registered == built


def test_a_run_writes_nothing_beside_the_pipelines_own_files(folder: Path):
    """What the evaluated services write goes with the attempt."""
    copied = {path.name for path in (folder / "birds").iterdir()} - {"__pycache__"}
    assert copied == {path.name for path in (TEMPLATES / "tables").iterdir()} - {"__pycache__"}
    assert "jobs" not in copied


def test_status_finds_nothing_to_do_from_any_working_directory(folder: Path):
    done = command(folder, "status")
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()[1:6]] == ["finished"] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["min_accuracy=1.01"], "accuracy 0.9"),
        (["learning_rate=-1"], "learning_rate"),
        (["target=colour"], "no column colour"),
    ],
    ids=["below the floor", "training fails", "bad data"],
)
def test_what_is_not_good_is_not_registered(folder: Path, change: list[str], message: str):
    """The failed step says why; no version is added and the champion stays."""
    done = command(folder, "run", *(f"--set={each}" for each in change))
    assert done.returncode == 1
    assert message in done.stderr
    assert len(registry(folder).search_model_versions("name = 'penguins'")) == 1


def test_data_that_was_cut_short_is_refused(folder: Path, tmp_path: Path):
    cut = tmp_path / "cut.csv"
    cut.write_bytes((folder / "birds" / "penguins.csv").read_bytes()[:-100])
    done = command(folder, "run", f"--set=data={cut}")
    assert done.returncode == 1
    assert "expected SHA-256" in done.stderr


def test_services_that_do_not_start_fail_the_evaluation(folder: Path, tmp_path: Path):
    """With their last log lines. A copy, whose built predictor is damaged after build."""
    from splitserve.pipeline.context import StepFailed
    from splitserve.pipeline.serving import running

    models = tmp_path / "models"
    shutil.copytree(Path(Index(folder / "training-store", "birds").last("build").folder) / "models", models)
    (models / "penguins" / "predict" / "1" / "model.onnx").write_bytes(b"no model")
    with pytest.raises(StepFailed, match="not ready after 5 s|exited"), running(models, start_timeout_s=5):
        pass


def test_new_refuses_what_cannot_be_a_package(tmp_path: Path):
    for name, message in (("my-model", "identifier"), (".", "identifier|exists"), ("birds", "")):
        result = run_command("pipeline", "new", tmp_path / name)
        assert (result.exit_code == 0) is (name == "birds"), message
    assert run_command("pipeline", "new", tmp_path / "birds").exit_code == 2
    assert run_command("pipeline", "new", tmp_path / "x", "--template", "none").exit_code == 2
