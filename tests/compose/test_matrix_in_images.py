"""The support matrix across images: the ones under test, and one with another scikit-learn."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer

from splitserve import publish
from splitserve.arrays import from_array, to_array
from splitserve.repository import golden as goldens
from splitserve.repository import release_log
from splitserve.repository.manifest import GOLDEN_FILE, MANIFEST_FILE
from splitserve.repository.release import ReleaseKey, encode
from splitserve.repository.releases import decode_release
from splitserve.runtimes.release import golden_of
from splitserve.versions import Pair
from tests.compose.stack import ROOT, Stack, run

pytestmark = [pytest.mark.compose, pytest.mark.xdist_group("compose"), pytest.mark.timeout(900)]

OTHER = "1.8"
"""The minor version before the one in the locks."""

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def old_image(docker: str, project: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The preprocess image, built from a lock with the other scikit-learn."""
    context = tmp_path_factory.mktemp("context")
    for name in ("splitserve", "proxy", "preprocess_service", "predict_service", "jobs_service", "requirements"):
        shutil.copytree(ROOT / name, context / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Dockerfile", ".dockerignore"):
        shutil.copy(ROOT / name, context / name)
    (context / "constraint.txt").write_text(f"scikit-learn=={OTHER}.*\n")
    run([
        BIN / "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--generate-hashes",
        "--no-emit-index-url", "--extra", "preprocess", "--constraint", context / "constraint.txt",
        "--output-file", context / "requirements" / "preprocess.txt", ROOT / "pyproject.toml",
    ])  # fmt: skip
    image = f"{project}-preprocess:sklearn-{OTHER}"
    secret = f"id=pip_conf,src={os.environ.get('PIP_CONFIG_FILE', '/dev/null')}"
    run([docker, "build", "--quiet", "--target", "preprocess", "--secret", secret, "--tag", image, context])
    yield image
    run([docker, "image", "rm", image])


@pytest.fixture(scope="module")
def slim_image(docker: str, project: str) -> Iterator[str]:
    """With numpy alone."""
    image = f"{project}-preprocess-slim"
    secret = f"id=pip_conf,src={os.environ.get('PIP_CONFIG_FILE', '/dev/null')}"
    run([docker, "build", "--quiet", "--target", "preprocess-slim", "--secret", secret, "--tag", image, ROOT])
    yield image
    run([docker, "image", "rm", image])


def matrix(docker: str, repository: Path, *images: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, what was printed as JSON, what was complained of."""
    options = [word for image in images for word in ("--image", image)]
    answer = subprocess.run(
        [BIN / "splitserve", "matrix", "--repository", repository, "--docker", docker, "--json", *options],
        capture_output=True,
        text=True,
    )
    return answer.returncode, json.loads(answer.stdout), answer.stderr


def test_images_check_what_they_serve_and_the_results_are_combined(
    docker: str, stack: Stack, repository: Path, old_image: str, slim_image: str, tmp_path: Path
) -> None:
    """Each image tries its own half; a pair is admitted in two of them together. One that is not portable is not admitted where
    scikit-learn is another, or missing.
    """
    new, predict = f"{stack.project}-preprocess", f"{stack.project}-predict"
    models = tmp_path / "models"
    shutil.copytree(repository, models)
    X, y = load_iris(return_X_y=True)
    publish(make_pipeline(SplineTransformer(), LogisticRegression(max_iter=1000)).fit(X, y), X, name="splines", repository=models)

    status, found, complaints = matrix(docker, models, old_image, slim_image, new, predict)

    kinds = {name: report["kinds"] for name, report in found["environments"].items()}
    verdicts = {release["model"]: release["verdicts"] for release in found["releases"]}
    assert kinds == {old_image: ["preprocess"], slim_image: ["preprocess"], new: ["preprocess"], predict: ["predict"]}
    assert verdicts.keys() == {"breast-cancer", "digits", "splines", "weather"}
    splines = verdicts.pop("splines")
    for model, verdict in verdicts.items():
        assert all(each["is_admitted"] for each in verdict.values()), model
    assert splines[f"{new} + {predict}"]["is_admitted"]
    assert f"this service runs {OTHER}." in splines[f"{old_image} + {predict}"]["reasons"][0]
    assert 'not portable: step "splinetransformer" (SplineTransformer)' in splines[f"{slim_image} + {predict}"]["reasons"][0]
    assert status == 1
    assert len(found["problems"]) == 2
    assert complaints == ""


def test_the_slim_image_holds_numpy_alone(docker: str, slim_image: str) -> None:
    """Nothing of scikit-learn, nor what it needs."""
    names = [
        "numpy",
        "sklearn",
        "skops",
        "pandas",
        "scipy",
        "joblib",
        "PIL",
        "onnxruntime",
        "predict_service",
        "preprocess_service",
    ]
    code = f"import importlib.util, json; print(json.dumps([n for n in {names} if importlib.util.find_spec(n)]))"

    found = json.loads(run([docker, "run", "--rm", "--entrypoint", "python", slim_image, "-c", code]))

    assert found == ["numpy", "preprocess_service"]


def test_the_images_of_one_build_serve_everything(docker: str, stack: Stack, repository: Path) -> None:
    """What the stack serves is what the matrix admits: exit status 0."""
    status, found, complaints = matrix(docker, repository, f"{stack.project}-preprocess", f"{stack.project}-predict")

    assert (status, complaints) == (0, "")
    assert {trial["golden"] for report in found["environments"].values() for trial in report["trials"]} == {"agree"}


def test_the_whole_of_a_release_is_run_across_the_images(docker: str, stack: Stack, repository: Path, tmp_path: Path) -> None:
    """Each half agrees in its image, and the answer of the two is not the recorded one."""
    models = tmp_path / "models"
    shutil.copytree(repository, models)
    spoil_release(models, ReleaseKey("digits", 1, Pair(1, 1)))

    status, found, complaints = matrix(docker, models, f"{stack.project}-preprocess", f"{stack.project}-predict")

    admitted = {each["model"]: all(verdict["is_admitted"] for verdict in each["verdicts"].values()) for each in found["releases"]}
    assert (status, complaints) == (1, "")
    assert admitted == {"breast-cancer": True, "digits": False, "weather": True}
    assert {trial["golden"] for report in found["environments"].values() for trial in report["trials"]} == {"agree"}
    (problem,) = found["problems"]
    assert 'output "probabilities" of golden sample' in problem


def spoil_release(models: Path, key: ReleaseKey) -> None:
    """Record other answers, with digests that are right."""
    folder = models / str(key)
    manifest = decode_release((folder / MANIFEST_FILE).read_bytes(), key)
    golden = golden_of(manifest, (folder / GOLDEN_FILE).read_bytes())
    outputs = tuple(
        from_array(each.name, to_array(each) * 0.5, each.datatype) if each.datatype in ("FP32", "FP64") else each
        for each in golden.outputs
    )
    data = goldens.encode(goldens.Golden(golden.inputs, outputs))
    (folder / GOLDEN_FILE).write_bytes(data)
    changed = msgspec.structs.replace(manifest, files=release_log.digests({GOLDEN_FILE: data}))
    (folder / MANIFEST_FILE).write_bytes(encode(changed))
