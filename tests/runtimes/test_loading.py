"""Loading a bundle: what its manifest promises is compared with what is there."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from splitserve import publish_predictor, publish_preprocessor
from splitserve.publishing import PublishError
from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import BundleError
from splitserve.repository.source import load_bundle
from splitserve.runtimes import predictor, preprocessor
from splitserve.runtimes.preprocessor import Preprocessor
from tests.folders import MadeOnce
from tests.system.models import softmax_model

pytestmark = pytest.mark.heavy  # they publish

ROWS = np.random.default_rng(0).normal(size=(6, 3))


@pytest.fixture
def scaler(made_once: MadeOnce, tmp_path: Path) -> Bundle:
    shutil.copytree(made_once(publish_scaler), tmp_path, dirs_exist_ok=True)
    return Repository(tmp_path).open(BundleKey("m", "preprocess", 1))


@pytest.fixture
def model(made_once: MadeOnce, tmp_path: Path) -> Bundle:
    shutil.copytree(made_once(publish_model), tmp_path, dirs_exist_ok=True)
    return Repository(tmp_path).open(BundleKey("m", "predict", 1))


def publish_scaler(repository: Path) -> None:
    publish_preprocessor(StandardScaler().fit(ROWS), ROWS, name="m", repository=repository)


def publish_model(repository: Path) -> None:
    publish_predictor(softmax_model(3), ROWS.astype(np.float32), name="m", repository=repository)


def changed(bundle: Bundle, change: Callable[[dict[str, Any]], None]) -> Repository:
    """The bundle's repository, once something in the manifest has been changed."""
    file = bundle.folder / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    return Repository(bundle.folder.parents[2])


def put(side: str, field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest[side][0].update({field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            put("inputs", "name", "other"),
            "expected inputs \"other\" FP32 ['batch', 3] as in manifest.json, got \"features\" FP32 ['batch', 3]",
        ),
        (
            put("inputs", "datatype", "FP64"),
            "expected inputs \"features\" FP64 ['batch', 3] as in manifest.json, got \"features\" FP32 ['batch', 3]",
        ),
        (put("inputs", "shape", ["batch", 4]), "expected inputs \"features\" FP32 ['batch', 4] as in manifest.json"),
        (put("outputs", "shape", ["batch", "n"]), " as in manifest.json, got \"scores\" FP32 ['batch', 2]"),
        (
            lambda manifest: manifest.update(outputs=[]),
            "expected outputs none as in manifest.json, got \"scores\" FP32 ['batch', 2]",
        ),
    ],
)
def test_a_predictors_signature_is_that_of_its_graph(model: Bundle, change: Any, message: str) -> None:
    """Pairs are checked by the manifest, so the graph must agree with it; the error shows both."""
    repository = changed(model, change)

    with pytest.raises(BundleError, match=f"^m/predict/1: model.onnx: .*{re.escape(message)}"):
        load_bundle(repository, model.key, predictor.load)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("outputs", "shape", ["batch", 4]), 'golden samples: output "features": expected FP32 [6, 4], got FP32 [6, 3]'),
        (put("outputs", "datatype", "FP64"), 'golden.npz: "features": expected FP64 as in manifest.json, got FP32'),
        (put("outputs", "name", "other"), "golden.npz: outputs/other is not a file in the archive"),
        (put("inputs", "datatype", "FP32"), 'golden.npz: "features": expected FP32 as in manifest.json, got FP64'),
        (put("inputs", "shape", ["batch", 4]), 'golden samples: input "features": expected shape [-1, 4], got [6, 3]'),
    ],
)
def test_a_preprocessors_signature_is_observed_on_its_golden_samples(scaler: Bundle, change: Any, message: str) -> None:
    """Fitted transforms do not declare their outputs: the observed ones must be those of the manifest."""
    repository = changed(scaler, change)

    with pytest.raises(BundleError, match=f"^m/preprocess/1: {re.escape(message)}"):
        load_bundle(repository, scaler.key, partial(preprocessor.load, runtime="sklearn"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("outputs", "shape", ["batch", 4]), "plan.json: expected features [4] as in manifest.json, the last step makes"),
        (put("outputs", "datatype", "FP64"), 'golden.npz: "features": expected FP64 as in manifest.json, got FP32'),
        (put("inputs", "shape", ["batch", 4]), 'plan.json: step 3 ("subtract"): array "by": expected shape [4], got [3]'),
        (lambda manifest: manifest.update(portable=False), 'manifest.json: expected "portable": true if and only if'),
        (lambda manifest: manifest.pop("rows"), "manifest.json"),
    ],
)
def test_a_plan_fits_the_signature(scaler: Bundle, change: Any, message: str) -> None:
    """It is bound to the manifest's inputs and output before it runs."""
    repository = changed(scaler, change)

    with pytest.raises(BundleError, match=f"^m/preprocess/1: {re.escape(message)}"):
        load_bundle(repository, scaler.key, preprocessor.load)


