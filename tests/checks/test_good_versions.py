"""Versions that answer as in training but differ otherwise: none is refused."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pandas as pd
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_iris
from sklearn.decomposition import PCA
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, KBinsDiscretizer, PowerTransformer, QuantileTransformer, StandardScaler

from splitserve import publish, publish_predictor, publish_preprocessor, release
from splitserve.checks.examination import Report, examine
from splitserve.checks.matrix import HERE, Matrix, judge
from splitserve.checks.verify import golden_rows
from splitserve.publishing.convert import to_onnx
from splitserve.repository import environment
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import Kind
from splitserve.repository.releases import ReleaseReader
from splitserve.repository.source import BundleSource
from splitserve.repository.sources.local_folder import LocalFolder
from splitserve.runtimes import predictor as predictors
from splitserve.runtimes import preprocessor as preprocessors
from splitserve.runtimes.release import WholeRelease, check_answer
from tests.demo_models import Demos

IRIS, SPECIES = load_iris(return_X_y=True)
SCALER = StandardScaler().fit(IRIS)
PIPELINE = make_pipeline(StandardScaler(), LogisticRegression()).fit(IRIS, SPECIES)
FEATURES = SCALER.transform(IRIS).astype(np.float32)


def matrix(models: Path | BundleSource) -> Matrix:
    source = Repository(models) if isinstance(models, Path) else models
    return judge(source, {HERE: examine(source)})


def serving(models: Path | BundleSource) -> list[str]:
    """The pairs that a service would serve; nothing is wrong with the repository."""
    found = matrix(models)
    assert found.problems == ()
    return [release.pair for release in found.releases if release.verdicts[HERE].is_admitted]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    publish(PIPELINE, IRIS, name="m", repository=models)
    return models


def with_another_patch(version: str) -> str:
    """1.9.1 -> 1.9.91."""
    first, second, *_ = version.split(".")
    return f"{first}.{second}.91"


def test_other_patch_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every library: published with these, served with those of this environment."""
    observe = environment.observe
    monkeypatch.setattr(
        environment, "observe", lambda packages: {name: with_another_patch(each) for name, each in observe(packages).items()}
    )
    publish(PIPELINE, IRIS, name="m", repository=tmp_path)
    monkeypatch.undo()

    assert serving(tmp_path) == ["1.1"]


def predictor() -> onnx.ModelProto:
    return to_onnx(PIPELINE[-1], 4, input_name="features", precision="FP32")


def test_an_extra_predictor_version(published: Path, tmp_path: Path) -> None:
    """Published and not released: it changes nothing."""
    models = Path(shutil.copytree(published, tmp_path / "models"))
    publish_predictor(predictor(), FEATURES * 2, name="m", repository=models)

    assert serving(models) == ["1.1"]


def released(models: Path, model: onnx.ModelProto) -> None:
    """The predictor as version 2, with the preprocessor that it was trained on."""
    publish_predictor(
        model.SerializeToString(), FEATURES, name="m", repository=models, labels=[0, 1, 2], trained_on=SCALER, rows=IRIS
    )
    release("m", "1.2", repository=models)


def test_a_renamed_symbolic_dimension(published: Path, tmp_path: Path) -> None:
    """Of the batch, and of another one that is free."""
    models = Path(shutil.copytree(published, tmp_path / "models"))
    model = predictor()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "how_many"

    released(models, model)

    assert serving(models) == ["1.1", "1.2"]


def test_reordered_outputs(published: Path, tmp_path: Path) -> None:
    """They have names."""
    models = Path(shutil.copytree(published, tmp_path / "models"))
    model = predictor()
    outputs = list(model.graph.output)
    assert len(outputs) == 2
    del model.graph.output[:]
    model.graph.output.extend(reversed(outputs))

    released(models, model)

    assert serving(models) == ["1.1", "1.2"]


def test_a_repository_that_was_copied_file_by_file(published: Path, tmp_path: Path) -> None:
    """In any order, without times and modes; incomplete bundles do not serve and do no harm meanwhile."""
    files = [path for path in published.rglob("*") if path.is_file() and not path.name.startswith(".")]
    random.Random(0).shuffle(files)
    source = LocalFolder(tmp_path / "models")
    for number, path in enumerate(files, start=1):
        target = tmp_path / "models" / path.relative_to(published)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        if number < len(files):
            served = {
                each.pair for each in matrix(source).releases if each.verdicts.get(HERE) and each.verdicts[HERE].is_admitted
            }
            assert served == set()

    assert serving(source) == ["1.1"]


def as_volume(folder: Path) -> None:
    """Lay out a folder as Kubernetes does a volume's: FILE -> ..data/FILE, ..data -> ..2026_11_30."""
    data = folder / "..2026_11_30_12_00_00.123"
    data.mkdir()
    for path in [each for each in folder.iterdir() if each.is_file()]:
        path.rename(data / path.name)
        path.symlink_to(Path("..data", path.name))
    (folder / "..data").symlink_to(data.name)


