"""``splitserve verify`` against running systems."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from click.testing import Result
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from splitserve import publish
from tests.command_line import run_command
from tests.demo_models import Demos
from tests.system.processes import System

MODELS = ("breast-cancer", "digits", "penguins")
WAYS = {
    "rest": lambda system: f"http://{system.http}",
    "grpc": lambda system: f"grpc://{system.grpc}",
    "name": lambda system: system.grpc,
}


def verify(url: str, repository: Path, *arguments: str) -> Result:
    return run_command("verify", url, *arguments, "--repository", repository)


@pytest.fixture(scope="module")
def other(demos: Demos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same repository, had ``breast-cancer`` been another model."""
    folder = Path(shutil.copytree(demos.repository, tmp_path_factory.mktemp("other") / "models"))
    shutil.rmtree(folder / "breast-cancer")
    _, rows = demos.models["breast-cancer"]
    pipeline = demos.models["breast-cancer"].pipeline
    changed = make_pipeline(pipeline[:-1], LogisticRegression(C=1e-3))
    publish(changed.fit(rows, pipeline.predict(rows)), rows, name="breast-cancer", repository=folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_a_system_that_serves_what_was_published_passes(system: System, demos: Demos, way: str) -> None:
    """Every model and pair, over REST and gRPC, split and fused; all answers were recorded."""
    result = verify(WAYS[way](system), demos.repository, *MODELS)

    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert (result.exit_code, result.stderr) == (0, "")
    assert [(*row[:3], row[-1]) for row in rows] == [(model, "1.1", "1", "agrees") for model in MODELS]


@pytest.mark.parametrize("way", ["rest", "grpc"])
def test_a_system_that_answers_differently_fails(system: System, other: Path, way: str) -> None:
    """Exit status 1, with the worst difference; models that agree are reported as such."""
    result = verify(WAYS[way](system), other, *MODELS)

    assert result.exit_code == 1
    assert re.fullmatch(r'breast-cancer 1\.1: output "\w+" of golden sample \d+ at \[.*\]: expected .*, got .*\n', result.stderr)
    assert result.stdout.count("agrees") == 2
    assert result.stdout.count("differs") == 1


@pytest.mark.parametrize("way", ["rest", "grpc"])
def test_a_missing_pair_fails_in_one_line(system: System, demos: Demos, way: str) -> None:
    """A model, a pair; the rest is verified."""
    model = verify(WAYS[way](system), demos.repository, "nope", "digits")
    pair = verify(WAYS[way](system), demos.repository, "digits", "--version", "7.1")

    assert (model.exit_code, pair.exit_code) == (1, 1)
    assert model.stderr == "nope: Request for unknown model: 'nope' is not found\n"
    assert "digits" in model.stdout
    assert pair.stderr.startswith(
        "digits 7.1: has no release, so no answer is recorded; splitserve release digits 7.1 records one"
    )


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1"])
def test_an_unreachable_system_fails_in_one_line(demos: Demos, url: str) -> None:
    """Not a traceback."""
    result = verify(url, demos.repository, "digits", "--version", "1.1")

    assert result.exit_code == 1
    assert "cannot be reached" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_repository_fails_in_one_line(tmp_path: Path) -> None:
    """The same."""
    assert verify("127.0.0.1:1", tmp_path / "nowhere").stderr.endswith("nowhere: no such folder\n")
    assert verify("127.0.0.1:1", tmp_path).stderr.startswith("no models found in ")