def test_a_plan_serves_whatever_the_version_of_scikit_learn(scaler: Bundle) -> None:
    """It is bound to numpy's major version; where that is another, to the rules of the transforms, which are loaded instead."""
    repository = changed(scaler, lambda manifest: manifest["environment"].update({"scikit-learn": "0.24.2", "skops": "99.0"}))
    loaded = load_bundle(repository, scaler.key, preprocessor.load)
    assert (loaded.runtime, loaded.transformer, loaded.warnings) == ("plan", None, ())

    changed(scaler, lambda manifest: manifest["environment"].update({"numpy": "1.26.4"}))
    with pytest.raises(
        BundleError, match=r"published with scikit-learn 0\.24\.2, .*published with numpy 1\.26\.4, this service runs"
    ):
        load_bundle(repository, scaler.key, preprocessor.load)
    allowed = load_bundle(repository, scaler.key, partial(preprocessor.load, allow_environment_mismatch=True))
    assert (allowed.runtime, allowed.transformer) == ("plan", None)
    assert "published with numpy 1.26.4" in allowed.warnings[0]


def test_a_plan_of_other_unicode_tables_is_left_to_the_transforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a word is depends on them. If the transforms can be loaded, they serve, and a warning says why."""
    texts = np.array(["a bird", "it flew", "gone"], dtype=object)
    bundle = publish_preprocessor(CountVectorizer().fit(texts), texts, name="m", repository=tmp_path)
    monkeypatch.setattr("splitserve.runtimes.plans.files.unicodedata", SimpleNamespace(unidata_version="99.0.0"))

    loaded = preprocessor.load(bundle)

    assert loaded.transformer is not None
    assert re.search(r"the plan is not used: .* published with unicodedata .*, this service runs 99\.0\.0", loaded.warnings[0])


def without_plan(manifest: dict[str, Any]) -> None:
    """As published before there were plans."""
    manifest.pop("portable")
    for name in ("plan.json", "plan.npz"):
        manifest["files"].pop(name)


def test_a_bundle_without_a_plan_loads_its_transforms(scaler: Bundle) -> None:
    """Those that were published before there were plans, with the same answers."""
    repository = changed(scaler, without_plan)
    (scaler.folder / "plan.json").unlink()
    (scaler.folder / "plan.npz").unlink()

    loaded = load_bundle(repository, scaler.key, preprocessor.load)

    assert loaded.transformer is not None
    assert loaded.warnings == ()


def test_the_environment_is_compared_before_anything_is_loaded(scaler: Bundle, model: Bundle) -> None:
    """The file that would be loaded does not exist."""
    for name in ("pipeline.skops", "plan.json", "plan.npz"):
        (scaler.folder / name).unlink()
    (model.folder / "model.onnx").unlink()
    changed(scaler, without_plan)
    changed(scaler, lambda manifest: manifest["environment"].update({"scikit-learn": "0.24.2"}))
    repository = changed(model, lambda manifest: manifest["environment"].update({"ONNX IR": "99"}))

    with pytest.raises(BundleError, match="published with scikit-learn 0.24.2, this service runs"):
        load_bundle(repository, scaler.key, preprocessor.load)
    with pytest.raises(
        BundleError, match="published with ONNX IR version 99, ONNX Runtime .* supports up to .*; serve it with a newer"
    ):
        load_bundle(repository, model.key, predictor.load)


@pytest.mark.parametrize("nonsense", ["9" * 5000, "-1", "", "seventeen", "1.5"])
def test_versions_that_are_not_numbers_are_left_to_the_runtime(model: Bundle, nonsense: str) -> None:
    """It reads those in the model itself."""
    repository = changed(
        model,
        lambda manifest: manifest["environment"].update({"ONNX IR": nonsense, "opset ai.onnx": nonsense, "opset x": nonsense}),
    )

    load_bundle(repository, model.key, predictor.load)


def with_a_pattern() -> FunctionTransformer:
    """Passes rows on, and holds what skops cannot."""
    return FunctionTransformer(np.nan_to_num, inv_kw_args={"pattern": re.compile("a")}).fit(ROWS)


def test_a_pickle_is_written_and_read_only_if_explicitly_allowed(tmp_path: Path) -> None:
    """Both the publisher and the service must allow it."""
    with pytest.raises(PublishError, match="allow_pickle=True"):
        publish_preprocessor(with_a_pattern(), ROWS, name="m", repository=tmp_path, trusted_modules=["re", "numpy"])
    bundle = publish_preprocessor(with_a_pattern(), ROWS, name="m", repository=tmp_path, allow_pickle=True)

    with pytest.raises(
        BundleError, match=r"pipeline\.joblib: a pickle, and loading one runs any code .*PREPROCESS_ALLOW_UNSAFE_PICKLE"
    ):
        preprocessor.load(bundle)
    loaded: Preprocessor = preprocessor.load(bundle, allow_unsafe_pickle=True)

    assert any("a pickle, which can run any code" in warning for warning in loaded.warnings)


def test_a_pickle_whose_plan_is_known_is_not_loaded(tmp_path: Path) -> None:
    """The plan serves, so nothing has to be allowed."""
    transformer = FunctionTransformer(inv_kw_args={"pattern": re.compile("a")}).fit(ROWS)
    bundle = publish_preprocessor(transformer, ROWS, name="m", repository=tmp_path, allow_pickle=True)

    assert "pipeline.joblib" in bundle.manifest.files
    assert preprocessor.load(bundle).warnings == ()


def test_pipelines_that_skops_supports_are_never_pickled(tmp_path: Path) -> None:
    """A pickle is written only if skops cannot store the transforms, even if pickles are allowed."""
    bundle = publish_preprocessor(StandardScaler().fit(ROWS), ROWS, name="m", repository=tmp_path, allow_pickle=True)

    assert sorted(bundle.manifest.files) == ["golden.npz", "pipeline.onnx", "pipeline.skops", "plan.json", "plan.npz"]
    assert preprocessor.load(bundle).warnings == ()


class Canary:
    """Records that it was unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_pickle_that_is_refused_is_not_read(tmp_path: Path) -> None:
    """The canary records an unpickling only where the setting allows it."""
    canary = tmp_path / "sang"
    bundle = publish_preprocessor(with_a_pattern(), ROWS, name="m", repository=tmp_path, allow_pickle=True)
    pickle = io.BytesIO()
    joblib.dump(Canary(canary), pickle)
    files = {"pipeline.joblib": pickle.getvalue(), "golden.npz": bundle.read("golden.npz")}
    bundle = Repository(tmp_path / "forged").write(bundle.manifest, files)

    with pytest.raises(BundleError, match="a pickle"):
        preprocessor.load(bundle)
    assert not canary.exists()

    with pytest.raises(AttributeError, match="transform"):  # what it left behind is no transformer
        preprocessor.load(bundle, allow_unsafe_pickle=True)
    assert canary.exists()