@pytest.mark.parametrize("whole", [False, True], ids=["each folder is a volume", "the root is linked too"])
def test_a_read_only_volume_with_links(published: Path, tmp_path: Path, whole: bool) -> None:
    models = Path(shutil.copytree(published, tmp_path / "models"))
    for manifest in list(models.rglob("manifest.json")):
        as_volume(manifest.parent)
    for path in models.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    if whole:
        (tmp_path / "link").symlink_to(models)
        models = tmp_path / "link"

    assert serving(LocalFolder(models)) == ["1.1"]

    for path in (tmp_path / "models").rglob("*"):  # so that it can be removed
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


def test_halves_that_were_refitted_to_the_same_numbers(published: Path, tmp_path: Path) -> None:
    """By another program, in another file: only the numbers count."""
    models = Path(shutil.copytree(published, tmp_path / "models"))
    again = make_pipeline(StandardScaler()).fit(IRIS)
    publish_preprocessor(again, IRIS, name="m", repository=models)
    release("m", "2.1", repository=models)

    assert serving(models) == ["1.1", "2.1"]


def test_features_of_other_names_and_the_same_numbers(tmp_path: Path) -> None:
    """A step was renamed, and with it the features: `release` compares numbers, and a proven pair serves."""
    frame = pd.DataFrame(IRIS, columns=["a", "b", "c", "d"])
    first = ColumnTransformer([("scaled", StandardScaler(), list(frame.columns))]).fit(frame)
    second = ColumnTransformer([("standardised", StandardScaler(), list(frame.columns))]).fit(frame)
    publish(make_pipeline(first, LogisticRegression()).fit(frame, SPECIES), frame, name="m", repository=tmp_path)
    publish_preprocessor(second, frame, name="m", repository=tmp_path)

    assert release("m", "2.1", repository=tmp_path).manifest.accepted == ()
    assert serving(tmp_path) == ["1.1", "2.1"]


def test_replaying_a_release_adds_less_than_50_ms_to_loading(demos: Demos) -> None:
    """For the demo models, with the record and its golden rows read from disk. The fastest of several counts."""
    repository = Repository(demos.repository)
    for model in demos.models:
        release = ReleaseReader(repository).history(model).current()
        assert release is not None
        whole = WholeRelease(
            preprocessors.load(repository.open(BundleKey(model, "preprocess", release.pair.preprocessor))),
            predictors.load(repository.open(BundleKey(model, "predict", release.pair.predictor))),
        )

        times = []
        for _ in range(5):
            started = time.perf_counter()
            golden = golden_rows(repository, release)
            check_answer(release.manifest, golden, whole.infer(golden.inputs))
            times.append(time.perf_counter() - started)

        assert min(times) < 0.05, model


# Another CPU: other code paths of numpy and of OpenBLAS round the last places differently


PIPELINES: dict[str, Any] = {
    "logistic": make_pipeline(StandardScaler(), LogisticRegression()),
    "network": make_pipeline(StandardScaler(), MLPClassifier((16, 8), activation="tanh", max_iter=3000, random_state=0)),
    "power": make_pipeline(PowerTransformer(), Ridge()),
    "quantiles": make_pipeline(QuantileTransformer(n_quantiles=50, output_distribution="normal"), LogisticRegression()),
    "log": make_pipeline(FunctionTransformer(np.log1p), PCA(3), RandomForestClassifier(20, random_state=0)),
    "bins": make_pipeline(PCA(3), KBinsDiscretizer(5, encode="onehot-dense"), LogisticRegression()),
    "trees": make_pipeline(PCA(4), GradientBoostingClassifier(n_estimators=10, random_state=0)),
}


@pytest.fixture(scope="module")
def numeric(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with exp, log, powers, matrix products, and thresholds behind them."""
    models = tmp_path_factory.mktemp("numeric")
    for name, pipeline in PIPELINES.items():
        publish(pipeline.fit(IRIS, SPECIES), IRIS, name=name, repository=models)
    return models


def dispatched() -> list[str]:
    """Instructions that numpy uses here where they are available, and that can be switched off."""
    from numpy._core import _multiarray_umath as umath

    return [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__.get(name)]


def examined_elsewhere(models: Path, **variables: str) -> Report:
    """By a process of its own that believes to run on another CPU."""
    environment_ = {**os.environ, **variables}
    command = [sys.executable, "-m", "splitserve.checks.examination", str(models)]
    answer = subprocess.run(command, env=environment_, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return msgspec.json.decode(answer.stdout.splitlines()[-1], type=Report)


CPUS = {
    "the plainest numpy": {"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched())},
    "an old OpenBLAS": {"OPENBLAS_CORETYPE": "Prescott"},
    "OpenBLAS for Haswell": {"OPENBLAS_CORETYPE": "Haswell"},
    "OpenBLAS for Nehalem": {"OPENBLAS_CORETYPE": "Nehalem"},
    "both": {"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched()), "OPENBLAS_CORETYPE": "Prescott"},
}


@pytest.mark.parametrize("cpu", CPUS)
def test_another_cpu(numeric: Path, cpu: str) -> None:
    """Every bundle and release agrees with what was recorded here."""
    report = examined_elsewhere(numeric, **CPUS[cpu])

    kinds: tuple[Kind, ...] = ("preprocess", "predict")
    assert set(report.kinds) == set(kinds)
    assert len(report.releases) == len(PIPELINES)
    assert [trial.reason for trial in (*report.trials, *report.releases) if trial.reason] == []
