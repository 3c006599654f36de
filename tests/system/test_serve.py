"""`splitserve.testing.serve`: a user's own pipeline, end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from splitserve import Client
from splitserve.testing import serve
from splitserve.testing.systems import NotServed

X, Y = load_wine(return_X_y=True, as_frame=True)
PIPELINE = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, Y)


def test_a_pipeline_is_published_and_served(splitserve_serve: Callable[..., Client]) -> None:
    """With the answers of the pipeline, over both protocols."""
    client = splitserve_serve(PIPELINE, X, name="wine")

    assert client.infer("wine", X[:9])["label"].tolist() == PIPELINE.predict(X[:9]).tolist()
    with Client(client.grpc_url) as other:
        assert other.infer("wine", X[:9])["label"].tolist() == PIPELINE.predict(X[:9]).tolist()


@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
def test_columns_of_a_model_that_takes_an_array_go_by_name() -> None:
    """Published from an array, the model has the names of the frame that it was fitted on: another order, the same answers."""
    with serve(PIPELINE, X.to_numpy(), over="grpc") as client:
        frame = X[:9][list(reversed(X.columns))]
        found = client.infer("model", frame)

    np.testing.assert_array_equal(found["label"], PIPELINE.predict(X[:9]))


def test_a_repository_that_has_nothing_to_serve_is_an_error(tmp_path: Path) -> None:
    """With the log of the services."""
    with pytest.raises(NotServed, match="last log lines"), serve(tmp_path / "nowhere"):
        pass


def test_services_whose_packages_are_not_installed_say_how_to_install_them(tmp_path: Path) -> None:
    """As for a user who has the client only, and a repository that others published."""
    (tmp_path / "structlog.py").write_text("raise ModuleNotFoundError(\"No module named 'structlog'\", name='structlog')")

    with (
        pytest.raises(NotServed, match=r'not installed: pip install "splitserve\[publish,proxy,preprocess,predict\]"'),
        serve(tmp_path, environment={"PYTHONPATH": str(tmp_path)}),
    ):
        pass
