"""A bundle published with another version of scikit-learn, in a separate environment."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.system.processes import System, wait_until

pytestmark = pytest.mark.xdist_group("guard")

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")
MAJOR, MINOR = map(int, version("scikit-learn").split(".")[:2])
OTHER = f"{MAJOR}.{MINOR - 1}"
"""The minor version before the one here."""

PUBLISH = """
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer, StandardScaler
from splitserve import publish
X, y = load_iris(return_X_y=True)
print(publish(make_pipeline(SplineTransformer(), LogisticRegression()).fit(X, y), X, name="iris", repository="models"))
print(publish(make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y), X, name="portable", repository="models"))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published under the other scikit-learn, which comes before the one here on the path; all else is as here."""
    folder = tmp_path_factory.mktemp("other")
    install = [UV, "pip", "install", "--quiet", "--python", sys.executable, "--only-binary", ":all:"]
    subprocess.run([*install, "--target", folder / "packages", "--no-deps", f"scikit-learn=={OTHER}.*"], check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "packages"), str(ROOT)])}
    subprocess.run([sys.executable, "-W", "ignore", "-c", PUBLISH], cwd=folder, env=environment, check=True)
    return folder / "models"


def test_another_minor_version_is_refused_with_a_hint(repository: Path) -> None:
    """Before anything of it is loaded; the service is up and says so."""
    system = System(repository, is_fused=True).wait_until_settled()
    try:
        status, answer = system.rest("/v2/models/iris/ready")
        live, _ = system.rest("/v2/health/live")
        portable, _ = system.rest("/v2/models/portable/ready")
        _, metadata = system.rest("/v2/models/portable")
    finally:
        system.stop()

    assert (status, live) == (503, 200)
    assert portable == 200  # its plan needs no scikit-learn
    assert "warnings" not in metadata["properties"]
    assert f"published with scikit-learn {OTHER}." in answer["error"]
    assert "PREPROCESS_ALLOW_ENVIRONMENT_MISMATCH=true" in answer["error"]


def test_if_allowed_golden_samples_decide_and_metadata_has_a_warning(repository: Path) -> None:
    """It serves because its golden samples agree; the metadata has a warning."""
    system = System(repository, is_fused=True, PREPROCESS_ALLOW_ENVIRONMENT_MISMATCH="true").wait_until_settled()
    try:
        wait_until(lambda: system.rest("/v2/models/iris/ready")[0] == 200, "ready")
        _, metadata = system.rest("/v2/models/iris")
        admitted = system.processes["fused"].wait_for("pair admitted")
    finally:
        system.stop()

    assert "allowed: relying on the golden samples" in metadata["properties"]["warnings"]
    assert "scikit-learn" in str(admitted["warnings"])
