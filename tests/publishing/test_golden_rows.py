"""What is stored as golden rows: rows of the training data, the publisher's own, or generated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, StandardScaler

from splitserve import PublishError, publish, publish_preprocessor, release
from splitserve.arrays import Array, to_array
from splitserve.publishing import Published, halves
from splitserve.publishing.golden_rows import synthetic
from splitserve.repository import golden as goldens
from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import GOLDEN_FILE, Kind
from splitserve.repository.release import Release
from splitserve.repository.releases import MAX_GOLDEN_BYTES, ReleaseReader
from splitserve.runtimes.rows import observe
from tests.command_line import run_command

IRIS, SPECIES = load_iris(return_X_y=True)
PIPELINE = make_pipeline(StandardScaler(), LogisticRegression()).fit(IRIS, SPECIES)
RANDOM = np.random.default_rng(1)
PEOPLE = pd.DataFrame(
    {
        "income": RANDOM.normal(3000, 900, 200),
        "age": RANDOM.integers(18, 90, 200),
        "city": RANDOM.choice(["Kassel", "Ulm", "Jena"], 200).astype(object),
        "member": RANDOM.choice([True, False], 200),
        "letter": pd.Categorical(RANDOM.choice(["a", "b"], 200), categories=["a", "b", "c"]),
        "level": RANDOM.choice([10, 20, 30], 200),
    }
)
PEOPLE.loc[::7, "income"] = np.nan
TRANSFORMS = make_column_transformer(
    (make_pipeline(SimpleImputer(), StandardScaler()), ["income", "age"]),
    (OneHotEncoder(), ["city", "letter"]),
    (OrdinalEncoder(), ["level"]),
    ("passthrough", ["member"]),
)
PEOPLE_PIPELINE = make_pipeline(TRANSFORMS, Ridge()).fit(PEOPLE, PEOPLE["age"])


def golden(root: Path, kind: Kind, name: str = "m") -> tuple[goldens.Golden, str]:
    bundle = Repository(root).open(BundleKey(name, kind, 1))
    manifest = bundle.manifest
    return goldens.decode(bundle.read(GOLDEN_FILE), manifest.inputs, manifest.outputs, manifest.trained_on), manifest.golden


def current(root: Path, name: str = "m") -> Release:
    found = ReleaseReader(Repository(root)).history(name).current()
    assert found is not None
    return found


def rows_of(root: Path, kind: Kind) -> Array:
    found, _ = golden(root, kind)
    tensors = found.inputs if kind == "preprocess" else found.rows
    return np.concatenate([to_array(tensor).astype(object) for tensor in tensors], axis=1)


def everywhere(root: Path) -> set[str]:
    """What both bundles and the release say of their golden rows."""
    return {golden(root, "preprocess")[1], golden(root, "predict")[1], current(root).manifest.golden}


def test_rows_of_the_training_data_are_stored_by_default_and_that_is_said(tmp_path: Path) -> None:
    published = publish(PIPELINE, IRIS, name="m", repository=tmp_path)

    stored = rows_of(tmp_path, "preprocess").astype(float)
    assert everywhere(tmp_path) == {"rows"}
    assert all((row == IRIS).all(axis=1).any() for row in stored)
    assert str(published).endswith(f'\n{len(stored)} rows of X are stored as golden samples (golden="synthetic" stores none)')


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Published]:
    """Published with generated rows."""
    root = tmp_path_factory.mktemp("generated")
    return root, publish(PEOPLE_PIPELINE, PEOPLE, name="m", repository=root, golden="synthetic")


@pytest.mark.parametrize("kind", ["preprocess", "predict"])
def test_no_row_of_the_training_data_is_stored_if_they_are_generated(generated: tuple[Path, Published], kind: Kind) -> None:
    """Neither in the bundles nor, from them, in the release; the numbers lie in the columns' ranges."""
    root, published = generated

    trained = {tuple(map(str, row)) for row in PEOPLE.fillna(-1).astype(object).to_numpy().tolist()}
    incomes = set(PEOPLE["income"].dropna())
    stored = rows_of(root, kind)
    assert everywhere(root) == {"synthetic"}
    assert "generated rows are stored" in str(published)
    assert len(stored) > 30
    assert not [row for row in stored.tolist() if row[0] in incomes]
    assert not trained & {tuple(map(str, row)) for row in stored.tolist()}
    assert np.nanmin(stored[:, 0].astype(float)) >= min(incomes)
    assert np.nanmax(stored[:, 0].astype(float)) <= max(incomes)


def test_generated_rows_show_every_category_and_a_missing_value(generated: tuple[Path, Published]) -> None:
    found, _ = golden(generated[0], "preprocess")
    by_name = {tensor.name: to_array(tensor).ravel() for tensor in found.inputs}
    assert set(by_name["city"]) == {b"Kassel", b"Ulm", b"Jena"}
    assert set(by_name["letter"]) == {b"a", b"b"}, "those that occur"
    assert set(by_name["level"]) == {10, 20, 30}
    assert set(by_name["member"]) == {True, False}
    assert np.isnan(by_name["income"]).any()
    assert (by_name["age"] == by_name["age"].round()).all()


def test_rows_of_ones_own_are_stored(tmp_path: Path) -> None:
    """Whole numbers where training had others will do; columns in another order too."""
    own = pd.DataFrame({name: PEOPLE[name].iloc[:3] for name in reversed(PEOPLE.columns)})
    own["income"] = [1, 2, 3]

    published = publish(PEOPLE_PIPELINE, PEOPLE, name="m", repository=tmp_path, golden=own)

    assert everywhere(tmp_path) == {"own"}
    assert rows_of(tmp_path, "preprocess")[:, 0].tolist() == [1.0, 2.0, 3.0]
    assert "3 rows of your own are stored" in str(published)


