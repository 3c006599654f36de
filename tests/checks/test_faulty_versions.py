"""Versions that would answer differently from training: each kind is planted, and none serves.

The kinds: T3 another fit with the same shape, T4 columns in another order, T5 answers that depend on other rows or on chance,
T6 answers that are not finite, T7 labels in another order, T8 edits with digests regenerated, T12 files that grow beyond bounds.
T1 and T2, which are about publishing and polling, are in tests/publishing/test_releasing.py and tests/system.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.datasets import load_iris
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, KBinsDiscretizer, MinMaxScaler, StandardScaler

from splitserve import PublishError, publish, publish_predictor, publish_preprocessor, release
from splitserve.arrays import from_array, to_array
from splitserve.checks.examination import examine
from splitserve.checks.matrix import HERE, Matrix, judge
from splitserve.publishing.convert import to_onnx
from splitserve.repository import golden as goldens
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.golden import Golden
from splitserve.repository.manifest import BundleError, Tolerance
from splitserve.runtimes import predictor as predictors
from tests.budgets import examples

IRIS, SPECIES = load_iris(return_X_y=True)
PIPELINE = make_pipeline(StandardScaler(), LogisticRegression()).fit(IRIS, SPECIES)


def matrix(models: Path) -> Matrix:
    source = Repository(models)
    return judge(source, {HERE: examine(source)})


def serving(models: Path) -> set[str]:
    """The pairs that a service would serve: released, the halves those that were released, the whole answering as recorded."""
    return {release.pair for release in matrix(models).releases if release.verdicts[HERE].is_admitted}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``m`` with the releases 1.1 and 2.2: two trainings on the same data, so that each half fits the other's."""
    models = tmp_path_factory.mktemp("models")
    publish(PIPELINE, IRIS, name="m", repository=models)
    publish(make_pipeline(MinMaxScaler(), LogisticRegression()).fit(IRIS, SPECIES), IRIS, name="m", repository=models)
    assert serving(models) == {"1.1", "2.2"}
    return models


FILES = [
    *(
        f"preprocess/1/{name}"
        for name in ("manifest.json", "pipeline.skops", "pipeline.onnx", "plan.json", "plan.npz", "golden.npz")
    ),
    *(f"predict/1/{name}" for name in ("manifest.json", "model.onnx", "golden.npz")),
    *(f"releases/0001-1.1/{name}" for name in ("manifest.json", "golden.npz")),
]


