"""Models of MLflow's registry: published from their files, without running anything of theirs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from splitserve import PublishError
from splitserve.publishing.from_mlflow import N_ROWS_MIN, read, sample_rows
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from tests.command_line import run_command

RANDOM = np.random.default_rng(0)
X = pd.DataFrame({"size": RANDOM.normal(size=60), "count": RANDOM.integers(0, 5, 60), "is_new": RANDOM.random(60) > 0.5})
Y = (X["size"] > 0).astype(int)
PIPELINE = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, Y)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A registry in a folder, with the model `wine`: 1 with a long example, 2 with a short one, 3 a pickle, 4 no pipeline."""
    folder = tmp_path_factory.mktemp("mlflow") / "registry"
    with pytest.MonkeyPatch.context() as environment, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        environment.setenv("MLFLOW_TRACKING_URI", folder.as_uri())
        environment.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        environment.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        mlflow.set_tracking_uri(folder.as_uri())
        versions: list[tuple[Any, Any, str]] = [
            (PIPELINE, X, "skops"),
            (PIPELINE, X[:5], "skops"),
            (PIPELINE, X, "pickle"),
            (LogisticRegression().fit(X.to_numpy(float), Y), X.to_numpy(float), "skops"),
        ]
        for model, example, form in versions:
            with mlflow.start_run():
                mlflow.sklearn.log_model(
                    model,
                    name="model",
                    input_example=example,
                    registered_model_name="wine",
                    pip_requirements=[],
                    serialization_format=form,
                )
        mlflow.MlflowClient().set_registered_model_alias("wine", "champion", "1")
        yield folder


def run(*arguments: object) -> Any:
    return run_command("publish", *arguments)


def test_a_registered_model_is_published_by_its_alias(registry: Path, tmp_path: Path) -> None:
    """Under its registered name; both manifests name the version that the alias stood for."""
    result = run("--mlflow", "models:/wine@champion", "--repository", tmp_path)

    assert result.exit_code == 0, result.output
    assert "models:/wine/1 is wine 1.1" in result.output
    for kind in ("preprocess", "predict"):
        manifest = Repository(tmp_path).open(BundleKey("wine", kind, 1)).manifest
        assert manifest.origin == "models:/wine/1"
    inputs = Repository(tmp_path).open(BundleKey("wine", "preprocess", 1)).manifest.inputs
    assert [(spec.name, spec.datatype) for spec in inputs] == [("size", "FP64"), ("count", "FP64"), ("is_new", "BOOL")]


def test_a_short_example_needs_more_rows(registry: Path, tmp_path: Path) -> None:
    """From a file; its columns get the example's datatypes."""
    X.to_csv(tmp_path / "rows.csv", index=False)

    alone = run("wine-2", "--mlflow", "models:/wine/2", "--repository", tmp_path / "models")
    together = run("wine-2", "--mlflow", "models:/wine/2", "--rows", tmp_path / "rows.csv", "--repository", tmp_path / "models")

    assert alone.exit_code == 1
    assert f"its input example has 5 rows, at least {N_ROWS_MIN} are needed" in alone.output
    assert together.exit_code == 0, together.output
    assert "wine-2 1.1" in together.output


def test_a_pickle_is_read_only_if_that_is_allowed(registry: Path, tmp_path: Path) -> None:
    """The message says how to log it otherwise."""
    refused = run("--mlflow", "models:/wine/3", "--repository", tmp_path)
    allowed = run("--mlflow", "models:/wine/3", "--allow-pickle", "--repository", tmp_path)

    assert refused.exit_code == 1
    assert 'log it with serialization_format="skops"' in refused.output
    assert allowed.exit_code == 0, allowed.output


def test_a_bare_estimator_is_a_pipeline_of_one_step(registry: Path) -> None:
    """Its example is an array."""
    registered = read("models:/wine/4")

    assert [type(step).__name__ for _, step in registered.pipeline.steps] == ["LogisticRegression"]
    assert sample_rows(registered, None).shape == (60, 3)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("models:/wine", "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("runs:/123/model", "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/wine/99", "models:/wine/99: .*not found"),
        ("models:/wine@nobody", "models:/wine@nobody: .*nobody"),
    ],
)
def test_an_address_that_names_no_version_is_refused(registry: Path, address: str, message: str) -> None:
    """In MLflow's words where it has some."""
    with pytest.raises(PublishError, match=message):
        read(address)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"flavors": {"onnx": {}, "python_function": {}}},
            "got onnx; get its files with .* -u models:/wine/1.*--onnx model.onnx",
        ),
        ({"flavors": {"lightgbm": {}}}, r'got lightgbm; load it with mlflow.lightgbm.load_model\("models:/wine/1"\)'),
        ({"flavors": {"pytorch": {}}}, "got pytorch; export the pytorch model to ONNX"),
        ({"flavors": {"python_function": {}}}, "got python_function alone; log the fitted pipeline with mlflow.sklearn"),
        ({"flavors": {"sklearn": {"pickled_model": "../../../secret", "serialization_format": "skops"}}}, "outside of the model"),
        ({"flavors": {"sklearn": {"pickled_model": "MLmodel", "serialization_format": "skops"}}}, "not a skops file"),
        ({"flavors": None}, "MLmodel cannot be read"),
        ({"saved_input_example_info": {"type": "dataframe", "artifact_path": "/etc/passwd"}}, "outside of the model"),
        ({"saved_input_example_info": {"type": "dataframe", "artifact_path": "MLmodel"}}, "input example cannot be read"),
    ],
    ids=["onnx", "boosting", "network", "function", "elsewhere", "no skops", "damaged", "example elsewhere", "no example"],
)
def test_what_the_model_says_of_itself_is_not_trusted(
    registry: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    """Paths stay inside of it; what is damaged is named."""
    import mlflow.artifacts

    download = mlflow.artifacts.download_artifacts

    def changed(**options: Any) -> str:
        folder = Path(download(**options))
        described = yaml.safe_load((folder / "MLmodel").read_text())
        (folder / "MLmodel").write_text(yaml.safe_dump({**described, **change}))
        return str(folder)

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", changed)

    with pytest.raises(PublishError, match=message):
        read("models:/wine@champion")


def test_types_that_a_model_asks_to_trust_are_not_trusted_for_that(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only --trusted-module counts."""
    import mlflow.artifacts
    import skops.io
    from sklearn.preprocessing import FunctionTransformer

    pipeline = make_pipeline(FunctionTransformer(np.sort), LogisticRegression()).fit(X.to_numpy(float), Y)
    download = mlflow.artifacts.download_artifacts

    def changed(**options: Any) -> str:
        folder = Path(download(**options))
        described = yaml.safe_load((folder / "MLmodel").read_text())
        described["flavors"]["sklearn"]["skops_trusted_types"] = ["numpy.sort"]
        (folder / "MLmodel").write_text(yaml.safe_dump(described))
        skops.io.dump(pipeline, folder / "model.skops")
        return str(folder)

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", changed)

    with pytest.raises(PublishError, match="types that are not allowed: numpy.sort"):
        read("models:/wine@champion")


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    """With what goes together."""
    both = run("wine", "--mlflow", "models:/wine/1", "--data", tmp_path / "rows.csv")
    nothing = run("wine", "--pipeline", tmp_path / "pipeline.skops")

    assert (both.exit_code, nothing.exit_code) == (2, 2)
    assert "--rows adds more" in both.output
    assert "give NAME and --data" in nothing.output