@pytest.mark.parametrize(
    ("golden", "message"),
    [
        ("none", 'golden: expected "rows", "synthetic", or a DataFrame or array of rows, got "none"'),
        (PEOPLE[["age"]], r"golden: expected a DataFrame with the columns of X \(income, age.*\), got columns age$"),
        (np.zeros((2, 6)), r"golden: expected a DataFrame with the columns of X .*, got an array of shape \(2, 6\)"),
        (PEOPLE[:0], "X has no rows"),
    ],
)
def test_what_are_no_golden_rows_is_said(tmp_path: Path, golden: Any, message: str) -> None:
    with pytest.raises(PublishError, match=message):
        publish(PEOPLE_PIPELINE, PEOPLE, name="m", repository=tmp_path, golden=golden)
    assert list(tmp_path.iterdir()) == []


def test_an_array_of_another_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"golden: expected an array of shape \(n_rows, 4\) like X"):
        publish(PIPELINE, IRIS, name="m", repository=tmp_path, golden=np.zeros((2, 3)))


def test_generated_text_is_made_of_learnt_words(tmp_path: Path) -> None:
    """A text is a row by itself: none is taken over."""
    texts = np.array(["the quick fox", "a lazy dog", "the lazy fox"] * 5, dtype=object)
    pipeline = make_pipeline(CountVectorizer(), LogisticRegression()).fit(texts, [0, 1, 0] * 5)

    publish(pipeline, texts, name="m", repository=tmp_path, golden="synthetic")

    stored = {text.decode() for text in to_array(golden(tmp_path, "preprocess")[0].inputs[0]).ravel()}
    assert not stored & set(texts)
    assert {word for text in stored for word in text.split()} <= {"the", "quick", "fox", "lazy", "dog"}


def test_generated_pictures_are_of_the_same_kind() -> None:
    pictures = RANDOM.integers(0, 255, (5, 4, 4, 3)).astype(np.uint8)
    form, _ = observe(pictures, "x")

    made = synthetic(pictures, form)

    assert made.dtype == np.uint8
    assert made.shape[1:] == (4, 4, 3)


@given(st.lists(st.floats(allow_nan=True, width=32), min_size=1, max_size=20))
def test_generated_numbers_stay_within_the_column(values: list[float]) -> None:
    """Whatever is in it."""
    data = np.array(values, dtype=np.float64).reshape(-1, 1)
    form, _ = observe(data, "x")

    made = synthetic(data, form)

    finite, found = data[np.isfinite(data)], made[np.isfinite(made)]
    assert made.shape[1:] == (1,)
    if finite.size:
        assert finite.min() <= found.min()
        assert found.max() <= finite.max()


def test_a_release_of_halves_takes_over_where_its_rows_come_from(tmp_path: Path) -> None:
    publish(PIPELINE, IRIS, name="m", repository=tmp_path, golden="synthetic")
    publish_preprocessor(StandardScaler().fit(IRIS), IRIS, name="m", repository=tmp_path, golden="synthetic")

    assert release("m", "2.1", repository=tmp_path).manifest.golden == "synthetic"
    assert release("m", "2.1", repository=tmp_path, rows=IRIS[:5]).manifest.golden == "own"


def test_a_file_of_golden_rows_is_at_most_8_mib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows are kept where they are large; here a hundredth of the limit and of the rows' size."""
    limit = MAX_GOLDEN_BYTES // 100
    monkeypatch.setattr(halves, "MAX_GOLDEN_BYTES", limit)
    wide = RANDOM.normal(size=(40, 2_000)).astype(np.float32)
    publish_preprocessor(FunctionTransformer().fit(wide), wide, name="m", repository=tmp_path)

    file = tmp_path / "m" / "preprocess" / "1" / GOLDEN_FILE
    assert MAX_GOLDEN_BYTES == 8 * 2**20
    assert file.stat().st_size <= limit
    assert golden(tmp_path, "preprocess")[0].inputs[0].n_rows >= 2


def test_a_row_that_does_not_fit_into_them_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "MAX_GOLDEN_BYTES", 1000)
    wide = RANDOM.normal(size=(4, 2000))

    with pytest.raises(PublishError, match=r"1 golden rows have \d+ bytes, compressed; the limit is 1000"):
        publish_preprocessor(FunctionTransformer().fit(wide), wide, name="m", repository=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import skops.io

    monkeypatch.chdir(tmp_path)
    skops.io.dump(PIPELINE, "pipeline.skops")
    skops.io.dump(PIPELINE[:-1], "transforms.skops")
    np.save("rows.npy", IRIS)
    np.save("own.npy", IRIS[:5] + 0.001)

    def run(*arguments: str) -> Any:
        return run_command("publish", "m", "--data", "rows.npy", "--repository", "models", *arguments)

    assert "16 rows of X are stored" in run("--pipeline", "pipeline.skops").output
    assert "5 rows of your own are stored" in run("--pipeline", "pipeline.skops", "--golden", "own.npy").output
    assert "generated rows are stored" in run("--transformer", "transforms.skops", "--golden", "synthetic").output
    assert run("--transformer", "transforms.skops", "--golden", "nowhere.npy").exit_code == 1
    assert "--golden goes with --pipeline or --transformer" in run("--onnx", "x.onnx", "--golden", "synthetic").output