def changed(path: Path, data: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


@settings(max_examples=examples(300), deadline=None)
@given(file=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_no_byte_can_be_changed(published: Path, file: str, place: float, flip: int) -> None:
    """In a bundle or in a release: at the next load it does not serve. The other release does."""
    path = published / "m" / file
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= flip

    for _ in changed(path, bytes(data)):
        assert serving(published) == {"2.2"}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all fields of a manifest."""
    if isinstance(value, dict | list) and value:
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key)
            yield from leaves(each, (*path, key))


def edited(content: Any, path: tuple[Any, ...], edit: str) -> Any:
    """With a field deleted, or changed within its type, or replaced."""
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    value = holder[path[-1]]
    if edit == "delete":
        del holder[path[-1]]
    elif edit == "null":
        holder[path[-1]] = None
    elif isinstance(value, bool):
        holder[path[-1]] = not value
    elif isinstance(value, int | float):
        holder[path[-1]] = value * 2 + 1
    elif isinstance(value, str):
        holder[path[-1]] = value + "x"
    else:
        holder[path[-1]] = type(value)()
    return content


MANIFESTS = [file for file in FILES if file.endswith("manifest.json")]


@settings(max_examples=examples(400), deadline=None)
@given(file=st.sampled_from(MANIFESTS), edit=st.sampled_from(["change", "delete", "null"]), data=st.data())
def test_no_field_can_be_changed(published: Path, file: str, edit: str, data: st.DataObject) -> None:
    """Of any manifest, nested ones too: names, digests, tolerances, labels, environment, when it was made."""
    path = published / "m" / file
    content = json.loads(path.read_bytes())
    field = data.draw(st.sampled_from(list(leaves(content))))
    after = edited(content, field, edit)

    for _ in changed(path, msgspec.json.format(msgspec.json.encode(after), indent=2)):
        assert serving(published) == {"2.2"}, field


@pytest.mark.parametrize("file", FILES)
def test_no_file_can_be_taken_away(published: Path, file: str) -> None:
    path = published / "m" / file
    before = path.read_bytes()
    path.unlink()

    try:
        assert "1.1" not in serving(published)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("half", ["preprocess", "predict"])
@pytest.mark.parametrize("is_renumbered", [False, True], ids=["as it is", "with its number edited"])
def test_no_half_can_be_replaced_by_another_valid_one(published: Path, tmp_path: Path, half: str, is_renumbered: bool) -> None:
    """Version 2 in the place of version 1: it loads and fits, but it is not the released bundle."""
    models = Path(shutil.copytree(published, tmp_path / "models"))
    shutil.rmtree(models / "m" / half / "1")
    shutil.copytree(models / "m" / half / "2", models / "m" / half / "1")
    if is_renumbered:
        manifest = models / "m" / half / "1" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 1'))

    assert serving(models) == {"2.2"}
    if is_renumbered:
        judged = next(each for each in matrix(models).releases if each.pair == "1.1")
        assert "is not the bundle that was released" in judged.verdicts[HERE].reasons[0]


def test_a_record_of_another_release_cannot_stand_in_for_it(published: Path, tmp_path: Path) -> None:
    models = Path(shutil.copytree(published, tmp_path / "models"))
    shutil.copytree(models / "m" / "releases" / "0002-2.2", models / "m" / "releases" / "0003-1.2")

    assert serving(models) == {"1.1", "2.2"}


def test_halves_of_two_releases_do_not_serve_together(published: Path) -> None:
    """Both are proven, and each with another partner; the one that means something else is not even offered."""
    assert {pair.pair for pair in matrix(published).pairs} == {"1.2", "2.1"}


# T3: another fit with the same shape; T4: columns in another order where names are not known


def bins(rows: Any) -> Any:
    return KBinsDiscretizer(3, encode="ordinal", strategy="uniform").fit(rows)


def swapped(rows: Any) -> Any:
    return np.asarray(rows)[:, ::-1]


def as_is(rows: Any) -> Any:
    return np.asarray(rows)


NAMELESS = FunctionTransformer(as_is)
TEXTS = np.array(["good film", "bad film", "very bad", "very good"] * 3, dtype=object)

OTHER_FITS: dict[str, tuple[Any, Any, Any]] = {
    "T3 a scaler in other units": (StandardScaler().fit(IRIS), StandardScaler().fit(IRIS * 10), IRIS),
    "T3 another scaler": (StandardScaler().fit(IRIS), MinMaxScaler().fit(IRIS), IRIS),
    "T3 a refitted PCA": (PCA(2).fit(IRIS), PCA(2).fit(IRIS[:90]), IRIS),
    "T3 other bin edges": (bins(IRIS), bins(np.vstack([IRIS, IRIS.max(axis=0) * 1.02])), IRIS),
    "T3 another analyser of hashed text": (
        HashingVectorizer(n_features=16),
        HashingVectorizer(n_features=16, analyzer="char"),
        TEXTS,
    ),
    "T4 columns in another order before a scaler": (
        make_pipeline(NAMELESS, StandardScaler()).fit(IRIS),
        make_pipeline(FunctionTransformer(swapped), StandardScaler()).fit(IRIS),
        IRIS,
    ),
    "T4 columns in another order before an estimator alone": (NAMELESS.fit(IRIS), FunctionTransformer(swapped).fit(IRIS), IRIS),
}


@pytest.mark.parametrize("kind", OTHER_FITS)
def test_features_that_mean_something_else_are_not_released(tmp_path: Path, kind: str) -> None:
    """The shapes agree, and often the names: only the numbers differ."""
    trained, other, rows = OTHER_FITS[kind]
    options: dict[str, Any] = {"name": "m", "repository": tmp_path, "trusted_modules": [__name__]}
    target = np.arange(len(rows), dtype=float) % 5
    pipeline = make_pipeline(trained, Ridge())
    pipeline.fit(rows, target)
    publish(pipeline, rows, **options)
    publish_preprocessor(other, rows, **options)

    with pytest.raises(PublishError, match=r"features differ|the halves do not fit"):
        release("m", "2.1", repository=tmp_path, trusted_modules=[__name__])

    assert "2.1" in {pair.pair for pair in matrix(tmp_path).pairs}


# T5: answers that depend on the other rows of the call, or on chance


def centred(rows: Any) -> Any:
    return rows - np.asarray(rows).mean(axis=0)


class Learning(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Transforms that learn while they transform."""

    def fit(self, rows: Any, y: Any = None) -> Learning:
        self.n_seen_ = 0
        return self

    def transform(self, rows: Any) -> Any:
        self.n_seen_ += len(rows)
        return np.asarray(rows) + self.n_seen_


def graph(*nodes: Any, initializers: Any = ()) -> bytes:
    """A model of 4 features that gives ``scores`` of 4."""
    specs = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4])] for name in ("features", "scores")]
    made = helper.make_graph(list(nodes), "graph", *specs, list(initializers))
    model: bytes = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return model


GRAPHS = {
    "T5 a batch mean in the graph": graph(
        helper.make_node("ReduceMean", ["features"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["features", "mean"], ["scores"]),
    ),
    "T5 dropout in training mode": graph(
        helper.make_node("Dropout", ["features", "ratio", "training"], ["scores"]),
        initializers=[
            numpy_helper.from_array(np.array(0.5, np.float32), "ratio"),
            numpy_helper.from_array(np.array(True), "training"),
        ],
    ),
    "T5 a cumulative sum over rows": graph(
        helper.make_node("CumSum", ["features", "axis"], ["scores"]),
        initializers=[numpy_helper.from_array(np.array(0, np.int64), "axis")],
    ),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_model_whose_answers_depend_on_other_rows_or_on_chance_is_not_published(tmp_path: Path, kind: str) -> None:
    with pytest.raises(PublishError, match=r"depends on the other rows of its call, or on chance"):
        publish_predictor(GRAPHS[kind], IRIS.astype(np.float32), name="m", repository=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("transforms", [FunctionTransformer(centred), Learning()], ids=["T5 centring a batch", "T5 learning"])
def test_transforms_whose_answers_depend_on_other_rows_are_not_published(tmp_path: Path, transforms: Any) -> None:
    with pytest.raises(PublishError):
        publish_preprocessor(transforms.fit(IRIS), IRIS, name="m", repository=tmp_path, trusted_modules=[__name__])
    assert list(tmp_path.iterdir()) == []


# T6: answers that are not finite where the pipeline's are


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["T6 NaN", "T6 infinite"])
def test_a_model_that_answers_nothing_finite_does_not_serve(tmp_path: Path, value: float) -> None:
    """Neither published nor, with samples that say the same, loaded."""
    broken = graph(
        helper.make_node("Mul", ["features", "factor"], ["scores"]),
        initializers=[numpy_helper.from_array(np.array(value, np.float32), "factor")],
    )
    good = graph(helper.make_node("Identity", ["features"], ["scores"]))
    rows = np.abs(IRIS.astype(np.float32)) + 1
    bundle = publish_predictor(good, rows, name="m", repository=tmp_path)
    golden = goldens.decode(bundle.read("golden.npz"), bundle.manifest.inputs, bundle.manifest.outputs)
    answers = tuple(from_array(each.name, np.full_like(to_array(each), value)) for each in golden.outputs)
    repository = Repository(tmp_path)
    files = {"model.onnx": broken, "golden.npz": goldens.encode(Golden(golden.inputs, answers))}
    tolerances = {"scores": Tolerance(atol=1e-5)}
    planted = repository.write(msgspec.structs.replace(bundle.manifest, version=7, tolerances=tolerances), files)

    with pytest.raises(BundleError, match="not finite in any row"):
        predictors.load(planted)
    publish_preprocessor(FunctionTransformer().fit(rows), rows, name="m", repository=tmp_path)
    with pytest.raises(PublishError):
        release("m", "1.7", repository=tmp_path, accept_unknown_features=True)


# T7: labels in another order


def test_t7_halves_with_the_labels_in_another_order_are_not_released(tmp_path: Path) -> None:
    """The count agrees, and so do the outputs."""
    from splitserve.publishing import Postprocess

    scaler = StandardScaler().fit(IRIS)
    model = to_onnx(LogisticRegression().fit(scaler.transform(IRIS), SPECIES), 4, input_name="features", precision="FP32")
    features = scaler.transform(IRIS).astype(np.float32)
    publish_preprocessor(
        scaler, IRIS, name="m", repository=tmp_path, labels=[2, 1, 0], postprocess=Postprocess("probabilities", "none")
    )
    publish_predictor(model, features, name="m", repository=tmp_path, labels=[0, 1, 2], trained_on=scaler, rows=IRIS)

    with pytest.raises(PublishError, match=r"the preprocessor has the labels 2, 1, 0, the predictor 0, 1, 2"):
        release("m", "1.1", repository=tmp_path)


# T8: edits with digests regenerated, as a careless tool makes them

Edit = Callable[[dict[str, Any], dict[str, bytes]], None]


def set_field(name: str, value: Any) -> Edit:
    return lambda content, files: content.update({name: value})


def wide_tolerances(content: dict[str, Any], files: dict[str, bytes]) -> None:
    content["tolerances"] = {name: {"rtol": 0.0, "atol": 1e30} for name in content["tolerances"]}


def one_golden_row(content: dict[str, Any], files: dict[str, bytes]) -> None:
    names = [(side, spec["name"]) for side in ("inputs", "outputs") for spec in content[side]]
    with np.load(io.BytesIO(files["golden.npz"])) as arrays:
        kept = {name: arrays[name] for name in arrays.files}
    for side, name in names:
        if f"{side}_shapes/{name}" not in kept:
            kept[f"{side}/{name}"] = kept[f"{side}/{name}"][:1]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **kept)
    files["golden.npz"] = buffer.getvalue()


def other_weights(content: dict[str, Any], files: dict[str, bytes]) -> None:
    if "model.onnx" in files:
        model = onnx.load_from_string(files["model.onnx"])
        model.doc_string = "retrained"
        files["model.onnx"] = model.SerializeToString()
    else:
        content["created"] = "2001-01-01T00:00:00+00:00"


EDITS: dict[str, Edit] = {
    "T8 tolerances of 1e30": wide_tolerances,
    "T8 golden samples cut to one row": one_golden_row,
    "T8 labels edited": set_field("labels", ["b", "a", "c"]),
    "T8 fingerprint deleted": set_field("fingerprint", ""),
    "T8 names of features edited": set_field("feature_names", ["a", "b", "c", "d"]),
    "T8 not row-wise": set_field("is_row_wise", False),
    "T8 quantised": set_field("is_quantised", True),
    "T8 another model of the same answers": other_weights,
}


@pytest.mark.parametrize("half", ["preprocess", "predict"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_bundle_with_right_digests_does_not_serve(published: Path, tmp_path: Path, half: str, edit: str) -> None:
    """The release knows the digest of the manifest that was proven."""
    models = Path(shutil.copytree(published, tmp_path / "models"))
    folder = models / "m" / half / "1"
    content = json.loads((folder / "manifest.json").read_bytes())
    files = {name: (folder / name).read_bytes() for name in content["files"]}
    EDITS[edit](content, files)
    for name, data in files.items():
        (folder / name).write_bytes(data)
        content["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / "manifest.json").write_text(json.dumps(content))

    assert serving(models) == {"2.2"}


def test_tolerances_beyond_the_bounds_do_not_load_without_a_release_either(published: Path, tmp_path: Path) -> None:
    """So they cannot prove a release either."""
    models = Path(shutil.copytree(published, tmp_path / "models"))
    repository = Repository(models)
    bundle = repository.open(BundleKey("m", "predict", 1))
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    wide = {name: Tolerance(atol=1e30) for name in bundle.manifest.tolerances}
    planted = repository.write(msgspec.structs.replace(bundle.manifest, version=7, tolerances=wide), files)

    with pytest.raises(BundleError, match="the limit for FP32"):
        predictors.load(planted)


# T12: what grows beyond bounds


def test_t12_golden_samples_of_too_many_rows_are_refused_before_they_are_made(tmp_path: Path) -> None:
    """Equal rows compress to nothing: a file of some kilobytes."""
    good = graph(helper.make_node("Identity", ["features"], ["scores"]))
    bundle = publish_predictor(good, IRIS.astype(np.float32), name="m", repository=tmp_path)
    rows = from_array("features", np.zeros((goldens.MAX_ROWS + 1, 4), np.float32))
    answers = from_array("scores", np.zeros((goldens.MAX_ROWS + 1, 4), np.float32))
    data = goldens.encode(Golden((rows,), (answers,)))
    assert len(data) < 10_000
    planted = Repository(tmp_path).write(
        msgspec.structs.replace(bundle.manifest, version=7), {"model.onnx": good, "golden.npz": data}
    )

    with pytest.raises(BundleError, match=f"expected at most {goldens.MAX_ROWS} rows"):
        predictors.load(planted)


def test_t12_of_features_that_explode_fewer_rows_are_kept(tmp_path: Path) -> None:
    """A file never exceeds its limit, compressed or not."""
    wide = np.eye(64, 8_000)
    explode = FunctionTransformer(exploded)

    publish_preprocessor(explode.fit(wide), wide, name="m", repository=tmp_path, trusted_modules=[__name__])

    file = tmp_path / "m" / "preprocess" / "1" / "golden.npz"
    bundle = Repository(tmp_path).open(BundleKey("m", "preprocess", 1))
    golden = goldens.decode(bundle.read("golden.npz"), bundle.manifest.inputs, bundle.manifest.outputs)
    assert file.stat().st_size <= 8 * 1024**2
    assert sum(len(tensor.raw) for tensor in (*golden.inputs, *golden.outputs)) <= 8 * 1024**2


def exploded(rows: Any) -> Any:
    return np.repeat(np.asarray(rows), 16, axis=1)
